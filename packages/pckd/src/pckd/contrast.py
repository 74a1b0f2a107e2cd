"""The contrast of relation vectors, without an N x N tensor: the hot spot of the method.

Shape suffixes: M rows (both halves of the batch), C classes, D columns of the factor, B rows of a block.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 128
"""Rows of a strip of scores (CHUNK, M), or more where that is still small beside A."""
KEPT = 7
"""Exponentials that wait for the backward pass, in sizes of A."""
LOG_2 = math.log(2)


def category_contrast(
    relations: Tensor,
    labels: Tensor,
    tau: float = 4.0,
    tau0: float = 0.07,
    *,
    gram: Tensor | None = None,
    eps: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Supervised contrast of each row against all others, one loss a row.

        S = A A^T / tau,   P(i) = {j != i : y_j = y_i}
        ell_i = (tau / tau0) (log sum_{k != i} exp S_ik  -  mean_{j in P(i)} S_ij)  >=  (tau / tau0) log |P(i)|

    The mean over positives needs class sums only, O(M C). The log-sum-exp runs over strips of the upper triangle; those
    that fit into seven times the size of A wait for the backward pass, which computes the others again, so memory is
    O(M C + chunk M). Not differentiable twice. Always in fp32 at least.

    Args:
        relations: A; rows are not normalized here, as in the authors' code.
        labels: class of each row; each class that occurs has two rows or more.
        tau: temperature.
        tau0: base temperature; the loss is scaled by tau / tau0, 57 by default.
        gram: G, symmetric; the scores are then A G A^T / tau. With A the coordinates of the relation vectors
            in a basis of D vectors and G their Gram matrix, the cost is independent of the number of classes.
        eps: as in the authors' code, which subtracts each row's maximum with the diagonal in it and adds 1e-7 to the sum;
            with large norms the repulsion then vanishes. None is the exact formula above.
        chunk: rows of a strip; changes memory and speed only. 128 by default, or C / 4 if that is more.

    Shapes: (M, C), (M,) -> (M,); with ``gram`` (D, D): (M, D), (M,) -> (M,).

    Raises:
        ValueError: a temperature or the chunk is not positive, or a row has no positive.

    Example:
        >>> category_contrast(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]), tau=1.0, tau0=1.0)  # log 3: all are as near
        tensor([1.0986, 1.0986, 1.0986, 1.0986])
    """
    if not tau > 0 or not tau0 > 0:
        raise ValueError(f"tau and tau0 must be above 0, got {tau} and {tau0}")
    chunk = max(CHUNK, relations.shape[1] // 4) if chunk is None else chunk
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
        lse_M, positive_M, top_M = _Contrast.apply(A_MD, G_DD, y_M, count_M - 1, tau, chunk, eps is not None)
        if eps is not None:
            AG_MD = A_MD.detach() if G_DD is None else A_MD.detach() @ G_DD.detach()
            diagonal_M = (AG_MD * A_MD.detach()).sum(dim=1) / tau
            lse_M = torch.logaddexp(lse_M, torch.maximum(top_M, diagonal_M) + math.log(eps))
        out: Tensor = (tau / tau0) * (lse_M - positive_M)
        return out


class _Strip(NamedTuple):
    """A block of rows with the columns from it on: a part of the upper triangle.

    Attributes:
        rows: the block.
        here: its columns.
        after: those that follow the block.
        numel: of them all.
        place: where it waits among the kept ones; None: nowhere.
    """

    rows: slice
    here: slice
    after: slice
    numel: int
    place: slice | None


def _strips(rows: int, chunk: int, room: int) -> list[_Strip]:
    """The upper triangle, and which strips of it fit into ``room`` numbers."""
    strips, used = [], 0
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        numel = (stop - start) * (rows - start)
        place = slice(used, used + numel) if used + numel <= room else None
        used += numel if place else 0
        strips.append(_Strip(slice(start, stop), slice(start, rows), slice(stop, rows), numel, place))
    return strips


class _Contrast(torch.autograd.Function):
    """For each row: the log-sum-exp over all others, the mean score of its positives, its largest score off the diagonal.

    Only the upper triangle of S is visited, once forward and once backward. While |a_i|_G^2 / tau stays within what exp can
    take, one exponential E_ik = exp S_ik serves the rows i and k, and the strips of E that fit into KEPT times the size of A
    wait for the backward pass, which computes the others again. Beyond, each row has its own maximum, and nothing waits.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, G_DD: Tensor | None, y_M: Tensor, others_M: Tensor, tau: float, chunk: int, tops: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = len(x_MD)
        xG_MD = x_MD if G_DD is None else x_MD @ G_DD
        norm_M = (x_MD * xG_MD).sum(dim=1)
        sums_CD = _class_sums(x_MD, y_M)
        positive_M = ((sums_CD.index_select(0, y_M) * xG_MD).sum(dim=1) - norm_M) / (tau * others_M)
        # room for exp S, for a sum of them, and for one over that sum
        even = bool(norm_M.max() / tau < math.log(torch.finfo(x_MD.dtype).max) - math.log(size) - 3)
        strips = _strips(size, chunk, KEPT * x_MD.numel() if even else 0)
        kept = x_MD.new_empty(sum(strip.numel for strip in strips if strip.place))
        buffer = x_MD.new_empty(max((strip.numel for strip in strips if not strip.place), default=0))
        sum_M, one_M = torch.zeros_like(norm_M), torch.ones_like(norm_M)
        lse_M, top_M = torch.full_like(norm_M, -torch.inf), torch.full_like(norm_M, -torch.inf)
        for strip in strips:
            rows, here, after, _, place = strip
            S_BM = _scores(x_MD, xG_MD, strip, tau, kept[place] if place else buffer)
            B = len(S_BM)
            if tops:
                top_M[rows] = torch.maximum(top_M[rows], S_BM.amax(dim=1))
                top_M[here] = torch.maximum(top_M[here], S_BM.amax(dim=0))
            if even:
                S_BM.exp2_()
                sum_M[rows].addmv_(S_BM, one_M[here])
                sum_M[after].addmv_(S_BM[:, B:].T, one_M[rows])
            else:
                S_BM.mul_(LOG_2)
                lse_M[rows] = torch.logaddexp(lse_M[rows], S_BM.logsumexp(dim=1))
                lse_M[after] = torch.logaddexp(lse_M[after], S_BM[:, B:].logsumexp(dim=0))
        if even:
            lse_M = sum_M.log()
        ctx.save_for_backward(x_MD, G_DD, xG_MD, y_M, others_M, sums_CD, lse_M, kept)
        ctx.tau, ctx.strips, ctx.even = tau, strips, even
        top_M *= LOG_2
        ctx.mark_non_differentiable(top_M)
        return lse_M, positive_M, top_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_M: Tensor, p_M: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, G_DD, xG_MD, y_M, others_M, sums_CD, lse_M, kept = ctx.saved_tensors
        # H is (Q + Q^T) x for a loss of sum_ik Q_ik x_i G x_k: first the log-sum-exp's, then the positives'
        H_MD = _pull(x_MD, xG_MD, lse_M, g_M, kept, ctx.strips, ctx.tau, ctx.even)
        p_M1 = (p_M / (ctx.tau * others_M))[:, None]
        H_MD.addcmul_(p_M1, sums_CD.index_select(0, y_M)).addcmul_(p_M1, x_MD, value=-2)
        H_MD += _class_sums(p_M1 * x_MD, y_M).index_select(0, y_M)
        unknown = (None,) * 5
        if G_DD is None:
            return H_MD, None, *unknown
        return H_MD @ G_DD, x_MD.T @ H_MD / 2, *unknown


def _pull(
    x_MD: Tensor,
    xG_MD: Tensor,
    lse_M: Tensor,
    g_M: Tensor,
    kept: Tensor,
    strips: list[_Strip],
    tau: float,
    even: bool,
) -> Tensor:
    """(dS + dS^T) x / tau with dS_ik = g_i exp(S_ik - lse_i), (M, D)."""
    buffer = x_MD.new_empty(max((strip.numel for strip in strips if not strip.place), default=0))
    other = x_MD.new_empty(strips[0].numel)
    scale = g_M.abs().max().clamp_min(torch.finfo(g_M.dtype).tiny)
    g_M = g_M / scale
    u_M = g_M * (-lse_M).exp()
    H_DM = x_MD.new_zeros(x_MD.shape[1], len(x_MD))  # in this layout the products are faster
    for strip in strips:
        rows, here, after, numel, place = strip
        B = rows.stop - rows.start
        S_BM = kept[place].view(B, -1) if place else _scores(x_MD, xG_MD, strip, tau, buffer)
        dS_BM = other[:numel].view(B, -1)
        if even:
            torch.add(u_M[rows, None], u_M[here], out=dS_BM).mul_(S_BM if place else S_BM.exp2_())
        else:
            S_BM.mul_(LOG_2)
            torch.sub(S_BM, lse_M[rows, None], out=dS_BM).exp_().mul_(g_M[rows, None])
            dS_BM.add_(S_BM.sub_(lse_M[here]).exp_().mul_(g_M[here]))
        H_DM[:, rows].addmm_(x_MD[here].T, dS_BM.T)
        H_DM[:, after].addmm_(x_MD[rows].T, dS_BM[:, B:])
    return H_DM.T.contiguous().mul_(scale / tau)


def _class_sums(x_MD: Tensor, y_M: Tensor) -> Tensor:
    """Sum of the rows of each class, (C, D)."""
    return x_MD.new_zeros(int(y_M.max()) + 1, x_MD.shape[1]).index_add_(0, y_M, x_MD)


def _scores(x_MD: Tensor, xG_MD: Tensor, strip: _Strip, tau: float, place: Tensor) -> Tensor:
    """A strip (B, M) of S / log 2, since a power of two is cheaper than one of e; -inf on its diagonal, that of the whole."""
    left, right = x_MD[strip.rows], xG_MD[strip.here]
    out = place[: strip.numel].view(len(left), -1)
    return torch.addmm(out, left, right.T, beta=0, alpha=1 / (LOG_2 * tau), out=out).fill_diagonal_(-torch.inf)
