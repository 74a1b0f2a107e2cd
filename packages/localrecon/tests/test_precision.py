"""float16 that overflows, numbers that are not finite, and compiled modules."""

import copy

import pytest
import torch
from localrecon import LocalNet, LocalTrainer, SGRConfig, StepOptions, local_step, plan_split
from localrecon.passes import NonFiniteLossError
from localrecon_test_nets import convs, images, mlp, same, sgds, split, vectors, weights
from torch import nn

from tenfold import UserError


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("sgr", [SGRConfig(lam=0), SGRConfig(ramp=0), SGRConfig(ramp=0, estimator="exact")])
@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_in_float16_skips_the_step_of_that_module_and_lowers_its_scale(sgr, first):
    x, y = vectors()
    one = LocalTrainer(split(mlp(), x, 3), sgr, momentum, None, StepOptions(dtype=torch.float16))
    one.step(x, y)
    culprit = 0 if first else 1
    scaler = one.stepper.scalers[culprit]
    scaler.update(new_scale=2.0**40)  # its gradients are beyond 65504
    before = [[p.detach().clone() for p in one.net.parameters_of(k)] for k in range(3)]
    scales = [float(s.get_scale()) for s in one.stepper.scalers]
    report = one.step(x, y)
    moved = [
        not all(torch.equal(a, b) for a, b in zip(before[k], one.net.parameters_of(k), strict=True)) for k in range(3)
    ]
    assert moved == [k != culprit for k in range(3)]
    assert float(scaler.get_scale()) == scales[culprit] / 2
    assert all(torch.isfinite(torch.tensor(report.losses)))
    for _ in range(40):
        one.step(x, y)
    assert all(bool(torch.isfinite(p).all()) for p in one.net.parameters())


def test_weights_that_are_not_finite_end_a_training_in_float16_too():
    x, y = vectors()
    one = LocalTrainer(split(mlp(), x, 2), SGRConfig(ramp=0), momentum, None, StepOptions(dtype=torch.float16))
    with torch.no_grad():
        one.net.model[0][0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="module 1 .* at any loss scale down to 1"):
        for _ in range(40):
            one.step(x, y)


class Cliff(torch.autograd.Function):
    """A finite value with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


class OnCliff(nn.Module):
    def forward(self, x):
        return Cliff.apply(x)


@pytest.mark.parametrize("together", [False, True])
def test_a_finite_loss_with_a_gradient_that_is_not_is_caught_before_the_update(together):
    x, y = vectors()
    model = mlp()
    model[3].append(OnCliff())
    net = split(model, x, 2)
    before = weights(net)
    with pytest.raises(
        NonFiniteLossError, match=r"module 2 .*the loss is finite at step 4, but its gradient is not; first in"
    ):
        local_step(net, x, y, sgds(net), SGRConfig(lam=0), StepOptions(step=4, together=together))
    after = weights(net)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(("model.0", "model.1", "heads.0")) for name in changed)
    assert bool(changed) != together  # all modules or none


def test_together_is_the_same_step():
    x, y = vectors()
    ends = []
    for together in (False, True):
        net = split(mlp(), x, 3)
        optimizers = sgds(net)
        for step in range(3):
            options = StepOptions(step=step, together=together, accumulate=2, clip_norm=0.5)
            local_step(net, x, y, optimizers, SGRConfig(ramp=0), options)
        ends.append(weights(net))
        assert all(p.grad is None for p in net.parameters())
    assert same(*ends)


@pytest.mark.parametrize("bad", [{"total_steps": 0}, {"total_steps": -1}, {"accumulate": 0}, {"step": -1}])
def test_steps_and_lengths_below_their_least_are_refused(bad):
    with pytest.raises(UserError, match=f"{next(iter(bad))}: expected"):
        StepOptions(**bad)


def test_the_weight_of_the_reconciliation_is_never_negative():
    for step in range(30):
        assert SGRConfig(lam=2, anneal_last=0.5, ramp=0.1).strength(step, 10) >= 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["layers", pytest.param("convolutions", marks=pytest.mark.slow)])
def test_compiled_modules_give_the_eager_numbers(backend, kind):
    x, y = vectors() if kind == "layers" else images(count=4)
    net = split(mlp(depth=2) if kind == "layers" else convs(depth=2, width=4), x, 2)
    twin = copy.deepcopy(net)
    net.compile_segments(backend=backend)
    optimizers, others = sgds(net, lr=0.05), sgds(twin, lr=0.05)
    for step in range(2):
        ours = local_step(net, x, y, optimizers, SGRConfig(ramp=0), StepOptions(step=step))
        theirs = local_step(twin, x, y, others, SGRConfig(ramp=0), StepOptions(step=step))
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    a, b = weights(net), weights(twin)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_compiled_model_along_its_own_forward_pass_gives_the_eager_numbers():
    import timm

    torch.manual_seed(0)
    model, x, y = (
        timm.create_model("test_vit", num_classes=4),
        torch.randn(4, 3, 160, 160)[..., :160],
        torch.randint(4, (4,)),
    )
    net = LocalNet(model, plan_split(model, x, k=2, measure=False)).train()
    twin = copy.deepcopy(net)
    net.compile_segments(backend="aot_eager")
    ours = local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
    theirs = local_step(twin, x, y, sgds(twin), SGRConfig(ramp=0))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.modules[1].cosine == pytest.approx(theirs.modules[1].cosine, rel=1e-3)
