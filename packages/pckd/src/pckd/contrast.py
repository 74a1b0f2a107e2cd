"""The contrast of relation vectors, without an N x N tensor: the hot spot of the method.

Shape suffixes: M rows (both halves of the batch), C classes, D columns of the factor, B rows of a block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128
"""Rows of a strip of scores, (CHUNK, M)."""


def category_contrast(
    relations: Tensor,
    labels: Tensor,
    tau: float = 4.0,
    tau0: float = 0.07,
    *,
    gram: Tensor | None = None,
    eps: float | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Supervised contrast of each row against all others, one loss a row.

        S = A A^T / tau,   P(i) = {j != i : y_j = y_i}
        ell_i = (tau / tau0) (log sum_{k != i} exp S_ik  -  mean_{j in P(i)} S_ij)  >=  (tau / tau0) log |P(i)|

    The mean over positives needs class sums only, O(M C). The log-sum-exp runs over strips of the upper triangle, which
    the backward pass computes again, so memory is O(M C + chunk M). Not differentiable twice. Always in fp32 at least.

    Args:
        relations: A; rows are not normalized here, as in the authors' code.
        labels: class of each row; each class that occurs has two rows or more.
        tau: temperature.
        tau0: base temperature; the loss is scaled by tau / tau0, 57 by default.
        gram: G, symmetric; the scores are then A G A^T / tau. With A the coordinates of the relation vectors
            in a basis of D vectors and G their Gram matrix, the cost is independent of the number of classes.
        eps: as in the authors' code, which subtracts each row's maximum with the diagonal in it and adds 1e-7 to the sum;
            with large norms the repulsion then vanishes. None is the exact formula above.
        chunk: rows of a strip; changes memory and speed only.

    Shapes: (M, C), (M,) -> (M,); with ``gram`` (D, D): (M, D), (M,) -> (M,).

    Raises:
        ValueError: a temperature or the chunk is not positive, or a row has no positive.
    """
    if not tau > 0 or not tau0 > 0:
        raise ValueError(f"tau and tau0 must be above 0, got {tau} and {tau0}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with torch.autocast(relations.device.type, enabled=False):
        A_MD = relations if relations.dtype == torch.float64 else relations.float()
        G_DD = None if gram is None else gram.to(A_MD.dtype)
        classes, y_M = torch.unique(labels, return_inverse=True)
        one_M = torch.ones_like(y_M, dtype=A_MD.dtype)
        count_M = torch.zeros(len(classes), dtype=A_MD.dtype, device=A_MD.device).index_add_(0, y_M, one_M)[y_M]
        if not bool((count_M > 1).all()):
            alone = labels[int((count_M <= 1).nonzero()[0])]
            raise ValueError(f"class {int(alone)} has one row only, so it has no positive")
        AG_MD = A_MD if G_DD is None else A_MD @ G_DD
        sums_CD = A_MD.new_zeros(len(classes), A_MD.shape[1]).index_add(0, y_M, A_MD)
        positive_M = (AG_MD * (sums_CD[y_M] - A_MD)).sum(dim=1) / (tau * (count_M - 1))
        lse_M, top_M = _StreamingLogSumExp.apply(A_MD, G_DD, tau, chunk, eps is not None)
        if eps is not None:
            diagonal_M = (AG_MD * A_MD).sum(dim=1).detach() / tau
            lse_M = torch.logaddexp(lse_M, torch.maximum(top_M, diagonal_M) + math.log(eps))
        out: Tensor = (tau / tau0) * (lse_M - positive_M)
        return out


def _strips(rows: int, chunk: int) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of rows, with the columns from the block on, and those after it: the upper triangle."""
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        yield slice(start, stop), slice(start, rows), slice(stop, rows)


class _StreamingLogSumExp(torch.autograd.Function):
    """lse_i = log sum_{k != i} exp(x_i G x_k / tau); where asked for, each row's largest score off the diagonal, too.

    With s_i = x_i G x_i / (2 tau), the exponent S_ik - s_i - s_k = -|x_i - x_k|_G^2 / (2 tau) is never positive and is the
    same for (i, k) and (k, i): one exponential serves both rows, and two more columns of the factors make it one matrix
    product. Norms that differ so widely that a row's sum could underflow take a second way, with each row's own maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, G_DD: Tensor | None, tau: float, chunk: int, tops: bool
    ) -> tuple[Tensor, Tensor]:
        xG_MD = x_MD if G_DD is None else x_MD @ G_DD
        size = len(x_MD)
        half_M = (x_MD * xG_MD).sum(dim=1) / (2 * tau)
        left_ME, right_ME = _factors(x_MD, xG_MD, half_M, tau)
        buffer = x_MD.new_empty(min(chunk, size) * size)
        shift = half_M.max()
        b_M = (half_M - shift).exp()
        sum_M = torch.zeros_like(b_M)
        top_M = torch.full_like(b_M, -torch.inf)
        for rows, here, after in _strips(size, chunk):
            E_BM = _product(left_ME[rows], right_ME[here], buffer)
            if tops:
                S_BM = E_BM + half_M[rows, None] + half_M[here]
                top_M[rows] = torch.maximum(top_M[rows], S_BM.amax(dim=1))
                top_M[here] = torch.maximum(top_M[here], S_BM.amax(dim=0))
            E_BM.exp_()
            sum_M[rows].addmv_(E_BM, b_M[here])
            sum_M[after].addmv_(E_BM[:, len(E_BM) :].T, b_M[rows])
        ctx.even = bool((sum_M > 1e-30).all())
        lse_M = sum_M.log() + half_M + shift
        if not ctx.even:
            lse_M.fill_(-torch.inf)
            for rows, here, after in _strips(size, chunk):
                S_BM = _product(x_MD[rows] / tau, xG_MD[here], buffer)
                lse_M[rows] = torch.logaddexp(lse_M[rows], S_BM.logsumexp(dim=1))
                lse_M[after] = torch.logaddexp(lse_M[after], S_BM[:, len(S_BM) :].logsumexp(dim=0))
        ctx.save_for_backward(x_MD, G_DD, xG_MD, half_M, lse_M)
        ctx.tau, ctx.chunk = tau, chunk
        ctx.mark_non_differentiable(top_M)
        return lse_M, top_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_M: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, G_DD, xG_MD, half_M, lse_M = ctx.saved_tensors
        size = len(x_MD)
        buffer, other = x_MD.new_empty(2, min(ctx.chunk, size) * size)
        if ctx.even:
            left_ME, right_ME = _factors(x_MD, xG_MD, half_M, ctx.tau)
            shift = half_M.max()
            b_M = (half_M - shift).exp()
            a_M = g_M * (half_M + shift - lse_M).exp()
            ab_M2, ba_M2 = torch.stack([a_M, b_M], dim=1), torch.stack([b_M, a_M], dim=1)
        H_MD = torch.zeros_like(x_MD)  # (dS + dS^T) x, where dS_ik = g_i exp(S_ik - lse_i)
        for rows, here, after in _strips(size, ctx.chunk):
            if ctx.even:
                dS_BM = _product(left_ME[rows], right_ME[here], buffer).exp_()
                outer_BM = other[: dS_BM.numel()].view(dS_BM.shape)
                dS_BM.mul_(torch.mm(ab_M2[rows], ba_M2[here].T, out=outer_BM))
            else:
                S_BM = _product(x_MD[rows] / ctx.tau, xG_MD[here], buffer)
                dS_BM = g_M[rows, None] * (S_BM - lse_M[rows, None]).exp() + g_M[here] * (S_BM - lse_M[here]).exp()
            H_MD[rows].addmm_(dS_BM, x_MD[here])
            H_MD[after].addmm_(dS_BM[:, len(dS_BM) :].T, x_MD[rows])
        H_MD /= ctx.tau
        if G_DD is None:
            return H_MD, None, None, None, None
        return H_MD @ G_DD, x_MD.T @ H_MD / 2, None, None, None


def _product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """A strip (B, M) in a buffer that serves all of them, -inf on its diagonal, which is that of the whole."""
    out = buffer[: len(left) * len(right)].view(len(left), len(right))
    return torch.mm(left, right.T, out=out).fill_diagonal_(-torch.inf)


def _factors(x_MD: Tensor, xG_MD: Tensor, half_M: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Two matrices (M, D + 2) whose product is S_ik - s_i - s_k."""
    one_M1, half_M1 = torch.ones_like(half_M)[:, None], half_M[:, None]
    return torch.cat([x_MD / tau, half_M1, one_M1], dim=1), torch.cat([xG_MD, -one_M1, -half_M1], dim=1)
