import pytest
import torch
import torch.nn.functional as F
from localrecon import BPFreeConv2d, BPFreeLinear, BPFreeNet, SGRConfig
from torch import nn

from tenfold import UserError
from tenfold.testing import assert_same_as_reference

PHI = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "identity": lambda a: a}


def layer_and_data(kind, activation, loss, **options):
    torch.manual_seed(0)
    if kind == "linear":
        layer = BPFreeLinear(5, 7, 3, activation, loss=loss, **options).double()
        x = torch.randn(6, 5, dtype=torch.float64)
    else:
        layer = BPFreeConv2d(2, 7, 3, 2, 3, activation, loss=loss, **options).double()
        x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    return layer, x, torch.randint(3, (6,)), 0.1 * torch.randn_like(x)


def autograd_of(layer, kind, activation, loss, x, y, target, lam):
    """The same by double backward."""
    leaf = x.clone().requires_grad_()
    w, b, v = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias, layer.head))
    a = F.linear(leaf, w, b) if kind == "linear" else F.conv2d(leaf, w, b, 2, 1)
    h = PHI[activation](a)
    z = (h if kind == "linear" else h.mean(dim=(2, 3))) @ v.T
    value = F.cross_entropy(z, y) if loss == "ce" else 0.5 * (z - F.one_hot(y, 3)).square().sum() / 6
    g_in, g_out = torch.autograd.grad(value, [leaf, h], create_graph=True)
    r = (6 * g_in - target).square().sum() / 6
    return torch.autograd.grad(value + lam * r, [w, b, v]), g_out.detach() * 6, value, r


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "identity"])
@pytest.mark.parametrize("loss", ["ce", "squared"])
def test_the_closed_form_is_the_double_backward(kind, activation, loss):
    layer, x, y, target = layer_and_data(kind, activation, loss)
    wanted, g_out, value, r = autograd_of(layer, kind, activation, loss, x, y, target, 0.7)
    _, handed_on, found = layer.local_gradients(x, y, target, 0.7)
    for parameter, gradient in zip((layer.weight, layer.bias, layer.head), wanted, strict=True):
        assert_same_as_reference(parameter.grad, gradient, relative=1e-12)
    assert_same_as_reference(handed_on, g_out, relative=1e-12)
    torch.testing.assert_close(found["loss"], value.detach())
    torch.testing.assert_close(found["R"], r.detach())


def test_feedback_replaces_the_heads_weights_on_the_way_back_alone():
    for feedback in ("fa", "sign"):
        layer, x, y, _ = layer_and_data("linear", "tanh", "ce", feedback=feedback)
        h, g_out, _ = layer.local_gradients(x, y, None, 0.0)
        e = (h @ layer.head.T).softmax(1) - F.one_hot(y, 3)
        back = layer.fixed if feedback == "fa" else layer.head.sign() * layer.head.abs().mean()
        assert_same_as_reference(g_out, e @ back, relative=1e-12)
        assert_same_as_reference(layer.head.grad, e.T @ h / 6, relative=1e-12)


@pytest.mark.parametrize("feedback", ["transpose", "fa", "sign"])
def test_a_net_learns_without_any_graph(feedback):
    torch.manual_seed(0)
    y = torch.randint(4, (64,))
    x = torch.randn(4, 1, 6, 6)[y] + 0.3 * torch.randn(64, 1, 6, 6)
    options = {"feedback": feedback}
    net = BPFreeNet(
        [
            BPFreeConv2d(1, 8, 3, 1, 4, **options),
            BPFreeConv2d(8, 8, 3, 2, 4, **options),
            BPFreeLinear(8, 16, 4, **options),
        ]
    )
    optimizers = [torch.optim.AdamW(net.parameters_of(k), lr=1e-2) for k in range(net.k)]
    first = net.step(x, y, optimizers, SGRConfig(lam=0.1, ramp=0))
    for step in range(60):
        last = net.step(x, y, optimizers, SGRConfig(lam=0.1, ramp=0), step)
    assert last.losses[-1] < 0.7 * first.losses[-1]
    assert last.modules[2].cosine is not None
    assert not net(x).requires_grad
    assert len(net.forward_exits(x)) == 3


def test_fixed_heads_stay():
    for head in ("fixed", "etf"):
        layer, x, y, _ = layer_and_data("linear", "tanh", "ce", head=head)
        layer.local_gradients(x, y, None, 0.0)
        assert layer.head.grad is None
        assert layer.weight.grad is not None


def test_images_are_flattened_for_a_first_linear_layer():
    net = BPFreeNet([BPFreeLinear(16, 8, 3)])
    assert net(torch.randn(2, 1, 4, 4)).shape == (2, 3)


def test_unknown_words_are_refused():
    with pytest.raises(UserError, match="feedback"):
        BPFreeLinear(2, 2, 2, feedback="up")
    with pytest.raises(UserError, match="activation"):
        BPFreeLinear(2, 2, 2, "swish")
    with pytest.raises(UserError, match="at least one layer"):
        BPFreeNet([])
    assert isinstance(BPFreeLinear(2, 2, 2), nn.Module)
