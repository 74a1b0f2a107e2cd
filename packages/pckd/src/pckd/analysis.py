"""What a training did to features, centers and samples, as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pckd.config import PCKDConfig


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows, in percent, whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def fisher_ratio(features: Tensor, labels: Tensor) -> float:
    """Scatter between the class means over the scatter within the classes (traces); higher is better separated.

    Features are brought to unit length first, so that their scale does not count. (N, D), (N,).
    """
    x = F.normalize(features.double(), dim=1)
    between = within = 0.0
    for label in torch.unique(labels):
        members = x[labels == label]
        center = members.mean(dim=0)
        between += len(members) * float((center - x.mean(dim=0)).square().sum())
        within += float((members - center).square().sum())
    return between / max(within, 1e-12)


def center_correlation(student: Tensor, teacher: Tensor) -> float:
    """Pearson correlation of the cosines between category centers, student's (C, S) against teacher's (C, T)."""
    above = torch.triu_indices(len(student), len(student), 1)
    cosines = [(c @ c.T)[above[0], above[1]] for c in (F.normalize(w.double(), dim=1) for w in (student, teacher))]
    return float(torch.corrcoef(torch.stack(cosines))[0, 1]) if len(cosines[0]) > 1 else 1.0


def most_previewed(
    preview: Sequence[Mapping[str, NDArray[Any]]],
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Images from the most to the least held back, with their mean weight and mean difficulty over epochs and trainings.

    Ties in weight go by difficulty, so the order also says something for methods without weights.
    """
    weight = np.nanmean(np.concatenate([p["weights"] for p in preview]).astype(np.float64), axis=0)
    gamma = np.nanmean(np.concatenate([p["gamma"] for p in preview]).astype(np.float64), axis=0)
    return np.lexsort((-gamma, weight)), weight, gamma


def floor(config: PCKDConfig, labels: Tensor, views: int) -> float:
    """Least value of the category contrast for these labels: 2 (tau / tau0) mean log |P(i)|, which is not zero."""
    counts = torch.bincount(labels)[labels].double() * views * 2 - 1
    return float(2 * config.tau / config.tau0 * counts.log().mean())
