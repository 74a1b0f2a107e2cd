import copy

import pytest
import torch
from corda import CordaInit, apply_corda, build_factors, collect_context, get_corda_model, save_initial, to_lora
from corda.adapters import lora_layers
from corda.anchor import AnchoredLinear
from corda.attach import residual_state
from corda.factors import output_energies, output_energy
from corda.targets import resolve_targets
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from tenfold import UserError

EXTRAS = [
    {"bias": "all", "modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [3, 37]}},
    {"bias": "lora_only"},
    {"lora_bias": True},
    {"use_dora": True},
]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def configuration(**changes):
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **changes})


def train(wrapped, batches, steps=3):
    wrapped.train()
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        ids = batches[step % len(batches)]["input_ids"]
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return wrapped.eval()


def with_biases(model):
    for path, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and path:
                layer = nn.Linear(child.in_features, child.out_features)
                layer.weight = child.weight
                setattr(owner, name, layer)
    return model


def logits(model, batches):
    with torch.no_grad():
        return model.eval()(**batches[0]).logits


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": None},
        {"target_modules": r".*layers\.1\..*(q|v)_proj"},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 16}},
        {"layers_to_transform": [1]},
        {"use_rslora": True},
    ],
)
def test_targets_are_those_that_peft_takes(llama, change):
    if change == {"target_modules": None}:
        change = {"target_modules": None, "task_type": "CAUSAL_LM"}
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    ours = resolve_targets(llama, configuration(**change))
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    theirs = lora_layers(get_peft_model(llama, configuration(**change)))
    assert list(ours) == list(theirs)
    for name, layer in theirs.items():
        assert (ours[name].rank, ours[name].scaling) == (layer.r["default"], layer.scaling["default"])


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("change", [{}, {"lora_alpha": 2}, {"lora_alpha": 8}, {"use_rslora": True}])
def test_the_adapted_model_starts_at_the_base_model(llama, batches, mode, change):
    """W' + s B A = W, for scalings 0.5, 1, 2 and rsLoRA, here through whole models in fp64."""
    llama = llama.double()
    base = copy.deepcopy(llama)
    wrapped = get_corda_model(llama, configuration(**change), batches, CordaInit(mode=mode))
    for name, layer in lora_layers(wrapped).items():
        scale, A, B = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole = layer.get_base_layer().weight + scale * B @ A
        torch.testing.assert_close(whole, base.get_submodule(name).weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(wrapped, batches), logits(base, batches), rtol=0, atol=1e-10)


def test_in_bfloat16_only_one_rounding_separates_start_and_base(llama, batches):
    """|W - W' - s B A| is at most half a unit in the last place of W'."""
    llama = llama.bfloat16()
    base = copy.deepcopy(llama)
    wrapped = get_corda_model(llama, LORA, batches)
    for name, layer in lora_layers(wrapped).items():
        scale, A, B = layer.scaling["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.dtype == torch.float32
        residual = layer.get_base_layer().weight.double()
        gap = (base.get_submodule(name).weight.double() - residual - scale * B.double() @ A.double()).abs()
        half_unit = 2.0 ** (torch.frexp(residual).exponent.double() - 9)
        assert (gap <= half_unit * 1.001 + 1e-9).all()


def test_gradients_at_the_start():
    """D(loss)/dA = s B^T G x^T, and by finite differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6, bias=False)).double()
    x = torch.randn(20, 9, dtype=torch.float64)
    wrapped = get_corda_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), [x])
    layer = lora_layers(wrapped)["0"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wrapped(x).pow(2).sum().backward()
    closed = 2.0 * B.T @ (2 * wrapped(x)).T @ x
    torch.testing.assert_close(A.grad, closed, rtol=1e-10, atol=1e-10)
    for index in ((0, 0), (1, 5), (2, 8)):
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                A[index] += step
                ends.append(wrapped(x).pow(2).sum().item())
            A[index] += 1e-5
        assert A.grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "change", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 3}}]
)
def test_a_trained_adapter_loads_by_plain_peft_on_the_untouched_base(llama, batches, tmp_path, change):
    base = copy.deepcopy(llama)
    config = configuration(**change)
    factors = build_factors(llama, collect_context(llama, batches, list(resolve_targets(llama, config))), config)
    wrapped = apply_corda(llama, factors, config)
    to_lora(wrapped, factors, tmp_path / "untrained")
    train(wrapped, batches)
    to_lora(wrapped, factors, tmp_path / "trained")
    start = logits(base, batches)
    trained = logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained"), batches)
    assert (trained - start).abs().max() > 1e-3
    torch.testing.assert_close(trained, logits(wrapped, batches), rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "untrained"), batches), start)


def test_the_initial_adapter_loads_on_the_residual_model_and_trains_on(llama, batches, tmp_path):
    base = copy.deepcopy(llama)
    wrapped = get_corda_model(llama, configuration(), batches)
    save_initial(wrapped, tmp_path / "corda_init")
    residual = copy.deepcopy(base)
    residual.load_state_dict(residual_state(wrapped))
    loaded = PeftModel.from_pretrained(residual, tmp_path / "corda_init", is_trainable=True)
    assert torch.equal(logits(loaded, batches), logits(wrapped, batches))
    torch.testing.assert_close(logits(train(loaded, batches), batches), logits(train(wrapped, batches), batches))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batches), logits(wrapped, batches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_product_equals_that_of_pefts_own_corda(method, shape):
    """Peft's preprocess_corda and corda_init on the same layer and samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(model[0].weight, full_matrices=False)
        model[0].weight.copy_(U * torch.logspace(0, -1, min(shape)) @ Vh)
    samples = [torch.randn(40, shape[1]) for _ in range(8)]  # to peft, one sample each
    ours = get_corda_model(
        copy.deepcopy(model),
        LoraConfig(r=3, lora_alpha=6, target_modules=["0"]),
        [s[None] for s in samples],
        CordaInit(mode=method),
    )
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    preprocess_corda(model, config, run_model=lambda: [model(sample) for sample in samples])
    theirs = get_peft_model(model, config)
    a, b = (lora_layers(wrapped)["0"] for wrapped in (ours, theirs))
    products = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in (a, b)]
    assert (products[0] - products[1]).norm() <= 1e-4 * products[1].norm()
    rows = [nn.functional.normalize(layer.lora_A["default"].weight, dim=1) for layer in (a, b)]
    torch.testing.assert_close((rows[0] * rows[1]).sum(dim=1).abs(), torch.ones(3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.lora_A["default"].weight.norm(), b.lora_A["default"].weight.norm(), rtol=1e-3, atol=0)


def test_output_energies_add_up_to_the_whole():
    """|u u^T W X|^2 = u^T W C W^T u, and all components sum to tr(W C W^T)."""
    torch.manual_seed(0)
    W, X = torch.randn(6, 9).double(), torch.randn(9, 30).double()
    U = torch.linalg.svd(W).U
    shares = [output_energy(W, X @ X.T, u[:, None]) for u in U.T]
    direct = [((torch.outer(u, u) @ W @ X).norm() ** 2 / (W @ X).norm() ** 2).item() for u in U.T]
    assert shares == pytest.approx(direct)
    assert sum(shares) == pytest.approx(1)


def test_the_report_names_every_layer(llama, batches):
    stats = collect_context(llama, batches)
    factors = build_factors(llama, stats, LORA, CordaInit(mode="ipm"))
    report = factors.report(output_energies(llama, stats, factors))
    assert set(report["layers"]) == set(stats.targets)
    layer = report["layers"]["model.layers.0.self_attn.k_proj"]
    assert layer["group"] == "model.layers.0.self_attn.q_proj"
    assert (layer["shape"], layer["rank"], layer["scaling"]) == ((16, 32), 4, 2.0)
    assert 0 < layer["output_energy"] < 1
    assert layer["sigma_first"] >= layer["sigma_last"] > 0


def test_power_zero_needs_no_data(llama):
    wrapped = get_corda_model(llama, configuration(), None, CordaInit(mode="ipm", power=0))
    assert len(lora_layers(wrapped)) == 4


def test_bad_layers_and_models(llama, batches):
    """Rank above a layer's size, applied twice, quantized, tied, other statistics."""
    stats = collect_context(llama, batches)
    with pytest.raises(
        ValueError,
        match=r"layer model\.layers\.0\.self_attn\.k_proj: rank 17, expected 1 to 16.*rank_pattern={.*exclude_modules",
    ):
        build_factors(llama, stats, configuration(r=17, target_modules=["k_proj"]))
    with pytest.raises(UserError, match="needs calibration data"):
        get_corda_model(llama, configuration(), None)
    with pytest.raises(UserError, match="peft cannot apply|no layer"):
        resolve_targets(llama, configuration(target_modules=["no_such_layer"]))
    with pytest.raises(UserError, match="no statistics of layer"):
        build_factors(llama, collect_context(llama, batches, ["model.layers.0.mlp.up_proj"]), configuration())
    factors = build_factors(llama, stats, configuration())
    with pytest.raises(UserError, match="other layers or ranks"):
        apply_corda(llama, factors, configuration(r=2))
    wrapped = apply_corda(llama, factors, configuration())
    with pytest.raises(UserError, match="has an adapter already"):
        apply_corda(wrapped, factors, configuration())
    with pytest.raises(UserError, match="another model"):
        build_factors(wrapped.unload(), stats, configuration())


def test_tied_weights_and_other_shapes_are_refused(llama, batches):
    """And no weight has changed, nor is the model wrapped."""
    config = configuration()
    factors = build_factors(llama, collect_context(llama, batches), config)
    before = copy.deepcopy(llama.state_dict())
    llama.model.layers[1].mlp.down_proj = nn.Linear(40, 32)
    with pytest.raises(UserError, match=r"layer model\.layers\.1\.mlp\.down_proj has another shape"):
        apply_corda(llama, factors, config)
    llama.model.layers[1].mlp.down_proj = nn.Linear(48, 32)
    llama.model.layers[1].self_attn.q_proj.weight = llama.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.self_attn\.q_proj shares its weight"):
        apply_corda(llama, factors, config)
    assert torch.equal(llama.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"])
    assert not any("lora" in name for name, _ in llama.named_modules())
    llama.lm_head.weight = llama.model.embed_tokens.weight
    with pytest.raises(UserError, match="layer lm_head shares its weight"):
        collect_context(llama, batches, ["lm_head"])
    with pytest.raises(UserError, match="layer lm_head shares its weight"):
        build_factors(llama, None, configuration(target_modules=["lm_head"]), CordaInit(power=0))


def test_dora_takes_its_magnitudes_of_what_it_starts_from(llama, batches):
    """The norms of the rows of W' + s B A, so that the start is as near to the base as without DoRA."""
    llama = llama.bfloat16()
    base = copy.deepcopy(llama)
    wrapped = get_corda_model(llama, configuration(use_dora=True, lora_alpha=8), batches, CordaInit(mode="ipm"))
    for layer in lora_layers(wrapped).values():
        A, B = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
        norms = (layer.get_base_layer().weight.double() + 2 * B @ A).norm(dim=1)
        magnitudes = layer.lora_magnitude_vector["default"].weight
        assert magnitudes.requires_grad
        torch.testing.assert_close(magnitudes.double(), norms, rtol=2e-7, atol=0)
    plain = get_corda_model(copy.deepcopy(base), configuration(lora_alpha=8), batches, CordaInit(mode="ipm"))
    start = logits(base, batches)
    gap, other = ((logits(model, batches) - start).abs().max() for model in (wrapped, plain))
    assert gap <= 3 * other
    moved = logits(train(wrapped, batches), batches)
    assert (moved - start).abs().max() > 10 * gap


@pytest.mark.parametrize("change", EXTRAS)
def test_the_initial_adapter_holds_all_that_is_trained(llama, batches, tmp_path, change):
    """Biases, a whole head, single tokens, magnitudes: what peft saves besides A and B."""
    llama = with_biases(llama)
    base = copy.deepcopy(llama)
    wrapped = train(get_corda_model(llama, configuration(**change), batches), batches)
    save_initial(wrapped, tmp_path)
    residual = copy.deepcopy(base)
    residual.load_state_dict(residual_state(wrapped))
    for name, value in base.state_dict().items():
        if "_proj.weight" not in name and "bias" not in name:
            assert torch.equal(residual.state_dict()[name], value)
        elif name.endswith(".bias"):
            residual.get_parameter(name).data = value.clone()
    assert torch.equal(logits(PeftModel.from_pretrained(residual, tmp_path), batches), logits(wrapped, batches))


def test_the_one_call_attaches_in_either_way(llama, batches):
    base = copy.deepcopy(llama)
    wrapped = get_corda_model(llama, configuration(), batches, attach="anchor")
    assert torch.equal(logits(wrapped, batches), logits(base, batches))
    assert all(isinstance(layer, AnchoredLinear) for layer in lora_layers(wrapped).values())
    bounded = get_corda_model(copy.deepcopy(base), configuration(), batches, attach="anchor", memory_budget="64KB")
    for name, layer in lora_layers(bounded).items():
        found = lora_layers(wrapped)[name]
        torch.testing.assert_close(layer.lora_A["default"].anchor, found.lora_A["default"].anchor)
    with pytest.raises(UserError, match="unknown attach 'anchored': did you mean anchor"):
        get_corda_model(base, configuration(), batches, attach="anchored")
