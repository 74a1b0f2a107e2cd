"""What CorDA++ decides by: the singular values of each layer, and how compact its input's covariance is. Experimental.

Experimental because the paper's equations are second-hand; see ``corda.plus``.

Symbols as in ``corda.solvers``: W (m, n), C (n, n), C_d = C + lambda I, M = W C_d^p, k = min(m, n), sigma_1 >= ... >= sigma_k
the singular values of M.
"""

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.context import ContextStats
from corda.moments import DampedCovariance
from corda.targets import resolve_targets, weight_of
from tenfold import NonFiniteError, UserError

if TYPE_CHECKING:
    from peft import LoraConfig


def compactness(covariance: Tensor | DampedCovariance, out_features: int, damping: float = CordaInit.damping) -> float:
    """pi(C) of a layer's input; lower is more compact. Experimental.

        pi(C) = sqrt(d_out sigma_max) / sigma_min      of C_d / mean(diag C_d)

    From the paper: the formula, from the bound |dY|_1 <= pi(C) sigma on how far outputs move when the component of singular
    value sigma is dropped. Ours: C_d instead of C, since pi of a rank-deficient C is infinite, and its normalization to a
    mean diagonal of 1. Unnormalized, pi(c C) = pi(C) / sqrt(c): with enough tokens log pi would turn negative, which
    reverses every score that it multiplies. Normalized, sigma_max >= 1 >= sigma_min, so pi >= sqrt(d_out) >= 1 always.

    Args:
        covariance: C (n, n) undamped, or a ``DampedCovariance``, which brings its own damping.
        out_features: d_out, rows of the weight.
        damping: delta, relative to the mean of the diagonal, for a plain C.

    Raises:
        UserError: C is not square or has no positive diagonal.
        NonFiniteError: NaN or infinity in C.

    Source: arXiv 2506.13187, second-hand.
    """
    return pi_of(extreme_eigenvalues(as_damped(covariance, damping)), out_features)


def as_damped(covariance: Tensor | DampedCovariance, damping: float) -> DampedCovariance:
    """The covariance, damped if it is not yet."""
    return covariance if isinstance(covariance, DampedCovariance) else DampedCovariance(covariance, damping)


def extreme_eigenvalues(context: DampedCovariance) -> tuple[float, float]:
    """sigma_max and sigma_min of C_d / mean(diag C_d), held to the bounds that they obey in exact arithmetic."""
    C_d = context.times(torch.eye(context.size, dtype=torch.float64))
    mean = C_d.diagonal().mean().item()
    values = torch.linalg.eigvalsh(C_d)
    return max(values[-1].item() / mean, 1.0), min(max(values[0].item(), context.damping) / mean, 1.0)


def pi_of(extremes: tuple[float, float], out_features: int) -> float:
    """``compactness`` from the ``extreme_eigenvalues``."""
    largest, smallest = extremes
    pi = math.sqrt(out_features * largest) / smallest
    assert pi >= 1, "log pi < 0, in spite of the normalization"
    return pi


def spectrum(weight: Tensor, context: DampedCovariance | None, power: float = 1.0) -> Tensor:
    """All singular values of M = W C_d^p, (k,) fp64, descending. Experimental.

    By LAPACK's SVD of M without vectors. Measured against 60 digits (``mpmath``), with cond(C) from 1e3 to 1e12: the
    relative error of the worst value, the smallest, stays below 0.1 eps cond(M), 2e-13 at cond(M) = 1e4 and 1e-10 at 8e6;
    eigenvalues of the Gram matrix of M were off by 9e-10 and 3e-4. Taking eigenvalues of M's Gram matrix for the upper half
    and of the inverse's for the lower half agrees with the SVD to 2e-11 at cond(M) = 8e6, but takes 0.8 to 1.4 times its
    time (1536 x 512, 512 x 2048, 768 x 768; one thread), loses in the middle what the SVD loses at the end, and fails for a
    rank-deficient weight: it is not worth a second implementation.

    Args:
        weight: W (m, n), any float dtype.
        context: C_d of the layer's input; None with ``power=0``.
        power: p: 1, 0.5 or 0.

    Raises:
        UserError: the covariance is missing or does not fit the weight, or another power.
        NonFiniteError: NaN or infinity in the weight or the covariance.
    """
    M = _operator(weight, context, power)
    return torch.linalg.svdvals(M if M.shape[0] >= M.shape[1] else M.T.contiguous())


def _operator(weight: Tensor, context: DampedCovariance | None, power: float) -> Tensor:
    """W C_d^p in fp64; for p = 1/2, W times the Cholesky factor, which has the same singular values and left vectors."""
    CordaInit(power=power)
    if weight.ndim != 2:
        raise UserError(f"a weight is a matrix, got shape {tuple(weight.shape)}")
    W = weight.detach().double()
    if not torch.isfinite(W.sum()):
        raise NonFiniteError("the weight holds NaN or infinity")
    if power == 0:
        return W
    if context is None:
        raise UserError(f"power {power} needs a covariance")
    if context.size != W.shape[1]:
        raise UserError(f"a covariance of {context.size} inputs does not fit a weight of {W.shape[1]} inputs")
    return context.after(W) if power == 1 else W @ context.cholesky.to(W)


def component_energies(
    weight: Tensor, covariance: Tensor, *, power: float = 1.0, damping: float = CordaInit.damping
) -> Tensor:
    """Exact contribution of each component to the layer's output energy: (k,) fp64, in the order of ``spectrum``. Experimental.

        e_i = |u_i u_i^T W X|_F^2 = u_i^T W C W^T u_i,      sum_i e_i = tr(W C W^T)

    u_i is the i-th left singular vector of M; C is undamped. Ours; the paper orders components by a bound on these. The
    order is that of sigma_i, so the energies need not descend.

    Args:
        weight: W (m, n).
        covariance: C (n, n), undamped.
        power: p of M.
        damping: delta of C_d in M.

    Raises:
        UserError: shapes do not fit, another power, or C has no positive diagonal.
        NonFiniteError: NaN or infinity in the weight or the covariance.
    """
    context = DampedCovariance(covariance, damping)
    left = torch.linalg.svd(_operator(weight, context, power), full_matrices=False).U
    parts_kn = left.T @ weight.detach().double()
    return ((parts_kn @ covariance.to(parts_kn)) * parts_kn).sum(dim=1).clamp_min(0)


@dataclasses.dataclass(frozen=True)
class LayerSpectra:
    """What ``corda.plus.allocate_ranks`` decides by, layer -> value. Experimental.

    Attributes:
        spectra: sigma (k,), descending.
        compactness: pi.
        shapes: (m, n).
    """

    spectra: dict[str, Tensor]
    compactness: dict[str, float]
    shapes: dict[str, tuple[int, int]]


def layer_spectra(
    model: nn.Module, stats: ContextStats, lora_config: "LoraConfig", init: CordaInit | None = None
) -> LayerSpectra:
    """Spectra, compactness and shapes of all layers that ``lora_config`` targets. Experimental.

    Args:
        model: the plain base model; stays untouched.
        stats: statistics of this model, as collected or as selected.
        lora_config: its targets are used, not its ranks.
        init: ``power`` and ``damping`` are used; default ``CordaInit()``.

    Raises:
        UserError: statistics of another model, or a layer without statistics.
        NonFiniteError: NaN or infinity, with the layer's name.
    """
    init = init or CordaInit()
    stats.check_model(model)
    targets = list(resolve_targets(model, lora_config))
    spectra, pis, shapes = {}, {}, {}
    for leader in dict.fromkeys([stats.group(name) for name in targets]):
        context = DampedCovariance(stats.covariance(leader), init.damping)
        extremes = extreme_eigenvalues(context)
        for name in (name for name in targets if stats.groups[name] == leader):
            weight = weight_of(model, name)
            try:
                spectra[name] = spectrum(weight, context, init.power)
            except UserError as error:
                raise type(error)(f"layer {name}: {error}") from error
            pis[name] = pi_of(extremes, weight.shape[0])
            shapes[name] = (weight.shape[0], weight.shape[1])
    return LayerSpectra(
        {name: spectra[name] for name in targets},
        {name: pis[name] for name in targets},
        {name: shapes[name] for name in targets},
    )
