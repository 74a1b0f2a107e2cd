"""Which module may import which: cli -> (by name) commands -> training -> data, the method -> config, tenfold."""

import re
from pathlib import Path

import pytest
from distributions import DISTRIBUTIONS, Distribution, Import, imports_of

TRAINERS = {"lightning", "pytorch_lightning", "accelerate", "mmengine.runner", "mmengine.hooks", "transformers.Trainer"}
"""What trains: libraries, and parts of libraries that also hold models."""
NOT_FOR_THE_METHOD = {"tenfold.cli", "tenfold.terminal", "tenfold.claims", "tenfold.report", "tenfold.training"}
LEVELS = {"cli": 4, "commands": 3, "training": 2, "data": 1, "method": 0, "config": -1}


def trains(found: Import) -> bool:
    return any(found.module == name or found.module.startswith((f"{name}.", f"{name}Callback")) for name in TRAINERS)


def layer(package: Distribution, path: Path) -> str:
    """A module that imports a trainer's library is of the layer ``training``, wherever it lies below the commands."""
    first = path.relative_to(package.source).parts[0].removesuffix(".py")
    if first in LEVELS:
        return first
    return "training" if any(trains(found) for found in imports_of(path) if found.when != "typing") else "method"


def own_imports(package: Distribution, path: Path) -> list[tuple[str, Import]]:
    """The package's own modules that a module imports, by name; what is only for type checkers is left out."""
    found = [(package.owns(i.module), i) for i in imports_of(path) if i.when != "typing"]
    return [
        (name, i) for name, i in found if name is not None and name not in {package.import_name, package.name_of(path)}
    ]


def files(package: Distribution) -> dict[str, Path]:
    return {package.name_of(path): path for path in package.files if path.name != "__init__.py"}


def test_the_arrows_go_one_way(package):
    known = files(package)
    for name, path in known.items():
        level = LEVELS[layer(package, path)]
        for target, _ in own_imports(package, path):
            if target in known:
                there = layer(package, known[target])
                assert LEVELS[there] <= level, f"{name} ({layer(package, path)}) imports {target} ({there})"


def test_nothing_but_the_command_line_imports_a_command_and_that_by_name(package):
    for name, path in files(package).items():
        for target, _ in own_imports(package, path):
            parts = target.split(".")
            if parts[1] == "commands" and len(parts) > 2:
                assert name.split(".")[1] == "commands", f"{name} imports {target}"
                assert parts[2].startswith("_"), (
                    f"{name} imports the command {target}: what two commands need is a leaf"
                )


def test_leaves_of_the_commands_import_no_command(package):
    for name, path in files(package).items():
        parts = name.split(".")
        if parts[1] == "commands" and parts[-1].startswith("_"):
            commands = [t for t, _ in own_imports(package, path) if re.search(r"\.commands\.[a-z]", t)]
            assert not commands, f"{name} imports {commands}"


def test_the_method_knows_no_command_line_no_claims_and_no_trainer(package):
    for name, path in files(package).items():
        if layer(package, path) == "method":
            odd = [i.module for i in imports_of(path) if i.when != "typing" and forbidden(i.module)]
            assert not odd, f"{name} imports {odd}"


def forbidden(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NOT_FOR_THE_METHOD)


def test_every_verb_is_a_file_and_every_file_a_verb(package):
    there = {path.stem for path in (package.source / "commands").glob("*.py") if not path.stem.startswith("_")}
    assert there == {verb.module for verb in package.app.verbs}


def test_imports_stand_at_the_top_of_a_command(package):
    for name, path in files(package).items():
        if name.split(".")[1] == "commands":
            late = [i.module for i in imports_of(path) if i.when == "call" and package.owns(i.module)]
            assert not late, f"{name} imports {late} within a function: its file is imported when its verb runs"


def test_the_command_line_is_a_table(package):
    text = (package.source / "cli.py").read_text(encoding="utf-8")
    assert "def " not in text
    assert len(text.splitlines()) <= 80


def test_no_module_imports_names_of_its_own_packages_init(distribution):
    for path in distribution.files:
        for found in imports_of(path):
            if found.module == distribution.import_name and found.plain:
                pytest.fail(f"{path.name} imports its own package")
            head, _, name = found.module.rpartition(".")
            if head == distribution.import_name and not found.plain and path.name != "__init__.py":
                assert name in distribution.modules, f"{path.name} takes {name} from its own package's __init__"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.name)
def test_there_is_no_circle(distribution):
    """Also not one that is broken up by an import within a function."""
    known = files(distribution)
    arrows = {name: {t for t, _ in own_imports(distribution, path) if t in known} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, (*way, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


def test_no_file_is_longer_than_its_subject(distribution):
    for path in distribution.files:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path.name


def test_no_file_is_named_for_nothing(distribution):
    assert not {path.stem for path in distribution.files} & {"utils", "helpers", "misc", "common"}
