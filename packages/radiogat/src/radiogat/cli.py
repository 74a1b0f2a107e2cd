"""The command `radiogat`: learn an area, map it, judge the methods, say where to measure next."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radiogat.config import (
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    EvaluateSettings,
    InputSettings,
    PlotSettings,
    PredictSettings,
    ReproduceSettings,
    SimulateSettings,
    SuggestSettings,
    TrainSettings,
)
from tenfold import UserError
from tenfold.cli import App, Invocation, Verb, show_claims, table, track
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from radiogat.estimator import RadioMapEstimator
    from radiogat.maps import MapLayout
    from radiogat.samples import Grid, RadioMaps, RadioSamples, RadioScene
    from tenfold.runs import Run

KINDS = ("csv", "parquet", "geotiff", "netcdf", "npz", "official")
_JUDGED = 20_000
"""Unmeasured cells of complete maps that the error bars are judged on."""
_ENOUGH = 100
"""Held-out measurements below which a fifth of them says nothing about error bars."""
_CAPTIONS = {
    "map": "Received power; dots are measurements, triangles masts.",
    "error-bars": "Half-width of the intervals.",
    "spectral-slope": "Change of power over a decade of frequency.",
}


def _input(settings: InputSettings) -> "tuple[RadioSamples, RadioScene | None, RadioMaps | None]":
    """Measurements, the scene, and the complete maps where the measurements were drawn from such."""
    from radiogat.data import read_maps, read_samples, read_scene

    kind, _, path = settings.data.partition(":")
    if settings.data == "city":
        from radiogat.simulate import city

        maps = city()
    elif kind in {"npz", "official"}:
        maps = read_maps(settings.data, settings.area)
    elif kind in {"geotiff", "netcdf"}:
        from radiogat.maps import read_geotiff, read_netcdf, samples_of

        samples = samples_of(read_geotiff(path) if kind == "geotiff" else read_netcdf(path))
        return samples, read_scene(settings.buildings, settings.transmitters, samples, settings.cell), None
    elif kind in {"csv", "parquet"} and path:
        columns = dict(pair.split("=", 1) for pair in settings.columns)
        samples = read_samples(path, columns=columns, crs=settings.crs, sign=settings.sign, freq_mhz=settings.freq_mhz)
        return samples, read_scene(settings.buildings, settings.transmitters, samples, settings.cell), None
    else:
        near = did_you_mean(kind, (*KINDS, "city"))
        raise UserError(f"--data {settings.data}: expected KIND:PATH or city, {near}")
    return maps.samples(maps.draw(settings.rate, settings.seed)), maps.scene, maps


def _grid(samples: "RadioSamples", scene: "RadioScene | None", cell: float | None) -> "Grid":
    """The raster of a map: the scene's, unless another cell is asked for."""
    from radiogat.samples import Grid

    if scene is not None and (cell is None or cell == scene.grid.cell):
        return scene.grid
    side = cell or samples.spacing / 2
    if scene is None:
        grid = Grid.around(samples.xy, side, margin=side)
    else:
        g = scene.grid
        height, width = (max(1, round(n * g.cell / side)) for n in g.shape)
        grid = Grid(g.x0, g.y0, side, height, width)
    if grid.height * grid.width > 50_000_000:
        raise UserError(f"a map of {grid.height} x {grid.width} cells: give a larger --cell (metres, now {side:.3g})")
    return grid


def _resumable(settings: TrainSettings, invocation: Invocation) -> "Callable[[Any], None]":
    """Training by Lightning in the run folder: a killed run goes on to the same weights."""
    from radiogat.training import RadioGATModule, RadioMapDataModule
    from tenfold.training import TrainerConfig, fit

    stages = iter(("", "second"))  # a model that is judged by a split is trained again on all measurements

    def train(task: Any) -> None:
        how = TrainerConfig(
            max_steps=task.steps, checkpoint_every=settings.checkpoint_every, device=settings.device, precision="32"
        )
        module = RadioGATModule(task)
        fit(
            module,
            RadioMapDataModule(task).train_dataloader(),
            how,
            invocation.folder,
            stage=next(stages),
            quiet=invocation.quiet,
        )
        task.network.eval()

    return train


def _train(settings: TrainSettings, invocation: Invocation) -> None:
    from radiogat.estimator import RadioMapEstimator, describe
    from tenfold.report import write_report

    run = invocation.folder
    samples, scene, maps = _input(settings)
    estimator = RadioMapEstimator(
        settings.model,
        settings.network,
        settings.gat,
        settings.graph,
        settings.fallback,
        settings.calibration,
        seed=settings.seed,
    )
    grid = _grid(samples, scene, settings.cell)  # what is wrong with it shows before the training
    estimator.fit(samples, scene, _resumable(settings, invocation))
    estimator.save(run.own("model.safetensors"))
    sys.stdout.write(describe(estimator))
    heldout = {name: round(value, 4) for name, value in estimator.heldout_.items()}
    run.write_json("config.json", {"chosen": estimator.chosen_, "heldout_rmse_db": heldout})
    _study(run, estimator, settings)
    captions = _CAPTIONS | {"calibration": _draw_calibration(run, estimator, maps, settings)}
    if settings.map != "none":
        written = _write_map(run, estimator, grid, None, settings.interval, settings.map)
        sys.stdout.write(f"map: {run.path / written}\n")
    shown = {name: text for name, text in captions.items() if (run.path / f"figures/{name}.png").exists()}
    write_report(run, "radiogat: a map of the area and how sure it is", shown)


def _draw_calibration(
    run: "Run", estimator: "RadioMapEstimator", maps: "RadioMaps | None", settings: TrainSettings
) -> str:
    """Error bars where nobody measured, if the truth is known there; else on held-out blocks that others calibrated.

    Returns the picture's caption; there is no picture of a few held-out measurements.
    """
    import numpy as np

    from radiogat.pictures import LEVELS, calibration_picture

    unseen = None if maps is None else ~maps.draw(settings.rate, settings.seed) & np.isfinite(maps.rss_dbm)
    if maps is not None and unseen is not None and unseen.any():
        cells = maps.samples(unseen)
        some = np.sort(np.random.default_rng(0).permutation(len(cells))[:_JUDGED])
        path = run.own("figures/calibration.png")
        calibration_picture(path, {"as found": estimator.coverage(cells.take(some), LEVELS)}, "unmeasured cells")
        return "Share of the cells that were not measured inside of the intervals, at each level."
    if len(estimator.calibration_["truth"]) >= _ENOUGH:
        name = "a fifth of the held-out blocks,\ncalibrated on the others"
        path = run.own("figures/calibration.png")
        calibration_picture(path, {name: estimator.cross_coverage(LEVELS)}, "held-out measurements")
    return (
        "Share of the held-out measurements of a fifth of the blocks inside of intervals that the other blocks calibrated;"
        " their mean is straight by construction, their spread shows what the choice of blocks does."
    )


def _study(run: "Run", estimator: "RadioMapEstimator", settings: TrainSettings) -> None:
    """``summary.json``: the held-out errors, and whether the network beats kriging here."""
    from radiogat import __version__
    from tenfold.claims import Study

    study = Study(
        run,
        package="radiogat",
        version=__version__,
        command="train",
        level="full",
        data=settings.data,
        seeds=[settings.seed],
    )
    study.over_seeds(lambda seed: {name: {"heldout rmse": value} for name, value in estimator.heldout_.items()})
    study.note(
        f"{estimator.chosen_} predicts; RMSE in dB on {len(estimator.calibration_['truth'])} held-out measurements."
    )
    study.finish()


def _format(chosen: str) -> str:
    from importlib.util import find_spec

    if chosen != "auto":
        return chosen
    return "geotiff" if find_spec("rasterio") else "csv"


def _write_map(
    run: "Run", estimator: "RadioMapEstimator", grid: "Grid", freqs: Any, interval: float, chosen: str
) -> str:
    """The map's file and, of its maps that fit into memory, its pictures."""
    from radiogat import maps

    kind = _format(chosen)
    layout = maps.MapLayout(grid, estimator._frequencies(freqs), interval, estimator.samples_.crs)
    name = {"geotiff": "map.tif", "netcdf": "map.nc", "csv": "map.csv"}[kind]
    large = len(layout.freq_mhz) * grid.height * grid.width > 20_000_000
    if large and kind != "csv":
        write = maps.write_geotiff if kind == "geotiff" else maps.write_netcdf
        write(run.own(name), layout, estimator.tiles(grid, layout.freq_mhz, interval))
        return name
    found = maps.RadioMap.collect(layout, estimator.tiles(grid, layout.freq_mhz, interval))
    write_one = {"geotiff": found.to_geotiff, "netcdf": found.to_netcdf, "csv": found.to_csv}[kind]
    write_one(run.own(name))
    _draw(run, layout, found, estimator)
    return name


def _draw(run: "Run", layout: "MapLayout", found: Any, estimator: "RadioMapEstimator") -> None:
    import numpy as np

    from radiogat import pictures
    from radiogat.spectral import fit_spectrum

    scene = estimator.scene_
    building = scene.building if scene is not None and scene.grid == layout.grid else None
    masts = None if scene is None else scene.transmitters
    grid, freqs = layout.grid, layout.freq_mhz
    samples = estimator.samples_
    pictures.map_picture(
        run.own("figures/map.png"), grid, freqs, found.rss_dbm, building=building, samples=samples, transmitters=masts
    )
    if np.isfinite(found.error_bar).any():
        path = run.own("figures/error-bars.png")
        pictures.error_bar_picture(path, grid, freqs, found.error_bar, layout.level or 0.9, building)
    if len(freqs) > 1:
        _, slope = fit_spectrum(freqs, found.rss_dbm)
        pictures.slope_picture(run.own("figures/spectral-slope.png"), grid, slope, building)


def _predict(settings: PredictSettings, invocation: Invocation) -> None:
    from radiogat.estimator import RadioMapEstimator

    estimator = RadioMapEstimator.load(settings.model)
    if settings.points is None:
        grid = _grid(estimator.samples_, estimator.scene_, settings.cell)
        written = _write_map(invocation.folder, estimator, grid, settings.freq_mhz, settings.interval, settings.format)
        sys.stdout.write(f"map: {invocation.folder.path / written}\n")
        return
    import numpy as np

    from radiogat.data import read_points
    from radiogat.maps import write_csv

    xy = read_points(settings.points, estimator.samples_.crs)
    freqs = estimator._frequencies(settings.freq_mhz)
    values = estimator.predict(xy, freqs, settings.interval)
    columns = [np.tile(xy[:, 0], len(freqs)), np.tile(xy[:, 1], len(freqs)), np.repeat(freqs, len(xy))]
    names = ["x", "y", "freq_mhz", "rss_dbm", "rss_lo", "rss_hi"]
    write_csv(invocation.folder.own("points.csv"), names, [*columns, *(layer.ravel() for layer in values)])
    sys.stdout.write(f"{len(xy)} places x {len(freqs)} frequencies: {invocation.folder.path / 'points.csv'}\n")


def _rows(found: dict[str, dict[str, float]], digits: int = 3) -> str:
    names = list(dict.fromkeys(metric for row in found.values() for metric in row))
    body = [[name, *(f"{row[m]:.{digits}f}" if m in row else "-" for m in names)] for name, row in found.items()]
    return table(["method", *names], body) + "\n"


def _evaluate(settings: EvaluateSettings, invocation: Invocation) -> None:
    import numpy as np

    from radiogat.evaluation import cross_validate

    samples, scene, _ = _input(settings)
    side = settings.block or float(np.ptp(samples.xy, axis=0).max()) / 10
    found = cross_validate(
        samples,
        scene,
        settings.models,
        folds=settings.folds,
        side=None if settings.holdout == "random" else side,
        network=settings.network,
        level=settings.interval,
        seed=settings.seed,
        track=lambda cases: track(cases, "cross-validating", len(cases), quiet=invocation.quiet),
    )
    how = "single measurements" if settings.holdout == "random" else f"squares of {side:.4g}"
    best = min(found, key=lambda name: found[name]["rmse"])
    text = (
        f"{len(samples)} measurements, {settings.folds} folds of {how}; dB, error bars of {settings.interval:.0%}\n\n"
        f"{_rows(found)}\nbest: {best}\n"
    )
    invocation.folder.write_json("metrics.json", {"holdout": settings.holdout, "methods": found, "best": best})
    invocation.folder.write_text("report.md", "```\n" + text + "```\n")
    sys.stdout.write(text)


def _compare(settings: CompareSettings, invocation: Invocation) -> int:
    from radiogat import __version__
    from radiogat.evaluation import split_rmse
    from tenfold.claims import Study
    from tenfold.figures import arm_chart
    from tenfold.report import write_report

    run = invocation.folder
    samples, scene, _ = _input(settings)
    study = Study(
        run,
        package="radiogat",
        version=__version__,
        command="compare",
        level="full",
        data=settings.data,
        seeds=settings.seeds,
    )
    steps = iter(track(settings.seeds, "comparing", len(settings.seeds), quiet=invocation.quiet))

    def measure(seed: int) -> dict[str, dict[str, float]]:
        next(steps, None)
        return split_rmse(samples, scene, settings.models, settings.share, seed, settings.network)

    study.over_seeds(measure)
    for model in settings.models:
        if "radiogatx" in settings.models and model != "radiogatx":
            text = f"RMSE of radiogatx / {model} on held-out measurements"
            study.ratio(f"radiogatx_{model}", text, ("radiogatx", "rmse"), (model, "rmse"), required="<= 1")
    values = {model: study.values((model, "rmse")).tolist() for model in settings.models}
    arm_chart(run.own("figures/rmse.png"), values, xlabel="RMSE on held-out measurements (dB)")
    summary = study.finish()
    write_report(run, "radiogat: methods on your measurements")
    means = {model: {"rmse": float(study.values((model, "rmse")).mean())} for model in settings.models}
    sys.stdout.write(_rows(means) + "\n")
    return show_claims(summary, strict=invocation.strict)


def _simulate(settings: SimulateSettings, invocation: Invocation) -> None:
    import numpy as np

    from radiogat.data import write_maps, write_samples
    from radiogat.maps import write_csv
    from radiogat.pictures import map_picture, slope_picture
    from radiogat.simulate import city, semivariogram
    from radiogat.spectral import fit_spectrum

    run = invocation.folder
    if settings.backend == "city":
        maps = city(settings.city)
    else:
        from radiogat.raytrace import trace

        sionna = dataclasses.replace(settings.sionna, scene=settings.scene or settings.sionna.scene)

        def cached(name: str, compute: "Callable[[], dict[str, NDArray[Any]]]") -> "dict[str, NDArray[Any]]":
            path = run.path / "cache" / f"{name}.npz"
            if not path.exists():
                values = compute()
                with run.replacing(f"cache/{name}.npz") as temporary:
                    np.savez_compressed(temporary, **values)  # type: ignore[arg-type]
            with np.load(path, allow_pickle=False) as file:
                return dict(file)

        maps = trace(
            sionna, cached, lambda bands: track(bands, "tracing bands", len(list(bands)), quiet=invocation.quiet)
        )
    write_maps(run.own("maps.npz"), maps)
    samples = maps.samples(maps.draw(settings.rate, settings.seed))
    write_samples(run.own("samples.csv"), samples)
    scene = maps.scene
    assert scene.transmitters is not None
    write_csv(run.own("transmitters.csv"), ["x", "y"], list(scene.transmitters.T))
    path = run.own("figures/maps.png")
    map_picture(path, scene.grid, maps.freq_mhz, maps.rss_dbm, building=maps.building, transmitters=scene.transmitters)
    lines = [f"{maps.name}: {maps.rss_dbm.shape[1]} x {maps.rss_dbm.shape[2]} cells of {maps.cell:g} m"]
    assert maps.building is not None
    lines.append(f"built up {maps.building.mean():.1%}; free cells without power {_unhit(maps):.1%}")
    gamma = semivariogram(maps.rss_dbm[0])
    found = ", ".join(f"{lag}: {value:.1f}" for lag, value in gamma.items())
    lines.append(f"semivariance (dB^2) by lag in cells at {maps.freq_mhz[0]:g} MHz: {found}")
    if len(maps.freq_mhz) > 1:
        _, slope = fit_spectrum(maps.freq_mhz, maps.rss_dbm)
        slope_picture(run.own("figures/spectral-slope.png"), scene.grid, slope, maps.building)
        low, middle, high = np.nanpercentile(slope, [1, 50, 99])
        lines.append(f"spectral slope (dB a decade), 1 %, median, 99 %: {low:.1f}, {middle:.1f}, {high:.1f}")
    lines.append(f"{len(samples)} measurements: {run.path / 'samples.csv'}; complete maps: {run.path / 'maps.npz'}")
    sys.stdout.write("\n".join(lines) + "\n")


def _unhit(maps: "RadioMaps") -> float:
    import numpy as np

    assert maps.building is not None
    return float(np.isnan(maps.rss_dbm[:, ~maps.building]).mean())


def _plot(settings: PlotSettings, invocation: Invocation) -> None:
    import numpy as np

    from radiogat import pictures
    from radiogat.data import read_maps
    from radiogat.maps import RadioMap, read_geotiff, read_netcdf
    from radiogat.spectral import fit_spectrum

    run = invocation.folder
    level = None
    building = None
    found: RadioMap | None = None
    if settings.map.startswith("npz:"):
        complete = read_maps(settings.map, settings.area)
        grid, freqs, power, building = complete.scene.grid, complete.freq_mhz, complete.rss_dbm, complete.building
    else:
        path = Path(settings.map)
        if not path.is_file():
            raise UserError(f"--map {path}: no such file")
        found = read_netcdf(path) if path.suffix == ".nc" else read_geotiff(path, need_crs=False)
        grid, freqs, power, level = found.layout.grid, found.layout.freq_mhz, found.rss_dbm, found.layout.level
        building = np.asarray(np.isnan(power).all(axis=0))
    pictures.map_picture(run.own("figures/map.png"), grid, freqs, power, building=building)
    drawn = ["map.png"]
    if level is not None and found is not None and np.isfinite(found.error_bar).any():
        path = run.own("figures/error-bars.png")
        pictures.error_bar_picture(path, grid, freqs, found.error_bar, level, building)
        drawn.append("error-bars.png")
    if len(freqs) > 1:
        pictures.slope_picture(run.own("figures/spectral-slope.png"), grid, fit_spectrum(freqs, power)[1], building)
        drawn.append("spectral-slope.png")
    if settings.truth is not None:
        truth = read_maps(settings.truth, settings.area)
        if truth.rss_dbm.shape[1:] != power.shape[1:]:
            raise UserError(
                f"--truth has {truth.rss_dbm.shape[1:]} cells, the map {power.shape[1:]}: the grids disagree"
            )
        both = [f for f in freqs if f in truth.freq_mhz]
        if not both:
            raise UserError(f"--truth has no band of the map: {', '.join(f'{f:g}' for f in truth.freq_mhz)}")
        errors = {f"{f:g} MHz": power[freqs.index(f)] - truth.rss_dbm[truth.freq_mhz.index(f)] for f in both}
        pictures.error_picture(run.own("figures/error.png"), grid, errors, building)
        drawn.append("error.png")
    sys.stdout.write("\n".join(str(run.path / "figures" / name) for name in drawn) + "\n")


def _suggest(settings: SuggestSettings, invocation: Invocation) -> None:
    from radiogat.data import unproject
    from radiogat.estimator import RadioMapEstimator
    from radiogat.maps import write_csv
    from radiogat.pictures import suggestion_picture

    run = invocation.folder
    estimator = RadioMapEstimator.load(settings.model)
    scene = estimator.scene_
    grid = _grid(estimator.samples_, scene, settings.cell)
    found = estimator.predict(grid, interval=0.9)
    places = found.suggest(settings.count, settings.reach)
    names, columns = ["x", "y"], list(places.T)
    if estimator.samples_.crs:
        names, columns = [*names, "lon", "lat"], [*columns, *unproject(places, estimator.samples_.crs).T]
    write_csv(run.own("suggestions.csv"), names, columns)
    building = scene.building if scene is not None and scene.grid == grid else None
    width = found.error_bar.mean(axis=0)
    suggestion_picture(run.own("figures/suggestions.png"), grid, width, places, estimator.samples_, building)
    decimals = {"lon": 6, "lat": 6}
    shown = [
        [f"{value:.{decimals.get(name, 1)}f}" for value in column] for name, column in zip(names, columns, strict=True)
    ]
    rows = [[str(number), *row] for number, row in enumerate(zip(*shown, strict=True), 1)]
    sys.stdout.write(table(["place", *names], rows) + "\n")


def _convert(settings: ConvertSettings, invocation: Invocation) -> None:
    import numpy as np

    from radiogat.data import read_maps, write_maps, write_samples
    from radiogat.maps import MapLayout, RadioMap, read_geotiff, read_netcdf, samples_of
    from radiogat.samples import RadioMaps

    run = invocation.folder
    kind, _, path = settings.data.partition(":")
    if settings.to == "csv":
        if kind in {"npz", "official"}:
            maps = read_maps(settings.data, settings.area)
            samples = maps.samples(np.isfinite(maps.rss_dbm))
        elif kind in {"geotiff", "netcdf"}:
            samples = samples_of(read_geotiff(path) if kind == "geotiff" else read_netcdf(path))
        else:
            samples = _input(settings)[0]
        write_samples(run.own("samples.csv"), samples)
        sys.stdout.write(f"{len(samples)} measurements: {run.path / 'samples.csv'}\n")
        return
    if kind in {"csv", "parquet"}:
        samples, scene, _ = _input(settings)
        grid = _grid(samples, scene, settings.cell)
        power = np.full((len(samples.bands), *grid.shape), np.nan)
        at = grid.rowcol(samples.xy)
        power[np.searchsorted(samples.bands, samples.freq_mhz), at[:, 0], at[:, 1]] = samples.rss_dbm
        found = RadioMap(MapLayout(grid, samples.bands, None, samples.crs), {"rss_dbm": power})
    elif kind in {"npz", "official"}:
        maps = read_maps(settings.data, settings.area)
        layout = MapLayout(maps.scene.grid, maps.freq_mhz, None, settings.crs)
        found = RadioMap(layout, {"rss_dbm": maps.rss_dbm})
    elif kind in {"geotiff", "netcdf"}:
        found = read_geotiff(path) if kind == "geotiff" else read_netcdf(path)
    else:
        raise UserError(f"--data {settings.data}: expected KIND:PATH, {did_you_mean(kind, KINDS)}")
    if settings.to == "npz":
        masts = np.empty((0, 2), dtype=np.int64)
        write_maps(
            run.own("maps.npz"),
            maps
            if kind in {"npz", "official"}
            else RadioMaps(found.rss_dbm, found.layout.freq_mhz, masts, path, found.layout.grid.cell),
        )
        sys.stdout.write(f"maps: {run.path / 'maps.npz'}\n")
        return
    name = "map.tif" if settings.to == "geotiff" else "map.nc"
    (found.to_geotiff if settings.to == "geotiff" else found.to_netcdf)(run.own(name))
    sys.stdout.write(f"map: {run.path / name}\n")


def _reproduce(settings: ReproduceSettings, invocation: Invocation) -> None:
    import json

    import numpy as np

    from radiogat.data import read_maps
    from radiogat.evaluation import Protocol, crop
    from tenfold.claims import interval, mean_ci95
    from tenfold.training import choose_device

    run = invocation.folder
    device = choose_device(settings.device)
    areas = {area: crop(read_maps(settings.data, area)) for area in settings.areas}
    bands = len(next(iter(areas.values())).freq_mhz)
    if not -bands <= settings.target < bands:
        raise UserError(f"--target {settings.target}: there are {bands} bands, numbered from 0")
    target = settings.target % bands
    cases = [
        (task, area, rate, seed, model)
        for task in settings.tasks
        for area in settings.areas
        for rate in settings.rates
        for seed in settings.seeds
        for model in settings.models
    ]
    found: dict[tuple[str, float, str], dict[str, list[float]]] = {}
    raw = []
    protocol: dict[Any, Protocol] = {}
    for task, area, rate, seed, model in track(cases, "reproducing", len(cases), quiet=invocation.quiet):
        name = f"results/{task}-area{area}-{rate:g}-seed{seed}-{model}.json"
        if (run.path / name).exists():
            row = json.loads((run.path / name).read_text(encoding="utf-8"))
        else:
            key = (task, area, rate, seed)
            if key not in protocol:
                protocol = {key: Protocol(areas[area], task, rate, seed, target)}
            row, _ = protocol[key].measure(model, settings.network, settings.gat, settings.interval, device)
            run.write_json(name, row)
        raw.append({"task": task, "area": area, "rate": rate, "seed": seed, "model": model, **row})
        values = found.setdefault((task, rate, model), {})
        for metric, value in row.items():
            values.setdefault(metric, []).append(value)
    metrics = ("rmse", "block_rmse", "mae", "coverage", "width")
    body = [
        [task, f"{rate:g}", model, *(interval(*mean_ci95(v[m])) if m in v else "-" for m in metrics)]
        for (task, rate, model), v in found.items()
    ]
    freq = next(iter(areas.values())).freq_mhz[target]
    head = (
        f"areas {', '.join(map(str, settings.areas))}, seeds {', '.join(map(str, settings.seeds))}, target {freq:g} MHz; "
        "mean over areas and seeds [95 % interval]; dB\n\n"
    )
    text = head + table(["task", "rate", "method", *metrics], body) + "\n"
    by_area: dict[tuple[str, str, str], list[str]] = {}
    for task, rate, model in found:
        for area in settings.areas:
            chosen = [
                r["rmse"] for r in raw if (r["task"], r["rate"], r["model"], r["area"]) == (task, rate, model, area)
            ]
            by_area.setdefault((task, f"{rate:g}", model), []).append(f"{np.mean(chosen):.3f}")
    text += "\nRMSE by area, mean over seeds\n\n"
    text += table(["task", "rate", "method", *map(str, settings.areas)], [[*k, *v] for k, v in by_area.items()]) + "\n"
    run.write_json("metrics.json", raw)
    run.write_text("report.md", "```\n" + text + "```\n")
    sys.stdout.write(text)


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    from radiogat import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "radiogat",
    "radiogat",
    "Whole-area, multi-band radio maps with error bars from a few measurements.",
    (
        Verb(
            "train",
            TrainSettings,
            _train,
            "Learn an area from measurements; writes the model, a map and its error bars.",
        ),
        Verb("predict", PredictSettings, _predict, "Map a learned area at any cell size, or predict at given places."),
        Verb("evaluate", EvaluateSettings, _evaluate, "Cross-validate all methods on your measurements."),
        Verb("compare", CompareSettings, _compare, "Compare methods over several splits, with intervals.", claims=True),
        Verb("simulate", SimulateSettings, _simulate, "Make complete maps: a procedural city, or ray tracing."),
        Verb("plot", PlotSettings, _plot, "Draw maps, error bars, spectral slopes and errors."),
        Verb("suggest", SuggestSettings, _suggest, "Say where to measure next."),
        Verb("convert", ConvertSettings, _convert, "Turn measurements or maps into another format."),
        Verb("reproduce", ReproduceSettings, _reproduce, "Run the authors' protocol on complete maps."),
        Verb("demo", DemoSettings, _demo, "Map procedural cities and compare all methods.", claims=True),
    ),
)
main = app.main
