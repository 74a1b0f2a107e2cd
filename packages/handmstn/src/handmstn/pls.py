"""One-vs-all partial least squares for all classes at once, exact.

The coefficients of PLS1 with k components minimize |X b - y| over the Krylov space of X^T X and X^T y of dimension k. Golub-
Kahan bidiagonalization builds an orthonormal basis of it. With X = U S V^T once, each class has to multiply by the diagonal S
alone. Without re-orthogonalization the basis loses its rank on clustered data (relative error 0.04 at k = 30, 0.5 at k = 50),
so it is orthogonalized in full, in blocks of classes that stay in the processor's cache.

Where X is well conditioned, X^T X = V S^2 V^T is enough: Lanczos' tridiagonalization needs one basis in place of two, and the
eigenvectors cost a third of the singular ones. Its relative error is that of rounding times the square of X's condition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_CACHE = 8 * 2**20
"""Bytes that the bases of a block of classes may take."""
_CONDITION = 1e6
"""Largest ratio of the eigenvalues of X^T X with which it stands for X: a relative error of about 1e-10."""


def lanczos_coefficients(eigenvalues: Array, right_side: Array, components: int) -> Array:
    """Minimizers of b^T diag(e) b / 2 - g^T b over the Krylov space of diag(e) and g.

    Args:
        eigenvalues: e, (R,), positive, in descending order.
        right_side: g of each class, (C, R).
        components: dimension k of the space; beyond the rank of the problem it changes nothing.

    Returns:
        (C, R); a class whose space is exhausted early has its solution of diag(e) b = g.

    Source: Lanczos 1950; the same space as that of ``krylov_coefficients`` with e = s^2 and g = s c.
    """
    return _in_blocks(_lanczos_block, eigenvalues, right_side, components, 1)


def krylov_coefficients(singular: Array, right_side: Array, components: int) -> Array:
    """Minimizers of |diag(s) b - c| over the Krylov space of diag(s)^2 and diag(s) c.

    Args:
        singular: singular values s, (R,), positive.
        right_side: c of each class, (C, R).
        components: dimension k of the space; beyond the rank of the problem it changes nothing.

    Returns:
        (C, R); a class whose space is exhausted early has its least-squares solution.

    Source: Golub and Kahan 1965; Manne 1987 for its equality with PLS1.
    """
    return _in_blocks(_block, singular, right_side, components, 2)


def _in_blocks(block_of: Callable[..., Array], values: Array, right_side: Array, components: int, bases: int) -> Array:
    """The coefficients of all classes, by blocks whose bases fit the cache."""
    classes, rank = right_side.shape
    steps = min(components, rank)
    block = min(classes, max(1, _CACHE // (8 * bases * max(1, steps * rank))))
    room = np.empty((bases, block, steps, rank))  # for each block in turn: fresh pages cost as much as a pass over them
    found = np.empty_like(right_side)
    for start in range(0, classes, block):
        given = right_side[start : start + block]
        found[start : start + block] = block_of(values, given, *room[:, : len(given)])
    return found


def _lengths(vectors: Array) -> Array:
    found: Array = np.sqrt(np.einsum("cr,cr->c", vectors, vectors))
    return found


def _unit(vectors: Array, scale: Array) -> tuple[Array, Array]:
    """Vectors of unit length and their lengths; a vector that has vanished against ``scale`` becomes zero, of length 0."""
    length = _lengths(vectors)
    there = length > 1e-13 * scale
    return vectors * np.where(there, 1 / np.where(there, length, 1.0), 0.0)[:, None], np.where(there, length, 0.0)


def _orthogonal(vectors: Array, basis: Array) -> Array:
    """Vectors (C, R) without their parts along the bases (C, i, R); those that lose half of their length go twice.

    Source: Parlett, "The Symmetric Eigenvalue Problem", section 6.9: twice is enough, and once is where little is lost.
    """
    before = _lengths(vectors)
    vectors = vectors - _along(vectors, basis)
    again = _lengths(vectors) < 0.5 * before
    if again.any():
        vectors[again] -= _along(vectors[again], basis[again])
    return vectors


def _along(vectors: Array, basis: Array) -> Array:
    found: Array = (basis.swapaxes(1, 2) @ (basis @ vectors[..., None]))[..., 0]
    return found


def _block(s: Array, c: Array, right: Array, left: Array) -> Array:
    """The coefficients of a block of classes; ``right`` and ``left`` (C, k, R) are room for its bases."""
    classes, steps = right.shape[:2]
    diagonal, above = np.zeros((classes, steps)), np.zeros((classes, steps))
    scale = np.full(classes, s[0])
    right[:, 0], _ = _unit(s * c, s[0] * _lengths(c))
    left[:, 0], diagonal[:, 0] = _unit(s * right[:, 0], scale)
    for i in range(1, steps):
        vector = _orthogonal(s * left[:, i - 1] - diagonal[:, i - 1, None] * right[:, i - 1], right[:, :i])
        right[:, i], above[:, i] = _unit(vector, scale)
        vector = _orthogonal(s * right[:, i] - above[:, i, None] * left[:, i - 1], left[:, :i])
        left[:, i], diagonal[:, i] = _unit(vector, scale)
    target = (left @ c[..., None])[..., 0]
    solution = np.zeros((classes, steps))
    for i in reversed(range(steps)):
        rest = target[:, i] - (above[:, i + 1] * solution[:, i + 1] if i + 1 < steps else 0.0)
        solution[:, i] = np.where(diagonal[:, i] > 0, rest / np.where(diagonal[:, i] > 0, diagonal[:, i], 1.0), 0.0)
    return (solution[:, None] @ right)[:, 0]


def _lanczos_block(e: Array, g: Array, basis: Array) -> Array:
    """The coefficients of a block of classes; ``basis`` (C, k, R) is room for its basis."""
    classes, steps = basis.shape[:2]
    diagonal, beside = np.zeros((classes, steps)), np.zeros((classes, steps))
    scale = np.full(classes, e[0])
    basis[:, 0], length = _unit(g, np.zeros(classes))
    for i in range(steps):
        vector = e * basis[:, i]
        diagonal[:, i] = np.einsum("cr,cr->c", vector, basis[:, i])
        if i + 1 < steps:
            vector -= diagonal[:, i, None] * basis[:, i]
            if i:
                vector -= beside[:, i - 1, None] * basis[:, i - 1]
            basis[:, i + 1], beside[:, i] = _unit(_orthogonal(vector, basis[:, : i + 1]), scale)
    # L D L^T of the tridiagonal matrix; a space that is exhausted goes on with zeros
    pivot, factor, solution = np.ones((classes, steps)), np.zeros((classes, steps)), np.zeros((classes, steps))
    for i in range(steps):
        rest = diagonal[:, i] - (factor[:, i - 1] * beside[:, i - 1] if i else 0.0)
        there = rest > 0
        pivot[there, i] = rest[there]
        factor[:, i] = np.where(there, beside[:, i] / pivot[:, i], 0.0)
        solution[:, i] = np.where(there, -factor[:, i - 1] * solution[:, i - 1] if i else length, 0.0)
    solution /= pivot
    for i in reversed(range(steps - 1)):
        solution[:, i] -= factor[:, i] * solution[:, i + 1]
    return (solution[:, None] @ basis)[:, 0]


class OneVsAllPLS:
    """One PLS1 regression per class on +1 / -1, embeddings and targets standardized over the whole gallery.

    Args:
        k: number of components (50 in the predecessor's settings).

    Attributes:
        classes_: sorted labels, (C,).
        coef_: coefficients per class on the embeddings as they are given, (C, D).
        intercept_: (C,).

    Source: "Palmprint Recognition in Uncontrolled and Uncooperative Environment", TIFS 2020, matching by released code.

    Example:
        >>> rows = np.random.default_rng(0).standard_normal((12, 5))
        >>> pls = OneVsAllPLS(k=2).fit(rows, [0, 1, 2] * 4)
        >>> pls.coef_.shape
        (3, 5)
    """

    def __init__(self, k: int = 50) -> None:
        if k < 1:
            raise ValueError(f"k: expected 1 or more, got {k}")
        self.k = k

    def fit(self, X: Any, labels: Sequence[Any] | NDArray[Any]) -> "OneVsAllPLS":
        """Fit all classes.

        Args:
            X: embeddings, (N, D).
            labels: class of each, (N,).

        Raises:
            ValueError: fewer than two classes, NaN, or another number of labels.
        """
        x = np.asarray(X, np.float64)
        self.classes_, index = np.unique(np.asarray(labels), return_inverse=True)
        if len(index) != len(x) or x.ndim != 2:
            raise ValueError(f"expected embeddings (N, D) and N labels, got {x.shape} and {len(index)}")
        if len(self.classes_) < 2:
            raise ValueError(f"one against all needs two classes or more, got {len(self.classes_)}")
        if not np.isfinite(x).all():
            raise ValueError(f"embedding {int(np.argwhere(~np.isfinite(x))[0, 0])} is not finite")
        mean, std = x.mean(0), x.std(0, ddof=1)
        std = np.where(std > 0, std, 1.0)
        z = (x - mean) / std
        count = np.bincount(index).astype(np.float64)
        n = len(x)
        y_mean = 2 * count / n - 1
        y_std = np.sqrt((1 - y_mean**2) * n / (n - 1))
        order = np.argsort(index, kind="stable")
        firsts = np.cumsum(count.astype(np.int64)) - count.astype(np.int64)

        def targets(rows: Array) -> Array:
            """rows^T y of each class, whose y is 2 [label = c] - 1, standardized; (C, columns of ``rows``)."""
            sums, whole = np.add.reduceat(rows[order], firsts, axis=0), rows.sum(0)
            found: Array = (2 * sums - whole - y_mean[:, None] * whole) / y_std[:, None]
            return found

        values, vectors = np.linalg.eigh(z.T @ z) if n > z.shape[1] else (np.zeros(1), np.zeros((1, 1)))
        if values[0] * _CONDITION > values[-1]:
            vectors = vectors[:, ::-1]
            beta = lanczos_coefficients(values[::-1], targets(z) @ vectors, self.k) @ vectors.T
        else:
            u, s, vt = np.linalg.svd(z, full_matrices=False)
            keep = s > s[0] * max(x.shape) * np.finfo(np.float64).eps
            beta = krylov_coefficients(s[keep], targets(u[:, keep]), self.k) @ vt[keep]
        self.coef_: Array = beta * y_std[:, None] / std
        self.intercept_: Array = y_mean - self.coef_ @ mean
        return self

    def decision_function(self, Z: Any) -> Array:
        """Score of each class for each embedding, (M, C).

        Raises:
            ValueError: another number of dimensions than it was fitted on.
        """
        z = np.asarray(Z, np.float64)
        if z.ndim != 2 or z.shape[1] != self.coef_.shape[1]:
            raise ValueError(f"expected embeddings (M, {self.coef_.shape[1]}), got {z.shape}")
        return z @ self.coef_.T + self.intercept_

    def predict(self, Z: Any) -> NDArray[Any]:
        """The class of the highest score, (M,)."""
        best: NDArray[Any] = self.classes_[self.decision_function(Z).argmax(1)]
        return best
