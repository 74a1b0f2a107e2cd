"""What a pair of detectors has to say to each other, as numbers: gradients, the semantic gap, cost."""

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from head_kd.balance import gradient_norms
from head_kd.dense_assistant import DenseAssistant
from head_kd.detector import HEADDetector
from head_kd.losses import gap_r2
from head_kd.roi_assistant import RoIAssistant
from head_kd.signals import is_two_stage
from head_kd.teacher import TeacherView
from tenfold.modules import evaluating

_GAP_ROWS = 4096


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards buffers (running statistics, the step) and modes are as before."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with evaluating(model, gradients=True):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


def measure(model: HEADDetector, batches: Iterable[tuple[Tensor, list[Any]]]) -> dict[str, Any]:
    """Gradient ratios and semantic gaps on some batches, without a trace in the model.

    Args:
        model: the pair.
        batches: preprocessed images with their data samples.

    Returns:
        ``gradient_ratio``: term -> norm of its weighted gradient at the student's maps over that of the detection loss;
        ``gap_r2``: pair -> R^2, held out, of a linear map from the imitating to the imitated signal; None where there are too
        few rows to measure it.
    """
    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def observe(name: str, own: Tensor, target: Tensor) -> None:
        a, b = pairs.setdefault(name, ([], []))
        if sum(map(len, a)) < _GAP_ROWS:
            a.append(own.cpu())
            b.append(target.cpu())

    norms: list[Tensor] = []
    names: list[str] = []
    hub = MessageHub.get_current_instance()
    if hub.get_info("epoch") is None:
        hub.update_info("epoch", 0)  # what a run says to heads that ask for it
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
    return {"gradient_ratio": ratio, "gap_r2": {k: v if math.isfinite(v) else None for k, v in gaps.items()}}


def training_flops(model: Any, batch: Tensor, samples: list[Any]) -> int:
    """FLOPs (two per multiply-add) of a training step: forward, backward, and what runs without gradient.

    Convolutions and matrix products are counted; pooling of regions, normalization and sorting are not.
    """
    with untouched(model), FlopCounterMode(display=False) as counter:
        model.train()
        total, _ = model.parse_losses(model.loss(batch, copy.deepcopy(samples)))
        total.backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def cost(model: HEADDetector, size: tuple[int, int]) -> dict[str, float]:
    """Forward multiply-adds (in units of 1e9) of one image: student, teacher's part, assistants.

    As many regions are counted as the assistant's sampler takes.

    Args:
        model: the pair.
        size: height and width of the image.
    """
    out: dict[str, float] = {}
    device = next(model.student.parameters()).device
    image = torch.zeros((1, 3, *size), device=device)

    def count(function: Any) -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops() / 2e9

    with untouched(model):
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
