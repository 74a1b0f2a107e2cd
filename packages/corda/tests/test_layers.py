"""Layers that are no ``nn.Linear`` in floating point: transformers' Conv1D, and quantized ones, real and simulated."""

import copy
import inspect

import pytest
import torch
from corda import (
    CordaInit,
    apply_anchor,
    apply_corda,
    build_factors,
    collect_context,
    get_corda_model,
    load_anchor,
    preprocess_corda,
    to_lora,
    truncate_model,
    verify_init,
)
from corda.adapters import lora_layers
from corda.factors import output_energies
from corda.spectra import layer_spectra
from corda.targets import UnsupportedLayerError, linear_targets, resolve_targets, weight_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from tenfold import UserError


def logits(model, batches):
    with torch.no_grad():
        return model.eval()(**batches[0]).logits


def train(wrapped, batches, steps=3):
    wrapped.eval()
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        ids = batches[step % len(batches)]["input_ids"]
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return wrapped.eval()


def replaced(model, kind, make):
    """A copy of the model with ``make(layer)`` for each layer of a kind, but the head."""
    model = copy.deepcopy(model)
    for path, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, kind) and path:
                setattr(owner, name, make(child))
    return model


# Conv1D


def untransposed(layer):
    plain = nn.Linear(*layer.weight.shape)
    plain.load_state_dict({"weight": layer.weight.detach().T, "bias": layer.bias.detach()})
    return plain


@pytest.fixture
def gpt():
    """A tiny GPT-2, whose head is tied to the embedding and all of whose other linear layers are Conv1D."""
    torch.manual_seed(0)
    size = {"vocab_size": 128, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


@pytest.fixture
def twin(gpt):
    """The same model of ``nn.Linear``."""
    return replaced(gpt, Conv1D, untransposed)


CONV1D = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc", "mlp.c_proj"], fan_in_fan_out=True)
PLAIN = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc", "mlp.c_proj"])


def test_default_targets_hold_conv1d_and_no_tied_head(gpt, twin, llama):
    names = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert linear_targets(gpt) == linear_targets(twin) == names
    llama.model.layers[0].self_attn.k_proj.weight = llama.model.layers[0].self_attn.v_proj.weight
    tied = {f"model.layers.0.self_attn.{x}_proj" for x in "kv"}
    assert len(linear_targets(llama)) == 12
    assert not tied & set(linear_targets(llama))


def test_conv1d_equals_the_transposed_linear_layer(gpt, twin, batches):
    """Statistics, factors, energies, spectra and the residual model, up to the rounding of the forward."""
    gpt, twin = gpt.double(), twin.double()
    names, init = linear_targets(gpt), CordaInit(mode="ipm")
    stats, other = collect_context(gpt, batches), collect_context(twin, batches)
    assert resolve_targets(gpt, CONV1D) == resolve_targets(twin, PLAIN)
    for name in names:
        torch.testing.assert_close(stats.covariance(name), other.covariance(name), rtol=1e-10, atol=1e-12)
        assert torch.equal(weight_of(gpt, name), twin.get_submodule(name).weight)
    ours, theirs = build_factors(gpt, stats, CONV1D, init), build_factors(twin, other, PLAIN, init)
    for name, found in ours.factors.items():
        torch.testing.assert_close(found.B @ found.A, theirs.factors[name].B @ theirs.factors[name].A)
        assert ours.layers[name].shape == theirs.layers[name].shape
    assert output_energies(gpt, stats, ours) == pytest.approx(output_energies(twin, other, theirs), rel=1e-6)
    spectra, expected = layer_spectra(gpt, stats, CONV1D), layer_spectra(twin, other, PLAIN)
    assert spectra.shapes == expected.shapes
    for name in spectra.spectra:
        torch.testing.assert_close(spectra.spectra[name], expected.spectra[name], rtol=1e-8, atol=1e-12)
    base = copy.deepcopy(gpt)
    residual, linear_one = apply_corda(gpt, ours, CONV1D), apply_corda(twin, theirs, PLAIN)
    for name, layer in lora_layers(residual).items():
        W = lora_layers(linear_one)[name].get_base_layer().weight
        torch.testing.assert_close(layer.get_base_layer().weight.T, W, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logits(residual, batches), logits(base, batches), rtol=0, atol=1e-12)
    assert verify_init(base, residual, batches[0]).wrong == []


@pytest.mark.parametrize("attach", [apply_corda, apply_anchor])
def test_conv1d_is_trained_merged_and_converted(gpt, batches, tmp_path, attach):
    """Square layers included, where a forgotten transposition goes unnoticed by shapes."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "attn.c_proj", "c_fc"], fan_in_fan_out=True)
    base = copy.deepcopy(gpt)
    factors = build_factors(gpt, collect_context(gpt, batches), config)
    wrapped = attach(gpt, factors, config)
    report = verify_init(base, wrapped, batches[0])
    assert report.wrong == []
    assert report.max_difference < (1e-6 if attach is apply_corda else 1e-300)
    start = {name: weight_of(wrapped, f"base_model.model.{name}.base_layer").clone() for name in factors.factors}
    trained = logits(train(wrapped, batches), batches)
    assert (trained - logits(base, batches)).abs().max() > 1e-2
    to_lora(wrapped, factors, tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(plain, batches), trained, rtol=0, atol=1e-5)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped, batches), trained, rtol=0, atol=1e-5)
    wrapped.unmerge_adapter()
    for name, W in start.items():
        torch.testing.assert_close(
            weight_of(wrapped, f"base_model.model.{name}.base_layer"), W, rtol=0, atol=4e-7 * W.abs().max().item()
        )
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(logits(merged, batches), trained, rtol=0, atol=1e-5)


def test_conv1d_is_truncated(gpt, twin, batches):
    """Nothing dropped changes no bit."""
    stats, other = collect_context(gpt, batches), collect_context(twin, batches)
    name = "transformer.h.0.mlp.c_fc"
    before = gpt.get_submodule(name).weight.detach().clone()
    truncate_model(gpt, stats, 0, targets=[name])
    assert torch.equal(gpt.get_submodule(name).weight, before)
    for model, calibrated in ((gpt, stats), (twin, other)):
        truncate_model(model, calibrated, 9, targets=[name])
    W = twin.get_submodule(name).weight.detach()
    assert torch.linalg.matrix_rank(W) == 7
    torch.testing.assert_close(gpt.get_submodule(name).weight.detach().T, W, rtol=0, atol=1e-6)


def test_pefts_own_start_takes_the_eigens_of_conv1d(gpt, batches):
    """A peft whose ``corda_init`` knows no Conv1D is refused."""
    base = copy.deepcopy(gpt)
    config = copy.deepcopy(CONV1D)
    config.init_lora_weights, config.corda_config = "corda", CordaConfig(corda_method="ipm")
    if "Conv1D" not in inspect.getsource(LoraLayer.corda_init):
        with pytest.raises(UserError, match=r"c_attn is a Conv1D, which peft 0\.1\d\.\d cannot start"):
            preprocess_corda(gpt, config, run_model=lambda: [gpt(**batch) for batch in batches])
        return
    preprocess_corda(gpt, config, run_model=lambda: [gpt(**batch) for batch in batches])
    ours = build_factors(base, collect_context(base, batches), CONV1D, CordaInit(mode="ipm"))
    wrapped = get_peft_model(gpt, config)
    for name, layer in lora_layers(wrapped).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = ours.factors[name].B @ ours.factors[name].A
        assert (B @ A - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(logits(wrapped, batches), logits(base, batches), rtol=0, atol=1e-5)


# Quantized layers


def int8(weight):
    scale = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


class Packed(nn.Module):
    """As HQQ's layers: no ``nn.Linear``, no parameter, and a method that gives the weight."""

    def __init__(self, plain):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        values, scale = int8(plain.weight)
        self.register_buffer("W_q", values.T.contiguous())  # one of the names under which peft looks for the device
        self.register_buffer("scale", scale)

    def __deepcopy__(self, memo):
        raise AssertionError("a quantized layer's memory was copied")

    def dequantize(self):
        return self.W_q.T * self.scale

    def forward(self, x):
        return F.linear(x, self.dequantize().to(x.dtype))


class Int8Tensor(Tensor):
    """As torchao's tensors: a floating-point dtype outside, and hardly any operation."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values_and_scale = values, scale

    def dequantize(self):
        values, scale = self.values_and_scale
        return values * scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize().to(x.dtype), *bias)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(*args[0].values_and_scale)
        raise NotImplementedError(function)


def of_tensor(plain):
    layer = nn.Linear(plain.in_features, plain.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(Int8Tensor(*int8(plain.weight)), requires_grad=False)
    return layer


class Scaled(nn.Linear):
    """As transformers' fp8 layers: floats of one byte that are nothing without a scale, which only the layer knows."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        scale = plain.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((plain.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def bitsandbytes4(plain):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.46")
    layer = bnb.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict(plain.state_dict())
    return layer.requires_grad_(False).to("cpu")


def bitsandbytes8(plain):
    bnb = pytest.importorskip("bitsandbytes", minversion="0.46")
    layer = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    return layer.requires_grad_(False).to("cpu")


def torchao8(plain):
    quantization = pytest.importorskip("torchao.quantization")
    held = nn.Sequential(copy.deepcopy(plain))
    quantization.quantize_(held, quantization.Int8WeightOnlyConfig())
    return held[0]


KINDS = [Packed, of_tensor, bitsandbytes4, bitsandbytes8, torchao8]
QUANTIZED = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "down_proj"])


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_a_quantised_model_are_those_of_its_dequantised_weights(llama, batches, kind):
    quantized = replaced(llama, nn.Linear, kind)
    names = linear_targets(quantized)
    assert names == linear_targets(llama)
    assert "lm_head" not in names
    before = logits(quantized, batches)
    stats = collect_context(quantized, batches)
    factors = build_factors(quantized, stats, QUANTIZED, CordaInit(mode="ipm"))
    assert torch.equal(logits(quantized, batches), before)
    twin = copy.deepcopy(llama)
    for name in names:
        W = weight_of(quantized, name)
        assert 0 < (W - weight_of(llama, name)).norm() < 0.15 * W.norm()
        twin.get_submodule(name).weight = nn.Parameter(W.float().clone())
    theirs = build_factors(twin, collect_context(twin, batches), QUANTIZED, CordaInit(mode="ipm"))
    for name, found in factors.factors.items():  # 8-bit kernels of bitsandbytes round activations too
        expected = theirs.factors[name].B @ theirs.factors[name].A
        assert (found.B @ found.A - expected).norm() <= 0.05 * expected.norm()
    energies = output_energies(quantized, stats, factors)
    assert energies == pytest.approx(output_energies(twin, stats, factors), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_starts_bit_for_bit_and_ends_as_a_plain_lora(llama, batches, tmp_path, kind):
    """On the quantized base itself."""

    def base():
        return replaced(llama, nn.Linear, kind)

    start = logits(base(), batches)
    wrapped = get_corda_model(base(), QUANTIZED, batches, CordaInit(mode="ipm"), attach="anchor")
    assert torch.equal(logits(wrapped, batches), start)
    assert verify_init(base(), wrapped, batches[0]).wrong == []
    trained = logits(train(wrapped, batches), batches)
    assert (trained - start).abs().max() > 1e-2
    wrapped.save_pretrained(tmp_path / "anchored")
    assert torch.equal(logits(load_anchor(base(), tmp_path / "anchored"), batches), trained)
    to_lora(wrapped, None, tmp_path / "plain")
    if kind is not Packed:  # which plain peft does not know
        plain = PeftModel.from_pretrained(base(), tmp_path / "plain")
        torch.testing.assert_close(logits(plain, batches), trained, rtol=0, atol=1e-5)
    with pytest.raises(UnsupportedLayerError, match="cannot merge into the quantized weight"):
        wrapped.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_weight_takes_no_residual(llama, batches, kind):
    """A TypeError that suggests the anchor, and before the calibration, which is the long part."""

    def data():
        raise AssertionError("calibrated for nothing")

    quantized = replaced(llama, nn.Linear, kind)
    with pytest.raises(
        TypeError, match=r"layers\.0\.self_attn\.q_proj is a \w+ whose weight is quantized.*apply_anchor"
    ):
        get_corda_model(quantized, QUANTIZED, data)
    factors = build_factors(llama, collect_context(llama, batches), QUANTIZED)
    with pytest.raises(TypeError, match="apply_anchor"):
        apply_corda(quantized, factors, QUANTIZED)
    with pytest.raises(TypeError, match="quantized"):
        truncate_model(quantized, None, 2, method="svd", targets=list(factors.targets))
    config = copy.deepcopy(QUANTIZED)
    config.init_lora_weights, config.corda_config = "corda", CordaConfig()
    with pytest.raises(TypeError, match="quantized"):
        preprocess_corda(quantized, config, run_model=data)
    assert not any("lora" in name for name, _ in quantized.named_modules())


def test_a_weight_that_only_its_layer_can_read_takes_factors_of_the_unquantised_model(llama, batches):
    quantized = replaced(llama, nn.Linear, Scaled)
    start = logits(quantized, batches)
    stats = collect_context(quantized, batches)
    assert stats.targets == linear_targets(llama)
    with pytest.raises(TypeError, match="q_proj is a Scaled whose weight cannot be dequantized; build the factors on"):
        build_factors(quantized, stats, QUANTIZED)
    factors = build_factors(llama, collect_context(llama, batches), QUANTIZED)
    base = copy.deepcopy(quantized)
    wrapped = apply_anchor(quantized, factors, QUANTIZED)
    assert torch.equal(logits(wrapped, batches), start)
    assert verify_init(base, wrapped, batches[0]).layers == {}
    with pytest.raises(TypeError, match="cannot merge"):
        wrapped.merge_and_unload()


def test_what_is_no_linear_layer_is_refused(llama, batches):
    for name, kind in (("model.embed_tokens", "Embedding"), ("model.layers.0.mlp", "LlamaMLP")):
        with pytest.raises(TypeError, match=f"layer {name} is a {kind}; expected nn.Linear, Conv1D or a quantized"):
            collect_context(llama, batches, [name])
    with pytest.raises(UserError, match=r"no layer model\.layers\.0\.mlp\.up_proj2 in the model"):
        collect_context(llama, batches, ["model.layers.0.mlp.up_proj2"])
