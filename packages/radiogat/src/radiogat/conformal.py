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
    ones. Hold out whole blocks of the area together (``spatial_blocks``), and predict each held-out measurement without
    itself among its donors, or the scores flatter.

    Args:
        scores: (n) of held-out measurements.
        groups: (n) integers, bands for example; each with its own quantile where it holds ``least`` scores or more.
        least: scores below which a group takes the quantile of all.

    Source: the finite-sample quantile is that of split conformal prediction (Vovk et al. 2005); blocks and grouping are ours.
    """

    def __init__(self, scores: ArrayLike, groups: ArrayLike | None = None, least: int = 200) -> None:
        self.scores = np.asarray(scores, dtype=np.float64)
        labels = np.zeros(len(self.scores), dtype=np.int64) if groups is None else np.asarray(groups)
        counts = {int(g): int((labels == g).sum()) for g in np.unique(labels)}
        self._sorted: dict[int | None, Floats] = {None: np.sort(self.scores)}
        self._sorted |= {g: np.sort(self.scores[labels == g]) for g, count in counts.items() if count >= least}

    def quantile(self, level: float, group: int | None = None) -> float:
        """The factor q on sigma; infinite, with a warning, when there are too few scores for the level."""
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level}")
        scores = self._sorted.get(group, self._sorted[None])
        rank = math.ceil((len(scores) + 1) * level)
        if rank > len(scores):
            warnings.warn(
                f"{len(scores)} held-out measurements are too few for an interval of {level:.0%}: it is infinite",
                stacklevel=2,
            )
            return math.inf
        return float(scores[rank - 1])

    def coverage(self, scores: ArrayLike, groups: ArrayLike, levels: ArrayLike) -> Floats:
        """Share of other scores that lie inside the intervals of each level; NaN where those are infinite."""
        others, labels = np.asarray(scores, dtype=np.float64), np.asarray(groups)
        inside = np.zeros(len(np.atleast_1d(levels)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for group in np.unique(labels):
                q = np.array([self.quantile(float(level), int(group)) for level in np.atleast_1d(levels)])
                counts = (others[labels == group][:, None] <= q).sum(axis=0)
                inside += np.where(np.isfinite(q), counts, np.nan)
        return inside / len(others)

    def interval(
        self, predicted: ArrayLike, sigma: ArrayLike, level: float, group: int | None = None
    ) -> tuple[Floats, Floats]:
        """Lower and upper bound for predictions with their scale."""
        center = np.asarray(predicted, dtype=np.float64)
        half = self.quantile(level, group) * np.asarray(sigma, dtype=np.float64)
        return center - half, center + half


def spatial_blocks(xy: ArrayLike, side: float) -> NDArray[np.int64]:
    """(n) label of the square of this side that each position (n, 2) lies in."""
    cells = np.floor(np.asarray(xy, dtype=np.float64) / side).astype(np.int64)
    cells -= cells.min(axis=0)
    _, labels = np.unique(cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1], return_inverse=True)
    return labels.astype(np.int64)
