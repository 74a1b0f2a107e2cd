"""`radiogat train`: an area from its measurements, with a map and its error bars."""

import sys
import time
from itertools import chain, count

import numpy as np

from radiogat.commands._files import grid_for, read_input
from radiogat.commands._maps import map_format, write_map
from radiogat.config import TrainSettings
from radiogat.estimator import RadioMapEstimator, describe
from radiogat.pictures import LEVELS, calibration_picture
from radiogat.samples import RadioMaps
from radiogat.tasks import Task
from radiogat.training import RadioGATModule, RadioMapDataModule
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.config import TrainerConfig
from tenfold.devices import choose_device
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.training import fit

_JUDGED = 20_000
"""Unmeasured cells of complete maps that the error bars are judged on."""
_ENOUGH = 100
"""Held-out measurements below which a fifth of them says nothing about error bars."""
_CAPTIONS = {
    "map": "Received power; dots are measurements, triangles masts.",
    "error-bars": "Half-width of the intervals.",
    "spectral-slope": "Change of power per decade of frequency.",
}


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, calibrate, map; write the model, its map, pictures and report."""
    start = time.perf_counter()
    folder = invocation.folder
    choose_device(settings.device)
    kind = None if settings.map == "none" else map_format(settings.map)
    samples, scene, maps = read_input(settings, settings.seed)
    grid = grid_for(samples, scene, settings.cell)
    estimator = RadioMapEstimator(
        settings.method,
        settings.radiogatx(settings.seed),
        settings.radiogat(),
        settings.graph,
        settings.trees,
        settings.fallback,
        seed=settings.seed,
    )
    estimator.fit(samples, scene, _Resumable(settings, invocation), grid)
    estimator.save(folder.own("model.safetensors"))
    sys.stdout.write(describe(estimator))
    heldout = {name: round(value, 4) for name, value in estimator.heldout_.items()}
    folder.write_json("config.json", {"chosen": estimator.chosen_, "heldout_rmse_db": heldout})
    captions = _CAPTIONS | {"calibration": draw_calibration(folder, estimator, maps, settings)}
    if kind is not None:
        written = write_map(folder, estimator, grid, None, settings.interval, kind)
        sys.stdout.write(f"map: {folder.path / written}\n")
    study = Study(folder, data=settings.data, seeds=[settings.seed])
    for name, value in estimator.heldout_.items():
        study.record(name, {"heldout rmse": value})
    cases = len(estimator.calibration_["truth"])
    study.note(
        f"{estimator.chosen_} predicts; RMSE in dB on {cases} held-out cases, weighted as the map: {estimator.held_.said()}."
    )
    study.finish(time.perf_counter() - start)
    shown = {name: text for name, text in captions.items() if (folder.path / f"figures/{name}.png").exists()}
    write_report(folder, "radiogat: a map of the area and how sure it is", shown)


class _Resumable:
    """Training by Lightning in the run folder: a killed run continues to the same weights."""

    def __init__(self, settings: TrainSettings, invocation: Invocation) -> None:
        self.settings = settings
        self.invocation = invocation
        self.stages = chain(("", "second"), (f"stage{n}" for n in count(3)))  # a round of held-out places each, and all

    def __call__(self, task: Task) -> None:
        """Train the network of a task."""
        how = TrainerConfig(
            steps=task.steps,
            checkpoint_every=self.settings.checkpoint_every,
            device=self.settings.device,
            precision="32",
        )
        fit(
            RadioGATModule(task),
            RadioMapDataModule(task).train_dataloader(),
            how,
            self.invocation.folder,
            seed=self.settings.seed,
            stage=next(self.stages),
            quiet=self.invocation.quiet,
        )
        task.network.eval()


def draw_calibration(folder: Run, estimator: RadioMapEstimator, maps: RadioMaps | None, settings: TrainSettings) -> str:
    """Draw error bars at unmeasured places where the truth is known; else on held-out places that others calibrated.

    Returns the picture's caption; there is no picture of a few held-out measurements.
    """
    unseen = None if maps is None else ~maps.draw(settings.rate, settings.seed) & np.isfinite(maps.rss_dbm)
    if maps is not None and unseen is not None and unseen.any():
        cells = maps.samples(unseen)
        some = np.sort(np.random.default_rng(0).permutation(len(cells))[:_JUDGED])
        curves = {"as found": estimator.coverage(cells.take(some), LEVELS)}
        calibration_picture(folder.figure("calibration"), curves, "unmeasured cells")
        return "Share of the unmeasured cells inside the intervals, at each level."
    if len(estimator.calibration_["truth"]) >= _ENOUGH:
        name = "a fifth of the held-out places,\ncalibrated on the others"
        curves = {name: estimator.cross_coverage(LEVELS)}
        calibration_picture(folder.figure("calibration"), curves, "held-out measurements")
    return (
        "Share of the held-out cases of a fifth of the places inside intervals that the others calibrated, weighted as the"
        " map; their mean is straight by construction, their spread shows what the choice of places does."
    )
