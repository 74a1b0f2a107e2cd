"""When to stop iterating: each round inverts the last one's result, and what the inversion loses piles up.

Shapes: B pictures (B, 3, H, W) in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from visctrl.metrics import structure


@dataclass(frozen=True)
class DriftGuard:
    """Says which pictures may go on, and why the others may not.

    Args:
        max_residual: relative change in the last evaluation of the inversion that a round starts from. Plain inversion has
            no residual to look at, so it is not looked at.
        max_clipped: growth of the share of clipped values (|x| > 1 before they are clipped), against the target's own.
        max_layout: growth of the distance to the target's layout, whatever the colors (``metrics.structure``), against the
            first round's result: what a first edit changes is meant, what further rounds add is drift.

    Example:
        >>> DriftGuard(max_residual=0.1, max_clipped=0.05).max_layout
        inf
    """

    max_residual: float
    max_clipped: float
    max_layout: float = math.inf

    def before(self, residual: Tensor, refined: bool) -> list[str]:
        """Why a round must not be begun, for each picture; empty where it may. Shapes: ``residual`` (B,)."""
        if not refined:
            return [""] * len(residual)
        return [
            f"the inversion's residual is {x:.3g}, more than {self.max_residual:g}" if x > self.max_residual else ""
            for x in residual.tolist()
        ]

    def after(self, images: Tensor, target: Tensor, first: Tensor | None = None) -> list[str]:
        """Why a round's result is not kept, for each picture; empty where it is.

        Args:
            images: the results.
            target: the targets.
            first: the results of the first round; None in the first round, whose layout is not looked at.
        """
        bright = (clipped(images) - clipped(target)).tolist()
        laid = [0.0] * len(bright)
        if first is not None:
            laid = (structure(images, target) - structure(first, target)).tolist()
        reasons = []
        for x, y in zip(bright, laid, strict=True):
            if x > self.max_clipped:
                reasons.append(f"the share of clipped values grew by {x:.3g}, more than {self.max_clipped:g}")
            elif y > self.max_layout:
                reasons.append(f"the distance to the target's layout grew by {y:.3g}, more than {self.max_layout:g}")
            else:
                reasons.append("")
        return reasons


def clipped(images: Tensor, *, beyond: float = 1.02) -> Tensor:
    """The share of values that would be clipped, of each picture. Shapes: -> (B,)."""
    return (images.abs() > beyond).flatten(1).to(torch.float64).mean(dim=1)
