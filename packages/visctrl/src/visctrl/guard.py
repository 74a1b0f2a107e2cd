"""When to stop iterating: each round inverts the last one's result, and what the inversion loses piles up.

Shapes: B pictures (B, 3, H, W) in [-1, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DriftGuard:
    """Says which pictures may go on, and why the others may not.

    Args:
        max_residual: relative change in the last evaluation of the inversion that a round starts from. Plain inversion has
            no residual to look at, so it is not looked at.
        max_clipped: growth of the share of clipped values (|x| > 1 before they are clipped), against the target's own.
    """

    max_residual: float
    max_clipped: float

    def before(self, residual: Tensor, refined: bool) -> list[str]:
        """Why a round must not be begun, for each picture; empty where it may. Shapes: ``residual`` (B,)."""
        if not refined:
            return [""] * len(residual)
        return [
            f"the inversion's residual is {x:.3g}, more than {self.max_residual:g}" if x > self.max_residual else ""
            for x in residual.tolist()
        ]

    def after(self, images: Tensor, target: Tensor) -> list[str]:
        """Why a round's result is not kept, for each picture; empty where it is."""
        growth = clipped(images) - clipped(target)
        return [
            f"the share of clipped values grew by {x:.3g}, more than {self.max_clipped:g}"
            if x > self.max_clipped
            else ""
            for x in growth.tolist()
        ]


def clipped(images: Tensor, *, beyond: float = 1.02) -> Tensor:
    """The share of values that would be clipped, of each picture. Shapes: -> (B,)."""
    return (images.abs() > beyond).flatten(1).to(torch.float64).mean(dim=1)
