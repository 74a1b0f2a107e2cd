"""The pure core: weights and a covariance in, the adapter's factors out.

With M = W C_d^p and C_d = C + lambda I, CorDA adapts the components of W along r left singular vectors U of M: the leading
ones (IPM) or the trailing ones (KPM). Since U^T M = Sigma V^T, the published product B A = U Sigma V^T C_d^-p equals
U U^T W: neither the inverse of C_d, nor V, nor any other component of M is needed, and the residual W - B A is the
projection (I - U U^T) W. KPM works with inverses after all, in fp64 and through triangular factors, because the trailing
components of M are the leading ones of its inverse and only there accurate.

Shapes: W is (m, n) = (out, in) as in ``nn.Linear``; C is (n, n) over the layer's inputs; A is (r, n), B is (m, r).
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from corda.config import CordaInit
from tenfold import NonFiniteError, UserError

BLOCK = 16
"""Columns that the randomised solver adds at a time are a multiple of this: matrix products are efficient from there on."""
STRIP = 256
"""Rows of a matrix that are worked on at a time where no second copy of all of it is to be made."""
ENERGY_TOLERANCE = 1e-10
"""The randomised solver takes its last step when the captured energy has no more than this share left to gain,"""
COMPONENT_TOLERANCE = 1e-7
"""and the energy of each single component no more than this share of its own."""


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer at its start: scaling * B A = U U^T W.

    Attributes:
        A: (r, n), fp32 (fp64 for fp64 weights).
        left: (m, r) orthonormal, likewise: U, the adapted left singular vectors of M. The sign is fixed so that the entry
            of largest magnitude of each is positive.
        lengths: (r,) of the columns of B = U diag(lengths), which is not kept beside U: the factors of all layers wait in
            memory until the last one is solved.
        sigma: (r,) their singular values, in descending order; zero where ``power`` and damping make none.
        solver: ``randomized``, ``exact``, ``inverse`` (KPM) or ``lapack_svd``.
        precision: ``fp32`` or ``fp64``, that the solve was done in.
        null: directions in which W itself is zero, so that they would contribute nothing to B A. They are the smallest
            components of a rank-deficient W, and left out unless ``skip_null`` says otherwise.
        iterations: blocks of the randomised solver's space; 0 for a direct solver.
    """

    A: Tensor
    left: Tensor
    lengths: Tensor
    sigma: Tensor
    solver: str
    precision: str
    null: int = 0
    iterations: int = 0

    @property
    def B(self) -> Tensor:  # noqa: N802
        """(m, r), in memory of its own."""
        return self.left * self.lengths

    @property
    def energy(self) -> float:
        """|U^T M|_F^2 = sum of sigma^2, that the adapted components hold of |M|_F^2."""
        return self.sigma.double().square().sum().item()


@dataclass(frozen=True)
class CrossMoment:
    """W C of one layer, in place of C: enough for power 1, since M = W C_d = W C + lambda W.

    Attributes:
        product: W C (m, n), undamped.
        trace: tr C, so that lambda = delta * trace / n.
    """

    product: Tensor
    trace: float

    def damped(self, W: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
        """M = W C + lambda W (m, n), in the dtype asked for.

        Raises:
            UserError: all inputs were zero.
            NonFiniteError: NaN or infinity.
        """
        mean = _positive_mean(self.trace / W.shape[1])
        M = _checked(self.product.to(W.device, dtype, copy=True), "cross moment")
        for start in range(0, len(M), STRIP):  # torch converts all of W to fp64 otherwise
            rows = slice(start, start + STRIP)
            M[rows].add_(W[rows], alpha=damping * mean)
        return M


class DampedCovariance:
    """C_d = C + damping * mean(diag C) I, with what several layers of one input share: its Cholesky factor and inverse.

    Args:
        covariance: (n, n) symmetric, positive semi-definite, undamped; kept, not copied.
        damping: delta, relative to the mean of the diagonal (0.01 in the authors' code; fixed here, since without an
            inverse in fp32 there is nothing that doubling it would repair: cond(C_d) <= 1 + n / delta).

    Attributes:
        damping: lambda = delta * mean(diag C).

    Raises:
        UserError: C has no positive diagonal (no token has reached the layer, or all inputs are zero).
        NonFiniteError: C holds NaN or infinity (on its diagonal; off it, at first use).
    """

    def __init__(self, covariance: Tensor, damping: float) -> None:
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise UserError(f"a covariance is square, got shape {tuple(covariance.shape)}")
        self.damping = damping * _positive_mean(covariance.diagonal().double().mean().item())
        self._covariance = covariance

    @property
    def size(self) -> int:
        """n, the number of input features."""
        return self._covariance.shape[0]

    def times(self, matrix: Tensor) -> Tensor:
        """C_d ``matrix``, in the dtype of the matrix."""
        return _product(self._like(matrix), matrix).add_(matrix, alpha=self.damping)

    def after(self, matrix: Tensor) -> Tensor:
        """``matrix`` C_d, likewise."""
        return self.times(matrix.T).T

    def _like(self, matrix: Tensor) -> Tensor:
        return (self._double if matrix.dtype == torch.float64 else self._single).to(matrix.device)

    @cached_property
    def _single(self) -> Tensor:
        return _checked(self._covariance.float(), "covariance")

    @cached_property
    def _double(self) -> Tensor:
        return _checked(self._covariance.double(), "covariance")

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular L with C_d = L L^T, in fp64."""
        return self._factor()

    @cached_property
    def inverse(self) -> Tensor:
        """C_d^-1 in fp64, from the Cholesky factor, whose memory it takes."""
        return _inverse_from_cholesky(self._factor())

    def _factor(self) -> Tensor:
        damped = self._double.clone(memory_format=torch.contiguous_format)
        damped.diagonal().add_(self.damping)
        return _cholesky(damped)


Context = DampedCovariance | CrossMoment | None


def _positive_mean(mean: float) -> float:
    if not math.isfinite(mean):
        raise NonFiniteError("the covariance holds NaN or infinity")
    if mean <= 0:
        raise UserError("the covariance has no positive diagonal: all inputs were zero")
    return mean


def factorize(
    weight: Tensor,
    covariance: Tensor | DampedCovariance | CrossMoment | None,
    rank: int,
    init: CordaInit | None = None,
    *,
    scaling: float = 1.0,
) -> Factors:
    """The factors of one layer.

        IPM:  U = the r leading left singular vectors of W C_d^p;      KPM:  the r trailing ones
        balance="paper":     B = U Sigma^(1/2) / sqrt(s),              A = Sigma^(-1/2) U^T W / sqrt(s)
        balance="balanced":  B = U diag(sqrt t) / sqrt(s),             A = diag(1 / sqrt t) U^T W / sqrt(s),  t_i = |u_i^T W|

    Args:
        weight: W (m, n), any float dtype.
        covariance: C (n, n) undamped, a ``DampedCovariance`` that several layers share, or with ``power=1`` the layer's
            ``CrossMoment``; None with ``power=0``.
        rank: r, at most min(m, n).
        init: mode, power, damping, balance, solver, precision; default ``CordaInit()``.
        scaling: s, LoRA's factor in front of B A.

    Returns:
        ``Factors``; s B A = U U^T W whatever the balance.

    Raises:
        UserError: the rank is above min(m, n) or above the rank of W, or shapes do not fit.
        NonFiniteError: NaN or infinity in the weight or the covariance.

    Source: Yang et al., "CorDA", NeurIPS 2024, Eq. 4 and 5 and section 3.2; p = 1/2 minimises the error of the layer's
    outputs (SVD-LLM, COALA), p = 0 is PiSSA (IPM) and MiLoRA (KPM). The identity B A = U U^T W and the solvers on the
    inverse side are ours.
    """
    init = init or CordaInit()
    if weight.ndim != 2:
        raise UserError(f"a weight is a matrix, got shape {tuple(weight.shape)}")
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise UserError(f"rank {rank} of a {m} x {n} layer: expected 1 to {min(m, n)}")
    context = _context(covariance, init, m, n)
    solver: str = init.solver
    if solver == "auto":
        few = 4 * (rank + BLOCK) < min(m, n)
        solver = "randomized" if init.mode == "ipm" and few else "exact"
    if solver == "exact" and init.mode == "ipm":
        double = True  # the Gram matrix squares the singular values: in fp32 everything below 2e-4 sigma_1 is noise
    elif init.precision == "auto":
        double = init.mode == "kpm" or weight.dtype == torch.float64
    else:
        double = init.precision == "fp64"
    with matmul_precision(tf32=False), _scipy_alone() if double and _on_cpu(weight) else contextlib.nullcontext():
        _checked(weight, "weight")
        return _solve(weight, torch.float64 if double else torch.float32, context, rank, init, solver, scaling)


def _solve(
    W: Tensor, dtype: torch.dtype, context: Context, rank: int, init: CordaInit, solver: str, scaling: float
) -> Factors:
    """In ``dtype``, to which each step converts W for itself: one copy less while the others need the memory."""
    null = iterations = 0
    if solver == "randomized":
        found = _randomized(W.to(dtype), context, init, rank)
        if found:
            left, sigma, iterations = found
        else:
            solver, dtype = "exact", torch.float64
    if solver == "lapack_svd":
        left, sigma = _lapack_svd(_operator(W, context, init, dtype), init, rank)
    elif solver == "exact" and init.mode == "ipm":
        left, sigma = _exact_leading(_operator(W, context, init, dtype), rank)
    elif solver == "exact":
        solver = "inverse"
        left, sigma, null = _inverse_trailing(W, context, init, rank, dtype)
    out = torch.float64 if W.dtype == torch.float64 else torch.float32
    A, left, lengths, sigma = (part.to(out) for part in _assemble(W.to(dtype), left, sigma, init, scaling))
    precision = "fp64" if dtype == torch.float64 else "fp32"
    for factor in (A, left, lengths):
        _checked(factor, f"solution of {solver} in {precision}")
    return Factors(A, left, lengths, sigma, solver, precision, null, iterations)


def _checked(matrix: Tensor, name: str) -> Tensor:
    """``matrix``, if it holds no NaN and no infinity: either would reach its sum (which its values do not overflow)."""
    if not torch.isfinite(matrix.sum(dtype=torch.float32 if matrix.element_size() < 4 else None)):
        raise NonFiniteError(f"the {name} holds NaN or infinity")
    return matrix


def _context(covariance: Tensor | Context, init: CordaInit, m: int, n: int) -> Context:
    if init.power == 0:
        return None
    if covariance is None:
        raise UserError(f"power {init.power} needs a covariance")
    if isinstance(covariance, CrossMoment):
        if init.power != 1:
            raise UserError(
                f"a cross moment serves power 1 only, got power {init.power}; collect with accumulate='cov'"
            )
        if covariance.product.shape != (m, n):
            shape = " x ".join(map(str, covariance.product.shape))
            raise UserError(f"a cross moment of {shape} does not fit a weight of {m} x {n}")
        return covariance
    context = covariance if isinstance(covariance, DampedCovariance) else DampedCovariance(covariance, init.damping)
    if context.size != n:
        raise UserError(f"a covariance of {context.size} inputs does not fit a weight of {n} inputs")
    return context


def _root(block: Tensor, context: DampedCovariance | None, power: float, *, transposed: bool = False) -> Tensor:
    """F ``block`` or F^T ``block``, F F^T = C_d^(2p): F is C_d itself, its Cholesky factor (p = 1/2), or I."""
    if context is None:
        return block
    if power == 0.5:
        factor = context.cholesky.to(block)
        return _product(factor.T if transposed else factor, block)
    return context.times(block)


def _operator(W: Tensor, context: Context, init: CordaInit, dtype: torch.dtype) -> Tensor:
    """M = W F (m, n), in memory of its own. Its left singular vectors and singular values are those of W C_d^p.

    They are, since M M^T is the same.
    """
    if context is None:
        return W.to(dtype, copy=True)
    if isinstance(context, CrossMoment):
        return context.damped(W, init.damping, dtype)
    W = W.to(dtype)
    return _product(W, context.cholesky.to(W)) if init.power == 0.5 else context.after(W)


def _width(rank: int) -> int:
    """Columns of the randomised solver's block: no fewer than the components that are sought."""
    return -(-rank // BLOCK) * BLOCK


def _randomized(W: Tensor, context: Context, init: CordaInit, rank: int) -> tuple[Tensor, Tensor, int] | None:
    """Leading left singular vectors from a randomised block Krylov space; M = W F itself is formed of a cross moment only.

    The space is that of M M^T (m <= n) or of M^T M, the smaller one. Each step multiplies a block of columns by F, W and
    their transposes and orthogonalises it against all earlier ones. Rayleigh and Ritz: with Q the basis, the leading
    eigenpairs of (M^T Q)^T (M^T Q). Only this last product of small matrices is done in fp64 (it squares the singular
    values), for the rest fp32 is enough. Energies are second order in the error of the vectors, and settle a step before
    the vectors have the precision of fp32: one step more is taken then. None when half of the whole space does not suffice.
    """
    m, n = W.shape
    width, size = _width(rank), min(m, n)

    outer, inner = (
        (context.damped(W, init.damping, W.dtype), None) if isinstance(context, CrossMoment) else (W, context)
    )

    def times(block: Tensor) -> Tensor:
        return outer @ _root(block, inner, init.power)

    def transposed(block: Tensor) -> Tensor:
        return _root((block.T @ outer).T, inner, init.power, transposed=True)

    forward, back = (transposed, times) if m <= n else (times, transposed)
    generator = torch.Generator().manual_seed(init.seed)
    sample = torch.randn(max(m, n), width, generator=generator, dtype=W.dtype).to(W.device)
    basis = block = _orthonormal(back(sample))
    images = torch.empty(max(m, n), 0, dtype=torch.float64, device=W.device)  # those of the basis under M^T, or M
    gram = torch.empty(0, 0, dtype=torch.float64, device=W.device)
    history: list[Tensor] = []
    last = False
    while True:
        image = forward(block)
        images = torch.cat([images, image.double()], dim=1)
        strip = images.T @ images[:, -width:]
        gram = torch.cat([torch.cat([gram, strip[:-width]], dim=1), strip.T])
        if last:
            break
        history.append(torch.linalg.eigvalsh(gram)[-rank:].flip(0).clamp_min(0))
        last = _settled(history, torch.finfo(W.dtype).eps)
        if 2 * (len(gram) + width) > size:
            return None
        after = back(image)
        for _ in range(2):  # once is not enough in fp32
            after = after - basis @ (basis.T @ after)
        block = _orthonormal(after)
        basis = torch.cat([basis, block], dim=1)
    values, vectors = torch.linalg.eigh(gram)
    vectors = vectors[:, -rank:].flip(1)
    left = basis @ vectors.to(basis) if m <= n else _orthonormal(images @ vectors).to(W.dtype)
    return left, values[-rank:].flip(0).clamp_min(0).sqrt(), len(gram) // width


def _settled(history: list[Tensor], eps: float) -> bool:
    """Whether the energies (r,) of the components have hardly anything left to gain.

    Gains shrink from step to step by a factor q or faster, so what remains after a gain g is no more than g q / (1 - q);
    gains within rounding, eps sigma sigma_1, count as none.
    """
    if len(history) < 3:
        return False
    first, second, last = history[-3:]
    before, gain = (second - first).clamp_min(0), (last - second).clamp_min(0)
    q = gain / before.clamp_min(torch.finfo(before.dtype).tiny)
    remaining = torch.where(q < 1, gain * q / (1 - q), torch.inf)
    remaining = torch.where(gain <= 8 * eps * (last * last[0]).sqrt(), 0.0, remaining)
    return bool((remaining.sum() <= ENERGY_TOLERANCE * last.sum()) & (remaining <= COMPONENT_TOLERANCE * last).all())


def _exact_leading(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors from the fp64 Gram matrix of the smaller side."""
    if M.shape[0] <= M.shape[1]:
        values, left = _leading_eigenpairs(gram(M), rank)
        return left, values.clamp_min(0).sqrt()
    values, right = _leading_eigenpairs(gram(M.T), rank)
    return _orthonormal(_product(M, right)), values.clamp_min(0).sqrt()


def _lapack_svd(M: Tensor, init: CordaInit, rank: int) -> tuple[Tensor, Tensor]:
    """The published way to the singular vectors, for comparison: all of them, then crop."""
    left, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    chosen = slice(None, rank) if init.mode == "ipm" else slice(len(sigma) - rank, None)
    return left[:, chosen], sigma[chosen]


def _inverse_trailing(
    W: Tensor, context: Context, init: CordaInit, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Trailing left singular vectors as the leading ones of the inverse, where small singular values are large.

    m >= n, with W = Q L^T (L the Cholesky factor of W^T W):  M = Q (L^T F), so U = Q Y with Y the leading eigenvectors
    of S = Z Z^T, Z = L^-1 F^-T.      m < n, with M^T = Q R:  M M^T = R^T R, so U are those of S = R^-1 R^-T.
    m >= n, where M is all that is known, M = Q R:  U = Q Y with Y those of S = R^-T R^-1.
    A rank-deficient W = Q1 T (rank-revealing QR) is solved as the wide Q1^T M. Its null directions, those of Q beyond Q1,
    are left out, or with ``skip_null=False`` come first as the zero components that they are.
    """
    m, n = W.shape
    if m < n:
        found = _trailing_wide(_operator(W, context, init, dtype), rank)
    elif isinstance(context, CrossMoment):
        found = _trailing_formed(_operator(W, context, init, dtype), rank)
    else:
        found = _trailing_tall(W, context, init.power, rank, dtype)
    if found:
        return *found, 0
    W = W.to(dtype)
    Q, r, _ = scipy.linalg.qr(W.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diag(r))
    full = int((diagonal > diagonal[0] * max(m, n) * np.finfo(r.dtype).eps).sum())
    null = min(m, n) - full
    dead = 0 if init.skip_null else min(null, rank)
    if rank - dead > full:
        raise UserError(f"rank {rank} of a {m} x {n} layer whose weight has rank {full}")
    left = torch.from_numpy(Q[:, full : full + dead]).to(W)
    sigma = torch.zeros(dead).to(W)
    if rank > dead:
        basis = torch.from_numpy(Q[:, :full]).to(W)
        found = _trailing_wide(_product(basis.T, _operator(W, context, init, dtype)), rank - dead)
        if not found:
            raise UserError(
                f"a {m} x {n} layer is too ill-conditioned for mode kpm in this precision; use precision fp64"
            )
        left, sigma = torch.cat([left, basis @ found[0]], dim=1), torch.cat([sigma, found[1]])
    return left, sigma, null


def _trailing_tall(
    W: Tensor, context: DampedCovariance | None, power: float, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """None when W is rank-deficient in this precision.

    L is the Cholesky factor of W^T W where this holds W well enough, else that of a QR decomposition, which takes longer.
    """
    for factor in (_gram_factor, _orthogonal_factor):
        L = factor(W.to(dtype))
        if L is None:
            continue
        values, Y = _leading_eigenpairs(_inverse_gram(L, context, power), rank)
        left = _product(W.to(dtype), _solve_triangular(L, Y, transposed=True))
        if (_product(left.T, left) - torch.eye(rank).to(left)).abs().max() <= 10 * torch.finfo(dtype).eps ** 0.5:
            return _orthonormal(left), values.rsqrt()
    return None


def _gram_factor(W: Tensor) -> Tensor | None:
    """Lower triangular L with L L^T = W^T W, from that product; None when rounding has left it indefinite."""
    try:
        return _cholesky(gram(W.T))
    except np.linalg.LinAlgError:
        return None


def _orthogonal_factor(W: Tensor) -> Tensor | None:
    """The same from W = Q L^T; None when W is rank-deficient in its precision."""
    R = _usable(_upper_factor(W))
    return None if R is None else R.T


def _inverse_gram(L: Tensor, context: DampedCovariance | None, power: float) -> Tensor:
    """S = Z Z^T, Z = L^-1 F^-T, of which the lower triangle is valid."""
    if context is None:
        Z = _inverse_triangular(L)
    elif power == 0.5:
        Z = _solve_triangular(L, _inverse_triangular(context.cholesky.to(L)).T)
    else:
        Z = _solve_triangular(L, context.inverse.to(L).T)
    return gram(Z)


def _trailing_formed(M: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Of a tall M; None when it is rank-deficient in this precision."""
    R = _usable(_upper_factor(M))
    if R is None:
        return None
    inverse = _inverse_triangular(R.T)  # R^-T
    values, Y = _leading_eigenpairs(gram(inverse), rank)
    return _orthonormal(_product(M, _product(inverse.T, Y))), values.rsqrt()


def _trailing_wide(M: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Of a wide M, which is overwritten; None when it is rank-deficient in this precision."""
    R = _usable(_upper_factor(M.T, overwrite=True))
    del M
    if R is None:
        return None
    values, left = _leading_eigenpairs(gram(_inverse_triangular(R.T).T), rank)
    return left, values.rsqrt()


def _usable(R: Tensor) -> Tensor | None:
    """A triangular factor, unless it is singular in its precision."""
    diagonal = R.diagonal().abs()
    return None if diagonal.min() <= diagonal.max() * len(diagonal) * torch.finfo(R.dtype).eps else R


def _assemble(
    W: Tensor, left: Tensor, sigma: Tensor, init: CordaInit, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, U, the lengths of B's columns and Sigma, components by descending sigma, signs fixed."""
    order = sigma.argsort(descending=True, stable=True)
    U, sigma = left[:, order].to(W), sigma[order].to(W)
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    U = U * torch.where(peak < 0, -1.0, 1.0).to(U)
    T = _product(U.T, W)  # (r, n) = U^T W
    split = sigma if init.balance == "paper" else T.norm(dim=1)
    dead = sigma == 0
    root = torch.where(dead, 1.0, split.sqrt())
    A = torch.where(dead[:, None], 0.0, T / root[:, None] / scaling**0.5)
    return A, U, torch.where(dead, 0.0, root / scaling**0.5), sigma


# Dense algebra in fp64 on the CPU is SciPy's, elsewhere torch's: its OpenBLAS is two to five times as fast here as torch's
# MKL on an AMD processor, and it computes only the eigenvectors that are asked for.


@contextlib.contextmanager
def matmul_precision(*, tf32: bool) -> Iterator[None]:
    """Whether products of fp32 matrices may round their factors to TF32, whatever the user's own settings and autocast are.

    It holds values of bf16 and fp16 exactly, those of fp32 to 1e-3.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", *([accelerator.type] if accelerator else [])}
    with contextlib.ExitStack() as contexts:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                contexts.enter_context(torch.autocast(kind, enabled=False))
        contexts.enter_context(_fp32_precision(tf32))
        yield


@contextlib.contextmanager
def _fp32_precision(tf32: bool) -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    libraries: Any = torch.backends
    backends = [libraries.cuda.matmul, libraries.mkldnn.matmul]
    settings = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for backend, setting in zip(backends, settings, strict=True):
            backend.fp32_precision = setting


def products_are_full() -> bool:
    """Whether products of fp32 matrices on a CPU are left in fp32 by the user's setting."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    libraries: Any = torch.backends
    return libraries.mkldnn.matmul.fp32_precision not in ("tf32", "bf16")


@contextlib.contextmanager
def _scipy_alone() -> Iterator[None]:
    """Within, torch takes one thread and leaves the cores to SciPy.

    Two libraries in turn hinder each other: the idle threads of the one spin for some ten milliseconds after its work,
    while those of the other wait for a core. It took half as long again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _on_cpu(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu"


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` ``right``."""
    if not _on_cpu(left) or left.dtype != torch.float64:
        return left @ right
    pair = [_numpy(left), _numpy(right)]
    turned = [not array.flags.f_contiguous for array in pair]  # such a one is handed over as its transpose, uncopied
    a, b = (array.T if turn else array for array, turn in zip(pair, turned, strict=True))
    return torch.from_numpy(scipy.linalg.blas.dgemm(1.0, a, b, trans_a=turned[0], trans_b=turned[1]))


def _upper_factor(matrix: Tensor, *, overwrite: bool = False) -> Tensor:
    """R of a QR decomposition."""
    if not _on_cpu(matrix):
        return torch.linalg.qr(matrix, mode="r").R
    a, size = _numpy(matrix), matrix.shape[1]
    (geqrt,) = scipy.linalg.get_lapack_funcs(("geqrt",), (a,))  # recursive: twice as fast as geqrf of scipy.linalg.qr
    packed, *_ = geqrt(min(64, size), a, overwrite_a=overwrite)
    return torch.from_numpy(np.triu(packed[:size]))


def gram(matrix: Tensor) -> Tensor:
    """``matrix`` ``matrix``^T, of which at least the lower triangle is valid."""
    if not _on_cpu(matrix):
        return matrix @ matrix.T
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), dtype=_numpy(matrix).dtype)
    a = _numpy(matrix)
    upper = syrk(1.0, a.T, trans=1) if a.flags.c_contiguous else syrk(1.0, a)  # either is in Fortran's order: no copy
    return torch.from_numpy(upper.T)


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a matrix whose lower triangle is valid, in its place; LinAlgError when it is indefinite."""
    if not _on_cpu(matrix):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item():
            raise np.linalg.LinAlgError("not positive definite")
        return factor
    # in Fortran's order the transpose is at hand, so its upper factor is what costs no copy
    return torch.from_numpy(scipy.linalg.cholesky(_numpy(matrix).T, overwrite_a=True, check_finite=False).T)


def _solve_triangular(lower: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """L^-1 ``right``, or L^-T ``right``."""
    if not _on_cpu(lower):
        return torch.linalg.solve_triangular(lower.T if transposed else lower, right, upper=transposed)
    trans = "T" if transposed else "N"
    solved = scipy.linalg.solve_triangular(_numpy(lower), _numpy(right), lower=True, trans=trans, check_finite=False)
    return torch.from_numpy(solved)


def _inverse_triangular(lower: Tensor) -> Tensor:
    """L^-1 of a lower triangular matrix."""
    if not _on_cpu(lower):
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    (trtri,) = scipy.linalg.get_lapack_funcs(("trtri",), dtype=_numpy(lower).dtype)
    upper = np.tril(_numpy(lower)).T  # a copy, in Fortran's order
    inverse, info = trtri(upper, lower=0, overwrite_c=1)
    assert info == 0, "a triangular factor with a zero on its diagonal"
    return torch.from_numpy(inverse.T)


def _inverse_from_cholesky(lower: Tensor) -> Tensor:
    """(L L^T)^-1, in the place of L."""
    if not _on_cpu(lower):
        return torch.cholesky_inverse(lower)
    (potri,) = scipy.linalg.get_lapack_funcs(("potri",), dtype=_numpy(lower).dtype)
    inverse, info = potri(_numpy(lower).T, lower=0, overwrite_c=1)
    assert info == 0, "a Cholesky factor with a zero on its diagonal"
    found = torch.from_numpy(inverse.T)
    mirror(found)
    return found


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle to the upper one, in place."""
    for start in range(0, len(matrix), STRIP):
        end = start + STRIP
        corner = matrix[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[start:end, end:] = matrix[end:, start:end].T


def _leading_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their eigenvectors, of a matrix with a valid lower triangle.

    The matrix is overwritten.
    """
    if not _on_cpu(matrix):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        size = len(matrix)
        chosen = [size - count, size - 1]
        a = _numpy(matrix).T
        pairs = scipy.linalg.eigh(
            a, lower=False, subset_by_index=chosen, driver="evr", overwrite_a=True, check_finite=False
        )
        values, vectors = (torch.from_numpy(part) for part in pairs)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _numpy(matrix: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return matrix.detach().numpy()
