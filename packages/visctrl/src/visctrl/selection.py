"""Which tokens a target's queries attend to: its own, a reference's, or both; chosen by masks, weighed by a bias.

A mask chooses keys instead of hiding them, so that fewer keys cost less. Shapes: B rows, N tokens of d entries, M keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visctrl.config import Mode
from visctrl.errors import ShapeMismatchError

HIDDEN = -1e4
"""Logit of a key that only fills up a row; finite, for half precision."""
Grid = tuple[int, int]


@dataclass(frozen=True)
class Keys:
    """What queries attend to.

    Attributes:
        tokens: (B, M, d), of which keys and values are made.
        bias: what is added to each key's logit, (B, 1, M), or None for nothing.
        own: how many of them, the first ones, are the target's own.
        positions: which image token each key was, (B, M); of references, in their own picture.
        references: number of the reference that each key is of, (B, M); -1 for the target's own.
    """

    tokens: Tensor
    bias: Tensor | None
    own: int
    positions: Tensor
    references: Tensor


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of one reference at one layer.

    Attributes:
        tokens: (B, N, d).
        grid: height and width of its latents.
        mask: where its subject is, (H, W) in [0, 1]; None is everywhere.
        log_weight: what is added to its keys' logits.
        number: its number among all references.
    """

    tokens: Tensor
    grid: Grid
    mask: Tensor | None = None
    log_weight: float = 0.0
    number: int = 0


def token_grid(latents: Grid, tokens: int) -> Grid:
    """Height and width of a layer's tokens, for latents of h x w that are halved as often as needed.

    Raises:
        ShapeMismatchError: no number of halvings gives so many tokens.
    """
    h, w = latents
    while h * w > tokens:
        h, w = math.ceil(h / 2), math.ceil(w / 2)
    if h * w != tokens:
        raise ShapeMismatchError(f"{tokens} tokens are no grid of latents of {latents[0]} x {latents[1]}")
    return h, w


def foreground_tokens(mask: Tensor, latents: Grid, tokens: int) -> Tensor:
    """Which tokens are foreground: those whose mean over the mask is at least 1/2. Shapes: (..., H, W) -> (..., N) bool."""
    small = F.adaptive_avg_pool2d(mask.float().reshape(-1, 1, *mask.shape[-2:]), token_grid(latents, tokens))
    return (small >= 0.5).reshape(*mask.shape[:-2], tokens)


def choose_keys(
    own: Tensor,
    references: Sequence[ReferenceTokens],
    mode: Mode,
    *,
    bias: float = 0.0,
    own_mask: Tensor | None = None,
    grid: Grid | None = None,
) -> Keys | None:
    """What the queries of a layer attend to; None where nothing but the target's own tokens is left.

        replace   [references]
        union     [own; references],              logits of references + bias
        subject   [own background; references' foreground],    logits of references + bias

    Args:
        own: the target's tokens.
        references: the references' tokens, in the same rows.
        mode: as above.
        bias: as above.
        own_mask: where the target's subject is, (T, H, W); rows of ``own`` are T targets per guidance branch. Without it
            all of the target's own tokens are keys in mode subject.
        grid: height and width of the target's latents, for masks.

    Shapes: ``own`` (B, N, d).
    """
    rows, number, _ = own.shape
    parts: list[Tensor] = []
    biases: list[Tensor] = []
    places: list[Tensor] = []
    numbers: list[Tensor] = []

    def add(tokens: Tensor, weight: Tensor, position: Tensor, number: int = -1) -> None:
        parts.append(tokens)
        biases.append(weight.expand(rows, -1))
        places.append(position.expand(rows, -1))
        numbers.append(torch.full_like(places[-1], number))

    everywhere = torch.arange(number, device=own.device)[None]
    if mode == "union" or (mode == "subject" and own_mask is None):
        add(own, own.new_zeros(1, number), everywhere)
    elif mode == "subject":
        assert own_mask is not None
        assert grid is not None
        behind = ~foreground_tokens(own_mask, grid, number).to(own.device)
        add(*_padded(own, behind.repeat(rows // len(behind), 1)))
    kept = 0 if not parts else parts[0].shape[1]
    shift = 0.0 if mode == "replace" else bias
    for reference in references:
        tokens, count = reference.tokens, reference.tokens.shape[1]
        index = torch.arange(count, device=own.device)
        if mode == "subject" and reference.mask is not None:
            index = index[foreground_tokens(reference.mask, reference.grid, count).to(own.device)]
            tokens = tokens[:, index]
        add(tokens, own.new_full((1, len(index)), shift + reference.log_weight), index[None], reference.number)
    if sum(part.shape[1] for part in parts) == kept:
        return None
    weights = torch.cat(biases, dim=1)
    same = mode != "union" and bool((weights == weights[:, :1]).all())
    plain = same or not bool(weights.any())
    told = None if plain else weights[:, None]
    return Keys(torch.cat(parts, dim=1), told, kept, torch.cat(places, dim=1), torch.cat(numbers, dim=1))


def _padded(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept tokens of each row, filled up to the longest row with keys that are hidden.

    Shapes: (B, N, d), (B, N) -> (B, M, d), (B, M), (B, M).
    """
    count = keep.sum(dim=1)
    most = int(count.max())
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    filling = torch.arange(most, device=tokens.device)[None] >= count[:, None]
    chosen = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
    return chosen, torch.where(filling, HIDDEN, 0.0).to(tokens.dtype), order
