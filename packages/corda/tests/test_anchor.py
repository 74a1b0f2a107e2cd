import copy
import re

import pytest
import torch
from corda import CordaInit, FactorSet, apply_anchor, apply_corda, build_factors, collect_context, load_anchor
from corda.adapters import lora_layers
from corda.anchor import AnchoredLinear
from corda.targets import resolve_targets
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tenfold import UserError


def configuration(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes})


def factors_of(model, batches, config, mode="ipm"):
    stats = collect_context(model, batches, list(resolve_targets(model, config)))
    return build_factors(model, stats, config, CordaInit(mode=mode))


def logits(model, batches):
    with torch.no_grad():
        return model.eval()(**batches[0]).logits


def sgd(wrapped, batches, steps=3, lr=10.0):
    wrapped.eval()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        ids = batches[step % len(batches)]["input_ids"]
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return wrapped


def parts(layer):
    return layer.lora_A["default"], layer.lora_B["default"]


class Int8Linear(nn.Linear):
    """As quantized layers are: int8 values and a scale a row, made floating point only in the forward pass."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        scale = plain.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = plain.bias
        self.register_buffer("scale", scale)

    def dequantized(self):
        return self.weight * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """As those of GPTQ: no ``nn.Linear``, no parameter, no weight of that name."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        inner = Int8Linear(plain)
        self.register_buffer("qweight", inner.weight.detach().T.contiguous())
        self.register_buffer("scale", inner.scale)

    def dequantized(self):
        return self.qweight.T * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantized().to(x.dtype))


def quantized(model, kind):
    model = copy.deepcopy(model)
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, kind(child))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_anchored_model_starts_at_the_base_bit_for_bit(llama, batches, dtype, mode):
    """And no weight of the base has changed."""
    llama = llama.to(dtype)
    base = copy.deepcopy(llama)
    config = configuration(target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = apply_anchor(llama, factors_of(llama, batches, config, mode=mode), config)
    assert torch.equal(logits(wrapped, batches), logits(base, batches))
    for name, layer in lora_layers(wrapped).items():
        assert torch.equal(layer.get_base_layer().weight, base.get_submodule(name).weight)
        assert layer.lora_A["default"].anchor.norm() > 0


@pytest.mark.parametrize("change", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}, "lora_alpha": 2}])
def test_gradients_and_steps_are_those_of_the_residual_mode(llama, batches, change):
    """Gradients of D_A, D_B equal those of A, B; after 3 SGD steps the effective weights agree to 1e-6."""
    base = copy.deepcopy(llama)
    config = configuration(**change)
    factors = factors_of(llama, batches, config)
    anchored, residual = apply_anchor(copy.deepcopy(base), factors, config), apply_corda(llama, factors, config)
    for wrapped in (anchored, residual):
        sgd(wrapped, batches, steps=1, lr=0.0)
    for ours, theirs in zip(lora_layers(anchored).values(), lora_layers(residual).values(), strict=True):
        for a, b in zip(parts(ours), parts(theirs), strict=True):
            torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-4, atol=1e-7)
    for wrapped in (anchored, residual):
        sgd(wrapped, batches)
    names = list(lora_layers(anchored))
    ours, theirs = anchored.merge_and_unload(), residual.merge_and_unload()
    for name in names:
        trained, start = (model.get_submodule(name).weight for model in (ours, base))
        assert (trained - start).abs().max() > 1e-4
        torch.testing.assert_close(trained, theirs.get_submodule(name).weight, rtol=0, atol=1e-6)


def test_gradients_at_the_start():
    """D(loss)/d(D_A) = s B0^T G x^T and d(loss)/d(D_B) = s G x^T A0^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6)).double()
    x = torch.randn(20, 9, dtype=torch.float64)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    factors = build_factors(model, collect_context(model, [x], ["0"]), config)
    wrapped = apply_anchor(model, factors, config)
    wrapped(x).pow(2).sum().backward()
    G = (2 * wrapped(x)).T.detach()
    A, B = parts(lora_layers(wrapped)["0"])
    start = factors.factors["0"]
    torch.testing.assert_close(A.weight.grad, 2.0 * start.B.T @ G @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(B.weight.grad, 2.0 * G @ x @ start.A.T, rtol=1e-10, atol=1e-10)


def test_the_layer_computes_its_formula_and_merges_into_it(llama, batches):
    """y = W x + s [ B0 (D_A x) + D_B ((A0 + D_A) x) ], and merged W + s (B A - B0 A0), in fp64."""
    llama = llama.double()
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = sgd(apply_anchor(llama, factors, config), batches)
    expected = {}
    for name, layer in lora_layers(wrapped).items():
        D_A, D_B = (part.weight.detach() for part in parts(layer))
        A0, B0 = factors.factors[name].A, factors.factors[name].B
        W = base.get_submodule(name).weight.detach()
        x = torch.randn(5, W.shape[1], dtype=torch.float64)
        literal = [W @ v + 2.0 * (B0 @ (D_A @ v) + D_B @ ((A0 + D_A) @ v)) for v in x]
        torch.testing.assert_close(layer(x), torch.stack(literal), rtol=0, atol=1e-12)
        expected[name] = W + 2.0 * ((B0 + D_B) @ (A0 + D_A) - B0 @ A0)
    trained = logits(wrapped, batches)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped, batches), trained, rtol=0, atol=1e-12)
    wrapped.unmerge_adapter()
    for name, layer in lora_layers(wrapped).items():
        torch.testing.assert_close(layer.get_base_layer().weight, base.get_submodule(name).weight, rtol=0, atol=1e-15)
    merged = wrapped.merge_and_unload()
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(merged, batches), trained, rtol=0, atol=1e-12)


def test_peft_mixes_no_anchored_adapter(llama, batches):
    """``add_weighted_adapter`` would take D_A and D_B for A and B."""
    config = configuration()
    wrapped = sgd(apply_anchor(llama, factors_of(llama, batches, config), config), batches)
    trained = logits(wrapped, batches)
    for kind in ("svd", "cat", "linear"):
        with pytest.raises(UserError, match="cannot be mixed .* convert it by to_lora first"):
            wrapped.add_weighted_adapter(["default"], [1.0], kind, combination_type=kind)
        wrapped.delete_adapter(kind)
    assert torch.equal(logits(wrapped, batches), trained)


def test_only_the_differences_are_trained(llama, batches):
    config = configuration()
    wrapped = apply_anchor(llama, factors_of(llama, batches, config), config)
    trainable = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    layers = lora_layers(wrapped)
    assert trainable == {f"base_model.model.{name}.lora_{x}.default.weight" for name in layers for x in "AB"}
    starts = {name: [part.anchor.clone() for part in parts(layer)] for name, layer in layers.items()}
    sgd(wrapped, batches)
    for name, layer in layers.items():
        assert all(torch.equal(part.anchor, start) for part, start in zip(parts(layer), starts[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_peft_and_loaded_again_it_is_the_same_model_and_trains_on(llama, batches, tmp_path, dtype):
    llama = llama.to(dtype)
    base = copy.deepcopy(llama)
    config = configuration()
    wrapped = sgd(apply_anchor(llama, factors_of(llama, batches, config), config), batches)
    wrapped.save_pretrained(tmp_path)
    loaded = load_anchor(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(loaded, batches), logits(wrapped, batches))
    assert torch.equal(logits(sgd(loaded, batches), batches), logits(sgd(wrapped, batches), batches))
    assert not any(p.requires_grad for p in load_anchor(copy.deepcopy(base), tmp_path).parameters())
    with pytest.raises(ValueError, match="anchored_corda"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_a_head_that_is_trained_beside_it_is_saved_and_loaded_too(llama, batches, tmp_path):
    base = copy.deepcopy(llama)
    config = configuration(modules_to_save=["lm_head"])
    wrapped = sgd(apply_anchor(llama, factors_of(llama, batches, config), config), batches, lr=0.1)
    assert not torch.equal(wrapped.get_output_embeddings().weight, base.lm_head.weight)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(load_anchor(base, tmp_path), batches), logits(wrapped, batches))


def test_peft_resumes_a_checkpoint_into_the_live_model(llama, batches, tmp_path):
    """As transformers' Trainer does: ``load_adapter`` under the name that exists."""
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = sgd(apply_anchor(llama, factors, config), batches)
    wrapped.save_pretrained(tmp_path)
    fresh = apply_anchor(base, factors, config)
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(fresh, batches), logits(wrapped, batches))


def test_a_plain_adapter_may_join_and_the_anchored_one_may_be_switched_off(llama, batches):
    base = copy.deepcopy(llama)
    config = configuration()
    wrapped = sgd(apply_anchor(llama, factors_of(llama, batches, config), config), batches)
    trained = logits(wrapped, batches)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, batches), logits(base, batches))
    wrapped.add_adapter("plain", configuration(r=2))
    wrapped.set_adapter("plain")
    assert torch.equal(logits(wrapped, batches), logits(base, batches))
    plain = lora_layers(wrapped)["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        plain.lora_B["plain"].weight.normal_()
    delta = plain.scaling["plain"] * plain.lora_B["plain"].weight @ plain.lora_A["plain"].weight
    torch.testing.assert_close(plain.get_delta_weight("plain"), delta)
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped, batches), trained)


def test_adapters_mix_in_a_batch(llama, batches):
    """peft's ``adapter_names``: each row through its own adapter."""
    base = copy.deepcopy(llama)
    config = configuration()
    wrapped = sgd(apply_anchor(llama, factors_of(llama, batches, config), config), batches)
    with torch.no_grad():
        mixed = wrapped(**batches[0], adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed[0], logits(base, batches)[0])
    torch.testing.assert_close(mixed[1], logits(wrapped, batches)[1])


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear])
def test_a_quantised_base_starts_bit_for_bit_and_trains(llama, batches, kind):
    """Int8 weights stay as they are; only the merge is refused."""
    config = configuration()
    factors = factors_of(llama, batches, config)
    base = quantized(llama, kind)
    wrapped = apply_anchor(copy.deepcopy(base), factors, config)
    assert torch.equal(logits(wrapped, batches), logits(base, batches))
    sgd(wrapped, batches)
    for name, layer in lora_layers(wrapped).items():
        stored = layer.get_base_layer().state_dict()
        assert any(value.dtype == torch.int8 for value in stored.values())
        assert all(torch.equal(stored[key], value) for key, value in base.get_submodule(name).state_dict().items())
        D_A, D_B = (part.weight.detach() for part in parts(layer))
        A0, B0 = factors.factors[name].A, factors.factors[name].B
        W = base.get_submodule(name).dequantized() + 2.0 * ((B0 + D_B) @ (A0 + D_A) - B0 @ A0)
        x = torch.randn(5, W.shape[1])
        torch.testing.assert_close(layer(x), x @ W.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match=f"cannot merge into the quantized weight of a {kind.__name__}"):
        wrapped.merge_and_unload()


def test_transposed_layers_of_gpt2(batches):
    """Conv1D stores W^T; factors of the same weights in an ``nn.Linear`` serve it."""
    torch.manual_seed(0)
    size = {"vocab_size": 128, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    gpt = GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    base = copy.deepcopy(gpt)
    plain = copy.deepcopy(gpt)
    name, config = "transformer.h.0.mlp.c_fc", LoraConfig(r=3, lora_alpha=6, target_modules=["mlp.c_fc"])
    stored = gpt.get_submodule(name)
    assert isinstance(stored, Conv1D)
    linear = nn.Linear(16, 64)
    linear.load_state_dict({"weight": stored.weight.T, "bias": stored.bias})
    plain.get_submodule("transformer.h.0.mlp").c_fc = linear
    wrapped = apply_anchor(gpt, factors_of(plain, batches, config), config)
    assert torch.equal(logits(wrapped, batches), logits(base, batches))
    trained = logits(sgd(wrapped, batches), batches)
    assert (trained - logits(base, batches)).abs().max() > 1e-3
    torch.testing.assert_close(logits(wrapped.merge_and_unload(), batches), trained, rtol=1e-5, atol=1e-5)


def test_bad_models_and_configurations(llama, batches, tmp_path):
    config = configuration()
    factors = factors_of(llama, batches, config)
    with pytest.raises(UserError, match="other layers or ranks"):
        apply_anchor(llama, factors, configuration(r=2))
    for option in ("use_dora", "lora_bias"):
        with pytest.raises(UserError, match=f"cannot be combined with {option}"):
            apply_anchor(llama, factors, configuration(**{option: True}))
    other = copy.deepcopy(llama)
    other.model.layers[1].mlp.down_proj = nn.Linear(40, 32)
    with pytest.raises(UserError, match=r"layer model\.layers\.1\.mlp\.down_proj has another shape"):
        apply_anchor(other, factors, config)
    embedding = copy.deepcopy(llama)
    embedding.model.layers[1].mlp.down_proj = nn.Embedding(48, 32)
    with pytest.raises(TypeError, match="down_proj is a Embedding; expected nn.Linear"):
        apply_anchor(embedding, factors, config)
    with pytest.raises(UserError, match="no adapter_config.json in"):
        load_anchor(llama, tmp_path)
    assert not any(isinstance(module, AnchoredLinear) for module in llama.modules())
    base = copy.deepcopy(llama)
    wrapped = apply_anchor(llama, factors, config)
    with pytest.raises(UserError, match="has an adapter already"):
        apply_anchor(wrapped, factors, config)
    wrapped.save_pretrained(tmp_path / "anchored")
    with pytest.raises(UserError, match=r"another model: layer model\.layers\.1\.mlp\.down_proj"):
        load_anchor(other, tmp_path / "anchored")
    apply_corda(base, factors, config).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="holds no anchored adapter"):
        load_anchor(other, tmp_path / "plain")


def test_damaged_and_foreign_files_are_named(llama, batches, tmp_path):
    base, config = copy.deepcopy(llama), configuration(modules_to_save=["lm_head"])
    wrapped = apply_anchor(llama, factors_of(llama, batches, config), config)
    wrapped.save_pretrained(tmp_path)
    tensors, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, as_saved = load_file(tensors), settings.read_text()
    name = "base_model.model.model.layers.0.mlp.down_proj"
    cut = {key: value for key, value in whole.items() if key != f"{name}.lora_B.anchor"}
    headless = {key: value for key, value in whole.items() if "lm_head" not in key}
    other_head = {**whole, "base_model.model.lm_head.weight": torch.zeros(7, 32)}
    before = tensors.read_bytes()
    for content, message in (
        (before[:1000], r"adapter_model\.safetensors is damaged or no safetensors file"),
        (b"PK\x03\x04 a torch file", r"adapter_model\.safetensors is damaged or no safetensors file"),
        (save(cut), r"lacks lora_B\.anchor of layer model\.layers\.0\.mlp\.down_proj"),
        (save({"weight": torch.zeros(2)}), "no layer of the model is targeted|its layers differ"),
        (save(headless), "does not fit the model"),
        (save(other_head), "does not fit the model"),
    ):
        tensors.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_anchor(copy.deepcopy(base), tmp_path)
    tensors.write_bytes(before)
    for text, message in (
        ("{", r"adapter_config\.json is no configuration of peft"),
        ('{"peft_type": "IA3"}', "holds no anchored adapter"),
        (
            re.sub("anchored_corda[:0-9a-f]*", "corda", as_saved),
            r"belongs to the residual model.*init_lora_weights is true",
        ),
    ):
        settings.write_text(text)
        with pytest.raises(UserError, match=message):
            load_anchor(base, tmp_path)


def test_factor_sets_are_left_alone(llama, batches):
    config = configuration()
    factors: FactorSet = factors_of(llama, batches, config)
    before = {name: found.A.clone() for name, found in factors.factors.items()}
    sgd(apply_anchor(llama, factors, config), batches)
    assert all(torch.equal(found.A, before[name]) for name, found in factors.factors.items())
    assert config.init_lora_weights is True
