"""The graph over the cells of an area: which cells are alike for radio waves, for any frequency, from one stored score.

Legend: N nodes (cells without a building, row by row), E edges, K offsets of the stencil, T transmitters, H x W cells.
Row = target (who listens), column = source (who is listened to).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from radiogat.config import GraphConfig
from radiogat.depth import Bools, Floats, distance_depth, mast_distance, power_depth
from tenfold import UserError
from tenfold.errors import needs

Window = tuple[slice, slice]


def check_frequency(freq_mhz: float) -> float:
    """The frequency, when it can be one in MHz.

    Raises:
        UserError: not positive, or so small or large that another unit was meant.
    """
    if not 10 <= freq_mhz <= 1e6:
        hint = "give MHz, not GHz" if 0 < freq_mhz < 10 else "give MHz, not Hz" if freq_mhz > 1e6 else "expected MHz"
        raise UserError(f"freq_mhz is {freq_mhz:g}: {hint}")
    return float(freq_mhz)


def stencil_offsets(radius: float) -> NDArray[np.int64]:
    """Offsets (K, 2) of all cells closer than ``radius`` (strictly), in row-major order; 69 for 4.5 cells."""
    reach = int(np.ceil(radius))
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    near = dy**2 + dx**2 < radius**2
    return np.stack([dy[near], dx[near]], axis=1)


def shifted(shape: tuple[int, int], dy: int, dx: int) -> tuple[Window, Window]:
    """Windows of the targets and of their sources at this offset, inside a raster; empty where it is too small."""
    (y, to_y), (x, to_x) = _range(shape[0], dy), _range(shape[1], dx)
    return (slice(y, to_y), slice(x, to_x)), (slice(y + dy, to_y + dy), slice(x + dx, to_x + dx))


def _range(size: int, offset: int) -> tuple[int, int]:
    first = min(size, max(0, -offset))
    return first, max(first, size - max(0, offset))


@dataclasses.dataclass(frozen=True)
class Adjacency:
    """The edges at one frequency, as compressed sparse rows, and as a stencil over the raster.

    Attributes:
        indptr: (N + 1) int64; the sources of target i are ``indices[indptr[i] : indptr[i + 1]]``, ascending.
        indices: (E) int64.
        mask: (K, H, W) bool, the same edges by offset and target cell.
        offsets: (K, 2).
        street: (H, W) bool, the cells that are nodes.
    """

    indptr: Tensor
    indices: Tensor
    mask: Bools
    offsets: NDArray[np.int64]
    street: Bools

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @cached_property
    def rows(self) -> Tensor:
        """(E) target of each edge."""
        return torch.repeat_interleave(torch.arange(self.nodes, device=self.indptr.device), self.indptr.diff())

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose as ``indptr, indices, permutation``: its e-th edge is edge ``permutation[e]`` here."""
        permutation = torch.sort(self.indices, stable=True).indices
        counts = torch.bincount(self.indices, minlength=self.nodes)
        indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return indptr, self.rows[permutation], permutation

    @property
    def edge_index(self) -> Tensor:
        """(2, E) sources and targets, as torch-geometric has them."""
        return torch.stack([self.indices, self.rows])

    def to(self, device: torch.device | str) -> "Adjacency":
        """The same edges with the index tensors on a device."""
        return dataclasses.replace(self, indptr=self.indptr.to(device), indices=self.indices.to(device))

    def to_dense(self) -> Tensor:
        """(N, N) bool."""
        dense = torch.zeros(self.nodes, self.nodes, dtype=torch.bool, device=self.indptr.device)
        dense[self.rows, self.indices] = True
        return dense


class RadioGraph:
    """All frequencies' adjacencies of one raster, from one score per edge; made by ``build_graph``.

    An edge is there at frequency f when its score is at most a threshold that depends on f alone, so the graphs are
    nested, and nothing is stored per band.

    Attributes:
        street: (H, W) bool.
        offsets: (K, 2) of the stencil, its own cell included.
        score: (K, H, W) float32 by offset and target; infinite where no edge can be.
    """

    def __init__(
        self,
        street: Bools,
        offsets: NDArray[np.int64],
        score: Callable[[float], NDArray[np.float32]] | NDArray[np.float32],
        threshold: Callable[[float], float],
    ) -> None:
        self.street = street
        self.offsets = offsets
        self._score = score
        self._threshold = threshold

    @property
    def nodes(self) -> int:
        """N."""
        return int(self.street.sum())

    def score(self, freq_mhz: float) -> NDArray[np.float32]:
        """(K, H, W); the same array for every frequency, except for the kind ``power``."""
        return self._score(freq_mhz) if callable(self._score) else self._score

    def threshold(self, freq_mhz: float) -> float:
        """The largest score of an edge at this frequency."""
        return self._threshold(check_frequency(freq_mhz))

    def adjacency(self, freq_mhz: float) -> Adjacency:
        """The edges at this frequency; every node has at least the edge to itself."""
        mask = self.score(freq_mhz) <= np.float32(self.threshold(freq_mhz))
        height, width = self.street.shape
        cells = np.flatnonzero(self.street)
        index = np.full(height * width, -1, dtype=np.int64)
        index[cells] = np.arange(len(cells))
        by_node = mask.reshape(len(self.offsets), -1).T[cells]  # (N, K)
        targets, kth = np.nonzero(by_node)
        sources = index[cells[targets] + (self.offsets @ np.array([width, 1]))[kth]]
        indptr = np.concatenate([[0], np.cumsum(by_node.sum(axis=1))])
        return Adjacency(torch.from_numpy(indptr), torch.from_numpy(sources), mask, self.offsets, self.street)

    def to_pyg(self, freq_mhz: float) -> "object":
        """A ``torch_geometric.data.Data`` with ``edge_index`` and the nodes' cells as ``pos`` (row, column).

        Raises:
            MissingExtraError: torch-geometric is not installed.
        """
        needs("torch_geometric", "pyg", "radiogat")
        from torch_geometric.data import Data

        pos = torch.from_numpy(np.argwhere(self.street)).float()
        return Data(edge_index=self.adjacency(freq_mhz).edge_index, pos=pos, num_nodes=self.nodes)


def build_graph(
    building: ArrayLike,
    depth: ArrayLike,
    config: GraphConfig | None = None,
    *,
    transmitters: ArrayLike | None = None,
    cell_m: float = 1.0,
) -> RadioGraph:
    """Join cells that are near each other and that radio waves reach alike.

        edge i <- j at frequency f:  |p_i - p_j| < R  and  max_t |T_t[i] - T_t[j]| <= delta / log10(f in MHz)

    That is the default kind; ``GraphConfig`` has the others.

    Args:
        building: (H, W), nonzero where a building stands; these cells are no nodes.
        depth: (T, H, W) line-of-sight fractions of ``radio_depth``.
        config: rule and its constants.
        transmitters: (T, 2) rows and columns, for the kinds that use distances (distance, power, transmitter).
        cell_m: side of a cell in meters, for the kind ``power``.

    Raises:
        UserError: shapes disagree, no cell is free, or a kind lacks the transmitters.

    Source: X. Li et al. 2024, section IV; the constants R = 4.5 and delta = 0.1 are those of the authors' code. A project
    that quotes the paper's equation (20) has the absolute value, the authors' code the signed difference
    (``gate="signed"``), which makes the graph directed.
    """
    config = config or GraphConfig()
    street = ~np.asarray(building).astype(bool)
    T = np.asarray(depth, dtype=np.float64)
    if T.ndim != 3 or T.shape[1:] != street.shape:
        raise UserError(f"depth has shape {T.shape}, expected (transmitters, {street.shape[0]}, {street.shape[1]})")
    if not street.any():
        raise UserError("building: no cell is free of buildings, so there is nothing to predict")
    offsets = stencil_offsets(config.reach)
    if config.kind in {"distance", "power", "transmitter"}:
        if transmitters is None:
            raise UserError(f"kind {config.kind} needs the positions of the transmitters")
        distance = mast_distance(street.shape, transmitters)
    if config.kind == "depth":
        score = _scores(street, offsets, T, config.gate)
        return RadioGraph(street, offsets, score, lambda f: config.delta / np.log10(f))
    if config.kind == "distance":
        D = distance_depth(T, distance)[None]
        span = (D.min() / np.sqrt(config.band_range[1]), D.max() / np.sqrt(config.band_range[0]))
        scale = max(span[1] - span[0], 1e-12)
        score = _scores(street, offsets, D, config.gate)
        return RadioGraph(street, offsets, score, lambda f: 0.01 * scale * np.sqrt(f))
    if config.kind == "power":

        def at(f: float) -> NDArray[np.float32]:
            return _scores(street, offsets, power_depth(T, distance * cell_m, f), config.gate)

        return RadioGraph(street, offsets, at, lambda f: config.delta * 10 * np.log10(f))
    if config.kind == "transmitter":
        strongest = np.lexsort((distance, -T), axis=0)[0].astype(np.float64)
        score = _scores(street, offsets, strongest[None], "abs")
        return RadioGraph(street, offsets, score, lambda f: 0.5)
    score = _scores(street, offsets, T, "none")
    if config.kind == "obstruction":
        for o, (dy, dx) in enumerate(offsets):
            score[o][_blocked(street, int(dy), int(dx))] = np.inf
    return RadioGraph(street, offsets, score, lambda f: 0.5)


def _scores(street: Bools, offsets: NDArray[np.int64], values: Floats, gate: str) -> NDArray[np.float32]:
    """max_t of the difference target - source in (T, H, W) values, by offset and target."""
    score = np.full((len(offsets), *street.shape), np.inf, dtype=np.float32)
    count = len(offsets)
    for o, (dy, dx) in enumerate(offsets[: count // 2 + 1] if gate != "signed" else offsets):
        target, source = shifted(street.shape, int(dy), int(dx))
        there = street[target] & street[source]
        if gate == "none" or not len(values):
            found = np.zeros(there.shape)
        else:
            found = np.full(there.shape, -np.inf)
            for value in values:
                difference = value[target] - value[source]
                np.maximum(found, np.abs(difference) if gate == "abs" else difference, out=found)
        edge = np.where(there, found, np.inf)
        score[o][target] = edge
        if gate != "signed":
            score[count - 1 - o][source] = edge  # the offset's mirror image
    return score


def _blocked(street: Bools, dy: int, dx: int) -> Bools:
    """(H, W): whether the straight segment from a cell to its neighbor at this offset crosses a building."""
    if (dy, dx) > (-dy, -dx):  # seen from the other end, so that both directions agree
        blocked = np.zeros(street.shape, dtype=bool)
        target, source = shifted(street.shape, dy, dx)
        blocked[target] = _blocked(street, -dy, -dx)[source]
        return blocked
    blocked = np.zeros(street.shape, dtype=bool)
    target, _ = shifted(street.shape, dy, dx)
    rows, columns = np.arange(street.shape[0])[target[0]], np.arange(street.shape[1])[target[1]]
    n = max(abs(dy), abs(dx))
    for step in range(1, n):
        y, x = (2 * dy * step + n) // (2 * n), (2 * dx * step + n) // (2 * n)
        blocked[target] |= ~street[np.ix_(rows + y, columns + x)]
    return blocked


def blocks(shape: tuple[int, int], side: int = 40) -> list[Window]:
    """The windows of the authors' protocol: the raster cropped at its end to multiples of ``side``, cut, row by row."""
    return [
        (slice(y, y + side), slice(x, x + side))
        for y in range(0, shape[0] - side + 1, side)
        for x in range(0, shape[1] - side + 1, side)
    ]


def block_graphs(building: ArrayLike, depth: ArrayLike, config: GraphConfig | None = None) -> Iterator[RadioGraph]:
    """One graph per block of ``config.block`` cells, without edges across blocks, as the authors' code has them.

    With ``config.compat == "2025"`` each block reads its depth at the block's own row and column in the whole map, that is
    from the map's top left corner: what the released adjacencies hold (a fault of the code, kept for comparison).
    """
    config = config or GraphConfig()
    mask, T = np.asarray(building), np.asarray(depth)
    for rows, columns in blocks((mask.shape[0], mask.shape[1]), config.block):
        own = T[:, rows, columns]
        if config.compat == "2025":
            own = T[:, : own.shape[1], : own.shape[2]]
        if not mask[rows, columns].astype(bool).all():
            yield build_graph(mask[rows, columns], own, config)
