"""`radiogat evaluate`: all methods on your measurements, by cross-validation."""

import sys

import numpy as np

from radiogat.commands._files import read_input
from radiogat.config import EvaluateSettings
from radiogat.evaluation import cross_validate
from tenfold.cli import Invocation
from tenfold.terminal import table, track


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Write ``metrics.json`` and ``report.md``, and print the table."""
    samples, scene, _ = read_input(settings, settings.seed)
    side = settings.block or float(np.ptp(samples.xy, axis=0).max()) / 10
    found, beyond = cross_validate(
        samples,
        scene,
        settings.arms,
        folds=settings.folds,
        side=None if settings.holdout == "places" else side,
        network=settings.radiogatx(settings.seed),
        trees=settings.trees,
        level=settings.interval,
        seed=settings.seed,
        track=lambda cases: track(cases, "cross-validating", quiet=invocation.quiet),
    )
    metrics = list(next(iter(found.values())))
    rows = [[arm, *(f"{row[metric]:.3f}" for metric in metrics)] for arm, row in found.items()]
    how = "places, weighted as the map is read" if settings.holdout == "places" else f"squares of {side:.4g}"
    best = min(found, key=lambda arm: found[arm]["rmse"])
    text = (
        f"{len(samples)} measurements, {settings.folds} folds of {how}; dB, error bars of {settings.interval:.0%}\n\n"
        f"{table(['arm', *metrics], rows)}\n\nbest: {best}\n"
    )
    if beyond >= 0.001:
        text += f"{beyond:.1%} of the map lies farther from any measurement than all that was checked\n"
    said = {"holdout": settings.holdout, "arms": found, "best": best, "beyond": beyond}
    invocation.folder.write_json("metrics.json", said)
    invocation.folder.write_text("report.md", "```\n" + text + "```\n")
    sys.stdout.write(text)
