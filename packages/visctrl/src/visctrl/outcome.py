"""What an edit gives, and where each of its targets stands between rounds.

Shapes: B targets, latents (B, C, h, w), images (B, 3, H, W) in [-1, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from torch import Tensor

from visctrl.provenance import Origins, Trace


@dataclass
class EditOutput(BaseOutput):  # type: ignore[misc]  # diffusers has no types
    """What an edit gives.

    Attributes:
        images: the edited pictures (B, 3, H, W) in [-1, 1].
        latents: their latents.
        history: the pictures after each round, where they were asked for; one tensor per round that was made.
        residuals: of each round, the inversion's residual of each picture (NaN where it was not made).
        rounds: the round that each picture is of, 0 for the target itself.
        verdicts: why no further round was made; empty where all were.
        rows: pictures that went through the network, guidance branches and references counted.
        seconds: wall time.
        provenance: for each picture, which place of its reference each token came from, as a picture.
        read_from: for each picture, which reference each token came from, as a picture; None where there was one.
        shares: for each picture, the share of its tokens that came from each reference.
        unsafe: what the pipeline's safety checker said of each picture, where it has one; such pictures are black.
    """

    images: Tensor
    latents: Tensor
    history: list[Tensor] | None = None
    residuals: list[list[float]] | None = None
    rounds: list[int] | None = None
    verdicts: list[str] | None = None
    rows: int = 0
    seconds: float = 0.0
    provenance: list[NDArray[np.uint8]] | None = None
    read_from: list[NDArray[np.uint8]] | None = None
    shares: list[list[float]] | None = None
    unsafe: list[bool] | None = None


class State:
    """Where each target stands."""

    def __init__(self, latents: Tensor, target: Tensor, rounds: int) -> None:
        self.latents = latents.clone()
        self.target = target
        self.images = target.float().clone()
        self.first: Tensor | None = None
        self.rounds = [0] * len(latents)
        self.verdicts = [""] * len(latents)
        self.residuals = [[float("nan")] * len(latents) for _ in range(rounds)]
        self.origins: list[Origins | None] = [None] * len(latents)
        self.history: list[Tensor] = []
        self._stopped = torch.zeros(len(latents), dtype=torch.bool)

    def active(self) -> Tensor:
        """Numbers of the targets that go on."""
        return (~self._stopped).nonzero().flatten().to(self.latents.device)

    def stop(self, active: Tensor, reasons: Sequence[str]) -> None:
        """Stop those with a reason, at the round before."""
        for i, reason in zip(active.tolist(), reasons, strict=True):
            if reason:
                self._stopped[i] = True
                self.verdicts[i] = f"stopped after round {self.rounds[i]}: {reason}"

    def note_residuals(self, number: int, active: Tensor, residual: Tensor) -> None:
        """Keep the residuals that a round starts from."""
        for i, x in zip(active.tolist(), residual.tolist(), strict=True):
            self.residuals[number][i] = x

    def keep(self, number: int, active: Tensor, latents: Tensor, images: Tensor, reasons: Sequence[str]) -> None:
        """Take over a round's results, but those with a reason from the second round on."""
        for n, (i, reason) in enumerate(zip(active.tolist(), reasons, strict=True)):
            if not reason or number == 0:
                self.latents[i], self.images[i], self.rounds[i] = (
                    latents[n],
                    images[n].to(self.images.device),
                    number + 1,
                )
        if number == 0:
            self.first = self.images.clone()
        self.stop(active, reasons)

    def take_trace(self, active: Tensor, trace: Trace | None) -> None:
        """Keep where the parts of the pictures of this round came from."""
        if trace is None or trace.source is None:
            return
        for n, i in enumerate(active.tolist()):
            if not self._stopped[i] or self.origins[i] is None:
                self.origins[i] = trace.origins(n)

    def remember(self) -> None:
        """Add the pictures as they are to the history."""
        self.history.append(self.images.clone())
