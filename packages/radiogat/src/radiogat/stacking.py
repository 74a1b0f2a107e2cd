"""Several models as one: weights that change with the distance to the measurements, and a scale of the error.

Legend: N held-out cases, M models.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_SUM = 1e3
"""Weight of the condition that a case's weights sum to one, against its squared error."""


def share_of_map(distance: Floats, knots: Floats) -> Floats:
    """Share of the map's cells that lie nearer to a measurement than this: 0 to 1.

    Args:
        distance: (N).
        knots: quantiles of the map's distances, at equal steps from 0 to 1.
    """
    return np.interp(distance, knots, np.linspace(0, 1, len(knots)))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of models, a straight line over the share of the map that lies nearer.

        w_m(d) = (1 - u(d)) near_m + u(d) far_m,   near_m, far_m >= 0,   sum_m near_m = sum_m far_m = 1

    Args:
        near: (M) at the measurements.
        far: (M) at the farthest cells of the map.
        knots: quantiles of the map's distances, for ``share_of_map``.
    """

    near: Floats
    far: Floats
    knots: Floats

    @classmethod
    def fit(
        cls, powers: Floats, truth: Floats, distance: Floats, weight: Floats, knots: Floats, pull: float
    ) -> "Weights":
        """Least squares over held-out cases, no weight below zero.

        Args:
            powers: (N, M) of the models.
            truth: (N).
            distance: (N) to the nearest measurement that is left.
            weight: (N) of the cases, of sum one.
            knots: quantiles of the map's distances.
            pull: number of cases that speak for one line in place of two ends, and for equal weights.
        """
        M = powers.shape[1]
        u = share_of_map(distance, knots)
        error = (powers - truth[:, None]) * np.sqrt(weight * len(weight))[:, None]
        scale = max(float(np.sqrt((error**2).mean())), 1e-9)
        rows = np.concatenate([error * (1 - u)[:, None], error * u[:, None]], axis=1)
        one = np.concatenate([np.ones(M), np.zeros(M)])
        top = _SUM * scale * np.sqrt(len(truth)) * np.stack([one, 1 - one])
        same = scale * np.sqrt(pull) * np.concatenate([np.eye(M), -np.eye(M)], axis=1)
        equal = scale * np.sqrt(pull / 4) * np.eye(2 * M)
        A = np.concatenate([rows, top, same, equal])
        b = np.concatenate([np.zeros(len(rows)), top.sum(axis=1) / M, np.zeros(M), np.full(2 * M, equal[0, 0] / M)])
        found = nnls(A, b, maxiter=100 * 2 * M)[0].reshape(2, M)
        near, far = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)
        return cls(near, far, knots)

    def at(self, distance: Floats) -> Floats:
        """(N, M) of sum one."""
        u = share_of_map(distance, self.knots)[:, None]
        return (1 - u) * self.near + u * self.far

    def combine(self, powers: Floats, distance: Floats) -> Floats:
        """(N) of the models' powers (N, M)."""
        return np.asarray((self.at(distance) * powers).sum(axis=1))


def cross_fitted(
    powers: Floats,
    truth: Floats,
    distance: Floats,
    weight: Floats,
    place: Ints,
    knots: Floats,
    pull: float,
    folds: int = 5,
) -> Floats:
    """(N) what the stack predicts for places that did not choose its weights: each fifth of the places by the others."""
    out = np.empty(len(truth))
    numbers = np.unique(place)
    fold = np.random.default_rng(0).permutation(len(numbers)) % min(folds, len(numbers))
    of_case = fold[np.searchsorted(numbers, place)]
    for number in range(min(folds, len(numbers))):
        other, own = of_case != number, of_case == number
        if not other.any():
            other = own
        part = weight[other] / weight[other].sum()
        found = Weights.fit(powers[other], truth[other], distance[other], part, knots, pull)
        out[own] = found.combine(powers[own], distance[own])
    return out


@dataclasses.dataclass(frozen=True)
class Spread:
    """Scale of an error: log sigma = a + sum_k b_k x_k, from what the models say of their own errors, and the distance.

    Args:
        slope: (K) of the features, which are logarithms.
        mean: (K) of the features over the cases.
        level: log sigma at the mean.
        low: (K) least feature of the cases.
        high: (K) largest.
    """

    slope: Floats
    mean: Floats
    level: float
    low: Floats
    high: Floats

    @classmethod
    def fit(cls, features: Floats, residual: Floats, weight: Floats, pull: float = 20.0) -> "Spread":
        """Ridge regression of log |residual|, whose slopes are never negative.

        Args:
            features: (N, K).
            residual: (N) truth minus prediction.
            weight: (N) of sum one.
            pull: number of cases that speak for slopes of zero.
        """
        size = np.abs(residual)
        floor = 0.05 * max(float(np.average(size, weights=weight)), 1e-6)
        y = np.log(np.maximum(size, floor))
        mean, level = np.average(features, axis=0, weights=weight), float(np.average(y, weights=weight))
        root = np.sqrt(weight * len(weight))[:, None]
        deviation = np.maximum(features.std(axis=0), 1e-9)
        A = np.concatenate([(features - mean) * root, np.sqrt(pull) * np.diag(deviation)])
        b = np.concatenate([(y - level) * root[:, 0], np.zeros(features.shape[1])])
        slope = nnls(A, b, maxiter=1000)[0]
        return cls(slope, mean, level, features.min(axis=0), features.max(axis=0))

    def __call__(self, features: Floats) -> Floats:
        """(N) sigma; beyond the cases' features it stays on the line, but not below the least."""
        x = np.maximum(features, self.low)
        return np.asarray(np.exp(np.clip((x - self.mean) @ self.slope + self.level, -5, 6)))
