"""`head-kd train`: a student with a teacher's or its own assistants' help."""

import sys
import time

from head_kd.cache import TargetCache, check_pipeline
from head_kd.commands._files import check_teacher, export, student_config
from head_kd.compose import pair
from head_kd.config import TrainSettings
from head_kd.data import annotation_digest
from head_kd.stack import use_device
from head_kd.training.guard import GuardHook
from head_kd.training.host import check_precision
from head_kd.training.runner import BEST, LAST, fit
from tenfold import runs
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.runs import Run

KINDS = {"student": ("loss_", "rpn_"), "assistants": ("assist",), "distillation": ("akd", "ckd", "neck")}
"""Curves of the figure, and how the names of their losses begin."""


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, export the plain student, write figures, report and summary."""
    begun = time.perf_counter()
    run = invocation.folder
    check_precision(settings.precision, use_device(settings.device))
    check_teacher(settings.teacher, settings.teacher_weights)
    cache = None if settings.cache is None else TargetCache.open(settings.cache)
    plain = student_config(settings.student, settings.data, run, split=settings.split, skip_bad=settings.skip_bad)
    if cache is not None:
        cache.check_data(annotation_digest(plain))
        check_pipeline(plain.train_dataloader.dataset)
    cfg = pair(
        plain,
        settings.teacher,
        settings.teacher_weights,
        settings.method,
        settings.distill,
        cache=settings.cache,
        seed=settings.seed,
    )
    say = (lambda line: None) if invocation.quiet or not run.writes else _say
    guard = GuardHook(settings.guard, settings.min_teacher_ap, settings.other_classes, run, say)
    texts = {"student.py": plain.pretty_text}
    done = fit(cfg, settings, run, quiet=invocation.quiet, hooks=[guard], texts=texts, say=say)
    if not run.writes:
        return
    report = export(run, run.path / LAST, plain)
    if done.run_hook.best is not None and (run.path / BEST).exists():
        export(run, run.path / BEST, plain, name="student_best")
    card = {"student": settings.student, "file": "student.safetensors", "mmdet_config": "student.py"}
    run.write_json("config.json", card)
    rows = runs.read_metrics(run.path / "metrics.csv")
    values = _last_validation(rows)
    study = Study(run, data=settings.data or f"the data of {settings.student}", seeds=[settings.seed])
    study.record(settings.method, values)
    study.note(
        f"exported student: {report['kept']} tensors, {report['left_out']} left out, verified {report['verified']}"
    )
    drawn = _draw(run, rows)
    study.finish(time.perf_counter() - begun)
    caption = "Losses of the student, of the assistants, and of distillation (weighted)."
    write_report(run, "head-kd: training", {"losses": caption} if drawn else None)
    ap = f", AP {values['bbox_mAP']:.1f}" if "bbox_mAP" in values else ""
    sys.stdout.write(
        f"{done.iter} steps{ap}; the plain student is {run.path / 'student.safetensors'} (and .pth), its config"
        f" {run.path / 'student.py'}\n"
    )


def _say(line: str) -> None:
    """To the person at the terminal; stdout belongs to results."""
    sys.stderr.write(line + "\n")


def _last_validation(rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """COCO metrics in percent of the last validation, also of one before a resume; nothing where there was none."""
    measured = [row for _, row in rows if "val_bbox_mAP" in row]
    last = measured[-1] if measured else {}
    return {name.removeprefix("val_"): 100 * v for name, v in last.items() if name.startswith("val_bbox_")}


def _draw(run: Run, rows: list[tuple[int, dict[str, float]]]) -> bool:
    """``figures/losses.png``; returns whether there was anything to draw."""
    curves = {}
    for name, starts in KINDS.items():
        points = [
            (step, sum(v for k, v in row.items() if "loss" in k and k.startswith(starts)))
            for step, row in rows
            if any("loss" in k and k.startswith(starts) for k in row)
        ]
        if points:
            curves[name] = Curve([p[0] for p in points], [p[1] for p in points])
    if curves:
        line_chart(run.figure("losses"), [Panel("Losses", "step", "sum of the terms", curves)])
    return bool(curves)
