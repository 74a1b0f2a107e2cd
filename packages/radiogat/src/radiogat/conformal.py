"""Error bars that keep their promise: quantiles of scores on held-out measurements, never of a model's own opinion."""

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class SpatialConformal:
    """Split conformal intervals y +- q sigma, with scores |y - prediction| / sigma of held-out measurements.

        q = the ceil((n + 1) level)-th smallest of the n scores

    An interval then covers a new place with at least probability ``level`` when that place is exchangeable with the held-out
    ones, as ``radiogat.heldout`` sees to.

    With weights, which make the held-out cases lie as far from the measurements as the map's cells do, the quantile is that
    of the weighted scores at (1 + 1 / n) level, where n is the number of places that the weights amount to.

    Args:
        scores: (n) of held-out measurements.
        groups: (n) integers, bands for example; each with its own quantile where it amounts to ``least`` places or more.
        least: scores below which a group takes the quantile of all.
        weights: (n), of any sum; default: all the same.
        places: (n) numbers of the places, several scores of which count as one.
        clusters: (n) numbers of what lies together, whose errors are alike: where there are few, the quantile is a higher one.

    Source: the finite-sample quantile is that of split conformal prediction (Vovk et al. 2005), weighted as by Tibshirani et
    al. (NeurIPS 2019); places and grouping are ours.
    """

    def __init__(
        self,
        scores: ArrayLike,
        groups: ArrayLike | None = None,
        least: int = 200,
        weights: ArrayLike | None = None,
        places: ArrayLike | None = None,
        clusters: ArrayLike | None = None,
    ) -> None:
        self.scores = np.asarray(scores, dtype=np.float64)
        count = len(self.scores)
        labels = np.zeros(count, dtype=np.int64) if groups is None else np.asarray(groups)
        weight = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
        place = np.arange(count) if places is None else np.asarray(places).astype(np.int64)
        cluster = place if clusters is None else np.asarray(clusters).astype(np.int64)
        whole = _ranked(self.scores, weight, place, cluster)
        self._sorted: dict[int | None, tuple[Floats, Floats, float, float]] = {None: whole}
        for group in np.unique(labels):
            of_it = labels == group
            ranked = _ranked(self.scores[of_it], weight[of_it], place[of_it], cluster[of_it])
            if ranked[2] >= least - 1e-6:
                self._sorted[int(group)] = ranked

    def quantile(self, level: float, group: int | None = None) -> float:
        """The factor q on sigma; infinite, with a warning, when there are too few scores for the level."""
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        scores, share, n, clusters = self._sorted.get(group, self._sorted[None])
        rank = min(1.0, (clusters + 1) * level / clusters)
        if (n + 1) * level / n > 1 + 1e-12:
            warnings.warn(
                f"{n:.0f} held-out places are too few for an interval of {level:.0%}: it is infinite",
                stacklevel=2,
            )
            return math.inf
        return float(scores[min(len(scores) - 1, int(np.searchsorted(share, rank - 1e-9)))])

    def coverage(
        self, scores: ArrayLike, groups: ArrayLike, levels: ArrayLike, weights: ArrayLike | None = None
    ) -> Floats:
        """Share of other scores, weighted, that lie inside the intervals of each level; NaN where those are infinite."""
        others, labels = np.asarray(scores, dtype=np.float64), np.asarray(groups)
        weight = np.ones(len(others)) if weights is None else np.asarray(weights, dtype=np.float64)
        inside = np.zeros(len(np.atleast_1d(levels)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for group in np.unique(labels):
                q = np.array([self.quantile(float(level), int(group)) for level in np.atleast_1d(levels)])
                of_it = labels == group
                counts = ((others[of_it][:, None] <= q) * weight[of_it][:, None]).sum(axis=0)
                inside += np.where(np.isfinite(q), counts, np.nan)
        return inside / weight.sum()

    def interval(
        self, predicted: ArrayLike, sigma: ArrayLike, level: float, group: int | None = None
    ) -> tuple[Floats, Floats]:
        """Lower and upper bound for predictions with their scale."""
        center = np.asarray(predicted, dtype=np.float64)
        half = self.quantile(level, group) * np.asarray(sigma, dtype=np.float64)
        return center - half, center + half


def _ranked(
    scores: Floats, weight: Floats, place: NDArray[np.int64], cluster: NDArray[np.int64]
) -> tuple[Floats, Floats, float, float]:
    """Scores in order, the share of the weight up to each, and the numbers of places and clusters behind them."""
    order = np.argsort(scores, kind="stable")
    share = weight / weight.sum()
    return scores[order], np.cumsum(share[order]), _amount(place, share), _amount(cluster, share)


def _amount(label: NDArray[np.int64], share: Floats) -> float:
    """Number of equally weighted labels that have the variance of these."""
    total = np.bincount(np.unique(label, return_inverse=True)[1].ravel(), share)
    return float(1 / (total**2).sum())


def spatial_blocks(xy: ArrayLike, side: float) -> NDArray[np.int64]:
    """(n) label of the square of this side that each position (n, 2) lies in."""
    cells = np.floor(np.asarray(xy, dtype=np.float64) / side).astype(np.int64)
    cells -= cells.min(axis=0)
    _, labels = np.unique(cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1], return_inverse=True)
    return labels.astype(np.int64)
