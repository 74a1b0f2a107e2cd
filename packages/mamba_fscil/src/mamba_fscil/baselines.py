"""Classifiers that learn nothing but class means: the nearest mean, and calibrated means."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NearestClassMean:
    """Cosines of a feature with the mean feature of each class.

    Attributes:
        prototypes: (K, c), of any length.

    Source: Mensink et al., Distance-based image classification, TPAMI 2013; with cosines as in CEC, CVPR 2021.

    Example:
        >>> NearestClassMean(torch.eye(3))(torch.tensor([[0.0, 2.0, 0.0]])).argmax(1)
        tensor([1])
    """

    prototypes: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Shapes: ``features`` (B, c) -> (B, K)."""
        return F.normalize(features, dim=1) @ F.normalize(self.prototypes, dim=1).t()


def calibrated(prototypes: Tensor, base_classes: int, *, share: float = 0.5, sharpness: float = 16.0) -> Tensor:
    """Means of few pictures, each moved toward the base means that it resembles.

        p_n <- share p_n + (1 - share) sum_b softmax_b(sharpness cos(p_b, p_n)) p_b

    Args:
        prototypes: mean features, base classes first.
        base_classes: number of base classes, whose means stay.
        share: how much of a novel mean is kept.
        sharpness: inverse temperature of the weights.

    Shapes: ``prototypes`` (K, c) -> (K, c).

    Source: TEEN, arXiv 2312.05229, Eq. 8 and 9, with its defaults.
    """
    base, novel = prototypes[:base_classes], prototypes[base_classes:]
    alike = F.normalize(novel, dim=1) @ F.normalize(base, dim=1).t()
    return torch.cat([base, share * novel + (1 - share) * torch.softmax(sharpness * alike, dim=1) @ base])


def teen(prototypes: Tensor, base_classes: int) -> NearestClassMean:
    """The nearest of calibrated means, see ``calibrated``.

    Source: TEEN, arXiv 2312.05229.
    """
    return NearestClassMean(calibrated(prototypes, base_classes))
