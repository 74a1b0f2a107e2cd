"""The sessions: `nox` checks everything; `nox -s "tests(corda)"` runs one session for one distribution.

Distributions are found by their folders, so a new package needs no change here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECTS = {
    tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]: file.parent.relative_to(ROOT)
    for file in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
}
PACKAGES = {name: folder for name, folder in PROJECTS.items() if folder.parts[0] == "packages"}
LINTERS = ("codespell>=2.4.1", "ruff>=0.15,<1")
TYPE_CHECKERS = ("mypy>=1.20,<3", "types-PyYAML")
SPREADER = "pytest-xdist>=3.8"
SITE = ("furo>=2025.7.19", "myst-parser>=4.0.1", "sphinx>=8.2.3", "sphinx-design>=0.6.1")
PUBLISHERS = ("check-wheel-contents>=0.6.1", "twine>=6.1")

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process of a new environment compiles all that it imports
nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "contracts", "tests"]
nox.options.error_on_missing_interpreters = True

each_project = nox.parametrize("name", [nox.param(name, id=name) for name in PROJECTS])
each_package = nox.parametrize("name", [nox.param(name, id=name) for name in PACKAGES])


def settings_of(name: str) -> dict:
    """What a distribution says under `[tool.tenfold]`."""
    text = (PROJECTS[name] / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text).get("tool", {}).get("tenfold", {})


# A distribution whose dependencies collide with others' says `alone = true` and gets environments of its own.
ALONE = [name for name in PACKAGES if settings_of(name).get("alone")]
TOGETHER = [name for name in PROJECTS if name not in ALONE]
each_environment = nox.parametrize(
    "names", [nox.param(TOGETHER, id="together"), *(nox.param([name], id=name) for name in ALONE)]
)


def uv_environment() -> dict[str, str]:
    """pip's own settings of indexes, for uv, which does not read them; what is already set for uv stays."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings: dict[str, list[str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        values = value.strip("'\"").replace("\\n", " ").split()
        settings.setdefault(key.rpartition(".")[2], []).extend(v for v in values)
    found = {
        "UV_DEFAULT_INDEX": " ".join(settings.get("index-url", [])[:1]),
        "UV_INDEX": " ".join(dict.fromkeys(settings.get("extra-index-url", []))),
        "UV_FIND_LINKS": ",".join(dict.fromkeys(settings.get("find-links", []))),
    }
    if found["UV_INDEX"]:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip looks for the best version in all of them
    return {key: value for key, value in found.items() if value and key not in os.environ}


UV = uv_environment()


def requirement(name: str, extras: str = "") -> str:
    """A distribution of this repository as uv's requirement: by path, not editable, as a user gets it."""
    return f"{name}{extras} @ {(ROOT / PROJECTS[name]).as_uri()}"


def test_extras(name: str) -> str:
    """The extras of itself that a distribution's test group asks for."""
    group = tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["test"]
    return next((entry.removeprefix(name) for entry in group if entry.startswith(f"{name}[")), "")


def demo_extras(name: str) -> str:
    """The extras that a distribution's demo needs: ``demo``, and with alternatives the one that is tested."""
    return f"[{','.join(['demo', *settings_of(name).get('demo-with', [])])}]"


def install(session: nox.Session, *names: str, extras: str = "", group: bool = False, lowest: bool = False) -> None:
    """The named distributions with tenfold; with ``group`` the test dependencies of each, and nothing else."""
    groups = [f"--group={PROJECTS[name] / 'pyproject.toml'}:test" for name in names if group]
    sources = [requirement("tenfold")] if "tenfold" not in names else []
    sources += [requirement(name, test_extras(name) if group else extras) for name in names]
    # a rebuilt distribution has the same version, so uv's cache has to be told
    refresh = [f"--reinstall-package={name}" for name in PROJECTS]
    resolution = ["--resolution=lowest-direct"] if lowest else []
    # without uv's workspace sources, by which tenfold would be editable here, unlike at a user's
    session.install("--no-sources", *sources, *groups, *refresh, *resolution, env=UV)


# The same examples in every run; the weekly run of `tests` draws others (`-- --hypothesis-seed=random`).
SEED = "--hypothesis-seed=0"
QUICK = ("-m", "not slow and not gpu", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", SEED)


def pytest(session: nox.Session, *arguments: str, no_tests_is_fine: bool = False) -> None:
    """pytest from the root; exit code 5 says that no test was selected."""
    session.run("pytest", *arguments, *session.posargs, success_codes=[0, 5] if no_tests_is_fine else [0])


def quick_tests(session: nox.Session, name: str) -> None:
    """A distribution's tests but the slow ones, file by file on all cores, each process with one thread."""
    session.install(SPREADER, env=UV)
    session.env["OMP_NUM_THREADS"] = "1"
    pytest(session, str(PROJECTS[name] / "tests"), *QUICK)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint rules, spelling."""
    session.install(*LINTERS, env=UV)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("codespell")


@nox.session
@each_environment
def types(session: nox.Session, names: list[str]) -> None:
    """mypy, strict, on every distribution's source."""
    install(session, *names, group=True)
    session.install(*TYPE_CHECKERS, env=UV)
    session.run("mypy", *(str(PROJECTS[name] / "src") for name in names))


@nox.session
@each_environment
def contracts(session: nox.Session, names: list[str]) -> None:
    """What must hold for all distributions."""
    install(session, *names, group=True)
    session.install("hatchling", env=UV)
    session.env["TENFOLD_DISTRIBUTIONS"] = ",".join(names)
    pytest(session, "tests", SEED)


@nox.session
def docs(session: nox.Session) -> None:
    """The site in `docs/_build/html`; a warning is an error. `-- --links` asks every address outside, too."""
    install(session, *TOGETHER, group=True)
    session.install(*SITE, env=UV)
    out = ROOT / "docs/_build"
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(out / "html"))
    if "--links" in session.posargs:
        session.run("python", "-m", "sphinx", "-q", "-b", "linkcheck", "docs", str(out / "links"))


@nox.session
@each_project
def tests(session: nox.Session, name: str) -> None:
    """A distribution's tests, in an environment that holds what it declares plus its test group."""
    install(session, name, group=True)
    quick_tests(session, name)


@nox.session
@each_project
def slow(session: nox.Session, name: str) -> None:
    """Tests that take minutes."""
    install(session, name, group=True)
    pytest(session, str(PROJECTS[name] / "tests"), "-m", "slow", no_tests_is_fine=True)


@nox.session
@each_project
def gpu(session: nox.Session, name: str) -> None:
    """Tests that need a GPU, for a machine that has one."""
    install(session, name, group=True)
    pytest(session, str(PROJECTS[name] / "tests"), "-m", "gpu", no_tests_is_fine=True)


@nox.session
@each_project
def coverage(session: nox.Session, name: str) -> None:
    """Lines that the quick tests run, at least 95 % of what is not in `commands`; the list of the others is printed."""
    install(session, name, group=True)
    session.install("coverage>=7.10.3", SPREADER, env=UV)
    package = "tenfold" if name == "tenfold" else PROJECTS[name].name
    session.env.update(
        {"OMP_NUM_THREADS": "1", "COVERAGE_FILE": str(Path(session.create_tmp()).absolute() / "coverage")}
    )
    how = ["--rcfile=pyproject.toml", f"--source={package}"]
    session.run("coverage", "run", *how, "-m", "pytest", str(PROJECTS[name] / "tests"), *QUICK, *session.posargs)
    session.run("coverage", "combine", "--rcfile=pyproject.toml", "--quiet")
    session.run("coverage", "report", "--rcfile=pyproject.toml")
    method = ["--omit=*/commands/*", "--format=total", "--fail-under=95"]  # the verbs are swept, their demos run
    session.run("coverage", "report", "--rcfile=pyproject.toml", *method)


@nox.session
@each_project
def lowest(session: nox.Session, name: str) -> None:
    """The tests with exactly the lowest versions that are declared."""
    install(session, name, group=True, lowest=True)
    quick_tests(session, name)


@nox.session
@each_package
def demo(session: nox.Session, name: str) -> None:
    """A package's demo; `-- --full` decides every claim. Rebuilds demo-report/index.html, prints all claims so far."""
    install(session, name, extras=demo_extras(name))
    session.run(name, "demo", "--out", f"demo-report/{name}", "--overwrite", *session.posargs)
    session.run("python", "-m", "tenfold.report", "demo-report")


@nox.session
@each_package
def bench(session: nox.Session, name: str) -> None:
    """A package's benchmarks against its peers; the machine has to be idle."""
    install(session, name, extras="[bench]")
    for script in sorted((PROJECTS[name] / "benchmarks").glob("*.py")):
        session.run("python", str(script), "--out", f"bench-report/{name}/{script.stem}.json", *session.posargs)


@nox.session
@each_project
def build(session: nox.Session, name: str) -> None:
    """Wheel and sdist, installed as a user would and smoke-tested in this fresh environment."""
    out = Path(session.create_tmp()) / "dist"
    for project in {"tenfold", name}:
        session.run(
            "uv", "build", "--quiet", "--out-dir", str(out / project), str(PROJECTS[project]), external=True, env=UV
        )
    wheels = [str(next((out / project).glob("*.whl"))) for project in {"tenfold", name}]
    session.install(*wheels, *(f"--reinstall-package={project}" for project in PROJECTS), env=UV)
    project = tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    import_name = PROJECTS[name].name if name in PACKAGES else name
    session.run("python", "-c", f"import {import_name} as p; print(p.__name__, p.__version__, sorted(p.__all__))")
    for command in project.get("scripts", {}):
        session.run(command, "--version")
        session.run(command, "--help")
    listing = json.loads(session.run("uv", "pip", "list", "--format=json", "--quiet", silent=True, external=True))
    installed = {entry["name"] for entry in listing}
    unwanted = installed & set(settings_of(name).get("keeps-out", []))
    if unwanted:
        session.error(f"{name} puts {', '.join(sorted(unwanted))} into the user's environment")
    session.log(f"{len(installed)} distributions in the environment; built {sorted(p.name for p in out.rglob('*-*'))}")


def version_of(name: str) -> str:
    """The version that a distribution's source states."""
    import_name = PROJECTS[name].name if name in PACKAGES else name
    source = (PROJECTS[name] / "src" / import_name / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    return found[1] if found else ""


def fault_of_release(name: str, tag: str | None) -> str | None:
    """What keeps a distribution from being released: its version, its changelog or the tag; None for nothing."""
    version = version_of(name)
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return f"{name}: __version__ is {version!r}, expected numbers like 1.2.3 or 1.2.3rc1"
    changelog = (PROJECTS[name] / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)\n\s*(\S*)", changelog, re.MULTILINE)
    if not newest or newest[1] != version or not newest[2] or newest[2].startswith("#"):
        return (
            f"{name}: the newest section of {PROJECTS[name] / 'CHANGELOG.md'} is not one of {version} with text in it"
        )
    if tag is not None and tag != f"{name}-v{version}":
        return f"{name}: the tag is {tag!r}, its version asks for {name}-v{version}"
    return None


def build_into(session: nox.Session, folder: Path, out: Path) -> Path:
    """Wheel and sdist of a folder; the wheel's path."""
    session.run("uv", "build", "--quiet", "--no-sources", "--out-dir", str(out), str(folder), external=True, env=UV)
    (out / ".gitignore").unlink(missing_ok=True)  # uv's, nothing to release
    return next(out.glob("*.whl"))


def copy_with(source: Path, target: Path, file: str, old: str, new: str) -> Path:
    """A copy of a distribution's folder with one text of one file replaced."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    text = (target / file).read_text(encoding="utf-8")
    if old not in text:
        raise ValueError(f"{file} of {source} does not hold {old!r}")
    (target / file).write_text(text.replace(old, new), encoding="utf-8")
    return target


def side_by_side(session: nox.Session, name: str, wheel: Path, tmp: Path) -> None:
    """A package as it is and another one that was released with a later tenfold, in one environment.

    The later tenfold is this one with the next number; the other package asks for it, as a later release would.
    """
    version = version_of("tenfold")
    major, minor, patch = (int(part) for part in re.findall(r"\d+", version)[:3])
    later = f"{major}.{minor}.{patch + 1}"
    # not head-kd, which is nothing without a family of the mm stack
    own, other = [name, *(package for package in PACKAGES if package not in (name, "head-kd"))][name == "tenfold" :][:2]
    if name == "tenfold":
        wheel = build_into(session, ROOT / PROJECTS[own], tmp / "own")
    source, promised = "src/tenfold/__init__.py", f">={major}.{minor},<{major}.{minor + 1}"
    renewed = copy_with(ROOT / PROJECTS["tenfold"], tmp / "tenfold", source, f'"{version}"', f'"{later}"')
    asking = copy_with(
        ROOT / PROJECTS[other], tmp / "asking", "pyproject.toml", promised, f">={later},<{major}.{minor + 1}"
    )
    for folder in (ROOT / PROJECTS["tenfold"], renewed):
        build_into(session, folder, tmp / "links")
    wheels = [str(wheel), str(build_into(session, asking, tmp / "other"))]
    session.install(*wheels, f"--find-links={tmp / 'links'}", "--reinstall-package=tenfold", env=UV)
    session.run("uv", "pip", "check", external=True)
    names = ", ".join(sorted(PROJECTS[each].name for each in (own, other)))
    session.run(
        "python", "-c", f"import tenfold, {names}; assert tenfold.__version__ == {later!r}, tenfold.__version__"
    )


@nox.session
@each_project
def release(session: nox.Session, name: str) -> None:
    """All that a release of one distribution needs, its files in `dist/<distribution>/`; `-- --tag TAG` checks a tag."""
    given = list(session.posargs)
    tag = given[given.index("--tag") + 1] if "--tag" in given[:-1] else None
    fault = fault_of_release(name, tag)
    if fault:
        session.error(fault)
    out, tmp = ROOT / "dist" / name, Path(session.create_tmp()).absolute()
    for folder in (out, tmp):
        shutil.rmtree(folder, ignore_errors=True)
    wheel = build_into(session, ROOT / PROJECTS[name], out)
    session.install(*PUBLISHERS, env=UV)
    session.run("twine", "check", "--strict", *(str(file) for file in sorted(out.iterdir())))
    session.run("check-wheel-contents", str(wheel))
    tenfold = wheel if name == "tenfold" else build_into(session, ROOT / PROJECTS["tenfold"], tmp / "tenfold-wheel")
    group = f"--group={PROJECTS[name] / 'pyproject.toml'}:test"
    folders = [requirement(each, test_extras(name) if each == name else "") for each in {"tenfold", name}]
    for resolution in ("lowest-direct", "highest"):
        folder = tmp / resolution
        session.run("uv", "venv", "--quiet", "--python", session.python or sys.executable, str(folder), external=True)
        put = ["uv", "pip", "install", f"--python={folder / 'bin/python'}"]
        fresh = [f"--reinstall-package={project}" for project in {"tenfold", name}]
        # uv takes the requirements of a folder as direct ones, those of a wheel not: these come last, without any
        resolved = ["--no-sources", f"--resolution={resolution}", *folders, group, *fresh]
        session.run(*put, *resolved, external=True, env=UV)
        session.run(*put, "--no-deps", *{str(tenfold), str(wheel)}, *fresh, external=True, env=UV)
        session.run(*put, SPREADER, external=True, env=UV)
        session.env["OMP_NUM_THREADS"] = "1"
        session.run(str(folder / "bin/python"), "-m", "pytest", str(PROJECTS[name] / "tests"), *QUICK, external=True)
    side_by_side(session, name, wheel, tmp)
    session.log(f"{name} {version_of(name)} can be released: {', '.join(sorted(file.name for file in out.iterdir()))}")


@nox.session
@each_package
def sweep(session: nox.Session, name: str) -> None:
    """Every verb with what goes wrong in daily work; writes the package's part of `docs/sweep.md`."""
    install(session, name, group=True)
    reports = str(ROOT / "sweep-report")
    session.run("python", "tests/sweep.py", name, "--report", reports, success_codes=[0, 1])
    session.run("python", "tests/sweep.py", "--table", "--report", reports)
    found = json.loads((ROOT / "sweep-report" / f"{name}.json").read_text(encoding="utf-8"))
    if any(value.startswith("FAULT") for row in found.values() for value in row.values()):
        session.error(f"{name}: see docs/sweep.md")
