"""What `import X` costs and offers, and which imports the code may hold."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest
from distributions import ALL, imports_of, standard_library

HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "diffusers",
    "timm",
    "mmengine",
    "peft",
    "scipy",
    "sklearn",
    "matplotlib",
}


def test_import_is_light(distribution):
    script = f"import {distribution.import_name}, sys; print(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not HEAVY & set(out.split())


def test_public_names_load_on_first_use_and_again(distribution):
    module = distribution.module
    assert list(module.__all__) == sorted(module.__all__, key=lambda name: (name.startswith("__"), name)) or (
        sorted(module.__all__) == list(module.__all__)
    )
    for name in module.__all__:
        first, second = getattr(module, name), getattr(module, name)
        assert first is second
        assert not isinstance(first, ModuleType), f"{name} is the submodule"
        assert name not in distribution.modules, f"{name} is also a submodule's name"
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


def test_star_import_and_help_work_where_no_extra_is_installed(distribution):
    """In a process that finds nothing of what only an extra brings."""
    hidden = sorted(only_of_extras(distribution) & roots(distribution))
    script = f"""
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        def found(name, path=None, target=None):
            return None if name.partition(".")[0] in {hidden} else find(name, path, target)
        PathFinder.find_spec = found
        from {distribution.import_name} import *
        import {distribution.import_name} as package, pydoc
        missing = [name for name in package.__all__ if name not in globals()]
        assert not missing, missing
        print(len(pydoc.render_doc(package)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def roots(distribution) -> set[str]:
    """Top-level modules that the distribution's source imports."""
    return {found.module.partition(".")[0] for path in distribution.files for found in imports_of(path)}


def only_of_extras(distribution) -> set[str]:
    """Top-level modules that only an extra of the distribution brings."""
    project = distribution.project

    def names(lines):
        return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in lines}

    core = closure(names(project["dependencies"]))
    extra = names(line for group in project.get("optional-dependencies", {}).values() for line in group) - core
    provides = importlib.metadata.packages_distributions()
    modules = {
        module
        for module, owners in provides.items()
        if {owner.lower().replace("_", "-") for owner in owners} <= extra and not module.startswith("tenfold")
    }
    return modules - {distribution.import_name}


def closure(names: set[str]) -> set[str]:
    """The distributions, and all that they need."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [
            re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-")
            for line in lines
            if "extra ==" not in line
        ]
    return found


def test_a_packages_own_names_are_few_and_its_docstring_says_in_which_order_to_read_it(package):
    names = [name for name in package.module.__all__ if not name.startswith("__")]
    assert len(names) <= 26, f"{len(names)} names at the top level: what a user needs, about 20"
    text = inspect.getdoc(package.module) or ""
    named = [name for name in package.modules if f"``{name}``" in text]
    assert len(named) >= 3, "the docstring of __init__ names the method's files in the order in which to read them"


def test_public_names_are_documented(distribution):
    undocumented = [
        name
        for name in distribution.module.__all__
        if callable(value := getattr(distribution.module, name)) and not inspect.getdoc(value)
    ]
    assert not undocumented


def test_version_is_that_of_the_metadata(distribution):
    assert distribution.module.__version__ == importlib.metadata.version(distribution.name)


def test_typed(distribution):
    assert (distribution.source / "py.typed").exists()


def test_settings_need_no_torch(package):
    eager = {
        found.module.partition(".")[0] for found in imports_of(package.source / "config.py") if found.at_import_time
    }
    assert not eager & HEAVY


def test_no_package_imports_another_and_tenfold_imports_none(distribution):
    others = {other.import_name for other in ALL if other.is_package and other != distribution}
    for path in distribution.source.rglob("*.py"):
        found = {found.module.partition(".")[0] for found in imports_of(path)}
        assert not found & others, path.name


def test_declared_dependencies_are_those_that_are_imported(distribution):
    provides = {**importlib.metadata.packages_distributions(), **{d.import_name: [d.name] for d in ALL}}
    declared = distribution.requirements()
    files = [*distribution.source.rglob("*.py"), *(distribution.folder / "benchmarks").glob("*.py")]
    used = set()
    for path in files:
        for found in imports_of(path):
            root = found.module.partition(".")[0]
            if standard_library(root) or root == distribution.import_name:
                continue
            if path.stem == "testing" and root == "pytest":  # for test suites, which have it
                continue
            if path.parent.name == "benchmarks" and (path.parent / f"{root}.py").exists():
                continue
            names = {name.lower().replace("_", "-") for name in provides.get(root, [])}
            if not names:  # an extra that is not installed here: by name
                shown = root.lower().replace("_", "-")
                names = {name for name in declared if name == shown or name.startswith(f"{shown}-")}
            assert names & declared, f"{path.name} imports {root}, which is not declared"
            used |= names & declared
    # what only `bench` declares may be there for a peer's sake
    needless = distribution.requirements(bench=False) - used - {"tenfold", distribution.name}
    assert not needless, "declared, but imported nowhere"


def test_nothing_unpickles(distribution):
    for path in distribution.source.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "weights_only=False" not in text, path.name
        modules = {found.module for found in imports_of(path)}
        assert not modules & {"dill", "cloudpickle", "joblib"}, path.name
        if (distribution.name, path.stem) == ("tenfold", "readers"):  # where the checksum is the published one of CIFAR
            checked = text.index("hexdigest() != CIFAR_MD5[path.name]")
            text = text[:checked] + text[checked:].replace("pickle.loads(content, ", "(", 1)
        assert not re.search(r"pickle\.(?!UnpicklingError|PickleError|dumps\()\w", text), path.name
        assert not {module for module in modules if module.startswith("pickle.")}, path.name
        assert "allow_pickle=True" not in text, path.name
        assert "yaml.load(" not in text, path.name
