"""Rows of one tensor that are copies of another's, found by their bits."""

import torch
from torch import Tensor


def matching_rows(rows: Tensor, source: Tensor) -> Tensor | None:
    """For each row (R, n) its index among the rows of ``source`` (N, n), of which it is a copy; None if one is not.

    Equal rows are matched in their order.
    """
    if rows.data_ptr() == source.data_ptr() and rows.shape == source.shape:
        return torch.arange(len(rows), device=rows.device)
    ours, theirs = _keys(rows), _keys(source)
    order = theirs.argsort(stable=True)
    ordered = theirs[order]
    mine = ours.argsort(stable=True)
    repeats = torch.empty_like(ours)
    repeats[mine] = torch.arange(len(ours), device=ours.device) - torch.searchsorted(ours[mine], ours[mine])
    found = torch.searchsorted(ordered, ours) + repeats
    if (found >= torch.searchsorted(ordered, ours, right=True)).any():
        return None
    return order[found]


def _keys(rows: Tensor) -> Tensor:
    """A number (R,) for each row, computed from its bits, so that equal rows have equal ones."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    bits = rows.detach().contiguous().view(whole)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator).to(rows.device)
    keys = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    for start in range(0, len(rows), 1024):
        keys[start : start + 1024] = (bits[start : start + 1024].long() * factors).sum(dim=1)
    return keys
