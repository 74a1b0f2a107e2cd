"""The recognizer: aligned crops -> a descriptor per part -> one embedding, and the score of two hands that may be covered."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from handmstn.aligner import AlignedHand, MultiSpatialTransformer
from handmstn.backbones import build_placed, build_pooled
from handmstn.familiar import Familiar
from handmstn.parts import PartSpec
from handmstn.warping import ControlPointGrid, check_finite

SEEN = 0.15
"""Weighted share of the parts below which a hand is "not assessable"."""
BLOCK = 32 * 2**20
"""Bytes of one block of scores."""


@dataclasses.dataclass
class HandEmbedding:
    """What is known of a batch of hands.

    Attributes:
        fused: unit embedding of the whole hand, (B, P D); zero where nothing is seen.
        parts: unit descriptor of each part, (B, P, D).
        visibility: share of each part that is seen, (B, P).
        points: control points in the picture, (B, sum K, 2).
        aligned: what the aligner found; None where points were given.
    """

    fused: Tensor
    parts: Tensor
    visibility: Tensor
    points: Tensor
    aligned: AlignedHand | None


class HandMSTN(nn.Module):
    """Picture -> embedding of the hand: align, crop, describe each part, fuse.

        f = normalize(concat_p sqrt(w_p) f_p),    w = softmax(a)_p v_p, renormalized,    |f_p| = 1

    a are learned: with equal weights the small fingers lower the rank-1 rate, while the palm has to dominate unless it is
    covered. All fingers are one batch of one network; the palm has its own, so that they share no batch norm.

    Args:
        parts: the parts.
        palm: network of the crops whose part says ``net="palm"``.
        finger: network of the other crops.
        dim: size D of a part's descriptor.
        aligner: what finds the points; None where they are always given.
        pretrained: start from the weights that timm publishes (``packaged:`` networks always have theirs).
        places: 0 takes the mean of a network's map; N keeps what lies where in a map of N or more places a side.

    Attributes:
        familiar: what the training's pictures look like to the aligner; None without an aligner, before training, or where they
            were too few.

    Source: fusion, matching and the networks are choices of ours; the paper's abstract says "pretrained CNNs".

    Example:
        >>> parts = preset("hand6", palm_size=32, finger_size=(32, 16))
        >>> aligner = MultiSpatialTransformer(parts, "hand:loc", levels=1, loc_size=64)
        >>> model = HandMSTN(parts, palm="hand:cnn4", finger="hand:cnn4", dim=8, aligner=aligner).eval()
        >>> found = model(torch.rand(2, 3, 96, 96))
        >>> found.fused.shape, found.visibility.shape
        (torch.Size([2, 48]), torch.Size([2, 6]))
    """

    def __init__(
        self,
        parts: Sequence[PartSpec],
        palm: str = "timm:resnet50",
        finger: str = "timm:resnet50",
        dim: int = 512,
        aligner: MultiSpatialTransformer | None = None,
        pretrained: bool = False,
        places: int = 0,
    ) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.dim = dim
        self.aligner = aligner
        self.familiar: Familiar | None = None
        self.grid = ControlPointGrid(self.parts)
        self.batches: list[list[int]] = []
        keys: list[tuple[str, tuple[int, int]]] = []
        self.nets, self.bottlenecks = nn.ModuleList(), nn.ModuleList()
        self.names = nn.ParameterList()
        for number, part in enumerate(self.parts):
            key = (part.net, part.out_size)
            if key not in keys:
                keys.append(key)
                self.batches.append([])
            self.batches[keys.index(key)].append(number)
        for index, (members, (kind, size)) in enumerate(zip(self.batches, keys, strict=True)):
            spec, option = (palm, "--recognizer.palm") if kind == "palm" else (finger, "--recognizer.finger")
            if places:
                net, width, (mean, std) = build_placed(spec, size, places, pretrained=pretrained, option=option)
            else:
                net, width, (mean, std) = build_pooled(spec, size, pretrained=pretrained, option=option)
            self.nets.append(net)
            self.register_buffer(f"mean_{index}", torch.tensor(mean).view(1, -1, 1, 1))
            self.register_buffer(f"std_{index}", torch.tensor(std).view(1, -1, 1, 1))
            self.names.append(nn.Parameter(torch.zeros(len(members), 1, width)))
            self.bottlenecks.append(nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, dim)))
        self.part_logits = nn.Parameter(torch.tensor([0.0 if p.net == "palm" else -1.5 for p in self.parts]))

    @property
    def weights(self) -> Tensor:
        """Learned weight of each part, (P,), of sum 1."""
        return self.part_logits.softmax(0)

    def unlike(self, found: HandEmbedding) -> Tensor:
        """How unlike the training's pictures each one is, (B,): above 1 is no known hand; NaN where that is not known."""
        if self.familiar is None or found.aligned is None:
            return torch.full((len(found.visibility),), float("nan"), device=found.visibility.device)
        distance: Tensor = self.familiar(found.aligned.features)
        return distance

    def describe(self, crops: Sequence[Tensor]) -> Tensor:
        """Descriptor of each part before normalization, (B, P, D), from crops in [0, 1]."""
        batch = crops[0].shape[0]
        found: list[Tensor] = [crops[0]] * len(self.parts)
        for index, members in enumerate(self.batches):
            mean, std = getattr(self, f"mean_{index}"), getattr(self, f"std_{index}")
            stacked = torch.cat([crops[number] for number in members])
            pooled: Tensor = self.nets[index]((stacked - mean) / std)
            pooled = (pooled.view(len(members), batch, -1) + self.names[index]).flatten(0, 1)
            described = self.bottlenecks[index](pooled).view(len(members), batch, self.dim)
            for place, number in enumerate(members):
                found[number] = described[place]
        return torch.stack(found, 1)

    def locate(self, images: Tensor, points: Tensor | None, visibility: Tensor | None) -> HandEmbedding:
        """Points and visibility, found or given; the embedding is not there yet."""
        aligned = None
        if points is None:
            if self.aligner is None:
                raise ValueError("this model has no aligner: give the control points")
            aligned = self.aligner(images)
            points = aligned.points
            visibility = aligned.visibility if visibility is None else visibility
        if visibility is None:
            visibility = images.new_ones(len(images), len(self.parts))
        return HandEmbedding(images, images, visibility, points, aligned)

    def forward(self, images: Tensor, points: Tensor | None = None, visibility: Tensor | None = None) -> HandEmbedding:
        """The embedding of each picture.

        Args:
            images: pixels in [0, 1], (B, 3, H, W), of hands that look like right ones.
            points: control points, where they are known, (B, sum K, 2); the aligner then does not run.
            visibility: of each part, (B, P); 1 where points are given without it.

        Raises:
            ValueError: another number of channels, points that are not finite, or no points and no aligner.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected color pictures (B, 3, H, W), got {tuple(images.shape)}; gray ones need 3 channels"
            )
        found = self.locate(images, points, visibility)
        if not torch.compiler.is_compiling():
            check_finite(found.points, self.parts)
        found.parts = F.normalize(self.describe(self.grid.crops(images, self.grid(found.points))), dim=2)
        found.fused = fuse(found.parts, found.visibility, self.weights)
        return found


def fuse(parts: Tensor, visibility: Tensor, weights: Tensor) -> Tensor:
    """normalize(concat_p sqrt(w_p v_p) f_p): (B, P, D), (B, P), (P,) -> (B, P D); zero where nothing is seen."""
    share = (weights * visibility).clamp_min(1e-12).sqrt()
    share = share * (weights * visibility > 1e-12)
    return F.normalize((share[..., None] * parts).flatten(1), dim=1)


def assessable(visibility: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether enough of each hand is seen to say anything, (B,): weighted visibility of 0.15 or more."""
    seen: NDArray[np.bool_] = visibility @ weights >= SEEN
    return seen


Array = NDArray[np.float32]


def gated(parts: Array, visibility: Array, weights: Array) -> tuple[Array, Array]:
    """The two factors of a score: (B, P D) whose products are its numerator, (B, P) whose products are its denominator."""
    share = np.sqrt(weights)[None] * visibility
    return (share[..., None] * parts).reshape(len(parts), -1), share


def score_block(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Scores of all pairs of two sets of factors from ``gated``, (A, B)."""
    seen = a[1] @ b[1].T
    out: Array = np.divide(a[0] @ b[0].T, seen, out=np.zeros_like(seen), where=seen > 1e-6)
    return out


def match(a: tuple[Array, Array], b: tuple[Array, Array], weights: Array, *, visible: bool = True) -> Array:
    """Scores of all pairs: sum_p w_p v_p(a) v_p(b) cos(f_p(a), f_p(b)) / sum_p w_p v_p(a) v_p(b), (A, B).

    A part that either hand hides counts for neither; two hands without a common part have the score 0.

    Args:
        a: descriptors (A, P, D) of unit length, and visibility (A, P).
        b: likewise.
        weights: weight of each part, (P,).
        visible: False takes every part as seen.

    Example:
        >>> one = np.eye(2, dtype=np.float32)[:, None], np.ones((2, 1), np.float32)
        >>> match(one, one, np.ones(1, np.float32))
        array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    pairs = [(parts, seen if visible else np.ones_like(seen)) for parts, seen in (a, b)]
    return score_block(gated(*pairs[0], weights), gated(*pairs[1], weights))


def part_scores(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Cosine of each part of matching rows, (B, P); NaN where either side hides it (visibility below 0.1)."""
    cosine = np.einsum("bpd,bpd->bp", a[0], b[0])
    hidden = np.minimum(a[1], b[1]) < 0.1
    out: Array = np.where(hidden, np.float32(np.nan), cosine).astype(np.float32)
    return out
