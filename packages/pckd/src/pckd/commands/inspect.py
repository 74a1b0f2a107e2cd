"""`pckd inspect`: layers, heads and the size of each term on one batch, before anything is trained."""

import sys
from typing import Any

import torch

from pckd.analysis import floor
from pckd.config import InspectSettings
from pckd.data import load
from pckd.distiller import Distiller
from pckd.losses import PCKDLoss
from pckd.models import build, own_statistics
from pckd.tap import second_stage
from pckd.teacher import Teacher, load_teacher
from pckd.training import example_images
from pckd.views import MultiView, normalize
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Print what the models and the losses look like on one batch of training images."""
    data = load(settings.data, settings.reading)
    torch.manual_seed(settings.seed)
    student = build(
        settings.student,
        len(data.classes),
        settings.student_weights,
        args=settings.student_args,
        in_chans=len(data.mean),
        size=data.size,
    )
    teacher: Teacher | None = None
    if settings.teacher is not None:
        teacher = load_teacher(settings, data)
    method = settings.chosen_method
    statistics = own_statistics(student, settings.student, settings.student_weights) or (data.mean, data.std)
    shown, tap = None, None
    if teacher is not None:
        shown = teacher.images(data.test.pixels(torch.arange(min(2, len(data.test)))))
        fitnet = settings.losses.fitnet.teacher
        tap = teacher.tap((fitnet or second_stage(teacher.plain, shown)) if method == "fitnet" else None)
    distiller = Distiller(
        student,
        tap,
        method,
        settings.losses,
        example=example_images(data, statistics),
        teacher_example=shown,
        tap=settings.tap,
    )
    taps: list[Any] = [["student", settings.student, distiller.student]]
    if distiller.teacher is not None:
        taps.append(["teacher", settings.teacher, distiller.teacher])
    rows = [
        [who, spec, f"{sum(p.numel() for p in tap.model.parameters()):,}", tap.path, tap.feature_dim, tap.num_classes]
        for who, spec, tap in taps
    ]
    sys.stdout.write(table(["", "model", "parameters", "classifier", "feature", "classes"], rows) + "\n\n")
    heads = {name: sum(p.numel() for p in part.parameters()) for name, part in distiller.objective.named_children()}
    if any(heads.values()):
        rows = [[name, f"{count:,}"] for name, count in heads.items() if count]
        sys.stdout.write(table(["head, of the training only", "parameters"], rows) + "\n\n")
    views = MultiView(settings.views, settings.seed)
    index = torch.randperm(len(data.train))[: settings.batch_size]
    made = views(data.train.pixels(index), index, 0)
    images, labels = normalize(made, *statistics), data.train.labels[index]
    features = distiller.student(images)
    taught = None if teacher is None else distiller.teach(teacher.images(made), settings.views.count)
    loss = distiller.objective(features, taught, labels, 1, settings.epochs)
    config = settings.losses.pckd
    weights = {"ce": 1.0, "kd": config.delta, "cc": config.beta, "ca": config.alpha, "fa": config.f}
    if not isinstance(distiller.objective, PCKDLoss):
        kd = settings.losses.kd
        weights = {
            "ce": kd.ce if method == "kd" else 1.0,
            "kd": kd.kd,
            "dkd": 1.0,
            "fitnet": settings.losses.fitnet.weight,
        }
    rows = []
    for name, value in loss.terms.items():
        rows.append([name, f"{float(value):.4g}", f"{weights[name]:.4g}", f"{weights[name] * float(value):.4g}"])
    sys.stdout.write(f"one batch of {len(labels)} images in {settings.views.count} views, first epoch, {method}\n")
    norm = torch.autograd.grad(loss.total, features.feature, retain_graph=True)[0].norm()
    sys.stdout.write(table(["term", "value", "weight", "weighted"], rows) + "\n")
    sys.stdout.write(
        f"total {float(loss.total.detach()):.4g}; gradient norm at the feature {float(norm):.4g};"
        f" mean preview weight {float(loss.weights.mean()):.3f}\n"
    )
    if "cc" in loss.terms and config.contrast == "relation":
        least = floor(config, labels, settings.views.count)
        sys.stdout.write(
            f"the contrast is scaled by tau / tau0 = {config.tau / config.tau0:.1f}, an effective weight of"
            f" {config.beta * config.tau / config.tau0:.3g} a row, and cannot fall below {least:.4g} in this batch\n"
        )
