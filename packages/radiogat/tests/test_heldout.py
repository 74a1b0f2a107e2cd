"""Held-out places and the stack: what they ask, what they are worth, and whether they are right along streets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from radiogat.config import CityConfig, RadioGATxConfig, TreesConfig
from radiogat.conformal import SpatialConformal
from radiogat.estimator import RadioMapEstimator, describe
from radiogat.heldout import beyond, hold_out, map_distances, place_groups, strata_weights
from radiogat.metrics import coverage, rmse
from radiogat.samples import Grid, RadioSamples, RadioScene
from radiogat.simulate import along_streets, at_places, city
from radiogat.stacking import Spread, Weights, cross_fitted
from scipy.spatial import cKDTree

from tenfold import UserError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0, 3))
def test_donors_beyond_a_radius_equal_a_literal_search(seed, k, radius):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 9, (40, 2)).astype(float)
    at = points[:6]
    apart = np.sqrt(((points[None] - at[:, None]) ** 2).sum(axis=2))
    if ((apart > radius).sum(axis=1) < k).any():
        return
    distance, index = beyond(cKDTree(points), at, k, np.full(6, radius))
    for q in range(6):
        far = np.sort(apart[q][apart[q] > radius * (1 + 1e-12)])[:k]
        assert np.allclose(distance[q], far)
        assert np.allclose(apart[q][index[q]], distance[q])


def streets(bands=(1750.0, 3500.0), size=100, seed=100):
    maps = city(CityConfig(size=size, seed=seed, freq_mhz=bands))
    observed = along_streets(maps, 30)
    return maps, observed, maps.samples(observed)


def test_cases_lie_as_far_from_the_measurements_as_the_map_is_read():
    maps, _, samples = streets()
    asked = map_distances(samples, maps.scene)
    held = hold_out(samples, asked, seed=1)
    assert held.weight.sum() == pytest.approx(1)
    for q in (0.25, 0.5, 0.75):
        at = float(np.quantile(asked, q))
        assert held.weight[held.distance <= at].sum() == pytest.approx(q, abs=0.15)
    near = cKDTree(samples.xy).query(samples.xy, k=3)[0][:, 2]
    assert np.median(asked) > 4 * np.median(near)  # what leaving out single measurements would have asked


def test_no_case_may_be_predicted_from_what_its_model_was_trained_on():
    maps, _, samples = streets()
    held = hold_out(samples, map_distances(samples, maps.scene), seed=1)
    assert len(held.targets) > 1
    assert not held.targets.all(axis=0).any()  # each measurement is held out in one of the rounds
    for number, targets in enumerate(held.targets):
        trained = cKDTree(samples.xy[targets])
        cases = held.round == number
        assert not targets[held.rows[cases]].any()
        assert (trained.query(samples.xy[held.rows[cases]])[0] > held.radius[cases]).all()
    for place in np.unique(samples.xy, axis=0)[::40]:  # all bands of a place together
        there = (samples.xy == place).all(axis=1)
        assert (held.targets[:, there] == held.targets[:, there][:, :1]).all()


def test_the_share_of_the_map_that_lies_farther_than_any_case_is_said():
    rng = np.random.default_rng(0)
    corner = RadioSamples(rng.uniform(0, 100, (300, 2)), 1800.0, rng.normal(-70, 5, 300))
    grid = Grid(0, 400, 10, 40, 40)
    asked = map_distances(corner, RadioScene(grid))
    held = hold_out(corner, asked)
    centers = grid.centers()
    truly = (cKDTree(corner.xy).query(centers)[0] > held.distance.max()).mean()
    assert held.beyond == pytest.approx(truly, abs=0.03)
    assert held.beyond > 0.5
    estimator = RadioMapEstimator("kriging", fallback=False).fit(corner, RadioScene(grid))
    assert "of the map lies farther from any measurement than all that was checked" in describe(estimator)


def test_weights_of_strata_are_the_shares_of_the_map():
    achieved = np.repeat([1.0, 2.0, 3.0, 4.0], [40, 20, 20, 20])
    asked = np.repeat([1.0, 2.0, 3.0, 4.0, 9.0], [10, 20, 30, 30, 10])
    weight, far = strata_weights(achieved, asked, strata=4)
    assert far == pytest.approx(0.1)
    assert weight[achieved == 1].sum() < weight[achieved == 3].sum()
    assert weight.sum() == pytest.approx(1)
    same, none = strata_weights(asked, asked)
    assert none == 0
    assert np.allclose(same, 1 / len(asked), rtol=0.3)


def test_what_lies_as_near_as_the_map_is_read_is_held_out_together():
    xy = np.array([[0.0, 0], [1, 0], [2, 0], [50, 0], [51, 0]])
    assert place_groups(xy, np.full(9, 10.0)).tolist() == [0, 0, 0, 1, 1]


def test_weighted_quantiles_equal_those_of_repeated_scores():
    rng = np.random.default_rng(0)
    scores, times = rng.random(60), rng.integers(1, 9, 60)
    plain = SpatialConformal(np.repeat(scores, times)).quantile(0.8)
    weighted = SpatialConformal(scores, weights=times)
    assert abs(weighted.quantile(0.8) - plain) < 0.1
    one = SpatialConformal(scores, weights=np.ones(60))
    assert one.quantile(0.9) == SpatialConformal(scores).quantile(0.9)
    with pytest.warns(UserWarning, match="5 held-out places are too few"):
        SpatialConformal(scores, places=np.arange(60) // 12).quantile(0.9)


def test_a_stacks_weights_are_found_and_sum_to_one():
    rng = np.random.default_rng(0)
    distance = rng.uniform(0, 10, 4000)
    knots = np.linspace(0, 10, 21)
    truth = rng.normal(0, 5, 4000)
    near_good = truth + rng.normal(0, 1, 4000) * (0.2 + distance)
    far_good = truth + rng.normal(0, 1, 4000) * (10.2 - distance)
    powers = np.stack([near_good, far_good], axis=1)
    weight = np.full(4000, 1 / 4000)
    found = Weights.fit(powers, truth, distance, weight, knots, pull=5)
    assert found.near.sum() == pytest.approx(1)
    assert found.far.sum() == pytest.approx(1)
    assert found.near[0] > 0.8
    assert found.far[1] > 0.8
    best = min(rmse(truth, each) for each in powers.T)
    assert rmse(truth, cross_fitted(powers, truth, distance, weight, np.arange(4000), knots, 5)) < 0.7 * best


def test_the_scale_of_errors_is_found():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (5000, 2))
    residual = rng.standard_normal(5000) * np.exp(0.8 * x[:, 0])
    spread = Spread.fit(x, residual, np.full(5000, 1 / 5000))
    assert spread.slope == pytest.approx([0.8, 0.0], abs=0.1)


CASES = [
    "five bands at places",
    "two bands along streets",
    "one band along streets, with buildings",
    "one band along streets",
]


@pytest.mark.parametrize("case", CASES)
def test_what_is_said_of_the_map_is_true(case):
    """Said and true RMSE within 25 %, 90 % bars that hold 85 to 95 %, and a choice within 10 % of the best part."""
    bands = {"five": (1750.0, 2750.0, 3750.0, 4750.0, 5750.0), "two b": (1750.0, 3500.0)}.get(
        case[:5].strip(), (1750.0,)
    )
    maps = city(CityConfig(size=90, seed=101, freq_mhz=bands))
    observed = at_places(maps, 200, 101) if case.startswith("five") else along_streets(maps, 30, 2)
    samples = maps.samples(observed)
    scene = RadioScene(maps.scene.grid) if case == CASES[3] else maps.scene
    free = np.flatnonzero(np.isfinite(maps.rss_dbm[0]) & ~observed[0])
    free = np.random.default_rng(0).permutation(free)[:2500]
    where = maps.scene.grid.centers()[free]
    estimator = RadioMapEstimator(network=RadioGATxConfig(steps=60), trees=TreesConfig(iterations=60), seed=101)
    estimator.fit(samples, scene, where=where)
    found = [estimator.predict(where, f, 0.9) for f in maps.freq_mhz]
    truth = maps.rss_dbm.reshape(len(bands), -1)[:, free]
    power, low, high = (np.stack(each) for each in zip(*found, strict=True))
    true = rmse(truth, power)
    assert estimator.heldout_[estimator.chosen_] == pytest.approx(true, rel=0.25)
    assert 0.85 <= coverage(truth, low, high) <= 0.95
    for model in estimator.fitted_.values():
        of_bands = np.stack([model.predict(where, np.full(len(where), f))[0] for f in maps.freq_mhz])
        assert true <= 1.1 * rmse(truth, of_bands)


def test_too_few_places_are_said():
    samples = RadioSamples(np.zeros((4, 2)), [1750.0, 2000, 2500, 3000], [-60.0, -61, -62, -63])
    with pytest.raises(UserError, match=r"too few places|one place|measure more places"):
        RadioMapEstimator().fit(samples)
