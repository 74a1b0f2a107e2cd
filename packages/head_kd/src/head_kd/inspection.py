"""What a pair of detectors has to say to each other: signals, shapes, transfer, cost, gradients, the semantic gap."""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from head_kd.balance import gradient_norms
from head_kd.dense_assistant import DenseAssistant
from head_kd.detector import HEADDetector
from head_kd.losses import gap_r2
from head_kd.roi_assistant import RoIAssistant
from head_kd.signals import is_two_stage
from head_kd.teacher import TeacherView
from tenfold import UserError

_GAP_ROWS = 4096


def check_classes(student: Sequence[str] | None, teacher: Sequence[str] | None, *, other_classes: bool) -> str:
    """A line about the classes of both; unknown ones are said to be so.

    Raises:
        UserError: they differ, in names or in order, and ``other_classes`` does not allow it.
    """
    if student is None or teacher is None:
        return "classes: not stated by " + " and ".join(
            who for who, names in (("the data", student), ("the teacher", teacher)) if names is None
        )
    if tuple(student) == tuple(teacher):
        return f"classes: {len(student)}, the same in the same order"
    if sorted(student) == sorted(teacher):
        first = next(i for i, (a, b) in enumerate(zip(student, teacher, strict=True)) if a != b)
        what = (
            f"in another order: class {first} is '{student[first]}' in the data and '{teacher[first]}' for the teacher"
        )
    else:
        extra = [name for name in teacher if name not in student]
        lacking = [name for name in student if name not in teacher]
        what = f"{len(lacking)} of the data are unknown to the teacher ({', '.join(lacking[:3])})" + (
            f", which knows {len(extra)} others ({', '.join(extra[:3])})" if extra else ""
        )
    if not other_classes:
        raise UserError(
            f"classes of data and teacher differ, {what}; --distill.other_classes true distils features all the same"
        )
    return f"classes: differ, {what}; only inner features are distilled"


def normalization_line(model: HEADDetector) -> str:
    """Whether the teacher's input is converted."""
    if model.teacher is None or model.teacher.renormalize is None:
        return "normalization: no teacher runs"
    convert = model.teacher.renormalize
    if convert.identity:
        return "normalization: teacher and student take the same input"
    swap = ", channels swapped" if convert.swap else ""
    return f"normalization: converted for the teacher (scale {convert.scale.flatten()[0]:.3g}, padding cleared{swap})"


def signal_rows(model: HEADDetector) -> list[list[str]]:
    """Rows (term, from, to, adapter) of all distillation terms."""
    rows = []
    for number, assistant in enumerate(model.assistants):
        name = type(assistant.head).__name__
        for key, phi in assistant.akd.items():
            rows.append(
                [f"akd{number}.{key}", f"assistant {name} {_ends(phi)[0]}", f"teacher {_ends(phi)[1]}", _kind(phi)]
            )
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
    first = next(m for m in phi.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    if isinstance(first, nn.Linear):
        return first.in_features, first.out_features
    return first.in_channels, first.out_channels


def _kind(phi: nn.Module) -> str:
    return {"Linear": "linear", "Conv2d": "1x1 convolution", "PerAnchorLinear": "linear for each anchor"}[
        type(phi).__name__
    ]


def transfer_lines(model: HEADDetector) -> list[str]:
    """What of the teacher's head fits into the assistants."""
    lines = []
    for number, assistant in enumerate(model.assistants):
        total = len(assistant.head.state_dict())
        bridge = (
            f", over a bridge {_ends(assistant.bridge)[0]} -> {_ends(assistant.bridge)[1]}"
            if assistant.bridge is not None
            else ""
        )
        if f"assistant{number}" in model.untransferred:
            left = model.untransferred[f"assistant{number}"]
            fits = f"{total - len(left)} of {total} tensors come from the teacher's head"
            lines.append(f"assistant {number}: {fits}{bridge}" + (f"; not: {', '.join(left[:4])}" if left else ""))
        else:
            lines.append(f"assistant {number}: {total} tensors, initialized anew{bridge}")
    return lines


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers (running statistics, the step) and the mode are afterwards as before."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    mode = model.training
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
        model.train(mode)


def measure(model: HEADDetector, batches: Iterable[tuple[Tensor, list[Any]]]) -> dict[str, Any]:
    """Gradient ratios and semantic gaps on some batches, without a trace in the model.

    Returns:
        ``gradient_ratio``: term -> norm of its weighted gradient at the student's maps over that of the detection loss;
        ``gap_r2``: pair -> R^2, held out, of a linear map from the imitating to the imitated signal.
    """
    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def observe(name: str, own: Tensor, target: Tensor) -> None:
        a, b = pairs.setdefault(name, ([], []))
        if sum(map(len, a)) < _GAP_ROWS:
            a.append(own.cpu())
            b.append(target.cpu())

    norms: list[Tensor] = []
    names: list[str] = []
    with untouched(model):
        model.train()
        model.observer = observe
        try:
            for batch, samples in batches:
                features = list(model.student.extract_feat(batch))
                losses, terms = model.unweighted(batch, features, samples)
                names = list(terms)
                norms.append(gradient_norms(losses, terms, features))
        finally:
            model.observer = None
            model.zero_grad(set_to_none=True)
    mean = torch.stack(norms).mean(dim=0) if norms else torch.zeros(1)
    ratio = {name: float(value / mean[0].clamp_min(1e-30)) for name, value in zip(names, mean[1:], strict=True)}
    gaps = {name: gap_r2(torch.cat(a), torch.cat(b)) for name, (a, b) in pairs.items()}
    return {"gradient_ratio": ratio, "gap_r2": {k: v for k, v in gaps.items() if math.isfinite(v)}}


def training_flops(model: Any, batch: Tensor, samples: list[Any]) -> int:
    """FLOPs (two a multiply-add) of a training step: forward, backward, and what runs without gradient.

    Convolutions and matrix products are counted; pooling of regions, normalization and sorting are not.
    """
    with untouched(model), FlopCounterMode(display=False) as counter:
        model.train()
        total, _ = model.parse_losses(model.loss(batch, copy.deepcopy(samples)))
        total.backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def cost(model: HEADDetector, size: tuple[int, int]) -> dict[str, float]:
    """Forward multiply-adds (in units of 1e9) of one image: student, teacher's part, assistants; and parameters.

    Regions count as many as the assistant's sampler takes.
    """
    out: dict[str, float] = {}
    device = next(model.student.parameters()).device
    image = torch.zeros((1, 3, *size), device=device)

    def count(function: Any) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 2e9

    with untouched(model):
        model.eval()
        features = model.student.extract_feat(image)
        head = model.student.rpn_head if is_two_stage(model.student) else model.student.bbox_head
        out["student"] = count(lambda: head(model.student.extract_feat(image)))
        for number, assistant in enumerate(model.assistants):
            if isinstance(assistant, RoIAssistant):
                regions = _regions_of(assistant)
                rois = torch.tensor([[0.0, 0.0, 0.0, 64.0, 64.0]], device=device).repeat(regions, 1)
                names = assistant.akd_names[-1:]
                for stage in range(assistant.num_stages):
                    key = f"assistant {number}"
                    out[key] = out.get(key, 0) + count(
                        lambda a=assistant, s=stage, r=rois, n=names: a.at_rois(features, r, n, s)
                    )
            elif isinstance(assistant, DenseAssistant):
                out[f"assistant {number}"] = count(lambda a=assistant: a.head(a.pyramid(features)))
        if model.teacher is not None:
            out["teacher, backbone and neck"] = count(lambda: model.teacher.detector.extract_feat(image))
            out["teacher, whole detector"] = count(lambda: _whole(model.teacher, image))
    return out


def _regions_of(assistant: RoIAssistant) -> int:
    train_cfg = assistant.head.train_cfg
    first = train_cfg[0] if isinstance(train_cfg, list) else train_cfg
    return int(first["sampler"]["num"])


def _whole(teacher: TeacherView, image: Tensor) -> None:
    detector = teacher.detector
    maps = detector.extract_feat(image)
    (detector.rpn_head if teacher.two_stage else detector.bbox_head)(maps)
