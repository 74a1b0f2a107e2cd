"""What a solver needs to know of a layer's inputs: their damped second moment C_d, or W C in its place.

C_d = C + lambda I is shared by all layers of one input, and so are its Cholesky factor and its inverse.

Shapes: W is (m, n) = (out, in) as in ``nn.Linear``; C is (n, n) over the layer's inputs.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from corda.algebra import STRIP, cholesky, finite, inverse_from_cholesky, product
from tenfold import NonFiniteError, UserError


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
        """M = W C + lambda W (m, n), in ``dtype``.

        Raises:
            UserError: all inputs were zero.
            NonFiniteError: NaN or infinity.
        """
        mean = _positive_mean(self.trace / W.shape[1])
        M = finite(self.product.to(W.device, dtype, copy=True), "cross moment")
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

    Example:
        >>> DampedCovariance(torch.diag(torch.tensor([1.0, 3.0])), damping=0.01).damping
        0.02
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
        """C_d times ``matrix``, in the dtype of the matrix."""
        return product(self._like(matrix), matrix).add_(matrix, alpha=self.damping)

    def after(self, matrix: Tensor) -> Tensor:
        """``matrix`` times C_d, in the dtype of the matrix."""
        return self.times(matrix.T).T

    def _like(self, matrix: Tensor) -> Tensor:
        return (self._double if matrix.dtype == torch.float64 else self._single).to(matrix.device)

    @cached_property
    def _single(self) -> Tensor:
        return finite(self._covariance.float(), "covariance")

    @cached_property
    def _double(self) -> Tensor:
        return finite(self._covariance.double(), "covariance")

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular L with C_d = L L^T, in fp64."""
        return self._factor()

    @cached_property
    def inverse(self) -> Tensor:
        """C_d^-1 in fp64, computed in the memory of the Cholesky factor."""
        return inverse_from_cholesky(self._factor())

    def _factor(self) -> Tensor:
        damped = self._double.clone(memory_format=torch.contiguous_format)
        damped.diagonal().add_(self.damping)
        return cholesky(damped)


Context = DampedCovariance | CrossMoment | None
"""What ``factorize`` knows of a layer's inputs; None with power 0."""


def _positive_mean(mean: float) -> float:
    if not math.isfinite(mean):
        raise NonFiniteError("the covariance holds NaN or infinity")
    if mean <= 0:
        raise UserError("the covariance has no positive diagonal: all inputs were zero")
    return mean
