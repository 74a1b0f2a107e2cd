"""The estimator and its evaluation: choices, error bars, files, protocol."""

import dataclasses

import numpy as np
import pytest
from radiogat.config import CityConfig, RadioGATConfig, RadioGATxConfig, TreesConfig
from radiogat.data import read_maps
from radiogat.estimator import RadioMapEstimator, describe
from radiogat.evaluation import Protocol, crop, cross_validate, protocol_mask, protocol_split
from radiogat.graph import blocks
from radiogat.metrics import coverage, rmse
from radiogat.samples import Grid, RadioSamples, RadioScene
from radiogat.simulate import city
from sklearn.base import clone

from tenfold import NonFiniteError, UserError

QUICK = RadioGATxConfig(steps=60)


@pytest.fixture(scope="module")
def fitted(town, measured):
    return RadioMapEstimator("radiogatx", QUICK, fallback=False).fit(measured, town.scene)


def test_a_map_has_bars_and_no_values_in_buildings(town, fitted):
    found = fitted.predict(town.scene.grid, interval=0.9)
    assert found.rss_dbm.shape == town.rss_dbm.shape
    assert np.array_equal(np.isnan(found.rss_dbm[0]), town.building)
    free = ~town.building
    inside = coverage(town.rss_dbm[:, free], found.layers["rss_lo"][:, free], found.layers["rss_hi"][:, free])
    assert 0.85 < inside < 0.95
    assert rmse(town.rss_dbm[:, free], found.rss_dbm[:, free]) < 3


def test_error_bars_are_judged_on_what_was_not_measured(town, fitted):
    free = ~town.building
    for f, power in zip(town.freq_mhz, town.rss_dbm, strict=True):
        unseen = RadioSamples(town.scene.grid.centers()[free.ravel()], f, power[free])
        shares = fitted.coverage(unseen, [0.5, 0.9])
        low, high = fitted.predict(unseen.xy, f, 0.9)[1:]
        assert shares[1] == pytest.approx(coverage(power[free], low, high), abs=1e-12)
        assert 0.4 < shares[0] < 0.6


def test_places_judge_each_other(fitted):
    """A fifth of the held-out places lies inside of intervals that the others calibrated, more or less."""
    shares = fitted.cross_coverage([0.5, 0.9])
    assert shares.shape == (5, 2)
    assert np.allclose(shares.mean(axis=0), [0.5, 0.9], atol=0.1)
    assert shares.std(axis=0).min() > 0


def test_points_and_maps_agree(town, fitted):
    grid = town.scene.grid
    free = ~town.building.ravel()
    power, low, high = fitted.predict(grid.centers()[free], 3500.0, 0.8)
    found = fitted.predict(grid, [3500.0], 0.8)
    assert np.allclose(found.rss_dbm[0].ravel()[free], power, atol=1e-4)
    assert (low < power).all()
    assert (power < high).all()
    assert fitted.predict(grid.centers()[:3]).shape == (3, 3)


def test_any_frequency_can_be_asked_of_the_spectral_head(fitted, town, measured):
    xy = town.scene.grid.centers()[~town.building.ravel()][::50]
    one, between, two = (fitted.predict(xy, f) for f in (1750.0, 2475.0, 3500.0))
    middle = one + (two - one) * np.log10(2475 / 1750) / np.log10(2)
    assert np.allclose(between, middle, atol=1e-3)
    direct = RadioMapEstimator("radiogatx", dataclasses.replace(QUICK, head="direct"), fallback=False)
    direct.fit(measured, town.scene)
    with pytest.raises(UserError, match="no measurement at 2600 MHz.*--method radiogatx --network.head spectral"):
        direct.predict(xy, 2600.0)


def test_kriging_takes_over_where_it_is_better(town, measured):
    poor = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=1, neighbors=1)).fit(measured, town.scene)
    assert poor.chosen_ in {"pooled_kriging", "trees"}
    assert poor.heldout_[poor.chosen_] < poor.heldout_["radiogatx"]
    assert "it is better here than radiogatx" in describe(poor)
    kept = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=1, neighbors=1), fallback=False).fit(
        measured, town.scene
    )
    assert kept.chosen_ == "radiogatx"


@pytest.mark.parametrize("method", ["trees", "kriging", "pooled_kriging", "idw", "pooled_idw", "rbf", "shift"])
def test_baselines_have_the_same_interface(method, town, measured, tmp_path):
    estimator = RadioMapEstimator(method, trees=TreesConfig(iterations=20), fallback=False).fit(measured, town.scene)
    power, low, high = estimator.predict(measured.xy[:5] + 0.5, 1750.0, 0.9)
    assert (low < high).all()
    estimator.save(tmp_path / "m.safetensors")
    assert np.array_equal(
        RadioMapEstimator.load(tmp_path / "m.safetensors").predict(measured.xy[:5] + 0.5, 1750.0), power
    )


def test_trees_of_lightgbm_repeat_and_are_about_as_good(town, measured):
    free = np.isfinite(town.rss_dbm[0])
    cells = RadioSamples(town.scene.grid.centers()[free.ravel()], 1750.0, town.rss_dbm[0][free])
    errors = {}
    for engine in ("sklearn", "lightgbm", "lightgbm"):
        trees = TreesConfig(engine=engine, iterations=60)
        estimator = RadioMapEstimator("trees", trees=trees, fallback=False).fit(measured, town.scene)
        error = rmse(cells.rss_dbm, estimator.predict(cells.xy, 1750.0))
        assert errors.setdefault(engine, error) == error
    assert errors["lightgbm"] == pytest.approx(errors["sklearn"], rel=0.15)


def test_the_faithful_network_maps_an_area(town, measured, tmp_path):
    gat = RadioGATConfig(widths=(8, 12), epochs=2)
    estimator = RadioMapEstimator("radiogat", gat=gat, fallback=False).fit(measured, town.scene)
    found = estimator.predict(town.scene.grid, [1750.0], 0.9)
    assert np.isfinite(found.rss_dbm[0][~town.building]).all()
    estimator.save(tmp_path / "m.safetensors")
    again = RadioMapEstimator.load(tmp_path / "m.safetensors").predict(town.scene.grid, [1750.0])
    assert np.array_equal(again.rss_dbm, found.rss_dbm, equal_nan=True)
    with pytest.raises(UserError, match="needs a scene with buildings and transmitters"):
        RadioMapEstimator("radiogat").fit(measured)


def test_saved_and_loaded_predictions_are_equal_bit_for_bit(fitted, town, tmp_path):
    fitted.save(tmp_path / "model.safetensors")
    again = RadioMapEstimator.load(tmp_path)
    one, other = (e.predict(town.scene.grid, [1750.0, 2600.0], 0.9) for e in (fitted, again))
    assert all(np.array_equal(one.layers[n], other.layers[n], equal_nan=True) for n in one.layers)
    assert again.heldout_ == fitted.heldout_


def test_the_estimator_follows_the_conventions_of_scikit_learn(measured, town):
    estimator = RadioMapEstimator("radiogatx", QUICK, seed=3)
    copy = clone(estimator)
    assert copy.get_params()["seed"] == 3
    assert copy.set_params(method="idw").fit(measured) is copy
    assert 0.5 < copy.score(measured.take(np.arange(0, len(measured), 7))) <= 1


def rows_of(samples):
    return np.column_stack([samples.xy, samples.freq_mhz])


def test_arrays_and_data_frames_are_fitted_as_samples_are(measured, town):
    import pandas

    few = measured.take(np.arange(0, len(measured), 3))
    X, y = rows_of(few), few.rss_dbm
    one = RadioMapEstimator("pooled_idw").fit(few)
    other = RadioMapEstimator("pooled_idw").fit(X, y)
    frame = RadioMapEstimator("pooled_idw").fit(pandas.DataFrame(X[:, ::-1], columns=["freq_mhz", "y", "x"]), y)
    at = X[:50] + np.array([0.5, 0.5, 0.0])
    assert np.array_equal(other.predict(at), frame.predict(at))
    for f in few.bands:
        rows = at[:, 2] == f
        assert np.array_equal(one.predict(at[rows, :2], f), other.predict(at)[rows])
    assert other.score(X, y) == one.score(few)
    assert RadioMapEstimator("pooled_idw").fit(X, y, scene=town.scene).scene_ is town.scene


def test_nested_settings_are_searched_over_groups_of_places(measured):
    from sklearn.model_selection import GridSearchCV, GroupKFold

    few = measured.take(np.arange(0, len(measured), 4))
    search = GridSearchCV(
        RadioMapEstimator("trees", trees=TreesConfig(iterations=10), fallback=False),
        {"trees__leaves": [2, 8]},
        cv=GroupKFold(2),
    )
    search.fit(rows_of(few), few.rss_dbm, groups=np.floor(few.xy[:, 0] / 40))
    assert search.best_params_ == {"trees__leaves": 8}
    estimator = RadioMapEstimator().set_params(network__steps=7, method="idw")
    assert (estimator.network.steps, estimator.method) == (7, "idw")
    assert clone(estimator).get_params()["network__steps"] == 7
    with pytest.raises(ValueError, match="invalid parameter 'network__step'"):
        estimator.set_params(network__step=7)


def test_shapes_are_never_reshaped_and_nothing_is_predicted_before_fit(measured):
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        RadioMapEstimator().predict(np.zeros((3, 2)))
    X, y = rows_of(measured), measured.rss_dbm
    for wrong, power, said in (
        (X.ravel(), y, r"X has shape \(\d+,\), expected \(n, 3\)"),
        (X[:, :2], y, r"expected \(n, 3\), x, y, frequency in MHz: Found array with 2 feature"),
        (np.column_stack([X, y]), y, r"X has shape \(\d+, 4\), expected \(n, 3\)"),
        (X, y[:, None], r"y has shape \(\d+, 1\)"),
        (X, None, "requires y to be passed"),
    ):
        with pytest.raises(UserError, match=said):
            RadioMapEstimator("idw").fit(wrong, power)
    fitted = RadioMapEstimator("pooled_idw").fit(X, y)
    with pytest.raises(UserError, match=r"positions have shape \(4,\), expected \(n, 2\)"):
        fitted.predict(np.zeros(4), 1750.0)


def test_frequencies_compare_with_a_tolerance(measured):
    fitted = RadioMapEstimator("kriging", fallback=False).fit(measured)
    at = measured.xy[:5] + 0.5
    assert np.array_equal(fitted.predict(at, 1750.0 * (1 + 1e-9)), fitted.predict(at, 1750.0))
    with pytest.raises(UserError, match="no measurement at 1751 MHz"):
        fitted.predict(at, 1751.0)


def test_few_measurements_still_make_a_map():
    rng = np.random.default_rng(0)
    samples = RadioSamples(rng.uniform(0, 100, (5, 2)), 1800.0, rng.uniform(-80, -60, 5))
    estimator = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=5)).fit(samples)
    assert np.isfinite(estimator.predict(Grid(0, 100, 10, 10, 10)).rss_dbm).all()
    with pytest.warns(UserWarning, match="too few for an interval"):
        found = estimator.predict(Grid(0, 100, 10, 10, 10), interval=0.9)
    with pytest.raises(UserError, match="the error bars are infinite"):
        found.suggest(3)
    samples = RadioSamples(rng.uniform(0, 100, (24, 2)), 1800.0, rng.uniform(-80, -60, 24))
    bars = (
        RadioMapEstimator("radiogatx", RadioGATxConfig(steps=5))
        .fit(samples)
        .predict(Grid(0, 100, 10, 10, 10), interval=0.9)
    )
    assert np.isfinite(bars.error_bar).all()


def test_a_band_with_one_measurement_is_predicted_from_the_others_or_refused(town, measured):
    """It is predicted by the pooled and spectral models, and refused in one line where a band stands alone."""
    lonely = RadioSamples(
        np.concatenate([measured.xy, [[101.0, -99.0]]]),
        np.concatenate([measured.freq_mhz, [900.0]]),
        np.concatenate([measured.rss_dbm, [-55.0]]),
    )
    estimator = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=5)).fit(lonely, town.scene)
    assert np.isfinite(estimator.predict(lonely.xy[:4], 900.0)).all()
    with pytest.raises(UserError, match="measurement alone|at least 3 places"):
        RadioMapEstimator("idw").fit(lonely.take(lonely.freq_mhz == 900.0))


def test_bad_measurements_are_named():
    xy, rss = np.zeros((3, 2)) + np.arange(3)[:, None], np.array([-60.0, -61, -62])
    cases = [
        ({"rss_dbm": -rss}, "looks like path loss"),
        ({"rss_dbm": [0, -60, -61]}, "1 values are 0 dBm"),
        ({"rss_dbm": [-60, np.nan, -61]}, "rss_dbm of measurement 1 is not finite"),
        ({"xy": [[0, 0], [1, np.nan], [2, 2]]}, "xy of measurement 1 is not finite"),
        ({"freq_mhz": 1.8}, "give MHz, not GHz"),
        ({"freq_mhz": -1.0}, "expected MHz"),
        ({"rss_dbm": [-60, -61]}, "a position for each"),
        ({"rss_dbm": [-60, -61, -900]}, "measurement 2 is -900"),
    ]
    for change, said in cases:
        with pytest.raises(UserError, match=said):
            RadioSamples(**({"xy": xy, "freq_mhz": 1750.0, "rss_dbm": rss} | change))
    with pytest.raises(NonFiniteError):
        RadioSamples(xy, 1750.0, np.full(3, np.nan))
    with pytest.raises(UserError, match="lies outside the raster"):
        RadioScene(Grid(0, 10, 1, 10, 10), None, np.array([[11.0, 5]]))
    with pytest.raises(UserError, match="the two must agree"):
        RadioScene(Grid(0, 10, 1, 10, 10), np.zeros((9, 10), bool))
    with pytest.raises(UserError, match="every cell is built up"):
        RadioScene(Grid(0, 10, 1, 10, 10), np.ones((10, 10), bool))
    samples = RadioSamples(xy, 1750.0, rss, "EPSG:25832")
    with pytest.raises(UserError, match="lie in EPSG:25832, the scene in EPSG:25833"):
        RadioMapEstimator("idw").fit(samples, RadioScene(Grid(0, 10, 1, 10, 10), crs="EPSG:25833"))


def test_conflicting_duplicates_become_their_median_with_a_warning():
    xy = np.array([[0.0, 0], [1, 1], [0, 0], [0, 0]])
    with pytest.warns(UserWarning, match="up to 30.0 dB apart"):
        samples = RadioSamples(xy, 1750.0, [-60.0, -50, -90, -70])
    assert samples.rss_dbm.tolist() == [-70.0, -50.0]
    assert len(RadioSamples(xy, [1750.0, 1750, 2000, 3000], [-60.0, -50, -90, -70])) == 4


def test_the_protocols_split_starts_as_the_authors_and_measures_their_number_of_cells():
    train, test = protocol_split(132)
    assert train[:8].tolist() == [93, 66, 26, 8, 30, 91, 109, 100]
    assert sorted([*train, *test]) == list(range(132))
    maps = city(CityConfig(size=85, freq_mhz=(1750.0, 5750.0), seed=100))
    assert crop(maps).rss_dbm.shape == (2, 80, 80)
    windows = blocks((80, 80))
    observed = protocol_mask(crop(maps), windows, [2, 0, 1, 3], 0.05)
    for window in windows:
        for f in range(2):
            n = int(np.isfinite(maps.rss_dbm[f][window]).sum())
            assert observed[f][window].sum() == n - int(n * 0.95)


@pytest.mark.parametrize("task", ["S", "M", "U", "D"])
def test_tasks_hide_what_they_must(task):
    maps = city(CityConfig(size=80, freq_mhz=(1750.0, 3500.0, 5750.0), seed=100))
    protocol = Protocol(maps, task, 0.05, 0, 2)
    in_test = np.zeros((80, 80), dtype=bool)
    for window in protocol.windows[1]:
        in_test[window] = True
    counts = protocol.observed.sum(axis=(1, 2))
    assert not (protocol.observed[2] & protocol.where).any()
    assert not protocol.where[~in_test].any()
    expected = {"S": (False, False, True), "M": (True, True, True), "U": (True, False, True), "D": (True, False, True)}
    assert tuple(counts > 0) == expected[task]
    assert protocol.observed[2][in_test].any() == (task != "U")
    assert (counts[0] == np.isfinite(maps.rss_dbm[0]).sum()) == (task == "D")


def test_the_protocol_runs_the_faithful_network_and_the_released_one():
    maps = city(CityConfig(size=80, freq_mhz=(1750.0, 5750.0), seed=100))
    gat = RadioGATConfig(widths=(8, 8), epochs=1)
    for task, model in (("S", "radiogat"), ("S", "radiogat-2025"), ("U", "radiogat")):
        row, shown = Protocol(maps, task, 0.05, 0, 1).measure(model, QUICK, gat, 0.9)
        assert np.isfinite(row["block_rmse"])
        assert np.isfinite(shown).sum() > 1000


def test_joint_bands_beat_a_single_one_on_a_city(town):
    """The direction of the main claim, on a small city and a short training."""
    network = RadioGATxConfig(steps=60)
    rows = {task: Protocol(town, task, 0.05, 0, 2) for task in ("S", "M")}
    found = {t: p.measure("radiogatx", network, RadioGATConfig(), 0.9)[0]["rmse"] for t, p in rows.items()}
    assert found["M"] < 0.8 * found["S"]


def test_the_joint_model_beats_its_bar_on_an_authors_area(released):
    """Task M on area 1, which decided settings: at most 0.65 of own-band inverse distances, with a short training."""
    maps = crop(read_maps(f"npz:{released}", 1))
    protocol = Protocol(maps, "M", 0.05, 100, 4)
    single = Protocol(maps, "S", 0.05, 100, 4)
    found = protocol.measure("radiogatx", RadioGATxConfig(steps=120), RadioGATConfig(), 0.9)[0]
    assert found["rmse"] <= 0.65 * single.measure("idw", QUICK, RadioGATConfig(), 0.9)[0]["rmse"]
    assert 0.87 < found["coverage"] < 0.93


def test_cross_validation_judges_all_methods_and_squares_are_harder(town, measured):
    models = ["idw", "kriging", "rbf", "shift", "pooled_idw", "pooled_kriging"]
    single, beyond = cross_validate(measured, town.scene, models, folds=2)
    squares, _ = cross_validate(measured, town.scene, models, folds=2, side=80.0)
    assert beyond < 0.05
    assert set(single) == set(squares) == set(models)
    assert squares["kriging"]["rmse"] > single["kriging"]["rmse"]  # where nobody was is harder
    assert 0.8 < single["pooled_kriging"]["coverage"] < 0.98
    with pytest.raises(UserError, match="squares of 1000 do not make 3 folds"):
        cross_validate(measured, None, ["idw"], folds=3, side=1000.0)


@pytest.mark.slow
def test_a_million_cells_stay_below_two_gigabytes():
    """200,000 measurements, 1,000,000 cells."""
    import resource

    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (200_000, 2))
    rss = -60 + 10 * np.sin(xy[:, 0] / 50) + 10 * np.cos(xy[:, 1] / 70)
    estimator = RadioMapEstimator("radiogatx", RadioGATxConfig(steps=50)).fit(RadioSamples(xy, 1750.0, rss))
    rows = 0
    for part, layers in estimator.tiles(Grid(0, 1000, 1, 1000, 1000), 1750.0, 0.9):
        rows += part.stop - part.start
        assert np.isfinite(layers["rss_dbm"]).all()
    assert rows == 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 1024**2
