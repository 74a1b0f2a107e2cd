"""Scores -> likelihood ratios: a logistic map per visibility bin, and how good its ratios are (Cllr, minimum Cllr)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cllr(genuine: NDArray[Any], impostor: NDArray[Any]) -> float:
    """1/2 [mean log2(1 + e^-LLR) over genuine pairs + mean log2(1 + e^LLR) over impostor pairs]; 1 says nothing.

    Source: Brümmer and du Preez, Computer Speech and Language 2006.
    """
    cost = np.logaddexp(0, -np.asarray(genuine, np.float64)).mean()
    cost += np.logaddexp(0, np.asarray(impostor, np.float64)).mean()
    return float(cost / (2 * np.log(2)))


def isotonic(scores: NDArray[Any], targets: NDArray[Any], weights: NDArray[Any] | None = None) -> Floats:
    """Pool-adjacent-violators: the nondecreasing function of the scores that is nearest to the targets."""
    x, y = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    levels, index = np.unique(x, return_inverse=True)
    mass = np.bincount(index, w, len(levels))
    mean = np.bincount(index, w * y, len(levels)) / mass
    values: list[float] = []
    masses: list[float] = []
    lengths: list[int] = []
    for value, weight in zip(mean.tolist(), mass.tolist(), strict=True):
        length = 1
        while values and values[-1] >= value:
            last = masses.pop()
            value = (value * weight + values.pop() * last) / (weight + last)
            weight += last
            length += lengths.pop()
        values.append(value)
        masses.append(weight)
        lengths.append(length)
    found: Floats = np.repeat(values, lengths)[index]
    return found


def min_cllr(genuine: NDArray[Any], impostor: NDArray[Any]) -> float:
    """Cllr of the best monotone map of these very scores: what is lost to discrimination alone, not to calibration."""
    scores = np.concatenate([genuine, impostor])
    same = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    weights = np.where(same > 0, 0.5 / len(genuine), 0.5 / len(impostor))
    posterior = np.clip(isotonic(scores, same, weights), 0, 1)
    with np.errstate(divide="ignore"):
        llr = np.log(posterior) - np.log1p(-posterior)
    return cllr(llr[: len(genuine)], llr[len(genuine) :])


def fit_logistic(genuine: NDArray[Any], impostor: NDArray[Any], ridge: float = 1e-6) -> tuple[float, float]:
    """(a, b) of LLR = a s + b: logistic regression with both classes weighing the same, so that the prior is gone.

    Newton's method on standardized scores. ``ridge`` keeps a finite where the classes do not overlap.

    Raises:
        ValueError: no genuine or no impostor scores, or a score that is not finite.
    """
    if not len(genuine) or not len(impostor):
        raise ValueError(f"calibration needs both kinds of pairs, got {len(genuine)} genuine, {len(impostor)} impostor")
    s = np.concatenate([genuine, impostor]).astype(np.float64)
    if not np.isfinite(s).all():
        raise ValueError("a score is not finite")
    y = np.concatenate([np.ones(len(genuine)), np.zeros(len(impostor))])
    w = np.where(y > 0, 0.5 / len(genuine), 0.5 / len(impostor))
    mean, spread = s.mean(), s.std() or 1.0
    x = np.stack([(s - mean) / spread, np.ones_like(s)], 1)
    penalty = ridge * np.asarray([1.0, 0.0])

    def objective(at: Floats) -> float:
        margin = x @ at
        return float((w * (np.logaddexp(0, margin) - y * margin)).sum() + 0.5 * (penalty * at**2).sum())

    theta = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -500, 500)))
        gradient = x.T @ (w * (p - y)) + penalty * theta
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-12)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while length > 1e-8 and objective(theta - length * step) > objective(theta):
            length /= 2
        theta = theta - length * step
    return float(theta[0] / spread), float(theta[1] - theta[0] * mean / spread)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """LLR = a s + b, its own pair (a, b) in each bin of a pair's common visibility.

    A single map would overrate covered hands, whose scores scatter more.

    Args:
        edges: borders of the bins, ascending; a pair's visibility is the weighted share of the parts that both sides show.
        slopes: a of each bin, one more than there are borders.
        offsets: b of each bin.
    """

    edges: tuple[float, ...]
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        scores: NDArray[Any],
        same: NDArray[np.bool_],
        visibility: NDArray[Any] | None = None,
        edges: Sequence[float] = (),
        least: int = 20,
    ) -> "Calibration":
        """Fit on pairs of people who are in no other part of the work.

        Args:
            scores: of pairs, (N,).
            same: whether each is genuine.
            visibility: common visibility of each pair; needed with ``edges``.
            edges: borders of the bins.
            least: genuine and impostor pairs that a bin needs; one with fewer takes the map of all pairs.

        Raises:
            ValueError: borders that do not ascend, or only one kind of pairs.
        """
        scores, same = np.asarray(scores), np.asarray(same, np.bool_)
        if list(edges) != sorted(set(edges)):
            raise ValueError(f"expected ascending borders, got {list(edges)}")
        everything = fit_logistic(scores[same], scores[~same])
        bins = np.zeros(len(scores), np.int64) if visibility is None else np.digitize(visibility, edges)
        maps = []
        for number in range(len(edges) + 1):
            here = bins == number
            enough = min(int((here & same).sum()), int((here & ~same).sum())) >= least
            maps.append(fit_logistic(scores[here & same], scores[here & ~same]) if enough else everything)
        return cls(tuple(edges), tuple(a for a, _ in maps), tuple(b for _, b in maps))

    def llr(self, scores: NDArray[Any], visibility: NDArray[Any] | None = None) -> Floats:
        """Log-likelihood ratios (natural) of scores."""
        at = np.zeros(np.shape(scores), np.int64) if visibility is None else np.digitize(visibility, self.edges)
        found: Floats = np.asarray(self.slopes)[at] * np.asarray(scores, np.float64) + np.asarray(self.offsets)[at]
        return found


_SCALE = (
    (1.0, "supports neither"),
    (10.0, "weak support"),
    (100.0, "moderate support"),
    (1000.0, "moderately strong support"),
    (10000.0, "strong support"),
    (float("inf"), "very strong support"),
)


def in_words(llr: float) -> str:
    """A likelihood ratio as forensic reports put it: ``moderate support for the same hand``.

    Source: the verbal scale of the ENFSI guideline for evaluative reporting, 2015, shortened.
    """
    size = float(np.exp(min(abs(llr), 700)))
    if size < 2:
        return "supports neither"
    words = next(text for bound, text in _SCALE[1:] if size <= bound)
    return f"{words} for {'the same hand' if llr > 0 else 'different hands'}"
