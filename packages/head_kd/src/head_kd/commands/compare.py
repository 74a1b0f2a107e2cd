"""``head-kd compare``: presets on the same data and steps, over seeds, with statistics."""

import dataclasses
from functools import partial

import head_kd
from head_kd.commands._files import student_config
from head_kd.compose import pair
from head_kd.config import CompareSettings, Distillation, Preset, TrainSettings
from head_kd.training.runner import fit
from tenfold import UserError
from tenfold.claims import Study
from tenfold.cli import Invocation, show_claims
from tenfold.figures import arm_chart
from tenfold.report import write_report

LABELS: dict[Preset, str] = {
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
    study = Study(
        run,
        package="head-kd",
        version=head_kd.__version__,
        command="compare",
        level="full",
        data=settings.data or f"the data of {settings.student}",
        seeds=settings.seeds,
    )
    study.over_arms({arm: partial(_measure, settings, invocation, arm) for arm in settings.arms})
    _claim(study, list(settings.arms))
    arms = {LABELS[arm]: study.values((arm, "AP")).tolist() for arm in settings.arms}
    arm_chart(run.own("figures/arms.png"), arms, xlabel="AP, percent")
    summary = study.finish()
    write_report(run, "head-kd: comparison")
    return show_claims(summary, strict=invocation.strict)


def _measure(settings: CompareSettings, invocation: Invocation, arm: Preset, seed: int) -> dict[str, float]:
    """AP of one arm on one seed, in percent."""
    how = dataclasses.replace(settings.distill, preset=arm)
    cfg = pair(
        student_config(settings.student, settings.data, invocation.folder),
        settings.teacher,
        settings.teacher_checkpoint,
        how,
        cache=settings.cache if how.reads_regions else None,
        seed=seed,
    )
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainSettings)}
    one = TrainSettings(**{**values, "seed": seed, "distill": Distillation(preset="plain")})
    done = fit(cfg, one, None, quiet=invocation.quiet, description=f"{LABELS[arm]}, seed {seed}")
    found = done.run_hook.last_validation
    if "bbox_mAP" not in found:
        raise UserError("the student's config validates nothing: it needs val_dataloader and val_evaluator")
    return {"AP": 100 * found["bbox_mAP"], "AP50": 100 * found["bbox_mAP_50"]}


def _claim(study: Study, arms: list[Preset]) -> None:
    """One difference to the baseline, the first arm, for each of the others."""
    baseline = arms[0]
    for arm in arms[1:]:
        text = f"{LABELS[arm]} has a higher AP than {LABELS[baseline]}"
        study.difference(f"{arm}_beats_{baseline}", text, (arm, "AP"), (baseline, "AP"), required=">= 0", main=True)
