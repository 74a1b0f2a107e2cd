"""Drop components of every layer: what the context-oriented decomposition keeps, seen without any training."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from corda.context import ContextStats
from corda.solvers import DampedCovariance
from corda.targets import linear
from tenfold import UserError

Method = Literal["svd", "asvd", "cosvd"]


def truncate(
    weight: Tensor,
    covariance: Tensor | None,
    drop: int,
    *,
    method: Method = "cosvd",
    power: float = 1.0,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> Tensor:
    """W without its ``drop`` smallest components.

        svd:    U_p U_p^T W, U_p the leading left singular vectors of W
        cosvd:  the same with those of W C_d^power (power 1: CorDA; 0.5: the least error of the layer's outputs)
        asvd:   the leading components of W S, times S^-1, with S = diag(rms of each input channel)^alpha

    Args:
        weight: W (m, n).
        covariance: C (n, n) undamped; not needed by ``svd``.
        drop: q in [0, min(m, n)]; 0 returns W itself, bit for bit.
        method: see above.
        power: p, for ``cosvd``.
        alpha: of ``asvd`` (0.5 in its paper). Its paper scales by the mean of |x| of a channel; here it is the root
            mean square, which the second moment holds.
        damping: of C.

    Raises:
        UserError: ``drop`` is out of range, or a covariance is missing.

    Source: Yang et al., NeurIPS 2024, Figure 2; Yuan et al., "ASVD", arXiv 2312.05821.
    """
    size = min(weight.shape)
    if not 0 <= drop <= size:
        raise UserError(f"{drop} components cannot be dropped from a layer that has {size}")
    if method != "svd" and covariance is None:
        raise UserError(f"method {method} needs a covariance")
    if drop == 0:
        return weight
    W = weight.double()
    if method == "asvd":
        assert covariance is not None
        rms = covariance.double().diagonal().clamp_min(0).sqrt()
        scale = rms.clamp_min(1e-6 * rms.max()).pow(alpha).to(W)
        U, S, Vh = torch.linalg.svd(W * scale, full_matrices=False)
        kept = size - drop
        restored = (U[:, :kept] * S[:kept]) @ Vh[:kept] / scale
        return restored.to(weight.dtype)
    M = W
    if method == "cosvd" and power:
        assert covariance is not None
        context = DampedCovariance(covariance.to(W), damping)
        M = W @ (context.matrix if power == 1 else context.cholesky)
    left = torch.linalg.svd(M, full_matrices=False).U[:, : size - drop]
    return (left @ (left.T @ W)).to(weight.dtype)


def truncate_model(
    model: nn.Module,
    stats: ContextStats | None,
    drop: float,
    *,
    targets: Sequence[str] | None = None,
    method: Method = "cosvd",
    power: float = 1.0,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> None:
    """Truncate every target in place.

    Args:
        model: its targeted weights change.
        stats: of this model before any change; None for ``svd``.
        drop: share of the components of each layer, in [0, 1]; the number is rounded down.
        targets: layer names; default: those of the statistics.
        method: as for ``truncate``.
        power: likewise.
        alpha: likewise.
        damping: likewise.
    """
    if not 0 <= drop <= 1:
        raise UserError(f"drop is a share of the components, from 0 to 1, got {drop}")
    if stats is not None:
        stats.check_model(model)
    if targets is None:
        if stats is None:
            raise UserError("without statistics, name the targets")
        targets = stats.targets
    with torch.no_grad():
        for name in targets:
            weight = linear(model, name).weight
            covariance = stats.covariance(name) if stats else None
            count = int(drop * min(weight.shape) + 1e-9)
            options = {"power": power, "alpha": alpha, "damping": damping}
            weight.copy_(truncate(weight, covariance, count, method=method, **options))
