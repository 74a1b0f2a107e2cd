"""Models of the wild are cut without being changed: modes, randomness, masks, caps and constants are their own."""

import copy
import dataclasses

import pytest
import timm
import torch
from localrecon import HeadSpec, LocalNet, SGRConfig, SplitPlan, local_step, plan_split, register_adapter
from localrecon.adapters import _ADAPTERS, build_chain, sequential_adapter
from localrecon.chain import Chain, SharedParameterError, UnsplittableModelError
from localrecon.inputs import call, logits_of
from localrecon.plan import PlanMismatchError
from localrecon_test_nets import sgds, vectors, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from tenfold import UserError
from tenfold.memory import MemoryProbe
from tenfold.randomness import keyed


def one_module(model, x):
    return LocalNet(model, plan_split(model, x, k=1, measure=False))


def gradients_of_step(model, x, labels, step=0):
    """What one step of back-propagation through the cut model does to the weights."""
    net = one_module(model, x).train()
    before = weights(net)
    local_step(net, x, labels, [torch.optim.SGD(net.parameters_of(0), lr=1.0)], SGRConfig(lam=0))
    after = weights(net)
    return {name: before[name] - after[name] for name in before if before[name].is_floating_point()}


class Plain(nn.Module):
    """Blocks that torch.fx cannot trace or traces in one mode: a condition on the mode, an assertion, a tuple, a keyword."""

    def __init__(self, drop=0.5):
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.scale = nn.Parameter(torch.full((12,), 1e-6))  # as in ConvNeXt
        self.blocks = nn.ModuleList(Residual(drop) for _ in range(3))
        self.out = nn.Linear(12, 3)

    def forward(self, x, mask=None):
        torch._assert(x.shape[0] > 0, "a batch")
        x, _ = self.first(x), None
        for i, block in enumerate(self.blocks):
            x, _ = block(x, mask if mask is not None and i else None)
        if self.training:
            x = x + self.scale
        return self.out(x)


class Residual(nn.Module):
    def __init__(self, drop):
        super().__init__()
        self.inner, self.drop = nn.Linear(12, 12), nn.Dropout(drop)

    def forward(self, x, mask=None):
        new = self.drop(torch.tanh(self.inner(x)))
        return x + (new if mask is None else new * mask), mask


@pytest.mark.parametrize("made_in", ["train", "eval"])
def test_dropout_is_on_in_training_and_off_in_evaluation_however_the_net_was_made(made_in):
    torch.manual_seed(0)
    model, (x, y) = Plain(), vectors()
    model.train(made_in == "train")
    net = LocalNet(model, plan_split(model, x, k=2, measure=False))
    assert model.training == (made_in == "train")
    net.eval()
    assert torch.equal(net.forward_exits(x)[-1], net.forward_exits(x)[-1])
    net.train()
    with keyed(1):
        one = net.forward_exits(x)[-1]
    with keyed(2):
        other = net.forward_exits(x)[-1]
    assert not torch.equal(one, other)
    local_step(net, x, y, sgds(net))


def test_parameters_used_directly_tuples_and_masks_per_block_are_followed():
    torch.manual_seed(0)
    model, (x, y) = Plain(drop=0.0), vectors()
    inputs = {"x": x, "mask": (torch.rand(16, 12) > 0.5).float()}
    twin = copy.deepcopy(model)
    found = gradients_of_step(model, inputs, y)
    nn.functional.cross_entropy(twin(**inputs), y).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], p.grad, rtol=1e-4, atol=1e-7)
    assert float(found["model.scale"].abs().max()) > 0


def test_cuts_lie_between_residual_blocks_and_not_within_blocks_of_the_same_class():
    class Block(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.wide, self.back, self.same = nn.Linear(before, 24), nn.Linear(24, after), before == after

        def forward(self, x):
            new = self.back(torch.relu(self.wide(x)))
            return x + new if self.same else new

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(6, 12), Block(12, 12), Block(12, 8))
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.blocks(x))

    assert [b.name for b in build_chain(Net(), sample=vectors()[0]).blocks] == ["blocks.0", "blocks.1", "blocks.2"]


def test_an_activation_used_twice_needs_no_adapter():
    x, y = vectors()
    torch.manual_seed(0)
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 12), relu, nn.Linear(12, 12), relu, nn.Linear(12, 3))
    net = LocalNet(model, plan_split(model, x, k=2, measure=False)).eval()
    assert torch.equal(net.forward_exits(x)[-1], model(x))
    local_step(net.train(), x, y, sgds(net))


def test_a_sequence_with_a_forward_or_hooks_of_its_own_is_followed():
    class Odd(nn.Sequential):
        def forward(self, x):
            return super().forward(2 * x) + 1

    x, _ = vectors()
    torch.manual_seed(0)
    odd = Odd(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    hooked = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    for model in (odd, hooked):
        net = LocalNet(model, plan_split(model, x, k=1, measure=False)).eval()
        assert net.plan.adapter == "segments"
        assert torch.equal(net.forward_exits(x)[-1], model(x))


def test_hooks_of_the_user_run_once_a_pass():
    x, y = vectors()
    torch.manual_seed(0)
    model, seen = Plain(), []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    net = LocalNet(model, plan_split(model, x, k=3, measure=False)).train()
    del seen[:]
    local_step(net, x, y, sgds(net), SGRConfig(lam=0))
    assert seen == [(16, 12)]


def test_what_does_not_pass_through_the_cut_is_no_cut():
    class Detached(nn.Module):
        """The graph of autograd does not see what crosses here."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.a(x)
            kept = x.detach()
            return self.out(self.b(x) + kept)

    x, _ = vectors()
    net = LocalNet(model := Detached(), plan_split(model, x, k=1, measure=False)).eval()
    assert net.plan.blocks == ("a",)  # not behind b: what follows needs the detached output of a as well
    assert torch.equal(net.forward_exits(x)[-1], model(x))


def test_a_model_like_a_unet_is_cut_outside_of_its_skips_and_trained_with_a_loss_of_its_own():
    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down1, self.down2 = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
            self.middle, self.up = nn.Conv2d(16, 16, 3, 1, 1), nn.ConvTranspose2d(16, 8, 2, 2)
            self.fuse, self.out = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            a = torch.relu(self.down1(x))
            b = torch.relu(self.down2(nn.functional.max_pool2d(a, 2)))
            b = torch.relu(self.middle(b))
            return self.out(torch.relu(self.fuse(torch.cat([a, self.up(b)], dim=1))))

    torch.manual_seed(0)
    model, x = UNet(), torch.randn(4, 3, 8, 8)
    y = torch.randint(2, (4, 8, 8))
    y[0, 0] = 255

    def loss(logits, labels):
        return nn.functional.cross_entropy(logits, labels, ignore_index=255)

    plan = plan_split(model, x, k=2, loss=loss, labels=y)
    assert plan.blocks == ("down1", "fuse")
    assert plan.predicted_peak
    net = LocalNet(model, plan, loss=loss).train()
    optimizers = sgds(net, lr=0.05)
    losses = [local_step(net, x, y, optimizers, SGRConfig(ramp=0)).losses for _ in range(20)]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    assert [tuple(exit_.shape) for exit_ in net.eval().forward_exits(x)] == [(4, 2, 8, 8)] * 2


def transformer(kind, **options):
    import transformers

    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{kind}Config")(**small | options)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


MIXED = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "Gemma2": {"head_dim": 8, "sliding_window": 3, "final_logit_softcapping": 0.05, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", MIXED)
def test_masks_of_each_layer_and_caps_of_logits_are_the_models_own(kind):
    model = transformer(kind, **MIXED[kind])
    tokens = torch.randint(1, 40, (2, 12))
    x = {"input_ids": tokens, "attention_mask": torch.ones(2, 12).long().tril(9)}
    net = LocalNet(model, plan_split(model, x, k=3, measure=False)).eval()
    assert len(set(model.config.layer_types)) == 2
    for length in (12, 7):
        part = {key: value[:, :length] for key, value in x.items()}
        assert torch.equal(net.forward_exits(part)[-1], logits_of(call(model, part)))
    assert float(net.forward_exits(x)[-1].abs().max()) <= MIXED[kind].get("final_logit_softcapping", 1e9)


def test_chunks_of_a_capped_language_models_loss_are_the_whole():
    model = transformer("Gemma2", **MIXED["Gemma2"])
    x = torch.randint(1, 40, (2, 12))
    losses = []
    for chunk in (2048, 6):
        net = LocalNet(model, dataclasses.replace(plan_split(model, x, k=2, measure=False)))
        assert net.plan.by_token
        net.segments[-1].spec = dataclasses.replace(net.segments[-1].spec, chunk=chunk)
        losses.append(local_step(net.train(), x, x, [Still(net, k) for k in range(2)], SGRConfig(lam=0)).losses[-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Still(torch.optim.SGD):
    def __init__(self, net, k):
        super().__init__(net.parameters_of(k), lr=0.0)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("sequence", [False, True])
def test_checkpoints_within_a_model_are_kept_or_named(kind, sequence):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def forward(self, x):
            return x + checkpoint(self.inner, x, use_reentrant=kind == "reentrant")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 12), Saving(), Saving(), nn.Linear(12, 3))

        def forward(self, x):
            return self.layers(x)

    x, y = vectors()
    torch.manual_seed(0)
    model = Net().layers if sequence else Net()
    twin = copy.deepcopy(model)
    if kind == "reentrant" and not sequence:
        with pytest.raises(UnsplittableModelError, match="reentrant activation checkpoints"):
            plan_split(model, x, k=2, measure=False)
        return
    net = LocalNet(model, plan_split(model, x, k=2, measure=False)).train()
    if kind == "reentrant":
        with pytest.raises(ValueError, match="module 2 .*reentrant activation checkpoints"):
            local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
        return
    local_step(net, x, y, sgds(net), SGRConfig(ramp=0))
    found = gradients_of_step(twin, x, y)
    again = copy.deepcopy(twin)
    assert all(float(value.abs().max()) > 0 for value in found.values())
    assert again is not twin


def test_layers_that_transformers_checkpoints_train_as_without():
    tokens = torch.randint(1, 40, (2, 8))
    ends = []
    for on in (False, True):
        model = transformer("Llama")
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        net = LocalNet(model, plan_split(model, tokens, k=2, measure=False), seed=0).train()
        local_step(net, tokens, tokens, sgds(net), SGRConfig(ramp=0))
        ends.append(weights(net))
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], msg=name)


class Scales(nn.Module):
    """Two scales that go through each block; with ``bias``, one of them is made once and used at once."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)]) for _ in range(3))
        self.first, self.out = nn.Linear(6, 12), nn.Linear(12, 3)
        self.steps = nn.ModuleList(Step(pair, bias and i) for i, pair in enumerate(self.blocks))

    def forward(self, x):
        pair = self.first(x), None
        for step in self.steps:
            pair = step(*pair)
        return self.out(pair[0] + pair[1])


class Step(nn.Module):
    def __init__(self, pair, given):
        super().__init__()
        self.pair, self.given = pair, given

    def forward(self, a, b):
        new = b if self.given else torch.tanh(self.pair[1](a if b is None else b))
        return torch.tanh(self.pair[0](a)) + (new if self.given is not False else 0), new


def test_constants_go_over_a_cut_where_all_that_made_them_learns_without_them_and_else_there_is_none():
    x, _ = vectors()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="does not depend on 4 trained parameters"):
        one = plan_split(Scales(bias=True), x, k=2, measure=False)
    assert any(name.startswith("steps") for name in one.blocks)
    assert not any(
        name.startswith("steps") for name in plan_split(Scales(bias=False), x, k=1, measure=False).blocks[:-1]
    )


def test_one_object_in_two_blocks_is_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.again, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.again(torch.tanh(self.a(torch.tanh(self.again(x))))))

    with pytest.raises(SharedParameterError, match="again"):
        plan_split(Twice(), vectors()[0], k=1, measure=False)


def test_trained_parameters_that_the_output_does_not_use_are_named():
    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Linear(12, 3)

    with pytest.warns(UserWarning, match=r"2 trained parameters, .*auxiliary.weight"):
        plan_split(Spare(), vectors()[0], k=1, measure=False)


def test_plans_along_a_forward_pass_are_data_and_refuse_another_model():
    x, _ = vectors()
    plan = plan_split(Plain(), x, k=2, measure=False)
    again = SplitPlan.from_json(plan.to_json())
    assert again == plan
    LocalNet(Plain(), again)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 12)

        def forward(self, x):
            return self.first(x)

    with pytest.raises(PlanMismatchError, match="no submodule"):
        LocalNet(Other(), again)


def test_skipped_blocks_take_no_memory_and_no_time():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))
            self.out = nn.Linear(512, 3)

        def forward(self, x):
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.out(x)

    torch.manual_seed(0)
    model, x = Wide(), torch.randn(256, 512)
    net = LocalNet(model, plan_split(model, x, k=1, measure=False))
    size = 256 * 512 * 4
    with torch.no_grad():
        context, chain = net.chain.context(x), net.chain
        y = chain.run(0, 3, x, context)
        with MemoryProbe(model, x, y, context) as probe:
            chain.run(3, 4, y, context)
    assert probe.peak_bytes - probe.start_bytes <= 3.1 * size


def test_users_adapters_that_leave_a_parameter_out_are_refused():
    @register_adapter("partial")
    def adapter(model):
        blocks = sequential_adapter(model).blocks
        return Chain(model, blocks[:-1], blocks[-1], "partial")

    try:
        torch.manual_seed(0)
        with pytest.raises(UnsplittableModelError, match="no block of the partial adapter holds"):
            build_chain(nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)]), "partial")
    finally:
        del _ADAPTERS["partial"]


@pytest.mark.parametrize("sides", [(28, 56), (56, 28)])
def test_maps_of_a_swin_on_rectangular_images_have_their_channels_last(sides):
    options = {"img_size": sides, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 7}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **options)
    images = torch.randn(2, 3, *sides)
    plan = plan_split(model, images, k=2, measure=False)
    (height, width, channels), (last, *_) = plan.shapes[0], plan.channels_last
    assert height != width
    assert channels == 24
    assert last is True
    assert [p.shape[-1] for p in LocalNet(model, plan).heads[0].parameters() if p.ndim == 2] == [channels]


def test_a_map_with_as_many_channels_as_rows_has_them_first():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    plan = plan_split(model, torch.randn(2, 8, 8, 12), k=2, measure=False)
    assert plan.channels_last[0] is False
    assert any(isinstance(m, nn.Conv2d) and m.in_channels == 8 for m in LocalNet(model, plan).heads[0].modules())


def test_where_the_channels_cannot_be_told_the_head_has_to_say():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.factor * x

    model = nn.Sequential(Scaled(), Scaled(), nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 9, 3)))
    images = torch.randn(2, 4, 6, 9)
    plan = plan_split(model, images, k=2, measure=False, balance="blocks", heads=HeadSpec(layout="channels_first"))
    with pytest.raises(UserError, match=r"module 1 gives \(B, 4, 6, 9\), of which it cannot be told where"):
        LocalNet(model, plan)
    assert LocalNet(model, plan, HeadSpec(layout="channels_first")).heads[0](images).shape == (2, 3)
    assert LocalNet(model, plan, HeadSpec(layout="channels_last")).heads[0](images).shape == (2, 3)
