"""The pure core: weights and a covariance in, the adapter's factors out.

With M = W C_d^p and C_d = C + lambda I, CorDA adapts the components of W along r left singular vectors U of M: the leading
ones (IPM) or the trailing ones (KPM). Since U^T M = Sigma V^T, the published product B A = U Sigma V^T C_d^-p equals
U U^T W: neither the inverse of C_d, nor V, nor any other component of M is needed, and the residual W - B A is the
projection (I - U U^T) W. KPM works with inverses after all, in fp64 and through triangular factors, because the trailing
components of M are the leading ones of its inverse and only there accurate.

Shapes: W is (m, n) = (out, in) as in ``nn.Linear``; C is (n, n) over the layer's inputs; A is (r, n), B is (m, r).
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from corda.algebra import (
    cholesky,
    finite,
    gram,
    inverse_triangular,
    leading_eigenpairs,
    matmul_precision,
    on_cpu,
    orthonormal,
    product,
    scipy_alone,
    solve_triangular,
    upper_factor,
)
from corda.config import CordaInit
from corda.moments import Context, CrossMoment, DampedCovariance
from tenfold import UserError

BLOCK = 16
"""The randomized solver adds a multiple of this many columns at a time: from there on matrix products are efficient."""
ENERGY_TOLERANCE = 1e-10
"""The randomized solver takes its last step when the captured energy has no more than this share left to gain,"""
COMPONENT_TOLERANCE = 1e-7
"""and the energy of each single component no more than this share of its own."""


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer at its start: scaling * B A = U U^T W.

    Attributes:
        A: (r, n), fp32 (fp64 for fp64 weights).
        left: (m, r) orthonormal, in the same dtype: U, the adapted left singular vectors of M. Signs are fixed: the entry
            of largest magnitude in each column is positive.
        lengths: (r,) lengths of the columns of B = U diag(lengths). B is not kept beside U, since the factors of all
            layers wait in memory until the last one is solved.
        sigma: (r,) singular values that belong to ``left``, descending; zero for null directions.
        solver: ``randomized``, ``exact``, ``inverse`` (KPM) or ``lapack_svd``.
        precision: precision of the solve, ``fp32`` or ``fp64``.
        null: number of directions in which W itself is zero to the precision that it is stored in, so that they would
            contribute nothing to B A. They are the smallest components of a rank-deficient W, and are left out unless
            ``skip_null`` says otherwise.
        iterations: number of blocks in the randomized solver's space; 0 for a direct solver.
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
        """B (m, r), a new tensor at each access."""
        return self.left * self.lengths

    @property
    def energy(self) -> float:
        """|U^T M|_F^2 = sum of sigma^2: the part of |M|_F^2 that the adapted components hold."""
        return self.sigma.double().square().sum().item()


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
        The factors; s B A = U U^T W for either balance.

    Raises:
        UserError: the rank is above min(m, n) or above the rank of W, or shapes do not fit.
        NonFiniteError: NaN or infinity in the weight or the covariance.

    Source: Yang et al., "CorDA", NeurIPS 2024, Eq. 4 and 5 and section 3.2; p = 1/2 minimizes the error of the layer's
    outputs (SVD-LLM, COALA), p = 0 is PiSSA (IPM) and MiLoRA (KPM). The identity B A = U U^T W and the solvers on the
    inverse side are ours.

    Example:
        >>> weight, inputs = torch.randn(6, 8), torch.randn(8, 100)
        >>> factors = factorize(weight, inputs @ inputs.T / 100, rank=2)
        >>> factors.A.shape, factors.B.shape
        (torch.Size([2, 8]), torch.Size([6, 2]))
        >>> torch.allclose(factors.B @ factors.A, factors.left @ factors.left.T @ weight, atol=1e-4)
        True
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
    with matmul_precision(tf32=False), scipy_alone() if double and on_cpu(weight) else contextlib.nullcontext():
        finite(weight, "weight")
        return _solve(weight, torch.float64 if double else torch.float32, context, rank, init, solver, scaling)


def _solve(
    W: Tensor, dtype: torch.dtype, context: Context, rank: int, init: CordaInit, solver: str, scaling: float
) -> Factors:
    """Solve in ``dtype``. Each step converts W for itself, which saves a copy while the others need the memory."""
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
        finite(factor, f"solution of {solver} in {precision}")
    return Factors(A, left, lengths, sigma, solver, precision, null, iterations)


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
        return product(factor.T if transposed else factor, block)
    return context.times(block)


def _operator(W: Tensor, context: Context, init: CordaInit, dtype: torch.dtype) -> Tensor:
    """M = W F (m, n), in memory of its own.

    Its left singular vectors and singular values are those of W C_d^p, since M M^T is the same.
    """
    if context is None:
        return W.to(dtype, copy=True)
    if isinstance(context, CrossMoment):
        return context.damped(W, init.damping, dtype)
    W = W.to(dtype)
    return product(W, context.cholesky.to(W)) if init.power == 0.5 else context.after(W)


def _width(rank: int) -> int:
    """Number of columns in the randomized solver's block, at least the rank."""
    return -(-rank // BLOCK) * BLOCK


def _randomized(W: Tensor, context: Context, init: CordaInit, rank: int) -> tuple[Tensor, Tensor, int] | None:
    """Leading left singular vectors from a randomized block Krylov space; None when half of the whole space is not enough.

    The space is that of M M^T (m <= n) or of M^T M, whichever is smaller; M = W F is formed only from a cross moment. Each
    step multiplies a block of columns by F, W and their transposes and orthogonalizes it against all earlier blocks. The
    result follows by Rayleigh-Ritz: with Q the basis, from the leading eigenpairs of (M^T Q)^T (M^T Q). Only this last
    product of small matrices is done in fp64, since it squares the singular values; fp32 is enough for the rest. Energies
    are second order in the error of the vectors, so they settle one step before the vectors have the precision of fp32:
    one more step is taken then.
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
    basis = block = orthonormal(back(sample))
    images = torch.empty(max(m, n), 0, dtype=torch.float64, device=W.device)  # those of the basis under M^T, or M
    G = torch.empty(0, 0, dtype=torch.float64, device=W.device)
    history: list[Tensor] = []
    last = False
    while True:
        image = forward(block)
        images = torch.cat([images, image.double()], dim=1)
        strip = images.T @ images[:, -width:]
        G = torch.cat([torch.cat([G, strip[:-width]], dim=1), strip.T])
        if last:
            break
        history.append(torch.linalg.eigvalsh(G)[-rank:].flip(0).clamp_min(0))
        last = _settled(history, torch.finfo(W.dtype).eps)
        if 2 * (len(G) + width) > size:
            return None
        after = back(image)
        for _ in range(2):  # once is not enough in fp32
            after = after - basis @ (basis.T @ after)
        block = orthonormal(after)
        basis = torch.cat([basis, block], dim=1)
    values, vectors = torch.linalg.eigh(G)
    vectors = vectors[:, -rank:].flip(1)
    left = basis @ vectors.to(basis) if m <= n else orthonormal(images @ vectors).to(W.dtype)
    return left, values[-rank:].flip(0).clamp_min(0).sqrt(), len(G) // width


def _settled(history: list[Tensor], eps: float) -> bool:
    """Whether the energies (r,) of the components have almost nothing left to gain.

    Gains shrink from step to step by a factor q or faster, so after a gain g at most g q / (1 - q) remains; gains within
    rounding, eps sigma sigma_1, count as none.
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
        values, left = leading_eigenpairs(gram(M), rank)
        return left, values.clamp_min(0).sqrt()
    values, right = leading_eigenpairs(gram(M.T), rank)
    return orthonormal(product(M, right)), values.clamp_min(0).sqrt()


def _lapack_svd(M: Tensor, init: CordaInit, rank: int) -> tuple[Tensor, Tensor]:
    """The published way to the singular vectors, for comparison: compute all of them, then crop."""
    left, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    chosen = slice(None, rank) if init.mode == "ipm" else slice(len(sigma) - rank, None)
    return left[:, chosen], sigma[chosen]


def _inverse_trailing(
    W: Tensor, context: Context, init: CordaInit, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Trailing left singular vectors as the leading ones of the inverse, where small singular values are large.

    m >= n, with W = Q L^T (L the Cholesky factor of W^T W):  M = Q (L^T F), so U = Q Y with Y the leading eigenvectors
    of S = Z Z^T, Z = L^-1 F^-T.      m < n, with M^T = Q R:  M M^T = R^T R, so U are those of S = R^-1 R^-T.
    m >= n, where only M is known, M = Q R:  U = Q Y with Y those of S = R^-T R^-1.
    A rank-deficient W = Q1 T (rank-revealing QR) is solved as the wide Q1^T M. Its null directions, those of Q beyond Q1,
    are left out, or with ``skip_null=False`` come first, with sigma = 0. Null is what the precision of the *stored* W
    cannot tell from zero: fp64 sees a rounding there (``stored_noise``).
    """
    m, n = W.shape
    noise = stored_noise(W)
    if m < n:
        found = _trailing_wide(_operator(W, context, init, dtype), rank)
    elif isinstance(context, CrossMoment):
        found = _trailing_formed(_operator(W, context, init, dtype), rank)
    else:
        found = _trailing_tall(W, context, init.power, rank, dtype)
    if found and bool((product(found[0].T, W.to(dtype)).norm(dim=1) > noise).all()):
        return *found, 0
    W = W.to(dtype)
    Q, r, _ = scipy.linalg.qr(W.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diag(r))
    full = int((diagonal > max(noise, diagonal[0] * max(m, n) * np.finfo(r.dtype).eps)).sum())
    if found and full == min(m, n):
        return *found, 0
    null = min(m, n) - full
    dead = 0 if init.skip_null else min(null, rank)
    if rank - dead > full:
        raise UserError(f"rank {rank} of a {m} x {n} layer whose weight has rank {full}")
    left = torch.from_numpy(Q[:, full : full + dead]).to(W)
    sigma = torch.zeros(dead).to(W)
    if rank > dead:
        basis = torch.from_numpy(Q[:, :full]).to(W)
        found = _trailing_wide(product(basis.T, _operator(W, context, init, dtype)), rank - dead)
        if not found:
            raise UserError(
                f"a {m} x {n} layer is too ill-conditioned for mode kpm in this precision; use precision fp64"
            )
        left, sigma = torch.cat([left, basis @ found[0]], dim=1), torch.cat([sigma, found[1]])
    return left, sigma, null


def stored_noise(W: Tensor) -> float:
    """Size below which a direction of W (m, n) is what rounding to the dtype of W has left.

    Rounding a matrix of rank r to a precision eps adds entries of about eps / 5 times its own, a matrix of spectral norm
    eps / 5 |W|_F (1 / sqrt(m) + 1 / sqrt(n)). Products that were computed in fp32 carry several such roundings, those of bf16
    and fp16 one.
    """
    m, n = W.shape
    roundings = 0.5 if W.element_size() < 4 else 2.0
    size = torch.finfo(W.dtype).eps * torch.linalg.matrix_norm(W.double()).item()
    return roundings * size * (m**-0.5 + n**-0.5)


def _trailing_tall(
    W: Tensor, context: DampedCovariance | None, power: float, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Trailing left singular vectors of a tall layer; None when W is rank-deficient in this precision.

    L is the Cholesky factor of W^T W where that keeps enough digits of W, else the factor of a QR decomposition, which
    takes longer.
    """
    for factor in (_gram_factor, _orthogonal_factor):
        L = factor(W.to(dtype))
        if L is None:
            continue
        values, Y = leading_eigenpairs(_inverse_gram(L, context, power), rank)
        left = product(W.to(dtype), solve_triangular(L, Y, transposed=True))
        if (product(left.T, left) - torch.eye(rank).to(left)).abs().max() <= 10 * torch.finfo(dtype).eps ** 0.5:
            return orthonormal(left), values.rsqrt()
    return None


def _gram_factor(W: Tensor) -> Tensor | None:
    """Lower triangular L with L L^T = W^T W, from that product; None when rounding has left it indefinite."""
    try:
        return cholesky(gram(W.T))
    except np.linalg.LinAlgError:
        return None


def _orthogonal_factor(W: Tensor) -> Tensor | None:
    """Lower triangular L with W = Q L^T; None when W is rank-deficient in its precision."""
    R = _usable(upper_factor(W))
    return None if R is None else R.T


def _inverse_gram(L: Tensor, context: DampedCovariance | None, power: float) -> Tensor:
    """S = Z Z^T with Z = L^-1 F^-T; its lower triangle is valid."""
    if context is None:
        Z = inverse_triangular(L)
    elif power == 0.5:
        Z = solve_triangular(L, inverse_triangular(context.cholesky.to(L)).T)
    else:
        Z = solve_triangular(L, context.inverse.to(L).T)
    return gram(Z)


def _trailing_formed(M: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Trailing left singular vectors of a tall M; None when it is rank-deficient in this precision."""
    R = _usable(upper_factor(M))
    if R is None:
        return None
    inverse = inverse_triangular(R.T)  # R^-T
    values, Y = leading_eigenpairs(gram(inverse), rank)
    return orthonormal(product(M, product(inverse.T, Y))), values.rsqrt()


def _trailing_wide(M: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Trailing left singular vectors of a wide M, which is overwritten; None when it is rank-deficient in this precision."""
    R = _usable(upper_factor(M.T, overwrite=True))
    del M
    if R is None:
        return None
    values, left = leading_eigenpairs(gram(inverse_triangular(R.T).T), rank)
    return left, values.rsqrt()


def _usable(R: Tensor) -> Tensor | None:
    """R, or None where it is singular in its precision."""
    diagonal = R.diagonal().abs()
    return None if diagonal.min() <= diagonal.max() * len(diagonal) * torch.finfo(R.dtype).eps else R


def _assemble(
    W: Tensor, left: Tensor, sigma: Tensor, init: CordaInit, scaling: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, U, the lengths of B's columns and Sigma: components by descending sigma, signs fixed."""
    order = sigma.argsort(descending=True, stable=True)
    U, sigma = left[:, order].to(W), sigma[order].to(W)
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    U = U * torch.where(peak < 0, -1.0, 1.0).to(U)
    T = product(U.T, W)  # (r, n) = U^T W
    split = sigma if init.balance == "paper" else T.norm(dim=1)
    dead = sigma == 0
    root = torch.where(dead, 1.0, split.sqrt())
    A = torch.where(dead[:, None], 0.0, T / root[:, None] / scaling**0.5)
    return A, U, torch.where(dead, 0.0, root / scaling**0.5), sigma


# Dense algebra in fp64 on the CPU is SciPy's, elsewhere torch's: its OpenBLAS is two to five times as fast here as torch's
