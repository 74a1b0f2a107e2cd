"""Which checkpoint to trust, told without a label of the target: its two modalities agree, and it is sure."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from freespace_uda.objectives import entropy

SelectBy = Literal["agreement", "entropy", "last"]


class Signals(NamedTuple):
    """What a checkpoint looks like on the target's unlabeled pictures.

    Attributes:
        agreement: share of the pixels where the heads of RGB and of normals say the same; 1 with one modality.
        entropy: mean entropy of the fused head in bits, 0 to 1.
        road: share of the pixels that it calls road.
    """

    agreement: float
    entropy: float
    road: float

    def score(self, by: SelectBy) -> float:
        """What is compared; more is better.

        ``agreement``: agreement x (1 - entropy); ``entropy``: 1 - entropy; ``last``: 0 for all, so that the last one wins.
        """
        if by == "agreement":
            return self.agreement * (1 - self.entropy)
        return 1 - self.entropy if by == "entropy" else 0.0

    def plausible(self, prior: float) -> bool:
        """Whether the share of road lies within half and twice that of the source's labels.

        All background has agreement 1 and entropy 0, so without this guard nothing could beat it.
        """
        return 0.5 * prior <= self.road <= 2 * prior


@torch.no_grad()
def signals(fused: Tensor, rgb: Tensor | None, normal: Tensor | None) -> Signals:
    """Signals of a batch of logits (B, 1, H, W)."""
    same = 1.0 if rgb is None or normal is None else float(((rgb > 0) == (normal > 0)).float().mean())
    return Signals(same, float(entropy(fused).mean()), float((fused > 0).float().mean()))


def mean_signals(found: list[Signals], weights: list[int]) -> Signals:
    """Signals of several batches as those of all their pictures."""
    total = sum(weights)
    means = [
        sum(w * value for w, value in zip(weights, column, strict=True)) / total for column in zip(*found, strict=True)
    ]
    return Signals(*means)


def better(found: Signals, best: Signals | None, prior: float, by: SelectBy) -> bool:
    """Whether a later checkpoint replaces the best one so far.

    An implausible one never replaces a plausible one; among equals the later one wins.
    """
    if best is None:
        return True
    if by == "last":
        return True
    if found.plausible(prior) != best.plausible(prior):
        return found.plausible(prior)
    return found.score(by) >= best.score(by)
