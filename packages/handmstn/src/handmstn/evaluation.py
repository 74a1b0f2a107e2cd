"""From vectors to metrics: a gallery and probes by a protocol, in blocks, with what is needed for intervals by person."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handmstn.gallery import Enrolled
from handmstn.metrics import Identification, OpenSet, Ties, Unit, Verification, bootstrap
from handmstn.pls import OneVsAllPLS
from handmstn.recognizer import Array, gated, score_block
from tenfold import UserError

ROWS = 256
"""Probes in a block."""


@dataclasses.dataclass
class Scorer:
    """Scores of probes against a gallery, by parts that both show or by one-vs-all partial least squares.

    Args:
        gallery: the enrolled hands.
        classes: class of each of them.
        weights: weight of each part, (P,).
        matcher: cosine or pls.
        components: components of pls.
        visible: False takes every part as seen.
    """

    gallery: Enrolled
    classes: NDArray[Any]
    weights: Array
    matcher: str = "cosine"
    components: int = 50
    visible: bool = True

    def __post_init__(self) -> None:
        self._pls: OneVsAllPLS | None = None
        if self.matcher == "pls":
            if len(set(self.classes.tolist())) < 2:
                raise UserError("--matcher pls: one against all needs two identities in the gallery or more")
            self._pls = OneVsAllPLS(self.components).fit(self._fused(self.gallery), self.classes)

    def _fused(self, hands: Enrolled) -> Array:
        seen = hands.visibility if self.visible else np.ones_like(hands.visibility)
        whole = (np.sqrt(self.weights[None] * seen)[..., None] * hands.parts).reshape(len(hands), -1)
        out: Array = whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
        return out

    @property
    def columns(self) -> NDArray[Any]:
        """Class of each column of the scores."""
        return self.classes if self._pls is None else self._pls.classes_

    def scores(self, probes: Enrolled) -> Array:
        """(Q, columns)."""
        if self._pls is not None:
            return self._pls.decision_function(self._fused(probes)).astype(np.float32)
        seen = probes.visibility if self.visible else np.ones_like(probes.visibility)
        own = self.gallery.visibility if self.visible else np.ones_like(self.gallery.visibility)
        return score_block(gated(probes.parts, seen, self.weights), gated(self.gallery.parts, own, self.weights))

    def same_pictures(self, probes: Enrolled) -> NDArray[np.bool_] | None:
        """Pairs of equal pixels, which count for nothing; None where there are none."""
        if self._pls is not None:
            return None
        equal: NDArray[np.bool_] = (probes.digests[:, None] == self.gallery.digests[None]) & (probes.digests != "")[
            :, None
        ]
        return equal if equal.any() else None


@dataclasses.dataclass
class Found:
    """What a protocol has counted.

    Attributes:
        identification: closed set.
        open_set: with probes that have no mate.
        verification: pairs of probe and gallery.
    """

    identification: Identification
    open_set: OpenSet
    verification: Verification


def count(
    scorer: Scorer,
    probes: Enrolled,
    probe_classes: NDArray[Any],
    *,
    unit: Unit = "class",
    ties: Ties = "optimistic",
    ranks: int = 50,
    into: Found | None = None,
) -> Found:
    """Count all probes against the gallery, in blocks; ``into`` goes on with earlier counts."""
    found = into or Found(Identification(unit, ties, ranks), OpenSet(), Verification())
    mated = np.isin(probe_classes, scorer.columns)
    for start in range(0, len(probes), ROWS):
        rows = np.arange(start, min(start + ROWS, len(probes)))
        block = probes.part(rows)
        scores, names = scorer.scores(block), probe_classes[rows]
        exclude = scorer.same_pictures(block)
        found.open_set.update(scores, names, scorer.columns, exclude)
        if mated[rows].any():
            own = mated[rows]
            found.identification.update(
                scores[own], names[own], scorer.columns, None if exclude is None else exclude[own]
            )
        same = names[:, None] == scorer.columns[None]
        kept = np.ones_like(same) if exclude is None else ~exclude
        found.verification.update(scores[kept], same[kept])
    return found


def all_pairs(hands: Enrolled, classes: NDArray[Any], weights: Array, visible: bool = True) -> Verification:
    """Verification over every pair i < j of a set."""
    found = Verification()
    scorer = Scorer(hands, classes, weights, visible=visible)
    for start in range(0, len(hands), ROWS):
        rows = np.arange(start, min(start + ROWS, len(hands)))
        block = hands.part(rows)
        kept = rows[:, None] < np.arange(len(hands))[None]
        equal = scorer.same_pictures(block)
        if equal is not None:
            kept &= ~equal
        found.update(scorer.scores(block)[kept], (classes[rows][:, None] == classes[None])[kept])
    return found


def rank_table(found: Identification, ks: Sequence[int] = (1, 5, 10, 15, 30)) -> dict[str, Any]:
    """Rank-k rates and mAP with intervals by person; a rank at which nothing more can be found has no row."""
    rank, ap, persons = found.per_probe()
    result = found.compute()
    out: dict[str, Any] = {
        f"rank-{k}": dict(zip(("value", "ci95"), bootstrap(rank <= k, persons), strict=True))
        for k in ks
        if k == 1 or k < min(found.ranked, found.ranks + 1)
    }
    out["mAP (step)"] = dict(zip(("value", "ci95"), bootstrap(ap, persons), strict=True))
    out["mAP (trapezoid)"] = {"value": result.map_trapezoid, "ci95": None}
    return {**out, "ranked among": found.ranked, "probes": result.probes, "probes without a mate": result.without_mate}
