"""Line-of-sight fractions against literal loops and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from radiogat.config import CityConfig
from radiogat.depth import distance_depth, mast_distance, power_depth, radio_depth
from radiogat.simulate import city

from tenfold import UserError


def random_mask(seed, height=30, width=40, share=0.2):
    return np.random.default_rng(seed).random((height, width)) < share


def literal_scan(mask, y, x):
    """The definition of the authors' maps, cell by cell."""
    T = np.empty(mask.shape)
    for j in range(mask.shape[0]):
        for k in range(mask.shape[1]):
            if k != x:
                columns = [k + i * (1 if x > k else -1) for i in range(abs(x - k))]
                cells = [(int((y - j) / (x - k) * (c - k) + j), c) for c in columns]
            elif j != y:
                cells = [(j + i * (1 if y > j else -1), k) for i in range(abs(y - j))]
            else:
                cells = [(j, k)]
            T[j, k] = 1 - sum(mask[c] for c in cells) / len(cells)
    return T


def literal_dda(mask, y, x):
    """One cell a step of the longer axis, the other one rounded, halves upward."""
    T = np.empty(mask.shape)
    for j in range(mask.shape[0]):
        for k in range(mask.shape[1]):
            n = max(abs(y - j), abs(x - k))
            cells = [(j, k)] if n == 0 else []
            for left in range(n, 0, -1):
                row = np.floor((j - y) * left / n + y + 0.5 + 1e-9)
                column = np.floor((k - x) * left / n + x + 0.5 + 1e-9)
                cells.append((int(row), int(column)))
            T[j, k] = 1 - sum(mask[c] for c in cells) / len(cells)
    return T


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 29), st.integers(0, 39))
def test_scan_equals_the_literal_loop_exactly(seed, y, x):
    mask = random_mask(seed)
    assert np.array_equal(radio_depth(mask, [[y, x]], "scan")[0], literal_scan(mask, y, x))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 29), st.integers(0, 39))
def test_dda_equals_its_literal_loop(seed, y, x):
    mask = random_mask(seed)
    assert np.allclose(radio_depth(mask, [[y, x]])[0], literal_dda(mask, y, x), atol=1e-12)


def test_scan_equals_the_released_maps(released):
    """On area 1."""
    with np.load(released) as file:
        building = file["area01_rss_cdbm"][0] == 0
        found = radio_depth(building, file["tx_rowcol_1based"][0] - 1, "scan")
        assert np.abs(found[:, :440, :480] - file["compat_area01_lossprob"]).max() < 1e-6


@pytest.mark.parametrize("method", ["dda", "scan", "polar"])
def test_without_buildings_all_is_in_sight(method):
    assert (radio_depth(np.zeros((20, 30)), [[3, 4], [19, 29]], method) == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 29), st.integers(0, 39))
def test_dda_is_exact_under_transposition(seed, y, x):
    mask = random_mask(seed)
    assert np.array_equal(radio_depth(mask, [[y, x]])[0].T, radio_depth(mask.T, [[x, y]])[0])


def test_scan_is_not_the_same_in_both_directions():
    """The columns beside the mast see nothing of the buildings."""
    mask = random_mask(1)
    found = radio_depth(mask, [[15, 20]], "scan")[0]
    assert not np.array_equal(found.T, radio_depth(mask.T, [[20, 15]], "scan")[0])
    free = ~mask[:, 21]
    assert (found[free, 21] == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_polar_is_near_dda(seed):
    mask = city(CityConfig(size=100, seed=seed)).building
    difference = radio_depth(mask, [[40, 30]], "polar") - radio_depth(mask, [[40, 30]])
    assert np.abs(difference).mean() < 0.02


@pytest.mark.parametrize("method", ["dda", "scan", "polar"])
@pytest.mark.parametrize(("thickness", "away"), [(1, 10), (3, 17), (5, 25)])
def test_a_wall_takes_its_share_of_the_line(method, thickness, away):
    """T = 1 - k / n on the mast's own row."""
    mask = np.zeros((21, 40), dtype=bool)
    mask[:, 10 : 10 + thickness] = True
    found = radio_depth(mask, [[10, 5]], method)[0, 10, 5 + away]
    assert found == pytest.approx(1 - thickness / away, abs=1e-12)


def test_the_masts_own_cell_is_in_sight_unless_it_is_built_up():
    mask = np.zeros((5, 5))
    mask[2, 2] = 1
    for method in ("dda", "scan", "polar"):
        assert radio_depth(mask, [[2, 2], [0, 0]], method)[0, 2, 2] == 0
        assert radio_depth(mask, [[2, 2], [0, 0]], method)[1, 0, 0] == 1


def test_distance_depth_fills_the_masts_cell_with_the_largest_value():
    T, d = np.ones((1, 4, 5)), mast_distance((4, 5), [[1, 1]])
    found = distance_depth(T, d)
    assert found[1, 1] == found.max() == 1.0
    assert found[1, 4] == pytest.approx(3**-0.1)


def test_power_depth_is_the_link_budget_times_the_fraction():
    found = power_depth(np.full((1, 1, 1), 0.5), np.full((1, 1, 1), 100.0), 1000.0)
    assert found[0, 0, 0] == pytest.approx(0.5 * (135 - 60 - 40))


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"transmitter 1 .*lies outside"):
        radio_depth(np.zeros((5, 5)), [[0, 0], [5, 0]])
    with pytest.raises(UserError, match="expected a raster"):
        radio_depth(np.zeros(5), [[0, 0]])
    with pytest.raises(UserError, match="unknown method 'ray'"):
        radio_depth(np.zeros((5, 5)), [[0, 0]], "ray")
