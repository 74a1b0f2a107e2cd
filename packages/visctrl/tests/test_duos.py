"""The world of two materials: what it is made of, and that matching colors as a whole does not solve it."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from visctrl import metrics
from visctrl.duos import KINDS, render_duo_pairs, render_duos
from visctrl.toy import Training

FILE = Path(__file__).parents[1] / "studies/two_materials.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the studies are not in a source distribution")


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("visctrl_two_materials", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs():
    return render_duo_pairs(16, 0)


def test_discs_and_squares_share_no_pixel_but_at_corners_and_squares_are_smaller(pairs):
    masks = pairs.target.masks
    assert float((masks[:, 0] * masks[:, 1]).max()) <= 0.25  # the edge of one, softened, in the edge of the other
    assert float((masks[:, 0] * masks[:, 1]).mean()) < 1e-3
    assert float(masks.sum(dim=1).max()) <= 1 + 1e-6
    discs, squares = (float(masks[:, kind].sum(dim=(1, 2)).mean()) for kind in (0, 1))
    # 3 discs of radius 3.6 to 4.6 and 6 squares of 3.6 to 4.8, where all find a place
    radii = [np.mean(np.linspace(least, most, 100) ** 2) for _, least, most in KINDS]
    assert discs == pytest.approx(KINDS[0][0] * np.pi * radii[0], rel=0.1)
    assert squares == pytest.approx(KINDS[1][0] * 4 * radii[1], rel=0.15)


def test_the_ideal_has_the_targets_structure_in_the_references_materials_kind_by_kind(pairs, study):
    for kind in (0, 1):
        inside = pairs.target.masks[:, kind] == 1
        for n in range(16):
            shown = pairs.ideal[n][:, inside[n]]
            assert torch.allclose(shown, pairs.reference.colors[n, kind][:, None].expand_as(shown), atol=1e-6)
    outside = pairs.target.subject == 0
    assert torch.equal(pairs.ideal.movedim(1, -1)[outside], pairs.target.images.movedim(1, -1)[outside])
    found = study.values(pairs.ideal, pairs)
    for name, want in (("discs", 1), ("squares", 1), ("transfer", 1), ("rmse", 0)):
        assert found[name] == pytest.approx([want] * 16, abs=1e-4)


def test_matching_mean_and_deviation_of_all_colors_solves_one_material_and_not_two(pairs, study):
    untouched, matched = (study.values(x, pairs) for x in (pairs.target.images, study.matched(pairs)))
    assert np.mean(matched["rmse"]) > 0.6 * np.mean(untouched["rmse"])
    one = [
        metrics.match_colors(
            pairs.target.images, pairs.reference.images, pairs.target.masks[:, kind], pairs.reference.masks[:, kind]
        )
        for kind in (0, 1)
    ]
    for kind in (0, 1):  # told which is which, it is right: the kinds are the difficulty
        moved = metrics.transfer(one[kind], pairs.target.images, pairs.ideal, pairs.target.masks[:, kind])
        assert float(moved.median()) > 0.9


def test_the_same_seed_renders_the_same_pictures_each_structure_in_several_pairs_of_colors():
    a, b = render_duos(3, 7, paints=2), render_duos(3, 7, paints=2)
    assert torch.equal(a, b)
    assert a.shape == (6, 3, 32, 32)
    white = (a > 0.969).all(dim=1)
    assert torch.equal(white[:3], white[3:])
    assert not torch.equal(a[:3], a[3:])
    assert not torch.equal(render_duos(3, 8, paints=2), a)


def test_timesteps_of_a_training_follow_their_distribution():
    draw = torch.Generator().manual_seed(0)
    middling = Training(batch=20_000, middle=-0.2).timesteps(draw).double()
    even = Training(batch=20_000).timesteps(draw).double()
    assert float(middling.median()) == pytest.approx(1000 / (1 + np.exp(0.2)), rel=0.02)
    assert float(even.median()) == pytest.approx(1000 * 0.5**0.8, rel=0.02)
    assert float((middling < 100).double().mean()) < 0.04 < float((even < 100).double().mean())


def test_the_study_runs_goes_on_where_it_was_and_decides_from_its_own_numbers(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRAINING", Training(steps=2, batch=2, warm_up=1, middle=-0.2))
    monkeypatch.setattr(study, "STRUCTURES", 16)
    monkeypatch.setattr(study, "PAIRS", 3)
    monkeypatch.setattr(sys, "argv", ["two_materials.py", "--seeds", "0,1", "--out", str(tmp_path)])
    assert study.main() == 0
    before = (tmp_path / "study.json").read_bytes()
    monkeypatch.setattr(study, "engine_of", None)  # not asked for again
    assert study.main() == 0
    assert (tmp_path / "study.json").read_bytes() == before
    found = json.loads(before)
    arms = [found["by_seed"][seed]["arms"] for seed in "01"]
    right, wrong = (np.concatenate([a[arm]["transfer"] for a in arms]) for arm in ("round 1", "wrong reference"))
    assert found["claims"][0]["estimate"] == pytest.approx((right - wrong).mean())
    low, high = found["claims"][0]["ci95"]
    assert low <= found["claims"][0]["estimate"] <= high
    assert "transfer of squares" in capsys.readouterr().out
    assert (tmp_path / "two-materials.png").is_file()


@pytest.mark.slow
def test_two_materials_are_carried_over_kind_by_kind(study):
    engine, pairs = study.engine_of(0, study.TRAINING, study.STRUCTURES, quiet=True), render_duo_pairs(16, 0)
    found = study.measure(engine, pairs)
    right, wrong = (np.mean(found[arm]["transfer"]) for arm in ("round 1", "wrong reference"))
    assert right - wrong >= 0.1
    assert np.mean(found["guard"]["rmse"]) <= np.mean(found["Reinhard"]["rmse"])
