"""`head-kd compare`: methods on the same data and steps, over seeds, with statistics."""

import dataclasses
import sys
from functools import partial

from mmengine.config import Config

from head_kd.cache import TargetCache, check_pipeline
from head_kd.commands._files import check_teacher, student_config
from head_kd.compose import pair
from head_kd.config import READ_AT_REGIONS, CompareSettings, ComputeSettings, Method, RunnerSettings
from head_kd.data import annotation_digest
from head_kd.stack import use_device
from head_kd.training.host import check_precision
from head_kd.training.runner import fit
from tenfold import UserError, executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track

LABELS: dict[str, str] = {
    "plain": "student alone",
    "assist": "assistant on labels",
    "own": "HEAD, normalized",
    "paper": "HEAD, the paper's weights",
    "tf_head": "TF-HEAD (no teacher)",
    "direct": "direct imitation, no assistant",
    "pkd": "PKD on the neck",
    "fitnet": "FitNet on the neck",
}


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Train each arm on each seed, decide the claims, draw."""
    run = invocation.folder
    check_precision(settings.precision, use_device(settings.device))
    check_teacher(settings.teacher, settings.teacher_weights)
    cache = None if settings.cache is None else TargetCache.open(settings.cache)
    plain = student_config(settings.student, settings.data, run, split=settings.split, skip_bad=settings.skip_bad)
    if cache is not None:
        cache.check_data(annotation_digest(plain))
        check_pipeline(plain.train_dataloader.dataset)
    if plain.get("val_dataloader") is None or plain.get("val_evaluator") is None:
        raise UserError(f"{settings.student} validates nothing: it needs val_dataloader and val_evaluator")
    study = Study(run, data=settings.data or f"the data of {settings.student}", seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        quiet = invocation.quiet or pool is not None
        show = partial(
            track, description="arms x seeds", quiet=invocation.quiet or pool is None
        )  # here, each shows its own
        arms = {str(arm): partial(measure, settings, plain.to_dict(), arm, quiet) for arm in settings.arms}
        study.over_arms(arms, pool, show)
    study.against(settings.arms[0], settings.arms, "AP", names=LABELS)
    arm_chart(
        run.figure("arms"),
        {LABELS[arm]: study.values((arm, "AP")).tolist() for arm in settings.arms},
        xlabel="AP, percent",
    )
    summary = study.finish()
    write_report(run, "head-kd: comparison")
    sys.stdout.write(table(*arm_rows(study, settings.arms, ("AP", "AP50"), names=LABELS)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def measure(
    settings: CompareSettings, plain: dict[str, object], arm: Method, quiet: bool, seed: int
) -> dict[str, float]:
    """AP of one arm on one seed, in percent."""
    cfg = pair(
        Config(plain),
        settings.teacher,
        settings.teacher_weights,
        arm,
        settings.distill,
        cache=settings.cache if arm in READ_AT_REGIONS else None,
        seed=seed,
    )
    shared = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ComputeSettings)}
    done = fit(cfg, RunnerSettings(**shared, seed=seed), None, quiet=quiet, description=f"{LABELS[arm]}, seed {seed}")
    found = done.run_hook.last_validation
    return {"AP": 100 * found["bbox_mAP"], "AP50": 100 * found["bbox_mAP_50"]}
