"""Edges against literal double loops, and what their rule promises."""

import sys

import numpy as np
import pytest
import torch
from radiogat.config import GraphConfig
from radiogat.depth import radio_depth
from radiogat.graph import block_graphs, blocks, build_graph, check_frequency, stencil_offsets

from tenfold import UserError
from tenfold.errors import MissingExtraError


def random_mask(seed, height=30, width=40, share=0.2):
    return np.random.default_rng(seed).random((height, width)) < share


MASTS = [[3, 4], [20, 30], [12, 18]]


def area(seed=0, share=0.25):
    mask = random_mask(seed, share=share)
    return mask, radio_depth(mask, MASTS)


def literal(mask, depth, radius, threshold, gate):
    """Every pair of cells, one by one."""
    cells = np.argwhere(~mask)
    A = np.zeros((len(cells), len(cells)), dtype=bool)
    for i, p in enumerate(cells):
        for j, q in enumerate(cells):
            d = depth[:, *p] - depth[:, *q]
            d = {"abs": np.abs(d).max(), "signed": d.max(), "none": 0.0}[gate]
            A[i, j] = (p - q) @ (p - q) < radius**2 and (d <= threshold or i == j)
    return A


@pytest.mark.parametrize("gate", ["abs", "signed", "none"])
def test_adjacency_equals_the_literal_double_loop(gate):
    mask, depth = random_mask(3, 14, 16), radio_depth(random_mask(3, 14, 16), [[3, 4], [10, 12]])
    for f in (1750, 5750):
        found = build_graph(mask, depth, GraphConfig(gate=gate)).adjacency(f).to_dense().numpy()
        assert np.array_equal(found, literal(mask, depth, 4.5, 0.1 / np.log10(f), gate))


def test_without_buildings_only_distance_counts():
    mask = np.zeros((12, 13))
    depth = radio_depth(mask, [[2, 2]])
    around = build_graph(mask, depth, GraphConfig(kind="around")).adjacency(1750).to_dense()
    for gate in ("abs", "signed", "none"):
        for f in (100, 1750, 28000):
            assert torch.equal(build_graph(mask, depth, GraphConfig(gate=gate)).adjacency(f).to_dense(), around)


def test_the_stencil_has_69_offsets():
    assert len(stencil_offsets(4.5)) == 69
    mask = np.zeros((20, 20))
    degrees = build_graph(mask, radio_depth(mask, [[0, 0]]), GraphConfig(gate="none")).adjacency(1750).indptr.diff()
    assert degrees.view(20, 20)[4:-4, 4:-4].eq(69).all()


def test_abs_is_symmetric_and_what_both_directions_of_signed_share():
    for seed in range(5):
        mask, depth = area(seed)
        symmetric = build_graph(mask, depth).adjacency(1750).to_dense()
        directed = build_graph(mask, depth, GraphConfig(gate="signed")).adjacency(1750).to_dense()
        assert torch.equal(symmetric, symmetric.T)
        assert not torch.equal(directed, directed.T)
        assert torch.equal(directed & directed.T, symmetric)


@pytest.mark.parametrize("gate", ["abs", "signed"])
def test_a_higher_frequency_has_a_subset_of_the_edges(gate):
    """A higher frequency has a subset of the edges, from one stored score."""
    mask, depth = area()
    graph = build_graph(mask, depth, GraphConfig(gate=gate))
    low, high = graph.adjacency(900), graph.adjacency(28000)
    assert (high.mask <= low.mask).all()
    assert high.mask.sum() < low.mask.sum()
    direct = build_graph(mask, depth, GraphConfig(gate=gate, delta=0.1 * np.log10(900) / np.log10(28000)))
    assert np.array_equal(direct.adjacency(900).mask, high.mask)


def test_compat_reproduces_both_released_adjacencies(released):
    """No mismatch; and global indices give another graph."""
    with np.load(released) as file:
        building = (file["area01_rss_cdbm"][0] == 0)[:440, :480]
        depth = file["compat_area01_lossprob"]
        for f in (1750, 5750):
            official = np.unpackbits(file[f"compat_area01_{f}_block10_11_adj_packed"], axis=1)[:, :1363].astype(bool)
            for compat, equal in (("2025", True), (None, False)):
                graphs = list(block_graphs(building, depth, GraphConfig(gate="signed", compat=compat)))
                found = graphs[9 * 12 + 10].adjacency(f).to_dense().numpy()
                assert np.array_equal(found, official) == equal


def test_compat_reads_the_top_left_corner():
    """A block's graph is that of the corner's depth over its own buildings."""
    mask = random_mask(5, 80, 80)
    depth = radio_depth(mask, [[10, 60]])
    graphs = list(block_graphs(mask, depth, GraphConfig(gate="signed", compat="2025")))
    expected = build_graph(mask[40:, 40:], depth[:, :40, :40], GraphConfig(gate="signed"))
    assert np.array_equal(graphs[3].adjacency(1750).mask, expected.adjacency(1750).mask)


def test_blocks_crop_at_the_end():
    windows = blocks((95, 130))
    assert len(windows) == 6
    assert windows[3] == (slice(40, 80), slice(0, 40))


def test_the_transpose_is_the_transpose():
    mask, depth = area()
    adjacency = build_graph(mask, depth, GraphConfig(gate="signed")).adjacency(1750)
    indptr, indices, permutation = adjacency.transposed
    rows = torch.repeat_interleave(torch.arange(adjacency.nodes), indptr.diff())
    dense = torch.zeros(adjacency.nodes, adjacency.nodes, dtype=torch.bool)
    dense[rows, indices] = True
    assert torch.equal(dense, adjacency.to_dense().T)
    assert torch.equal(adjacency.indices[permutation], rows)


def test_to_pyg_has_sources_first():
    mask, depth = area()
    graph = build_graph(mask, depth, GraphConfig(gate="signed"))
    data = graph.to_pyg(1750)
    dense = torch.zeros(graph.nodes, graph.nodes, dtype=torch.bool)
    dense[data.edge_index[1], data.edge_index[0]] = True
    assert torch.equal(dense, graph.adjacency(1750).to_dense())


def test_a_missing_torch_geometric_is_named_with_the_extra_that_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    mask, depth = area()
    with pytest.raises(MissingExtraError, match=r'pip install "radiogat\[pyg\]"'):
        build_graph(mask, depth).to_pyg(1750)


def test_an_obstruction_between_two_cells_cuts_their_edge():
    mask = np.zeros((9, 9), dtype=bool)
    mask[:, 4] = True
    graph = build_graph(mask, radio_depth(mask, [[0, 0]]), GraphConfig(kind="obstruction"))
    A = graph.adjacency(1750).to_dense()
    columns = np.argwhere(~mask)[:, 1]
    left = torch.from_numpy(columns < 4)
    assert not A[left][:, ~left].any()
    assert torch.equal(A, A.T)
    assert graph.offsets.max() == 5  # closer than 6 cells


def test_the_kind_transmitter_joins_cells_of_one_mast():
    mask = np.zeros((10, 20))
    masts = [[5, 2], [5, 17]]
    graph = build_graph(mask, radio_depth(mask, masts), GraphConfig(kind="transmitter"), transmitters=masts)
    A = graph.adjacency(1750).to_dense()
    nearer = torch.from_numpy(np.argwhere(mask == 0)[:, 1] < 9.5)
    assert not A[nearer][:, ~nearer].any()


@pytest.mark.parametrize("kind", ["distance", "power"])
def test_the_variants_of_depth_equal_their_definition(kind):
    mask, depth = area()
    config = GraphConfig(kind=kind)
    graph = build_graph(mask, depth, config, transmitters=MASTS, cell_m=4.0)
    cells = np.argwhere(~mask)
    d = np.stack([np.hypot(*(np.argwhere(np.ones_like(mask)) - m).T).reshape(mask.shape) for m in MASTS])
    for f in (1750.0, 5750.0):
        A = graph.adjacency(f).to_dense().numpy()
        if kind == "power":
            D = depth * np.maximum(0, 135 - 20 * np.log10(f) - 20 * np.log10(np.maximum(4 * d, 1)))
            threshold = 0.1 * 10 * np.log10(f)
        else:
            with np.errstate(divide="ignore"):
                raw = (depth / d**0.1).sum(axis=0)
            raw[np.isinf(raw)] = raw[np.isfinite(raw)].max()
            low, high = raw.min() / np.sqrt(5750), raw.max() / np.sqrt(1750)
            D, threshold = ((raw / np.sqrt(f) - low) / (high - low))[None], 0.01
        values = D[:, cells[:, 0], cells[:, 1]]
        for i in range(0, len(cells), 7):
            near = ((cells - cells[i]) ** 2).sum(axis=1) < 4.5**2
            score = np.abs(values - values[:, i : i + 1]).max(axis=0)
            certain = np.abs(score - threshold) > 1e-6
            assert (A[i] == (near & (score <= threshold)))[certain].all()


def test_bad_input_is_named():
    mask, depth = area()
    with pytest.raises(UserError, match="no cell is free"):
        build_graph(np.ones_like(mask), depth)
    with pytest.raises(UserError, match="depth has shape"):
        build_graph(mask, depth[:, 1:])
    with pytest.raises(UserError, match="needs the positions of the transmitters"):
        build_graph(mask, depth, GraphConfig(kind="power"))
    for bad, said in ((1.75, "not GHz"), (-5, "expected MHz"), (1.75e9, "not Hz")):
        with pytest.raises(UserError, match=said):
            check_frequency(bad)
    with pytest.raises(UserError, match="delta: expected 0 or more, got -0.1"):
        GraphConfig(delta=-0.1)
    with pytest.raises(UserError, match="radius: expected more than 0, got 0.0"):
        GraphConfig(radius=0.0)
    with pytest.raises(UserError, match="did you mean around"):
        GraphConfig(kind="aroundd")
