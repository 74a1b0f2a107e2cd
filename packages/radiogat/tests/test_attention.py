"""The four backends against each other, against literal attention, and against torch-geometric."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from radiogat.attention import BACKENDS, GraphAttention, attend, dense_weights
from radiogat.config import GraphConfig
from radiogat.depth import radio_depth
from radiogat.graph import build_graph


def random_mask(seed, height=30, width=40, share=0.2):
    return np.random.default_rng(seed).random((height, width)) < share


def adjacency(height=12, width=14, seed=0, gate="signed", share=0.25):
    mask = random_mask(seed, height, width, share)
    return build_graph(mask, radio_depth(mask, [[2, 3]]), GraphConfig(gate=gate)).adjacency(5750)


def literal(layer, x, edges):
    """h = W^T x, softmax over the edges of each node, one node after the other."""
    h = x @ layer.weight
    out = []
    for i in range(len(x)):
        sources = edges.indices[edges.indptr[i] : edges.indptr[i + 1]]
        e = F.leaky_relu(h[i] @ layer.target + h[sources] @ layer.source, layer.slope).squeeze(1)
        out.append(torch.softmax(e, dim=0) @ h[sources] + layer.bias)
    return torch.stack(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 16), (16, 3)])
def test_backends_agree_forward_and_backward(backend, dtype, tolerance, inputs, outputs):
    edges = adjacency()
    torch.manual_seed(0)
    layer = GraphAttention(inputs, outputs, backend=backend).to(dtype)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(edges.nodes, inputs, dtype=dtype, requires_grad=True)
    weight = torch.randn(edges.nodes, outputs, dtype=dtype)
    parts = [x, *layer.parameters()]
    found = layer(x, edges)
    expected = literal(layer, x, edges)
    assert torch.allclose(found, expected, atol=tolerance, rtol=tolerance)
    grads = torch.autograd.grad((found * weight).sum(), parts)
    for one, other in zip(grads, torch.autograd.grad((expected * weight).sum(), parts), strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "pyg"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_32_bits(backend, dtype):
    edges = adjacency()
    torch.manual_seed(0)
    layer = GraphAttention(5, 16, backend=backend).to(dtype)
    x = torch.randn(edges.nodes, 5).to(dtype).requires_grad_()
    found = layer(x, edges)
    assert found.dtype == dtype
    with torch.no_grad():
        expected = literal(copy.deepcopy(layer).float(), x.float(), edges)
    assert (found.float() - expected).abs().max() <= 0.03 * float(expected.abs().max())
    found.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["csr", "stencil"])
def test_gradients_of_attention_equal_finite_differences(backend):
    """On a dozen nodes."""
    edges = adjacency(3, 5, share=0.2)
    assert 10 <= edges.nodes <= 15
    torch.manual_seed(0)
    s, t = (torch.randn(edges.nodes, dtype=torch.float64, requires_grad=True) for _ in range(2))
    values = torch.randn(edges.nodes, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, edges, 0.01, backend), (s, t, values))


def test_weights_of_a_node_sum_to_one():
    edges = adjacency()
    s, t = torch.randn(2, edges.nodes)
    assert torch.allclose(dense_weights(s, t, edges, 0.01).sum(dim=1), torch.ones(edges.nodes))
    ones = torch.ones(edges.nodes, 1)
    for backend in ("csr", "stencil"):
        assert torch.allclose(attend(s, t, ones, edges, 0.01, backend), ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_with_only_itself_passes_through(backend):
    """Its output is W^T x + b."""
    street = np.zeros((11, 11), dtype=bool)
    street[0, 0] = street[10, 10] = True
    edges = build_graph(~street, radio_depth(~street, [[0, 0]])).adjacency(1750)
    layer = GraphAttention(4, 6, backend=backend)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 4)
    assert torch.allclose(layer(x, edges), x @ layer.weight + layer.bias, atol=1e-6)


@pytest.mark.parametrize("backend", ["csr", "stencil"])
def test_large_logits_do_not_overflow(backend):
    edges = adjacency()
    s, t = 1e4 * torch.randn(2, edges.nodes)
    found = attend(s, t, torch.randn(edges.nodes, 2), edges, 0.01, backend)
    assert torch.isfinite(found).all()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="expected one of csr, stencil"):
        GraphAttention(2, 2, backend="cuda")
