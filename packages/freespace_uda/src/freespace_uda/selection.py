"""Which checkpoint, and which training, to trust, told without a label of the target."""

from collections.abc import Mapping, Sequence
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


EMPTY, UNSURE, APART, STRONG = 0.005, 0.7, 0.97, 2.0
"""Bounds of `ailing`: share of a mask, its precision on the source, accuracy of a discriminator, ratio of gradients."""


def ailing(rows: Sequence[tuple[int, Mapping[str, float]]]) -> list[str]:
    """What is wrong with an adversarial training by its health line, in words; nothing where it is well.

    The last fifth of the rows that were logged while the target took part is looked at, by its means.

    Args:
        rows: step and values, as `metrics.csv` has them.
    """
    late = [values for _, values in rows if "adversarial" in values]
    late = late[-max(1, len(late) // 5) :]

    def mean(name: str) -> float:
        found = [values[name] for values in late if name in values]
        return sum(found) / len(found) if found else float("nan")

    said = []
    for stream in ("rgb", "normal"):
        if (share := mean(f"mask {stream}")) < EMPTY:
            text = f"the alignment mask of the {stream} stream has {100 * share:.2g} % of the target's pixels"
            said.append(f"{text}: nothing is aligned; lower --align.tau, or train longer before --align.start")
        elif (precision := mean(f"precision on source {stream}")) < UNSURE:
            text = (
                f"of what the alignment mask of the {stream} stream would select on the source, {100 * precision:.0f} %"
            )
            said.append(f"{text} is road: other things are aligned with it; raise --align.tau or --align.start")
    for name, of in (("accuracy rgb", " of RGB"), ("accuracy normal", " of normals"), ("discriminator accuracy", "")):
        if (accuracy := mean(name)) > APART:
            text = f"the discriminator{of} tells {100 * accuracy:.0f} % of both domains apart: the features are not aligned"
            said.append(f"{text}; raise the adversarial weight, or lower --optimizer.discriminator")
    if (ratio := mean("gradient ratio")) > STRONG:
        text = f"the adversarial gradient is {ratio:.1f} times the supervised one"
        said.append(f"{text}: the labels hardly count; lower --align.weight")
    return said
