"""From the quality of pairs to the weight of each pair's loss."""

import warnings
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tenfold import distributed

Scope = Literal["local", "global"]


def pair_weights(quality: Tensor, gamma: float = 1.0, scope: Scope = "global", mask: Tensor | None = None) -> Tensor:
    """Weights of mean 1 that raise pairs of high quality.

        e_i = exp(gamma (q_i - max q)),    w_i = e_i / mean_j e_j

    Equal to n softmax(gamma q), but exactly 1 where all qualities are equal, since the mean of ones is 1 for every n; the
    order of the authors' code (e / sum * n) and log-sum-exp miss 1 by a bit for some n. No gradient goes through them.

    Args:
        quality: q, (n,).
        gamma: sharpness; 0 weighs all pairs alike. 1 in GenView, 2 in GenView++.
        scope: mean over this process's pairs, or over those of all processes, so that the result does not depend on how
            many devices share a batch. All processes then have to call, each with any number of pairs of 1 or more.
        mask: pairs that are weighted (n,); the others get weight 1 and have no part in the mean.

    Shapes: (n,) -> (n,) float32, or float64 for such qualities.

    Raises:
        ValueError: qualities that are not a vector, NaN, or a mask of another shape.

    Source: GenView, ECCV 2024, quality-driven contrastive loss.

    Example:
        >>> pair_weights(torch.zeros(3)), pair_weights(torch.tensor([0.0, 1.0])).mean()
        (tensor([1., 1., 1.]), tensor(1.))
    """
    if quality.ndim != 1 or (mask is not None and mask.shape != quality.shape):
        shapes = f"{tuple(quality.shape)}" + ("" if mask is None else f" and mask {tuple(mask.shape)}")
        raise ValueError(f"quality must be a vector (n,), and mask of its shape, got {shapes}")
    q = quality.detach()
    q = q if q.dtype == torch.float64 else q.float()
    if bool(torch.isnan(q).any()):
        raise ValueError("quality holds NaN")
    chosen = torch.ones_like(q, dtype=torch.bool) if mask is None else mask.bool()
    if gamma == 0:
        return torch.ones_like(q)
    top = torch.where(chosen, gamma * q, -torch.inf).amax() if len(q) else q.new_tensor(-torch.inf)
    together = scope == "global" and distributed.world_size() > 1
    if together:
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    if torch.isneginf(top):
        return torch.ones_like(q)
    e = torch.where(chosen, (gamma * q - top).exp(), 0)
    total, count = e.sum(), chosen.sum()
    if together:
        sums = distributed.all_reduce_sums({"total": total, "count": count})
        total, count = sums["total"], sums["count"]
    return torch.where(chosen, e / (total / count), 1.0)


def effective_share(weights: Tensor) -> float:
    """Share of the batch that weights leave in effect, (sum w)^2 / (n sum w^2): 1 for equal weights, 1 / n for a single one."""
    w = weights.detach().double()
    return float(w.sum() ** 2 / (len(w) * (w * w).sum()))


def check_weight(weight: Tensor | None, pairs: int, *, device: torch.device) -> Tensor | None:
    """A weight of each pair as a loss can use it; None where none is given.

    Raises:
        ValueError: another number of weights than pairs, negative or NaN ones, or nothing but zeros.
    """
    if weight is None:
        return None
    if weight.shape != (pairs,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({pairs},): one per pair")
    if weight.requires_grad:
        warnings.warn("weight requires a gradient, which a loss does not pass on: it is detached", stacklevel=3)
    w = weight.detach().to(device)
    if not bool((w >= 0).all()):
        raise ValueError("weight holds negative numbers or NaN")
    if len(w) and not bool(w.any()):
        raise ValueError("all weights are 0: nothing would be learned")
    return w


def weighted_mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of the pairs' losses, each times its weight; bit-identical to the plain mean for weights of 1."""
    return losses.mean() if weight is None else (losses * weight.to(losses.dtype)).mean()
