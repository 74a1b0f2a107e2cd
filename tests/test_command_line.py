"""The command line of every package: light, the same words for the same things, one line for what the user can mend."""

import dataclasses
import subprocess
import sys
import typing

import pytest
import yaml
from distributions import PACKAGES

from tenfold.config import DemoSettings, leaves, plain_kind
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


OLD = {
    "max_epochs",
    "max_steps",
    "methods",
    "models",
    "val_every",
    "teacher_checkpoint",
    "checkpoint",
    "lr",
    "path",
    "initial",
}
"""Names that the same things once had."""


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_the_same_thing_has_the_same_name(package, verb):
    options = {name: kind for name, kind in leaves(verb.settings) if "." not in name}
    assert not set(options) & OLD
    assert not {"seed", "seeds"} <= set(options), "a report over seeds has no seed of its own"
    if verb.name == "demo":
        assert issubclass(verb.settings, DemoSettings)
    if verb.name == "compare":
        assert {"arms", "executor"} <= set(options)
        # an option that changes nothing does not exist: what draws nothing says so, and its own tests show it
        draws = "Nothing is drawn at random, so there are no seeds." not in (verb.settings.__doc__ or "")
        assert draws == ("seeds" in options)
        if draws:
            (seeds,) = [field for field in dataclasses.fields(verb.settings) if field.name == "seeds"]
            assert seeds.default_factory() == [0, 1, 2]
    for name, choices in {"device": {"auto", "cpu", "cuda", "mps"}, "precision": {"auto", "32", "bf16", "16"}}.items():
        if name in options:
            assert set(typing.get_args(options[name])) == choices


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_a_verbs_help_is_one_sentence(package, verb):
    assert verb.help.endswith((".", "?")), verb.help
    assert len(verb.help) <= 110


def bounds(kind):
    """Bounds of a number: (marker's attribute, value), also inside ``X | None``."""
    several = typing.get_origin(kind) in {list, tuple}
    for part in () if several else (kind, *typing.get_args(kind)):
        if typing.get_origin(part) is typing.Annotated and typing.get_args(part)[0] in {int, float}:
            for marker in part.__metadata__:
                yield from (
                    (name, getattr(marker, name)) for name in ("ge", "gt") if getattr(marker, name, None) is not None
                )


def required(verb):
    """Something for each option that has to be given."""
    fields = dataclasses.fields(verb.settings)
    names = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    kinds = dict(leaves(verb.settings))
    return [
        word
        for name in names
        if name in kinds
        for word in (f"--{name}", "1" if plain_kind(kinds[name]) in {int, float} else "none:none")
    ]


@pytest.mark.parametrize(("package", "verb"), VERBS)
def test_a_number_out_of_its_range_is_refused_with_its_whole_path(package, verb, capsys, tmp_path):
    ranges = [(name, bound, value) for name, kind in leaves(verb.settings) for bound, value in bounds(kind)]
    numbers = {int, float}
    unbounded = [
        name
        for name, kind in leaves(verb.settings)
        if kind in numbers
        and name.rpartition(".")[2] in {"batch_size", "epochs", "steps", "k", "r", "workers", "devices", "seed"}
    ]
    assert not unbounded, "numbers that have a range and do not say so"
    out = ["--out", str(tmp_path / "out")] if verb.out else []
    for name, bound, value in ranges:
        wrong = value - 1 if bound == "ge" else value
        words = [verb.name, *out, *required(verb), f"--{name}={wrong:g}"]
        expected = f"--{name}: expected {value:g}" if bound == "ge" else f"--{name}: expected more than {value:g}"
        assert_user_error(package.main, words, capsys, expected, f"got {wrong:g}")


@pytest.mark.parametrize(("package", "verb"), [v for v in VERBS if v.values[1].out and required(v.values[1])])
def test_a_refused_command_leaves_no_folder_behind(package, verb, capsys, tmp_path):
    assert_user_error(package.main, [verb.name, *required(verb), "--out", str(tmp_path / "a/b")], capsys)
    assert not (tmp_path / "a").exists()


def test_a_choice_that_there_is_not_is_refused_in_our_words(package, capsys, tmp_path):
    """No word of the parsing library's shows through, also for unions and lists."""
    for verb in package.app.verbs:
        for name, kind in leaves(verb.settings):
            words = [
                verb.name,
                *(["--out", str(tmp_path / "a")] if verb.out else []),
                *required(verb),
                f"--{name}",
                "no such thing",
            ]
            if "str" in str(kind):
                continue
            line = assert_user_error(package.main, words, capsys, f"--{name}: expected ")
            assert not any(
                word in line for word in ("Subtypes", "Given value", "Parser key", "<class", "typing.", "Literal")
            )
