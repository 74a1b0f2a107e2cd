"""Interpolators against closed forms, PyKrige and a literal system; conformal intervals, metrics and spectra."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from radiogat.baselines import (
    IDW,
    RBF,
    FreeSpaceShift,
    LocalKriging,
    PooledIDW,
    PooledKriging,
    Variogram,
    krige,
    nearest,
)
from radiogat.conformal import SpatialConformal, spatial_blocks
from radiogat.maps import MapLayout, RadioMap
from radiogat.metrics import block_rmse, coverage, interval_score, mae, rmse
from radiogat.samples import Grid, RadioSamples
from radiogat.spectral import fit_spectrum, free_space_shift, reference_frequency, spectrum_at
from radiogat.suggest import reach_of, suggest_places
from scipy.spatial import cKDTree

from tenfold import UserError


def field(count=200, seed=0, bands=(1750.0,)):
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 50, (count, 2))
    freq = np.resize(bands, count)
    rss = -60 + 5 * np.sin(xy[:, 0] / 8) + 4 * np.cos(xy[:, 1] / 6) + free_space_shift(1750.0, freq)
    return RadioSamples(xy, freq, rss)


def test_kriging_equals_pykrige():
    from pykrige.ok import OrdinaryKriging

    samples = field()
    xy = np.random.default_rng(1).uniform(0, 50, (300, 2))
    variogram = Variogram(30.0, 25.0, 0.5)
    value, std = LocalKriging(16, variogram).fit(samples).predict_with_std(xy, 1750.0)
    peer = OrdinaryKriging(
        *samples.xy.T,
        samples.rss_dbm,
        variogram_model="exponential",
        variogram_parameters={"psill": 30.0, "range": 25.0, "nugget": 0.5},
    )
    expected, variance = peer.execute("points", *xy.T, n_closest_points=16, backend="loop")
    assert np.allclose(value, expected, atol=1e-8)
    assert np.allclose(std**2, variance, atol=1e-8)


@pytest.mark.parametrize("neighbors", [1, 2, 9])
def test_kriging_solves_the_literal_system(neighbors):
    """Also at a measured place, and from two measurements at one place, which then differ by the nugget."""
    rng = np.random.default_rng(2)
    points, values = rng.uniform(0, 9, (40, 2)), rng.normal(-60, 5, 40)
    points[1] = points[0]
    variogram = Variogram(20.0, 8.0, 1.5)
    xy = np.concatenate([rng.uniform(0, 9, (7, 2)), points[:3]])
    distance, index = nearest(cKDTree(points), xy, neighbors)
    value, variance = krige(points, values, index, distance, variogram)
    for q, near in enumerate(index):
        apart = np.sqrt(((points[near][:, None] - points[near]) ** 2).sum(axis=2))
        gamma = variogram.nugget + variogram.sill * (1 - np.exp(-3 * apart / variogram.range))
        system = np.ones((neighbors + 1, neighbors + 1))
        system[:-1, :-1] = gamma - np.diag(np.diag(gamma))
        system[-1, -1] = 0
        right = np.append(variogram(distance[q]), 1)
        weights = np.linalg.solve(system, right)
        assert value[q] == pytest.approx(weights[:-1] @ values[near], abs=1e-9)
        assert variance[q] == pytest.approx(max(weights @ right, 0), abs=1e-9)


def test_two_measurements_at_one_place_count_once_without_a_nugget():
    points, values = np.array([[0.0, 0], [0, 0], [3, 1], [1, 4]]), np.array([1.0, 1, 5, 7])
    at, variogram = np.array([[1.0, 1]]), Variogram(20.0, 8.0)
    found = krige(points, values, *nearest(cKDTree(points), at, 4)[::-1], variogram)
    once = krige(points[1:], values[1:], *nearest(cKDTree(points[1:]), at, 3)[::-1], variogram)
    assert np.allclose(found, once, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.booleans())
def test_neighbors_are_sorted_by_distance_then_order(seed, k, leave_out):
    """On a small raster, where most distances are tied."""
    rng = np.random.default_rng(seed)
    points = np.unique(rng.integers(0, 5, (14, 2)), axis=0).astype(float)[:12]
    rows = np.arange(len(points)) if leave_out else None
    xy = points if leave_out else rng.integers(0, 5, (9, 2)).astype(float)
    distance, index = nearest(cKDTree(points), xy, k, rows)
    for q, at in enumerate(xy):
        d = np.sqrt(((points - at) ** 2).sum(axis=1))
        if leave_out:
            d[q] = np.inf
        assert np.allclose(distance[q], np.sort(d)[:k])
        assert np.allclose(d[index[q]], distance[q])
        for one, other in itertools.pairwise(index[q]):
            assert d[one] < d[other] or one < other


def test_kriging_is_exact_at_a_measurement_and_its_weights_sum_to_one():
    samples = field()
    kriging = LocalKriging(16, Variogram(30.0, 25.0)).fit(samples)
    value, std = kriging.predict_with_std(samples.xy, 1750.0)
    assert np.allclose(value, samples.rss_dbm, atol=1e-8)
    assert np.allclose(std, 0, atol=1e-5)
    louder = RadioSamples(samples.xy, samples.freq_mhz, samples.rss_dbm + 3)
    xy = samples.xy + 0.7
    assert np.allclose(
        LocalKriging(16, Variogram(30.0, 25.0)).fit(louder).predict(xy, 1750.0) - 3, kriging.predict(xy, 1750.0)
    )


@pytest.mark.parametrize("method", [IDW(), LocalKriging(), PooledIDW(), PooledKriging()])
def test_leave_one_out_equals_taking_it_out(method):
    samples = field(60, bands=(1750.0, 5750.0))
    if isinstance(method, LocalKriging):
        method.variogram = Variogram(30.0, 25.0)
    found = method.fit(samples).leave_one_out(1750.0)
    band = np.flatnonzero(samples.freq_mhz == 1750.0)
    for k in (0, 7, 20):
        tree, values = (
            (cKDTree(np.delete(samples.xy, band[k], 0)), np.delete(method.shifted(1750.0), band[k]))
            if hasattr(method, "shifted")
            else (cKDTree(np.delete(samples.xy[band], k, 0)), np.delete(samples.rss_dbm[band], k))
        )
        at = samples.xy[band[k] : band[k] + 1]
        if isinstance(method, IDW | PooledIDW):
            d, i = tree.query(at, 12)
            assert found[k] == pytest.approx(float((d**-3 * values[i]).sum() / (d**-3).sum()), abs=1e-8)
        elif isinstance(method, LocalKriging):
            rest = RadioSamples(tree.data, 1750.0, values)
            assert found[k] == pytest.approx(
                float(LocalKriging(16, Variogram(30.0, 25.0)).fit(rest).predict(at, 1750.0)[0])
            )
        else:
            assert abs(found[k] - samples.rss_dbm[band[k]]) < 3


def test_the_variogram_is_found_again():
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 40, (900, 2))
    d = np.sqrt(((xy[:, None] - xy) ** 2).sum(axis=2))
    values = np.linalg.cholesky(9 * np.exp(-3 * d / 12) + 1e-9 * np.eye(900)) @ rng.standard_normal(900)
    found = Variogram.fit(xy, values, 15.0)
    assert 5 < found.sill < 15
    assert 6 < found.range < 20
    assert found.nugget < 1.5


def test_ties_are_broken_by_the_order_of_the_points():
    points = np.array([[0.0, 0], [2, 0], [0, 2], [2, 2], [1, 5]])
    _, index = nearest(cKDTree(points), np.array([[1.0, 1.0]]), 3)
    assert index.tolist() == [[0, 1, 2]]
    _, index = nearest(cKDTree(points), np.array([[0.0, 0.0]]), 3, np.array([0]))
    assert index.tolist() == [[1, 2, 3]]


def test_pooling_finds_what_the_bands_differ_by():
    samples = field(400, bands=(1750.0, 5750.0))
    pooled = PooledIDW().fit(samples)
    assert pooled.shifts_[1750.0][5750.0] == pytest.approx(20 * math.log10(5750 / 1750), abs=0.3)
    xy = np.random.default_rng(1).uniform(5, 45, (50, 2))
    truth = -60 + 5 * np.sin(xy[:, 0] / 8) + 4 * np.cos(xy[:, 1] / 6)
    assert rmse(truth, pooled.predict(xy, 1750.0)) < rmse(truth, IDW().fit(samples).predict(xy, 1750.0))
    other = pooled.predict(xy, 9000.0) - pooled.predict(xy, 1750.0)
    assert np.abs(other - 20 * math.log10(1750 / 9000)).mean() < 0.5


def test_a_band_with_few_measurements_is_shifted_by_free_space():
    few = field(200, bands=(1750.0,) * 9 + (5750.0,))
    assert PooledIDW().fit(few).shifts_[1750.0][5750.0] == pytest.approx(20 * math.log10(5750 / 1750))


def test_free_space_shift_uses_the_nearest_other_band():
    samples = field(300, bands=(1750.0, 2750.0, 5750.0))
    xy = samples.xy[:10] + 0.1
    expected = IDW().fit(samples).predict(xy, 2750.0) + 20 * math.log10(2750 / 1750)
    assert np.allclose(FreeSpaceShift().fit(samples).predict(xy, 1750.0), expected)


def test_radial_basis_functions_interpolate():
    samples = field()
    for kernel in ("linear", "thin_plate_spline"):
        assert np.allclose(
            RBF(kernel=kernel).fit(samples).predict(samples.xy[:20], 1750.0), samples.rss_dbm[:20], atol=1e-6
        )


def test_a_band_that_was_not_measured_is_named():
    with pytest.raises(UserError, match="no measurement at 900 MHz; there are 1750"):
        IDW().fit(field()).predict(np.zeros((1, 2)), 900.0)


def test_spectra_are_straight_lines():
    f = np.array([700.0, 1750.0, 2750.0, 5750.0])
    a, b = np.array([[-50.0, -70.0]]), np.array([[-20.0, -12.5]])
    power = a + b * np.log10(f / reference_frequency(f))[:, None, None]
    level, slope = fit_spectrum(f, power)
    f0 = reference_frequency(f)
    assert np.allclose(spectrum_at(level, slope, f0, 3333.0), a + b * np.log10(3333 / f0), atol=1e-4)
    _, slope = fit_spectrum(f, -20 * np.log10(f)[:, None])
    assert slope[0] == pytest.approx(-20.0, abs=1e-9)
    assert fit_spectrum([1750.0], np.zeros((1, 3)))[1].tolist() == [-20.0] * 3


def test_block_rmse_weighs_blocks_equally():
    truth, predicted = np.zeros(10), np.array([1.0] + [3.0] * 9)
    assert block_rmse(truth, predicted, [0] + [1] * 9) == pytest.approx(math.sqrt(5))
    assert rmse(truth, predicted) == pytest.approx(math.sqrt(8.2))
    assert block_rmse(truth, predicted, [0] * 5 + [1] * 5) == pytest.approx(rmse(truth, predicted))
    assert mae(truth, predicted) == pytest.approx(2.8)


def test_coverage_and_interval_score():
    truth, low, high = np.array([0.0, 5.0]), np.array([-1.0, 1.0]), np.array([1.0, 3.0])
    assert coverage(truth, low, high) == 0.5
    assert interval_score(truth, low, high, 0.9) == pytest.approx((2 + 2 + 2 / 0.1 * 2) / 2)


@pytest.mark.parametrize("seed", range(4))  # fixed ones: of many more, some would lie outside of three sigmas
def test_conformal_intervals_cover(seed):
    """Within three binomial sigmas (of both halves) of what was asked for; wider for higher levels."""
    rng = np.random.default_rng(seed)
    n = 2000
    sigma = rng.uniform(0.5, 3, 2 * n)
    error = sigma * rng.standard_t(3, 2 * n)
    conformal = SpatialConformal(np.abs(error[:n]) / sigma[:n])
    widths = []
    for level in (0.5, 0.8, 0.9, 0.95):
        low, high = conformal.interval(np.zeros(n), sigma[n:], level)
        assert abs(coverage(error[n:], low, high) - level) < 3 * math.sqrt(2 * level * (1 - level) / n)
        widths.append((high - low).mean())
    assert widths == sorted(widths)


def test_too_few_scores_give_an_infinite_interval_and_a_warning():
    conformal = SpatialConformal([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="3 held-out places are too few for an interval of 90%"):
        low, high = conformal.interval([0.0], [1.0], 0.9)
    assert np.isinf([low[0], high[0]]).all()
    assert conformal.quantile(0.5) == 2.0


def test_groups_have_their_own_quantiles_where_they_are_large_enough():
    scores = np.concatenate([np.full(300, 1.0), np.full(300, 5.0), np.full(10, 9.0)])
    conformal = SpatialConformal(scores, np.repeat([0, 1, 2], [300, 300, 10]))
    assert [conformal.quantile(0.9, g) for g in (0, 1)] == [1.0, 5.0]
    assert conformal.quantile(0.9, 2) == conformal.quantile(0.9) == 5.0


def test_coverage_counts_what_lies_inside():
    conformal = SpatialConformal(np.arange(1.0, 12.0))
    assert conformal.coverage([0.5, 6, 6.5, 99], [0, 0, 0, 0], [0.5, 0.9]).tolist() == [0.5, 0.75]
    assert np.isnan(conformal.coverage([1.0], [0], [0.99])).all()


def test_spatial_blocks_are_squares():
    labels = spatial_blocks([[0.1, 0.1], [9.9, 9.9], [10.1, 0.1], [0.2, 10.5]], 10)
    assert labels[0] == labels[1]
    assert len(set(labels.tolist())) == 3


def test_the_reach_of_a_measurement_is_the_variograms_range_whatever_the_cell():
    """A field that was made with a range of 60 m is found to have about that; the default of ten cells was 10 or 100 m."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 400, (500, 2))
    apart = np.sqrt(((xy[:, None] - xy) ** 2).sum(axis=2))
    field = np.linalg.cholesky(25 * np.exp(-3 * apart / 60) + 1e-6 * np.eye(500)) @ rng.standard_normal(500)
    for offset in (0.0, 40.0):  # a second band does not change it
        freq = np.where(np.arange(500) % 2, 1800.0, 2600.0)
        samples = RadioSamples(xy, freq, -80 + field + np.where(freq == 1800.0, offset, 0))
        assert 35 < reach_of(samples) < 100


def test_suggestions_are_apart_and_where_doubt_is():
    grid = Grid(0, 0, 2.0, 40, 50)
    doubt = np.ones(grid.shape)
    doubt[5:15, 5:15] = 4.0
    doubt[20:, 30:] = np.nan
    places = suggest_places(grid, doubt, 12, 20.0)
    at = grid.rowcol(places)
    assert (doubt[at[0, 0], at[0, 1]], doubt[at[1, 0], at[1, 1]]) == (4.0, 4.0)
    assert np.isfinite(doubt[at[:, 0], at[:, 1]]).all()
    apart = np.sqrt(((places[:, None] - places) ** 2).sum(axis=2)) + 1e9 * np.eye(12)
    assert apart.min() >= 4
    with pytest.raises(UserError, match="of 1600 that could be measured"):
        suggest_places(grid, doubt, 2000, 20.0)


@pytest.mark.parametrize("cell", [2.0, 10.0])
def test_a_maps_suggestions_reach_over_its_own_variogram_whatever_its_cell(cell):
    side = 400
    grid = Grid(0.0, side, cell, int(side / cell), int(side / cell))
    x, y = grid.centers().reshape(*grid.shape, 2).transpose(2, 0, 1)
    power = -70 + 6 * np.sin(x / 40) + 6 * np.cos(y / 40)
    layers = {"rss_dbm": power[None], "rss_lo": power[None] - 3, "rss_hi": power[None] + 3}
    places = RadioMap(MapLayout(grid, (1800.0,), 0.9), layers).suggest(5)
    apart = np.sqrt(((places[:, None] - places) ** 2).sum(axis=2))[np.triu_indices(5, 1)]
    assert apart.min() > 60  # 10 cells were 20 and 100 meters
