"""mmcv's compiled operators that detectors need, without a compiler: importing this module installs them.

``import head_kd.ops_fallback`` before ``mmdet`` (or ``custom_imports = dict(imports=["head_kd.ops_fallback"])`` in a
config) puts a module ``mmcv._ext`` in place whose operators are torchvision's or plain torch. It does so only where the
compiled extension is absent; where there is one, nothing is replaced. An operator that is not covered raises when it is
called, with its name and what to do.

Covered: ``nms`` (offset 0), ``softnms``, ``roi_align`` (average; forward and backward), ``sigmoid_focal_loss`` (forward
and backward), ``deform_conv`` and ``modulated_deform_conv`` (forward and backward).
"""

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from head_kd.families import family
from tenfold import UserError

NAME = "mmcv._ext"
logger = logging.getLogger("head_kd")


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes, by falling score.

    Args:
        boxes: (M, 4) as x1, y1, x2, y2.
        scores: (M,).
        iou_threshold: a box above this IoU with a better one goes.
        offset: 0; mmcv's old convention of 1 (inclusive corners) is not covered.
    """
    if offset != 0:
        _unsupported("nms with offset=1")
    return torchvision.ops.nms(boxes.float(), scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: lower the scores of what overlaps instead of removing it; fills ``dets`` (M, 5), returns the order.

    ``method``: 0 naive (hard), 1 linear s (1 - IoU) above the threshold, 2 gaussian s exp(-IoU^2 / sigma).
    Source: Bodla et al., ICCV 2017. O(M) vectorized rounds, each over what is left.
    """
    left = torch.arange(len(boxes))
    current, current_scores = boxes.float(), scores.float().clone()
    area = (current[:, 2] - current[:, 0] + offset) * (current[:, 3] - current[:, 1] + offset)
    order: list[Tensor] = []
    while len(left):
        best = int(current_scores[left].argmax())
        i = left[best]
        score = current_scores[i]
        dets[len(order), :4], dets[len(order), 4] = boxes[i].to(dets), score.to(dets)
        order.append(i)
        left = torch.cat([left[:best], left[best + 1 :]])
        rest = current[left]
        extent = (
            torch.minimum(rest[:, 2:], current[i, 2:]) - torch.maximum(rest[:, :2], current[i, :2]) + offset
        ).clamp_min(0)
        inner = extent.prod(dim=1)
        iou = inner / (area[i] + area[left] - inner)
        if method == 0:
            factor = (iou < iou_threshold).float()
        elif method == 1:
            factor = torch.where(iou >= iou_threshold, 1 - iou, torch.ones_like(iou))
        else:
            factor = torch.exp(-(iou**2) / sigma)
        current_scores[left] *= factor
        left = left[current_scores[left] >= min_score]
    return torch.stack(order) if order else torch.zeros(0, dtype=torch.int64)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of features (N, C, H, W) at rois (M, 5), averaged, into ``output`` (M, C, height, width)."""
    if pool_mode != 1:
        _unsupported("roi_align with pool_mode='max'")
    pooled = torch.ops.torchvision.roi_align(
        input, rois.to(input), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.set_(pooled)  # no copy of the largest tensor of a step


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of ``roi_align_forward`` with respect to the features, into ``grad_input`` (N, C, H, W)."""
    batch, channels, height, width = grad_input.shape
    grad_input.set_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output),
            spatial_scale,
            aligned_height,
            aligned_width,
            batch,
            channels,
            height,
            width,
            sampling_ratio,
            aligned,
        )
    )


def _focal_parts(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One-hot targets (class ``C`` is background), p and log(p) of ``input`` (M, C)."""
    hot = F.one_hot(target.clamp_max(input.shape[1]), input.shape[1] + 1)[:, :-1].to(input)
    return hot, torch.sigmoid(input), F.logsigmoid(input)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """-alpha (1 - p)^gamma log p for the target class, -(1 - alpha) p^gamma log(1 - p) for the others.

    Shapes: ``input`` (M, C) logits, ``target`` (M,) int64 (C is background), ``weight`` (C,) or empty, ``output`` (M, C).
    Source: Lin et al., ICCV 2017, Eq. 5.
    """
    hot, p, log_p = _focal_parts(input, target)
    log_not_p = log_p - input  # log(1 - p)
    positive = -alpha * (1 - p) ** gamma * log_p
    negative = -(1 - alpha) * p**gamma * log_not_p
    loss = torch.where(hot > 0, positive, negative)
    output.copy_(loss if weight.numel() == 0 else loss * weight)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of ``sigmoid_focal_loss_forward`` by the logits, into ``grad_input`` (M, C)."""
    hot, p, log_p = _focal_parts(input, target)
    log_not_p = log_p - input
    positive = alpha * (1 - p) ** gamma * (gamma * p * log_p - (1 - p))
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * log_not_p)
    gradient = torch.where(hot > 0, positive, negative)
    grad_input.copy_(gradient if weight.numel() == 0 else gradient * weight)


def _deform(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: dict[str, Any]
) -> Tensor:
    """Deformable convolution of torchvision out of mmcv's arguments; NaN everywhere where an offset is not finite.

    torchvision reads outside of its tensors at such an offset, which ends the process.
    """
    known = offset.isfinite()
    finite = bool(known.all())
    out: Tensor = torch.ops.torchvision.deform_conv2d(
        input,
        weight,
        offset if finite else torch.where(known, offset, 0),
        offset.new_zeros(len(offset), 1) if mask is None else mask,
        input.new_zeros(weight.shape[0]) if bias is None else bias,
        geometry["stride"][0],
        geometry["stride"][1],
        geometry["padding"][0],
        geometry["padding"][1],
        geometry["dilation"][0],
        geometry["dilation"][1],
        geometry["groups"],
        geometry["deform_groups"],
        mask is not None,
    )
    return out if finite else out * torch.nan


def _geometry(k: dict[str, int]) -> dict[str, Any]:
    """mmcv's keyword arguments of both operators, as (height, width) pairs."""
    short = "dH" in k
    return {
        "stride": (k["dH"], k["dW"]) if short else (k["stride_h"], k["stride_w"]),
        "padding": (k["padH"], k["padW"]) if short else (k["pad_h"], k["pad_w"]),
        "dilation": (k["dilationH"], k["dilationW"]) if short else (k["dilation_h"], k["dilation_w"]),
        "groups": k["group"],
        "deform_groups": k["deformable_group"] if "deformable_group" in k else k["deformable_groups"],
    }


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **k: int
) -> None:
    """Deformable convolution (v1) into ``output``; offsets are (y, x) pairs in both libraries."""
    output.copy_(_deform(input, weight, offset, None, None, _geometry(k)))


def _deform_gradients(
    inputs: list[Tensor | None], grad_output: Tensor, geometry: dict[str, Any]
) -> list[Tensor | None]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        x, weight, offset, mask, bias = leaves
        assert x is not None
        assert weight is not None
        assert offset is not None
        out = _deform(x, weight, offset, mask, bias, geometry)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(out, wanted, grad_output.to(out)))
    return [None if leaf is None else next(found) for leaf in leaves]


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **k: int,
) -> None:
    """Gradients of ``deform_conv_forward`` with respect to the input and the offsets."""
    x, _, o, _, _ = _deform_gradients([input, weight, offset, None, None], grad_output, _geometry(k))
    assert x is not None
    assert o is not None
    grad_input.copy_(x)
    grad_offset.copy_(o)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float = 1,
    **k: int,
) -> None:
    """Gradient of ``deform_conv_forward`` with respect to the weight."""
    weight = torch.zeros_like(grad_weight)
    _, w, _, _, _ = _deform_gradients([input, weight, offset, None, None], grad_output, _geometry(k))
    assert w is not None
    grad_weight.add_(w, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **k: int,
) -> None:
    """Deformable convolution v2 (with a mask) into ``output``."""
    output.copy_(_deform(input, weight, offset, mask, bias if k.get("with_bias") else None, _geometry(k)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **k: int,
) -> None:
    """Gradients of ``modulated_deform_conv_forward``, added to what the arguments hold."""
    given = [input, weight, offset, mask, bias if k.get("with_bias") else None]
    found = _deform_gradients(given, grad_output, _geometry(k))
    for gradient, target in zip(found, (grad_input, grad_weight, grad_offset, grad_mask, grad_bias), strict=True):
        if gradient is not None:
            target.add_(gradient)


_OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        nms,
        softnms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
    )
}


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes (N, 5) with scores: each that NMS keeps, followed by those that it suppresses, by falling score."""
    order = dets[:, 4].argsort(descending=True, stable=True).tolist()
    overlaps = torchvision.ops.box_iou(dets[:, :4], dets[:, :4])
    groups = []
    while order:
        kept, rest = order[0], order[1:]
        over = [i for i in rest if float(overlaps[kept, i]) >= iou_threshold]
        groups.append([kept, *over])
        order = [i for i in rest if i not in set(over)]
    return groups


_OPERATORS["nms_match"] = nms_match


def _unsupported(what: str) -> NoReturn:
    raise UserError(
        f"mmcv operator {what}: not compiled here and not covered by head_kd's fallback; install an mmcv with compiled"
        " operators for this torch (pip install mmcv, with a compiler)"
    )


class _Fallback(ModuleType):
    """``mmcv._ext`` without a compiler; an operator that is not covered is a function that raises."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            _unsupported(name)

        return missing


def install_ops_fallback() -> bool:
    """Put the fallback in place where mmcv has no compiled operators; returns whether the fallback is active.

    Raises:
        UserError: no family of the mm stack, two mixed ones, or compiled operators that do not load.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        return isinstance(present, _Fallback)
    family()
    if importlib.util.find_spec(NAME) is not None:
        try:
            importlib.import_module(NAME)
        except ImportError as error:
            raise UserError(
                f"mmcv has compiled operators that do not load with torch {torch.__version__} ({error}): reinstall mmcv"
                " for this torch, or take mmcv-lite"
            ) from error
        logger.info("mmcv's compiled operators are there and stay")
        return False
    module = _Fallback(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    module.__dict__.update(_OPERATORS)
    sys.modules[NAME] = module
    logger.info("mmcv has no compiled operators: head_kd's fallback (torchvision and plain torch) is active")
    return True


install_ops_fallback()
