"""`visctrl compare`: arms by pairs with statistics, grids on shared inversions, contact sheets."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from visctrl import metrics
from visctrl.cli import main
from visctrl.commands import compare as command
from visctrl_tiny import picture, sd, unconditional

from tenfold.testing import assert_user_error

QUICK = ["--control.steps", "4", "--control.start", "0.5", "--control.layers", "0:", "--control.rounds", "1"]
QUICK += ["--control.guard", "false", "--control.refine", "2", "--encoder", "none", "--size", "16", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    sd(folder).save_pretrained(folder / "sd")
    unconditional(folder).save_pretrained(folder / "plain")
    for seed in range(4):
        x = (picture(seed, size=21)[0].clamp(-1, 1) + 1) * 127.5
        Image.fromarray(x.permute(1, 2, 0).round().to(torch.uint8).numpy()).save(folder / f"{seed}.png")
    mask = np.zeros((21, 21), np.uint8)
    mask[4:16, 5:17] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    rows = [f"{n}.png,3.png,mask.png" for n in range(3)]
    (folder / "pairs.csv").write_text("\n".join(["target,reference,target_mask", *rows]) + "\n")
    return folder


def words(place, out, *more, model="plain"):
    return [str(x) for x in ["compare", "--model", place / model, *QUICK, *more, "--out", out]]


def test_arms_are_compared_over_pairs_with_paired_intervals_and_a_contact_sheet(place, tmp_path, capsys):
    out = tmp_path / "out"
    arms = ["--arms", '["control", "fast"]']
    assert main(words(place, out, "--pairs", place / "pairs.csv", *arms, model="sd")) == 0
    summary = json.loads((out / "summary.json").read_text())
    (claim,) = summary["claims"]
    assert claim["method"] == "paired t over 3 pairs"
    a, b = (np.asarray(summary["arms"][arm]["color"]) for arm in ("fast", "control"))
    assert claim["estimate"] == pytest.approx((a - b).mean())
    assert claim["ci95"][0] <= claim["estimate"] <= claim["ci95"][1]
    assert set(summary["arms"]["fast"]) == {"color", "layout", "background PSNR", "round", "rows"}
    assert summary["arms"]["control"]["background PSNR"] == [100.0] * 3
    for name in ("grid.png", "figures/contact.png", "figures/arms.png", "report.html", "pictures/0001-1/01-fast.png"):
        assert (out / name).is_file(), name
    shown = capsys.readouterr().out
    assert "color of fast - color of control" in shown
    assert "no encoder" in shown


def test_a_grid_gives_every_combinations_edit_and_shares_what_it_can(place, tmp_path):
    out = tmp_path / "out"
    pair = ["--target", place / "0.png", "--reference", place / "3.png"]
    grid = ["--grid.start", "[0.25, 0.5]", "--grid.strength", "[0.5, 1.0]"]
    assert main(words(place, out, *pair, *grid)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == [f"start {s}, strength {x}" for s in (0.25, 0.5) for x in (0.5, 1.0)]
    assert summary["claims"] == []
    alone = tmp_path / "alone"
    changed = ["--control.start", "0.25", "--control.strength", "0.5"]
    given = [
        "edit",
        "--model",
        place / "plain",
        *QUICK[:-5],
        *changed,
        "--size",
        "16",
        *pair,
        "--quiet",
        "--out",
        alone,
    ]
    assert main([str(x) for x in given]) == 0
    found, want = (
        np.asarray(Image.open(p), int)
        for p in (out / "pictures/0000-0/00-start-0.25-strength-0.5.png", alone / "edited.png")
    )
    assert np.abs(found - want).max() <= 1
    rows = [x["rows"][0] for x in summary["arms"].values()]
    assert sum(rows) < 4 * json.loads((alone / "edit.json").read_text())["rows"]


def test_a_comparison_that_was_interrupted_goes_on_with_the_next_pair(place, tmp_path, monkeypatch):
    given = ["--pairs", place / "pairs.csv", "--arms", '["control"]']
    measure = command.measure

    def stopping(settings, work, number):
        if number == 1:
            raise KeyboardInterrupt
        return measure(settings, work, number)

    monkeypatch.setattr(command, "measure", stopping)
    assert main(words(place, tmp_path / "a", *given)) == 130
    monkeypatch.setattr(command, "measure", measure)
    assert main([*words(place, tmp_path / "a", *given), "--resume"]) == 0
    assert main(words(place, tmp_path / "b", *given)) == 0
    a, b = (json.loads((tmp_path / x / "summary.json").read_text()) for x in "ab")
    assert a["arms"] == b["arms"]
    assert main([*words(place, tmp_path / "a", *given), "--overwrite"]) == 0


def test_nothing_of_a_comparison_is_drawn_so_that_seeds_would_change_nothing(place, tmp_path):
    given = ["--pairs", place / "pairs.csv", "--arms", '["control", "fast"]']
    found = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)  # the state that a library might draw from
        torch.manual_seed(seed)
        assert main(words(place, tmp_path / f"{seed}", *given, model="sd")) == 0
        summary = json.loads((tmp_path / f"{seed}/summary.json").read_text())
        found.append((summary["arms"], summary["claims"]))
        pictures = sorted((tmp_path / f"{seed}/pictures").rglob("*.png"))
        found[-1] += ([path.read_bytes() for path in pictures],)
    assert found[0] == found[1]


def test_what_cannot_be_compared_is_one_line_and_leaves_nothing_behind(place, tmp_path, capsys):
    pair = ["--target", place / "0.png", "--reference", place / "3.png"]
    for more, said in (
        ([], "nothing to compare on"),
        (["--target", place / "0.png"], "nothing to compare on"),
        ([*pair, "--pairs", place / "pairs.csv"], "leave out --target"),
        ([*pair, "--grid.start", "[1.5]"], "--grid.start"),
        ([*pair, "--grid.rounds", "[0]"], "--grid.rounds"),
        ([*pair, "--grid.layers", '["99"]'], "none of the layers"),
        ([*pair, "--arms", '["control", "none"]'], "--arms"),
        ([*pair, "--arms", '["control", "paper"]'], "arm paper: guidance 6: the model takes no prompts"),
        ([*pair, "--arms", '["control"]', "--control.mode", "subject"], "mode subject needs a mask"),
    ):
        assert_user_error(main, words(place, tmp_path / "out", *more), capsys, said)
        assert not (tmp_path / "out").exists(), said


def test_the_way_to_a_color_is_the_transfer_to_a_picture_of_that_color():
    target, ideal, masks = picture(0, rows=3), picture(1, rows=3), torch.rand(3, 16, 16)
    x = picture(2, rows=3)
    want = metrics.transfer(x, target, ideal, masks)
    found = metrics.toward(x, target, masks, metrics.mean_color(ideal, masks))
    assert torch.allclose(found, want)
    assert metrics.toward(target, target, masks, metrics.mean_color(ideal, masks)).abs().max() == 0


def test_layout_is_the_same_whatever_the_colors_and_another_where_shapes_move_or_melt():
    masks = torch.zeros(1, 1, 32, 32)
    masks[..., 4:14, 4:14] = masks[..., 18:28, 12:24] = 1
    one, two = (m * torch.tensor(c).view(1, 3, 1, 1) + (1 - m) for m, c in ((masks, (0.9, -0.8, 0.1)),) * 2)
    other = masks * torch.tensor([-0.7, 0.3, -0.2]).view(1, 3, 1, 1) + (1 - masks)
    assert float(metrics.structure(one, two)) == 0
    assert float(metrics.structure(other, one)) < 1e-6
    moved = torch.roll(other, 4, dims=-1)
    melted = torch.nn.functional.avg_pool2d(other, 9, 1, 4)
    for changed in (moved, melted, torch.full_like(other, 0.3)):
        assert float(metrics.structure(changed, one)) > 0.05
    far, further = (float(metrics.structure(torch.roll(other, n, dims=-1), one)) for n in (1, 4))
    assert far < further
