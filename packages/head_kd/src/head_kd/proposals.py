"""A dense head as a proposal network, in plain torch: boxes of a whole batch at once, each with where it comes from.

Letters: N images, L levels, A anchors of a cell, C classes, H and W cells of a level, K boxes, M rows.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor

Decoder = Callable[[int, Tensor, Tensor], Tensor]
"""(level, priors (M, P), raw box predictions (M, D)) -> boxes (M, 4) as x1, y1, x2, y2."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The cell and anchor that each of M boxes was predicted by; level -1 where it was predicted by none.

    Shapes: all (M,) int64.
    """

    level: Tensor
    y: Tensor
    x: Tensor
    anchor: Tensor

    def __len__(self) -> int:
        return len(self.level)

    def __getitem__(self, rows: Tensor) -> "Provenance":
        return Provenance(self.level[rows], self.y[rows], self.x[rows], self.anchor[rows])

    @classmethod
    def none(cls, count: int, device: torch.device | str = "cpu") -> "Provenance":
        """Provenance of ``count`` boxes that no cell predicted, such as ground truth."""
        missing = torch.full((count,), -1, dtype=torch.int64, device=device)
        return cls(missing, missing, missing, missing)

    @classmethod
    def cat(cls, parts: Sequence["Provenance"]) -> "Provenance":
        """All rows, one part after the other."""
        fields = ("level", "y", "x", "anchor")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


@dataclasses.dataclass(frozen=True)
class Proposals:
    """The proposals of one image, by falling score."""

    boxes: Tensor  # (K, 4)
    scores: Tensor  # (K,)
    provenance: Provenance


@torch.no_grad()
def dense_proposals(
    class_logits: Sequence[Tensor],
    box_predictions: Sequence[Tensor],
    priors: Sequence[Tensor],
    decode: Decoder,
    image_sizes: Sequence[tuple[int, int]],
    *,
    nms_pre: int = 2000,
    iou_threshold: float = 0.7,
    max_per_image: int = 1000,
    min_size: float = 0,
) -> list[Proposals]:
    """Proposals of each image from the class logits of a dense head.

    A box's score is the sigmoid of its highest class logit. Of each level and image the best ``nms_pre`` are decoded,
    clipped to the image, freed of boxes not larger than ``min_size``, and thinned by NMS within the level; the best
    ``max_per_image`` over all levels stay. No gradient passes.

    Args:
        class_logits: logits of each level (N, A*C, H, W), anchor-major, without a background class.
        box_predictions: raw boxes of each level (N, A*D, H, W).
        priors: anchors or points of each level (H*W*A, P), ordered (y*W + x)*A + a.
        decode: turns priors and predictions into boxes.
        image_sizes: height and width of each image before padding.
        nms_pre: boxes per level and image that are decoded (the authors' code: 2000, and 0.7 and 1000 for the next two).
        iou_threshold: overlap above which NMS drops a box.
        max_per_image: largest number of boxes per image.
        min_size: side in pixels that a box must exceed.

    Source: the authors' code, which takes the student's head as a region proposal network; the batched form is ours.
    """
    images = len(image_sizes)
    device = class_logits[0].device
    limits = torch.tensor([[w, h, w, h] for h, w in image_sizes], dtype=torch.float32, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    widths, anchors = [], []
    for level, (logits, predictions, prior) in enumerate(zip(class_logits, box_predictions, priors, strict=True)):
        n, _, height, width = logits.shape
        cells = height * width
        a = len(prior) // cells
        widths.append(width)
        anchors.append(a)
        best = logits.float().view(n, a, -1, cells).amax(dim=2).sigmoid()  # (N, A, HW)
        flat = best.transpose(1, 2).reshape(n, cells * a)
        scores, index = flat.topk(min(nms_pre, cells * a), dim=1)  # (N, K), sorted
        image = torch.arange(n, device=device)[:, None].expand_as(index)
        raw = predictions.float().view(n, a, -1, cells)[image, index % a, :, index // a]  # (N, K, D)
        boxes = decode(level, prior[index.flatten()].float(), raw.flatten(0, 1)).view(n, -1, 4)
        boxes = torch.minimum(boxes.clamp_min(0), limits[:, None])
        large = ((boxes[..., 2:] - boxes[..., :2]) > min_size).all(dim=-1)
        # boxes too small sink to the end with a score that no sigmoid has
        parts.append((boxes, scores.where(large, scores.new_full((), -1.0)), index))
    boxes, scores, index = (torch.cat([part[field] for part in parts], dim=1) for field in range(3))
    levels = torch.cat([torch.full_like(part[2][0], number) for number, part in enumerate(parts)])
    order = scores.argsort(dim=1, descending=True, stable=True)
    valid = (scores >= 0).sum(dim=1).tolist()
    a_of, w_of = (torch.tensor(values, device=device) for values in (anchors, widths))
    out = []
    for i in range(images):
        rows = order[i, : valid[i]]
        rows = rows[_best_after_nms(boxes[i, rows], scores[i, rows], levels[rows], iou_threshold, max_per_image)]
        at, flat = levels[rows], index[i, rows]
        cell = flat // a_of[at]
        where = Provenance(at, cell // w_of[at], cell % w_of[at], flat % a_of[at])
        out.append(Proposals(boxes[i, rows], scores[i, rows], where))
    return out


def _best_after_nms(boxes: Tensor, scores: Tensor, levels: Tensor, iou_threshold: float, count: int) -> Tensor:
    """The first ``count`` rows that NMS within each level keeps, of rows sorted by falling score.

    Whether a box stays depends on better ones alone, so NMS of a prefix gives a prefix of the whole's result. A prefix
    somewhat longer than ``count`` is tried first, then one twice as long: the cost is quadratic in the length.
    """
    length = count + count // 4
    while True:
        part = levels[:length]
        kept = []
        for level in sorted(set(part.tolist())):
            rows = (part == level).nonzero().squeeze(1)
            kept.append(rows[torchvision.ops.nms(boxes[rows], scores[rows], iou_threshold)])
        rows = torch.cat(kept).sort().values if kept else part.new_zeros(0)
        if len(rows) >= count or length >= len(levels):
            return rows[:count]
        length *= 2


def gather_at(maps: Sequence[Tensor], image: Tensor, where: Provenance) -> Tensor:
    """The feature vectors of the cells that boxes come from; its gradient goes to these cells alone.

    Args:
        maps: feature maps of each level (N, C, H, W).
        image: (M,) int64, number of each row's image.
        where: M cells; every level must be 0 or more.

    Returns:
        (M, C), row m is ``maps[level_m][image_m, :, y_m, x_m]``.
    """
    rows = [(where.level == level).nonzero().squeeze(1) for level in range(len(maps))]
    parts = [m[image[r], :, where.y[r], where.x[r]] for m, r in zip(maps, rows, strict=True)]
    order = torch.cat(rows)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return torch.cat(parts)[place]


def center_locations(boxes: Tensor, strides: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Provenance:
    """A cell for any box: the level whose stride fits its size, and the cell at its center.

        level = argmin_l | log2( sqrt(area) / (8 stride_l) ) |,   cell = floor(center / stride)

    It serves boxes that no cell predicted (ground truth, cached boxes). Anchor 0 stands for all.

    Args:
        boxes: boxes (M, 4).
        strides: strides of the levels.
        sizes: height and width of the levels, to which cells are clamped.

    Source: ours; the measure is a RetinaNet anchor of 8 strides.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-3).prod(dim=1).sqrt()
    fitting = torch.tensor([math.log2(8 * stride) for stride in strides], device=boxes.device)
    level = (side.log2()[:, None] - fitting).abs().argmin(dim=1)
    stride = torch.tensor(strides, dtype=boxes.dtype, device=boxes.device)[level]
    limit = torch.tensor(sizes, device=boxes.device)[level] - 1
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    x = (center[:, 0] / stride).floor().long().clamp_min(0).minimum(limit[:, 1])
    y = (center[:, 1] / stride).floor().long().clamp_min(0).minimum(limit[:, 0])
    return Provenance(level, y, x, torch.zeros_like(level))
