"""`radiogat compare`: methods over several random splits of the same measurements, with paired intervals."""

import sys
from collections.abc import Sequence
from functools import partial

from radiogat.commands._files import read_input
from radiogat.config import Arm, CompareSettings
from radiogat.evaluation import split_errors
from radiogat.samples import RadioSamples, RadioScene
from radiogat.tasks import run_task
from tenfold import executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Measure every arm on every split; decide, draw, report."""
    folder = invocation.folder
    samples, scene, _ = read_input(settings, settings.seeds[0])
    study = Study(folder, data=settings.data, seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        quiet = invocation.quiet or pool is not None
        study.over_arms({arm: partial(measure, settings, samples, scene, arm, quiet) for arm in settings.arms}, pool)
    decide(study, settings.arms)
    values: dict[str, list[float]] = {arm: study.values((arm, "rmse")).tolist() for arm in settings.arms}
    arm_chart(folder.figure("rmse"), values, xlabel="RMSE on held-out measurements (dB)")
    summary = study.finish()
    captions = {"rmse": "RMSE by method: a dot for each split, the mean and its 95 % interval."}
    write_report(folder, "radiogat compare: methods on your measurements", captions)
    sys.stdout.write(table(*arm_rows(study, settings.arms, ("rmse", "mae"))) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def measure(
    settings: CompareSettings, samples: RadioSamples, scene: RadioScene | None, arm: Arm, quiet: bool, seed: int
) -> dict[str, float]:
    """Errors of one arm on one split."""
    train = partial(run_task, track=partial(track, description=f"{arm}, seed {seed}", quiet=quiet))
    return split_errors(samples, scene, arm, settings.share, seed, settings.radiogatx(seed), train, settings.trees)


def decide(study: Study, arms: Sequence[Arm]) -> None:
    """Claim that the stack, or without it radiogatx, is no worse than each other arm, as a paired ratio."""
    ours = "stack" if "stack" in arms else "radiogatx"
    for arm in arms:
        if ours in arms and arm != ours:
            text = f"RMSE of {ours} / {arm} on held-out places, weighted as the map"
            study.ratio(f"{ours}_{arm}", text, (ours, "rmse"), (arm, "rmse"), required="<= 1")
