"""How far a map is from the truth, and how honest its error bars are. All in dB, over cells that have both values."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _errors(truth: ArrayLike, predicted: ArrayLike) -> Floats:
    return (np.asarray(predicted, dtype=np.float64) - np.asarray(truth, dtype=np.float64)).ravel()


def rmse(truth: ArrayLike, predicted: ArrayLike) -> float:
    """sqrt(mean of squared errors)."""
    return float(np.sqrt(np.mean(_errors(truth, predicted) ** 2)))


def mae(truth: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(_errors(truth, predicted))))


def block_rmse(truth: ArrayLike, predicted: ArrayLike, blocks: ArrayLike) -> float:
    """sqrt(mean over blocks of each block's mean squared error): the metric of the authors' code.

    Blocks weigh equally, however many values they hold, so this is not the plain RMSE.

    Args:
        truth: (n) values.
        predicted: (n) values.
        blocks: (n) integer label of each value's block.
    """
    _, label = np.unique(np.asarray(blocks).ravel(), return_inverse=True)
    squared = np.bincount(label, _errors(truth, predicted) ** 2) / np.bincount(label)
    return float(np.sqrt(squared.mean()))


def coverage(truth: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    """Share of values between their bounds."""
    values = np.asarray(truth)
    return float(np.mean((values >= np.asarray(low)) & (values <= np.asarray(high))))


def interval_score(
    truth: ArrayLike, low: ArrayLike, high: ArrayLike, level: float, weight: ArrayLike | None = None
) -> float:
    """Mean, perhaps weighted, of width + 2 / (1 - level) times the value's distance from its interval; lower is better.

    Source: Gneiting and Raftery, JASA 102, 2007, Eq. 43.
    """
    values, lo, hi = np.asarray(truth), np.asarray(low), np.asarray(high)
    outside = np.maximum(lo - values, 0) + np.maximum(values - hi, 0)
    return float(
        np.average(hi - lo + 2 / (1 - level) * outside, weights=None if weight is None else np.asarray(weight))
    )
