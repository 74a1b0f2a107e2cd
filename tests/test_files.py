"""The files around the code: README, changelog, license, wheels."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from distributions import ALL, DISTRIBUTIONS, ROOT

SECTIONS = ["Install", "Use in Python", "Command line", "Results", "Full scale", "Limits", "Cite"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """The wheel of every distribution, built once from the tree."""
    folder = tmp_path_factory.mktemp("wheels")
    for distribution in DISTRIBUTIONS:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / distribution.name)]
        subprocess.run(command, cwd=distribution.folder, check=True, capture_output=True, timeout=120)
    return {d.name: zipfile.ZipFile(next((folder / d.name).glob("*.whl"))) for d in DISTRIBUTIONS}


def test_the_wheel_holds_the_package_whole_and_nothing_else(distribution, wheels):
    names = set(wheels[distribution.name].namelist())
    outside = {n for n in names if not n.startswith((f"{distribution.import_name}/", f"{distribution.import_name}-"))}
    assert not outside
    assert any(re.search(r"dist-info/licenses/LICENSE$", name) for name in names)
    sources = {
        f"{distribution.import_name}/{path.relative_to(distribution.source).as_posix()}"
        for path in distribution.source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert f"{distribution.import_name}/py.typed" in sources
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_the_metadata_is_whole(distribution):
    project = distribution.project
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    bounded = [line for line in project["dependencies"] if ">=" in line]
    assert bounded == project["dependencies"], "every dependency has a lower bound that was tested"
    if distribution.is_package:
        tenfold = [line for line in project["dependencies"] if line.startswith("tenfold")]
        assert len(tenfold) == 1
        assert tenfold[0].endswith(">=0.1,<0.2")
    assert (distribution.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_changelog_has_this_version(distribution):
    changelog = (distribution.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(distribution.module.__version__)}\b", changelog, re.MULTILINE)


def test_the_index_shows_paper_license_and_what_it_is_for(distribution):
    project = tomllib.loads((distribution.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert any(each.startswith("Topic :: ") for each in project["classifiers"])
    if distribution.is_package:
        assert project["urls"]["Paper"].startswith("https://arxiv.org/abs/")


def test_the_readme_has_its_sections(package):
    readme = (package.folder / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert [section for section in found if section in SECTIONS] == SECTIONS
    assert re.search(r"!\[.+\]\(.+\)", readme), "one picture"


def test_the_pictures_of_the_readmes_are_there():
    for readme in [ROOT / "README.md", *(d.folder / "README.md" for d in DISTRIBUTIONS)]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", readme.read_text(encoding="utf-8")):
            assert (readme.parent / target).exists(), f"{readme}: {target}"


def test_the_python_blocks_of_the_readme_run(distribution, tmp_path, monkeypatch):
    readme = (distribution.folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks or not distribution.is_package
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"{distribution.name}/README.md", "exec"), names)


def test_the_root_readme_does_not_call_a_package_unbuilt_that_is_there(package):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.search(rf"^\| `{package.name}` .*not yet built", readme, re.MULTILINE)


def test_no_file_names_an_index_or_a_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    address = re.compile(
        r"https?://[^\s\"')]*/simple\b|--(?:extra-)?index-url[= ]\S+://|(?<![\w./-])/(?:home|root|opt)/\w"
    )
    for name in filter(None, tracked):
        path = ROOT / name
        if (
            path.suffix in {".py", ".toml", ".md", ".yaml", ".yml", ".cfg", ".cff", ""}
            and path.is_file()
            and path != ROOT / "tests/test_files.py"
        ):
            assert not address.search(path.read_text(encoding="utf-8")), name


def test_the_tables_of_the_root_readme_are_those_of_the_kept_runs():
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs/results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    assert set(results.headlines()) == {d.import_name for d in ALL if d.is_package}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == results.filled(readme), "run `python docs/results.py`"
    assert all((ROOT / "docs/images" / each["picture"]).exists() for each in results.headlines().values())
