"""How the outputs of mmdet's dense heads become class logits and boxes.

Whether a decoder fits is asked of the class that *owns* a head's prediction code, not of its bases: a head that overrides
its base's decoding behaves otherwise, and is then not decoded like it.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import FCOSHead, GFLHead, RTMDetHead, TOODHead, VFNetHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor

from tenfold import UserError

Split = Callable[[Any], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""A head's outputs -> class logits and box predictions of each level."""


@dataclasses.dataclass(frozen=True)
class DenseDecoder:
    """How a dense head's outputs become boxes.

    Attributes:
        split: function of the head's outputs that gives class logits (N, A*C, H, W) and box predictions of each level.
        priors: function of the levels' sizes and the device that gives (H*W*A, P) for each level.
        decode: function of level, priors and predictions that gives boxes.
    """

    split: Split
    priors: Callable[[Sequence[tuple[int, int]], torch.device], list[Tensor]]
    decode: Callable[[int, Tensor, Tensor], Tensor]


def dense_decoder(head: Any) -> DenseDecoder:
    """The decoder of a head that predicts classes by sigmoid on a grid.

    Known are RetinaNet, ATSS, FCOS, GFL, YOLOF, VFNet, TOOD, YOLOX, RTMDet, and heads that inherit their decoding.

    Raises:
        UserError: it is not known how this head's outputs become boxes.
    """
    kind = type(head).__name__
    if not getattr(head, "use_sigmoid_cls", False):
        raise UserError(f"the student's {kind} has no sigmoid class scores, which proposals are taken from")
    predicts = owner(head, "_predict_by_feat_single"), owner(head, "predict_by_feat")
    outputs = owner(head, "forward"), owner(head, "forward_single")
    if isinstance(head, VFNetHead) and VFNetHead in outputs and predicts == (BaseDenseHead, BaseDenseHead):
        return DenseDecoder(lambda out: (out[0], out[-1]), _grid(head), _by_coder(head))  # the refined boxes are last
    if isinstance(head, TOODHead) and TOODHead in outputs and TOODHead in predicts:
        return DenseDecoder(_activated, _grid(head), lambda level, priors, raw: raw * _stride(head, level))
    if YOLOXHead in predicts and YOLOXHead in outputs:
        return DenseDecoder(
            _with_objectness, _grid(head, with_stride=True), lambda _, p, raw: head._bbox_decode(p, raw)
        )
    if RTMDetHead in predicts:
        return DenseDecoder(_first_two, _grid(head), lambda _, priors, raw: head.bbox_coder.decode(priors[:, :2], raw))
    if GFLHead in predicts:

        def integral(level: int, priors: Tensor, raw: Tensor) -> Tensor:
            return head.bbox_coder.decode(head.anchor_center(priors), head.integral(raw) * _stride(head, level))

        return DenseDecoder(_first_two, _grid(head), integral)
    if predicts == (BaseDenseHead, BaseDenseHead) and getattr(head, "bbox_coder", None) is not None:
        if not isinstance(head, FCOSHead):
            return DenseDecoder(_first_two, _grid(head), _by_coder(head))
        if FCOSHead in outputs:

            def distances(level: int, priors: Tensor, raw: Tensor) -> Tensor:
                if head.norm_on_bbox and head.training:  # the head itself multiplies when it does not train
                    raw = raw * head.strides[level]
                return head.bbox_coder.decode(priors[:, :2], raw)

            return DenseDecoder(_first_two, _grid(head), distances)
    raise UserError(
        f"the student's {kind} gives no proposals with a known cell: supported are the heads of RetinaNet, ATSS, FCOS, GFL,"
        " YOLOF, VFNet, TOOD, YOLOX and RTMDet, and those that inherit how they decode"
    )


def owner(head: Any, name: str) -> type | None:
    """The class that defines a method of a head; None where none does."""
    return next((kind for kind in type(head).__mro__ if name in vars(kind)), None)


def _first_two(outputs: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return outputs[0], outputs[1]


def _activated(outputs: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Of a head whose class scores are probabilities already."""
    return [torch.logit(p.float(), eps=1e-6) for p in outputs[0]], outputs[1]


def _with_objectness(outputs: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Of a head that scores a box by class times objectness."""
    scores = [c.float().sigmoid() * o.float().sigmoid() for c, o in zip(outputs[0], outputs[2], strict=True)]
    return [torch.logit(p, eps=1e-6) for p in scores], outputs[1]


def _grid(head: Any, **options: Any) -> Callable[[Sequence[tuple[int, int]], torch.device], list[Tensor]]:
    return lambda sizes, device: list(head.prior_generator.grid_priors(sizes, device=device, **options))


def _by_coder(head: Any) -> Callable[[int, Tensor, Tensor], Tensor]:
    return lambda _, priors, raw: head.bbox_coder.decode(priors, raw)


def _stride(head: Any, level: int) -> int:
    stride = head.prior_generator.strides[level]
    return int(stride[0] if isinstance(stride, tuple | list) else stride)
