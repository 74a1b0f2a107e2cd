"""Where an edited picture's parts came from: for each token, the reference token that it attended to most.

Shapes: B targets, N target tokens, M keys, H heads.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visctrl.selection import Keys

CHUNK = 512
"""Queries whose attention is held at once."""


class Trace:
    """Takes the attention of one layer at one timestep, averaged over heads.

    Args:
        layer: number of the layer.
        time: key of the timestep.

    Attributes:
        rows: number of targets; of guided batches the conditional rows count.
        source: the reference token that each token attended to most, (B, N), or None before it was taken.
        confidence: the attention that it got, (B, N).
        share: the attention that all reference tokens got, (B, N).
    """

    def __init__(self, layer: int, time: int) -> None:
        self.layer = layer
        self.time = time
        self.rows = 1
        self.source: Tensor | None = None
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
        self.confidence, self.share = torch.cat(mass, dim=1).cpu(), torch.cat(total, dim=1).cpu()


def color_map(grid: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture in which each place has its own color: red grows to the right, green downwards, blue against both.

    Shapes: -> (h, w, 3).
    """
    h, w = grid
    y, x = np.mgrid[0:h, 0:w]
    right, down = x / max(1, w - 1), y / max(1, h - 1)
    return (255 * np.stack([right, down, 1 - (right + down) / 2], axis=-1)).round().astype(np.uint8)


def provenance_picture(
    source: Tensor, share: Tensor, target: tuple[int, int], reference: tuple[int, int]
) -> NDArray[np.uint8]:
    """For each token of one target the color of the place in the reference that it came from, paler where less came.

    Shapes: ``source`` and ``share`` (N,) -> (h, w, 3).
    """
    colors = color_map(reference).reshape(-1, 3)[source.numpy()].astype(np.float64)
    weight = share.clamp(0, 1).numpy()[:, None]
    return (weight * colors + (1 - weight) * 255).round().astype(np.uint8).reshape(*target, 3)
