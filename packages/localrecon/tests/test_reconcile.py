import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from localrecon import SGRConfig, local_step, reconcile
from torch import nn

from tenfold.testing import assert_same_as_reference

DISTANCES = ["sample", "mean", "relative", "cosine"]


def problem(activation=torch.tanh, seed=0):
    """A module with two layers and a head, a batch, and the target of some module before."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"w": (5, 4), "b": (5,), "v": (3, 5)}
    params = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(6, 4, generator=g, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=g)
    target = 0.1 * torch.randn(6, 4, generator=g, dtype=torch.float64)

    def f(p, x):
        return F.cross_entropy(activation(x @ p["w"].T + p["b"]) @ p["v"].T, y)

    return f, params, x, target


def objective(f, params, x, target, lam, dist):
    """L + lambda R as a number, literally."""
    n = x.shape[0]
    leaf = x.clone().requires_grad_()
    loss = f(params, leaf)
    (g,) = torch.autograd.grad(loss, leaf)
    v = g - target
    r = {
        "sample": n * v.square().sum(),
        "mean": v.square().sum(),
        "relative": v.square().sum() / target.square().sum(),
        "cosine": sum(1 - F.cosine_similarity(a, b, dim=0) for a, b in zip(g, target, strict=True)) / n,
    }[dist]
    return float((loss + lam * r).detach())


@pytest.mark.parametrize("dist", DISTANCES)
@pytest.mark.parametrize("activation", [torch.tanh, F.gelu])
def test_exact_is_the_derivative_of_the_objective(dist, activation):
    """Against central differences of the objective itself."""
    f, params, x, target = problem(activation)
    found = reconcile.exact(f, params, x, target, 0.7, dist)
    for name, p in params.items():
        numeric = torch.zeros_like(p)
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                moved = {n: q.clone() for n, q in params.items()}
                moved[name].view(-1)[i] += sign * 1e-5
                ends.append(objective(f, moved, x, target, 0.7, dist))
            numeric.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
        assert_same_as_reference(found[name], numeric, relative=1e-6)


@pytest.mark.parametrize("dist", DISTANCES)
def test_forward_over_reverse_agrees_with_double_backward(dist):
    arguments = (*problem(), 0.7, dist)
    exact, forward = reconcile.exact(*arguments), reconcile.jvp(*arguments)
    for name in exact:
        assert_same_as_reference(forward[name], exact[name], relative=1e-10)


@pytest.mark.parametrize("dist", DISTANCES)
def test_shift_is_right_to_first_order(dist):
    """The error of ((shifted - plain) / lambda) against grad R is O(lambda)."""
    f, params, x, target = problem()
    plain = reconcile.exact(f, params, x, target, 0.0, dist)
    reg = {name: g - plain[name] for name, g in reconcile.exact(f, params, x, target, 1.0, dist).items()}
    errors = []
    for lam in (1e-2, 1e-3):
        shifted = reconcile.shift(f, params, x, target, lam, dist)
        errors.append(sum(float(((shifted[n] - plain[n]) / lam - reg[n]).square().sum()) for n in reg) ** 0.5)
    assert 8 < errors[0] / errors[1] < 12


@given(st.sampled_from(DISTANCES), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_direction_is_the_derivative_of_the_distance(dist, seed):
    """DR/dg_in, where g_in = g / N is the gradient of the mean loss."""
    g = torch.Generator().manual_seed(seed)
    a, t = (torch.randn(5, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    leaf = (a / 5).requires_grad_()
    (wanted,) = torch.autograd.grad(reconcile.distance(leaf * 5, t, 5, dist), leaf)
    torch.testing.assert_close(reconcile.direction(a, t, 5, dist), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-3, 0.1, 2.0])
def test_central_differences_are_exact_where_the_loss_is_quadratic_in_the_input(eps):
    """A linear module, a linear head and squared loss make it so."""
    g = torch.Generator().manual_seed(0)
    params = {name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in {"w": (5, 4), "v": (3, 5)}.items()}
    x, t = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))
    y = torch.randn(6, 3, generator=g, dtype=torch.float64)

    def f(p, x):
        return (x @ p["w"].T @ p["v"].T - y).square().sum(1).mean()

    exact = reconcile.exact(f, params, x, t, 0.3)
    found = reconcile.fd(f, params, x, t, 0.3, eps=eps, central=True)
    for name in exact:
        assert_same_as_reference(found[name], exact[name], relative=1e-10)


def test_one_sided_differences_approach_exact():
    arguments = (*problem(), 0.5)
    exact = reconcile.exact(*arguments)
    errors = [
        sum(float((reconcile.fd(*arguments, eps=eps)[n] - exact[n]).square().sum()) for n in exact) ** 0.5
        for eps in (1e-3, 1e-4)
    ]
    assert 8 < errors[0] / errors[1] < 12


def test_a_reconciled_linear_net_does_what_backpropagation_does():
    """Heads V_k = V_{k+1} W_{k+1}; then R = 0 and local gradients are the global ones."""
    g = torch.Generator().manual_seed(0)
    w = [torch.randn(6, 6, generator=g, dtype=torch.float64) / 3 for _ in range(3)]
    last = torch.randn(4, 6, generator=g, dtype=torch.float64)
    heads = [last @ w[2] @ w[1], last @ w[2], last]
    x, y = torch.randn(8, 6, generator=g, dtype=torch.float64), torch.randint(4, (8,), generator=g)
    weights = [m.clone().requires_grad_() for m in w]
    F.cross_entropy(x @ weights[0].T @ weights[1].T @ weights[2].T @ last.T, y).backward()
    z, target = x, None
    for k in range(3):
        leaf, own = z.detach().requires_grad_(), w[k].clone().requires_grad_()
        out = leaf @ own.T
        loss = F.cross_entropy(out @ heads[k].T, y)
        g_in, g_own, g_out = torch.autograd.grad(loss, [leaf, own, out])
        if target is not None:
            assert float(reconcile.distance(g_in * 8, target * 8, 8, "sample")) < 1e-20
        assert_same_as_reference(g_own, weights[k].grad, relative=1e-12)
        z, target = out, g_out


def test_the_clip_bounds_each_sample_and_counts():
    x = torch.ones(4, 3)
    delta = torch.tensor([[0.1] * 3, [5.0] * 3, [0.2] * 3, [-9.0] * 3])
    clipped, share = reconcile.clip_shift(delta, x, 0.5)
    assert share == 0.5
    torch.testing.assert_close(clipped.norm(dim=1) / x.norm(dim=1), torch.tensor([0.1, 0.5, 0.2, 0.5]))


def test_the_step_is_the_pure_function():
    """What ``local_step`` does in place is what ``reconcile.shift`` returns."""
    from localrecon_test_nets import split, vectors

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)).double()
    x, y = vectors(dtype=torch.float64)
    net = split(model, x, 2)
    caught = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update({id(p): p.grad.clone() for p in self.param_groups[0]["params"]})

    local_step(net, x, y, [Catch(net.parameters_of(k), lr=1.0) for k in range(2)], SGRConfig(ramp=0, shift_clip=0.5))
    first = net.segments[0]
    out, loss, _ = first(x, None, y)
    (target,) = torch.autograd.grad(loss, out)
    rest = nn.Sequential(model[1], model[2])
    params = dict(rest.named_parameters())

    def f(p, z):
        return F.cross_entropy(torch.func.functional_call(rest, p, z), y)

    wanted = reconcile.shift(f, params, out.detach(), target, 1.0, clip=0.5)
    for name, p in params.items():
        assert_same_as_reference(caught[id(p)], wanted[name], relative=1e-12)
