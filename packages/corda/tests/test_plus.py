import math

import mpmath
import pytest
import torch
from corda import CordaInit, DampedCovariance, apply_corda, build_factors, collect_context, factorize
from corda.adapters import lora_layers
from corda.plus import (
    allocate_by_energy,
    allocate_ranks,
    allocate_uniform,
    select_context,
    select_covariances,
    uniform_budget,
)
from corda.spectra import compactness, component_energies, layer_spectra, spectrum
from corda.targets import resolve_targets, with_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tenfold import NonFiniteError, UserError
from tenfold.testing import assert_same_as_reference

MODES = ["kpm", "ipm"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(values, seed=0):
    """A covariance with these eigenvalues in a random basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(random(len(values), len(values), seed=seed)).Q
    return (Q * values) @ Q.T


def greedy(scores, shapes, budget, mode):
    """The loop as the paper describes it, one step at a time; ``scores(layer, rho)`` is infinite where a layer must stop."""
    rho = [1] * len(shapes)
    sizes = [min(shape) for shape in shapes]

    def parameters():
        kept = rho if mode == "kpm" else [k - r for k, r in zip(sizes, rho, strict=True)]
        return sum((m + n) * r for (m, n), r in zip(shapes, kept, strict=True))

    while parameters() <= budget if mode == "kpm" else parameters() >= budget:
        now = [scores(layer, rho[layer]) for layer in range(len(shapes))]
        rho[now.index(min(now))] += 1
    return rho if mode == "kpm" else [k - r for k, r in zip(sizes, rho, strict=True)]


def eq9(sigma, pi, mode):
    """Score of a layer at rho, with sums from the largest singular value on."""

    def score(rho):
        if rho >= len(sigma) - (mode == "ipm"):
            return math.inf
        total = 0.0
        for value in sigma[: len(sigma) - rho]:
            total += value
        return math.log(pi) * sigma[-rho] / total

    return score


def limits(shapes, mode):
    """The budgets that the loop can cross, from the rule itself."""
    per_rank = sum(m + n for m, n in shapes)
    most = sum((m + n) * min(m, n) for m, n in shapes)
    return (per_rank, most - 1) if mode == "kpm" else (per_rank + 1, most - per_rank)


SHAPES = st.lists(st.tuples(st.integers(3, 9), st.integers(3, 9)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(shapes=SHAPES, mode=st.sampled_from(MODES), data=st.data())
def test_one_sort_equals_the_greedy_loop_and_keeps_the_budget(shapes, mode, data):
    """The same ranks as the loop, ties and zeros included; kpm ends just above the budget, ipm just below."""
    value = st.one_of(st.integers(0, 4).map(float), st.floats(1e-6, 1e3))
    spectra, pis = {}, {}
    for layer, shape in enumerate(shapes):
        values = data.draw(st.lists(value, min_size=min(shape), max_size=min(shape)))
        values[0] += 0.5
        spectra[f"l{layer}"] = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
        pis[f"l{layer}"] = data.draw(st.sampled_from([1.0, 2.0, 2.0, 3e4]))
    named = dict(zip(spectra, shapes, strict=True))
    budget = data.draw(st.integers(*limits(shapes, mode)))
    ranks = allocate_ranks(spectra, pis, named, budget, mode)

    layers = [eq9(spectra[name].tolist(), pis[name], mode) for name in spectra]
    assert list(ranks.values()) == greedy(lambda layer, rho: layers[layer](rho), shapes, budget, mode)
    assert list(ranks) == list(spectra)
    assert all(1 <= rank <= min(named[name]) for name, rank in ranks.items())
    used = sum(rank * sum(named[name]) for name, rank in ranks.items())
    beyond = used - budget if mode == "kpm" else budget - used
    assert 0 < beyond <= max(m + n for m, n in shapes)


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, mode=st.sampled_from(MODES), data=st.data())
def test_allocation_by_energy_equals_the_loop_though_energies_do_not_ascend(shapes, mode, data):
    """Also for scores that fall and rise within a layer."""
    energies = {}
    for layer, (m, n) in enumerate(shapes):
        drawn = data.draw(st.lists(st.integers(0, 5), min_size=min(m, n), max_size=min(m, n)))
        energies[f"l{layer}"] = torch.tensor([drawn[0] + 1, *drawn[1:]], dtype=torch.float64)
    budget = data.draw(st.integers(*limits(shapes, mode)))
    ranks = allocate_by_energy(energies, dict(zip(energies, shapes, strict=True)), budget, mode)

    def score(layer, rho):
        e = energies[f"l{layer}"]
        return math.inf if rho >= len(e) - (mode == "ipm") else (e[-rho] / e.sum()).item()

    assert list(ranks.values()) == greedy(score, shapes, budget, mode)


def test_the_sum_of_a_score_leaves_the_component_itself_out():
    """B's 1.5 * 0.6 / 1 is less than a's 1 * 1 / 1; with the component in the sums it would be more."""
    spectra = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1.0, 0.6])}
    pis = {"a": math.exp(1.0), "b": math.exp(1.5)}
    assert allocate_ranks(spectra, pis, {"a": (2, 2), "b": (2, 2)}, 8, "kpm") == {"a": 1, "b": 2}


@pytest.mark.parametrize("mode", MODES)
def test_kpm_gives_concentrated_layers_more_and_ipm_less(mode):
    """The direction of the allocation."""
    spectra = {"flat": torch.linspace(1, 0.9, 32), "steep": 0.8 ** torch.arange(32)}
    shapes = dict.fromkeys(spectra, (32, 32))
    ranks = allocate_ranks(spectra, dict.fromkeys(spectra, 9.0), shapes, uniform_budget(shapes, 8), mode)
    assert (ranks["steep"] > ranks["flat"]) == (mode == "kpm")


@pytest.mark.parametrize("mode", MODES)
def test_identical_layers_get_equal_ranks(mode):
    """Up to one, the earlier layers first."""
    sigma = spectrum(random(12, 16), None, 0)
    shapes = dict.fromkeys("abcde", (12, 16))
    for budget in range(uniform_budget(shapes, 4), uniform_budget(shapes, 5), 17):
        found = allocate_ranks(dict.fromkeys("abcde", sigma), dict.fromkeys("abcde", 20.0), shapes, budget, mode)
        ranks = list(found.values())
        assert max(ranks) - min(ranks) <= 1
        assert ranks == sorted(ranks, reverse=mode == "kpm")


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_the_covariances_leaves_ranks_unchanged(mode):
    """C -> 1e6 C; without normalization log pi would turn negative."""
    weights = {f"l{i}": random(m, n, seed=i) for i, (m, n) in enumerate([(12, 20), (16, 16), (24, 10)])}
    shapes = {name: tuple(W.shape) for name, W in weights.items()}

    def ranks(scale):
        covariances = {
            name: scale * rotated(0.7 ** torch.arange(W.shape[1]), seed=i)
            for i, (name, W) in enumerate(weights.items())
        }
        spectra = {name: spectrum(W, DampedCovariance(covariances[name], 0.01)) for name, W in weights.items()}
        pis = {name: compactness(covariances[name], W.shape[0], 0.01) for name, W in weights.items()}
        return allocate_ranks(spectra, pis, shapes, uniform_budget(shapes, 4), mode)

    assert ranks(1.0) == ranks(1e6) == ranks(1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_compactness_is_its_formula_on_the_normalized_covariance(scale):
    """Sigma_max, sigma_min of C_d with a mean diagonal of 1, whatever the scale of C."""
    C = rotated([0, 1, 2, 3, 4.0])
    expected = math.sqrt(7 * 4.02 / 2.02) / (0.02 / 2.02)
    assert compactness(scale * C, 7, 0.01) == pytest.approx(expected, rel=1e-9)
    assert compactness(DampedCovariance(scale * C, 0.01), 7) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda v: max(v) > 1e-3),
    out_features=st.integers(1, 9),
)
def test_compactness_is_at_least_the_root_of_the_outputs(values, out_features):
    """Sigma_max >= 1 >= sigma_min, so log pi never turns negative."""
    pi = compactness(rotated(values), out_features)
    assert pi >= math.sqrt(out_features)
    assert compactness(3.0 * torch.eye(4), out_features) == pytest.approx(math.sqrt(out_features))


@pytest.mark.parametrize(("m", "n"), [(20, 20), (26, 18), (14, 24)])
def test_spectrum_is_accurate_at_its_small_end(m, n):
    """C spans 1e6, against a reference of 60 digits."""
    W, C = random(m, n), rotated(torch.logspace(0, -6, n))
    context = DampedCovariance(C, 1e-9)
    sigma = spectrum(W, context)
    with mpmath.workdps(60):
        C_d = mpmath.matrix(C.tolist()) + context.damping * mpmath.eye(n)
        reference = mpmath.svd_r(mpmath.matrix(W.tolist()) * C_d, compute_uv=False)
        errors = [abs(mpmath.mpf(s) / reference[i] - 1) for i, s in enumerate(sigma.tolist())]
    assert sigma.shape == (min(m, n),)
    assert max(errors) < 1e-8


@pytest.mark.parametrize("power", [1, 0.5, 0])
def test_spectrum_holds_the_values_of_the_factors(power):
    """What ``factorize`` adapts are the ends of this spectrum."""
    W, C = random(24, 30), rotated(0.8 ** torch.arange(30.0))
    sigma = spectrum(W, DampedCovariance(C, 0.01), power)
    for mode, part in (("ipm", sigma[:5]), ("kpm", sigma[-5:])):
        found = factorize(W, C, 5, CordaInit(mode=mode, power=power, solver="exact"))
        assert_same_as_reference(found.sigma, part, relative=1e-8)


def test_spectrum_of_a_rank_deficient_weight_ends_in_zeros():
    """Null directions are the smallest components."""
    sigma = spectrum((random(12, 4) @ random(4, 20)).float(), DampedCovariance(rotated(torch.ones(20)), 0.01))
    assert (sigma[4:] < 1e-6 * sigma[0]).all()
    assert sigma[3] > 0.01 * sigma[0]


@pytest.mark.parametrize("power", [1, 0.5, 0])
@pytest.mark.parametrize(("m", "n"), [(12, 20), (16, 16), (24, 10)])
def test_component_energies_are_output_changes(m, n, power):
    """|u u^T W X|_F^2 one by one, and together tr(W C W^T)."""
    W, X = random(m, n), random(n, 50, seed=1) * torch.linspace(0.1, 5, n, dtype=torch.float64)[:, None]
    C = X @ X.T
    found = component_energies(W, C, power=power)
    values, vectors = torch.linalg.eigh(C + 0.01 * C.diagonal().mean() * torch.eye(n, dtype=C.dtype))
    U = torch.linalg.svd(W @ (vectors * values**power) @ vectors.T, full_matrices=False).U
    literal = torch.stack([(u[:, None] @ (u[None] @ W @ X)).square().sum() for u in U.T])
    assert_same_as_reference(found, literal, relative=1e-9)
    assert found.sum().item() == pytest.approx((W @ C @ W.T).trace().item())


@settings(max_examples=25, deadline=None)
@given(scales=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=4), m=st.integers(1, 9), seed=st.integers(0, 99))
def test_multiples_of_the_identity_are_a_tie(scales, m, seed):
    """C_i = c_i I is broken to index 0."""
    W = random(m, 7, seed=seed)
    found = select_covariances({"a": W}, {"a": [c * torch.eye(7, dtype=torch.float64) for c in scales]})
    assert found.indices == {"a": 0}


def test_selection_score_is_its_formula():
    """Log pi times nuclear over spectral norm, of the damped and normalized C."""
    W, pool = random(9, 12), [rotated(0.6 ** torch.arange(12.0)), rotated(torch.linspace(1, 3, 12), seed=1)]
    found = select_covariances({"a": W}, {"a": pool})
    for C, score, index in zip(pool, found.scores["a"], (0, 1), strict=True):
        C_d = C + 0.01 * C.diagonal().mean() * torch.eye(12, dtype=C.dtype)
        C_d = C_d / C_d.diagonal().mean()
        pi = (9 * torch.linalg.norm(C_d, 2)).sqrt() * torch.linalg.norm(torch.linalg.inv(C_d), 2)
        M = W @ C_d
        expected = (pi.log() * torch.linalg.norm(M, "nuc") / torch.linalg.norm(M, 2)).item()
        assert score == pytest.approx(expected, rel=1e-9)
        if index == found.indices["a"]:
            assert found.compactness["a"] == pytest.approx(pi.item(), rel=1e-9)
            assert score == min(found.scores["a"])


@pytest.mark.parametrize("m", [8, 16, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_strictly_more_concentrated_candidate_wins(m, seed):
    """Where all have directions that no input uses, the fewer directions in use, the better."""
    pool = [rotated([1.0] * used + [0.0] * (16 - used), seed=seed) for used in (12, 6, 1, 3)]
    found = select_covariances({"a": random(m, 16, seed=seed)}, {"a": pool})
    assert found.indices == {"a": 2}
    assert sorted(range(4), key=found.scores["a"].__getitem__) == [2, 3, 1, 0]


def test_of_equal_compactness_the_more_concentrated_product_wins():
    """The same eigenvalues, so the same pi; along the strong directions of W they concentrate W C."""
    W = torch.diag(torch.tensor([8.0, 4, 2, 1]))
    along = torch.diag(torch.tensor([8.0, 4, 2, 1]))
    against = torch.diag(torch.tensor([1.0, 2, 4, 8]))
    assert compactness(along, 4) == compactness(against, 4)
    assert select_covariances({"a": W}, {"a": [against, along]}).indices == {"a": 1}
    assert select_covariances({"a": W}, {"a": [along, against]}).indices == {"a": 0}


def test_a_slightly_spread_candidate_loses_against_a_flat_one():
    """Our finding on Eq. 7: log pi outweighs a small gain of concentration, so the score is not monotone in it."""
    W = torch.eye(16, dtype=torch.float64)
    flat, slightly, strongly = torch.ones(16), torch.linspace(0.5, 1.5, 16), 0.3 ** torch.arange(16)
    found = select_covariances({"a": W}, {"a": [torch.diag(v.double()) for v in (slightly, flat, strongly)]})
    slight, even, strong = found.scores["a"]
    assert strong < even < slight
    assert [round(score) for score in (slight, even, strong)] == [24, 22, 10]


def test_choice_by_group_is_the_least_sum_over_its_layers():
    """Layers of one input choose alone or together."""
    weights = {name: random(8 * (i + 1), 12, seed=i) for i, name in enumerate("qkv")}
    shared = [rotated(0.55 ** torch.arange(12.0), seed=i) for i in range(3)]
    candidates = {"q": shared, "k": shared, "v": shared, "o": shared[:2]}
    weights["o"] = random(12, 12)
    groups = {"q": "q", "k": "q", "v": "q", "o": "o"}
    alone = select_covariances(weights, candidates)
    together = select_covariances(weights, candidates, groups=groups, per="group")
    assert together.scores == alone.scores
    assert alone.indices == {name: min(range(len(s)), key=s.__getitem__) for name, s in alone.scores.items()}
    assert len({alone.indices[name] for name in "qkv"}) > 1
    sums = [sum(alone.scores[name][i] for name in "qkv") for i in range(3)]
    assert together.indices == {**dict.fromkeys("qkv", sums.index(min(sums))), "o": alone.indices["o"]}


def candidates_of(model, batches, targets):
    return [collect_context(model, [batch], targets) for batch in batches]


LORA = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


@pytest.mark.parametrize("per", ["layer", "group"])
def test_selected_statistics_serve_as_any_others(llama, batches, per):
    """Candidate 0 is the pooled sum, and each layer is solved with the candidate of its index."""
    config = LoraConfig(**LORA)
    targets = list(resolve_targets(llama, config))
    pool = candidates_of(llama, batches, targets)
    found = select_context(llama, config, pool, per=per)
    whole = [collect_context(llama, batches, targets), *pool]
    factors = build_factors(llama, found.stats, config).factors
    literal = select_covariances(
        {name: llama.get_submodule(name).weight for name in targets},
        {name: [stats.covariance(name) for stats in whole] for name in targets},
        groups=whole[0].groups,
        per=per,
    )
    assert found.selection.indices == literal.indices
    assert list(factors) == list(found.selection.indices) == targets
    assert len(set(found.selection.indices.values())) > 1
    assert set(found.stats.moments) == set(found.stats.groups.values())
    for name, index in found.selection.indices.items():
        C = whole[index].covariance(name)
        assert_same_as_reference(found.stats.covariance(name), C, relative=1e-12)
        alone = factorize(llama.get_submodule(name).weight.detach(), C, 4, scaling=1.5)
        assert_same_as_reference(factors[name].B @ factors[name].A, alone.B @ alone.A, relative=1e-4)
        if per == "group":
            assert index == found.selection.indices[whole[0].groups[name]]
            assert found.stats.groups[name] == whole[0].groups[name]


@pytest.mark.parametrize("mode", MODES)
def test_from_statistics_to_an_adapter_within_the_budget(llama, batches, mode):
    """The ranks reach peft, the number of trained parameters is that of the allocation, and the
    model still computes what it did."""
    config, init = LoraConfig(**LORA), CordaInit(mode=mode)
    stats = collect_context(llama, batches, list(resolve_targets(llama, config)))
    layers = layer_spectra(llama, stats, config, init)
    budget = uniform_budget(layers.shapes, 4)
    ranks = allocate_ranks(layers.spectra, layers.compactness, layers.shapes, budget, mode)
    assert len(set(ranks.values())) > 1
    ranked = with_ranks(llama, config, ranks)
    llama.eval()
    with torch.no_grad():
        before = llama(**batches[0]).logits
        wrapped = apply_corda(llama, build_factors(llama, stats, ranked, init), ranked)
        after = wrapped(**batches[0]).logits
    assert_same_as_reference(after, before, relative=1e-4)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == sum(rank * sum(layers.shapes[name]) for name, rank in ranks.items())
    assert 0 < (trained - budget if mode == "kpm" else budget - trained) <= 80


def test_layer_spectra_are_those_of_the_single_functions(llama, batches):
    """Sharing the work of a group changes nothing."""
    config = LoraConfig(**LORA)
    stats = collect_context(llama, batches, list(resolve_targets(llama, config)))
    found = layer_spectra(llama, stats, config)
    assert list(found.spectra) == list(found.compactness) == list(found.shapes) == stats.targets
    for name in stats.targets:
        weight, C = llama.get_submodule(name).weight, stats.covariance(name)
        assert found.shapes[name] == tuple(weight.shape)
        assert torch.equal(found.spectra[name], spectrum(weight, DampedCovariance(C, 0.01)))
        assert found.compactness[name] == compactness(C, weight.shape[0])


class Nested(nn.Module):
    """Names of which one ends in another, and one that a dot as a regular expression would find too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "inner": nn.ModuleDict({"fc": nn.Linear(8, 8)})})
        self.block_fc = nn.Linear(8, 8)
        self.blockxfc = nn.Linear(8, 8)

    def forward(self, x):
        return self.block_fc(self.block["inner"]["fc"](self.block["fc"](self.fc(self.blockxfc(x)))))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_each_layer_its_rank_at_its_old_scaling(rslora, tmp_path):
    """Full names, escaped and anchored, also where a name ends in another one, and after saving."""
    targets = ["fc", "block_fc", "blockxfc"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=rslora, alpha_pattern={"block_fc": 3})
    model = Nested()
    before = resolve_targets(model, config)
    ranks = {name: rank for rank, name in enumerate(before, start=1)}
    ranked = with_ranks(model, config, ranks)
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {"block_fc": 3})
    wrapped = get_peft_model(model, ranked)
    wrapped.save_pretrained(tmp_path)
    for adapted in (wrapped, PeftModel.from_pretrained(Nested(), tmp_path)):
        layers = lora_layers(adapted)
        assert {name: layer.lora_A["default"].weight.shape[0] for name, layer in layers.items()} == ranks
        for name, layer in layers.items():
            assert layer.scaling["default"] == pytest.approx(before[name].scaling, rel=1e-12)


def test_uniform_allocation_spends_what_the_budget_holds():
    """The same rank everywhere, the largest that fits."""
    shapes = {"a": (8, 12), "b": (16, 8)}
    assert uniform_budget(shapes, 3) == 3 * (20 + 24)
    for rank in (1, 3, 8):
        for more in (0, 43):
            assert allocate_uniform(shapes, uniform_budget(shapes, rank) + more) == {"a": rank, "b": rank}
    for budget, complaint in ((43, "budget 43 gives rank 0.*expected 1 to 8"), (9 * 44, "gives rank 9.*layer a")):
        with pytest.raises(UserError, match=complaint):
            allocate_uniform(shapes, budget)
    with pytest.raises(UserError, match="rank 9 for all layers: expected 1 to 8, the size of layer a"):
        uniform_budget(shapes, 9)


@pytest.mark.parametrize("mode", MODES)
def test_budgets_that_cannot_be_crossed_are_refused_with_those_that_can(mode):
    """Both ends work, one parameter beyond either does not."""
    shapes = {"a": (8, 12), "b": (16, 8)}
    spectra = {name: spectrum(random(*shape), None, 0) for name, shape in shapes.items()}
    pis = {"a": 5.0, "b": 6.0}
    low, high = limits(list(shapes.values()), mode)
    smallest, largest = (allocate_ranks(spectra, pis, shapes, budget, mode) for budget in (low, high))
    if mode == "kpm":
        assert sorted(smallest.values()) == [1, 2]
        assert set(largest.values()) == {8}
    else:
        assert set(smallest.values()) == {1}
        assert sorted(largest.values()) == [6, 7]
    for budget, what in ((low - 1, "small"), (high + 1, "large")):
        with pytest.raises(UserError, match=f"budget {budget} is too {what} .* mode {mode}: expected {low} to {high}"):
            allocate_ranks(spectra, pis, shapes, budget, mode)


def test_bad_inputs_of_the_allocation_are_named():
    shapes = {"a": (8, 12), "b": (16, 8)}
    good = {name: spectrum(random(*shape), None, 0) for name, shape in shapes.items()}
    pis = {"a": 5.0, "b": 6.0}

    def refuses(complaint, spectra=good, pis=pis, shapes=shapes, mode="kpm", kind=UserError):
        with pytest.raises(kind, match=complaint):
            allocate_ranks(spectra, pis, shapes, 100, mode)

    refuses("unknown mode 'kpn': did you mean kpm?", mode="kpn")
    refuses("layer b is in the spectra but not in the pis: known: a", pis={"a": 5.0})
    refuses("layer c is in the shapes but not in the singular values", shapes={**shapes, "c": (4, 4)})
    refuses("no layer to give ranks to", spectra={}, pis={}, shapes={})
    refuses(
        r"layer b: singular values of shape \(7,\), expected \(8,\) of a 16 x 8", spectra={**good, "b": good["b"][1:]}
    )
    refuses("layer b: its singular values do not descend", spectra={**good, "b": good["b"].flip(0)})
    refuses("layer b: its singular values must be 0 or more, and not all 0", spectra={**good, "b": torch.zeros(8)})
    refuses("layer b: its singular values hold NaN", spectra={**good, "b": good["b"] * math.nan}, kind=NonFiniteError)
    refuses("layer a: compactness 0.5, expected 1 or more", pis={**pis, "a": 0.5})
    refuses("layer a: its compactness is NaN", pis={**pis, "a": math.nan}, kind=NonFiniteError)
    with pytest.raises(UserError, match="layer c has one component only: mode ipm leaves it no rank"):
        allocate_by_energy({"c": torch.ones(1)}, {"c": (1, 8)}, 9, "ipm")


def test_bad_inputs_of_the_selection_are_named(llama, batches):
    W, C = random(6, 5), torch.eye(5)
    for complaint, weights, candidates, options in (
        ("layer b is in the candidates but not in the weights", {"a": W}, {"a": [C], "b": [C]}, {}),
        ("layer a: no candidate covariance", {"a": W}, {"a": []}, {}),
        ("layer a: its weight is zero", {"a": 0 * W}, {"a": [C]}, {}),
        ("layer a: a covariance of 4 inputs does not fit a weight of 5", {"a": W}, {"a": [torch.eye(4)]}, {}),
        ("layer a: the covariance has no positive diagonal", {"a": W}, {"a": [0 * C]}, {}),
        ("unknown per 'layers': did you mean layer?", {"a": W}, {"a": [C]}, {"per": "layers"}),
        (
            "layer a: layers of its group",
            {"a": W, "b": W},
            {"a": [C], "b": [C, C]},
            {"per": "group", "groups": {"a": "a", "b": "a"}},
        ),
        ("needs the groups", {"a": W}, {"a": [C]}, {"per": "group"}),
        ("power must be 0, 0.5 or 1", {"a": W}, {"a": [C]}, {"power": 2}),
    ):
        with pytest.raises(UserError, match=complaint):
            select_covariances(weights, candidates, **options)
    with pytest.raises(NonFiniteError, match="layer a: the weight holds NaN"):
        select_covariances({"a": W * math.nan}, {"a": [C]})
    config = LoraConfig(**LORA)
    pool = candidates_of(llama, batches, list(resolve_targets(llama, config)))
    with pytest.raises(UserError, match="at least two candidates"):
        select_context(llama, config, pool[:1])
    with pytest.raises(UserError, match="power 0 has no covariance"):
        select_context(llama, config, pool, CordaInit(power=0))
    with pytest.raises(UserError, match="no statistics of layer"):
        select_context(llama, config, candidates_of(llama, batches, ["model.layers.0.mlp.up_proj"]))
    with torch.no_grad():
        llama.lm_head.weight += 1
    with pytest.raises(UserError, match="another model"):
        select_context(llama, config, pool)
    with pytest.raises(UserError, match="another model"):
        layer_spectra(llama, pool[0], config)


def test_bad_ranks_are_named():
    model, config = Nested(), LoraConfig(target_modules=["blockxfc", "block_fc"])
    for complaint, ranks in (
        ("layer block_fc is in the targets but not in the ranks", {"blockxfc": 2}),
        ("layer fc is in the ranks but not in the targets", {"blockxfc": 2, "block_fc": 2, "fc": 1}),
        ("layer block_fc: rank 9, expected 1 to 8", {"blockxfc": 2, "block_fc": 9}),
        ("layer block_fc: rank 0, expected 1 to 8", {"blockxfc": 2, "block_fc": 0}),
    ):
        with pytest.raises(UserError, match=complaint):
            with_ranks(model, config, ranks)
