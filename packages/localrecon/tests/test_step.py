import copy

import pytest
import torch
import torch.nn.functional as F
from localrecon import HeadSpec, LocalNet, SGRConfig, StepOptions, local_step
from localrecon.boundary import first_boundary
from localrecon.passes import NonFiniteLossError, NoSecondDerivativeError
from localrecon.step import train_stage
from localrecon_test_nets import convs, dropout_mlp, images, mlp, same, sgds, split, vectors, weights
from torch import nn

from tenfold import UserError
from tenfold.randomness import keyed
from tenfold.testing import assert_gradient_isolated, assert_same_as_reference


def run(net, x, y, sgr, steps=3, **options):
    optimizers = sgds(net)
    for step in range(steps):
        report = local_step(net, x, y, optimizers, sgr, StepOptions(step=step, **options))
    return report


def gradients(net, x, y, sgr, **options):
    """Gradients of a step, caught by optimizers that do not update."""
    caught = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update(
                {id(p): p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None}
            )

    optimizers = [Catch(net.parameters_of(k), lr=0.1) for k in range(net.k)]
    local_step(net, x, y, optimizers, sgr, StepOptions(**options))
    return {name: caught[id(p)] for name, p in net.named_parameters() if id(p) in caught}


def test_one_module_is_plain_backpropagation_bit_for_bit():
    x, y = images()
    model = convs()
    twin = copy.deepcopy(model).train()
    net = split(model, x, 1)
    optimizers, plain = sgds(net), torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        report = local_step(net, x, y, optimizers, SGRConfig(), StepOptions(step=step))
        loss = F.cross_entropy(twin(x), y)
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert report.losses == [loss.item()]
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("estimator", ["shift", "exact"])
def test_with_lambda_zero_it_is_a_literal_detach_and_step_loop_bit_for_bit(estimator):
    x, y = vectors()
    net = split(dropout_mlp(), x, 3)
    twin = copy.deepcopy(net)
    run(net, x, y, SGRConfig(lam=0, estimator=estimator))
    optimizers = sgds(twin)
    blocks = list(twin.model)
    groups = [blocks[a:b] for a, b in twin.plan.ranges]
    for step in range(3):
        z = x
        for k, group in enumerate(groups):
            head = twin.heads[k] if k < 2 else twin.model[-1]
            with keyed(0, k, step, 0):
                out = nn.Sequential(*group)(z.detach())
                loss = F.cross_entropy(head(out), y)
            optimizers[k].zero_grad()
            loss.backward()
            optimizers[k].step()
            z = out
    assert same(net.state_dict(), twin.state_dict())


def test_the_first_module_does_not_depend_on_the_reconciliation():
    x, y = vectors()
    ends = []
    for sgr in (SGRConfig(lam=0), SGRConfig(lam=3, ramp=0), SGRConfig(estimator="exact"), SGRConfig(every=2)):
        net = split(dropout_mlp(), x, 3)
        run(net, x, y, sgr)
        ends.append([p.detach().clone() for p in net.parameters_of(0)])
        assert not ends[1:] or all(torch.equal(a, b) for a, b in zip(ends[0], ends[-1], strict=True))
    assert len(ends) == 4


def test_no_gradient_leaves_a_module():
    x, y = vectors()
    net = split(mlp(), x, 2)
    first, second = net.segments
    out, loss, _ = first(x, None, y)
    assert_gradient_isolated(loss, reaches=first.trained(), spares=second.trained())
    _, loss, _ = second(out.detach(), None, y)
    assert_gradient_isolated(loss, reaches=second.trained(), spares=first.trained())


def test_a_later_module_does_not_touch_an_earlier_ones_gradient():
    x, y = vectors()
    net = split(mlp(), x, 3)
    before = gradients(net, x, y, SGRConfig(ramp=0))
    with torch.no_grad():
        for parameter in net.parameters_of(2):
            parameter.add_(1)
    after = gradients(net, x, y, SGRConfig(ramp=0))
    early = {id(p) for k in (0, 1) for p in net.parameters_of(k)}
    for name, parameter in net.named_parameters():
        assert torch.equal(before[name], after[name]) == (id(parameter) in early)


@pytest.mark.parametrize("dist", ["sample", "mean", "relative", "cosine"])
@pytest.mark.parametrize("reg_to_head", [True, False])
def test_shift_in_a_step_approaches_exact_as_lambda_falls(dist, reg_to_head):
    """In place: the errors of two lambdas have the ratio of their squares."""
    x, y = vectors(dtype=torch.float64)
    net = split(mlp(norm=True).double(), x, 3)
    errors = []
    for lam in (1e-2, 1e-3):
        common = {"lam": lam, "dist": dist, "ramp": 0.0, "shift_clip": None, "reg_to_head": reg_to_head}
        shifted = gradients(net, x, y, SGRConfig(estimator="shift", **common))
        exact = gradients(net, x, y, SGRConfig(estimator="exact", **common))
        errors.append(sum(float((shifted[n] - exact[n]).square().sum()) for n in exact) ** 0.5)
    assert 60 < errors[0] / errors[1] < 140


def test_reg_to_head_false_leaves_the_heads_gradient_as_without_reconciliation():
    x, y = vectors()
    net = split(mlp(), x, 3)
    plain = gradients(net, x, y, SGRConfig(lam=0))
    for estimator in ("shift", "exact"):
        found = gradients(net, x, y, SGRConfig(lam=2, ramp=0, estimator=estimator, reg_to_head=False))
        for name in plain:
            head = name.startswith("heads.") or name.startswith("model.4")
            if head:
                torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(found["model.2.0.weight"], plain["model.2.0.weight"])


def test_doubling_the_batch_changes_nothing_of_sample_and_halves_mean():
    x, y = vectors(dtype=torch.float64)
    net = split(mlp().double(), x, 2)
    for dist, factor in (("sample", 1.0), ("mean", 0.5)):
        sgr = SGRConfig(dist=dist, ramp=0, estimator="exact")
        once = local_step(net, x, y, no_update(net), sgr)
        twice = local_step(net, torch.cat([x, x]), torch.cat([y, y]), no_update(net), sgr)
        assert twice.modules[1].reconciliation == pytest.approx(factor * once.modules[1].reconciliation, rel=1e-12)
    sgr = SGRConfig(ramp=0)
    g1, g2 = gradients(net, x, y, sgr), gradients(net, torch.cat([x, x]), torch.cat([y, y]), sgr)
    for name in g1:
        assert_same_as_reference(g2[name], g1[name], relative=1e-12)


def no_update(net):
    return [torch.optim.SGD(net.parameters_of(k), lr=0.0) for k in range(net.k)]


def test_scaling_the_loss_leaves_the_step_as_it_is():
    """What mixed precision with a loss scale does."""
    x, y = vectors(dtype=torch.float64)
    ends = []
    for scale in (None, 2.0**10):
        net = split(mlp().double(), x, 2)
        scalers = None if scale is None else [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
        local_step(net, x, y, sgds(net), SGRConfig(ramp=0), StepOptions(), scalers)
        ends.append(weights(net))
    for name in ends[0]:
        assert_same_as_reference(ends[1][name], ends[0][name], relative=1e-12)


def test_the_polarization_identity_predicts_the_change_of_the_next_loss():
    """A step of module 1 changes L_2 by -eta <J^T g_in, J^T g_out> + O(eta^2)."""
    x, y = vectors(dtype=torch.float64)
    net = split(mlp().double(), x, 2)
    first, second = net.segments
    backbone = [p for p in first.trained() if id(p) not in {id(q) for q in first.head_parameters()}]
    out, loss, _ = first(x, None, y)
    (g_out,) = torch.autograd.grad(loss, out, retain_graph=True)
    leaf = out.detach().requires_grad_()
    _, next_loss, _ = second(leaf, None, y)
    (g_in,) = torch.autograd.grad(next_loss, leaf)
    ours = torch.autograd.grad(out, backbone, g_out, retain_graph=True)
    theirs = torch.autograd.grad(out, backbone, g_in, retain_graph=True)
    gap = torch.autograd.grad(out, backbone, g_in - g_out)
    square = [sum(float(g.square().sum()) for g in side) for side in (theirs, ours, gap)]
    predicted = -0.5 * (square[0] + square[1] - square[2])
    errors = []
    for eta in (1e-2, 1e-3):
        with torch.no_grad():
            for p, g in zip(backbone, ours, strict=True):
                p.sub_(eta * g)
            moved = second(first.run_blocks(x, None), None, y)[1]
            for p, g in zip(backbone, ours, strict=True):
                p.add_(eta * g)
        errors.append(abs(float(moved - next_loss) - eta * predicted))
    assert 70 < errors[0] / errors[1] < 140


@pytest.mark.parametrize("estimator", ["shift", "exact"])
@pytest.mark.parametrize("reg_to_head", [True, False])
def test_batchnorm_counts_once_a_step_whatever_the_estimator(estimator, reg_to_head):
    x, y = images()
    plain = split(convs(), x, 2)
    net = copy.deepcopy(plain)
    local_step(plain, x, y, no_update(plain), SGRConfig(lam=0))
    sgr = SGRConfig(ramp=0, lam=2, estimator=estimator, reg_to_head=reg_to_head)
    local_step(net, x, y, no_update(net), sgr)
    statistics = [name for name in net.state_dict() if "running" in name or "tracked" in name]
    assert len(statistics) == 3 * 5  # four blocks and the head's own
    for name in statistics:
        assert torch.equal(net.state_dict()[name], plain.state_dict()[name]), name
        assert "tracked" not in name or int(net.state_dict()[name]) == 1


def test_both_passes_see_the_same_dropout():
    """Where the shift is zero, the learning pass is the ordinary pass."""
    x, y = vectors()
    net = split(dropout_mlp(), x, 2)
    shifted = gradients(net, x, y, SGRConfig(lam=1e-30, ramp=0))
    plain = gradients(net, x, y, SGRConfig(lam=0))
    assert same(plain, shifted)


def test_fraction_is_unbiased():
    """The mean over all subsets of half of the samples is the whole."""
    import itertools
    import unittest.mock

    x, y = vectors(count=4, dtype=torch.float64)
    net = split(mlp(norm=True).double(), x, 2)
    whole = gradients(net, x, y, SGRConfig(ramp=0, estimator="exact"))
    mean = {name: torch.zeros_like(g) for name, g in whole.items()}
    subsets = list(itertools.combinations(range(4), 2))
    for subset in subsets:
        # the draw alone is replaced, so that every subset comes once
        with unittest.mock.patch(
            "torch.randperm", lambda n, generator=None, s=subset: torch.tensor([*s, *({0, 1, 2, 3} - {*s})])
        ):
            found = gradients(net, x, y, SGRConfig(ramp=0, estimator="exact", fraction=0.5))
        for name in mean:
            mean[name] += found[name] / len(subsets)
    for name in whole:
        assert_same_as_reference(mean[name], whole[name], relative=1e-12)


def test_fraction_of_shift_agrees_with_that_of_exact_and_hands_on_the_plain_output():
    x, y = vectors(dtype=torch.float64)
    net = split(mlp(norm=True).double(), x, 3)
    common = {"lam": 1e-4, "ramp": 0.0, "shift_clip": None, "fraction": 0.5}
    shifted = gradients(net, x, y, SGRConfig(**common))
    exact = gradients(net, x, y, SGRConfig(estimator="exact", **common))
    plain = gradients(net, x, y, SGRConfig(lam=0))
    for name in exact:
        part = float((exact[name] - plain[name]).norm())
        assert float((shifted[name] - exact[name]).norm()) <= 0.02 * part + 1e-10


def test_every_applies_at_multiples_with_the_multiplied_weight():
    sgr = SGRConfig(lam=0.5, every=3, ramp=0)
    assert [sgr.strength(t, 100) for t in range(5)] == [1.5, 0, 0, 1.5, 0]
    x, y = vectors()
    net = split(mlp(), x, 2)
    off = gradients(net, x, y, SGRConfig(lam=0.5, every=3, ramp=0), step=1)
    assert same(off, gradients(net, x, y, SGRConfig(lam=0)))


def test_ramp_and_annealing_weigh_the_ends_of_the_training():
    sgr = SGRConfig(lam=2, ramp=0.1, anneal_last=0.2)
    assert sgr.strength(0, 100) == pytest.approx(0.2)
    assert sgr.strength(50, 100) == 2
    assert sgr.strength(99, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("sgr", [SGRConfig(lam=0), SGRConfig(ramp=0), SGRConfig(ramp=0, estimator="exact")])
def test_accumulation_over_two_halves_is_the_whole_batch(sgr):
    """In networks without BatchNorm, which would see the halves."""
    x, y = vectors(dtype=torch.float64)
    net = split(mlp(norm=True).double(), x, 3)
    whole, halves = gradients(net, x, y, sgr), gradients(net, x, y, sgr, accumulate=2)
    uneven = gradients(net, x, y, sgr, accumulate=3)
    for name in whole:
        assert_same_as_reference(halves[name], whole[name], relative=1e-9)
        assert_same_as_reference(uneven[name], whole[name], relative=1e-9)


def test_gradients_are_clipped_module_by_module():
    x, y = vectors()
    net = split(mlp(), x, 2)
    found = gradients(net, x, y, SGRConfig(lam=0), clip_norm=1e-3)
    for k in range(2):
        own = {id(p) for p in net.parameters_of(k)}
        norm = torch.stack([g.norm() for n, g in found.items() if id(dict(net.named_parameters())[n]) in own]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_gate_weakens_the_pull_on_a_module_that_is_better():
    x, y = vectors()
    net = split(mlp(), x, 2)
    net.segments[0].loss_average, net.segments[1].loss_average = 2.0, 1.0
    gated = gradients(net, x, y, SGRConfig(lam=4e-3, ramp=0, gate=True))
    quarter = split(mlp(), x, 2)
    wanted = gradients(quarter, x, y, SGRConfig(lam=1e-3, ramp=0))
    for name in wanted:
        assert_same_as_reference(gated[name], wanted[name], relative=1e-2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_attention_trains_by_shift_and_exact_says_what_it_needs():
    torch.manual_seed(0)
    model = nn.Sequential(*[Attention() for _ in range(3)], nn.Sequential(nn.Flatten(), nn.Linear(80, 3)))
    x, y = torch.randn(4, 5, 16), torch.randint(3, (4,))
    net = split(model, x, 3)
    assert local_step(net, x, y, sgds(net), SGRConfig(ramp=0)).modules[2].cosine is not None
    with pytest.raises(NoSecondDerivativeError, match='estimator="shift"'):
        local_step(net, x, y, sgds(net), SGRConfig(ramp=0, estimator="exact"))
    local_step(net, x, y, sgds(net), SGRConfig(ramp=0, estimator="exact", math_attention=True))


def test_a_module_that_begins_in_place_gets_a_copy_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12)), nn.Linear(12, 3))
    x, y = vectors()
    net = split(model, x, 2)
    with pytest.warns(UserWarning, match="in-place"):
        local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
    local_step(net, x, y, sgds(net), SGRConfig(ramp=0))  # a second warning would be an error


def test_bfloat16_trains_and_keeps_boundaries_in_single_precision():
    x, y = vectors()
    losses = []
    for dtype in (None, torch.bfloat16):
        net = split(mlp(), x, 2)
        boundary = first_boundary(net, x, y)
        for stage in net.segments:
            report = train_stage(stage, boundary, None, SGRConfig(ramp=0), StepOptions(dtype=dtype))
            losses.append(report.loss)
            assert stage.is_last or boundary.x[0].dtype == boundary.target[0].dtype == torch.float32
    assert losses[2:] != losses[:2]
    assert losses[2:] == pytest.approx(losses[:2], rel=0.02)


def test_compiled_modules_give_the_same_step():
    x, y = vectors()
    net = split(mlp(), x, 2)
    twin = copy.deepcopy(net)
    net.compile_segments(backend="eager")
    local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
    local_step(twin, x, y, sgds(twin), SGRConfig(ramp=0))
    assert same(weights(net), weights(twin))


def test_faults_are_named():
    x, y = vectors()
    net = split(mlp(), x, 2)
    optimizers = sgds(net)
    with pytest.raises(UserError, match="label 7 is out of range: the heads of modules 1 to 2"):
        local_step(net, x, torch.full((16,), 7), optimizers)
    with pytest.raises(UserError, match="label -1"):
        local_step(net, x, torch.full((16,), -1), optimizers)
    with pytest.raises(RuntimeError, match="evaluation mode"):
        local_step(net.eval(), x, y, optimizers)
    net.train()
    with pytest.raises(UserError, match="2 modules need as many optimizers"):
        local_step(net, x, y, optimizers[:1])
    with pytest.raises(UserError, match="accumulate is 32, but the batch has 16"):
        local_step(net, x, y, optimizers, None, StepOptions(accumulate=32))
    with pytest.raises(TypeError, match="expected a tensor"):
        local_step(net, [x], y, optimizers)
    with pytest.raises(TypeError, match="got str"):
        local_step(net, "text", y, optimizers)
    with torch.no_grad():
        net.model[3][0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"module 2 .* a weight is not finite; .* block 3") as caught:
        local_step(net, x, y, optimizers, None, StepOptions(step=9))
    assert (caught.value.module, caught.value.step) == (2, 9)
    with pytest.raises(NonFiniteLossError, match="its input is not finite already"):
        local_step(net, x * float("inf"), y, optimizers)


def test_batchnorm_with_one_sample_and_fraction_with_batchnorm_are_refused():
    x, y = images(count=1, size=1)
    net = split(convs(), images(size=1)[0], 2)
    with pytest.raises(UserError, match="module 1 .*BatchNorm cannot normalize one sample"):
        local_step(net, x, y, sgds(net))
    x, y = images()
    with pytest.raises(UserError, match="fraction 0.5 needs a model without BatchNorm"):
        local_step(net, x, y, sgds(net), SGRConfig(fraction=0.5, ramp=0))


def test_an_integer_boundary_is_refused():
    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.weight).long()

    with pytest.raises(TypeError, match="int64: expected one tensor of real numbers"):
        split(nn.Sequential(nn.Linear(6, 12), Rounds(), nn.Linear(12, 3)), vectors()[0], 2)


@pytest.mark.parametrize("bad", [{"lam": -1}, {"fraction": 0}, {"fraction": 1.5}, {"every": 0}, {"shift_clip": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SGRConfig(**bad)


@pytest.mark.parametrize("kind", ["gap_linear", "conv_gap", "mlp_sr", "aug"])
@pytest.mark.parametrize("classifier", ["trainable", "random", "etf"])
def test_every_image_head_trains_its_module(kind, classifier):
    x, y = images()
    net = split(convs(), x, 3, HeadSpec(kind=kind, classifier=classifier, hidden=16))
    before = weights(net)
    local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
    after = weights(net)
    for name in before:
        if before[name].is_floating_point() and before[name].ndim > 1:
            fixed = classifier != "trainable" and name.startswith("heads.") and before[name].shape[0] == 5
            assert torch.equal(before[name], after[name]) == fixed, name


def test_an_etf_classifier_is_a_simplex():
    from localrecon.heads import simplex_etf

    frame = simplex_etf(5, 16)
    wanted = torch.full((5, 5), -1 / 4).fill_diagonal_(1.0)
    torch.testing.assert_close(frame @ frame.T, wanted, atol=1e-5, rtol=0)


def test_chunks_of_the_language_models_loss_are_the_whole():
    from localrecon.losses import loss_and_correct

    torch.manual_seed(0)
    head, x = nn.Linear(8, 11), torch.randn(3, 7, 8, requires_grad=True)
    labels = torch.randint(11, (3, 7))
    labels[0, :3] = -100
    whole = F.cross_entropy(head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss, correct = loss_and_correct(head, x, labels, HeadSpec(chunk=4), "lm", local=True)
    torch.testing.assert_close(loss, whole)
    assert int(correct) == int(((head(x).argmax(2) == labels) & (labels != -100)).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(whole, x)[0])


@pytest.mark.parametrize("estimator", ["shift", "exact"])
def test_rows_of_text_without_a_token_that_counts_do_no_harm(estimator):
    from localrecon.models import gpt

    torch.manual_seed(0)
    x = torch.randint(9, (4, 6))
    labels = torch.randint(9, (4, 6))
    labels[2:] = -100
    net = split(gpt(9, 6, width=16, depth=2).double(), x, 2, adapter="sequential")
    sgr = SGRConfig(ramp=0, estimator=estimator, math_attention=True)
    whole, parts = gradients(net, x, labels, sgr), gradients(net, x, labels, sgr, accumulate=2)
    for name in whole:
        assert_same_as_reference(parts[name], whole[name], relative=1e-9)


def test_predsim_compares_similarity_matrices():
    from localrecon.losses import loss_and_correct

    x, y = torch.randn(4, 6), torch.tensor([0, 1, 0, 2])
    head = nn.Linear(6, 3)
    loss, _ = loss_and_correct(head, x, y, HeadSpec(predsim=0.99), "classify", local=True)

    def similarity(rows):
        rows = rows - rows.mean(1, keepdim=True)
        return torch.stack([torch.stack([F.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows])

    wanted = (
        0.01 * F.cross_entropy(head(x), y)
        + 0.99 * (similarity(x) - similarity(F.one_hot(y, 3).float())).square().mean()
    )
    torch.testing.assert_close(loss, wanted)


def test_soft_labels_train_like_hard_ones():
    x, y = vectors()
    ends = []
    for labels in (y, F.one_hot(y, 3).float()):
        net = split(mlp(), x, 2)
        local_step(net, x, labels, sgds(net), SGRConfig(ramp=0))
        ends.append(weights(net))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-5, atol=1e-7)


def test_nets_are_copied_with_their_heads():
    x, y = vectors()
    net = split(mlp(), x, 3)
    twin = copy.deepcopy(net)
    assert isinstance(twin, LocalNet)
    assert same(weights(net), weights(twin))
    local_step(twin, x, y, sgds(twin))
    assert not same(weights(net), weights(twin))
