"""The quick demonstration: mechanics only."""

import json

import numpy as np
import pytest
from genview import scenes
from genview.cli import main
from genview.commands import _world

from tenfold import UserError


def test_the_quick_demo_runs_and_writes_its_report(tmp_path, capsys):
    assert main(["demo", "--quick", "--quiet", "--out", str(tmp_path / "d")]) == 0
    assert capsys.readouterr().out.startswith("data: real digits of scikit-learn on rendered backgrounds")
    summary = json.loads((tmp_path / "d/summary.json").read_text())
    assert set(summary["arms"]) == {"plain", "adaptive-qd"}
    assert all(claim["holds"] is None for claim in summary["claims"])
    for name in ("report.html", "figures/sheet.png", "figures/arms.png", "world/adaptive-merged/manifest.jsonl"):
        assert (tmp_path / "d" / name).is_file()


def test_scenes_are_the_same_again_and_the_parts_share_no_glyph():
    a, b = scenes.render("train", 1, 3), scenes.render("train", 1, 3)
    assert np.array_equal(a.images, b.images)
    assert a.images.shape == (449, 16, 16, 3)
    parts = [scenes.part(name)[0].reshape(-1, 64) for name in ("external", "train", "test")]
    assert [len(part) for part in parts] == [898, 449, 450]
    assert 0.08 < a.ratio.mean() < 0.35


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"agreement at level 0": 0.5, "contrast": 1.0, "copied background": 0.1}, "show their picture's digit"),
        ({"agreement at level 0": 0.9, "contrast": 0.5, "copied background": 0.1}, "contrast"),
        ({"agreement at level 0": 0.9, "contrast": 1.0, "copied background": 0.8}, "copies backgrounds"),
    ],
)
def test_a_generator_that_is_too_poor_stops_the_run_with_a_sentence(found, text):
    with pytest.raises(UserError, match=text):
        _world.check_gates(found)


def test_a_generator_that_is_good_enough_passes():
    _world.check_gates({"agreement at level 0": 0.8, "contrast": 1.0, "copied background": 0.2})
