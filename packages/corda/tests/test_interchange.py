import copy
import sys

import peft.tuners.lora.corda as peft_corda
import pytest
import torch
from corda import CordaInit, build_factors, collect_context, preprocess_corda
from corda.adapters import lora_layers
from corda.context import TargetNotReachedError
from corda.interchange import stats_from_peft, stats_to_peft
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

from tenfold import NonFiniteError, UserError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 5},
    "alpha_pattern": {"model.layers.1.self_attn.v_proj": 12, "o_proj": 1},
}


def configuration(method="kpm", cache_file=None, covariance_file=None, **change):
    corda_config = CordaConfig(
        corda_method=method,
        cache_file=cache_file and str(cache_file),
        covariance_file=covariance_file and str(covariance_file),
    )
    plain = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION}
    return LoraConfig(init_lora_weights="corda", corda_config=corda_config, **plain | change)


@pytest.fixture
def model(llama):
    """The tiny Llama with weights of well separated singular values, so that singular vectors can be compared.

    Attention is made sharp: averages over many tokens have a covariance that peft's inverse in fp32 is too coarse for.
    """
    with torch.no_grad():
        for name, module in llama.named_modules():
            if isinstance(module, nn.Linear):
                U, sigma, Vh = torch.linalg.svd(module.weight, full_matrices=False)
                size = 30 if name.endswith(("q_proj", "k_proj")) else 1
                module.weight.copy_(size * U * torch.logspace(0, -1, len(sigma)) @ Vh)
    return llama


@pytest.fixture
def samples():
    """One sample a batch, as peft's own code needs it; of several lengths."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 90, (1, length), generator=generator)} for length in (60, 50, 60, 40, 60)]


def running(model, batches):
    return lambda: [model(**batch) for batch in batches]


def never():
    raise AssertionError("the file makes this run unnecessary")


def padded(samples, side="right"):
    """All samples as one batch with a mask; what the padding holds must not matter."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    ids, mask = torch.full((len(samples), longest), 7), torch.zeros(len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        length = sample["input_ids"].shape[1]
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, place], mask[row, place] = sample["input_ids"][0], 1
    return {"input_ids": ids, "attention_mask": mask}


def eigens(model):
    return {name: module.eigens for name, module in model.named_modules() if hasattr(module, "eigens")}


def attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def assert_same_adapters(ours, theirs):
    """B A to 1e-4, rows of A up to sign, and thereby also the residual weights."""
    ours, theirs = lora_layers(ours), lora_layers(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        (A, B), (A_peft, B_peft) = (
            (x.lora_A["default"].weight, x.lora_B["default"].weight) for x in (ours[name], theirs[name])
        )
        assert A.shape == A_peft.shape
        assert (B @ A - B_peft @ A_peft).norm() <= 1e-4 * (B_peft @ A_peft).norm(), name
        cosine = nn.functional.cosine_similarity(A, A_peft).abs()
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-4)
        torch.testing.assert_close(A.norm(dim=1), A_peft.norm(dim=1), rtol=1e-3, atol=0)
        residual, residual_peft = (x.get_base_layer().weight for x in (ours[name], theirs[name]))
        assert (residual - residual_peft).norm() <= 1e-4 * residual_peft.norm()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize(
    "change",
    [{}, PATTERNS, {"use_rslora": True}, {"target_modules": "all-linear"}, {"target_modules": None}],
    ids=["plain", "patterns", "rslora", "all-linear", "default targets"],
)
def test_adapters_are_those_of_pefts_own_preprocessing(model, samples, method, change):
    """Peft's corda_init after our preprocess_corda and after peft's own."""
    ours, theirs = copy.deepcopy(model), model
    preprocess_corda(ours, configuration(method, **change), running(ours, samples))
    ours = get_peft_model(ours, configuration(method, **change))
    # peft's own takes neither "all-linear" nor no targets at all, so it gets the names
    names = {"target_modules": sorted(lora_layers(ours))} if "target_modules" in change else change
    theirs_configuration = configuration(method, **names)
    peft_corda.preprocess_corda(theirs, theirs_configuration, running(theirs, samples))
    assert_same_adapters(ours, get_peft_model(theirs, theirs_configuration))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_adapters_are_our_own_factors(model, samples, method):
    """The eigens lead peft to the A and B of build_factors."""
    stats = collect_context(model, samples, [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION])
    config = configuration(method, **PATTERNS)
    factors = build_factors(model, stats, config, CordaInit(mode=method)).factors
    preprocess_corda(model, config, running(model, samples))
    assert all(isinstance(found, peft_corda.CordaEigens) for found in eigens(model).values())
    for name, layer in lora_layers(get_peft_model(model, config)).items():
        for ours, made in ((factors[name].A, layer.lora_A), (factors[name].B, layer.lora_B)):
            assert (made["default"].weight - ours).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_the_adapted_model_starts_at_the_base_model(llama, samples, method):
    """Rank and scaling differ from layer to layer."""
    base = copy.deepcopy(llama).eval()
    config = configuration(method, **PATTERNS)
    preprocess_corda(llama, config, running(llama, samples))
    wrapped = get_peft_model(llama, config).eval()
    torch.testing.assert_close(wrapped(**samples[0]).logits, base(**samples[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_samples_one_by_one(model, samples, side):
    """Through a function that runs the model."""
    config = configuration("ipm", target_modules="all-linear")
    batch = padded(samples, side)
    if side == "left":  # positions start at the first token, as in generation
        batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    single = copy.deepcopy(model)
    preprocess_corda(single, config, running(single, samples))
    preprocess_corda(model, config, running(model, [batch]))
    expected, found = eigens(single), eigens(model)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name].S_WC, expected[name].S_WC, rtol=1e-4, atol=0)
        torch.testing.assert_close(found[name].U_WC, expected[name].U_WC, rtol=0, atol=1e-4)


def test_the_mask_counts_wherever_it_is_passed(model, samples):
    batch = padded(samples)
    other = copy.deepcopy(model)
    preprocess_corda(model, configuration(), running(model, [batch]))
    preprocess_corda(other, configuration(), lambda: other(batch["input_ids"], batch["attention_mask"]))
    assert all(torch.equal(found.U_WC, eigens(other)[name].U_WC) for name, found in eigens(model).items())


def test_run_model_may_generate(model, samples):
    """With a cache of keys, the mask covers more tokens than the pass; its last ones belong to them."""
    batch = padded(samples, "left")
    preprocess_corda(
        model, configuration(), lambda: model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    )
    assert len(eigens(model)) == 8


def test_run_model_runs_whole_passes_in_evaluation_mode_without_gradients(model, samples):
    outputs, training = [], []

    def run():
        training.append(model.training)
        outputs.extend(model(**sample).logits for sample in samples)

    preprocess_corda(model, configuration(), run)
    assert [logits.shape[1] for logits in outputs] == [60, 50, 60, 40, 60]
    assert not any(logits.requires_grad for logits in outputs)
    assert training == [False]


def test_another_model_may_be_hooked(model, samples):
    hooked = copy.deepcopy(model)
    reference = copy.deepcopy(model)
    preprocess_corda(reference, configuration(), running(reference, samples))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the one that is trained differs from the one that runs
    preprocess_corda(model, configuration(), running(hooked, samples), hooked)
    assert not eigens(hooked)
    assert all(torch.equal(found.U_WC, eigens(reference)[name].U_WC) for name, found in eigens(model).items())


def test_nothing_but_eigens_is_left(model, samples):
    """Hooks are gone, user hooks survive, training flags are back, one attribute on targets alone."""
    model.model.layers[0].eval()
    model.lm_head.register_forward_hook(lambda *_: None)
    flags, before = [m.training for m in model.modules()], attributes(model)
    preprocess_corda(model, configuration(), running(model, samples))
    assert [m.training for m in model.modules()] == flags
    assert hooks(model) == 1
    new = {name: found - before[name] for name, found in attributes(model).items() if found != before[name]}
    assert len(new) == 8
    assert all(found == {"eigens"} for found in new.values())


def test_nothing_is_left_when_run_model_raises(model, samples, tmp_path):
    flags, before = [m.training for m in model.modules()], attributes(model)
    config = configuration(cache_file=tmp_path / "cache.pt", covariance_file=tmp_path / "covariance.pt")

    def fail():
        model(**samples[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess_corda(model, config, fail)
    assert attributes(model) == before
    assert hooks(model) == 0
    assert [m.training for m in model.modules()] == flags
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_our_files_load_in_peft(model, samples, tmp_path, method, kind):
    ours, theirs = copy.deepcopy(model), model
    config = configuration(method, **{kind: tmp_path / "new" / "file.pt"}, **PATTERNS)
    preprocess_corda(ours, config, running(ours, samples))
    peft_corda.preprocess_corda(theirs, config, never)
    assert_same_adapters(get_peft_model(ours, config), get_peft_model(theirs, config))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_files_of_peft_load_in_ours(model, samples, tmp_path, method, kind):
    ours, theirs = copy.deepcopy(model), model
    config = configuration(method, **{kind: tmp_path / "file.pt"}, **PATTERNS)
    peft_corda.preprocess_corda(theirs, config, running(theirs, samples))
    preprocess_corda(ours, config)
    assert_same_adapters(get_peft_model(ours, config), get_peft_model(theirs, config))


def test_files_have_the_format_of_peft(model, samples, tmp_path):
    """Same keys, dtypes and shapes, and values that agree."""
    for folder, run, used in (("ours", preprocess_corda, model), ("peft", peft_corda.preprocess_corda, None)):
        used = used or copy.deepcopy(model)
        files = {kind: tmp_path / folder / f"{kind}.pt" for kind in ("cache_file", "covariance_file")}
        run(used, configuration(**files), running(used, samples))
    for kind in ("cache_file", "covariance_file"):
        ours, theirs = (torch.load(tmp_path / f / f"{kind}.pt", weights_only=True) for f in ("ours", "peft"))
        assert list(ours) == list(theirs)
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
        for key in theirs if kind == "covariance_file" else ():
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


def test_a_cache_gives_back_the_very_eigens(model, samples, tmp_path, monkeypatch):
    """Also under a bare file name, and into a file that is there but empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "covariance.pt").touch()
    config = configuration(cache_file="cache.pt", covariance_file="covariance.pt")
    again, from_covariance = copy.deepcopy(model), copy.deepcopy(model)
    preprocess_corda(model, config, running(model, samples))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.pt", "covariance.pt"]
    preprocess_corda(again, config, never)
    (tmp_path / "cache.pt").unlink()
    preprocess_corda(from_covariance, config, never)
    for name, found in eigens(model).items():
        for key in ("S_WC", "U_WC", "V_WC"):
            assert torch.equal(getattr(eigens(again)[name], key), getattr(found, key))
            torch.testing.assert_close(
                getattr(eigens(from_covariance)[name], key), getattr(found, key), rtol=1e-3, atol=1e-4
            )


def test_a_covariance_file_serves_other_ranks(model, samples, tmp_path):
    path = tmp_path / "covariance.pt"
    preprocess_corda(model, configuration(covariance_file=path, r=2), running(model, samples))
    preprocess_corda(model, configuration(covariance_file=path, r=5), never)
    assert {len(found.S_WC) for found in eigens(model).values()} == {5}


def test_statistics_through_a_covariance_file(model, samples, tmp_path):
    """Covariances come back in fp32, and layers of one input share theirs again."""
    config = configuration(target_modules="all-linear")
    stats = collect_context(model, samples)
    stats = type(stats)(**vars(stats) | {"groups": {k: v for k, v in stats.groups.items() if "lm_head" not in k}})
    stats_to_peft(stats, tmp_path / "covariance.pt")
    found = stats_from_peft(tmp_path / "covariance.pt", model, config)
    assert found.groups == stats.groups
    assert len(found.moments) == 8  # q = k = v, o, gate = up, down in two blocks
    for name in stats.targets:
        torch.testing.assert_close(found.covariance(name), stats.covariance(name).float().double(), rtol=0, atol=0)
    found.check_model(model)
    with pytest.raises(UserError, match="another scale"):
        found + stats


def test_covariances_of_one_input_are_stored_once(model, samples, tmp_path):
    stats = collect_context(model, samples)
    stats_to_peft(stats, tmp_path / "covariance.pt")
    bytes_once = sum(4 * moment.numel() for moment in stats.moments.values())
    assert (tmp_path / "covariance.pt").stat().st_size < 1.5 * bytes_once


def test_a_weight_without_full_rank_gives_finite_eigens(model, samples):
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight[1] = weight[0]
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    for method, names in (("kpm", ["q_proj", "v_proj"]), ("ipm", ["q_proj", "k_proj"])):
        config = configuration(method, target_modules=names)
        used = copy.deepcopy(model)
        preprocess_corda(used, config, running(used, samples))
        wrapped = get_peft_model(used, config)
        assert all(torch.isfinite(parameter).all() for parameter in wrapped.parameters())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x)


def test_a_target_that_is_never_reached_is_named():
    model = Branches()
    with pytest.raises(TargetNotReachedError, match="never reached by .*: unused; leave them out of target_modules"):
        preprocess_corda(model, configuration(target_modules=["used", "unused"]), lambda: model(torch.randn(2, 5, 6)))
    with pytest.raises(TargetNotReachedError, match="unused, used|used, unused"):
        preprocess_corda(model, configuration(target_modules=["used", "unused"]), lambda: None)


def test_bad_input_and_bad_configurations(model, samples):
    run = running(model, samples)
    cases = {
        "run_model is missing": (configuration(), None),
        "no corda_config": (LoraConfig(target_modules=["q_proj"]), run),
        "layer .*q_proj: rank 33, expected 1 to 32": (
            configuration(rank_pattern={"q_proj": 33}),
            run,
        ),
        "unknown corda_method 'kmp' in corda_config: did you mean kpm": (configuration("kmp"), run),
        "expected nn.Linear": (configuration(target_modules=["embed_tokens"]), run),
        "peft cannot apply this LoRA configuration": (configuration(target_modules=["nowhere"]), run),
        "no token is left after masking": (
            configuration(),
            lambda: model(samples[0]["input_ids"], torch.zeros_like(samples[0]["input_ids"])),
        ),
    }
    for message, (config, run) in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            preprocess_corda(model, config, run)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="adapter already"):
        preprocess_corda(get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])), configuration())
    assert not eigens(model)


def test_a_layer_with_infinite_input_is_named(model, samples):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.inf
    with pytest.raises(NonFiniteError, match="layers.1.self_attn.q_proj, batch 0"):
        preprocess_corda(model, configuration(), running(model, samples))
    assert not eigens(model)
    assert hooks(model) == 0


class Unsafe:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("kind", ["cache_file", "covariance_file"])
def test_bad_files(model, tmp_path, kind, capsys):
    """What is no such file is refused in one line, and nothing in it is run."""
    path = tmp_path / "file.pt"
    config = configuration(**{kind: path})
    whole = {"cache_file": {"layer.eigens.S_WC": torch.ones(3)}, "covariance_file": {"layer": torch.eye(32)}}[kind]
    q = "model.layers.0.self_attn.q_proj"
    small = {"cache_file": {f"{q}.eigens.{k}": torch.ones(4) for k in ("S_WC", "U_WC", "V_WC")}}
    small = small.get(kind, {q: torch.eye(31)})
    torch.save(whole, path)
    cut = path.read_bytes()[:-200]
    torch.save(whole, path, _use_new_zipfile_serialization=False)  # the older format, which still loads
    older = path.read_bytes()
    for content, message in (
        (b"not a file of torch", f"{kind} .* (is not a whole file of weights|cannot be read)"),
        (cut, f"{kind} .* (is not a whole file of weights|cannot be read)"),
        (older[:-60], f"{kind} .* (is not a whole file of weights|cannot be read)"),
        ({"a": Unsafe()}, f"{kind} .* cannot be read without running what is in it"),
        ([torch.eye(3)], f"{kind} .*: expected weights by name"),
        ({"a": 1}, f"{kind} .*: expected weights by name"),
        (whole, f"no entry {q}"),
        (small, f"layer {q} is (4, expected 3|31 x 31, expected 32 x 32)"),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=message) as caught:
            preprocess_corda(model, config, never)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not eigens(model)
    assert capsys.readouterr().out == ""


def test_an_indefinite_covariance_is_refused(model, tmp_path):
    """Such as rounding to fp16 may leave behind."""
    path = tmp_path / "covariance.pt"
    indefinite = torch.diag(torch.linspace(-1, 3, 32))
    torch.save({f"model.layers.{i}.self_attn.{name}": indefinite for i in (0, 1) for name in ATTENTION}, path)
    with pytest.raises(UserError, match="covariance.pt is not positive definite"):
        preprocess_corda(model, configuration(covariance_file=path), never)


def test_a_cache_of_another_rank_is_refused(model, samples, tmp_path):
    used = copy.deepcopy(model)
    preprocess_corda(used, configuration(cache_file=tmp_path / "cache.pt"), running(used, samples))
    with pytest.raises(UserError, match="S_WC of layer .*q_proj is 3, expected 4 for rank 4"):
        preprocess_corda(model, configuration(cache_file=tmp_path / "cache.pt", r=4))


def test_without_attrs_the_message_says_what_to_install(model, samples, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.corda")
    monkeypatch.setitem(sys.modules, "attr", None)
    with pytest.raises(UserError, match="pip install attrs$"):
        preprocess_corda(model, configuration(), running(model, samples))
