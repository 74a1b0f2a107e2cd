"""Depth maps, adjacencies, attention layers and kriging: equality first, then time in turn with a peer.

The peers are torch-geometric's ``GATConv`` and PyKrige at 16 neighbors with the fastest backend that it has here; for depth
and adjacency, where no library does it, literal loops over cells and pairs as the released code has them.
"""

import copy
import dataclasses
import importlib.metadata
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray
from radiogat.attention import GraphAttention
from radiogat.baselines import LocalKriging, Variogram
from radiogat.config import CityConfig, GraphConfig
from radiogat.depth import radio_depth
from radiogat.graph import Adjacency, blocks, build_graph
from radiogat.samples import Grid, RadioSamples
from radiogat.simulate import city
from torch import Tensor

from tenfold import bench

Floats = NDArray[np.float64]
BANDS = (1750, 2750, 3750, 4750, 5750)
VARIOGRAM = Variogram(60.0, 40.0, 0.5)


def literal_scan(mask: NDArray[np.bool_], y: int, x: int, rows: range) -> Floats:
    """The released maps' definition for some rows, cell by cell in Python."""
    built = mask.tolist()
    out = np.empty((len(rows), mask.shape[1]))
    for n, j in enumerate(rows):
        for k in range(mask.shape[1]):
            if k != x:
                step = 1 if x > k else -1
                slope = (y - j) / (x - k)
                count = sum(built[int(slope * (c - k) + j)][c] for c in range(k, x, step))
                out[n, k] = 1 - count / abs(x - k)
            elif j != y:
                step = 1 if y > j else -1
                out[n, k] = 1 - sum(built[r][k] for r in range(j, y, step)) / abs(y - j)
            else:
                out[n, k] = 1 - built[j][k]
    return out


def literal_adjacency(mask: NDArray[np.bool_], depth: Floats, threshold: float) -> NDArray[np.bool_]:
    """Two nested loops over the nodes of a block."""
    cells = np.argwhere(~mask).tolist()
    T = depth[:, ~mask].T.tolist()
    out = np.zeros((len(cells), len(cells)), dtype=bool)
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            if math.sqrt((y - v) ** 2 + (x - u) ** 2) < 4.5 and all(
                abs(a - b) <= threshold for a, b in zip(T[i], T[j], strict=True)
            ):
                out[i, j] = True
    return out


def depth_row() -> bench.Comparison:
    """The whole depth map of one mast; the peer computes every 20th row and its time counts 20 times."""
    maps = city(CityConfig(size=440, seed=100))
    building, mast = maps.building, maps.transmitters[:1]
    assert building is not None
    rows = range(0, 440, 20)

    def equal(ours: Floats, peer: Floats) -> str:
        assert np.array_equal(ours[0, list(rows)], peer)
        return "equal bit for bit"

    row = bench.compare(
        "depth_scan",
        lambda: radio_depth(building, mast, "scan"),
        lambda: literal_scan(building, int(mast[0, 0]), int(mast[0, 1]), rows),
        equal,
        shape="440x440 cells, 1 mast; the loop computes 1 row in 20",
        required=f">= {10 / len(rows) * 1:.3g}",
    )
    return scaled(row, 440 / len(rows), ">= 10")


def scaled(row: bench.Comparison, factor: float, required: str) -> bench.Comparison:
    """A row whose peer did one part in ``factor`` of the work."""
    low, high = row.ci95 or (row.ratio, row.ratio)
    ratio, ci95 = row.ratio * factor, (low * factor, high * factor)
    holds = bench.decide(required, ratio, ci95)
    return dataclasses.replace(row, peer=row.peer * factor, ratio=ratio, ci95=ci95, required=required, holds=holds)


def adjacency_row() -> bench.Comparison:
    """Blocks x five bands of an area; the peer computes one block and one band, which counts for all of them."""
    maps = city(CityConfig(size=440, seed=100))
    building, depth = maps.building, maps.scene.depth
    assert building is not None
    assert depth is not None
    windows = blocks((440, 440))

    def ours() -> list[Adjacency]:
        graphs = [build_graph(building[w], depth[:, *w]) for w in windows]
        return [graph.adjacency(f) for graph in graphs for f in BANDS]

    def equal(found: list[Adjacency], peer: NDArray[np.bool_]) -> str:
        assert np.array_equal(found[0].to_dense().numpy(), peer)
        return "equal bit for bit"

    threshold = 0.1 / math.log10(BANDS[0])
    row = bench.compare(
        "adjacency",
        ours,
        lambda: literal_adjacency(building[windows[0]], depth[:, *windows[0]], threshold),
        equal,
        shape=f"{len(windows)} blocks of 40x40 x 5 bands; the loop does 1 block and 1 band",
        required=">= 0",
        pairs=5,
    )
    return scaled(row, len(windows) * len(BANDS), ">= 10")


def layer_inputs() -> tuple[Adjacency, Tensor]:
    """10,000 nodes, 69 edges each, 80 channels."""
    building = np.zeros((100, 100), dtype=bool)
    graph = build_graph(building, np.ones((1, 100, 100)), GraphConfig(kind="around"))
    return graph.adjacency(BANDS[0]), torch.randn(10_000, 80, generator=torch.Generator().manual_seed(0))


def layers() -> tuple[GraphAttention, Any]:
    """Ours and torch-geometric's, with the same weights."""
    from torch_geometric.nn import GATConv

    torch.manual_seed(0)
    ours = GraphAttention(80, 320)
    peer = GATConv(80, 320, heads=1, negative_slope=0.01, add_self_loops=False)
    with torch.no_grad():
        peer.lin.weight.copy_(ours.weight.T)
        peer.att_dst.copy_(ours.target.view(1, 1, -1))
        peer.att_src.copy_(ours.source.view(1, 1, -1))
        peer.bias.copy_(ours.bias)
    return ours, peer


def close(ours: list[Tensor], peer: list[Tensor]) -> str:
    """Largest difference over the largest value."""
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, peer, strict=True))
    assert worst <= 1e-5, worst
    return f"equal to {worst:.0e} of the largest value"


def layer_rows() -> list[bench.Comparison]:
    """Forward, and forward with all gradients."""
    adjacency, x = layer_inputs()
    ours, peer = layers()
    edge_index = adjacency.edge_index
    x.requires_grad_()

    @torch.no_grad()
    def forward(run: Callable[[], Tensor]) -> list[Tensor]:
        return [run()]

    def both(run: Callable[[], Tensor], parts: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(run().square().sum(), parts))

    mine = [x, ours.weight, ours.target, ours.source, ours.bias]
    theirs = [x, peer.lin.weight, peer.att_dst, peer.att_src, peer.bias]

    def same(_: list[Tensor], __: list[Tensor]) -> str:
        """In float64: in float32 one of the edges may round to the other side of LeakyReLU's kink."""
        wide = x.detach().double().requires_grad_()
        one, other = copy.deepcopy(ours).double(), copy.deepcopy(peer).double()
        found = both(lambda: one(wide, adjacency), [wide, one.weight, one.target, one.source, one.bias])
        parts = [wide, other.lin.weight, other.att_dst, other.att_src, other.bias]
        expected = both(lambda: other(wide, edge_index), parts)
        expected[1] = expected[1].T
        return close(found, [e.reshape(f.shape) for f, e in zip(found, expected, strict=True)]) + " in float64"

    shape = f"80 -> 320, N = 10,000, E = {len(adjacency.indices):,}"
    return [
        bench.compare(
            "gat_forward",
            lambda: forward(lambda: ours(x, adjacency)),
            lambda: forward(lambda: peer(x, edge_index)),
            close,
            shape=shape,
            required=">= 10",
        ),
        bench.compare(
            "gat_forward_backward",
            lambda: both(lambda: ours(x, adjacency), mine),
            lambda: both(lambda: peer(x, edge_index), theirs),
            same,
            shape=shape,
            required=">= 5",
        ),
    ]


def once(which: str) -> None:
    """Inputs, layers and one pass over a small graph; then forward and backward of one layer, or nothing."""
    torch.set_num_threads(1)
    adjacency, x = layer_inputs()
    ours, peer = layers()
    edge_index = adjacency.edge_index
    x.requires_grad_()
    _ = adjacency.rows, adjacency.transposed
    small = build_graph(np.zeros((9, 9), bool), np.ones((1, 9, 9))).adjacency(BANDS[0])
    warm = torch.randn(81, 80, requires_grad=True)
    (ours(warm, small).sum() + peer(warm, small.edge_index).sum()).backward()
    if which != "nothing":
        (ours(x, adjacency) if which == "ours" else peer(x, edge_index)).square().sum().backward()


def memory_row() -> bench.Comparison:
    """Peak memory of forward and backward, less that of a process that only makes the inputs."""
    ours, peer, nothing = ([sys.executable, __file__, "--once", which] for which in ("ours", "peer", "nothing"))
    shape = "the same, forward and backward"
    return bench.resident("gat_memory", ours, peer, nothing, shape=shape, required=">= 20", equal="as above")


def kriging_rows() -> list[bench.Comparison]:
    """Single places, a band's map of 300x300 cells, and a map of 200x200 cells from five bands' pooled measurements."""
    from pykrige.ok import OrdinaryKriging

    rng = np.random.default_rng(0)
    rows = []
    for id, count, side in (("kriging", 2000, 0), ("kriging_map", 4500, 300), ("kriging_pooled_map", 10_000, 200)):
        xy, places = rng.uniform(0, 300, (count, 2)), rng.uniform(0, 300, (2000, 2))
        if side:
            places = Grid(0.0, 300.0, 300 / side, side, side).centers()
        rss = -60 + 8 * np.sin(xy[:, 0] / 20) + 5 * np.cos(xy[:, 1] / 15)
        parameters = {"psill": VARIOGRAM.sill, "range": VARIOGRAM.range, "nugget": VARIOGRAM.nugget}
        peer = OrdinaryKriging(*xy.T, rss, variogram_model="exponential", variogram_parameters=parameters)
        kriging = LocalKriging(16, VARIOGRAM).fit(RadioSamples(xy, 1750.0, rss))

        def theirs(backend: str, peer: Any = peer, places: Floats = places) -> tuple[Floats, Floats]:
            value, variance = peer.execute("points", *places.T, n_closest_points=16, backend=backend)
            return np.asarray(value), np.asarray(variance)

        def ours(kriging: LocalKriging = kriging, places: Floats = places) -> tuple[Floats, Floats]:
            value, std = kriging.predict_with_std(places, 1750.0)
            return value, std**2

        def equal(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> str:
            worst = max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
            assert worst < 1e-6, worst
            return f"values and variances equal to {worst:.0e}"

        backend = fastest(theirs)
        shape = f"{count:,} measurements, {len(places):,} places, 16 neighbors, backend {backend}"
        rows.append(bench.compare(id, ours, partial(theirs, backend), equal, shape=shape, required=">= 10"))
    return rows


def fastest(run: Callable[[str], Any]) -> str:
    """PyKrige's fastest backend for a few nearest points: its compiled one where it was built, else the loop."""
    seconds = {}
    for backend in ("C", "loop"):
        try:
            run(backend)
        except (ImportError, ValueError, AttributeError):
            continue
        start = time.perf_counter()
        run(backend)
        seconds[backend] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


def measure() -> list[bench.Comparison]:
    """All rows, on one core: a neighbor search takes as many threads as there are cores for it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return [depth_row(), adjacency_row(), *layer_rows(), memory_row(), *kriging_rows()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        once(sys.argv[2])
        raise SystemExit
    peers = {name: importlib.metadata.version(name) for name in ("torch-geometric", "pykrige", "torch")}
    raise SystemExit(bench.main("radiogat", peers, measure))
