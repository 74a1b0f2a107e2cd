"""The losses: identity (cross-entropy or ArcFace), batch-hard triplet, centers, points, bending, visibility, and their sum.

Losses of embeddings are called as those of pytorch-metric-learning, ``loss(embeddings, labels, indices_tuple)``, and mix with
them. Letters of shapes: B pictures, D dimensions, C classes, P parts, K control points.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Indices = tuple[Tensor, ...]


class SoftmaxHead(nn.Module):
    """Cross-entropy of a linear classifier, with label smoothing.

    Args:
        num_classes: C.
        dim: D.
        smoothing: share of the target that is spread over all classes.

    Shapes: embeddings (B, D), labels (B,) -> scalar.

    Example:
        >>> SoftmaxHead(num_classes=3, dim=8)(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, dim: int, smoothing: float = 0.1) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.05)
        self.smoothing = smoothing
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices | None = None) -> Tensor:
        """The loss; ``indices_tuple`` of a miner has no part in it."""
        return F.cross_entropy(self.scale * self.classifier(embeddings), labels, label_smoothing=self.smoothing)


def arc_logits(cosine: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """s cos(theta + m) for the target where theta < pi - m, else s (cos theta - m sin m); s cos theta for the others.

    At theta = pi - m the target's logit jumps down by s (1 - cos m - m sin m) in size; it falls strictly on both sides.

    Source: ArcFace, CVPR 2019, Eq. 3, and its released code beyond pi - m.
    """
    target = cosine.float().gather(1, labels[:, None])
    sine = (1 - target.square()).clamp_min(1e-7).sqrt()
    inside = target * math.cos(margin) - sine * math.sin(margin)
    beyond = target - margin * math.sin(margin)
    moved = torch.where(target > -math.cos(margin), inside, beyond).to(cosine.dtype)
    return scale * cosine.scatter(1, labels[:, None], moved)


class ArcMarginHead(nn.Module):
    """Cross-entropy of cosines with an additive angular margin (ArcFace).

    Args:
        num_classes: C.
        dim: D.
        scale: s.
        margin: m in radians; 0 is the scaled cosine softmax.

    Shapes: embeddings (B, D), labels (B,) -> scalar.

    Example:
        >>> ArcMarginHead(num_classes=3, dim=8)(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, dim: int, scale: float = 30.0, margin: float = 0.5) -> None:
        super().__init__()
        if not 0 <= margin < math.pi / 2:
            raise ValueError(f"margin must be in [0, pi/2), got {margin}")
        self.weight = nn.Parameter(torch.randn(num_classes, dim) * 0.05)
        self.scale, self.margin = scale, margin

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices | None = None) -> Tensor:
        """The loss; ``indices_tuple`` of a miner has no part in it."""
        cosine = F.linear(F.normalize(embeddings, dim=1), F.normalize(self.weight, dim=1))
        return F.cross_entropy(arc_logits(cosine, labels, self.scale, self.margin), labels)


class BatchHardTriplet(nn.Module):
    """mean over anchors of max(0, margin + d(farthest of its class) - d(nearest of another)), or its soft form.

    Args:
        margin: in the units of the Euclidean distance; 0 takes the soft form log(1 + exp(d_ap - d_an)).

    Shapes: embeddings (B, D), labels (B,) -> scalar. With the triplets of a miner, (anchors, positives, negatives) of equal
    length or (anchors, positives, anchors, negatives), those are taken instead of the hardest.

    Raises (forward):
        ValueError: a batch with one class only.

    Source: Hermans et al., arXiv 1703.07737, Eq. 5.

    Example:
        >>> embeddings = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
        >>> BatchHardTriplet(margin=0.3)(embeddings, torch.tensor([0, 0, 1, 1]))  # far enough apart
        tensor(0.)
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def _penalty(self, gap: Tensor) -> Tensor:
        return F.relu(gap + self.margin).mean() if self.margin else F.softplus(gap).mean()

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices | None = None) -> Tensor:
        """The loss."""
        squared = (embeddings[:, None] - embeddings[None]).square().sum(-1)
        distance = (squared + 1e-12).sqrt()
        if indices_tuple is not None:
            anchor, positive, *rest = indices_tuple
            if len(rest) == 1:
                return self._penalty(distance[anchor, positive] - distance[anchor, rest[0]])
            far = torch.full((len(labels),), -math.inf, device=labels.device, dtype=distance.dtype)
            near = torch.full_like(far, math.inf)
            far = far.scatter_reduce(0, anchor, distance[anchor, positive], "amax")
            near = near.scatter_reduce(0, rest[0], distance[rest[0], rest[1]], "amin")
            both = torch.isfinite(far) & torch.isfinite(near)
            return self._penalty(far[both] - near[both]) if bool(both.any()) else embeddings.sum() * 0
        same = labels[:, None] == labels[None]
        if bool(same.all()):
            raise ValueError("a triplet needs two identities in a batch, this one has one")
        far = distance.masked_fill(~same, -math.inf).amax(1)
        near = distance.masked_fill(same, math.inf).amin(1)
        return self._penalty(far - near)


class CenterLoss(nn.Module):
    """1/2 mean |f - c_y|^2, with centers that move by themselves: c_y <- c_y - a sum_{i of y} (c_y - f_i) / (1 + n_y).

    The centers are a buffer, updated in each training forward after the loss has been taken.

    Args:
        num_classes: C.
        dim: D.
        rate: a.

    Shapes: embeddings (B, D), labels (B,) -> scalar.
    Source: Wen et al., ECCV 2016, Eq. 2 to 4.

    Example:
        >>> CenterLoss(num_classes=2, dim=2)(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))  # the centers begin at 0: 25 / 2
        tensor(12.5000)
    """

    centers: Tensor

    def __init__(self, num_classes: int, dim: int, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("centers", torch.zeros(num_classes, dim))

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Indices | None = None) -> Tensor:
        """The loss; ``indices_tuple`` of a miner has no part in it."""
        centers = self.centers
        own = centers[labels].clone()
        if self.training:
            with torch.no_grad():
                gap = torch.zeros_like(centers).index_add_(0, labels, own - embeddings.detach().to(centers))
                count = torch.bincount(labels, minlength=len(centers)).to(centers)
                centers -= self.rate * gap / (1 + count)[:, None]
        return 0.5 * (embeddings - own).square().sum(1).mean()


def point_loss(
    points: Tensor, target: Tensor, counted: Tensor, distance: Literal["squared", "plain"] = "squared"
) -> Tensor:
    """Weighted mean of squared errors, or of distances, in half widths of the picture: (B, K, 2), (B, K, 2), (B, K) -> scalar.

    Points that are not known (NaN) are to have weight 0; a batch without any gives 0.
    """
    gap = torch.where(counted[..., None] > 0, points - target, torch.zeros_like(points))
    each = gap.square().sum(-1)
    each = each if distance == "squared" else (each + 1e-8).sqrt()
    return (each * counted).sum() / counted.sum().clamp_min(1e-6)


def visibility_loss(logits: Tensor, visibility: Tensor) -> Tensor:
    """Binary cross-entropy with shares as targets; unknown ones (NaN) are left out: (B, P), (B, P) -> scalar."""
    known = torch.isfinite(visibility)
    each = F.binary_cross_entropy_with_logits(
        logits, torch.where(known, visibility, torch.zeros_like(visibility)), reduction="none"
    )
    return (each * known).sum() / known.sum().clamp_min(1)


class IdentityLoss(nn.Module):
    """The losses of embeddings, weighted; a term of weight 0 is not made, not computed, and leaves no graph.

    L = identity L_id(fused) + part sum_p v_p L_id(part p) / sum_p v_p + triplet L_tri(fused) + center L_cen(fused)

    Args:
        weights: by term: identity, part, triplet, center.
        num_classes: C.
        part_dim: size of a part's descriptor.
        num_parts: P.
        kind: softmax (cross-entropy) or arcface.
        smoothing: label smoothing of softmax.
        scale: s of ArcFace.
        margin: m of ArcFace.
        triplet_margin: margin of the triplets.
        center_rate: a of the centers.

    Source: "multiple loss functions" is the paper's abstract; which ones, and their weights, are choices of ours.

    Example:
        >>> losses = IdentityLoss({"identity": 1.0, "triplet": 1.0, "part": 0.0, "center": 0.0}, 2, part_dim=4, num_parts=3)
        >>> found = losses(torch.randn(4, 12), torch.randn(4, 3, 4), torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))
        >>> sorted(found)
        ['identity', 'triplet']
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        num_classes: int,
        part_dim: int,
        num_parts: int,
        kind: str = "softmax",
        smoothing: float = 0.1,
        scale: float = 30.0,
        margin: float = 0.5,
        triplet_margin: float = 0.3,
        center_rate: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights = {name: float(value) for name, value in weights.items() if value}
        fused = part_dim * num_parts

        def head(dim: int) -> nn.Module:
            if kind == "arcface":
                return ArcMarginHead(num_classes, dim, scale, margin)
            return SoftmaxHead(num_classes, dim, smoothing)

        made: dict[str, nn.Module] = {}
        if "identity" in self.weights:
            made["identity"] = head(fused)
        if "part" in self.weights:
            made["part"] = nn.ModuleList(head(part_dim) for _ in range(num_parts))
        if "triplet" in self.weights:
            made["triplet"] = BatchHardTriplet(triplet_margin)
        if "center" in self.weights:
            made["center"] = CenterLoss(num_classes, fused, center_rate)
        self.terms = nn.ModuleDict(made)

    def forward(self, fused: Tensor, parts: Tensor, visibility: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Each term before its weight, by name: (B, P D), (B, P, D), (B, P), (B,)."""
        found: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if name == "part":
                assert isinstance(term, nn.ModuleList)
                found[name] = self._of_parts(term, parts, visibility, labels)
            else:
                found[name] = term(fused, labels)
        return found

    def _of_parts(self, heads: nn.ModuleList, parts: Tensor, visibility: Tensor, labels: Tensor) -> Tensor:
        """Mean over parts of the loss on the pictures that show the part, weighted by its visibility in the batch."""
        total, weight = parts.new_zeros(()), parts.new_zeros(())
        for number, head in enumerate(heads):
            shown = visibility[:, number] > 0.1
            if not bool(shown.any()):
                continue
            share = visibility[:, number].detach().mean()
            total = total + share * head(parts[shown, number], labels[shown])
            weight = weight + share
        return total / weight.clamp_min(1e-6)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return sum_weighted(terms, self.weights)


def sum_weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """sum of weight x term over the terms that are there.

    Raises:
        ValueError: there is no term at all.
    """
    values: Sequence[Tensor] = [weights[name] * value for name, value in terms.items() if weights.get(name)]
    if not values:
        raise ValueError("every loss has the weight 0: nothing is learned")
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
