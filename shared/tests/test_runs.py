import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tenfold import UserError
from tenfold.files import replacing
from tenfold.runs import Metrics, Run, flat, from_plain, plain, read, read_metrics


@dataclass(frozen=True)
class Optimizer:
    lr: float = 0.1


@dataclass(frozen=True)
class Settings:
    seed: int = 3
    names: tuple[str, ...] = ("a", "b")
    optimizer: Optimizer = field(default_factory=Optimizer)


def start(path, **changes):
    """A run that has written its first file."""
    run = Run.open(path, package="tenfold", verb="train", **{"settings": Settings(), **changes})
    if not run.finished:
        run.own("metrics.csv")
    return run


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_replacing_gives_the_mode_of_a_plainly_written_file(tmp_path):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = f"""
        import os, signal
        from tenfold.files import replacing
        with replacing({str(path)!r}) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode
    assert code == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_full_disk_is_one_line_and_keeps_the_old_file():
    """/dev/full takes no byte: every write says that no space is left."""
    if not Path("/dev/full").exists():
        pytest.skip("a system without /dev/full")
    with (
        pytest.raises(UserError, match="cannot write .*: No space left on device"),
        replacing(Path("/tmp") / f"tenfold-{os.getpid()}"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
    assert not (Path("/tmp") / f"tenfold-{os.getpid()}").exists()


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"), replacing(tmp_path / "file" / "a.txt"):
        pass


def test_a_run_writes_settings_that_repeat_it_and_its_environment(tmp_path):
    run = start(tmp_path / "out")
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config == {"seed": 3, "names": ["a", "b"], "optimizer": {"lr": 0.1}}
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["seed"] == 3
    assert set(environment) >= {"versions", "seed", "device", "threads", "git"}
    assert "numpy" in environment["versions"]


def finished(path):
    run = start(path)
    run.write_text("result.txt", "1")
    run.finish()


def unfinished(path):
    with start(path) as run:
        run.write_text("result.txt", "1")


def other_verb(path):
    with Run.open(path, package="tenfold", verb="evaluate", settings=Settings()) as run:
        run.write_text("result.txt", "1")


def foreign(path):
    path.mkdir()
    (path / "thesis.tex").write_text("x")


@pytest.mark.parametrize(
    ("before", "flags", "outcome"),
    [
        (None, {}, "starts"),
        (None, {"resume": True}, "starts"),
        (None, {"overwrite": True}, "starts"),
        (unfinished, {}, "--resume continues it, --overwrite starts anew"),
        (unfinished, {"resume": True}, "continues"),
        (unfinished, {"overwrite": True}, "starts"),
        (finished, {}, "--resume continues it, --overwrite starts anew"),
        (finished, {"resume": True}, "finished"),
        (finished, {"overwrite": True}, "starts"),
        *((other_verb, flags, "not of 'tenfold train'") for flags in ({}, {"resume": True}, {"overwrite": True})),
        *((foreign, flags, "holds no run") for flags in ({}, {"resume": True}, {"overwrite": True})),
    ],
)
def test_the_folder_table(tmp_path, before, flags, outcome):
    path = tmp_path / "out"
    if before:
        before(path)
    files = sorted(p.name for p in path.iterdir()) if path.exists() else []
    if outcome in {"starts", "continues", "finished"}:
        run = start(path, **flags)
        assert run.resumed == (outcome != "starts")
        assert run.finished == (outcome == "finished")
        assert (path / "result.txt").exists() == (outcome != "starts")
    else:
        with pytest.raises(UserError, match=outcome):
            start(path, **flags)
        assert sorted(p.name for p in path.iterdir()) == files


def test_overwrite_spares_what_the_run_did_not_write(tmp_path):
    run = start(tmp_path)
    run.write_text("figures/a.png", "x")
    run.write_text("figures/deep/b.png", "x")
    (tmp_path / "figures/mine.png").write_text("mine")
    run.close()
    start(tmp_path, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["mine.png"]


def test_overwrite_never_deletes_outside_of_the_folder(tmp_path):
    (tmp_path / "precious").write_text("x")
    run = start(tmp_path / "out")
    manifest = json.loads((run.path / "run.json").read_text())
    manifest["files"].append("../precious")
    (run.path / "run.json").write_text(json.dumps(manifest))
    run.close()
    with pytest.raises(UserError, match="outside of its folder"):
        start(tmp_path / "out", overwrite=True)
    assert (tmp_path / "precious").exists()
    with pytest.raises(UserError, match="leads outside"):
        Run.open(tmp_path / "new", package="tenfold", verb="train", settings={}).write_text("../b", "x")


def test_resume_refuses_changed_settings_and_names_them(tmp_path):
    start(tmp_path).close()
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.1 -> 0\.2\): resume with the same"):
        start(tmp_path, settings=Settings(optimizer=Optimizer(0.2)), resume=True)


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="exclude"):
        start(tmp_path, resume=True, overwrite=True)


def test_leftovers_of_a_kill_do_not_count_and_are_removed(tmp_path):
    (tmp_path / ".tenfold-abc.json").write_text("half")
    start(tmp_path)
    assert not (tmp_path / ".tenfold-abc.json").exists()


def test_a_folder_appears_file_by_file_whole(tmp_path):
    run = start(tmp_path)
    with run.replacing_folder("model") as folder:
        (folder / "deep").mkdir()
        (folder / "deep/a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model/deep/a.txt").read_text() == "a"
    run.close()
    start(tmp_path, overwrite=True)
    assert not (tmp_path / "model").exists()


def test_opening_changes_nothing_before_the_first_file_is_written(tmp_path):
    out = tmp_path / "new/deep"
    run = Run.open(out, package="tenfold", verb="train", settings={})
    assert [p.name for p in out.iterdir()] == [".tenfold-lock"]
    run.close()
    assert not (tmp_path / "new").exists()
    unfinished(out)
    before = {path: path.read_bytes() for path in out.rglob("*")}
    Run.open(out, package="tenfold", verb="train", settings={}, overwrite=True).close()
    assert {path: path.read_bytes() for path in out.rglob("*")} == before


def test_a_refusal_before_the_first_result_leaves_nothing_and_a_later_one_keeps_the_result(tmp_path):
    with pytest.raises(UserError), start(tmp_path / "a") as run:
        run.own("result.txt")  # announced, not written
        run.own("data/train.json", result=False).parent.mkdir()
        (run.path / "data/train.json").write_text("prepared")
        raise UserError("no")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError), start(tmp_path / "a") as run:
        run.write_text("result.txt", "1")
        raise UserError("no")
    assert (tmp_path / "a/result.txt").exists()
    with pytest.raises(UserError), start(tmp_path / "a", resume=True):
        raise UserError("no")
    assert (tmp_path / "a/result.txt").exists()


def test_a_second_command_on_the_same_folder_is_refused_while_the_first_runs(tmp_path):
    script = f"""
        import sys, time
        from tenfold.runs import Run
        run = Run.open({str(tmp_path / "a")!r}, package="tenfold", verb="train", settings={{}})
        print("open", flush=True)
        time.sleep(60)
    """
    first = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "open\n"
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="another command is writing to this folder"):
            start(tmp_path / "a", **flags)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    start(tmp_path / "a").finish()
    assert not list((tmp_path / "a").glob(".tenfold*"))


def test_children_that_outlive_a_killed_command_do_not_keep_its_folder(tmp_path):
    script = f"""
        import os, signal, time
        from tenfold.runs import Run
        run = Run.open({str(tmp_path / "a")!r}, package="tenfold", verb="train", settings={{}})
        child = os.fork()
        if child == 0:
            time.sleep(60)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        child = int(first.stdout.readline())
        try:
            first.wait()
            start(tmp_path / "a").finish()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_run_that_is_dropped_without_an_end_is_free_again(tmp_path):
    run = start(tmp_path / "a")
    with pytest.raises(UserError, match="another command is writing"):
        start(tmp_path / "a", resume=True)
    del run
    start(tmp_path / "a", resume=True)


def test_files_that_a_library_made_for_the_owner_alone_get_the_usual_mode(tmp_path):
    run = start(tmp_path / "a")
    with run.replacing("private.txt") as path:
        path.write_text("x")
        path.chmod(0o600)
    with run.replacing_folder("model") as folder:
        (folder / "private.txt").write_text("x")
        (folder / "private.txt").chmod(0o600)
    (tmp_path / "plain").write_text("x")
    usual = (tmp_path / "plain").stat().st_mode
    assert {(tmp_path / "a" / name).stat().st_mode for name in ("private.txt", "model/private.txt")} == {usual}


def test_a_finished_run_is_read_with_its_settings_also_by_a_file_in_it(tmp_path):
    settings = Settings(seed=5, names=("c",), optimizer=Optimizer(0.5))
    with start(tmp_path / "a", settings=settings) as run:
        run.write_text("deep/weights.txt", "1")
        run.finish()
    for path in (tmp_path / "a", tmp_path / "a/deep/weights.txt"):
        found = read(path, Settings, package="tenfold", verb="train")
        assert (found.path, found.settings, found.version) == (tmp_path / "a", settings, "0.1.0")
    assert from_plain(Settings, plain(settings)) == settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "no such folder; expected the folder of a finished `tenfold train`"),
        (foreign, "found no run.json"),
        (unfinished, "this run is unfinished"),
        (other_verb, "holds a run of 'tenfold evaluate'"),
    ],
)
def test_what_is_no_finished_run_is_not_read(tmp_path, make, message):
    if make:
        make(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a", Settings, package="tenfold", verb="train")


def test_settings_that_this_version_does_not_know_are_refused_with_their_file(tmp_path):
    finished(tmp_path / "a")
    (tmp_path / "a/config.yaml").write_text("seed: 1\nold_option: 2\n")
    with pytest.raises(UserError, match=r"config\.yaml: not the settings of `tenfold train` .*old_option"):
        read(tmp_path / "a", Settings, package="tenfold", verb="train")


def test_files_of_another_library_become_the_runs(tmp_path):
    run = start(tmp_path / "a")
    (tmp_path / "a/foreign/deep").mkdir(parents=True)
    (tmp_path / "a/foreign/deep/log.txt").write_text("x")
    run.adopt("foreign")
    run.close()
    start(tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a/foreign").exists()
    assert run.figure("loss") == tmp_path / "a/figures/loss.png"


def test_metrics_are_read_back_without_empty_cells(tmp_path):
    metrics = Metrics(tmp_path / "m.csv")
    metrics.log(1, {"loss": 0.5})
    metrics.log(2, {"loss": 0.25, "val": 1})
    metrics.flush()
    assert read_metrics(tmp_path / "m.csv") == [(1, {"loss": 0.5}), (2, {"loss": 0.25, "val": 1.0})]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for name in ("none.csv", "other.csv"):
        with pytest.raises(UserError, match=name):
            read_metrics(tmp_path / name)


def test_json_with_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        start(tmp_path).write_json("a.json", {"x": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_flat_and_plain():
    assert flat(plain(Settings())) == {"seed": 3, "names": ["a", "b"], "optimizer.lr": 0.1}


def rows(path):
    return list(csv.DictReader(path.open()))


def test_metrics_of_one_step_share_a_row_and_late_columns_widen_the_file(tmp_path):
    metrics = Metrics(tmp_path / "m.csv")
    metrics.log(1, {"loss": 0.5})
    metrics.log(2, {"loss": 0.25})
    metrics.log(2, {"val": 1})
    metrics.flush()
    assert rows(tmp_path / "m.csv") == [
        {"step": "1", "loss": "0.5", "val": ""},
        {"step": "2", "loss": "0.25", "val": "1"},
    ]


@given(
    values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=12),
    checkpoint=st.integers(0, 12),
    killed=st.integers(0, 12),
)
def test_metrics_cut_back_and_continued_equal_an_unbroken_file(tmp_path_factory, values, checkpoint, killed):
    folder = tmp_path_factory.mktemp("metrics")

    def log(metrics, steps):
        for step in steps:
            metrics.log(step, {"loss": values[step]} | ({"val": step} if step % 3 == 2 else {}))
        metrics.flush()

    log(Metrics(folder / "whole.csv"), range(len(values)))
    killed = min(killed, len(values))
    checkpoint = min(checkpoint, killed)
    log(Metrics(folder / "broken.csv"), range(killed))
    if killed:
        with (folder / "broken.csv").open("a") as file:
            file.write("7,0.1")  # a row that the kill cut short
    metrics = Metrics(folder / "broken.csv")
    metrics.cut_after(checkpoint - 1)
    log(metrics, range(checkpoint, len(values)))
    assert (folder / "broken.csv").read_bytes() == (folder / "whole.csv").read_bytes()
    assert [float(row["loss"]) for row in rows(folder / "whole.csv")] == values


def test_processes_that_share_a_folder_write_their_own_files_and_the_first_remembers_all(tmp_path, monkeypatch):
    first = Run.open(tmp_path / "run", package="p", verb="views", settings={})
    monkeypatch.setenv("RANK", "1")
    second = Run.open(tmp_path / "run", package="p", verb="views", settings={})
    second.write_text("early.txt", "dropped")
    for run in (first, second):
        run.share(["a.txt", "b.txt"])
    second.write_text("b.txt", "second")
    first.write_text("a.txt", "first")
    monkeypatch.delenv("RANK")
    assert sorted(p.name for p in (tmp_path / "run").glob("*.txt")) == ["a.txt", "b.txt"]
    first.close()
    anew = Run.open(tmp_path / "run", package="p", verb="views", settings={}, overwrite=True)
    anew.write_text("c.txt", "third")
    assert sorted(p.name for p in (tmp_path / "run").glob("*.txt")) == ["c.txt"]
    with pytest.raises(UserError, match="outside"):
        anew.share(["../d.txt"])
    anew.close()


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_further_process_of_the_same_command_shares_the_folder_and_writes_nothing(tmp_path, monkeypatch, variable):
    first = Run.open(tmp_path / "a", package="tenfold", verb="train", settings={"lr": 1})
    first.write_text("model.txt", "first")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    monkeypatch.setenv(variable, "1")
    second = Run.open(tmp_path / "a", package="tenfold", verb="train", settings={"lr": 1})
    second.write_text("model.txt", "second")
    second.write_json("other.json", 2)
    with second.replacing_folder("folder") as folder:
        (folder / "file").write_text("dropped")
    second.own("unknown.txt")
    second.finish()
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    assert (first.writes, second.writes, second.resumed, second.finished) == (True, False, False, False)
    monkeypatch.delenv(variable)
    first.finish()
    monkeypatch.setenv(variable, "1")
    assert Run.open(tmp_path / "a", package="tenfold", verb="train", settings={"lr": 1}, resume=True).finished
