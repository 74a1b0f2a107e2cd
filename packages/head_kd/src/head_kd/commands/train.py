"""``head-kd train``: a student with a teacher's or its own assistants' help."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import head_kd
from head_kd.cache import TargetCache
from head_kd.commands._files import export, student_config
from head_kd.compose import pair
from head_kd.config import TrainSettings
from head_kd.data import annotation_digest
from head_kd.training.guard import GuardHook
from head_kd.training.runner import LAST, fit
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.runs import Run


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, export the plain student, write figures, report and summary."""
    run = invocation.folder
    plain = student_config(settings.student, settings.data, run)
    cfg = pair(
        plain,
        settings.teacher,
        settings.teacher_checkpoint,
        settings.distill,
        cache=settings.cache if settings.distill.reads_regions else None,
        seed=settings.seed,
    )
    teacher = cfg.model.get("teacher") or {}
    if teacher.get("cache") is not None:
        TargetCache.open(teacher["cache"]).check_data(annotation_digest(cfg))
    run.write_text("config.py", cfg.pretty_text)
    run.write_text("student.py", plain.pretty_text)
    begun = time.perf_counter()
    guard = GuardHook(plain, settings, run, (lambda line: None) if invocation.quiet else _say)
    done = fit(cfg, settings, run, quiet=invocation.quiet, hooks=[guard])
    if not run.writes:
        return
    report = export(run, run.path / LAST, plain)
    measured = [
        row for _, row in _metric_rows(run.path / "metrics.csv") if "val_bbox_mAP" in row
    ]  # also before a resume
    values = (
        {k.removeprefix("val_"): 100 * v for k, v in measured[-1].items() if k.startswith("val_bbox_")}
        if measured
        else {}
    )
    run.write_json(
        "config.json", {"student": settings.student, "file": "student.safetensors", "mmdet_config": "student.py"}
    )
    _summarize(run, settings, values, report, round(time.perf_counter() - begun, 1))
    ap = f", AP {values['bbox_mAP']:.1f}" if "bbox_mAP" in values else ""
    sys.stdout.write(
        f"{done.iter} steps{ap}; the plain student is {run.path / 'student.safetensors'} (and .pth), its config"
        f" {run.path / 'student.py'}\n"
    )


def _say(line: str) -> None:
    """To the person at the terminal; stdout belongs to results."""
    sys.stderr.write(line + "\n")


def _summarize(
    run: Run, settings: TrainSettings, values: dict[str, float], report: dict[str, Any], seconds: float
) -> None:
    """``summary.json`` in the shape that claims have, a curve, and the page."""
    run.write_json(
        "summary.json",
        {
            "package": "head-kd",
            "version": head_kd.__version__,
            "command": "train",
            "level": "full",
            "data": settings.data or f"the data of {settings.student}",
            "seconds": seconds,
            "seeds": [settings.seed],
            "arms": {settings.distill.preset: {k: [v] for k, v in values.items()}} if values else {},
            "claims": [],
            "notes": [
                f"exported student: {report['kept']} tensors, {report['left_out']} left out, verified {report['verified']}"
            ],
        },
    )
    rows = _metric_rows(run.path / "metrics.csv")
    kinds = {"student": ("loss_", "rpn_"), "assistants": ("assist",), "distillation": ("akd", "ckd", "neck")}
    curves = {}
    for name, starts in kinds.items():
        points = [
            (step, sum(v for k, v in row.items() if "loss" in k and k.startswith(starts)))
            for step, row in rows
            if any("loss" in k and k.startswith(starts) for k in row)
        ]
        if points:
            curves[name] = Curve([p[0] for p in points], [p[1] for p in points])
    if curves:
        line_chart(run.own("figures/losses.png"), [Panel("Losses", "step", "sum of the terms", curves)])
    write_report(
        run,
        "head-kd: training",
        {"losses": "Losses of the student, of the assistants, and of distillation (weighted)."} if curves else None,
    )


def _metric_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (int(row["step"]), {k: float(v) for k, v in row.items() if k != "step" and v})
            for row in csv.DictReader(file)
        ]
