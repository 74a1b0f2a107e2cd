"""`head-kd inspect`: what a pair can match, what it costs, and how far it is apart; nothing is written."""

import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn

from head_kd.commands._files import check_teacher, student_config
from head_kd.compose import pair
from head_kd.config import WITH_TEACHER, InspectSettings
from head_kd.configs import innermost, resolve_config, stated_classes
from head_kd.detector import HEADDetector
from head_kd.inspection import cost, measure
from head_kd.stack import build, said_nothing, start
from head_kd.training.guard import look, split, transfer_lines
from tenfold.cli import Invocation
from tenfold.randomness import keyed
from tenfold.terminal import table


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Build the pair as training would, look at it, print tables."""
    with tempfile.TemporaryDirectory(prefix="head-kd-") as scratch, keyed(settings.seed):
        check_teacher(settings.teacher, settings.teacher_weights)
        if settings.images or settings.data:
            plain = student_config(
                settings.student, settings.data, None, scratch, split=settings.split, skip_bad=settings.skip_bad
            )
        else:
            plain = resolve_config(settings.student)
        start()
        weights = settings.teacher_weights
        if settings.method in WITH_TEACHER and weights is None:
            weights = _random_teacher(settings.teacher, Path(scratch))
        model = build(pair(plain, settings.teacher, weights, settings.method, settings.distill).model)
        _strip_pretrained(model)
        model.init_weights()
        sys.stdout.write("\n".join(_lines(settings, model, plain)) + "\n")


def _lines(settings: InspectSettings, model: HEADDetector, plain: Any) -> list[str]:
    without = settings.teacher_weights is None
    rows = _signal_rows(model)
    out = [table(["term", "from", "to", "adapter"], rows) if rows else "no distillation terms"]
    if without:
        out += [*transfer_lines(model), "no --teacher_weights: weights, AP and gradients are not looked at"]
    else:
        classes = stated_classes(innermost(plain.train_dataloader.dataset)) if settings.images else None
        out += look(model, classes, plain, images=settings.validation, other_classes=settings.other_classes)[0]
    height, width = settings.size
    parts = [[name, f"{value:.2f}"] for name, value in cost(model, (height, width)).items()]
    out += ["", f"cost of one {height} x {width} image, forward", table(["part", "1e9 multiply-adds"], parts)]
    if settings.images and not without:
        numbers = measure(model, _batches(model, plain, settings.images))
        ratios = [[name, f"{value:.3f}"] for name, value in numbers["gradient_ratio"].items()]
        gaps = [[name, "not measurable" if v is None else f"{v:.2f}"] for name, v in numbers["gap_r2"].items()]
        out += ["", "gradients at the student's maps, as shares of the detection loss's (before training)"]
        out.append(table(["term", "ratio"], ratios))
        out += ["", "semantic gap: R2 of a linear map, held out (1: an adapter can copy it)"]
        out.append(table(["pair", "R2"], gaps))
    return out


def _signal_rows(model: HEADDetector) -> list[list[str]]:
    """Rows (term, from, to, adapter) of all distillation terms."""
    rows = []
    for number, assistant in enumerate(model.assistants):
        name = type(assistant.head).__name__
        for key, phi in assistant.akd.items():
            own, wanted = _ends(phi)
            rows.append([f"akd{number}.{key}", f"assistant {name} {own}", f"teacher {wanted}", _kind(phi)])
        if assistant.ckd is not None:
            student, target = assistant.ckd_names
            whose = "teacher" if model.teacher is not None or model.cache is not None else "assistant"
            own, wanted = _ends(assistant.ckd)
            rows.append(
                [f"ckd{number}", f"student {student} {own}", f"{whose} {target} {wanted}", _kind(assistant.ckd)]
            )
    neck = model.head_kd.neck
    for level, (own, theirs) in enumerate(neck.pairs if neck is not None else ()):
        kind = _kind(neck[level]) if neck else "none"
        rows.append([f"neck{level}", f"student map {own} (stride {model.strides[own]})", f"teacher map {theirs}", kind])
    return rows


def _ends(phi: nn.Module) -> tuple[int, int]:
    """Features that an adapter takes and gives."""
    first = next(m for m in phi.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Linear):
        return first.in_features, first.out_features
    return first.in_channels, first.out_channels


def _kind(phi: nn.Module) -> str:
    names = {"Linear": "linear", "Conv2d": "1x1 convolution", "PerAnchorLinear": "linear for each anchor"}
    return names[type(phi).__name__]


def _batches(model: HEADDetector, cfg: Any, images: int) -> Iterator[tuple[Tensor, list[Any]]]:
    """Preprocessed training images of a config, two at a time."""
    with said_nothing():
        data = DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))
    for first in range(0, min(images, len(data)), 2):
        items = [data[i] for i in range(first, min(first + 2, len(data)))]
        yield split(model.data_preprocessor(pseudo_collate(items), True))


def _random_teacher(config: Any, folder: Path) -> str:
    """A teacher without its weights, for what depends on shapes alone."""
    path = folder / "teacher.pth"
    torch.save({"state_dict": build(resolve_config(config).model).state_dict()}, path)
    return str(path)


def _strip_pretrained(model: HEADDetector) -> None:
    """Leave out downloads of pretrained backbones, where only shapes, costs and gradients are looked at."""
    for module in model.student.modules():
        init = getattr(module, "init_cfg", None)
        if isinstance(init, dict) and init.get("type") == "Pretrained":
            module.init_cfg = None
