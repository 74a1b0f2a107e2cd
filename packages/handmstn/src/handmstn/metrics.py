"""Biometric metrics that stream: identification, verification and open-set counts that merge over blocks, shards and processes.

Each class has ``update`` (a block of scores), ``merge`` (another one of its kind) and ``compute``. Counts are integers, so
neither the size of the blocks nor the order of merging changes them. Higher scores are more alike. Letters: Q probes, G
gallery images.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tenfold import UserError

Ties = Literal["optimistic", "mean", "pessimistic"]
Unit = Literal["class", "image"]
Floats = NDArray[np.float64]
BINS = 65536


@dataclasses.dataclass(frozen=True)
class IdentificationResult:
    """Closed-set identification.

    Attributes:
        cmc: share of the probes whose first mate is within the k best, for k = 1, 2, ... up to the longest rank asked.
        map_step: mean of AP = (1/m) sum_j j / rank_j, which scikit-learn's is.
        map_trapezoid: mean of AP as the Market-1501 script has it: (precision_j + precision before it) / 2.
        probes: probes that have a mate.
        without_mate: probes that have none, which count for nothing.
    """

    cmc: Floats
    map_step: float
    map_trapezoid: float
    probes: int
    without_mate: int


def _mates(
    scores: NDArray[Any], order: NDArray[Any], begins: NDArray[Any], ends: NDArray[Any], known: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rows of probes and scores of their mates, each probe's in descending order; excluded ones (-inf) are left out."""
    probes = np.flatnonzero(known)
    sizes = (ends - begins)[probes]
    rows = np.repeat(probes, sizes)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = scores[rows, order[begins[rows] + within]]
    kept = found > -np.inf
    rows, found = rows[kept], found[kept]
    sort = np.lexsort((-found, rows))
    return rows[sort], found[sort]


def _places(ascending: NDArray[Any], rows: NDArray[np.int64], values: NDArray[Any], side: str) -> NDArray[np.int64]:
    """``np.searchsorted`` of each value in its own row, all at once."""
    low, high = np.zeros(len(rows), np.int64), np.full(len(rows), ascending.shape[1])
    while (open_ones := low < high).any():
        middle = (low + high) // 2
        seen = ascending[rows, np.minimum(middle, ascending.shape[1] - 1)]
        after = open_ones & ((seen <= values) if side == "right" else (seen < values))
        low, high = np.where(after, middle + 1, low), np.where(open_ones & ~after, middle, high)
    return low


class Identification:
    """CMC and mean average precision.

    Args:
        unit: what is ranked: the gallery's classes (a class has the score of its best image) or its images. Average
            precision is always over images.
        ties: rank of a mate among equal scores: before all others, in their middle, or behind them.
        ranks: longest rank of the CMC.

    Attributes:
        ranked: number of classes or images that a probe was ranked among, the most of all updates.
    """

    def __init__(self, unit: Unit = "class", ties: Ties = "optimistic", ranks: int = 50) -> None:
        self.unit, self.ties, self.ranks = unit, ties, ranks
        self.rank: list[Floats] = []
        self.ap: list[tuple[Floats, Floats]] = []
        self.persons: list[NDArray[Any]] = []
        self.without_mate = self.ranked = 0

    def update(
        self,
        scores: NDArray[Any],
        probe_ids: Sequence[Any] | NDArray[Any],
        gallery_ids: Sequence[Any] | NDArray[Any],
        exclude: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count a block of probes against the whole gallery.

        Args:
            scores: (Q, G).
            probe_ids: (Q,).
            gallery_ids: (G,).
            exclude: pairs that do not count (the probe itself in the gallery, frames of one video), (Q, G).

        Raises:
            ValueError: an empty gallery, NaN, or ids that do not fit the scores.
        """
        scores = np.asarray(scores)
        probes, gallery = np.asarray(probe_ids), np.asarray(gallery_ids)
        if scores.shape != (len(probes), len(gallery)):
            raise ValueError(f"scores {scores.shape} of {len(probes)} probes and {len(gallery)} gallery images")
        if not len(gallery):
            raise ValueError("the gallery is empty")
        if np.isnan(scores).any():
            raise ValueError(f"the score of probe {int(np.argwhere(np.isnan(scores))[0, 0])} is NaN")
        order = np.argsort(gallery, kind="stable")
        classes, starts = np.unique(gallery[order], return_index=True)
        ends = np.append(starts[1:], len(gallery))
        place = np.minimum(np.searchsorted(classes, probes), len(classes) - 1)
        if exclude is not None:
            scores = np.where(exclude, -np.inf, scores)
        rows, mates = _mates(scores, order, starts[place], ends[place], classes[place] == probes)
        ascending = np.sort(scores, axis=1)
        ranked, firsts = self._ranks(ascending, rows, mates)
        sizes = np.diff(np.append(firsts, len(rows)))
        hits = np.arange(len(rows)) - np.repeat(firsts, sizes) + 1
        before = np.where(ranked > 1, (hits - 1) / np.maximum(ranked - 1, 1e-9), 1.0)
        probed = rows[firsts]
        if not len(rows):
            steps = trapezoids = ranks = np.zeros(0)
        else:
            steps = np.add.reduceat(hits / ranked, firsts) / sizes
            trapezoids = np.add.reduceat((hits / ranked + before) / 2, firsts) / sizes
            ranks = ranked[firsts]
            if self.unit == "class":
                best = np.maximum.reduceat(scores[:, order], starts, axis=1)[probed]
                own = mates[firsts, None]
                ranks = 1 + (best > own).sum(1) + self._share * ((best == own).sum(1) - 1)
        self.rank.append(ranks)
        self.ap.append((steps, trapezoids))
        self.persons.append(probes[probed])
        self.without_mate += len(probes) - len(probed)
        self.ranked = max(self.ranked, len(classes) if self.unit == "class" else len(gallery))

    @property
    def _share(self) -> float:
        """Share of the equal scores that rank before a mate."""
        return {"optimistic": 0.0, "mean": 0.5, "pessimistic": 1.0}[self.ties]

    def _ranks(
        self, ascending: NDArray[Any], rows: NDArray[np.int64], mates: NDArray[Any]
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Ranks of mates, as ``_mates`` gives them, among all scores of their probes, and where each probe's begin.

        Mates among themselves are ranked in their order; only other images share a rank with a mate.
        """
        numbers = np.arange(len(rows))
        new_probe = np.append(True, rows[1:] != rows[:-1])[: len(rows)]
        firsts = np.flatnonzero(new_probe)
        first = np.maximum.accumulate(np.where(new_probe, numbers, 0))
        run = np.maximum.accumulate(
            np.where(new_probe | np.append(True, mates[1:] != mates[:-1])[: len(rows)], numbers, 0)
        )
        above = ascending.shape[1] - _places(ascending, rows, mates, "right")
        ranked = (numbers - first + 1) + (above - (run - first)).astype(np.float64)
        if self._share:
            with_equal = ascending.shape[1] - _places(ascending, rows, mates, "left")
            own = np.bincount(run, minlength=len(rows))[run]
            ranked += self._share * (with_equal - above - own)
        return ranked, firsts

    def merge(self, other: "Identification") -> "Identification":
        """Add what another one has counted."""
        self.rank += other.rank
        self.ap += other.ap
        self.persons += other.persons
        self.without_mate += other.without_mate
        self.ranked = max(self.ranked, other.ranked)
        return self

    def per_probe(self) -> tuple[Floats, Floats, NDArray[Any]]:
        """Rank, AP (step) and identity of every probe that has a mate."""
        if not any(len(part) for part in self.rank):
            raise UserError(
                "no probe has a mate in the gallery: are its ids written alike, and is somebody in both parts?"
            )
        return np.concatenate(self.rank), np.concatenate([a for a, _ in self.ap]), np.concatenate(self.persons)

    def compute(self) -> IdentificationResult:
        """The result of all updates.

        Raises:
            UserError: no probe has a mate.
        """
        rank, ap, _ = self.per_probe()
        cmc = np.asarray([(rank <= k).mean() for k in range(1, self.ranks + 1)])
        trapezoid = float(np.concatenate([b for _, b in self.ap]).mean())
        return IdentificationResult(cmc, float(ap.mean()), trapezoid, len(rank), self.without_mate)


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """Verification of pairs.

    Attributes:
        eer: error where FAR(t) = P(impostor >= t) and FRR(t) = P(genuine < t) cross, linear between operating points.
        eer_threshold: the threshold there.
        tar: false accept rate -> true accept rate at the lowest threshold that keeps to it.
        thresholds: false accept rate -> that threshold.
        d_prime: |mu1 - mu0| / sqrt((s1^2 + s0^2) / 2); NaN where the scores of either kind have no spread.
        genuine: number of genuine pairs.
        impostor: number of impostor pairs.
    """

    eer: float
    eer_threshold: float
    tar: Mapping[float, float]
    thresholds: Mapping[float, float]
    d_prime: float
    genuine: int
    impostor: int


class Verification:
    """EER, TAR at FAR and d' from histograms of 65,536 bins: memory does not grow with the pairs.

    Args:
        low: lowest score that is told apart; lower ones fall into the first bin.
        high: highest one.
        bins: number of bins; rates are exact for thresholds at their edges, so the EER is exact to the scores of one bin.

    Example:
        >>> pairs = Verification()
        >>> pairs.update(np.array([0.9, 0.8, 0.1, 0.2]), np.array([True, True, False, False]))
        >>> float(pairs.compute().eer)
        0.0
    """

    def __init__(self, low: float = -1.0, high: float = 1.0, bins: int = BINS) -> None:
        self.low, self.high, self.bins = low, high, bins
        self.counts = np.zeros((2, bins), np.int64)
        self.sums = np.zeros((2, 2))

    def update(self, scores: NDArray[Any], same: NDArray[np.bool_]) -> None:
        """Count pairs: scores of any shape, and whether each is genuine."""
        flat = np.asarray(scores).ravel()
        genuine = np.asarray(same, np.bool_).ravel()
        place = ((flat - self.low) * (self.bins / (self.high - self.low))).astype(np.int64)
        np.clip(place, 0, self.bins - 1, out=place)
        place += self.bins * genuine
        self.counts += np.bincount(place, minlength=2 * self.bins).reshape(2, self.bins)
        chosen = flat.astype(np.float64)
        share = genuine.astype(np.float64)
        whole, own = (np.asarray([w @ chosen, (w * chosen) @ chosen]) for w in (np.ones_like(share), share))
        self.sums += np.stack([whole - own, own])

    def merge(self, other: "Verification") -> "Verification":
        """Add what another one has counted.

        Raises:
            ValueError: its bins are others.
        """
        if (self.low, self.high, self.bins) != (other.low, other.high, other.bins):
            raise ValueError("histograms of different bins do not merge")
        self.counts += other.counts
        self.sums += other.sums
        return self

    def rates(self) -> tuple[Floats, Floats, Floats]:
        """Thresholds (ascending), FAR and FRR at each of them."""
        total = self.counts.sum(1)
        if not total.all():
            raise UserError(f"expected genuine and impostor pairs, got {total[1]} and {total[0]}")
        edges = np.linspace(self.low, self.high, self.bins + 1)
        far = 1 - np.concatenate([[0], np.cumsum(self.counts[0])]) / total[0]
        frr = np.concatenate([[0], np.cumsum(self.counts[1])]) / total[1]
        return edges, far, frr

    def compute(self, fars: Sequence[float] = (1e-2, 1e-3, 1e-4)) -> VerificationResult:
        """The result of all updates.

        Raises:
            UserError: there are no genuine or no impostor pairs.
        """
        edges, far, frr = self.rates()
        eer, threshold = crossing(edges, far, frr)
        places = {f: int(np.argmax(far <= f + 1e-15)) for f in fars}
        tar = {f: float(1 - frr[place]) for f, place in places.items()}
        thresholds = {f: float(edges[place]) for f, place in places.items()}
        count = self.counts.sum(1)
        mean = self.sums[:, 0] / count
        variance = np.maximum(self.sums[:, 1] / count - mean**2, 0)
        spread = float(np.sqrt(variance.mean()))
        # sums of squares leave 1e-8 of a spread of nothing
        d_prime = float(abs(mean[1] - mean[0]) / spread) if spread > 1e-6 else float("nan")
        return VerificationResult(eer, threshold, tar, thresholds, d_prime, int(count[1]), int(count[0]))

    def refined(self, blocks: Iterable[tuple[NDArray[Any], NDArray[np.bool_]]]) -> float:
        """The EER exact to the last score, by a second pass over the same pairs: those of the crossing bin are sorted.

        Args:
            blocks: scores and whether they are genuine, as they were given to ``update``.
        """
        edges, far, frr = self.rates()
        bin_ = int(np.argmax(frr >= far)) - 1
        if bin_ < 0:
            return crossing(edges, far, frr)[0]
        inside: list[list[NDArray[Any]]] = [[], []]
        for scores, same in blocks:
            flat, genuine = np.asarray(scores).ravel(), np.asarray(same).ravel()
            place = ((flat - self.low) * (self.bins / (self.high - self.low))).astype(np.int64)
            here = np.clip(place, 0, self.bins - 1) == bin_
            for row, part in enumerate((~genuine, genuine)):
                inside[row].append(flat[here & part])
        impostor, genuine_scores = (np.sort(np.concatenate(part)) for part in inside)
        total = self.counts.sum(1)
        below = self.counts[:, :bin_].sum(1)
        steps = np.append(np.unique(np.concatenate([impostor, genuine_scores])), np.inf)
        far = 1 - (below[0] + np.searchsorted(impostor, steps, "left")) / total[0]
        frr = (below[1] + np.searchsorted(genuine_scores, steps, "left")) / total[1]
        return crossing(steps, far, frr)[0]


def crossing(thresholds: Floats, far: Floats, frr: Floats) -> tuple[float, float]:
    """Rate and threshold where FAR falls below FRR, linear between the two operating points around it."""
    after = int(np.argmax(frr >= far))
    if after == 0 or frr[after] == far[after]:
        return float((far[after] + frr[after]) / 2), float(thresholds[after])
    gap, past = far[after - 1] - frr[after - 1], frr[after] - far[after]
    share = gap / (gap + past)
    rate = far[after - 1] + share * (far[after] - far[after - 1])
    low, high = thresholds[after - 1], thresholds[after]
    return float(rate), float(low + share * (high - low)) if np.isfinite(high) else float(low)


@dataclasses.dataclass(frozen=True)
class OpenSetResult:
    """Open-set identification at one false-positive rate.

    Attributes:
        dir: detection and identification rate: share of mated probes found within the rank, at or above the threshold.
        fpir: share of the probes without a mate that reach the threshold.
        threshold: the lowest threshold whose FPIR is not above the one asked.
        mated: number of probes with a mate.
        impostors: number of probes without one.
    """

    dir: float
    fpir: float
    threshold: float
    mated: int
    impostors: int


class OpenSet:
    """DIR at FPIR: how many are found, when people who are not in the gallery are to be told so.

    Args:
        rank: rank within which a mate counts as found.
    """

    def __init__(self, rank: int = 1) -> None:
        self.rank = rank
        self.scores: list[Floats] = []  # best score of the own class, -inf where it is not within the rank
        self.persons: list[NDArray[Any]] = []
        self.top: list[Floats] = []  # of probes without a mate
        self.strangers: list[NDArray[Any]] = []

    def update(
        self,
        scores: NDArray[Any],
        probe_ids: Sequence[Any] | NDArray[Any],
        gallery_ids: Sequence[Any] | NDArray[Any],
        exclude: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count a block of probes, of whom some have no mate in the gallery; arguments as for ``Identification.update``."""
        scores = np.asarray(scores, np.float64)
        probes, gallery = np.asarray(probe_ids), np.asarray(gallery_ids)
        if not len(gallery):
            raise ValueError("the gallery is empty")
        if exclude is not None:
            scores = np.where(exclude, -np.inf, scores)
        mates = probes[:, None] == gallery[None]
        mates &= scores > -np.inf
        own = np.where(mates, scores, -np.inf).max(1)
        classes, index = np.unique(gallery, return_inverse=True)
        best = np.full((len(probes), len(classes)), -np.inf)
        for number in range(len(classes)):
            best[:, number] = scores[:, index == number].max(1)
        ahead = (best > own[:, None]).sum(1)
        known = mates.any(1)
        self.scores.append(np.where(ahead < self.rank, own, -np.inf)[known])
        self.persons.append(probes[known])
        self.top.append(scores.max(1)[~known])
        self.strangers.append(probes[~known])

    def merge(self, other: "OpenSet") -> "OpenSet":
        """Add what another one has counted."""
        self.scores += other.scores
        self.persons += other.persons
        self.top += other.top
        self.strangers += other.strangers
        return self

    def threshold(self, fpir: float) -> float:
        """The lowest threshold at which no more than this share of the probes without a mate is accepted.

        Raises:
            UserError: there is no probe without a mate.
        """
        top = np.sort(np.concatenate(self.top)) if self.top else np.zeros(0)
        if not len(top):
            raise UserError("an open set needs probes without a mate in the gallery, got none")
        allowed = int(np.floor(fpir * len(top) + 1e-9))
        return float(np.nextafter(top[len(top) - 1 - allowed], np.inf)) if allowed < len(top) else -np.inf

    def compute(self, fpir: float = 0.01) -> OpenSetResult:
        """The result of all updates."""
        return self.at(self.threshold(fpir))

    def at(self, threshold: float) -> OpenSetResult:
        """The result at a threshold."""
        own = np.concatenate(self.scores) if self.scores else np.zeros(0)
        top = np.concatenate(self.top) if self.top else np.zeros(0)
        found = float(((own >= threshold) & (own > -np.inf)).mean()) if len(own) else 0.0
        return OpenSetResult(found, float((top >= threshold).mean()), threshold, len(own), len(top))

    def per_probe(self, fpir: float) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Whether each mated probe is found at this FPIR, and its identity."""
        own = np.concatenate(self.scores)
        return (own >= self.threshold(fpir)) & (own > -np.inf), np.concatenate(self.persons)


def bootstrap(
    values: NDArray[Any],
    persons: Sequence[Any] | NDArray[Any],
    *,
    draws: int = 1000,
    seed: int = 0,
    statistic: Callable[[Floats], Floats] | None = None,
) -> tuple[float, tuple[float, float]]:
    """Mean of values per probe and its 95 % interval over redrawn persons, with all probes of each.

    Args:
        values: one per probe, (Q,), or several columns, (Q, V).
        persons: identity of each probe; probes of one person are not independent.
        draws: number of redrawings.
        seed: of them.
        statistic: function of the columns' means, (draws, V) -> (draws,), such as a difference or a ratio of two arms; default:
            the first column.
    """
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    _, index = np.unique(np.asarray(persons), return_inverse=True)
    count = int(index.max()) + 1
    sums, sizes = np.zeros((count, table.shape[1])), np.bincount(index).astype(np.float64)
    np.add.at(sums, index, table)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    means = (drawn @ sums) / (drawn @ sizes)[:, None]
    pick = statistic or (lambda columns: columns[:, 0])
    low, high = np.percentile(pick(means), [2.5, 97.5])
    return float(pick(table.mean(0)[None])[0]), (float(low), float(high))
