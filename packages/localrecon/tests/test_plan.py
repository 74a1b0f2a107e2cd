import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from localrecon import LocalNet, SGRConfig, StepOptions, local_step, plan_split
from localrecon.boundary import first_boundary
from localrecon.plan import partition
from localrecon.step import train_stage
from localrecon_test_nets import convs, images, mlp, vectors

from tenfold import UserError
from tenfold.memory import MemoryProbe


@given(st.lists(st.integers(0, 100), min_size=1, max_size=9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_partitions_are_as_good_as_the_best_of_all(values, modules):
    modules = min(modules, len(values))

    def largest(cuts):
        edges = [0, *cuts, len(values)]
        return max(sum(values[a:b]) + 3 * (a > 0) for a, b in itertools.pairwise(edges))

    cuts = partition(len(values), modules, lambda a, b: sum(values[a:b]) + 3 * (a > 0))
    assert len(cuts) == modules - 1
    assert list(cuts) == sorted(set(cuts))
    assert largest(cuts) == min(map(largest, itertools.combinations(range(1, len(values)), modules - 1)))


def step_peak(net, x, y, sgr):
    optimizers = [torch.optim.AdamW(net.parameters_of(k)) for k in range(net.k)]
    local_step(net, x, y, optimizers, sgr)
    with MemoryProbe(net, optimizers, x, y) as probe:
        local_step(net, x, y, optimizers, sgr)
    return probe.peak_bytes


def test_a_budget_is_kept_by_the_step_and_too_small_a_one_says_the_least():
    x, y = images(count=16, size=16)
    whole = plan_split(convs(8), x, k=1).predicted_peak
    plan = plan_split(convs(8), x, budget=int(0.6 * whole))
    assert plan.k > 1
    torch.manual_seed(0)
    peak = step_peak(LocalNet(convs(8), plan).train(), x, y, SGRConfig(ramp=0))
    assert peak <= 1.05 * 0.6 * whole
    assert peak == pytest.approx(plan.predicted_peak, rel=0.1)
    fewer = plan_split(convs(8), x, k=plan.k - 1)
    assert fewer.predicted_peak > 0.6 * whole
    with pytest.raises(UserError, match=r"budget 0.1 MiB is below .* the least is [\d.]+ MiB"):
        plan_split(convs(8), x, budget="100KB")


def test_planning_changes_nothing():
    x, _ = images()
    model = convs().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_split(model, x, k=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_splits_that_cannot_be_are_refused():
    x, _ = vectors()
    with pytest.raises(ValueError, match="k must be 1 to 4, the number of blocks of this model, got 5"):
        plan_split(mlp(), x, k=5)
    with pytest.raises(ValueError, match="got 0"):
        plan_split(mlp(), x, k=0)
    with pytest.raises(UserError, match="cuts must rise from 1 to 3"):
        plan_split(mlp(), x, cuts=[2, 2])
    assert plan_split(mlp(), x, cuts=[1, 3], measure=False).ranges == [(0, 1), (1, 3), (3, 4)]


@pytest.mark.parametrize("balance", ["flops", "params", "blocks"])
def test_other_balances(balance):
    x, _ = vectors()
    assert plan_split(mlp(), x, k=2, balance=balance, measure=False).k == 2


def test_nothing_of_a_module_lives_on_when_the_next_begins():
    x, y = images(count=16, size=16)
    net = LocalNet(convs(8), plan_split(convs(8), x, k=4, measure=False)).train()
    boundary = first_boundary(net, x, y)
    kept = [boundary]
    size = 16 * 8 * 16 * 16 * 4
    with MemoryProbe(net, x, y) as probe:
        for stage in net.segments[:3]:
            train_stage(stage, boundary, None, SGRConfig(ramp=0), StepOptions())
            assert probe.live_bytes - probe.start_bytes <= 1.01 * 2 * size  # x and T of the boundary
    assert kept


def vit():
    torch.manual_seed(0)
    from localrecon.models import vit

    return vit(3, 48, 10, width=64, depth=8)


@pytest.mark.parametrize("kind", ["conv", "vit"])
def test_the_peak_falls_as_promised(kind):
    """Counted in tensor bytes."""
    model = {"conv": lambda: convs(12, width=24, classes=10), "vit": vit}[kind]
    x, y = images(count=32 if kind == "vit" else 48, size=48 if kind == "vit" else 24, classes=10)
    peaks = {}
    for name, k, sgr in (
        ("bp", 1, SGRConfig(lam=0)),
        ("local", 4, SGRConfig(lam=0)),
        ("shift", 4, SGRConfig(ramp=0)),
        ("shift2", 2, SGRConfig(ramp=0)),
        ("exact", 4, SGRConfig(ramp=0, estimator="exact", math_attention=True)),
    ):
        built = model()
        peaks[name] = step_peak(LocalNet(built, plan_split(built, x, k=k, measure=False)).train(), x, y, sgr)
    assert peaks["shift"] <= (0.5 if kind == "conv" else 0.6) * peaks["bp"], peaks
    assert peaks["shift"] <= 1.2 * peaks["local"], peaks
    assert peaks["exact"] >= 1.4 * peaks["shift"], peaks
    assert peaks["shift"] <= peaks["shift2"] <= peaks["bp"], peaks


def test_checkpointing_keeps_result_and_statistics():
    x, y = images()
    ends = []
    for checkpointing in (0, 2):
        net = LocalNet(convs(), plan_split(convs(), x, k=1, measure=False)).train()
        net.segments[0].checkpointing = checkpointing
        local_step(net, x, y, [torch.optim.SGD(net.parameters_of(0), lr=0.1)])
        ends.append(net.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
