"""Losses of the user's, labels that do not count, soft labels, and labels that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from localrecon import HeadSpec, LocalNet, LocalTrainer, SGRConfig, StepOptions, diagnose, local_step, plan_split
from localrecon.evaluation import evaluate
from localrecon.losses import terms_of
from localrecon_test_nets import convs, images, mlp, sgds, split, vectors
from torch import nn

from tenfold import UserError


def own(model, x, y, loss, k=2, **heads):
    return LocalNet(model, plan_split(model, x, k=k, loss=loss, labels=y, balance="blocks"), loss=loss, **heads).train()


def squared(output, labels):
    return F.mse_loss(output.squeeze(1), labels)


CASES = {
    "regression": (lambda: mlp(classes=1), lambda n: torch.randn(n), squared),
    "several labels": (
        lambda: mlp(classes=3),
        lambda n: (torch.rand(n, 3) > 0.5).float(),
        lambda output, labels: F.binary_cross_entropy_with_logits(output, labels),
    ),
    "a value per sample": (
        lambda: nn.Sequential(*mlp(classes=1), nn.Flatten(0)),
        lambda n: torch.randn(n),
        lambda output, labels: F.smooth_l1_loss(output, labels),
    ),
    "two labels each": (
        lambda: mlp(classes=4),
        lambda n: {"class": torch.randint(3, (n,)), "size": torch.randn(n)},
        lambda output, labels: (
            F.cross_entropy(output[:, :3], labels["class"]) + F.mse_loss(output[:, 3], labels["size"])
        ),
    ),
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("estimator", ["shift", "exact"])
def test_losses_of_the_user_fall_in_every_module(kind, estimator):
    make, label, loss = CASES[kind]
    x, _ = vectors()
    y = label(16)
    net = own(make(), x, y, loss)
    trainer = LocalTrainer(net, SGRConfig(ramp=0, estimator=estimator), lambda p: torch.optim.AdamW(p, lr=1e-2))
    reports = [trainer.step(x, y) for _ in range(40)]
    for before, after in zip(reports[0].losses, reports[-1].losses, strict=True):
        assert after < before
    assert "m1/acc" not in reports[0].metrics()
    found = evaluate(net, [(x, y)])
    with torch.no_grad():
        assert found["loss"] == found["loss 2"] == pytest.approx(float(loss(net.model(x), y)), rel=1e-5)
    assert len(diagnose(net, x, y).losses) == 2


def test_with_one_module_it_is_the_users_loss_and_its_gradient_exactly():
    x, y = vectors()[0], torch.randn(16)
    model = mlp(classes=1)
    net = own(model, x, y, squared, k=1)
    before = [p.detach().clone() for p in model.parameters()]
    wanted = torch.autograd.grad(squared(model(x), y), list(model.parameters()))
    report = local_step(net, x, y, [torch.optim.SGD(net.parameters_of(0), lr=1.0)])
    assert report.losses == [squared_of(before, model, x, y)]
    for p, b, g in zip(model.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(p.detach(), b - g)


def squared_of(parameters, model, x, y):
    named = dict(zip([n for n, _ in model.named_parameters()], parameters, strict=True))
    with torch.no_grad():
        return float(squared(torch.func.functional_call(model, named, (x,)), y))


def test_parts_of_a_batch_are_the_whole_also_for_a_loss_of_the_users():
    x, y = vectors(dtype=torch.float64)[0], torch.randn(16, dtype=torch.float64)
    ends = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        net = own(mlp(classes=1, norm=True).double(), x, y, squared)
        local_step(net, x, y, sgds(net), SGRConfig(ramp=0), StepOptions(accumulate=accumulate))
        ends.append([p.detach() for p in net.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_token_classification_and_masked_language_models_are_the_loss_per_token():
    from localrecon import untie
    from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=5
    )
    tokens = torch.randint(40, (4, 8))
    for make, classes in ((BertForTokenClassification, 5), (BertForMaskedLM, 40)):
        torch.manual_seed(0)
        model = untie(make(config))
        labels = torch.randint(classes, (4, 8))
        labels[:, 3:] = -100
        net = LocalNet(model, plan_split(model, tokens, k=2)).train()
        report = local_step(net, tokens, labels, sgds(net), SGRConfig(ramp=0))
        assert report.modules[1].cosine is not None
        assert (net.plan.task, net.plan.classes) == ("lm", classes)


def test_samples_that_do_not_count_do_not_count_in_the_scale_either():
    """Two of eight counted: as these two alone, also in what is reconciled."""
    x, y = vectors(count=8, dtype=torch.float64)
    y = y.clone()
    y[2:] = -100
    assert terms_of(y, "classify") == 2
    ends = []
    for rows in (slice(None), slice(0, 2)):
        net = split(mlp().double(), x, 2)
        report = local_step(net, x[rows], y[rows], sgds(net), SGRConfig(ramp=0))
        ends.append((report.modules[1].reconciliation, [p.detach().clone() for p in net.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-9)
    for a, b in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    nothing = split(mlp().double(), x, 2)
    assert local_step(nothing, x, torch.full((8,), -100), sgds(nothing), SGRConfig(ramp=0)).losses == [0, 0]
    similar = split(mlp().double(), x, 2, HeadSpec(predsim=0.5))
    assert all(torch.isfinite(torch.tensor(local_step(similar, x, y, sgds(similar)).losses)))


def test_soft_labels_are_smoothed_once():
    x, y = vectors()
    soft = F.one_hot(y, 3).float() * 0.9 + 0.1 / 3
    losses = []
    for labels, smoothing in ((y, 0.1), (soft, 0.1), (soft, 0.0)):
        net = split(mlp(), x, 2, HeadSpec(label_smoothing=smoothing))
        losses.append(local_step(net, x, labels, sgds(net), SGRConfig(lam=0)).losses[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[1] == losses[2]


def test_models_of_one_output_are_refused_without_a_loss():
    with pytest.raises(
        UserError, match=r"one number each, \(B, 1\), of which cross-entropy is always 0; give plan_split"
    ):
        plan_split(mlp(classes=1), vectors()[0], k=2)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    with pytest.raises(UserError, match=r"gives \(B, 5, 4, 4\): cross-entropy expects .*loss=\.\.\."):
        plan_split(dense, images()[0], k=1)
    plan = plan_split(mlp(classes=1), vectors()[0], k=2, loss=squared, measure=False)
    with pytest.raises(UserError, match="give LocalNet that loss"):
        LocalNet(mlp(classes=1), plan)
    with pytest.raises(UserError, match="give it the labels"):
        plan_split(mlp(classes=1), vectors()[0], k=2, loss=squared)


BAD = {
    "(16,) float32: expected (B,) int64, or (B, 3) float": torch.rand(16),
    "(16, 1) int64": torch.zeros(16, 1, dtype=torch.int64),
    "(16, 4) float32": torch.rand(16, 4),
    "(16,) bool": torch.zeros(16, dtype=torch.bool),
    "15 labels for 16 samples": torch.zeros(15, dtype=torch.int64),
    "are list": [0] * 16,
}


@pytest.mark.parametrize("words", BAD)
def test_labels_of_another_shape_or_kind_are_refused_in_our_words(words):
    import re

    x, _ = vectors()
    net = split(mlp(), x, 2)
    with pytest.raises(UserError, match=re.escape(words)):
        local_step(net, x, BAD[words], sgds(net))


def test_class_numbers_of_any_width_are_labels():
    x, y = vectors()
    losses = []
    for kind in (torch.int64, torch.int32, torch.uint8):
        net = split(mlp(), x, 2)
        losses.append(local_step(net, x, y.to(kind), sgds(net)).losses)
    assert losses[0] == losses[1] == losses[2]


def test_heads_of_the_users_that_do_not_fit_are_refused_in_our_words():
    x, y = images()
    plan = plan_split(convs(), x, k=2, measure=False)
    net = LocalNet(convs(), plan, [nn.Conv2d(8, 5, 1)]).train()
    with pytest.raises(
        UserError, match=r"head of module 1 .* gives \(8, 5, 8, 8\) for labels of \(8,\): expected \(B, cl"
    ):
        local_step(net, x, y, sgds(net))
    net = own(mlp(classes=1), vectors()[0], torch.randn(16), lambda output, labels: (output.squeeze(1) - labels).mean())
    net.loss = None
    for stage in net.segments:
        stage.loss = lambda output, labels: output.squeeze(1) - labels
    with pytest.raises(UserError, match=r"loss of module 1 .* is a tensor of \(16,\): expected one number"):
        local_step(net, vectors()[0], torch.randn(16), sgds(net))


def test_a_net_with_a_loss_of_its_own_is_diagnosed():
    """Of one module its gradient is back-propagation's; of two, the table has a loss for each head and no accuracy."""
    x, y = torch.randn(6, 8), torch.randn(6, 3)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(*blocks, nn.Linear(8, 3))
    reports = []
    for k in (1, 2):
        plan = plan_split(model, x, k=k, loss=F.mse_loss, labels=y)
        net = LocalNet(model, plan, loss=F.mse_loss, seed=0)
        reports.append(diagnose(net, x, y))
    assert reports[0].bp_alignment == pytest.approx(1, abs=1e-5)
    assert reports[0].losses[0] == pytest.approx(F.mse_loss(model(x), y).item())
    assert reports[1].bp_alignment < 0.999
    assert reports[1].accuracies == (None, None)
    assert len(reports[1].boundaries) == 1
    assert "| - |" in reports[1].to_markdown()
