"""A model stays as its user has set it: modes, frozen parameters, number format, spectral norm; and its inputs as they are."""

import copy

import pytest
import torch
from localrecon import (
    EarlyExit,
    HeadSpec,
    LocalNet,
    LocalTrainer,
    SGRConfig,
    StepOptions,
    diagnose,
    local_step,
    plan_split,
)
from localrecon.evaluation import evaluate
from localrecon.inputs import split_batch
from localrecon_test_nets import convs, images, mlp, same, sgds, split, vectors, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tenfold import UserError


def llama(dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).to(dtype)


def test_a_frozen_batchnorm_keeps_its_mode_and_its_statistics():
    x, y = images()
    model = convs()
    model[1][1].eval()
    plan = plan_split(model, x, k=2)
    assert not model[1][1].training
    net = LocalNet(model, plan)
    trainer = LocalTrainer(net, SGRConfig(ramp=0))
    before = copy.deepcopy(model[1][1].state_dict())
    free = model[2][1].running_mean.clone()
    trainer.step(x, y)
    trainer.evaluate([(x, y)])
    trainer.step(x, y)
    diagnose(net, x, y)
    assert not model[1][1].training
    assert torch.equal(model[1][1].running_mean, before["running_mean"])
    assert not torch.equal(model[2][1].running_mean, free)
    twin = convs()
    twin.load_state_dict(model.state_dict())
    twin.eval()
    torch.testing.assert_close(net.eval().forward_exits(x)[-1], twin(x))


def test_a_model_made_in_evaluation_mode_is_put_into_training_mode_by_the_trainer_and_refused_by_a_step():
    x, y = vectors()
    model = mlp().eval()
    net = LocalNet(model, plan_split(model, x, k=2, measure=False))
    with pytest.raises(RuntimeError, match=r"net.train\(\)"):
        local_step(net, x, y, sgds(net))
    LocalTrainer(net).step(x, y)
    assert model.training


@pytest.mark.parametrize("frozen", ["first blocks", "all but the classifier", "the classifier"])
@pytest.mark.parametrize("sgr", [SGRConfig(lam=0), SGRConfig(ramp=0), SGRConfig(ramp=0, estimator="exact")])
def test_frozen_parameters_stay_and_the_others_train(frozen, sgr):
    x, y = vectors()
    model = mlp(depth=4)
    chosen = {"first blocks": model[:2], "all but the classifier": model[:4], "the classifier": model[4:]}[frozen]
    chosen.requires_grad_(False)
    plan = plan_split(model, x, k=4, balance="blocks")
    net = LocalNet(model, plan)
    trainer = LocalTrainer(net, sgr, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    before = weights(net)
    trainer.step(x, y)
    after = weights(net)
    still = {f"model.{name}" for name, p in model.named_parameters() if not p.requires_grad}
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in still), name
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        n.removeprefix("model.") for n in before if n in still
    ]


def test_nothing_to_train_in_a_module_is_no_fault():
    x, y = vectors()
    model = mlp(depth=3)
    model[2:].requires_grad_(False)
    net = LocalNet(model, plan_split(model, x, k=3, balance="blocks"))
    for dtype in (None, torch.float16):
        before = weights(net)
        report = LocalTrainer(net, SGRConfig(ramp=0), options=StepOptions(dtype=dtype)).step(x, y)
        assert len(report.losses) == 3
        assert torch.equal(before["model.3.weight"], weights(net)["model.3.weight"])


@pytest.mark.parametrize("sgr", [SGRConfig(lam=0), SGRConfig(ramp=0)])
def test_a_bf16_llama_with_its_first_half_frozen_trains_in_its_own_number_format(sgr):
    model, tokens = llama(torch.bfloat16), torch.randint(40, (4, 8))
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:2].requires_grad_(False)
    net = LocalNet(model, plan_split(model, tokens, k=2, balance="blocks"))
    seen = []
    model.model.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    trainer = LocalTrainer(net, sgr, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    before = weights(net)
    losses = [trainer.step(tokens, tokens).losses for _ in range(12)]
    assert losses[-1][1] < losses[0][1]
    assert set(seen) == {torch.bfloat16}
    after = weights(net)
    assert all(after[name].dtype == torch.bfloat16 for name in after if after[name].is_floating_point())
    assert torch.equal(
        before["model.model.layers.0.mlp.up_proj.weight"], after["model.model.layers.0.mlp.up_proj.weight"]
    )
    assert not torch.equal(
        before["model.model.layers.3.mlp.up_proj.weight"], after["model.model.layers.3.mlp.up_proj.weight"]
    )


def normed(kind):
    """A model with spectral norm on each hidden layer."""
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.spectral_norm if kind == "parametrization" else nn.utils.spectral_norm
    layers = [nn.Sequential(norm(nn.Linear(6 if i == 0 else 12, 12)), nn.Tanh()) for i in range(3)]
    return nn.Sequential(*layers, nn.Linear(12, 3))


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.parametrize("how", ["shift", "checkpoints", "planning", "diagnosis"])
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
def test_vectors_of_spectral_norm_turn_once_a_step(kind, how):
    x, y = vectors()
    plain = LocalNet(normed(kind), plan_split(normed(kind), x, k=1, measure=False), seed=0).train()
    net = LocalNet(
        normed(kind), plan_split(normed(kind), x, k=1 if how == "checkpoints" else 2, measure=False), seed=0
    ).train()
    if how == "checkpoints":
        net.segments[0].checkpointing = 1
    if how == "planning":
        plan_split(net.model, x, k=2)
    elif how == "diagnosis":
        diagnose(net, x, y)
    for n in (plain, net):
        optimizers = [torch.optim.SGD(n.parameters_of(k), lr=0.0) for k in range(n.k)]
        for step in range(3):
            local_step(n, x, y, optimizers, SGRConfig(ramp=0), StepOptions(step=step))
    buffers, others = dict(net.model.named_buffers()), dict(plain.model.named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, others[name], msg=name)


def test_checkpoints_with_spectral_norm_give_the_plain_gradient():
    x, y = vectors()
    ends = []
    for checkpointing in (0, 1):
        net = LocalNet(normed("parametrization"), plan_split(normed("parametrization"), x, k=1, measure=False)).train()
        net.segments[0].checkpointing = checkpointing
        local_step(net, x, y, sgds(net))
        ends.append(weights(net))
    assert same(*ends)


class Pair(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 12), nn.Linear(4, 12)
        self.middle, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, left, right):
        return self.out(torch.tanh(self.middle(torch.tanh(self.left(left) + self.right(right)))))


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_several_inputs_are_taken_in_any_form(form):
    torch.manual_seed(0)
    model, (x, y), other = Pair(), vectors(), torch.randn(16, 4)
    inputs = {"tuple": (x, other), "list": [x, other], "dict": {"right": other, "left": x}}[form]
    net = LocalNet(model, plan_split(model, inputs, k=2)).train()
    with torch.no_grad():
        assert torch.equal(net(inputs), model(x, other))
        assert torch.equal(net.forward_exits(inputs)[-1], model(x, other))
    local_step(net, inputs, y, sgds(net), SGRConfig(ramp=0), StepOptions(accumulate=2))
    local_step(net, inputs, y, sgds(net), SGRConfig(ramp=0, fraction=0.5))
    assert set(evaluate(net, [(*inputs, y) if form != "dict" else (inputs, y)])) >= {"accuracy", "loss"}


def test_fractions_of_a_batch_go_along_a_models_own_forward_pass():
    torch.manual_seed(0)
    model, (x, y) = Pair(), vectors()
    inputs = (x, torch.randn(16, 4))
    net = LocalNet(model, plan_split(model, inputs, k=2, measure=False)).train()
    report = local_step(net, inputs, y, sgds(net), SGRConfig(ramp=0, fraction=0.25))
    assert report.modules[1].cosine is not None


def test_early_exits_of_models_along_their_own_forward_pass_give_what_each_sample_alone_would():
    import timm

    torch.manual_seed(0)
    model, x = timm.create_model("test_resnet", num_classes=4), torch.randn(6, 3, 32, 32)
    net = LocalNet(model, plan_split(model, x, k=3, measure=False)).eval()
    exits = net.forward_exits(x)
    sure = torch.stack([e.softmax(1).amax(1) for e in exits])
    threshold = float(sure[0].median())
    logits, taken = EarlyExit(net, threshold)(x)
    for i in range(6):
        first = next((k for k in range(3) if float(sure[k, i]) >= threshold), 2)
        assert int(taken[i]) == first
        torch.testing.assert_close(logits[i], exits[first][i], rtol=1e-4, atol=1e-5)
    assert len(set(taken.tolist())) > 1


def test_batches_of_any_form_are_taken_apart():
    x, y = vectors()
    assert split_batch((x, y))[0] is x
    assert len(split_batch([x, x, y])[0]) == 2
    assert set(split_batch({"a": x, "b": x, "labels": y})[0]) == {"a", "b"}
    with pytest.raises(UserError, match="a, b: expected labels among them"):
        split_batch({"a": x, "b": x})
    with pytest.raises(UserError, match=r"a Tensor: expected \(inputs, labels\)"):
        split_batch(x)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*vectors(), strict=True)


@pytest.mark.parametrize("kind", ["shuffled", "list", "stream"])
def test_the_plain_trainer_takes_any_loader(kind, tmp_path):
    x, y = vectors()
    pairs = list(zip(x, y, strict=True))
    loader = {
        "shuffled": lambda: DataLoader(pairs, batch_size=8, shuffle=True),
        "list": lambda: [(x[:8], y[:8]), (x[8:], y[8:])],
        "stream": lambda: DataLoader(Stream(), batch_size=8),
    }[kind]()
    steps = []
    options = StepOptions(total_steps=4 if kind == "stream" else None)
    trainer = LocalTrainer(split(mlp(), x, 2), SGRConfig(), options=options)
    trainer.fit(loader, 2, on_step=lambda step, report: steps.append(step), checkpoint=tmp_path / "c.pt")
    assert steps == [1, 2, 3, 4]
    assert (tmp_path / "c.pt").exists()
    again = LocalTrainer(split(mlp(), x, 2), SGRConfig(), options=options)
    again.fit(loader, 3, on_step=lambda step, report: steps.append(step), checkpoint=tmp_path / "c.pt")
    assert steps[4:] == [5, 6]
    if kind == "stream":
        with pytest.raises(UserError, match="ramp is a share of the training"):
            LocalTrainer(split(mlp(), x, 2), SGRConfig()).fit(loader, 2)


def test_initial_weights_of_heads_depend_on_the_seed_alone():
    x, _ = vectors()
    plan = plan_split(mlp(), x, k=3, measure=False)
    ends = []
    for drawn in (0, 7):
        torch.manual_seed(drawn)
        torch.randn(drawn + 1)
        state = torch.get_rng_state()
        ends.append(weights(LocalNet(mlp(), plan, HeadSpec(), seed=3).heads))
        assert torch.equal(torch.get_rng_state(), torch.get_rng_state())
        assert state is not None
    assert same(*ends)
    assert not same(ends[0], weights(LocalNet(mlp(), plan, HeadSpec(), seed=4).heads))
