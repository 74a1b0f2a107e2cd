"""Drop components of every layer: what the context-oriented decomposition keeps, seen without any training."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.context import ContextStats
from corda.moments import DampedCovariance
from corda.targets import writable_weights
from tenfold import UserError
from tenfold.errors import did_you_mean

Method = Literal["svd", "asvd", "cosvd"]
METHODS = get_args(Method)


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
        alpha: exponent of ``asvd`` (0.5 in its paper). The paper scales by the mean of |x| of a channel; here it is the
            root mean square, which the second moment holds.
        damping: damping of C.

    Raises:
        UserError: ``drop`` is out of range, a covariance is missing, or the method or power is none of the choices.

    Source: Yang et al., NeurIPS 2024, Figure 2; Yuan et al., "ASVD", arXiv 2312.05821.
    """
    options = {"power": power, "alpha": alpha, "damping": damping}
    return truncations(weight, covariance, [drop], method=method, **options)[0]


def truncations(
    weight: Tensor,
    covariance: Tensor | None,
    drops: Sequence[int],
    *,
    method: Method = "cosvd",
    power: float = 1.0,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> list[Tensor]:
    """``truncate`` for several numbers of dropped components, by one decomposition.

    Args:
        weight: as for ``truncate``.
        covariance: as for ``truncate``.
        drops: the numbers.
        method: as for ``truncate``.
        power: as for ``truncate``.
        alpha: as for ``truncate``.
        damping: as for ``truncate``.

    Raises:
        UserError: as for ``truncate``.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
    init = CordaInit(power=power, damping=damping)
    size = min(weight.shape)
    for drop in drops:
        if not 0 <= drop <= size:
            raise UserError(f"{drop} components cannot be dropped from a layer that has {size}")
    if method != "svd" and covariance is None:
        raise UserError(f"method {method} needs a covariance")
    if not any(drops):
        return [weight for _ in drops]
    W = weight.double()
    if method == "asvd":
        assert covariance is not None
        rms = covariance.double().diagonal().clamp_min(0).sqrt()
        scale = rms.clamp_min(1e-6 * rms.max()).pow(alpha).to(W)
        U, S, Vh = torch.linalg.svd(W * scale, full_matrices=False)
        parts = [((U[:, : size - drop] * S[: size - drop]) @ Vh[: size - drop] / scale) for drop in drops]
        return [part.to(weight.dtype) if drop else weight for part, drop in zip(parts, drops, strict=True)]
    M = W
    if method == "cosvd" and init.power:
        assert covariance is not None
        context = DampedCovariance(covariance.to(W), init.damping)
        M = context.after(W) if power == 1 else W @ context.cholesky
    U = torch.linalg.svd(M, full_matrices=False).U
    lefts = [U[:, : size - drop] for drop in drops]
    return [(U @ (U.T @ W)).to(weight.dtype) if drop else weight for U, drop in zip(lefts, drops, strict=True)]


def output_error(weight: Tensor, truncated: Tensor, covariance: Tensor) -> float:
    """|(W - W') X| / |W X| = sqrt(tr(D C D^T) / tr(W C W^T)) with D = W - W': the error of the layer's outputs.

    Args:
        weight: W (m, n).
        truncated: W' (m, n).
        covariance: C (n, n), undamped.
    """
    W = weight.double()
    D, C = W - truncated.double(), covariance.to(W)
    lost, whole = (((part @ C) * part).sum().clamp_min(0) for part in (D, W))
    return float((lost / whole).sqrt()) if whole > 0 else 0.0


def truncate_model(
    model: nn.Module,
    stats: ContextStats | None,
    drop: int | float,
    *,
    targets: Sequence[str] | None = None,
    method: Method = "cosvd",
    power: float = 1.0,
    alpha: float = 0.5,
    damping: float = 0.01,
) -> dict[str, int]:
    """Truncate every target in place.

    Args:
        model: its targeted weights change.
        stats: of this model before any change; None for ``svd``.
        drop: an int is the number of components that each layer loses (16 to 1024 in the paper's Figure 2), a float
            their share, in [0, 1], rounded down to a number. 1 is one component, 1.0 all of them.
        targets: layer names; default: those of the statistics.
        method: as for ``truncate``.
        power: as for ``truncate``.
        alpha: as for ``truncate``.
        damping: as for ``truncate``.

    Returns:
        Layer -> number of components that it has lost.

    Raises:
        UserError: as for ``truncate``, or statistics of another model; then no weight has changed.
    """
    if isinstance(drop, float) and not 0 <= drop <= 1:
        raise UserError(f"drop is a share of the components, from 0 to 1, or their number as an int; got {drop}")
    if stats is not None:
        stats.check_model(model)
    if targets is None:
        if stats is None:
            raise UserError("without statistics, name the targets")
        targets = stats.targets
    layers = writable_weights(model, targets)
    counts = {}
    for name, weight in layers.items():
        size = min(weight.shape)
        counts[name] = int(drop * size + 1e-9) if isinstance(drop, float) else drop
        if not 0 <= counts[name] <= size:
            raise UserError(f"layer {name}: {drop} components cannot be dropped from a layer that has {size}")
        if stats is not None:
            stats.covariance(name)  # says which layer has no statistics, before any weight changes
    with torch.no_grad():
        for name, weight in layers.items():
            covariance = stats.covariance(name) if stats else None
            options = {"power": power, "alpha": alpha, "damping": damping}
            weight.copy_(truncate(weight, covariance, counts[name], method=method, **options))
    return counts
