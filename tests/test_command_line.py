"""The command line of every package: light, the same words for the same things, one line for what the user can mend."""

import subprocess
import sys

import pytest
import yaml
from distributions import PACKAGES

from tenfold.testing import assert_user_error

VERBS = [
    pytest.param(package, verb, id=f"{package.name}-{verb.name}") for package in PACKAGES for verb in package.app.verbs
]


def test_help_and_version_answer_without_torch(package):
    verbs = [verb.name for verb in package.app.verbs]
    script = (
        f"from {package.import_name}.cli import main; import sys\n"
        f"codes = [main(['--help']), main(['--version']), *(main([verb, '--help']) for verb in {verbs})]\n"
        "assert codes == [0] * len(codes), codes\n"
        "heavy = {'torch', 'transformers', 'peft', 'lightning', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{package.name} {package.module.__version__}\n" in done.stdout


def test_the_command_is_installed(package):
    assert package.project["scripts"] == {package.name: f"{package.import_name}.cli:main"}


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_every_option_is_described(package, verb, capsys):
    assert package.main([verb.name, "--help"]) == 0
    for line in capsys.readouterr().out.split("\n  --")[1:]:
        name, _, rest = line.partition(" ")
        description = rest.replace("\n", " ").split("(")[0]
        assert len(description.split()) > 1, f"{package.name} {verb.name} --{name} has no help"


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_print_config_is_taken_back_unchanged(package, verb, capsys, tmp_path):
    assert package.main([verb.name, "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert isinstance(yaml.safe_load(printed), dict)
    (tmp_path / "c.yaml").write_text(printed)
    assert package.main([verb.name, "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_unknown_options_and_files_are_one_line(package, verb, capsys, tmp_path):
    assert_user_error(package.main, [verb.name, "--no_such_option", "1"], capsys, "unknown option --no_such_option")
    assert_user_error(package.main, [verb.name, "--config", str(tmp_path / "no.yaml")], capsys, "no.yaml")
    assert_user_error(package.main, [verb.name, "--config", "recipe:no_such_recipe"], capsys, "no such recipe")


def test_unknown_verbs_suggest_the_nearest(package, capsys):
    verb = package.app.verbs[0].name
    assert_user_error(package.main, [verb[:-1] + "x" + verb[-1]], capsys, f"did you mean {verb}")


def test_the_verbs_are_the_shared_ones_or_documented(package):
    readme = (package.folder / "README.md").read_text(encoding="utf-8")
    for verb in package.app.verbs:
        assert f"{package.name} {verb.name}" in readme, f"the README does not show `{package.name} {verb.name}`"
    assert "demo" in {verb.name for verb in package.app.verbs}


def test_recipes_parse(package, capsys):
    for path in sorted((package.source / "recipes").glob("*.yaml")):
        accepted = []
        for verb in package.app.verbs:
            accepted.append(package.main([verb.name, "--config", f"recipe:{path.stem}", "--print_config"]) == 0)
            capsys.readouterr()
        assert any(accepted), f"no verb takes recipe:{path.stem}"
