"""`visctrl views` on scenes in files, alone and in two processes, interrupted and resumed."""

import json
import os
import signal
import socket
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from visctrl.cli import main
from visctrl_scenes import HEIGHT, WIDTH, colmap, nerfstudio, photo
from visctrl_tiny import sd, unconditional

from tenfold.readers import read_image
from tenfold.testing import assert_user_error

QUICK = ["--control.steps", "3", "--control.start", "0.4", "--control.layers", "0:", "--control.rounds", "1"]
SETTINGS = {"environment.json", "config.yaml", "run.json", "report.html", "report.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    unconditional(folder).save_pretrained(folder / "plain")
    for i in range(2):
        Image.fromarray(photo(90 + i)).save(folder / f"r{i}.png")
    nerfstudio(folder / "ns", 4)
    colmap(folder / "cm", 3)
    return folder


def words(place, data, out, *more):
    both = f"{place / 'r0.png'},{place / 'r1.png'}"
    given = ["views", "--model", place / "plain", "--data", data, "--reference", both, *QUICK, *more, "--out", out]
    return [*map(str, given), "--quiet"]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same(a, b):
    a, b = ({k: x for k, x in contents(folder).items() if k not in SETTINGS} for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], name


def test_a_scene_is_edited_inside_its_masks_and_loads_again(place, tmp_path, capsys):
    more = ["--target_mask", "scene", "--feather", "0", "--sampling.pool", "1"]
    assert main(words(place, f"nerfstudio:{place / 'ns'}", tmp_path / "out", *more)) == 0
    content = json.loads((tmp_path / "out/scene/transforms.json").read_text())
    assert content == json.loads((place / "ns/transforms.json").read_text())
    for frame in content["frames"]:
        before, after = (read_image(x / frame["file_path"]) for x in (place / "ns", tmp_path / "out/scene"))
        inside = read_image(place / "ns" / frame["mask_path"])[..., 0] > 0
        assert np.array_equal(after[~inside], before[~inside])
        assert not np.array_equal(after[inside], before[inside])
    about = json.loads((tmp_path / "out/views.json").read_text())
    assert (about["cameras"], len(about["views"]), about["kind"]) == (2, 4, "nerfstudio")
    assert sum(view["reference_for_others"] for view in about["views"]) == 1
    assert len({view["rows"] for view in about["views"]}) == 1  # references are paid for before
    for view in about["views"]:
        assert set(view["read_from"]) <= {"reference 1", "reference 2", *(f"view {i}" for i in range(4))}
        assert sum(view["read_from"].values()) == pytest.approx(1, abs=1e-3)
    for name in ("grid.png", "figures/views.png", "report.html", "views/00000.png"):
        assert (tmp_path / "out" / name).is_file(), name
    out = capsys.readouterr().out
    assert "4 views, cameras: 2; references: 2" in out
    # what was written is a scene again
    assert main(words(place, f"nerfstudio:{tmp_path / 'out/scene'}", tmp_path / "twice", "--missing", "leave_out")) == 0


def test_an_interrupted_run_goes_on_with_what_is_there_and_ends_with_the_same_files(place, tmp_path, monkeypatch):
    from visctrl.commands import views

    more = ["--sampling.pool", "2", "--sampling.kind", "latent"]
    whole = words(place, f"colmap:{place / 'cm'}", tmp_path / "whole", *more)
    assert main(whole) == 0
    write, calls = views.write_view, []

    def stopping(path, view, *args):
        calls.append(view.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, view, *args)

    monkeypatch.setattr(views, "write_view", stopping)
    broken = words(place, f"colmap:{place / 'cm'}", tmp_path / "broken", *more)
    assert main(broken) == 130
    assert not (tmp_path / "broken/scene/sparse").exists()
    calls[:] = ["a", "b", "c"]
    assert main([*broken, "--resume"]) == 0
    assert len(calls) == 4
    same(tmp_path / "whole", tmp_path / "broken")


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def started(rank, ports, commands):
    """``main`` for these commands in a copy of this process, as one of two ranks; its process id."""
    process = os.fork()
    if process:
        return process
    signal.alarm(300)
    torch.set_num_threads(1)
    code = 3
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        codes = []
        for port, words in zip(ports, commands, strict=True):
            os.environ["MASTER_PORT"] = port
            codes.append(main(words))
        code = max(codes)
    finally:
        os._exit(code)


def test_two_processes_write_what_one_writes(place, tmp_path):
    (place / "pairs.csv").write_text(
        "target,reference\n" + "".join(f"ns/images/frame_0000{i}.png,r0.png\n" for i in (1, 2, 3))
    )
    views = words(place, f"nerfstudio:{place / 'ns'}", "VIEWS", "--sampling.pool", "2")
    pairs = [
        "edit",
        "--model",
        str(place / "plain"),
        "--pairs",
        str(place / "pairs.csv"),
        *QUICK,
        "--out",
        "PAIRS",
        "--quiet",
    ]

    def commands(name):
        return [
            [x.replace("VIEWS", f"{tmp_path}/{name}v").replace("PAIRS", f"{tmp_path}/{name}p") for x in c]
            for c in (views, pairs)
        ]

    for command in commands("one"):
        assert main(command) == 0
    ports = free_ports(2)
    running = [started(rank, ports, commands("two")) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running] == [0, 0]
    same(tmp_path / "onev", tmp_path / "twov")
    one, two = contents(tmp_path / "onep"), contents(tmp_path / "twop")
    assert one.keys() == two.keys()
    pictures = [name for name in one if name.endswith(("edited.png", "round_1.png", "provenance.png"))]
    assert len(pictures) == 9 + 1  # and the run's own figure
    assert all(one[name] == two[name] for name in pictures)
    assert json.loads((tmp_path / "twov/run.json").read_text())["finished"]
    assert set(json.loads((tmp_path / "twov/run.json").read_text())["files"]) >= set(contents(tmp_path / "twov")) - {
        "run.json"
    }


def test_a_view_that_does_not_show_the_subject_is_written_as_it_was(place, tmp_path, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(4):
        mask = np.zeros((HEIGHT, WIDTH) if i < 3 else (WIDTH, HEIGHT), np.uint8)
        if i != 1:
            mask[5:15, 5:15] = 255
        Image.fromarray(mask).save(masks / f"frame_0000{i + 1}.png")
    data = f"nerfstudio:{place / 'ns'}"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(words(place, data, tmp_path / "out", "--target_mask", masks)) == 0
    assert "images/frame_00002.png is written as it was: its mask is empty" in capsys.readouterr().err
    name = "images/frame_00002.png"
    assert (tmp_path / "out/scene" / name).read_bytes() == (place / "ns" / name).read_bytes()
    assert json.loads((tmp_path / "out/views.json").read_text())["views"][1]["round"] == 0


def test_the_recipe_of_a_scene_runs_on_a_tiny_stand_in(place, tmp_path):
    sd(tmp_path).save_pretrained(tmp_path / "sd")
    own = [
        "--model",
        tmp_path / "sd",
        "--size",
        "16",
        "--data",
        f"folder:{place / 'ns/images'}",
        "--control.steps",
        "4",
    ]
    given = [
        "views",
        "--config",
        "recipe:scene",
        *own,
        "--reference",
        place / "r0.png",
        "--out",
        tmp_path / "out",
        "--quiet",
    ]
    assert main([*map(str, given)]) == 0
    assert len(list((tmp_path / "out/scene").glob("*.png"))) == 4


def test_bad_scenes_are_one_line_and_leave_nothing_behind(place, tmp_path, capsys, monkeypatch):
    gone = nerfstudio(tmp_path / "gone")
    (gone / "images/frame_00001.png").unlink()
    cut = nerfstudio(tmp_path / "cut")
    (cut / "images/frame_00003.png").write_bytes((cut / "images/frame_00003.png").read_bytes()[:60])
    (tmp_path / "masks").mkdir()
    bare = colmap(tmp_path / "bare", 2)
    for file in (bare / "images").rglob("*.png"):
        file.unlink()
    good = f"nerfstudio:{place / 'ns'}"
    one = ["--reference", place / "r0.png"]
    cases = (
        ([f"nerfstudio:{gone}"], "--missing leave_out goes on without them: images/frame_00001.png"),
        ([f"nerfstudio:{cut}"], "frame_00003.png: cannot be decoded"),
        ([f"colmap:{bare}"], "2 of 2 views cannot be edited"),
        ([f"colmap:{bare}", "--missing", "leave_out"], "no picture is there to be edited"),
        ([good, "--target_mask", tmp_path / "masks"], "frame_00001.png is not there"),
        ([good, "--target_mask", tmp_path / "none"], "expected scene, alpha, white, or a folder of masks"),
        ([good, "--target_mask", "alpha"], "has no transparency"),
        ([f"folder:{place / 'ns/images'}", "--target_mask", "scene"], "the scene has no mask of it"),
        ([good, "--reference_mask", "a.png,b.png,c.png"], "expected one, or 2 as of --reference, got 3"),
        ([good, "--reference_mask", place / "r0.png"], "one file for several references"),
        ([good, "--sampling.alpha", "0"], "--sampling.alpha: expected"),
        ([good, "--sampling.kind", "single", "--sampling.pool", "1"], "--sampling.pool"),
        ([good, "--pictures", "images_4"], "are for colmap:DIR"),
        ([good, "--control.mode", "subject"], "mode subject needs a mask"),
        ([good, *one, "--reference", place / "none.png"], "none.png: no such file"),
        ([good, "--model", place / "ns"], "no model_index.json"),
        ([str(place / "ns")], "a path needs its kind before it"),
    )
    for (data, *more), said in cases:
        assert_user_error(main, words(place, data, tmp_path / "out", *more), capsys, said)
        assert not (tmp_path / "out").exists(), said
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert_user_error(main, words(place, good, tmp_path / "out"), capsys, "start the processes with torchrun")
