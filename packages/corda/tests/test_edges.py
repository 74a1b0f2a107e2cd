"""Models and factors as they are in the wild: what belongs together, what cannot be copied, what is stored in few bits."""

import contextlib
import copy
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from corda import (
    CordaInit,
    FactorSet,
    apply_anchor,
    apply_corda,
    build_factors,
    collect_context,
    convert_adapter,
    factorize,
    get_corda_model,
    load_anchor,
    preprocess_corda,
    save_initial,
    stream_factors,
    to_lora,
    truncate_model,
)
from corda.adapters import lora_layers, read_folder
from corda.cli import main
from corda.fingerprints import differences, fingerprint
from corda.targets import linear_targets, resolve_targets
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tenfold import UserError

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])


def logits(model, batches):
    with torch.no_grad():
        return model.eval()(**batches[0]).logits


def factors_of(model, batches, config=LORA, mode="ipm"):
    return build_factors(model, collect_context(model, batches), config, CordaInit(mode=mode))


# What belongs together


@pytest.mark.parametrize("attach", [apply_corda, apply_anchor])
def test_factors_of_another_model_are_refused_and_the_message_says_in_what_they_differ(
    llama, batches, attach, tmp_path
):
    """After apply_corda and unload, the weights are the residual ones: attached again, the start would be another model."""
    factors = factors_of(llama, batches)
    factors.save(tmp_path / "factors.safetensors")
    residual = apply_corda(copy.deepcopy(llama), factors, LORA).unload()
    with pytest.raises(UserError, match=r"factors were made for another model \(values differ\)"):
        attach(residual, FactorSet.load(tmp_path / "factors.safetensors"), LORA)
    halved = copy.deepcopy(llama).bfloat16()
    with pytest.raises(UserError, match=r"another model \(dtype and values differ\)"):
        attach(halved, factors, LORA)
    attach(copy.deepcopy(llama).double(), factors, LORA)  # the same numbers, held in more bits
    data_free = build_factors(llama, None, LORA, CordaInit(power=0))
    with pytest.raises(UserError, match="another model"):
        attach(residual, data_free, LORA)


def test_an_anchored_adapter_knows_its_model(llama, batches, tmp_path):
    apply_anchor(copy.deepcopy(llama), factors_of(llama, batches), LORA).save_pretrained(tmp_path)
    load_anchor(copy.deepcopy(llama), tmp_path)
    with torch.no_grad():
        llama.model.norm.weight += 1
    with pytest.raises(UserError, match=r"adapter in .* was made for another model \(values differ\)"):
        load_anchor(llama, tmp_path)


def test_fingerprints_tell_names_shapes_dtypes_and_values_apart(llama):
    own = fingerprint(llama)
    assert differences(own, fingerprint(copy.deepcopy(llama))) == []
    other = copy.deepcopy(llama)
    other.model.layers[0].mlp.up_proj = nn.Linear(32, 50, bias=False)
    assert differences(own, fingerprint(other)) == ["shapes", "values"]
    other.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    assert differences(own, fingerprint(other)) == ["names", "shapes", "values"]
    assert differences(own, fingerprint(copy.deepcopy(llama).double())) == []


def test_factors_on_their_own_say_their_model(llama, batches, tmp_path, capsys):
    factors_of(llama, batches).save(tmp_path / "corda_start.safetensors")
    for path in (tmp_path, tmp_path / "corda_start.safetensors"):
        assert main(["inspect", "--run", str(path)]) == 0
        shown = capsys.readouterr().out
        assert f"model not recorded ({fingerprint(llama)[:12]})" in shown
        assert "model.layers.1.mlp.up_proj" in shown


# One function of the same numbers


@pytest.mark.parametrize("attach", ["residual", "anchor"])
def test_an_adapter_that_was_cast_to_bf16_converts_to_the_same_by_both_ways_and_loses_nothing(
    llama, batches, tmp_path, attach
):
    """The change is far below what bf16 can say of A and B."""
    factors = factors_of(llama, batches)
    wrapped = (apply_corda if attach == "residual" else apply_anchor)(copy.deepcopy(llama), factors, LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(wrapped).values():
            for part in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                part += 1e-3 * part.abs().mean() * torch.randn(part.shape, generator=generator) + 1e-5
            layer.lora_A.to(torch.bfloat16)
            layer.lora_B.to(torch.bfloat16)
    expected = {}
    for name, layer in lora_layers(wrapped).items():
        A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
        A0, B0 = factors.factors[name].A.double(), factors.factors[name].B.double()
        if attach == "anchor":
            A0, B0 = (part["default"].anchor.double() for part in (layer.lora_A, layer.lora_B))
            A, B = A0 + A, B0 + B
        expected[name] = B @ A - B0 @ A0
    to_lora(wrapped, factors, tmp_path / "one")
    wrapped.save_pretrained(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", factors if attach == "residual" else None, tmp_path / "two")
    found = [read_folder(tmp_path / way)[1] for way in ("one", "two")]
    for name, change in expected.items():
        A, B = ([tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for tensors in found] for x in "AB")
        assert torch.equal(A[0], A[1])
        assert torch.equal(B[0], B[1])
        assert (B[0] @ A[0] - change).norm() <= 1e-4 * change.norm(), name


# What is stored in few bits


def low_rank(m, n, rank, dtype):
    generator = torch.Generator().manual_seed(m * n)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (m, n))
    return ((U * torch.logspace(1, 0, rank)) @ V.T).to(dtype)  # a product in fp32


def pruned(m, n, dtype):
    W = low_rank(m, n, min(m, n), dtype)
    if m >= n:
        W[:, :6] = 0  # inputs that nobody reads
    else:
        W[:6] = 0
    return W


def requantized(m, n, dtype):
    W = low_rank(m, n, min(m, n), torch.float32)
    scale = W.abs().max() / 7
    return ((W / scale).round() * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (64, 32), (32, 64)])
def test_directions_below_the_precision_of_the_stored_weight_are_null(m, n, dtype):
    """KPM adapts directions that W has, whatever rounding has left in the others; all of them where it has full rank."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 300, generator=generator) * torch.logspace(0, -1, n)[:, None]
    C = (X @ X.T).double()
    for W, rank in (
        (low_rank(m, n, 20, dtype), 20),
        (pruned(m, n, dtype), min(m, n) - 6),
        (requantized(m, n, dtype), min(m, n)),
        (low_rank(m, n, min(m, n), torch.float32).to(dtype), min(m, n)),
    ):
        found = factorize(W, C, 4, CordaInit(mode="kpm"))
        assert found.null == min(m, n) - rank
        lengths = (found.left.double().T @ W.double()).norm(dim=1)
        assert lengths.min() > 0.02 * torch.linalg.matrix_norm(W.double(), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_truncated_here_gets_live_adapters(llama, batches, dtype):
    llama = llama.to(dtype)
    truncate_model(llama, collect_context(llama, batches), 0.3)
    factors = factors_of(llama, batches, mode="kpm")
    for name, layer in factors.layers.items():
        assert layer.null >= int(0.3 * min(layer.shape)), name
        assert factors.factors[name].A.norm(dim=1).min() > 1e-3 * factors.factors[name].A.norm()


# Models as they are


class Stubborn(nn.Module):
    """What no deepcopy takes: a lock, a generator, and the plain tensor that an old weight norm keeps."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.generator = torch.Generator()
        self.stream = (number for number in range(3))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.normed = nn.utils.weight_norm(nn.Linear(6, 6))

    def forward(self, x):
        with self.lock:
            for layer in self.layers:
                x = layer(x)
            return self.normed(x)


@pytest.mark.parametrize("attach", ["residual", "anchor"])
def test_a_model_with_attributes_that_cannot_be_copied_is_adapted(attach):
    torch.manual_seed(0)
    model, x = Stubborn(), torch.randn(2, 5, 6)
    with torch.no_grad():
        before = model(x)
    config = LoraConfig(r=2, target_modules=["0", "1", "2"])
    wrapped = get_corda_model(model, config, [x], CordaInit(mode="ipm"), attach=attach)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), before)


def test_targets_are_resolved_in_time_that_grows_as_the_number_of_layers():
    """Counted, not timed: each module is looked at a bounded number of times."""

    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(2, 2, device="meta") for _ in range(depth))

    looks = []

    def count(depth):
        model, seen = Deep(depth), []
        original = nn.Module.named_modules

        def counted(self, *args, **kwargs):
            for found in original(self, *args, **kwargs):
                seen.append(1)
                yield found

        nn.Module.named_modules = counted
        try:
            targets = resolve_targets(model, LoraConfig(r=1, target_modules=r".*blocks\.\d+"))
            apply = CordaInit(power=0)
            assert len(targets) == depth
            assert apply.power == 0
        finally:
            nn.Module.named_modules = original
        looks.append(len(seen))

    count(50)
    count(100)
    assert looks[1] <= 2.2 * looks[0]


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_accelerate_keeps_elsewhere(llama, batches, tmp_path, where):
    """Statistics and factors are those of the model in memory; residual needs a weight that can be written to."""
    llama.eval()
    expected, start = factors_of(llama, batches), logits(llama, batches)

    def offloaded():
        model = copy.deepcopy(llama)
        if where == "cpu":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, str(tmp_path / "weights"), torch.device("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
        return model

    model = offloaded()
    assert fingerprint(model) == fingerprint(llama)
    for factors in (factors_of(model, batches), stream_factors(model, batches, LORA, CordaInit(mode="ipm"))):
        for name, found in factors.factors.items():
            torch.testing.assert_close(found.B @ found.A, expected.factors[name].B @ expected.factors[name].A)
    wrapped = apply_anchor(model, factors, LORA)
    assert torch.equal(logits(wrapped, batches), start)
    if where == "cpu":
        wrapped = apply_corda(offloaded(), factors, LORA)
        torch.testing.assert_close(logits(wrapped, batches), start, rtol=1e-4, atol=1e-5)
        by_hand = apply_corda(copy.deepcopy(llama), factors, LORA)
        layers, own = lora_layers(wrapped), lora_layers(by_hand)
        for name, layer in layers.items():
            base: nn.Module = layer.get_base_layer()
            assert torch.equal(base._hf_hook.weights_map["weight"], own[name].get_base_layer().weight)
    else:
        with pytest.raises(TypeError, match=r"q_proj is offloaded to disk.*apply_anchor"):
            apply_corda(offloaded(), factors, LORA)


def test_a_model_without_any_weights_says_so(llama):
    with pytest.raises(UserError, match="has no values: the model is on the meta device"):
        fingerprint(llama.to("meta"))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_inference_mode_changes_no_number(llama, batches, context):
    expected = collect_context(llama, batches)
    with context():
        found = collect_context(llama, batches)
        factors = build_factors(llama, found, LORA)
    assert all(torch.equal(found.covariance(name), expected.covariance(name)) for name in expected.targets)
    streamed = None
    with context():
        streamed = stream_factors(llama, batches, LORA)
    assert streamed.targets == factors.targets

    def run_model():
        with context():
            llama(**batches[0])

    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=CordaConfig())
    preprocess_corda(llama, config, run_model)


def test_a_configuration_for_inference_attaches(llama, batches):
    config = LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True)
    start = logits(llama, batches)
    wrapped = get_corda_model(copy.deepcopy(llama), config, batches, attach="anchor")
    assert torch.equal(logits(wrapped, batches), start)
    assert not any(parameter.requires_grad for parameter in wrapped.parameters())


def test_repeated_layers_are_refused(llama, batches):
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    with pytest.raises(UserError, match="layer_replication repeats layers"):
        get_corda_model(llama, config, batches)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.ones(1, 2), torch.ones(1, 2))], "batch 0 is a tuple: expected a dict.*name its parts"),
        (["a text"], "batch 0 is a text: expected a dict.*tokenize it first"),
        ("a text", "the calibration data are a text"),
        ([{"input_ids": [1, 2, 3]}], "batch 0, input_ids: expected a tensor, found a list"),
        ([3], "batch 0 is a int: expected a dict"),
    ],
)
def test_what_is_no_batch_is_refused_in_one_line(llama, data, message):
    with pytest.raises(UserError, match=message):
        collect_context(llama, data)
    with pytest.raises(UserError, match=message):
        stream_factors(llama, data, LORA)


def test_one_batch_is_taken_for_one_batch(llama, batches):
    expected = collect_context(llama, batches[:1])
    for data in (batches[0], batches[0]["input_ids"], [[batches[0]["input_ids"]]]):
        found = collect_context(llama, data)
        for name in found.targets:  # older transformers attend by another kernel where no cache is declined
            torch.testing.assert_close(found.covariance(name), expected.covariance(name), rtol=1e-5, atol=1e-6)


def test_rows_longer_than_the_models_positions_are_refused_or_warned_about(llama):
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    rows = {"input_ids": torch.randint(96, (1, 20))}
    with pytest.raises(UserError, match="rows of 20 tokens, but the model has 16 positions"):
        collect_context(gpt, [rows])
    llama.config.max_position_embeddings = 16
    with pytest.warns(UserWarning, match="rows of 20 tokens are longer than the model's 16 positions"):
        collect_context(llama, [rows])


class Older(nn.Module):
    """As a classifier of the lowest declared transformers: a configuration with ``use_cache``, a forward without."""

    def __init__(self):
        super().__init__()
        self.config = GPT2Config(use_cache=True)
        self.embed, self.layer = nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids))


def test_a_model_that_knows_no_cache_is_not_given_one():
    stats = collect_context(Older(), [{"input_ids": torch.randint(20, (2, 6)), "labels": torch.tensor([0, 1])}])
    assert stats.tokens == {"layer": 12}


# What people have reported of initializations in peft


def test_a_converted_adapter_serves_beside_others_on_one_untouched_base(llama, batches, tmp_path):
    """huggingface/peft issue 2270: PiSSA adapters that were converted one after another gave other results together."""
    expected = {}
    for mode, scale in (("ipm", 0.05), ("kpm", 0.1)):
        base = copy.deepcopy(llama)
        factors = factors_of(base, batches, mode=mode)
        wrapped = apply_corda(base, factors, LORA)
        torch.manual_seed(3)
        with torch.no_grad():
            for layer in lora_layers(wrapped).values():
                layer.lora_B["default"].weight += scale * torch.randn_like(layer.lora_B["default"].weight)
        expected[mode] = logits(wrapped, batches)
        to_lora(wrapped, factors, tmp_path / mode)
    served = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ipm", adapter_name="ipm")
    served.load_adapter(tmp_path / "kpm", adapter_name="kpm")
    for mode in ("kpm", "ipm", "kpm"):
        served.set_adapter(mode)
        torch.testing.assert_close(logits(served, batches), expected[mode], rtol=1e-4, atol=1e-5)
    with served.disable_adapter():
        torch.testing.assert_close(logits(served, batches), logits(llama, batches))


def test_the_initial_adapter_on_the_original_model_is_told_from_that_on_the_residual_one(llama, batches, tmp_path):
    """huggingface/peft issue 1929: an adapter with rsLoRA, saved and loaded on the wrong base without a word."""
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"])
    start = logits(llama, batches)
    wrapped = apply_corda(copy.deepcopy(llama), factors_of(llama, batches, config), config)
    save_initial(wrapped, tmp_path)
    residual = wrapped.unload()
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(residual, tmp_path), batches), start, rtol=1e-4, atol=1e-5
    )
    assert differences(fingerprint(llama), fingerprint(residual.unload() if hasattr(residual, "unload") else residual))


def test_with_the_adapter_disabled_an_anchored_model_is_the_original(llama, batches):
    """huggingface/peft pull request 1626: what the maintainers missed in an initialization that changes the base."""
    start = logits(llama, batches)
    wrapped = apply_anchor(copy.deepcopy(llama), factors_of(llama, batches), LORA)
    with torch.no_grad():
        for layer in lora_layers(wrapped).values():
            layer.lora_B["default"].weight += 0.1
    assert (logits(wrapped, batches) - start).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, batches), start)


def test_every_linear_target_of_a_model_can_be_named(llama):
    """What ``all-linear`` takes is what is calibrated by default."""
    names = resolve_targets(llama, LoraConfig(r=1, target_modules="all-linear"))
    assert list(names) == linear_targets(llama)
    with contextlib.suppress(UserError):
        resolve_targets(llama, LoraConfig(r=1, target_modules=["nothing"]))
        pytest.fail("no layer is targeted")
