import dataclasses
import io
import signal
import sys
import warnings
from types import ModuleType
from typing import Annotated, Literal

import pytest
import yaml

from tenfold import UserError
from tenfold.cli import App, Verb
from tenfold.config import Distinct, Ge, Length
from tenfold.config import Settings as Checked
from tenfold.errors import needs
from tenfold.terminal import table, track
from tenfold.testing import assert_user_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init(Checked):
    """Inner settings.

    Args:
        rank: adapter rank r,
            in 100 % of all cases.
        mode: what to protect.
    """

    rank: Annotated[int, Ge(1)] = 16
    mode: Literal["kpm", "ipm"] = "kpm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Train it.

    Args:
        data: KIND:PATH.
        level: how much.
    """

    data: str
    init: Init = dataclasses.field(default_factory=Init)
    seeds: tuple[int, ...] = (0, 1)
    names: list[str] | None = None
    level: Literal["quick", "default", "full"] = "default"
    batch_size: int = 8
    arms: Annotated[list[Literal["ce", "kd"]], Length(1), Distinct()] = dataclasses.field(
        default_factory=lambda: ["ce"]
    )
    method: Literal["ce", "kd"] | None = None


seen = []


def run(settings, invocation):
    seen.append((settings, invocation))
    if settings.data == "fault":
        raise RuntimeError("a fault of ours")
    if settings.data == "interrupt":
        raise KeyboardInterrupt
    if settings.data == "swallowed":  # as a loop in C does that asks Python for a length
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    if settings.data == "extra":
        needs("no_such_module", "demo")
    if settings.data == "warn":
        for _ in range(2):
            with warnings.catch_warnings():  # which makes Python forget that it has shown the warning
                warnings.simplefilter("always")
                warnings.warn("this is off\nhere", stacklevel=1)
    if settings.data == "late":
        invocation.folder.write_text("result.txt", "half")
    if settings.data in {"mend", "late"}:
        raise UserError("two\nlines")
    if invocation.run:
        invocation.run.write_text("result.txt", settings.data)


APP = App(
    "tenfold",
    "example",
    "A test.",
    (
        Verb("train", Settings),
        Verb("inspect", Settings, out=False),
        Verb("demo", Settings, out=False, claims=True),
        Verb("add-class", Settings, out=False),
    ),
)


@pytest.fixture(autouse=True)
def _package(monkeypatch, tmp_path_factory):
    """A package ``example`` whose commands all do what ``run`` does."""
    seen.clear()
    folder = tmp_path_factory.mktemp("package")
    (folder / "example/commands").mkdir(parents=True)
    for name in ("__init__", "commands/__init__"):
        (folder / f"example/{name}.py").write_text("")
    for verb in APP.verbs:
        (folder / f"example/commands/{verb.name.replace('-', '_')}.py").write_text(
            "from what_commands_do import run as run\n"
        )
    for name in [name for name in sys.modules if name.partition(".")[0] == "example"]:
        monkeypatch.delitem(sys.modules, name)
    module = ModuleType("what_commands_do")
    module.run = run
    monkeypatch.setitem(sys.modules, "what_commands_do", module)
    monkeypatch.syspath_prepend(folder)


def call(*words):
    code = APP.main(list(words))
    return code, (seen[-1][0] if seen else None)


def test_defaults_and_nested_and_list_options():
    code, settings = call("inspect", "--data", "x", "--init.rank", "4", "--seeds", "3,4", "--names=a,b")
    assert code == 0
    assert settings == Settings(data="x", init=Init(rank=4), seeds=(3, 4), names=["a", "b"])
    assert call("inspect", "--data", "x", "--seeds", "7")[1].seeds == (7,)
    assert call("inspect", "--data", "x", "--seeds", "[7, 8]")[1].seeds == (7, 8)


def test_dashes_and_levels():
    assert call("inspect", "--data", "x", "--batch-size", "4")[1].batch_size == 4
    assert call("inspect", "--data", "x", "--batch-size=5", "--quick")[1] == Settings(
        data="x", batch_size=5, level="quick"
    )
    assert call("demo", "--data", "x", "--full", "--strict")[1].level == "full"
    assert seen[-1][1].strict is True


def test_config_file_and_later_options_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: from-file\ninit:\n  rank: 5\n  mode: ipm\n")
    settings = call("inspect", "--init.rank", "3", "--config", str(file), "--init.mode", "kpm")[1]
    assert settings == Settings(data="from-file", init=Init(rank=5, mode="kpm"))


def test_print_config_is_taken_back_unchanged(tmp_path, capsys):
    assert APP.main(["train", "--init.rank", "5", "--names", "a,b", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert list(yaml.safe_load(printed)) == [field.name for field in dataclasses.fields(Settings)]
    (tmp_path / "c.yaml").write_text(printed)
    assert APP.main(["train", "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    call("inspect", "--config", str(tmp_path / "c.yaml"), "--data", "x")
    assert seen[-1][0] == Settings(data="x", init=Init(rank=5), names=["a", "b"])


def test_the_config_of_a_run_repeats_it(tmp_path):
    first = call("train", "--data", "x", "--init.rank", "5", "--out", str(tmp_path / "a"))[1]
    again = call("train", "--config", str(tmp_path / "a/config.yaml"), "--out", str(tmp_path / "b"))[1]
    assert first == again


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], ["unknown verb 'trian'", "did you mean train?"]),
        (["--versoin"], ["unknown option '--versoin'", "did you mean --version?"]),
        (["inspect"], ["missing --data"]),
        (["inspect", "--data", "x", "--init.rnk", "3"], ["unknown option --init.rnk", "did you mean --init.rank"]),
        (["inspect", "--dat", "x"], ["unknown option --dat", "did you mean --data"]),
        (["inspect", "--data", "x", "--init.rank", "x"], ["--init.rank: expected a whole number, got 'x'"]),
        (
            ["inspect", "--data", "x", "--init.mode", "kmp"],
            ["--init.mode: expected one of kpm, ipm, got 'kmp': did you mean kpm?"],
        ),
        (["inspect", "--data", "x", "--init.rank", "0"], ["error: --init.rank: expected 1 or more, got 0"]),
        (["inspect", "--data"], ["--data: a value is missing"]),
        (
            ["inspect", "--data", "x", "--method", "kdd"],
            ["--method: expected one of ce, kd, got 'kdd': did you mean kd?"],
        ),
        (
            ["inspect", "--data", "x", "--arms", "ce,kdd"],
            ["--arms: expected one of ce, kd, got 'kdd': did you mean kd?"],
        ),
        (["inspect", "--data", "x", "--arms", "ce,ce"], ["--arms: expected each once, got ce,ce"]),
        (["inspect", "--data", "x", "--arms", "[]"], ["--arms: expected at least one"]),
        (
            ["inspect", "--data", "x", "--seeds", "a,b"],
            ["--seeds: expected whole numbers separated by commas, got 'a'"],
        ),
        (["inspect", "--data", "x", "y"], ["unexpected argument 'y'"]),
        (["inspect", "--data", "mend"], ["two lines"]),
        (["train", "--data", "x"], ["missing --out"]),
        (["inspect", "--data", "x", "--config", "nowhere.yaml"], ["--config", "nowhere.yaml", "No such file"]),
        (["inspect", "--config", "recipe:nothing"], ["recipe:nothing", "no such recipe"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(capsys, words, expected):
    assert_user_error(APP.main, words, capsys, *expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ranck: 3\n", "c.yaml: unknown setting 'ranck': did you mean init.rank?"),
        ("init:\n  rnk: 3\n", "c.yaml: unknown setting 'init.rnk': did you mean init.rank?"),
        ("data: x\nseeds: 3\n", "--seeds: expected whole numbers separated by commas, got '3'"),
        ("data: x\ninit:\n", "c.yaml: 'init' holds settings, such as init.rank"),
        ("data: x\ninit:\n  rank: 0\n", "error: --init.rank: expected 1 or more, got 0"),
        ("a: [\n", "c.yaml is not YAML"),
        ("just words\n", "c.yaml: expected settings by name, found str"),
    ],
)
def test_bad_config_files_are_one_line(tmp_path, capsys, text, expected):
    (tmp_path / "c.yaml").write_text(text)
    assert_user_error(APP.main, ["inspect", "--data", "x", "--config", str(tmp_path / "c.yaml")], capsys, expected)


def test_other_faults_have_a_traceback_and_exit_code_1(capsys):
    assert APP.main(["inspect", "--data", "fault"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_traceback_of_a_user_error(capsys):
    assert APP.main(["inspect", "--data", "mend", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_warning_is_one_line_and_comes_once(capsys):
    assert APP.main(["inspect", "--data", "warn"]) == 0
    assert capsys.readouterr().err == "tenfold: warning: this is off here\n"
    with pytest.warns(UserWarning, match="this is off"):
        assert APP.main(["inspect", "--data", "warn", "--debug"]) == 0


def test_an_interrupt_is_130():
    assert APP.main(["inspect", "--data", "interrupt"]) == 130


def test_an_interrupt_that_a_library_turns_into_an_error_is_130_without_a_traceback(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        assert APP.main(["inspect", "--data", "swallowed"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err


def test_help_lists_verbs_and_options_with_their_descriptions(capsys):
    assert APP.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "train      Train it." in out
    assert APP.main([]) == 0
    assert capsys.readouterr().out == out
    assert APP.main(["train", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "adapter rank r, in 100 percent of all cases. (type: int, default: 16)" in out
    assert "KIND:PATH. (required" in out


def test_version(capsys):
    assert APP.main(["--version"]) == 0
    assert capsys.readouterr().out == "tenfold 0.1.0\n"


def test_a_finished_run_is_marked_and_resume_says_so(tmp_path, capsys):
    out = str(tmp_path / "a")
    assert call("train", "--data", "x", "--out", out)[0] == 0
    assert_user_error(APP.main, ["train", "--data", "x", "--out", out], capsys, "--resume", "--overwrite")
    assert call("train", "--data", "x", "--out", out, "--resume")[0] == 0
    assert "finished" in capsys.readouterr().out
    assert call("train", "--data", "y", "--out", out, "--overwrite")[0] == 0
    assert (tmp_path / "a/result.txt").read_text() == "y"


def test_a_fault_leaves_the_run_unfinished(tmp_path):
    assert call("train", "--data", "fault", "--out", str(tmp_path / "a"))[0] == 1
    assert call("train", "--data", "fault", "--out", str(tmp_path / "a"), "--resume")[0] == 1
    assert len(seen) == 2


def test_of_the_processes_of_one_command_the_first_alone_speaks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert call("train", "--data", "x", "--out", str(tmp_path / "a"))[0] == 0
    assert capsys.readouterr().out == ""
    assert seen[-1][1].quiet
    assert not (tmp_path / "a").exists()


def test_a_missing_extra_is_named_of_the_distribution_that_has_it(capsys):
    assert_user_error(
        APP.main, ["demo", "--data", "extra"], capsys, 'no_such_module is not installed; pip install "tenfold[demo]"'
    )
    assert_user_error(
        dataclasses.replace(APP, dist="pytest").main,
        ["demo", "--data", "extra"],
        capsys,
        'pip install "tenfold[demo]"',  # pytest has no extra of that name
    )


def test_a_refused_command_leaves_nothing_behind_and_runs_when_mended(tmp_path, capsys):
    out = tmp_path / "new/deep"
    assert_user_error(APP.main, ["train", "--data", "mend", "--out", str(out)], capsys, "two lines")
    assert not (tmp_path / "new").exists()
    assert call("train", "--data", "x", "--out", str(out))[0] == 0
    assert_user_error(APP.main, ["train", "--data", "mend", "--out", str(out), "--overwrite"], capsys, "two lines")
    assert (out / "result.txt").read_text() == "x"


def test_a_command_that_fails_after_its_first_result_keeps_it(tmp_path, capsys):
    assert_user_error(APP.main, ["train", "--data", "late", "--out", str(tmp_path / "a")], capsys, "two lines")
    assert (tmp_path / "a/result.txt").read_text() == "half"
    assert_user_error(APP.main, ["train", "--data", "late", "--out", str(tmp_path / "a")], capsys, "an unfinished run")


def test_table_aligns_text_left_and_numbers_right():
    assert table(["name", "value"], [["a", 1.5], ["bcd", 10]]) == "name  value\n----  -----\na       1.5\nbcd      10"


def test_track_passes_items_through_and_is_silent_when_short(capsys, monkeypatch):
    assert list(track([1, 2], "work")) == [1, 2]
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr("tenfold.terminal.time.monotonic", lambda: next(clock))
    assert list(track(iter(range(6)), "work", total=6)) == list(range(6))
    assert "work: 1/6" in capsys.readouterr().err


def test_track_draws_a_bar_with_rate_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(track(range(3), "work")) == [0, 1, 2]
    assert "3/3" in screen.getvalue()


def test_a_verb_with_a_hyphen_lies_in_a_file_with_an_underscore():
    assert APP.main(["add-class", "--data", "x"]) == 0
    assert seen[0][0].data == "x"
