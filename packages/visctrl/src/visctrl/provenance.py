"""Where an edited picture's parts came from: for each token, the reference token that it attended to most.

Shapes: B targets, N target tokens, M keys, H heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visctrl.selection import Grid, Keys, token_grid

CHUNK = 512
"""Queries whose attention is held at once."""
COLORS = {
    "blue": (31, 119, 180),
    "orange": (255, 127, 14),
    "green": (44, 160, 44),
    "red": (214, 39, 40),
    "purple": (148, 103, 189),
    "brown": (140, 86, 75),
    "pink": (227, 119, 194),
    "olive": (188, 189, 34),
    "cyan": (23, 190, 207),
    "gray": (127, 127, 127),
}
"""Colors of references by their names, in their order; those beyond share the last one."""


@dataclass(frozen=True)
class Origins:
    """What each token of one target read most.

    Attributes:
        source: number of the token in the reference's own grid, (N,).
        reference: number of that reference, (N,).
        share: the attention that all references got, (N,).
    """

    source: Tensor
    reference: Tensor
    share: Tensor


class Trace:
    """Takes the attention of one layer at one timestep, averaged over heads.

    Args:
        layer: number of the layer.
        time: key of the timestep.

    Attributes:
        rows: number of targets; of guided batches the conditional rows count.
        source: the reference token that each token attended to most, (B, N), or None before it was taken.
        reference: number of the reference that it is of, (B, N).
        confidence: the attention that it got, (B, N).
        share: the attention that all reference tokens got, (B, N).
    """

    def __init__(self, layer: int, time: int) -> None:
        self.layer = layer
        self.time = time
        self.rows = 1
        self.source: Tensor | None = None
        self.reference: Tensor | None = None
        self.confidence: Tensor | None = None
        self.share: Tensor | None = None

    def wants(self, layer: int, time: int) -> bool:
        """Whether this is its layer and timestep."""
        return (layer, time) == (self.layer, self.time)

    @torch.no_grad()
    def take(self, attn: Any, tokens: Tensor, keys: Keys) -> None:
        """Compute the attention of ``tokens`` (B, N, d) over ``keys``, in chunks of queries."""
        tokens, chosen = tokens[-self.rows :], keys.tokens[-self.rows :]
        q, k = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for x in (attn.to_q(tokens), attn.to_k(chosen))
        )
        if getattr(attn, "norm_q", None) is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        bias = 0.0 if keys.bias is None else keys.bias[-self.rows :, None].float()
        best, mass, total = [], [], []
        for part in q.split(CHUNK, dim=2):
            p = ((part @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + bias).softmax(dim=-1).mean(dim=1)[..., keys.own :]
            most = p.max(dim=-1)
            best.append(most.indices)
            mass.append(most.values)
            total.append(p.sum(dim=-1))
        index = torch.cat(best, dim=1)
        self.source = keys.positions[-self.rows :, keys.own :].gather(1, index).cpu()
        self.reference = keys.references[-self.rows :, keys.own :].gather(1, index).cpu()
        self.confidence, self.share = torch.cat(mass, dim=1).cpu(), torch.cat(total, dim=1).cpu()

    def origins(self, number: int) -> Origins | None:
        """What the tokens of one target read most; None before it was taken."""
        if self.source is None or self.reference is None or self.share is None:
            return None
        return Origins(self.source[number], self.reference[number], self.share[number])


def color_map(grid: Grid) -> NDArray[np.uint8]:
    """A picture in which each place has its own color: red grows to the right, green downwards, blue against both.

    Shapes: -> (h, w, 3).
    """
    h, w = grid
    y, x = np.mgrid[0:h, 0:w]
    right, down = x / max(1, w - 1), y / max(1, h - 1)
    return (255 * np.stack([right, down, 1 - (right + down) / 2], axis=-1)).round().astype(np.uint8)


@dataclass(frozen=True)
class Provenance:
    """Where the parts of edited pictures came from.

    Attributes:
        places: for each target, the place in its reference of each token, as a picture.
        references: for each target, the reference of each token, as a picture; None where there is one reference.
        shares: for each target, the share of its tokens that came from each reference.
    """

    places: list[NDArray[np.uint8]]
    references: list[NDArray[np.uint8]] | None
    shares: list[list[float]]


def provenance_of(origins: Sequence[Origins | None], target: Grid, references: Sequence[Grid]) -> Provenance | None:
    """Pictures and shares of all targets; None where one of them was not traced.

    Args:
        origins: what the tokens of each target read.
        target: height and width of the targets' latents.
        references: the same of each reference.
    """
    found = [x for x in origins if x is not None]
    if not found or len(found) < len(origins):
        return None
    grid = token_grid(target, len(found[0].source))
    scale = target[0] // grid[0]
    there = [(-(-h // scale), -(-w // scale)) for h, w in references]
    return Provenance(
        [provenance_picture(x, grid, there) for x in found],
        [reference_picture(x, grid) for x in found] if len(references) > 1 else None,
        [[float((x.reference == j).double().mean()) for j in range(len(references))] for x in found],
    )


def provenance_picture(origins: Origins, target: Grid, references: Sequence[Grid]) -> NDArray[np.uint8]:
    """For each token of one target the color of the place in its reference that it came from, paler where less came.

    Args:
        origins: what the tokens read.
        target: height and width of the target's tokens.
        references: the same of each reference.

    Shapes: -> (h, w, 3).
    """
    colors = np.zeros((len(origins.source), 3))
    for number, grid in enumerate(references):
        own = (origins.reference == number).numpy()
        colors[own] = color_map(grid).reshape(-1, 3)[origins.source[own].clamp(max=grid[0] * grid[1] - 1).numpy()]
    return _paler(colors, origins.share, target)


def reference_picture(origins: Origins, target: Grid) -> NDArray[np.uint8]:
    """For each token of one target the color of the reference that it came from, paler where less came.

    Shapes: -> (h, w, 3).
    """
    table = np.array(list(COLORS.values()), np.float64)
    return _paler(table[origins.reference.clamp(max=len(table) - 1).numpy()], origins.share, target)


def color_name(reference: int) -> str:
    """The name of a reference's color in ``reference_picture``."""
    return list(COLORS)[min(reference, len(COLORS) - 1)]


def _paler(colors: NDArray[np.float64], share: Tensor, target: Grid) -> NDArray[np.uint8]:
    weight = share.clamp(0, 1).numpy()[:, None]
    return (weight * colors + (1 - weight) * 255).round().astype(np.uint8).reshape(*target, 3)
