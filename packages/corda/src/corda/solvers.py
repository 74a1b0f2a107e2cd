"""The pure core: weights and a covariance in, the adapter's factors out.

With M = W C_d^p and C_d = C + lambda I, CorDA adapts the components of W along r left singular vectors U of M: the leading
ones (IPM) or the trailing ones (KPM). Since U^T M = Sigma V^T, the published product B A = U Sigma V^T C_d^-p equals
U U^T W: neither the inverse of C_d, nor V, nor any other component of M is needed, and the residual W - B A is the
projection (I - U U^T) W.

Shapes: W is (m, n) = (out, in) as in ``nn.Linear``; C is (n, n) over the layer's inputs; A is (r, n), B is (m, r).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from corda.config import CordaInit
from tenfold import NonFiniteError, UserError

OVERSAMPLING = 16
"""Extra columns of the randomised block, p in the usual notation."""
MAX_STEPS = 12
"""Blocks of the Krylov space after which the exact solver takes over."""


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer at its start: scaling * B A = U U^T W.

    Attributes:
        A: (r, n), fp32 (fp64 for fp64 weights).
        B: (m, r), likewise.
        left: (m, r) orthonormal: U, the adapted left singular vectors of M. The sign is fixed so that the entry of
            largest magnitude of each is positive.
        sigma: (r,) their singular values, in descending order; zero where ``power`` and damping make none.
        solver: ``randomized``, ``exact``, ``inverse`` (KPM) or ``lapack_svd``.
        precision: ``fp32`` or ``fp64``, that the solve was done in.
        null: directions left out because W is rank-deficient (they would contribute nothing to B A).
    """

    A: Tensor
    B: Tensor
    left: Tensor
    sigma: Tensor
    solver: str
    precision: str
    null: int = 0


class DampedCovariance:
    """C_d = C + damping * mean(diag C) I, with what several layers of one input share: its Cholesky factor and inverse.

    Args:
        covariance: (n, n) symmetric, positive semi-definite, undamped.
        damping: delta, relative to the mean of the diagonal (0.01 in the authors' code; fixed here, since without an
            explicit inverse there is nothing that doubling it would repair: cond(C_d) <= 1 + n / delta).

    Raises:
        UserError: C has no positive diagonal (no token has reached the layer, or all inputs are zero).
        NonFiniteError: C holds NaN or infinity.
    """

    def __init__(self, covariance: Tensor, damping: float) -> None:
        if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
            raise UserError(f"a covariance is square, got shape {tuple(covariance.shape)}")
        mean = covariance.diagonal().double().mean().item()
        if not np.isfinite(mean):
            raise NonFiniteError(f"the covariance has a diagonal of mean {mean}")
        if mean <= 0:
            raise UserError("the covariance has no positive diagonal: all inputs were zero")
        self.damping = damping * mean
        self.matrix = covariance.double().clone()
        self.matrix.diagonal().add_(self.damping)

    @property
    def size(self) -> int:
        """n, the number of input features."""
        return self.matrix.shape[0]

    @cached_property
    def single(self) -> Tensor:
        """C_d in fp32."""
        return self.matrix.float()

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular L with C_d = L L^T."""
        return _cholesky(self.matrix)

    @cached_property
    def inverse(self) -> Tensor:
        """C_d^-1, from the Cholesky factor."""
        return _inverse_from_cholesky(self.cholesky)


def factorize(
    weight: Tensor,
    covariance: "Tensor | DampedCovariance | None",
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
        covariance: C (n, n) undamped, or a ``DampedCovariance`` that several layers share; None with ``power=0``.
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
    if not torch.isfinite(weight).all():
        raise NonFiniteError("the weight holds NaN or infinity")
    context = _context(covariance, init, n)
    double = init.precision == "fp64" or (
        init.precision == "auto" and (init.mode == "kpm" or weight.dtype == torch.float64)
    )
    solver: str = init.solver
    if solver == "auto":
        few = rank + OVERSAMPLING < min(m, n) / 4
        solver = "exact" if init.mode == "kpm" or not few else "randomized"
    if solver == "randomized" and init.mode == "kpm":
        raise UserError("solver randomized finds leading components only; mode kpm takes exact or lapack_svd")

    null = 0
    if solver == "randomized":
        found = _randomized(weight, context, init, rank, torch.float64 if double else torch.float32)
        left, sigma = found if found else _exact_leading(weight, context, init.power, rank)
        solver = solver if found else "exact"
    elif solver == "lapack_svd":
        left, sigma = _lapack_svd(weight, context, init, rank, torch.float64 if double else torch.float32)
    elif init.mode == "ipm":
        double = True  # the Gram matrix squares the singular values: in fp32 everything below 2e-4 sigma_1 is noise
        left, sigma = _exact_leading(weight, context, init.power, rank)
    else:
        left, sigma, null = _inverse_trailing(weight, context, init.power, rank, double)
        solver = "inverse"
    return _assemble(weight, left, sigma, init, scaling, solver, "fp64" if double else "fp32", null)


def _context(covariance: "Tensor | DampedCovariance | None", init: CordaInit, n: int) -> DampedCovariance | None:
    if init.power == 0:
        return None
    if covariance is None:
        raise UserError(f"power {init.power} needs a covariance")
    context = covariance if isinstance(covariance, DampedCovariance) else DampedCovariance(covariance, init.damping)
    if context.size != n:
        raise UserError(f"a covariance of {context.size} inputs does not fit a weight of {n} inputs")
    return context


def _times_root(matrix: Tensor, context: DampedCovariance | None, power: float) -> Tensor:
    """``matrix`` F for a factor F F^T = C_d^(2p): C_d itself, its Cholesky factor, or nothing, in the matrix's dtype."""
    if context is None:
        return matrix
    root = context.cholesky if power == 0.5 else context.matrix if matrix.dtype == torch.float64 else context.single
    return matrix @ root.to(matrix)


def _times_root_transposed(matrix: Tensor, context: DampedCovariance | None, power: float) -> Tensor:
    """``matrix`` F^T."""
    if context is not None and power == 0.5:
        return matrix @ context.cholesky.to(matrix).T
    return _times_root(matrix, context, power)


def _randomized(
    weight: Tensor, context: DampedCovariance | None, init: CordaInit, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Leading left singular vectors from a randomised block Krylov space of M M^T; M = W F itself is never formed.

    Each step multiplies a block of rank + ``OVERSAMPLING`` columns by F, W and their transposes, and orthogonalises it
    against all earlier blocks. Ends when a step adds less than 1e-6 of the captured energy and no vector's residual
    |M M^T u - sigma^2 u| is above 1e-3 sigma_1^2; None when ``MAX_STEPS`` do not get there. Nothing is squared, so fp32
    is enough.
    """
    W = weight.to(dtype)
    generator = torch.Generator().manual_seed(init.seed)
    sample = torch.randn(rank + OVERSAMPLING, W.shape[1], generator=generator, dtype=dtype).to(W.device)
    block = torch.linalg.qr(W @ _times_root_transposed(sample, context, init.power).T).Q
    basis, images = block, torch.empty(0, W.shape[1]).to(W)
    captured = 0.0
    for step in range(MAX_STEPS):
        image = _times_root(block.T @ W, context, init.power)  # (b, n) = block^T M
        images = torch.cat([images, image])  # basis^T M
        after = W @ _times_root_transposed(image, context, init.power).T  # M M^T block
        if step >= 2:
            R = torch.linalg.qr(images.T, mode="r").R
            Z, sigma, _ = torch.linalg.svd(R.T)
            Z, sigma = Z[:, :rank], sigma[:rank]
            energy = sigma.square().sum().item()
            # M M^T u - sigma^2 u lies in what the last block's image adds to the basis
            beyond = after - basis @ (basis.T @ after)
            residual = (beyond @ Z[-block.shape[1] :]).norm(dim=0)
            if energy - captured <= 1e-6 * energy and bool((residual <= 1e-3 * sigma[0].square()).all()):
                return basis @ Z, sigma
            captured = energy
        for _ in range(2):  # once is not enough in fp32
            after = after - basis @ (basis.T @ after)
        block = torch.linalg.qr(after).Q
        basis = torch.cat([basis, block], dim=1)
    return None


def _exact_leading(weight: Tensor, context: DampedCovariance | None, power: float, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors from the fp64 Gram matrix of the smaller side."""
    M = _times_root(weight.double(), context, power)
    if M.shape[0] <= M.shape[1]:
        values, left = _leading_eigenpairs(_gram(M), rank)
        return left, values.clamp_min(0).sqrt()
    values, right = _leading_eigenpairs(_gram(M.T), rank)
    sigma = values.clamp_min(0).sqrt()
    return _orthonormal(M @ right), sigma


def _lapack_svd(
    weight: Tensor, context: DampedCovariance | None, init: CordaInit, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The published way to the singular vectors, for comparison: all of them, then crop."""
    left, sigma, _ = torch.linalg.svd(_times_root(weight.to(dtype), context, init.power), full_matrices=False)
    chosen = slice(None, rank) if init.mode == "ipm" else slice(len(sigma) - rank, None)
    return left[:, chosen], sigma[chosen]


def _inverse_trailing(
    weight: Tensor, context: DampedCovariance | None, power: float, rank: int, double: bool
) -> tuple[Tensor, Tensor, int]:
    """Trailing left singular vectors as the leading ones of the inverse, where small singular values are large.

    m >= n, with W = Q L^T (L the Cholesky factor of W^T W):  M = Q (L^T F), so U = Q Y with Y the leading eigenvectors
    of S = Z Z^T, Z = L^-1 F^-T.      m < n, with M^T = Q R:  M M^T = R^T R, so U are those of S = R^-1 R^-T.
    A rank-deficient W = Q1 T (rank-revealing QR) is solved as the wide T: its null directions are left out.
    """
    W = weight.double() if double else weight.float()
    m, n = W.shape
    found = _trailing_tall(W, context, power, rank) if m >= n else _trailing_wide(W, context, power, rank)
    if found:
        return *found, 0
    Q, r, _ = scipy.linalg.qr(W.cpu().numpy(), mode="economic", pivoting=True, check_finite=False)
    diagonal = np.abs(np.diag(r))
    full = int((diagonal > diagonal[0] * max(m, n) * np.finfo(r.dtype).eps).sum())
    if rank > full:
        raise UserError(f"rank {rank} of a {m} x {n} layer whose weight has rank {full}")
    basis = torch.from_numpy(Q[:, :full]).to(W)
    found = _trailing_wide(basis.T @ W, context, power, rank)
    if not found:
        raise UserError(f"a {m} x {n} layer is too ill-conditioned for mode kpm in this precision; use precision fp64")
    return basis @ found[0], found[1], min(m, n) - full


def _trailing_tall(
    W: Tensor, context: DampedCovariance | None, power: float, rank: int
) -> tuple[Tensor, Tensor] | None:
    """None when W^T W has no usable Cholesky factor."""
    try:
        L = _cholesky(_gram(W.T))
    except np.linalg.LinAlgError:
        return None
    if context is None:
        Z = _inverse_triangular(L)
    elif power == 0.5:
        Z = _solve_triangular(L, _inverse_triangular(context.cholesky.to(W)).T)
    else:
        Z = _solve_triangular(L, context.inverse.to(W))
    values, Y = _leading_eigenpairs(_gram(Z), rank)
    left = W @ _solve_triangular(L, Y, transposed=True)
    if (left.T @ left - torch.eye(rank).to(left)).abs().max() > 10 * torch.finfo(W.dtype).eps ** 0.5:
        return None
    return _orthonormal(left), values.rsqrt()


def _trailing_wide(
    W: Tensor, context: DampedCovariance | None, power: float, rank: int
) -> tuple[Tensor, Tensor] | None:
    """None when M is rank-deficient in this precision."""
    R = torch.linalg.qr(_times_root(W, context, power).T, mode="r").R
    diagonal = R.diagonal().abs()
    if diagonal.min() <= diagonal.max() * len(diagonal) * torch.finfo(R.dtype).eps:
        return None
    values, left = _leading_eigenpairs(_gram(_inverse_triangular(R.T).T), rank)
    return left, values.rsqrt()


def _assemble(
    weight: Tensor,
    left: Tensor,
    sigma: Tensor,
    init: CordaInit,
    scaling: float,
    solver: str,
    precision: str,
    null: int,
) -> Factors:
    """A and B from U and Sigma, components by descending sigma, signs fixed; computed in fp64, rounded once."""
    order = sigma.argsort(descending=True, stable=True)
    U, sigma = left[:, order].double(), sigma[order].double()
    peak = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    U = U * torch.where(peak < 0, -1.0, 1.0).to(U)
    T = U.T @ weight.double()  # (r, n) = U^T W
    split = sigma if init.balance == "paper" else T.norm(dim=1)
    root = split.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    out = torch.float64 if weight.dtype == torch.float64 else torch.float32
    A, B = T / root[:, None] / scaling**0.5, U * root / scaling**0.5
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise NonFiniteError(f"solver {solver} in {precision} gave NaN or infinity")
    return Factors(A.to(out), B.to(out), U.to(out), sigma.to(out), solver, precision, null)


# LAPACK: SciPy's on the CPU (its OpenBLAS is two to five times as fast here as torch's MKL on an AMD processor, and it
# computes only the eigenvectors that are asked for), torch's own on a GPU.


def _gram(matrix: Tensor) -> Tensor:
    """``matrix`` ``matrix``^T, of which at least the lower triangle is valid."""
    if matrix.device.type != "cpu":
        return matrix @ matrix.T
    (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), dtype=_numpy(matrix).dtype)
    a = _numpy(matrix)
    upper = syrk(1.0, a.T, trans=1) if a.flags.c_contiguous else syrk(1.0, a)  # either is in Fortran's order: no copy
    return torch.from_numpy(upper.T)


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a matrix whose lower triangle is valid; LinAlgError when it is not positive definite."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item():
            raise np.linalg.LinAlgError("not positive definite")
        return factor
    return torch.from_numpy(scipy.linalg.cholesky(_numpy(matrix), lower=True, check_finite=False))


def _solve_triangular(lower: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """L^-1 ``right``, or L^-T ``right``."""
    if lower.device.type != "cpu":
        return torch.linalg.solve_triangular(lower.T if transposed else lower, right, upper=transposed)
    trans = "T" if transposed else "N"
    solved = scipy.linalg.solve_triangular(_numpy(lower), _numpy(right), lower=True, trans=trans, check_finite=False)
    return torch.from_numpy(solved)


def _inverse_triangular(lower: Tensor) -> Tensor:
    """L^-1 of a lower triangular matrix."""
    if lower.device.type != "cpu":
        return torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    (trtri,) = scipy.linalg.get_lapack_funcs(("trtri",), dtype=_numpy(lower).dtype)
    inverse, info = trtri(np.tril(_numpy(lower)), lower=1)
    assert info == 0, "a triangular factor with a zero on its diagonal"
    return torch.from_numpy(inverse)


def _inverse_from_cholesky(lower: Tensor) -> Tensor:
    """(L L^T)^-1."""
    if lower.device.type != "cpu":
        return torch.cholesky_inverse(lower)
    (potri,) = scipy.linalg.get_lapack_funcs(("potri",), dtype=_numpy(lower).dtype)
    inverse, info = potri(_numpy(lower), lower=1)
    assert info == 0, "a Cholesky factor with a zero on its diagonal"
    triangle = np.tril(inverse)
    return torch.from_numpy(triangle + np.tril(triangle, -1).T)


def _leading_eigenpairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and their eigenvectors, of a matrix with a valid lower triangle."""
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
    else:
        size = len(matrix)
        chosen = [size - count, size - 1]
        pairs = scipy.linalg.eigh(_numpy(matrix), subset_by_index=chosen, driver="evr", check_finite=False)
        values, vectors = (torch.from_numpy(part) for part in pairs)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _numpy(matrix: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return matrix.detach().numpy()
