"""What an arm sees of a hand, trained and measured on people that nobody trained on; importable by other processes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from handmstn.aligner import AlignedHand, MultiSpatialTransformer
from handmstn.config import Arm, RunSettings, of_arm
from handmstn.data import boxes, with_parts
from handmstn.evaluation import Found, Scorer, count
from handmstn.models import Embedded, embed, parts_of
from handmstn.recognizer import HandMSTN
from handmstn.records import Hands
from handmstn.training import train_identities


def seen_by(hands: Hands, settings: RunSettings, arm: Arm) -> Hands:
    """The pictures with the points that an arm takes."""
    if arm == "box":
        empty = np.zeros((len(hands), 0), np.float32)
        return dataclasses.replace(hands, points=boxes(hands), visibility=empty)
    if arm == "whole":
        none = np.zeros((len(hands), 0, 2), np.float32)
        return dataclasses.replace(hands, points=none, visibility=np.zeros((len(hands), 0), np.float32))
    if arm == "palm" and hands.points.shape[1] == 39:
        return with_parts(hands, parts_of(settings))
    return hands


def palm_of(aligner: MultiSpatialTransformer, settings: RunSettings) -> "PalmOnly":
    """The same aligner, of whose points only the palm's are taken."""
    return PalmOnly(aligner, len(parts_of(settings)))


class PalmOnly(MultiSpatialTransformer):
    """An aligner of palm and fingers that gives the palm's points alone, so that arms share what was learned."""

    def __init__(self, whole: MultiSpatialTransformer, count: int) -> None:
        super(MultiSpatialTransformer, self).__init__()
        self.whole = whole
        self.parts = whole.parts[:count]
        self.levels, self.loc_size = whole.levels, whole.loc_size
        self.grid = whole.grid

    def forward(self, images: Tensor, frames: Tensor | None = None) -> AlignedHand:
        """The palm's share of what the whole aligner finds."""
        found: AlignedHand = self.whole(images, frames)
        points = sum(part.count for part in self.parts)
        return dataclasses.replace(
            found,
            points=found.points[:, :points],
            visibility=found.visibility[:, : len(self.parts)],
            visibility_logits=found.visibility_logits[:, : len(self.parts)],
        )


def train_arm(
    hands: Hands,
    settings: RunSettings,
    arm: Arm,
    seed: int,
    aligner: MultiSpatialTransformer | None,
    *,
    quiet: bool = True,
) -> HandMSTN:
    """Train one arm; the aligner is shared by all arms that have one."""
    own = of_arm(settings, arm)
    shared = aligner if arm in {"palm", "fingers-ce", "all"} else None
    if arm == "palm" and shared is not None and len(shared.parts) > 1:
        shared = palm_of(shared, own)
    return train_identities(seen_by(hands, own, arm), own, seed, shared, quiet=quiet)


def look(model: HandMSTN, hands: Hands, settings: RunSettings, arm: Arm) -> Embedded:
    """Vectors of pictures as an arm sees them."""
    return embed(model, seen_by(hands, of_arm(settings, arm), arm), batch_size=64)


def measured(
    model: HandMSTN, found: Embedded, splits: Any, mated: Any, *, visible: bool = True
) -> tuple[Found, np.ndarray]:
    """Counts of the probes against the gallery, and the rows of the probes with a mate."""
    weights = model.weights.detach().cpu().numpy()
    classes = found.hands.classes
    gallery = np.flatnonzero((splits == "gallery") & mated)
    probes = np.flatnonzero((splits == "probe") | ~mated)
    scorer = Scorer(found.enrolled.part(gallery), classes[gallery], weights, visible=visible)
    return count(scorer, found.enrolled.part(probes), classes[probes]), probes[mated[probes]]


def numbers(found: Found, fpir: float = 0.01) -> Mapping[str, float]:
    """Rates in percent."""
    result = found.identification.compute()
    out = {"rank-1": 100 * float(result.cmc[0]), "rank-5": 100 * float(result.cmc[4]), "mAP": 100 * result.map_step}
    v = found.verification.compute()
    out["EER"] = 100 * v.eer
    if any(len(part) for part in found.open_set.top):
        out["DIR"] = 100 * found.open_set.compute(fpir).dir
    return out
