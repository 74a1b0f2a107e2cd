import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tenfold import UserError
from tenfold.growing import Growing

KIND = "tenfold.gallery"


def add(path, text, **how):
    with (
        Growing.open(path, kind=KIND, writing=True, **how) as growing,
        growing.adding(".txt", {"length": len(text)}) as file,
    ):
        file.write_text(text)


def texts(path):
    return [entry.path.read_text() for entry in Growing.open(path, kind=KIND).entries]


def snapshot(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith(".tenfold")}


def test_files_are_numbered_never_change_and_are_read_in_order(tmp_path):
    for text in ("one", "two", "three"):
        add(tmp_path / "g", text)
    growing = Growing.open(tmp_path / "g", kind=KIND)
    assert [entry.path.name for entry in growing.entries] == ["000001.txt", "000002.txt", "000003.txt"]
    assert [entry.about["length"] for entry in growing.entries] == [3, 3, 5]
    assert texts(tmp_path / "g") == ["one", "two", "three"]
    assert sorted(snapshot(tmp_path / "g")) == ["000001.txt", "000002.txt", "000003.txt", "index.json"]


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_kill_at_any_rename_leaves_the_previous_state_and_the_repeated_command_gives_the_same_file(tmp_path, calls):
    """Each adding renames twice, the file and the index: the kill comes right before or right after one of them."""
    add(tmp_path / "whole", "one")
    add(tmp_path / "whole", "two")
    add(tmp_path / "g", "one")
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from tenfold.growing import Growing
        renames, rename = 0, Path.replace
        def replace(self, target):
            global renames
            renames += 1
            if 2 * renames - 1 == {calls}:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(self, target)
            if 2 * renames == {calls}:
                os.kill(os.getpid(), signal.SIGKILL)
        Path.replace = replace
        with Growing.open({str(tmp_path / "g")!r}, kind={KIND!r}, writing=True) as growing:
            with growing.adding(".txt", {{"length": 3}}) as file:
                file.write_text("two")
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode
    assert code == -signal.SIGKILL
    if calls < 4:
        assert texts(tmp_path / "g") == ["one"]
        add(tmp_path / "g", "two")
    assert texts(tmp_path / "g") == ["one", "two"]
    assert snapshot(tmp_path / "g") == snapshot(tmp_path / "whole")


def test_a_block_that_raises_adds_nothing(tmp_path):
    add(tmp_path, "one")
    with (
        pytest.raises(ZeroDivisionError),
        Growing.open(tmp_path, kind=KIND, writing=True) as growing,
        growing.adding(".txt") as file,
    ):
        file.write_text("half")
        1 / 0  # noqa: B018
    assert texts(tmp_path) == ["one"]
    assert sorted(os.listdir(tmp_path)) == ["000001.txt", "index.json"]


def test_a_second_writer_is_refused_unless_each_has_a_part_of_its_own(tmp_path):
    with Growing.open(tmp_path, kind=KIND, writing=True), pytest.raises(UserError, match="--gallery .*is adding to it"):
        add(tmp_path, "two", option="--gallery")
    with Growing.open(tmp_path, kind=KIND, writing=True, part="b") as b, b.adding(".txt") as file:
        file.write_text("of b")
        add(tmp_path, "of a", part="a")
    add(tmp_path, "of a, too", part="a")
    assert texts(tmp_path) == ["of a", "of a, too", "of b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-000001.txt", "a-000002.txt", "b-000001.txt", "index-a.json", "index-b.json",
    ]  # fmt: skip


def test_another_head_or_kind_is_refused_by_name(tmp_path):
    add(tmp_path / "g", "one", head={"model": "vit", "size": 224})
    with pytest.raises(UserError, match=r"made with something else \(model: 'vit' there, 'resnet' here\)"):
        add(tmp_path / "g", "two", head={"model": "resnet", "size": 224})
    with pytest.raises(UserError, match="holds a tenfold.gallery, expected a learner"):
        Growing.open(tmp_path / "g", kind="learner")
    add(tmp_path / "g", "two")
    assert Growing.open(tmp_path / "g", kind=KIND).head == {"model": "vit", "size": 224}


def test_foreign_missing_and_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a tenfold.gallery"):
        Growing.open(tmp_path / "none", kind=KIND)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not empty .*thesis\.tex"):
        add(tmp_path / "foreign", "one")
    for index in ("{", '{"kind": "tenfold.gallery", "head": {}, "files": [{"file": "../thesis.tex", "about": {}}]}'):
        (tmp_path / "foreign/index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json"):
            Growing.open(tmp_path / "foreign", kind=KIND)


def test_a_command_that_adds_nothing_leaves_no_folder(tmp_path):
    with Growing.open(tmp_path / "g", kind=KIND, writing=True):
        pass
    assert not (tmp_path / "g").exists()


def test_a_file_is_replaced_or_dropped_and_its_number_is_not_used_again(tmp_path):
    for text in ("one", "two", "three"):
        add(tmp_path, text)
    with Growing.open(tmp_path, kind=KIND, writing=True) as growing:
        with growing.replaced(growing.entries[0], ".txt", {"length": 1}) as file:
            file.write_text("1")
        growing.drop(growing.entries[-1])
    assert texts(tmp_path) == ["two", "three"]
    assert not (tmp_path / "000001.txt").exists()
    assert not (tmp_path / "000004.txt").exists()
    add(tmp_path, "five")
    assert texts(tmp_path) == ["two", "three", "five"]
    assert (tmp_path / "000005.txt").read_text() == "five"


def test_a_file_that_the_index_had_forgotten_before_a_kill_is_deleted_by_the_next_writer(tmp_path):
    for text in ("one", "two"):
        add(tmp_path, text)
    with Growing.open(tmp_path, kind=KIND, writing=True) as growing:
        growing.drop(growing.entries[0])
    (tmp_path / "000001.txt").write_text("one")  # as if the kill had come between the index and the deletion
    assert texts(tmp_path) == ["two"]
    add(tmp_path, "three")
    assert sorted(p.name for p in tmp_path.glob("*.txt")) == ["000002.txt", "000003.txt"]


def test_files_may_have_names_of_their_own_and_a_killed_first_command_may_have_left_one(tmp_path):
    def naming(number):
        return "base" if number == 1 else f"session-{number - 1:02d}"

    tmp_path.joinpath("base.txt").write_text("left by a killed command")
    for text in ("one", "two"):
        add(tmp_path, text, naming=naming)
    assert [entry.path.name for entry in Growing.open(tmp_path, kind=KIND).entries] == ["base.txt", "session-01.txt"]
    assert texts(tmp_path) == ["one", "two"]
