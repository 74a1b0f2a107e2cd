"""What no hand looks like: a picture of one even color, or one that is far from every picture that the aligner learned from.

Nothing here detects hands. An aligner gives points for any picture; but the numbers from which it reads them lie elsewhere when
there is no hand, and how far "elsewhere" is can be known from the training's pictures alone.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

FEWEST = 40
"""Pictures below which nothing is said of what is usual."""
SHRINKAGE = 0.3
"""Share of the mean variance that is added to each variance, so that few pictures give an inverse."""
QUANTILE, MARGIN = 0.99, 1.25
"""The bound: this quantile of the training's distances, times a margin, since the aligner has seen those pictures."""
EVEN = 2.5 / 255
"""Standard deviation of the pixels below which a picture is one even color."""


def even(images: Tensor) -> Tensor:
    """Whether each picture is one even color beside its black margins, (B, 3, H, W) in [0, 1] -> (B,) bool.

    Every color has to be even by itself: deviation below 2.5 of 255 levels.
    """
    rows, columns = (_between(images.amax(dims) > 0) for dims in ((1, 3), (1, 2)))
    mask = (rows[:, :, None] & columns[:, None, :])[:, None].to(images)
    count = mask.sum((2, 3)).clamp_min(1)
    mean = (images * mask).sum((2, 3)) / count
    variance = ((images - mean[:, :, None, None]).square() * mask).sum((2, 3)) / count
    return variance.amax(1).sqrt() < EVEN


def _between(lit: Tensor) -> Tensor:
    """From the first to the last place that is not black, (B, N) bool."""
    counts = lit.int()
    return (counts.cumsum(1) > 0) & (counts.flip(1).cumsum(1).flip(1) > 0)


class Familiar(nn.Module):
    """How far a picture is from those that an aligner learned from, as a multiple of what is usual among them.

        d(h)^2 = (h - m)^T (C + 0.3 mean(diag C) I)^-1 (h - m),    unlike(h) = d(h) / (1.25 q)

    h: the last hidden layer of the aligner's last level; m, C: mean and covariance over the training's pictures; q: the 99 %
    quantile of their distances, each measured with m and C of the other people (five folds). Above 1, a picture is unlike them.

    Args:
        size: length of h.

    Shapes: ``features`` (B, H) -> (B,).
    Source: the distance is Lee et al., NeurIPS 2018 (Mahalanobis distance in a hidden layer), with one class; shrinkage, folds
    and margin are choices of ours. It knows what the aligner has learned, not what a hand is: a hand in other light than any
    of the training's is unlike them too.
    """

    mean: Tensor
    precision: Tensor
    bound: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("precision", torch.eye(size))
        self.register_buffer("bound", torch.ones(()))

    @classmethod
    def fit(cls, features: Tensor, groups: Tensor) -> "Familiar | None":
        """From the training's pictures; None where they are fewer than 40, or of one person.

        Args:
            features: (N, H).
            groups: number of the person in each picture, (N,).
        """
        people: Tensor = torch.unique(groups)
        if len(features) < FEWEST or len(people) < 2:
            return None
        features = features.double()
        distances = torch.zeros(len(features), dtype=torch.float64)
        for fold in range(min(5, len(people))):
            own = torch.isin(groups, people[fold :: min(5, len(people))])
            distances[own] = _distance(features[own], *_moments(features[~own]))
        found = cls(features.shape[1])
        mean, precision = _moments(features)
        found.mean.copy_(mean)
        found.precision.copy_(precision)
        found.bound.copy_(MARGIN * distances.quantile(QUANTILE))
        return found

    @override
    def forward(self, features: Tensor) -> Tensor:
        return _distance(features, self.mean, self.precision) / self.bound


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    covariance = torch.cov(features.T)
    ridge = (SHRINKAGE * covariance.diagonal().mean()).clamp_min(1e-12)
    return features.mean(0), torch.linalg.inv(
        covariance + ridge * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    )


def _distance(features: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    away = features - mean
    return ((away @ precision) * away).sum(1).clamp_min(0).sqrt()
