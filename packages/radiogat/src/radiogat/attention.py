"""Graph attention on large graphs: four backends that agree, and the fast ones aggregate on the narrow side.

    h_i = W^T x_i,   e_ij = LeakyReLU(a_1 . h_i + a_2 . h_j),   alpha = softmax of e over the edges of i
    out_i = sum_j alpha_ij h_j + b

The sum is linear in h, so sum_j alpha_ij (x_j W) = (sum_j alpha_ij x_j) W: where the layer widens, ``x`` is aggregated and
``W`` applied after it, and no message is ever stored: the sums are sparse matrix products (``csr``) or shifts of the raster
(``stencil``), in both directions.

Legend: N nodes, E edges, K offsets, C channels; s (N) logit of the target, t (N) logit of the source.
"""

import warnings
from functools import cache
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from radiogat.config import Backend
from radiogat.graph import Adjacency, shifted
from tenfold.errors import needs

BACKENDS: tuple[str, ...] = get_args(Backend)


class GraphAttention(nn.Module):
    """One graph attention layer with a single head (GATv1), the layer of RadioGAT.

    Args:
        in_channels: channels of the nodes.
        out_channels: channels of the result.
        slope: slope of LeakyReLU below zero; 0.01 in the authors' code (torch-geometric's default is 0.2).
        backend: csr, stencil, dense (N x N, small graphs) or pyg (torch-geometric's ``GATConv`` with these weights).

    Shapes: ``x`` (N, in_channels), an ``Adjacency`` of N nodes -> (N, out_channels).
    Source: the authors' code; it equals ``GATConv(heads=1, negative_slope=0.01, add_self_loops=False)`` with att_dst = a_1
    and att_src = a_2.

    Example:
        >>> from radiogat import build_graph, radio_depth
        >>> building = [[0] * 5] * 4
        >>> edges = build_graph(building, radio_depth(building, [(0, 0)])).adjacency(1750.0)
        >>> GraphAttention(6, 8)(torch.randn(20, 6), edges).shape
        torch.Size([20, 8])
    """

    def __init__(self, in_channels: int, out_channels: int, slope: float = 0.01, backend: Backend = "csr") -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend '{backend}': expected one of {', '.join(BACKENDS)}")
        self.slope = slope
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.target = nn.Parameter(torch.empty(out_channels, 1))
        self.source = nn.Parameter(torch.empty(out_channels, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight)
        both = torch.empty(2 * out_channels, 1)
        nn.init.xavier_uniform_(both)
        with torch.no_grad():
            self.target.copy_(both[:out_channels])
            self.source.copy_(both[out_channels:])

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """(N, in_channels) -> (N, out_channels)."""
        if self.backend == "pyg":
            return self._pyg(x, adjacency)
        s = (x @ (self.weight @ self.target)).squeeze(1)
        t = (x @ (self.weight @ self.source)).squeeze(1)
        narrow = self.weight.shape[0] <= self.weight.shape[1]
        values = x if narrow else x @ self.weight
        gathered = attend(s, t, values, adjacency, self.slope, self.backend)
        return (gathered @ self.weight if narrow else gathered) + self.bias

    def _pyg(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        needs("torch_geometric", "pyg", "radiogat")
        from torch_geometric.nn import GATConv

        conv = GATConv(*self.weight.shape, heads=1, negative_slope=self.slope, add_self_loops=False)
        weights = {
            "lin.weight": self.weight.T,
            "att_dst": self.target.view(1, 1, -1),
            "att_src": self.source.view(1, 1, -1),
            "bias": self.bias,
        }
        out: Tensor = torch.func.functional_call(conv, weights, (x, adjacency.edge_index.to(x.device)))
        return out


def attend(
    s: Tensor, t: Tensor, values: Tensor, adjacency: Adjacency, slope: float, backend: Backend = "csr"
) -> Tensor:
    """sum_j alpha_ij values_j with alpha = softmax_j LeakyReLU(s_i + t_j) over the edges: (N), (N), (N, C) -> (N, C).

    In 32 bits at least: sparse products know no half precision on a CPU, and a softmax over many edges needs more.
    """
    if values.dtype in (torch.float16, torch.bfloat16):
        return attend(s.float(), t.float(), values.float(), adjacency, slope, backend).to(values.dtype)
    if backend == "csr":
        gathered, _ = _CsrAttend.apply(s, t, values, adjacency, slope)
        return gathered
    if backend == "stencil":
        return _StencilAttend.apply(s, t, values, adjacency, slope)
    return dense_weights(s, t, adjacency, slope) @ values


def dense_weights(s: Tensor, t: Tensor, adjacency: Adjacency, slope: float) -> Tensor:
    """alpha as an (N, N) matrix; every row sums to one."""
    logits = F.leaky_relu(s[:, None] + t[None, :], slope)
    return logits.masked_fill(~adjacency.to_dense().to(s.device), -torch.inf).softmax(dim=1)


class _CsrAttend(Function):
    """By compressed sparse rows. Buffers: a few numbers per edge, none of E x C."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, values: Tensor, adjacency: Adjacency, slope: float) -> Any:
        indptr, indices, rows = adjacency.indptr, adjacency.indices, adjacency.rows
        logits = F.leaky_relu(s[rows].add_(t[indices]), slope)
        largest = torch.segment_reduce(logits, "max", offsets=indptr)
        alpha = logits.sub_(largest[rows]).exp_()
        alpha /= torch.segment_reduce(alpha, "sum", offsets=indptr)[rows]
        gathered = _csr(indptr, indices, alpha) @ values
        ctx.save_for_backward(s, t, values, alpha)
        ctx.adjacency, ctx.slope = adjacency, slope
        ctx.mark_non_differentiable(alpha)
        return gathered, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        s, t, values, alpha = ctx.saved_tensors
        adjacency = ctx.adjacency
        indptr, indices, rows = adjacency.indptr, adjacency.indices, adjacency.rows
        grad = grad.contiguous()
        back = None
        if ctx.needs_input_grad[2]:
            indptr_t, indices_t, permutation = adjacency.transposed
            back = _csr(indptr_t, indices_t, alpha[permutation]) @ grad
        # d alpha_ij = grad_i . values_j on the edges alone
        edges = _csr(indptr, indices, torch.zeros_like(alpha))
        d_alpha = torch.sparse.sampled_addmm(edges, grad, values.T, beta=0.0).values()
        weighted = alpha * d_alpha
        total = torch.segment_reduce(weighted, "sum", offsets=indptr)
        d_logit = weighted.sub_(alpha * total[rows])
        d_logit = torch.where(s[rows].add_(t[indices]) > 0, d_logit, ctx.slope * d_logit)
        d_s = torch.segment_reduce(d_logit, "sum", offsets=indptr)
        d_t = torch.zeros_like(t).index_add_(0, indices, d_logit)
        return d_s, d_t, back, None, None


@cache
def _accept_beta() -> None:
    """Take torch's one warning that CSR is in beta; the tests compare what is used of it with other backends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), size=(1, 1))


def _csr(indptr: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    _accept_beta()
    size = len(indptr) - 1
    return torch.sparse_csr_tensor(indptr, indices, values, size=(size, size), check_invariants=False)


class _StencilAttend(Function):
    """By shifts of the raster, without indices: one pass over (H, W, C) for each offset, in both directions."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, values: Tensor, adjacency: Adjacency, slope: float) -> Any:
        grid = _Raster(adjacency, s.device)
        t_grid, v_grid = grid.lay(t), grid.lay(values)
        logits = _stencil_logits(grid, grid.lay(s), t_grid, slope)
        alpha = logits.softmax(dim=0).nan_to_num_(0.0)  # a building has no edge: 0 / 0
        gathered = torch.zeros_like(v_grid)
        for o, (target, source) in enumerate(grid.shifts):
            gathered[target].addcmul_(alpha[o][target].unsqueeze(-1), v_grid[source])
        ctx.save_for_backward(s, t, values, alpha)
        ctx.adjacency, ctx.slope = adjacency, slope
        return grid.pick(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        s, t, values, alpha = ctx.saved_tensors
        grid = _Raster(ctx.adjacency, s.device)
        g, v = grid.lay(grad), grid.lay(values)
        back, d_alpha = torch.zeros_like(v), torch.zeros_like(alpha)
        for o, (target, source) in enumerate(grid.shifts):
            back[source].addcmul_(alpha[o][target].unsqueeze(-1), g[target])
            d_alpha[o][target] = torch.linalg.vecdot(g[target], v[source])
        d_logit = alpha * (d_alpha - (alpha * d_alpha).sum(dim=0))
        s_grid, t_grid = grid.lay(s), grid.lay(t)
        d_s, d_t = torch.zeros_like(s_grid), torch.zeros_like(t_grid)
        for o, (target, source) in enumerate(grid.shifts):
            d = d_logit[o][target]
            d = torch.where(s_grid[target] + t_grid[source] > 0, d, ctx.slope * d)
            d_s[target] += d
            d_t[source] += d
        return grid.pick(d_s), grid.pick(d_t), grid.pick(back), None, None


class _Raster:
    """Node values laid on the raster and taken from it, and the slices of each offset."""

    def __init__(self, adjacency: Adjacency, device: torch.device) -> None:
        self.street = torch.from_numpy(adjacency.street).to(device)
        self.mask = torch.from_numpy(adjacency.mask).to(device)
        shape = (adjacency.street.shape[0], adjacency.street.shape[1])
        self.shifts = [shifted(shape, dy, dx) for dy, dx in adjacency.offsets.tolist()]

    def lay(self, values: Tensor) -> Tensor:
        laid = values.new_zeros(*self.street.shape, *values.shape[1:])
        laid[self.street] = values
        return laid

    def pick(self, laid: Tensor) -> Tensor:
        return laid[self.street]


def _stencil_logits(grid: _Raster, s: Tensor, t: Tensor, slope: float) -> Tensor:
    """(K, H, W), minus infinity where there is no edge."""
    logits = s.new_full(grid.mask.shape, -torch.inf)
    for o, (target, source) in enumerate(grid.shifts):
        edge = F.leaky_relu(s[target] + t[source], slope)
        logits[o][target] = edge.masked_fill(~grid.mask[o][target], -torch.inf)
    return logits
