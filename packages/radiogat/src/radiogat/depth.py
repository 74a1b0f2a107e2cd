"""How much of the straight line from each cell to each transmitter is free of buildings: the physics behind the graph.

Legend: T transmitters, H rows, W columns, S samples on a line. Positions are (row, column) of cells.
"""

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tenfold import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
DepthMethod = Literal["dda", "scan", "polar"]

_CHUNK = 1 << 21
"""Samples on lines that are looked up at once: 16 MB of indices."""


def radio_depth(building: ArrayLike, transmitters: ArrayLike, method: DepthMethod = "dda") -> Floats:
    """Line-of-sight fraction of each cell for each transmitter: 1 in sight, 0 when every cell of the line is built up.

        T_t[p] = 1 - mean of building over the cells of the line p -> t,   t itself excluded

    Args:
        building: (H, W), nonzero where a building stands.
        transmitters: (T, 2) row and column of the masts' cells, counted from 0.
        method: which cells make up the line. ``dda``: one cell for each step along the longer axis, rounded on the other;
            exact under transposition. ``scan``: one cell per column (per row in the mast's own column), truncated: what the
            authors' released maps hold, which therefore see nothing in the columns beside the mast. ``polar``: prefix
            sums along rays, O(H W) for any size; differs from ``dda`` by rounding of rays.

    Returns:
        (T, H, W) float64 in [0, 1]. A mast's own cell holds 1 - building there.

    Raises:
        UserError: the raster is not two-dimensional, or a mast lies outside it.

    Source: X. Li et al., IEEE Trans. Wireless Communications 23(11), 2024, section IV, as the authors' code has it (``scan``);
    the line traversal is ours.

    Example:
        >>> radio_depth([[0, 1, 0]], [(0, 0)])  # the last cell is seen through one built-up cell
        array([[[1. , 0. , 0.5]]])
    """
    mask = np.asarray(building)
    if mask.ndim != 2:
        raise UserError(f"building: expected a raster (H, W), got shape {mask.shape}")
    mask = mask.astype(bool)
    masts = np.asarray(transmitters, dtype=np.int64).reshape(-1, 2)
    for number, (row, column) in enumerate(masts):
        if not (0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]):
            raise UserError(
                f"transmitter {number} at row {row}, column {column} lies outside the raster of {mask.shape[0]} x"
                f" {mask.shape[1]} cells"
            )
    one = {"dda": _dda, "scan": _scan, "polar": _polar}.get(method)
    if one is None:
        raise UserError(f"unknown method '{method}': expected dda, scan or polar")
    return (
        np.stack([one(mask, int(row), int(column)) for row, column in masts])
        if len(masts)
        else np.empty((0, *mask.shape))
    )


def _scan(mask: Bools, y: int, x: int) -> Floats:
    height, width = mask.shape
    flat = np.ascontiguousarray(mask).reshape(-1).view(np.uint8)
    depth = np.empty(mask.shape)
    rows = np.arange(height)
    for k in range(width):
        n = abs(x - k)
        if n == 0:
            continue
        step = 1 if x > k else -1
        slope = ((y - rows) / (x - k))[:, None]
        along = np.arange(n) * step
        at = (slope * along + rows[:, None]).astype(np.int64) * width + (k + along)  # (H, n); the cast truncates
        depth[:, k] = 1 - flat[at].sum(axis=1, dtype=np.int64) / n
    column = mask[:, x].astype(np.int64)
    total = np.concatenate([[0], np.cumsum(column)])
    above, below = rows[:y], rows[y + 1 :]
    depth[above, x] = 1 - (total[y] - total[above]) / (y - above)
    depth[below, x] = 1 - (total[below + 1] - total[y + 1]) / (below - y)
    depth[y, x] = 1 - column[y]
    return depth


def _dda(mask: Bools, y: int, x: int) -> Floats:
    height, width = mask.shape
    depth = np.empty(mask.shape)
    depth[y, x] = 1 - float(mask[y, x])
    dy = np.arange(height)[:, None] - y
    dx = np.arange(width)[None, :] - x
    steep = np.abs(dy) > np.abs(dx)
    for is_steep, grid, my, mx in ((False, mask, y, x), (True, mask.T, x, y)):
        # in both cases the longer axis is the second one of `grid`
        flat = np.ascontiguousarray(grid).reshape(-1).view(np.uint8)
        cells = np.argwhere(steep.T if is_steep else ~steep)
        minor, major = cells[:, 0] - my, cells[:, 1] - mx
        steps = np.abs(major)
        order = np.argsort(steps, kind="stable")
        order = order[np.searchsorted(steps[order], 1) :]
        out = depth.T if is_steep else depth
        bounds = np.searchsorted(steps[order], np.arange(1, (steps.max() if len(steps) else 0) + 2))
        for n, (first, last) in enumerate(pairwise(bounds), start=1):
            for start in range(first, last, max(1, _CHUNK // n)):
                ring = order[start : min(last, start + max(1, _CHUNK // n))]
                left = n - np.arange(n)  # steps that are left to the mast
                # round(minor * left / n), halves upward, in whole numbers
                rows = my + (2 * minor[ring, None] * left + n) // (2 * n)
                at = rows * grid.shape[1] + (mx + np.sign(major[ring])[:, None] * left)
                out[cells[ring, 0], cells[ring, 1]] = 1 - flat[at].sum(axis=1, dtype=np.int64) / n
    return depth


def _polar(mask: Bools, y: int, x: int) -> Floats:
    height, width = mask.shape
    dy, dx = np.mgrid[:height, :width] - np.array([y, x])[:, None, None]
    distance = np.hypot(dy, dx)
    reach = int(np.ceil(distance.max())) + 1
    rays = max(8, int(np.ceil(2 * np.pi * reach)))
    angle = np.arange(rays) * (2 * np.pi / rays)
    radius = np.arange(1, reach + 1)
    rows = np.rint(y + np.outer(np.sin(angle), radius)).astype(np.int64)
    columns = np.rint(x + np.outer(np.cos(angle), radius)).astype(np.int64)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    built = np.zeros((rays, reach), dtype=np.float64)
    built[inside] = mask[rows[inside], columns[inside]]
    total = np.concatenate([np.zeros((rays, 1)), np.cumsum(built, axis=1)], axis=1)
    ray = np.rint(np.arctan2(dy, dx) % (2 * np.pi) * (rays / (2 * np.pi))).astype(np.int64) % rays
    steps = np.rint(distance).astype(np.int64)
    depth = 1 - total[ray, steps] / np.maximum(steps, 1)
    depth[y, x] = 1 - float(mask[y, x])
    return depth


def mast_distance(shape: tuple[int, int], transmitters: ArrayLike) -> Floats:
    """Euclidean distance in cells (T, H, W) of each cell from each mast at (row, column)."""
    masts = np.asarray(transmitters, dtype=np.float64).reshape(-1, 2)
    rows, columns = np.arange(shape[0])[:, None], np.arange(shape[1])[None, :]
    return np.stack([np.hypot(rows - row, columns - column) for row, column in masts])


def distance_depth(depth: ArrayLike, distance: ArrayLike, exponent: float = 0.1) -> Floats:
    """D[p] = sum_t T_t[p] / d_t^exponent, where an infinite value at a mast becomes the largest finite one.

    Args:
        depth: (T, H, W) line-of-sight fractions.
        distance: (T, H, W) distances in cells.
        exponent: 0.1 in the authors' code, where this is a variant that is switched off.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        total = (np.asarray(depth) / np.asarray(distance) ** exponent).sum(axis=0)
    finite = np.isfinite(total)
    return np.where(finite, total, total[finite].max() if finite.any() else 0.0)


def power_depth(depth: ArrayLike, distance_m: ArrayLike, freq_mhz: float) -> Floats:
    """D_t[p] = T_t[p] max(0, 135 - 20 log10 f_MHz - 20 log10 d_m): the radio depth of PIRM3D, in dB.

    Args:
        depth: (T, H, W) line-of-sight fractions.
        distance_m: (T, H, W) distances in meters; below one meter counts as one.
        freq_mhz: frequency.
    """
    loss = 20 * np.log10(freq_mhz) + 20 * np.log10(np.maximum(np.asarray(distance_m), 1.0))
    return np.asarray(depth) * np.maximum(0.0, 135 - loss)
