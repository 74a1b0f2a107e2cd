import copy

import pytest
import torch
from localrecon import (
    EarlyExit,
    HeadSpec,
    ListAdapter,
    LocalNet,
    SGRConfig,
    SplitPlan,
    detach_tied,
    local_step,
    plan_split,
    register_adapter,
    untie,
)
from localrecon.adapters import _ADAPTERS, build_chain
from localrecon.chain import Block, Chain, SharedParameterError, UnsplittableModelError
from localrecon.plan import PlanMismatchError
from localrecon_test_nets import convs, images, mlp, same, sgds, split, vectors, weights
from torch import nn

from tenfold import UserError


def timm_resnet():
    import timm

    return timm.create_model("resnet18", num_classes=4), torch.randn(4, 3, 64, 64)


def timm_vit():
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **options), torch.randn(2, 3, 32, 32)


def timm_deit_distilled():
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 4}
    return timm.create_model("deit_tiny_distilled_patch16_224", **options), torch.randn(2, 3, 32, 32)


def torchvision_resnet():
    from torchvision.models import resnet18

    return resnet18(num_classes=4), torch.randn(4, 3, 64, 64)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    return untie(GPT2LMHeadModel(config)), torch.randint(40, (2, 8))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config), {
        "input_ids": torch.randint(40, (2, 8)),
        "attention_mask": torch.ones(2, 8).long().tril(5),
    }


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, num_labels=4
    )
    return BertForSequenceClassification(config), {
        "input_ids": torch.randint(40, (2, 8)),
        "attention_mask": torch.ones(2, 8).long().tril(6),
    }


def hf_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
    return ViTForImageClassification(config), torch.randn(2, 3, 16, 16)


class Branching(nn.Module):
    """Residual sums within, one tensor between."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.second, self.out = (
            nn.Linear(6, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + torch.tanh(self.inner(x))
        return self.out(torch.relu(self.second(x)))


def residual():
    return Branching(), torch.randn(4, 6)


KNOWN = [timm_resnet, timm_vit, timm_deit_distilled, torchvision_resnet, gpt2, llama, bert, hf_vit, residual]


@pytest.mark.parametrize("make", KNOWN, ids=lambda make: make.__name__)
def test_a_split_model_is_the_model_and_trains(make):
    torch.manual_seed(0)
    model, x = make()
    keys = list(model.state_dict())
    plan = plan_split(model, x, k=2 if make is residual else 3, measure=False)
    net = LocalNet(model, plan).eval()
    twin = copy.deepcopy(model).eval()
    assert net.to_backbone() is model
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        whole = twin(**x) if isinstance(x, dict) else twin(x)
        whole = whole if isinstance(whole, torch.Tensor) else whole.logits
        again = net(x)
        again = again if isinstance(again, torch.Tensor) else again.logits
        assert torch.equal(again, whole)
        assert torch.equal(net.forward_exits(x)[-1], whole)
    labels = torch.randint(3, (2, 8)) if plan.task == "lm" else torch.randint(3, (whole.shape[0],))
    before = weights(net)
    net.train()
    for _ in range(2):
        report = local_step(net, x, labels, sgds(net), SGRConfig(ramp=0))
    assert report.modules[-1].cosine is not None
    after = weights(net)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    still = {name for name, p in net.named_parameters() if p.requires_grad} - moved
    assert not {name for name in still if "bias" not in name and "pooler" not in name and "dist" not in name}
    assert list(model.state_dict()) == keys


def test_context_is_computed_once_and_masks_count():
    model, x = llama()
    net = split(model, x, 3).eval()
    padded = dict(x, attention_mask=torch.ones(2, 8).long())
    assert not torch.equal(net.forward_exits(x)[-1], net.forward_exits(padded)[-1])


def test_tied_embeddings_are_refused_with_two_remedies():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model, x = GPT2LMHeadModel(config), torch.randint(40, (2, 8))
    with pytest.raises(SharedParameterError, match=r"transformer.wte.weight .* lm_head.weight .*untie.*detach_tied"):
        build_chain(model, sample=x)
    model.eval()
    before = model(x).logits
    detach_tied(model)
    assert torch.equal(model(x).logits, before)
    net = split(model, x, 2)
    local_step(net, x, x, sgds(net))
    assert id(model.transformer.wte.weight) not in {id(p) for p in net.parameters_of(1)}
    assert id(model.transformer.wte.weight) in {id(p) for p in net.parameters_of(0)}
    copied = untie(GPT2LMHeadModel(config))
    assert copied.lm_head.weight is not copied.transformer.wte.weight


def test_cuts_are_where_one_tensor_crosses():
    model, x = residual()
    chain = build_chain(model, sample=x)
    assert chain.adapter == "segments"
    assert [block.name for block in chain.blocks] == ["first", "second"]  # between them comes the sum with ``inner``
    out, context = x, chain.context(x)
    for number in range(3):
        out = chain.run(number, number + 1, out, context)
    assert torch.equal(out, model(x))


def test_where_two_tensors_cross_it_says_so():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = x * self.first.weight.sum()
            return self.b(self.a(x)) + x

    with pytest.raises(
        UnsplittableModelError, match=r"best is after a, where 2 cross: (Mul|Addmm)Backward0, (Mul|Addmm)B"
    ):
        build_chain(Twice(), sample=torch.randn(4, 6))


def test_what_cannot_be_cut_is_said():
    class Loop(nn.Module):
        def forward(self, x):
            while x.sum() > 0:
                x = x - 1
            return x

    with pytest.raises(UnsplittableModelError, match="does not depend on its parameters"):
        build_chain(Loop(), sample=torch.randn(4, 6))
    with pytest.raises(UnsplittableModelError, match="no point where exactly one tensor crosses"):
        build_chain(nn.Bilinear(3, 3, 2), sample=(torch.randn(4, 3), torch.randn(4, 3)))
    with pytest.raises(UnsplittableModelError, match="1 parts with parameters"):
        build_chain(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
    with pytest.raises(UserError, match="did you mean sequential"):
        build_chain(mlp(), "sequentiall")
    with pytest.raises(UnsplittableModelError, match="adapter 'list' does not take a Sequential"):
        build_chain(mlp(), "list")
    with pytest.raises(UserError, match="needs a batch"):
        build_chain(Branching())


def test_lists_of_callables_are_models():
    x, y = vectors()
    torch.manual_seed(0)
    model = ListAdapter([nn.Linear(6, 12), torch.tanh, nn.Linear(12, 12), lambda x: x * 2, nn.Linear(12, 3)])
    net = split(model, x, 2)
    assert torch.equal(net.eval()(x), net.forward_exits(x)[-1])
    local_step(net.train(), x, y, sgds(net))


def test_adapters_of_users_come_first():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    @register_adapter("mine")
    def adapter(model):
        if not isinstance(model, Mine):
            return None
        blocks = [Block(f"l{i}", lambda x, c, m=m: m(x), (f"layers.{i}",)) for i, m in enumerate(model.layers)]
        return Chain(model, tuple(blocks[:2]), blocks[2], "mine")

    try:
        assert plan_split(Mine(), torch.randn(4, 6), k=2, measure=False).adapter == "mine"
    finally:
        del _ADAPTERS["mine"]


def test_a_chain_that_is_not_the_model_is_refused():
    @register_adapter("odd")
    def adapter(model):
        blocks = [Block(str(i), lambda x, c, m=m: m(x), (str(i),)) for i, m in enumerate(model)]
        blocks[0] = Block("0", lambda x, c: model[0](x) * 1.01, ("0",))
        return Chain(model, tuple(blocks[:-1]), blocks[-1], "odd")

    try:
        for scale in (1.0, 1e-9):  # tiny outputs say as much
            model = mlp()
            with torch.no_grad():
                model[-1].weight.mul_(scale), model[-1].bias.mul_(scale)
            with pytest.raises(UnsplittableModelError, match="do not give what the model gives in training mode"):
                plan_split(model, torch.randn(4, 6), k=2)
    finally:
        del _ADAPTERS["odd"]


def test_plans_of_other_models_are_refused():
    x, _ = vectors()
    plan = plan_split(mlp(), x, k=2, measure=False)
    with pytest.raises(
        PlanMismatchError, match=r"4 blocks, the model has 5; first difference at block 5: None in the plan"
    ):
        LocalNet(mlp(depth=5), plan)
    assert SplitPlan.from_json(plan.to_json()) == plan
    assert plan.difference(plan_split(mlp(), x, k=3, measure=False)).startswith("cuts")
    for text in ("{}", "[]", "no", plan.to_json().replace('"cuts"', '"cutz"')):
        with pytest.raises(UserError, match="not a split plan"):
            SplitPlan.from_json(text)


def test_heads_that_do_not_fit_are_named():
    x, _ = vectors()
    plan = plan_split(mlp(), x, k=3, measure=False)
    with pytest.raises(UserError, match=r"head conv_gap of module 1 does not fit: it needs \(B, C, H, W\).*\(B, 12\)"):
        LocalNet(mlp(), plan, HeadSpec(kind="conv_gap"))
    with pytest.raises(UserError, match="3 modules need 2 local heads .* got 1"):
        LocalNet(mlp(), plan, [HeadSpec()])
    with pytest.raises(UserError, match="'auto'"):
        LocalNet(mlp(), plan, "gap")
    own = LocalNet(mlp(), plan, [nn.Linear(12, 3), HeadSpec(kind="linear")])
    assert isinstance(own.heads[0], nn.Linear)


def test_early_exits_stop_where_a_head_is_sure():
    x, y = vectors(64)
    net = split(mlp(), x, 3)
    optimizers = sgds(net)
    for _ in range(30):
        local_step(net, x, y, optimizers, SGRConfig(lam=0))
    net.eval()
    logits, exits = EarlyExit(net, 0.6)(x)
    all_exits = net.forward_exits(x)
    for i in range(64):
        sure = [k for k in range(3) if float(all_exits[k][i].softmax(0).max()) >= 0.6]
        wanted = sure[0] if sure else 2
        assert int(exits[i]) == wanted
        torch.testing.assert_close(logits[i], all_exits[wanted][i], rtol=1e-5, atol=1e-6)
    assert len(set(exits.tolist())) > 1
    with pytest.raises(UserError, match="threshold"):
        EarlyExit(net, 0)


def test_state_dicts_hold_every_tensor_once():
    x, _ = images()
    net = split(convs(), x, 2)
    assert sum(name.startswith("model.") for name in net.state_dict()) == len(net.model.state_dict())
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    assert same(weights(net), weights(twin))
