"""Masks of tokens (B, T), from those that models are given."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HIDDEN = -5000.0
"""Added to the score of a token, less than this hides it: models add -1e4 or more extreme, biases of positions are smaller."""


def as_tokens(mask: Any, *, square: bool = True) -> Tensor | None:
    """(B, T), True for a token that counts, from a mask of two dimensions or of attention (B, 1, queries, keys).

    A token counts if it sees itself; where queries and keys differ, if any query sees it. Fractions are booleans where all
    lie between 0 and 1 (and not all are 0), else they are added to the scores, and very negative ones hide a token.
    """
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim not in (2, 3, 4):
        return None
    seen = mask.bool()
    if mask.is_floating_point() and (not mask.any() or (mask < 0).any() or (mask > 1).any()):
        seen = mask > HIDDEN
    if seen.ndim == 2:
        return seen
    seen = seen if mask.ndim == 3 else seen[:, 0]
    if square and seen.shape[1] == seen.shape[2]:
        return seen.diagonal(dim1=1, dim2=2)
    return seen.any(dim=1)


def shortened(keep: Tensor, length: int, owner: Any) -> Tensor | None:
    """The mask of fewer tokens, into which a model has made the samples or frames of a sound; None if it cannot be told."""
    if owner is None or length >= keep.shape[1]:
        return None
    counts = torch.cat([torch.tensor([keep.shape[1]]), keep.sum(dim=1).cpu()])
    known = [owner._get_feat_extract_output_lengths(counts)]
    if "add_adapter" in inspect.signature(owner._get_feat_extract_output_lengths).parameters:
        known.append(owner._get_feat_extract_output_lengths(counts, add_adapter=True))
    for found in known:
        if int(found[0]) == length:
            return (torch.arange(length) < found[1:, None]).to(keep.device)
    return None


def without_first(keep: Tensor, count: int) -> Tensor:
    """Less the first tokens of each sample, counted from the first one that is not padding."""
    return keep & (keep.cumsum(dim=1) > count) if count else keep
