"""The contrastive log-likelihood of many pairs without a matrix of all pairs in memory.

Shapes: A anchors, M candidates, D dimensions.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK = 512
"""Anchors that are worked on at once."""


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, positive: Tensor, exclude: Tensor, temperature: float, chunk: int
    ) -> Tensor:
        losses, sums = [], []
        for start in range(0, len(anchors), chunk):
            rows = slice(start, start + chunk)
            logits = _logits(anchors[rows], candidates, exclude[rows], temperature)
            lse = torch.logsumexp(logits, dim=1)
            losses.append(lse - logits.gather(1, positive[rows, None])[:, 0])
            sums.append(lse)
        ctx.save_for_backward(anchors, candidates, positive, exclude, torch.cat(sums))
        ctx.temperature, ctx.chunk = temperature, chunk
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchors, candidates, positive, exclude, sums = ctx.saved_tensors
        grad = grads[0] / ctx.temperature
        to_anchors = torch.empty_like(anchors) if ctx.needs_input_grad[0] else None
        to_candidates = torch.zeros_like(candidates) if ctx.needs_input_grad[1] else None
        for start in range(0, len(anchors), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            p = _logits(anchors[rows], candidates, exclude[rows], ctx.temperature)
            p.sub_(sums[rows, None]).exp_()
            p.scatter_add_(1, positive[rows, None], -torch.ones_like(p[:, :1]))
            p.mul_(grad[rows, None])
            if to_anchors is not None:
                torch.mm(p, candidates, out=to_anchors[rows])
            if to_candidates is not None:
                to_candidates.addmm_(p.T, anchors[rows])
        return to_anchors, to_candidates, None, None, None, None


def _logits(anchors: Tensor, candidates: Tensor, exclude: Tensor, temperature: float) -> Tensor:
    logits = anchors @ candidates.T
    logits.div_(temperature)
    held = exclude >= 0
    if bool(held.any()):
        rows = held.nonzero()[:, 0]
        logits[rows, exclude[held]] = -torch.inf
    return logits


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    *,
    exclude: Tensor | None = None,
    temperature: float,
    chunk: int = CHUNK,
) -> Tensor:
    """Loss of each anchor against its positive among the candidates.

        l_k = -log( exp(<a_k, c_pos(k)> / T) / sum_{m != exclude(k)} exp(<a_k, c_m> / T) )

    Work goes chunk by chunk and once more backward, so memory is O(chunk M) instead of O(A M). Not differentiable twice.
    Autocast is left: logits are in float32 at least.

    Args:
        anchors: (A, D), of unit length where cosines are meant.
        candidates: (M, D).
        positive: candidate that belongs to each anchor (A,) int64.
        exclude: candidate that an anchor is not compared with, such as itself; -1 for none (A,).
        temperature: T.
        chunk: anchors at once.

    Shapes: -> (A,).

    Raises:
        ValueError: a temperature or a chunk that is not positive.

    Source: van den Oord et al., arXiv 1807.03748; SimCLR, arXiv 2002.05709, where a view is not compared with itself.
    """
    if not temperature > 0 or chunk < 1:
        raise ValueError(f"temperature and chunk must be positive, got {temperature} and {chunk}")
    with torch.autocast(anchors.device.type, enabled=False):
        kind = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
        none = torch.full_like(positive, -1) if exclude is None else exclude
        out: Tensor = _InfoNCE.apply(
            anchors.to(kind), candidates.to(kind), positive, none, float(temperature), int(chunk)
        )
        return out
