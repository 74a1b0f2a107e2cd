import copy
import json

import pytest
import torch
from corda import (
    CordaInit,
    apply_anchor,
    apply_corda,
    build_factors,
    collect_context,
    convert_adapter,
    to_lora,
    verify_init,
)
from corda.adapters import lora_layers
from corda.targets import resolve_targets
from corda.verify import InitReport, LayerStart
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from tenfold import NonFiniteError, UserError

ATTACH = {"residual": apply_corda, "anchor": apply_anchor}
CONFIGURATIONS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 3}},
    {"rank_pattern": {"down_proj": 6}, "use_rslora": True},
]


def configuration(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **changes})


def factors_of(model, batches, config):
    stats = collect_context(model, batches, list(resolve_targets(model, config)))
    return build_factors(model, stats, config, CordaInit(mode="ipm"))


def train(wrapped, batches, steps=3):
    wrapped.eval()
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        ids = batches[step % len(batches)]["input_ids"]
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return wrapped


def logits(model, batches):
    with torch.no_grad():
        return model.eval()(**batches[0]).logits


def loaded(base, folder):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


def changes(wrapped, factors):
    """s (B A - B0 A0) of each layer, literally, in fp64."""
    found = {}
    for name, layer in lora_layers(wrapped).items():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        A0, B0 = factors.factors[name].A.double(), factors.factors[name].B.double()
        trained = [part.weight.detach().double() + getattr(part, "anchor", 0) for part in (A, B)]
        found[name] = layer.scaling["default"] * (trained[1] @ trained[0] - B0 @ A0)
    return found


def deltas(wrapped):
    """s B A of each layer of a plain LoRA, in fp64."""
    return {
        name: layer.scaling["default"]
        * (layer.lora_B["default"].weight.detach().double() @ layer.lora_A["default"].weight.detach().double())
        for name, layer in lora_layers(wrapped).items()
    }


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_plain_peft_on_the_untouched_base_gives_the_trained_model(llama, batches, tmp_path, attach, change):
    """1e-5 in fp32; before training, exactly the base; and the base model's weights alone are needed."""
    base = copy.deepcopy(llama)
    config = configuration(**change)
    factors = factors_of(llama, batches, config)
    wrapped = ATTACH[attach](llama, factors, config)
    untrained = to_lora(wrapped, factors, tmp_path / "untrained")
    assert untrained.norm == untrained.discarded == 0
    assert torch.equal(logits(loaded(base, tmp_path / "untrained"), batches), logits(base, batches))
    train(wrapped, batches)
    report = to_lora(wrapped, factors, tmp_path / "trained")
    assert (logits(wrapped, batches) - logits(base, batches)).abs().max() > 1e-2
    plain = loaded(base, tmp_path / "trained")
    torch.testing.assert_close(logits(plain, batches), logits(wrapped, batches), rtol=0, atol=1e-5)
    for name, layer in lora_layers(plain).items():
        target = factors.targets[name]
        assert layer.r["default"] == report.layers[name].rank == 2 * target.rank
        assert layer.scaling["default"] == pytest.approx(target.scaling, rel=1e-15)
        assert report.layers[name].discarded == 0


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_recompression_loses_exactly_the_reported_norm(llama, batches, tmp_path, attach, rank):
    """Nothing at rank 2r, the reported norm below; and no matrix of that rank is closer (Eckart-Young)."""
    llama = llama.double()
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = train(ATTACH[attach](llama, factors, config), batches)
    report = to_lora(wrapped, factors, tmp_path, rank=rank)
    plain = loaded(base, tmp_path)
    saved = deltas(plain)
    for name, whole in changes(wrapped, factors).items():
        layer = report.layers[name]
        assert layer.rank == rank
        assert layer.norm == pytest.approx(whole.norm().item(), rel=1e-10)
        assert (saved[name] - whole).norm().item() == pytest.approx(layer.discarded, rel=1e-6, abs=1e-12)
        best = torch.linalg.svdvals(whole)[rank:].norm().item()
        assert layer.discarded == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert (layer.discarded == 0) == (rank == 8)
    assert report.discarded == pytest.approx(sum(layer.discarded**2 for layer in report.layers.values()) ** 0.5)
    if rank == 8:
        torch.testing.assert_close(logits(plain, batches), logits(wrapped, batches), rtol=0, atol=1e-10)


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("change", CONFIGURATIONS)
@pytest.mark.parametrize("tol", [1e-6, 0.1, 0.3])
def test_a_tolerance_gives_each_layer_the_smallest_rank_that_keeps_it(llama, batches, tmp_path, attach, change, tol):
    base = copy.deepcopy(llama)
    config = configuration(**change)
    factors = factors_of(llama, batches, config)
    wrapped = train(ATTACH[attach](llama, factors, config), batches)
    report = to_lora(wrapped, factors, tmp_path, tol=tol)
    plain = loaded(base, tmp_path)
    saved = deltas(plain)
    for name, whole in changes(wrapped, factors).items():
        q, singular = report.layers[name].rank, torch.linalg.svdvals(whole)
        assert singular[q:].norm() <= tol * whole.norm() * (1 + 1e-6)
        assert q == 1 or singular[q - 1 :].norm() > tol * whole.norm()
        assert (saved[name] - whole).norm().item() == pytest.approx(report.layers[name].discarded, rel=1e-3, abs=1e-5)
        assert lora_layers(plain)[name].r["default"] == q
        assert lora_layers(plain)[name].scaling["default"] == pytest.approx(factors.targets[name].scaling)
    if tol < 1e-5:
        torch.testing.assert_close(logits(plain, batches), logits(wrapped, batches), rtol=0, atol=1e-5)


def test_an_untrained_adapter_stays_exactly_zero_when_recompressed(llama, batches, tmp_path):
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    for attach, wrapped in (
        ("anchor", apply_anchor(copy.deepcopy(base), factors, config)),
        ("residual", apply_corda(llama, factors, config)),
    ):
        report = to_lora(wrapped, factors, tmp_path / attach, tol=0.01)
        assert {layer.rank for layer in report.layers.values()} == {1}
        assert torch.equal(logits(loaded(base, tmp_path / attach), batches), logits(base, batches))


def test_ranks_are_written_for_full_names_only(tmp_path):
    """Peft takes a pattern for every name that ends in it: layer "0" must not lend its rank to "1.0"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.Linear(12, 12)), nn.Linear(12, 12)).double()
    x = torch.randn(40, 12, dtype=torch.float64)
    base = copy.deepcopy(model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=r"0|1\.0|2")
    factors = build_factors(model, collect_context(model, [x], ["0", "1.0", "2"]), config)
    wrapped = apply_anchor(model, factors, config)
    with torch.no_grad():
        for name, rank in {"0": 1, "1.0": 4, "2": 4}.items():
            layer = lora_layers(wrapped)[name]
            layer.lora_A["default"].weight.copy_(torch.randn(2, 12) if rank == 4 else 0)
            layer.lora_B["default"].weight.copy_(torch.randn(12, 2) * torch.tensor([1.0, rank - 1 > 0]))
    report = to_lora(wrapped, factors, tmp_path, tol=1e-6)
    assert {name: layer.rank for name, layer in report.layers.items()} == {"0": 1, "1.0": 4, "2": 4}
    torch.testing.assert_close(loaded(base, tmp_path)(x), wrapped(x), rtol=0, atol=1e-10)


def test_without_recompression_the_stacked_parts_are_written_as_they_are(llama, batches, tmp_path):
    config = configuration(use_rslora=True, rank_pattern={"down_proj": 2})
    factors = factors_of(llama, batches, config)
    wrapped = train(apply_corda(llama, factors, config), batches)
    to_lora(wrapped, factors, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in lora_layers(wrapped).items():
        start = factors.factors[name]
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert torch.equal(saved.pop(f"base_model.model.{name}.lora_A.weight"), torch.cat([A - start.A, A]))
        assert torch.equal(
            saved.pop(f"base_model.model.{name}.lora_B.weight"), torch.cat([start.B, B - start.B], dim=1)
        )
    assert not saved
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True


@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize(
    "change",
    [
        {"bias": "all", "modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 37]}},
        {"bias": "lora_only", "lora_bias": True},
    ],
)
def test_what_else_was_trained_is_kept(llama, batches, tmp_path, attach, change):
    """Trained biases, a head and single tokens, which are still there after recompression."""
    for block in llama.model.layers:
        for owner, name in ((block.self_attn, "q_proj"), (block.mlp, "down_proj"), (block.mlp, "up_proj")):
            plain = getattr(owner, name)
            setattr(owner, name, nn.Linear(plain.in_features, plain.out_features))
    if attach == "anchor":
        change = {key: value for key, value in change.items() if key != "lora_bias"}
    base = copy.deepcopy(llama)
    config = configuration(**change)
    factors = factors_of(llama, batches, config)
    wrapped = train(ATTACH[attach](llama, factors, config), batches)
    to_lora(wrapped, factors, tmp_path / "whole")
    plain = loaded(base, tmp_path / "whole")
    torch.testing.assert_close(logits(plain, batches), logits(wrapped, batches), rtol=0, atol=1e-5)
    for (name, ours), theirs in zip(lora_layers(wrapped).items(), lora_layers(plain).values(), strict=True):
        assert not torch.equal(ours.get_base_layer().bias, base.get_submodule(name).bias)
        assert torch.equal(ours.get_base_layer().bias, theirs.get_base_layer().bias)
    to_lora(wrapped, factors, tmp_path / "small", rank=2)
    saved = [load_file(tmp_path / size / "adapter_model.safetensors") for size in ("whole", "small")]
    others = {key for key in saved[0] if ".lora_A" not in key and ".lora_B.weight" not in key}
    assert len(others) >= len(factors.factors) + 2 * ("modules_to_save" in change)
    for key in others:
        assert torch.equal(saved[0][key], saved[1][key])
    wrapped.save_pretrained(tmp_path / "trained")
    convert_adapter(tmp_path / "trained", factors, tmp_path / "folders")
    trained, converted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "folders"))
    there = {key for key in saved[0] if key in trained or ".lora_" in key}  # peft 0.17 forgets biases under lora_only
    assert set(converted) == there
    for key in there:
        torch.testing.assert_close(converted[key], saved[0][key], rtol=0, atol=1e-6)


def test_an_anchored_model_holds_its_start(llama, batches, tmp_path):
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = train(apply_anchor(llama, factors, config), batches)
    assert to_lora(wrapped, None, tmp_path / "a") == to_lora(wrapped, factors, tmp_path / "b")
    file = "adapter_model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_converting_twice_writes_the_same_files(llama, batches, tmp_path):
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = train(apply_anchor(llama, factors, config), batches)
    for name in ("a", "b"):
        to_lora(wrapped, factors, tmp_path / name, rank=3)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_cannot_be_converted_is_refused(llama, batches, tmp_path):
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    wrapped = apply_anchor(copy.deepcopy(base), factors, config)
    for settings, message in (
        ({"rank": 2, "tol": 0.1}, "either rank or tol"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"tol": 1.0}, "tol must be at least 0 and below 1"),
    ):
        with pytest.raises(UserError, match=message):
            to_lora(wrapped, factors, tmp_path / "out", **settings)
    others = factors_of(base, list(reversed(batches))[:1], config)
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.self_attn\.q_proj is anchored at other factors"):
        to_lora(wrapped, others, tmp_path / "out")
    with pytest.raises(UserError, match="not those of the factors"):
        to_lora(wrapped, factors_of(base, batches, configuration(target_modules=["q_proj"])), tmp_path / "out")
    with pytest.raises(UserError, match="another shape or rank"):
        to_lora(wrapped, factors_of(base, batches, configuration(r=2)), tmp_path / "out")
    dora = apply_corda(copy.deepcopy(base), factors, configuration(use_dora=True))
    with pytest.raises(UserError, match=r"q_proj, a DoraLinearVariant: a plain LoRA cannot hold"):
        to_lora(dora, factors, tmp_path / "out")
    with pytest.raises(UserError, match="not anchored needs the factors"):
        to_lora(apply_corda(copy.deepcopy(base), factors, config), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_anchored_start_is_exact_and_a_residual_one_is_close(llama, batches):
    """Models keep the mode that they were in."""
    base = copy.deepcopy(llama)
    config = configuration()
    factors = factors_of(llama, batches, config)
    anchored, residual = apply_anchor(copy.deepcopy(base), factors, config), apply_corda(llama, factors, config)
    residual.train()
    exact = {name: LayerStart("anchor", 0.0) for name in factors.factors}
    assert verify_init(base, anchored, batches[0]) == InitReport(0.0, 0.0, 0.0, exact)
    report = verify_init(base, residual, batches[0])
    assert 0 < report.mean_difference < report.max_difference < 1e-5
    assert residual.training
    assert list(report.layers) == list(factors.factors)
    assert report.wrong == []
    for layer in report.layers.values():
        assert layer.attach == "residual"
        assert 0.2 < layer.units <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("attach", "dtype"),
    [
        ("residual", torch.bfloat16),
        ("residual", torch.float32),
        ("residual", torch.float64),
        ("anchor", torch.bfloat16),
    ],
)
def test_a_layer_that_starts_elsewhere_is_named(llama, batches, attach, dtype):
    """Layer by layer: one bit of one weight, a stale factor, or an adapter that was cast after it was attached."""
    llama = llama.to(dtype)
    base = copy.deepcopy(llama)
    config = configuration()
    wrapped = ATTACH[attach](llama, factors_of(llama, batches, config), config)
    assert verify_init(base, wrapped, batches[0]).wrong == []
    layers = lora_layers(wrapped)
    name = "model.layers.1.self_attn.q_proj"
    part, W = layers[name].lora_B["default"], layers[name].get_base_layer().weight
    with torch.no_grad():
        part.weight[2, 1] += 0.1
        assert verify_init(base, wrapped, batches[0]).wrong == [name]
        part.weight[2, 1] -= 0.1
        W[3, 4] *= 1 + 8 * torch.finfo(dtype).eps
        report = verify_init(base, wrapped, batches[0])
        assert report.wrong == [name]
        assert report.layers[name].units == pytest.approx(8, rel=1)
    if attach == "residual" and dtype == torch.float32:
        for other in layers.values():
            other.lora_A["default"].bfloat16(), other.lora_B["default"].bfloat16()
        assert verify_init(base, wrapped, batches[0]).wrong == list(layers)


def test_the_differences_are_those_of_the_counted_tokens(llama, batches):
    """Largest, mean and KL against torch.distributions; padding is left out."""
    base = copy.deepcopy(llama)
    config = configuration()
    wrapped = train(apply_anchor(llama, factors_of(llama, batches, config), config), batches)
    batch = {**batches[0], "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    batch["attention_mask"][1, 10:] = 0
    report = verify_init(base, wrapped, batch)
    with torch.no_grad():
        before, after = (model.eval()(**batch).logits.double() for model in (base, wrapped))
    rows = [(before[0], after[0]), (before[1, :10], after[1, :10])]
    gaps = torch.cat([(a - b).abs() for b, a in rows])
    kl = [
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=b), torch.distributions.Categorical(logits=a)
        )
        for b, a in rows
    ]
    assert report.max_difference == pytest.approx(gaps.max().item())
    assert report.mean_difference == pytest.approx(gaps.mean().item())
    assert report.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-6)


def test_dropout_is_off_while_models_are_compared():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    model[0].eval()
    assert verify_init(copy.deepcopy(model), model, torch.randn(4, 8)) == InitReport(0.0, 0.0, 0.0)
    assert (model[0].training, model[1].training) == (False, True)


def test_what_cannot_be_verified_is_refused(llama, batches):
    config = configuration()
    base = copy.deepcopy(llama)
    wrapped = apply_anchor(llama, factors_of(llama, batches, config), config)
    with pytest.raises(UserError, match="untouched copy"):
        verify_init(llama, wrapped, batches[0])
    with torch.no_grad():
        base.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the base model's logits"):
        verify_init(base, wrapped, batches[0])
    with pytest.raises(UserError, match=r"logits are \(4, 3\)"):
        verify_init(nn.Linear(2, 3), nn.Linear(2, 5), torch.ones(4, 2))
