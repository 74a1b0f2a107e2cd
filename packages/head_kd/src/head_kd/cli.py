"""The commands. Each parses its settings before it imports torch or mmdet."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from head_kd.config import (
    CacheSettings,
    CompareSettings,
    DemoSettings,
    Distillation,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    TrainSettings,
)
from tenfold import UserError
from tenfold.cli import App, Invocation, Verb, show_claims, table

if TYPE_CHECKING:
    from tenfold.runs import Run


def _ready() -> None:
    """A family of the mm stack is there, and so are the operators that its models need."""
    from head_kd.families import family

    family()
    import head_kd.ops_fallback  # noqa: F401


def _only(device: str) -> None:
    """mmengine takes a GPU wherever torch sees one; before torch looks, it can be told not to."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _train(settings: TrainSettings, invocation: Invocation) -> None:
    _only(settings.device)
    _ready()
    from head_kd import training

    run = invocation.folder
    cfg, plain = training.compose(settings, run)
    training.check_cache(cfg)
    run.write_text("config.py", cfg.pretty_text)
    run.write_text("student.py", plain.pretty_text)
    begun = time.perf_counter()
    done = training.fit(cfg, settings, run, quiet=invocation.quiet, plain=plain)
    if not run.writes:
        return
    summary = _export(run, run.path / training.LAST, plain)
    measured = [
        row for _, row in _metric_rows(run.path / "metrics.csv") if "val_bbox_mAP" in row
    ]  # also before a resume
    values = (
        {k.removeprefix("val_"): 100 * v for k, v in measured[-1].items() if k.startswith("val_bbox_")}
        if measured
        else {}
    )
    summary |= {"steps": done.iter, "validation": values, "seconds": round(time.perf_counter() - begun, 1)}
    run.write_json(
        "config.json", {"student": settings.student, "file": "student.safetensors", "mmdet_config": "student.py"}
    )
    _write_summary(run, settings, summary, done)
    ap = f", AP {values['bbox_mAP']:.1f}" if "bbox_mAP" in values else ""
    sys.stdout.write(
        f"{done.iter} steps{ap}; the plain student is {run.path / 'student.safetensors'} (and .pth), its config"
        f" {run.path / 'student.py'}\n"
    )


def _export(run: "Run", checkpoint: Path, plain: Any, *, verify: bool = True) -> dict[str, Any]:
    from head_kd import training

    for suffix in ("safetensors", "pth"):
        run.own(f"student.{suffix}")
    return training.export_student(checkpoint, plain, run.path / "student", verify=verify)


def _write_summary(run: "Run", settings: TrainSettings, summary: dict[str, Any], done: Any) -> None:
    """``summary.json`` in the shape that claims have, a curve, and the page."""
    from head_kd import __version__
    from tenfold.figures import Curve, Panel, line_chart
    from tenfold.report import write_report

    values = summary["validation"] or {}
    run.write_json(
        "summary.json",
        {
            "package": "head-kd",
            "version": __version__,
            "command": "train",
            "level": "full",
            "data": settings.data or f"the data of {settings.student}",
            "seconds": summary["seconds"],
            "seeds": [settings.seed],
            "arms": {settings.distill.preset: {k: [v] for k, v in values.items()}} if values else {},
            "claims": [],
            "notes": [
                f"exported student: {summary['kept']} tensors, {summary['left_out']} left out, verified {summary['verified']}"
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
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return [
            (int(row["step"]), {k: float(v) for k, v in row.items() if k != "step" and v})
            for row in csv.DictReader(file)
        ]


def _evaluate(settings: EvaluateSettings, invocation: Invocation) -> None:
    _ready()
    from head_kd import training
    from head_kd.checkpoints import read_weights, student_weights
    from tenfold.checkpoints import check_shapes

    run = invocation.folder
    weights = student_weights(read_weights(settings.checkpoint).state_dict)
    cfg = training.plain_config(settings.student, settings.data, run)
    training.quiet_stack()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    expected = {k: tuple(v.shape) for k, v in MODELS.build(cfg.model).state_dict().items()}
    check_shapes(settings.checkpoint, expected, weights)
    found = training.evaluate(cfg, weights, run.path / "mmengine")
    for left in sorted((run.path / "mmengine").rglob("*")):
        if left.is_file():
            run.own(str(left.relative_to(run.path)))
    percent = {k: 100 * v for k, v in found.items() if k.startswith("bbox_")}
    run.write_json("evaluation.json", percent)
    sys.stdout.write(
        table(["metric", "percent"], [[k.removeprefix("bbox_"), f"{v:.1f}"] for k, v in percent.items()]) + "\n"
    )


def _export_verb(settings: ExportSettings, invocation: Invocation) -> None:
    _ready()
    from head_kd.checkpoints import resolve_config

    run = invocation.folder
    cfg = resolve_config(settings.student)
    report = _export(run, Path(settings.checkpoint), cfg, verify=settings.verify)
    run.write_json("export.json", report)
    checked = "outputs equal the checkpoint's bit for bit" if report["verified"] else "not verified"
    sys.stdout.write(
        f"{run.path / 'student.safetensors'} and .pth: {report['kept']} tensors of the plain student, {report['left_out']}"
        f" of training left out; {checked}\n"
    )


def _inspect(settings: InspectSettings, invocation: Invocation) -> None:
    _ready()
    import tempfile

    from head_kd import inspection, training
    from head_kd.compose import pair

    distill = settings.distill
    without = settings.teacher_checkpoint is None
    if distill.needs_teacher and settings.teacher is None:
        raise UserError(f"preset {distill.preset} needs --teacher CONFIG")
    plain = training.plain_config(settings.student, settings.data, None) if settings.images or settings.data else None
    if plain is None:
        from head_kd.checkpoints import resolve_config

        plain = resolve_config(settings.student)
    training.quiet_stack()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    import head_kd.detector  # noqa: F401

    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = settings.teacher_checkpoint
        if distill.needs_teacher and without:
            checkpoint = training.random_teacher(settings.teacher, Path(scratch))
        cfg = pair(plain, settings.teacher, checkpoint, distill)
        model = MODELS.build(cfg.model)
        training.strip_pretrained(model)
        model.init_weights()
        out = [
            table(["term", "from", "to", "adapter"], inspection.signal_rows(model))
            if inspection.signal_rows(model)
            else "no distillation terms"
        ]
        trained = TrainSettings(
            student=settings.student,
            teacher=settings.teacher,
            teacher_checkpoint=checkpoint,
            guard=0 if without else settings.validation,
            distill=distill,
        )
        classes = (training.dataset_of(plain).get("metainfo") or {}).get("classes") if settings.images else None
        if without:
            out += [
                *inspection.transfer_lines(model),
                "no --teacher_checkpoint: weights, AP and gradients are not looked at",
            ]
        else:
            out += training.guard(model, classes, trained, plain, Path(scratch) / "log")[0]
        rows = [[k, f"{v:.2f}"] for k, v in inspection.cost(model, settings.size).items()]
        out += [
            "",
            f"cost of one {settings.size[0]} x {settings.size[1]} image, forward",
            table(["part", "1e9 multiply-adds"], rows),
        ]
        if settings.images and not without:
            numbers = inspection.measure(model, training.sample_batches(model, plain, settings.images))
            names = list(dict.fromkeys([*numbers["gradient_ratio"]]))
            out += ["", "gradients at the student's maps, as shares of the detection loss's (before training)"]
            out.append(table(["term", "ratio"], [[n, f"{numbers['gradient_ratio'][n]:.3f}"] for n in names]))
            out += ["", "semantic gap: R2 of a linear map, held out (1: an adapter can copy it)"]
            out.append(table(["pair", "R2"], [[n, f"{v:.2f}"] for n, v in numbers["gap_r2"].items()]))
    sys.stdout.write("\n".join(out) + "\n")


def _cache(settings: CacheSettings, invocation: Invocation) -> None:
    _ready()
    from head_kd import training

    report = training.make_cache(settings, invocation.folder, quiet=invocation.quiet)
    invocation.folder.write_json("report.json", report)
    sys.stdout.write(
        f"{report['images']} images, {report['boxes']} boxes each, {', '.join(report['signals'])}:"
        f" {report['bytes'] / 1e6:.1f} MB; train with --cache {report['path']}\n"
    )


def _compare(settings: CompareSettings, invocation: Invocation) -> int:
    _only(settings.device)
    _ready()
    from head_kd import __version__, training
    from head_kd.comparison import LABELS, claim_all
    from tenfold.claims import Study
    from tenfold.figures import arm_chart
    from tenfold.report import write_report

    run = invocation.folder
    study = Study(
        run,
        package="head-kd",
        version=__version__,
        command="compare",
        level="full",
        data=settings.data or f"the data of {settings.student}",
        seeds=settings.seeds,
    )

    def measure(arm: Any, seed: int) -> dict[str, float]:
        how = dataclasses.replace(settings.distill, preset=arm)
        cfg, _ = training.compose(settings, run, preset=how, seed=seed)
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(TrainSettings)}
        one = TrainSettings(**{**values, "seed": seed, "distill": Distillation(preset="plain")})
        done = training.fit(
            cfg,
            one,
            None,
            quiet=invocation.quiet,
            description=f"{LABELS[arm]}, seed {seed}",
            work_dir=run.path / "mmengine",
        )
        found = done.run_hook.last_validation
        if "bbox_mAP" not in found:
            raise UserError("the student's config validates nothing: it needs val_dataloader and val_evaluator")
        return {"AP": 100 * found["bbox_mAP"], "AP50": 100 * found["bbox_mAP_50"]}

    study.over_arms({arm: (lambda seed, arm=arm: measure(arm, seed)) for arm in settings.arms})  # type: ignore[misc]
    claim_all(study, list(settings.arms))
    for left in sorted((run.path / "mmengine").rglob("*")):
        if left.is_file():
            run.own(str(left.relative_to(run.path)))
    arm_chart(
        run.own("figures/arms.png"),
        {LABELS[arm]: study.values((arm, "AP")).tolist() for arm in settings.arms},
        xlabel="AP, percent",
    )
    summary = study.finish()
    write_report(run, "head-kd: comparison")
    return show_claims(summary, strict=invocation.strict)


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    _ready()
    from head_kd import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "head-kd",
    "head_kd",
    "Distill a detector into one of another kind through assistant heads (HEAD, TF-HEAD), in mmdet 3.x.",
    (
        Verb("train", TrainSettings, _train, "Train a student with a teacher's or its own assistants' help."),
        Verb("evaluate", EvaluateSettings, _evaluate, "Measure a plain student's COCO AP."),
        Verb(
            "compare", CompareSettings, _compare, "Train several arms over several seeds, with statistics.", claims=True
        ),
        Verb("export", ExportSettings, _export_verb, "Write the plain student of a checkpoint, checked bit for bit."),
        Verb(
            "inspect",
            InspectSettings,
            _inspect,
            "Show what a pair can match, what it costs, and how far it is apart.",
            out=False,
        ),
        Verb("cache", CacheSettings, _cache, "Run the teacher once and save what training asks of it."),
        Verb("demo", DemoSettings, _demo, "Teach a small RetinaNet by a Faster R-CNN on drawn images.", claims=True),
    ),
)
main = app.main
