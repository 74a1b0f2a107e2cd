"""The contrast of relation vectors, without an N x N tensor: the hot spot of the method.

Shape suffixes: M rows (both halves of the batch), C classes, D columns of the factor, B rows of a block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 512
"""Rows of a block; a tile of scores is CHUNK x CHUNK."""
KEPT_BYTES = 16 * 2**20
"""Exponentials of no more than this are kept for the backward pass; beyond, it computes them again."""


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

    The mean over positives needs class sums only, O(M C). The log-sum-exp runs over tiles of the upper triangle, which
    the backward pass computes again beyond 16 MiB, so memory is O(M C + chunk^2). Not differentiable twice. Always in
    fp32 at least.

    Args:
        relations: A; rows are not normalized here, as in the authors' code.
        labels: class of each row; each class that occurs has two rows or more.
        tau: temperature.
        tau0: base temperature; the loss is scaled by tau / tau0, 57 by default.
        gram: G, symmetric; the scores are then A G A^T / tau. With A the coordinates of the relation vectors
            in a basis of D vectors and G their Gram matrix, the cost is independent of the number of classes.
        eps: as in the authors' code, which subtracts each row's maximum with the diagonal in it and adds 1e-7 to the sum;
            with large norms the repulsion then vanishes. None is the exact formula above.
        chunk: rows of a block; changes memory and speed only.

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


def _tiles(rows: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows and columns of the upper triangle."""
    starts = range(0, rows, chunk)
    for first, i in enumerate(starts):
        for j in starts[first:]:
            yield slice(i, min(i + chunk, rows)), slice(j, min(j + chunk, rows))


class _Products:
    """Tiles of L R^T in one buffer, that is used again for the next tile; -inf on the diagonal of the whole."""

    def __init__(self, left: Tensor, right: Tensor, chunk: int) -> None:
        self.left, self.right = left, right
        side = min(chunk, len(left))
        self.buffer = left.new_empty(side * side)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """L[rows] R[columns]^T."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = self.buffer[: height * width].view(height, width)
        torch.mm(self.left[rows], self.right[columns].T, out=out)
        return out.fill_diagonal_(-torch.inf) if rows == columns else out


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
        products = _Products(left_ME, right_ME, chunk)
        shift = half_M.max()
        b_M = (half_M - shift).exp()
        sum_M = torch.zeros_like(b_M)
        top_M = torch.full_like(b_M, -torch.inf)
        keep = size * (size + chunk) // 2 * x_MD.element_size() <= KEPT_BYTES and (
            x_MD.requires_grad or (G_DD is not None and G_DD.requires_grad)
        )
        kept = []
        for rows, columns in _tiles(size, chunk):
            E_BB = products.tile(rows, columns)
            if tops:
                S_BB = E_BB + half_M[rows, None] + half_M[columns]
                top_M[rows] = torch.maximum(top_M[rows], S_BB.amax(dim=1))
                top_M[columns] = torch.maximum(top_M[columns], S_BB.amax(dim=0))
            E_BB.exp_()
            sum_M[rows].addmv_(E_BB, b_M[columns])
            if rows != columns:
                sum_M[columns].addmv_(E_BB.T, b_M[rows])
            if keep:
                kept.append(E_BB.clone())
        ctx.even = bool((sum_M > 1e-30).all())
        lse_M = sum_M.log() + half_M + shift
        if not ctx.even:
            lse_M.fill_(-torch.inf)
            products = _Products(x_MD / tau, xG_MD, chunk)
            for rows, columns in _tiles(size, chunk):
                S_BB = products.tile(rows, columns)
                lse_M[rows] = torch.logaddexp(lse_M[rows], S_BB.logsumexp(dim=1))
                if rows != columns:
                    lse_M[columns] = torch.logaddexp(lse_M[columns], S_BB.logsumexp(dim=0))
        ctx.save_for_backward(x_MD, G_DD, xG_MD, half_M, lse_M, *(kept if ctx.even else ()))
        ctx.tau, ctx.chunk = tau, chunk
        ctx.mark_non_differentiable(top_M)
        return lse_M, top_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_M: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, G_DD, xG_MD, half_M, lse_M, *kept = ctx.saved_tensors
        shift = half_M.max()
        factors = _factors(x_MD, xG_MD, half_M, ctx.tau) if ctx.even else (x_MD / ctx.tau, xG_MD)
        products = _Products(factors[0], factors[1], ctx.chunk)
        b_M = (half_M - shift).exp()
        a_M = g_M * (half_M + shift - lse_M).exp()
        ab_M2, ba_M2 = torch.stack([a_M, b_M], dim=1), torch.stack([b_M, a_M], dim=1)
        outer = g_M.new_empty(products.buffer.shape)
        H_MD = torch.zeros_like(x_MD)  # (dS + dS^T) x, where dS_ik = g_i exp(S_ik - lse_i)
        for number, (rows, columns) in enumerate(_tiles(len(x_MD), ctx.chunk)):
            if not ctx.even:
                S_BB = products.tile(rows, columns)
                dS_BB = g_M[rows, None] * (S_BB - lse_M[rows, None]).exp()
                dS_BB += g_M[columns] * (S_BB - lse_M[columns]).exp()
            else:
                E_BB = kept[number] if kept else products.tile(rows, columns).exp_()
                dS_BB = outer[: E_BB.numel()].view(E_BB.shape)
                torch.mm(ab_M2[rows], ba_M2[columns].T, out=dS_BB).mul_(E_BB)
            H_MD[rows].addmm_(dS_BB, x_MD[columns])
            if rows != columns:
                H_MD[columns].addmm_(dS_BB.T, x_MD[rows])
        H_MD /= ctx.tau
        if G_DD is None:
            return H_MD, None, None, None, None
        return H_MD @ G_DD, x_MD.T @ H_MD / 2, None, None, None


def _factors(x_MD: Tensor, xG_MD: Tensor, half_M: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Two matrices (M, D + 2) whose product is S_ik - s_i - s_k."""
    one_M1, half_M1 = torch.ones_like(half_M)[:, None], half_M[:, None]
    return torch.cat([x_MD / tau, half_M1, one_M1], dim=1), torch.cat([xG_MD, -one_M1, -half_M1], dim=1)
