"""`freespace-uda compare`: methods over seeds on a target that has test labels."""

import functools
import sys
from typing import Any

from freespace_uda.commands._arms import measure
from freespace_uda.commands._files import domains, labeled, look
from freespace_uda.config import CompareSettings, check_method, of_arm
from freespace_uda.data import load_scenes
from freespace_uda.models import build_net
from freespace_uda.training import road_share
from tenfold import UserError, executors
from tenfold.claims import Measured, Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track


def measure_arm(settings: CompareSettings, arm: Any, seed: int) -> Measured:
    """One arm on one seed, with the data read anew."""
    source = labeled(load_scenes(settings.data, settings.reading), "--data")
    target = load_scenes(settings.target, settings.target_reading, option="--target")
    test = labeled(load_scenes(settings.target, settings.test_reading, usual="test", option="--target"), "--target")
    return measure(settings, arm, seed, source, target, test)


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Measure, decide, write results, figures and ``report.html``."""
    source, target = domains(settings, oracle="oracle" in settings.arms)
    test = labeled(load_scenes(settings.target, settings.test_reading, usual="test", option="--target"), "--target")
    look(test, f"--target {settings.target}", labels=True)
    shared = {r.name for r in test.records} & {r.name for r in target.records}
    if shared:
        raise UserError(
            f"--target {settings.target}: {len(shared)} test scenes are trained on as well, the first: {min(shared)};"
            " --test_reading.split and --target_reading.split name different parts"
        )
    road_share(source, 8)
    for arm in settings.arms:
        method, own = of_arm(settings, arm)
        check_method(method, own)
        build_net(own, method, 0)
    folder = invocation.folder
    study = Study(folder, data=f"source {source.source}; target {target.source}", seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        show: Any = functools.partial(track, description="arms", quiet=invocation.quiet)
        tasks: dict[str, Any] = {arm: functools.partial(measure_arm, settings, arm) for arm in settings.arms}
        study.over_arms(tasks, pool, show)
    study.against(settings.arms[0], settings.arms, "F1")
    headers, rows = arm_rows(study, settings.arms, ["F1", "MaxF", "AP", "precision", "recall"])
    arm_chart(folder.figure("arms"), {a: study.values((a, "F1")).tolist() for a in settings.arms}, xlabel="F1 (%)")
    summary = study.finish()
    write_report(
        folder, "freespace-uda compare", {"arms": "F1 on test scenes of the target, which nothing was chosen by."}
    )
    sys.stdout.write(table(headers, rows) + "\n\n")
    return show_claims(summary)
