import dataclasses

import pytest
import torch
from corda import ContextStats, CordaInit, collect_context
from corda.algebra import matmul_precision
from corda.context import TargetNotReachedError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold import NonFiniteError, UserError
from tenfold.testing import assert_same_as_reference

PLAIN = CordaInit(scale="none")


class Attention(nn.Module):
    """Three projections of one input; `spoil` writes into it between two of them."""

    def __init__(self, spoil=False, n=6):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, n) for _ in range(3))
        self.o = nn.Linear(n, n)
        self.spoil = spoil

    def forward(self, x):
        x = x * 1
        q = self.q(x)
        if self.spoil:
            x.add_(1)
        return self.o(q + self.k(x) + self.v(x))


def moments_by_hand(model, batches, names, skip_first=0, scale="none"):
    """A literal loop over rows and tokens."""
    inputs = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: inputs[name].append(args[0].detach())
        )
        for name in names
    ]
    sums = {}
    model.eval()
    for batch in batches:
        for values in inputs.values():
            values.clear()
        model(**batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        for name in names:
            for row, keep in zip(inputs[name][0].double(), mask, strict=True):
                tokens = row[keep.bool()][skip_first:]
                if scale == "peft" and len(tokens):
                    tokens = tokens / tokens.max().abs()
                for token in tokens:
                    sums[name] = sums.get(name, 0) + torch.outer(token, token)
    for hook in hooks:
        hook.remove()
    return sums


@pytest.fixture
def padded():
    """The rows of a batch, padded on alternating sides."""
    ids = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("scale", ["none", "peft"])
@pytest.mark.parametrize("skip_first", [0, 2])
def test_moments_equal_a_literal_loop(llama, padded, scale, skip_first):
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    stats = collect_context(llama, [padded], names, CordaInit(scale=scale, skip_first=skip_first))
    expected = moments_by_hand(llama, [padded], names, skip_first, scale)
    for name in names:
        torch.testing.assert_close(stats.moments[stats.groups[name]], expected[name], rtol=1e-4, atol=1e-5)
        assert stats.tokens[stats.groups[name]] == int(padded["attention_mask"].sum()) - 4 * skip_first
        assert stats.samples[stats.groups[name]] == 4


def test_padding_does_not_count(llama, padded):
    """A padded batch gives the C of its rows without padding; batch 4 equals 4 batches of 1."""
    rows = [
        {"input_ids": ids[mask.bool()][None]}
        for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    rows[1] = {"input_ids": padded["input_ids"][1:2], "attention_mask": padded["attention_mask"][1:2]}
    for scale in ("token_mean", "peft"):
        together = collect_context(llama, [padded], init=CordaInit(scale=scale))
        apart = collect_context(llama, rows, init=CordaInit(scale=scale))
        for name in together.targets:
            torch.testing.assert_close(together.covariance(name), apart.covariance(name), rtol=1e-4, atol=1e-5)


def test_scales_divide_by_samples_or_tokens_or_nothing(llama, batches):
    name = "model.layers.0.mlp.gate_proj"
    none, mean, peft = (
        collect_context(llama, batches, [name], CordaInit(scale=scale)) for scale in ("none", "token_mean", "peft")
    )
    torch.testing.assert_close(mean.covariance(name) * mean.tokens[name], none.covariance(name))
    assert (mean.tokens[name], peft.samples[name]) == (3 * 48, 6)
    torch.testing.assert_close(peft.covariance(name) * 6, peft.moments[name])


def test_statistics_add_up(llama, batches):
    """Stats(a) + stats(b) = stats(a ++ b), as for two ranks; the order of the windows does not matter."""
    whole = collect_context(llama, batches)
    parts = collect_context(llama, batches[:1]) + collect_context(llama, batches[1:])
    turned = collect_context(llama, batches[::-1])
    for name in whole.targets:
        torch.testing.assert_close(parts.covariance(name), whole.covariance(name), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(turned.covariance(name), whole.covariance(name), rtol=1e-12, atol=1e-14)
    assert parts.tokens == whole.tokens


def test_chunks_equal_one_product(llama, batches, monkeypatch):
    """Chunked sums."""
    one = collect_context(llama.double(), batches, init=PLAIN)
    monkeypatch.setattr("corda.sums.CHUNK", 7)
    many = collect_context(llama, batches, init=PLAIN)
    for name in one.targets:
        torch.testing.assert_close(one.covariance(name), many.covariance(name), rtol=1e-12, atol=1e-12)


def test_siblings_of_one_input_share_one_sum(llama, batches):
    """Q, k, v share, gate and up share; the numbers equal the unshared ones bit for bit."""
    shared = collect_context(llama, batches)
    apart = collect_context(llama, batches, share=False)
    assert len(shared.moments) == 2 * 4
    assert len(apart.moments) == 2 * 7
    assert shared.groups["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"
    assert shared.groups["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    for name in shared.targets:
        assert torch.equal(shared.covariance(name), apart.covariance(name))


def test_an_input_that_is_written_into_is_not_shared():
    """K sees another input than q after an in-place change, and v shares with k."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    assert collect_context(Attention(), [x], init=PLAIN).groups == {"q": "q", "k": "q", "v": "q", "o": "o"}
    spoiled = collect_context(Attention(spoil=True), [x], init=PLAIN)
    assert spoiled.groups == {"q": "q", "k": "k", "v": "k", "o": "o"}
    flat = (x + 1).reshape(-1, 6).double()
    torch.testing.assert_close(spoiled.covariance("v"), flat.T @ flat, rtol=1e-5, atol=1e-5)


LAYERS = "abc"


class Scripted(nn.Module):
    """Runs its layers on x or y in the order of a script, one a batch; `write` changes x in place."""

    def __init__(self, scripts):
        super().__init__()
        torch.manual_seed(0)
        for name in LAYERS:
            self.add_module(name, nn.Linear(3, 3))
        self.scripts = scripts
        self.batch = 0

    def forward(self, rows):
        inputs = {"x": rows * 1, "y": rows * 2}
        for step in self.scripts[self.batch]:
            if step == "write":
                inputs["x"].add_(1)
            else:
                self.get_submodule(step[0])(inputs[step[1]])
        self.batch += 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*(layer + x for layer in LAYERS for x in "xy"), "write"]), max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_sharing_changes_no_number_whatever_the_order_of_calls(scripts):
    """Layers that share at first part when their inputs do; compared with separate sums and by hand."""
    missing = [layer + "x" for layer in LAYERS if not any(layer in step[0] for script in scripts for step in script)]
    scripts = [*scripts[:-1], scripts[-1] + missing]
    batches = [torch.randn(2, 5, 3) for _ in scripts]
    model = Scripted(scripts)
    sums = dict.fromkeys(LAYERS, 0)
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: sums.update(
                {name: sums[name] + args[0].flatten(0, 1).double().T @ args[0].flatten(0, 1).double()}
            )
        )
    shared = collect_context(model, batches, init=PLAIN)
    by_hand = dict(sums)
    apart = collect_context(Scripted(scripts), batches, init=PLAIN, share=False)
    for name in LAYERS:
        assert torch.equal(shared.covariance(name), apart.covariance(name))
        assert shared.tokens[shared.groups[name]] == apart.tokens[name]
        torch.testing.assert_close(shared.covariance(name), by_hand[name], rtol=1e-5, atol=1e-5)


def test_layers_that_stop_sharing_keep_what_they_shared():
    """K and v get another input than q from the second batch on; the sums still add up over shards."""
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    model = Attention()

    def turning():
        yield x
        model.spoil = True
        yield y

    turned = collect_context(model, turning(), init=PLAIN)
    assert turned.groups == {"q": "q", "k": "k", "v": "v", "o": "o"}
    model.spoil = False
    alike = collect_context(model, [x], init=PLAIN)
    flat = torch.cat([x, x, y + 1]).reshape(-1, 6).double()
    torch.testing.assert_close((turned + alike).covariance("k"), flat.T @ flat, rtol=1e-5, atol=1e-5)
    assert (alike + turned).groups == turned.groups
    assert (alike + alike).groups == alike.groups


def test_a_layer_may_be_reached_first_in_a_later_batch():
    model = Scripted([["ax"], ["bx", "cx"]])
    x = torch.ones(1, 2, 3)
    stats = collect_context(model, [x, x], init=PLAIN)
    assert (stats.groups, stats.tokens) == ({"a": "a", "b": "b", "c": "b"}, {"a": 2, "b": 2})


def test_a_module_called_twice_counts_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4)
    stats = collect_context(model, [x, x], init=PLAIN)
    with torch.no_grad():
        both = torch.cat([x, model.layer(x)]).double()
    torch.testing.assert_close(stats.covariance("layer"), 2 * both.T @ both, rtol=1e-5, atol=1e-6)
    assert stats.tokens["layer"] == 12


def test_nothing_is_left_on_the_model(llama, batches):
    """Our hooks go, the user's stay, flags return, no attribute stays, also when the forward raises."""
    seen = []
    llama.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(1))
    llama.model.layers[1].eval()
    flags = {name: module.training for name, module in llama.named_modules()}
    attributes = {name: set(vars(module)) for name, module in llama.named_modules()}

    def check():
        assert {name: module.training for name, module in llama.named_modules()} == flags
        assert {name: set(vars(module)) for name, module in llama.named_modules()} == attributes
        assert sum(len(module._forward_pre_hooks) for module in llama.modules()) == 1

    collect_context(llama, batches)
    check()
    assert len(seen) == 3
    with pytest.raises(ValueError, match="specify exactly one of input_ids"):
        collect_context(llama, [*batches, {"no_such_argument": 1}])
    check()


def test_data_may_be_a_function_that_runs_the_model(llama, batches):
    def run_model():
        for batch in batches:
            for row in batch["input_ids"]:
                llama(row[None])

    by_function = collect_context(llama, run_model)
    by_batches = collect_context(llama, batches)
    for group, moment in by_batches.moments.items():
        torch.testing.assert_close(by_function.moments[group], moment, rtol=1e-5, atol=1e-6)


class Wide(nn.Module):
    """Two siblings of few outputs and one of many inputs, with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.k, self.v = nn.Linear(8, 2), nn.Linear(8, 3)
        self.mlp = nn.Sequential(nn.Linear(5, 24), nn.Linear(24, 4))

    def forward(self, x):
        return self.mlp(torch.cat([self.k(x), self.v(x)], dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", ["cov", "cross"])
@pytest.mark.parametrize("scale", ["peft", "none"])
def test_half_precision_inputs_lose_nothing(dtype, accumulate, scale):
    """Whole numbers, whose sums fp32 holds exactly: nothing is rounded but the factor 1 / max^2, in fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 8, (3, 40, 8), generator=generator)
    x[1] //= 3  # no power of 2 among the largest: 7, 2 -> 6
    x[1] *= 3
    model = nn.Sequential(nn.Linear(8, 5)).to(dtype)
    model[0].weight.data = torch.randint(-3, 4, (5, 8), generator=generator).to(dtype)
    stats = collect_context(model, [x.to(dtype)], init=CordaInit(scale=scale, accumulate=accumulate))
    C = torch.zeros(8, 8, dtype=torch.float64)
    for row in x.double():
        weight = 1 / row.max() ** 2 if scale == "peft" else 1.0
        for token in row:
            C += weight * torch.outer(token, token)
    expected = C if accumulate == "cov" else model[0].weight.detach().double() @ C
    assert_same_as_reference(stats.moments["0"], expected, relative=1e-14)
    if accumulate == "cross":
        assert stats.traces["0"] == pytest.approx(C.trace().item(), rel=1e-6)


@pytest.mark.parametrize("scale", ["peft", "token_mean", "none"])
def test_cross_moments_equal_products_with_the_covariance(llama, padded, scale, tmp_path):
    """W C and tr C of every layer, tall ones too; kept, added up and saved as covariances are."""
    llama.double()
    cov, cross = (
        collect_context(llama, [padded], init=CordaInit(scale=scale, accumulate=accumulate))
        for accumulate in ("cov", "cross")
    )
    cross.save(tmp_path / "cross.safetensors")
    twice = cross + ContextStats.load(tmp_path / "cross.safetensors")
    for name in cov.targets:
        C, W = cov.covariance(name), llama.get_submodule(name).weight.detach()
        for stats, times in ((cross, 1), (twice, 2 if scale == "none" else 1)):
            found = stats.moment(name)
            assert_same_as_reference(found.product, times * W @ C, relative=1e-10)
            assert found.trace == pytest.approx(times * C.trace().item(), rel=1e-10)
    assert twice.tokens["model.layers.0.mlp.down_proj"] == 2 * int(padded["attention_mask"].sum())
    with pytest.raises(UserError, match="has a cross moment, no covariance; collect with accumulate='cov'"):
        cross.covariance(name)
    with pytest.raises(UserError, match="another accumulate"):
        cov + cross


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("accumulate", ["cov", "cross"])
def test_products_are_exact_under_autocast_and_whatever_becomes_of_the_layers_output(accumulate, autocast):
    """A layer's own output may serve as W x; not when it is rounded, nor after what somebody's hook makes of it."""
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 2))
    doubled = model[0].register_forward_hook(lambda layer, given, output: 2 * output)
    x = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stats = collect_context(model, [x], ["0"], CordaInit(accumulate=accumulate, scale="none"))
    tokens = x.flatten(0, 1).double()
    C = tokens.T @ tokens
    expected = C if accumulate == "cov" else model[0].weight.detach().double() @ C
    assert_same_as_reference(stats.moments["0"], expected, relative=1e-6)
    assert list(model[0]._forward_hooks) == [doubled.id]


def test_auto_takes_cross_moments_where_they_are_smaller_and_nobody_else_needs_more():
    x = [torch.randn(2, 5, 8)]

    def crossed(reusable=False, **init):
        stats = collect_context(Wide(), x, init=CordaInit(**init), reusable=reusable)
        assert all(stats.groups[name] == name for name in stats.traces)
        return sorted(stats.traces)

    assert crossed() == ["k", "mlp.1", "v"]
    assert crossed(reusable=True) == crossed(accumulate="cov") == crossed(power=0.5) == []
    assert crossed(reusable=True, accumulate="cross") == ["k", "mlp.0", "mlp.1", "v"]
    tall = Wide()
    tall.v, tall.mlp[0] = nn.Linear(8, 6), nn.Linear(8, 24)  # k and v have as many outputs as inputs
    assert collect_context(tall, x, init=CordaInit(), reusable=False).traces.keys() == {"mlp.1"}
    with pytest.raises(UserError, match="accumulate: cross serves power 1 only, expected cov for power 0.5"):
        CordaInit(accumulate="cross", power=0.5)


@pytest.mark.parametrize("accumulate", ["cov", "cross"])
def test_a_share_without_data_adds_nothing(llama, batches, accumulate):
    """As for two ranks, of which one has no data, or none that reaches every layer."""
    init = CordaInit(accumulate=accumulate)
    whole = collect_context(llama, batches, init=init)
    nothing = collect_context(llama, [], init=init, complete=False)
    for found in (whole + nothing, nothing + whole, nothing + whole + nothing):
        assert (found.groups, found.tokens, found.traces) == (whole.groups, whole.tokens, whole.traces)
        assert all(torch.equal(found.moments[group], moment) for group, moment in whole.moments.items())
    with pytest.raises(TargetNotReachedError, match="no token has reached layer model.layers.0"):
        (nothing + nothing).moment("model.layers.0.mlp.up_proj")
    assert whole.reduce() is whole, "without a process group"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="settings of torch 2.9 and later")
@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_products_do_not_depend_on_the_precision_that_the_user_allows(setting):
    before = torch.get_float32_matmul_precision()
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    try:
        torch.set_float32_matmul_precision(setting)
        own = [backend.fp32_precision for backend in backends]
        with matmul_precision(tf32=False):
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        with pytest.raises(KeyError), matmul_precision(tf32=True):
            assert backends[0].fp32_precision == "tf32"
            raise KeyError
        assert [backend.fp32_precision for backend in backends] == own
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_output_head_is_not_computed_unless_it_is_a_target(llama, batches):
    heads = []
    llama.lm_head.register_forward_hook(lambda *args: heads.append(1))
    collect_context(llama, batches)
    assert not heads
    assert "lm_head" in collect_context(llama, batches, ["lm_head", "model.layers.0.mlp.up_proj"]).moments


def test_saved_and_loaded(llama, batches, tmp_path):
    stats = collect_context(llama, batches)
    stats.save(tmp_path / "context.safetensors")
    loaded = ContextStats.load(tmp_path / "context.safetensors")
    assert dataclasses.replace(loaded, moments={}) == dataclasses.replace(stats, moments={})
    for group, moment in stats.moments.items():
        assert torch.equal(loaded.moments[group], moment)
    again = tmp_path / "again.safetensors"
    collect_context(llama, batches).save(again)
    assert again.read_bytes() == (tmp_path / "context.safetensors").read_bytes(), "files are not identical"


def test_bad_data_and_targets(llama, batches):
    with pytest.raises(UserError, match="holds no batch"):
        collect_context(llama, [])
    nothing = {"input_ids": batches[0]["input_ids"], "attention_mask": torch.zeros(2, 24, dtype=torch.long)}
    with pytest.raises(ValueError, match="no token is left after masking"):
        collect_context(llama, [nothing], init=PLAIN)
    with pytest.raises(UserError, match="did you mean"):
        collect_context(llama, batches, ["model.layers.0.self_attn.q_prj"])
    with pytest.raises(TypeError, match="Embedding; expected nn.Linear"):
        collect_context(llama, batches, ["model.embed_tokens"])


def test_a_target_that_is_never_reached_is_named():
    """As for an expert that no token is routed to."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(RuntimeError, match="never reached by the calibration data: idle"):
        collect_context(Experts(), [torch.randn(2, 4)])
    assert issubclass(TargetNotReachedError, UserError)


def test_nan_in_activations_names_layer_and_batch(llama, batches):
    with torch.no_grad():
        llama.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer model.layers.1.mlp.gate_proj, batch 0: NaN or infinity"):
        collect_context(llama, batches)


def test_statistics_of_another_model_are_refused(llama, batches):
    """The fingerprint is that of the weights."""
    stats = collect_context(llama, batches)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="another model"):
        stats.check_model(llama)
    with pytest.raises(UserError, match="another fingerprint"):
        stats + collect_context(llama, batches)
    with pytest.raises(UserError, match="no statistics of layer nowhere"):
        stats.covariance("nowhere")
