"""How good a mask is: counts per threshold as KITTI's road devkit makes them, pooled over pictures, mergeable, by distance."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED = 255
LEVELS = 256
EDGES = (0.0, 10.0, 20.0, 40.0)
"""Inner edges of the distance rings in meters; the last ring has no end, and pixels without depth are one of their own."""


def scores_of(probability: NDArray[Any]) -> NDArray[np.uint8]:
    """Probabilities as the 256 levels of a PNG; level 128 and above is exactly p >= 1/2."""
    if probability.dtype == np.uint8:
        return probability
    return np.floor(np.asarray(probability, np.float64) * 255 + 0.5).astype(np.uint8)


def histogram(scores: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pixels by label (0, 1) and level, (2, 256); pixels that are ignored count nowhere. One pass, integers alone."""
    group = np.multiply(np.minimum(labels, 2), LEVELS, dtype=np.uint16)
    np.add(group, scores, out=group, dtype=np.uint16)
    counts = np.bincount(group.ravel(), minlength=3 * LEVELS)
    return counts[: 2 * LEVELS].reshape(2, LEVELS)


@dataclasses.dataclass(frozen=True)
class Freespace:
    """Results of one set of pixels, as shares of 1.

    Attributes:
        f1: at threshold 1/2, like the next four.
        precision: of road.
        recall: of road.
        iou: of road.
        accuracy: of all pixels.
        max_f: the best F over 256 thresholds.
        threshold: where it is reached, level / 255.
        ap: mean of the best precision at recall 0, 0.1, ..., 1 or more; a level that nobody reaches counts 0.
        pre: precision at the threshold of ``max_f``, like the next three.
        rec: recall there.
        false_positive_rate: false positives / background there.
        false_negative_rate: 1 - recall there.
        pixels: number of labeled pixels.
        road: share of them that is road.
    """

    f1: float
    precision: float
    recall: float
    iou: float
    accuracy: float
    max_f: float
    threshold: float
    ap: float
    pre: float
    rec: float
    false_positive_rate: float
    false_negative_rate: float
    pixels: int
    road: float


def rates(counts: NDArray[np.int64]) -> Freespace:
    """Everything from pixels by label and level, (2, 256).

    Source: the evaluation kit of KITTI's road benchmark (Fritsch et al., ITSC 2013): thresholds k / 255,
    P = TP / (TP + FP + 1e-10), points with P = R = 0 dropped, F = 2 P R / (P + R + 1e-10), and eleven levels of recall.
    """
    background, road = counts.astype(np.float64)
    positive, negative = road.sum(), background.sum()
    tp = road[::-1].cumsum()[::-1]
    fp = background[::-1].cumsum()[::-1]
    fn = positive - tp
    recall_k = tp / max(positive, 1e-10)
    precision_k = tp / (tp + fp + 1e-10)
    kept = ~((recall_k == 0) & (precision_k == 0))
    f_k = np.where(kept, 2 * precision_k * recall_k / (precision_k + recall_k + 1e-10), 0.0)
    best = int(f_k.argmax())
    ap = float(np.mean([precision_k[kept & (recall_k >= level)].max(initial=0.0) for level in np.arange(0, 1.1, 0.1)]))
    half = LEVELS // 2
    t, p, n = tp[half], fp[half], fn[half]
    return Freespace(
        f1=_share(2 * t, 2 * t + p + n),
        precision=_share(t, t + p),
        recall=_share(t, t + n),
        iou=_share(t, t + p + n),
        accuracy=_share(positive + negative - p - n, positive + negative),
        max_f=float(f_k[best]),
        threshold=best / 255,
        ap=ap,
        pre=float(precision_k[best]),
        rec=float(recall_k[best]),
        false_positive_rate=_share(fp[best], negative),
        false_negative_rate=_share(fn[best], positive),
        pixels=int(positive + negative),
        road=_share(positive, positive + negative),
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


class FreespaceMeter:
    """Streaming counts over pictures, by distance.

    Args:
        edges: inner edges of the distance rings in meters.

    Attributes:
        counts: pixels by ring, label and level, (rings + 1, 2, 256); the last is without depth.
        scenes: hits, false alarms and misses at threshold 1/2 of each picture, (N, 3).

    Example:
        >>> meter = FreespaceMeter()
        >>> meter.update(np.array([[0.9, 0.2]], np.float32), np.array([[1, 0]], np.uint8))
        >>> round(meter.compute().max_f, 6)
        1.0
    """

    def __init__(self, edges: Sequence[float] = EDGES) -> None:
        self.edges = tuple(edges)
        self.counts: NDArray[np.int64] = np.zeros((len(self.edges) + 1, 2, LEVELS), np.int64)
        self._scenes: list[NDArray[np.int64]] = []

    @property
    def scenes(self) -> NDArray[np.int64]:
        """Hits, false alarms and misses of each picture."""
        return np.stack(self._scenes) if self._scenes else np.zeros((0, 3), np.int64)

    def update(self, probability: NDArray[Any], labels: NDArray[Any], depth: NDArray[Any] | None = None) -> None:
        """Count one picture.

        Args:
            probability: of road, (H, W), in [0, 1] or as uint8 levels.
            labels: (H, W) of 0, 1 and 255 (ignored).
            depth: (H, W) in meters, for the rings; without it all pixels count as without depth.

        Raises:
            ValueError: shapes differ, or a label is none of these.
        """
        labels = np.asarray(labels)
        if probability.shape != labels.shape:
            raise ValueError(f"probability {probability.shape} and labels {labels.shape} differ in size")
        labels = labels.astype(np.uint8)
        if ((labels > 1) & (labels != IGNORED)).any():
            raise ValueError("labels: expected 0, 1 and 255")
        scores = scores_of(probability)
        if depth is None:
            whole = histogram(scores, labels)
            self.counts[-1] += whole
        else:
            known = np.isfinite(depth) & (depth > 0)
            ring = np.where(known, np.searchsorted(self.edges, np.where(known, depth, 0), "right") - 1, len(self.edges))
            group = ring.clip(0).astype(np.int64) * (3 * LEVELS) + np.minimum(labels, 2).astype(np.int64) * LEVELS
            counted = np.bincount((group + scores).ravel(), minlength=len(self.counts) * 3 * LEVELS)
            found = counted.reshape(len(self.counts), 3, LEVELS)[:, :2]
            self.counts += found
            whole = found.sum(0)
        half = LEVELS // 2
        self._scenes.append(np.array([whole[1, half:].sum(), whole[0, half:].sum(), whole[1, :half].sum()]))

    def merge(self, other: "FreespaceMeter") -> "FreespaceMeter":
        """The counts of both.

        Raises:
            ValueError: they have other rings.
        """
        if self.edges != other.edges:
            raise ValueError(f"rings differ: {self.edges} and {other.edges}")
        both = FreespaceMeter(self.edges)
        both.counts = self.counts + other.counts
        both._scenes = [*self._scenes, *other._scenes]
        return both

    def compute(self) -> Freespace:
        """Results over all pixels."""
        return rates(self.counts.sum(0))

    def by_distance(self) -> dict[str, Freespace]:
        """Results by ring, by name: ``0-10 m``, ..., ``> 40 m``, ``no depth``; rings without labeled pixels are left out."""
        bounds = [*self.edges, np.inf]
        names = [f"{a:g}-{b:g} m" if np.isfinite(b) else f"> {a:g} m" for a, b in itertools.pairwise(bounds)]
        return {name: rates(c) for name, c in zip([*names, "no depth"], self.counts, strict=True) if c.sum()}


def pooled_f1(scenes: NDArray[Any]) -> NDArray[np.float64]:
    """F1 of hits, false alarms and misses (..., N, 3), pooled over the N pictures."""
    hit, alarm, miss = np.moveaxis(np.asarray(scenes, np.float64).sum(-2), -1, 0)
    whole = 2 * hit + alarm + miss
    return np.divide(2 * hit, whole, out=np.zeros_like(whole), where=whole > 0)


def gap_closed(f1: float, source: float, oracle: float) -> float:
    """Share of the gap between a model without adaptation and one with target labels that is closed.

    (F - F_source) / (F_oracle - F_source); 0 where there is no gap.

    Example:
        >>> round(gap_closed(0.8, source=0.7, oracle=0.9), 3)
        0.5
    """
    return (f1 - source) / (oracle - source) if oracle > source else 0.0


def bootstrap(
    tables: Sequence[NDArray[Any]],
    statistic: Callable[..., NDArray[np.float64]],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """A statistic of several arms' F1, and its 95 % interval from scenes drawn again, the same ones for all arms.

    Args:
        tables: of each arm, hits, false alarms and misses, (S, N, 3): S seeds of training on N scenes. F1 is pooled over the
            scenes of each seed and averaged over the seeds, which are drawn again as well where there are three or more.
        statistic: of the arms' F1, one array of draws per arm.
        draws: number of draws.
        seed: seed of the draws.
    """
    counts = np.stack([np.asarray(t) for t in tables])  # arms, S, N, 3
    estimate = float(statistic(*pooled_f1(counts).mean(1)[:, None])[0])
    generator = np.random.default_rng(seed)
    seeds, scenes = counts.shape[1:3]
    found = []
    for _ in range(draws):
        rows = generator.integers(0, seeds, seeds) if seeds > 2 else np.arange(seeds)
        drawn = counts[:, rows][:, :, generator.integers(0, scenes, scenes)]
        found.append(pooled_f1(drawn).mean(1))
    values = statistic(*np.stack(found, 1))
    low, high = np.percentile(values, [2.5, 97.5])
    return estimate, (float(low), float(high))
