import multiprocessing
import sys
import warnings
from pathlib import Path

import pytest
import torch
from corda import CordaInit, build_factors, collect_context, stream_factors
from corda.factors import output_energies
from peft import LoraConfig
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tenfold import NonFiniteError, UserError
from tenfold.testing import assert_same_as_reference

sys.path.insert(0, str(Path(__file__).parent))
import ranks_run

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2}


@pytest.fixture
def blocks():
    """Three blocks in fp64, on purpose not in evaluation mode; the down projections are wide."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=1)).double().train()


@pytest.fixture
def data():
    """Batches of different lengths, one of them padded."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(64, shape, generator=generator) for shape in ((2, 24), (2, 24), (1, 13))]
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 18:] = 0
    mask[1, :3] = 0
    return [{"input_ids": ids[0], "attention_mask": mask}, {"input_ids": ids[1]}, {"input_ids": ids[2]}]


def assert_same(found, expected):
    """The same layers, and for each the same B A."""
    assert list(found.factors) == list(expected.factors)
    for name, factors in expected.factors.items():
        ours = found.factors[name]
        assert_same_as_reference(ours.B @ ours.A, factors.B @ factors.A, relative=1e-12)
        assert_same_as_reference(ours.sigma, factors.sigma, relative=1e-12)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_streaming_equals_hooks(blocks, data, mode):
    """Masks, other lengths, and the report with the energies; by block, and in passes under a budget."""
    init = CordaInit(mode=mode)
    stats = collect_context(blocks, data, init=init)
    expected = build_factors(blocks, stats, LORA, init)
    runs = []
    blocks.model.layers[1].register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    found = stream_factors(blocks, data, LORA, init, energies=True)
    by_block = len(runs)
    assert_same(found, expected)
    assert found.fingerprint == expected.fingerprint
    energies = output_energies(blocks, stats, expected)
    for name, layer in found.report()["layers"].items():
        assert layer["output_energy"] == pytest.approx(energies[name], rel=1e-9)
    runs.clear()
    tight = stream_factors(blocks, data, LORA, init, memory_budget=8 * 2 * 16 * 40)  # of down and gate; q and o
    assert_same(tight, expected)
    assert len(runs) == by_block + len(data), "block 1 went through twice for each batch"


def test_everything_is_as_before(blocks, data):
    """Our hooks go, the user's stay, flags return, no attribute stays, also when the forward raises."""
    seen = []
    blocks.model.layers[2].mlp.register_forward_hook(lambda *args: seen.append(1))
    blocks.model.layers[1].eval()

    def state():
        return {
            name: (module.training, set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in blocks.named_modules()
        }

    before = state()
    stream_factors(blocks, data, LORA)
    assert state() == before
    assert seen
    for broken in ([{"no_such_argument": 1}], [*data, {"no_such_argument": 1}]):
        with pytest.raises(ValueError, match="specify exactly one of input_ids"):
            stream_factors(blocks, broken, LORA)
        assert state() == before
    with torch.no_grad():
        blocks.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with (
        pytest.warns(UserWarning, match="gives another output"),
        pytest.raises(NonFiniteError, match=r"layers.1.mlp.gate_proj, batch 0"),
    ):
        stream_factors(blocks, data, LORA)
    assert state() == before


class Surrounded(nn.Module):
    """A stack between two layers, all of them targets: a chain, blocks that hand on more, or not always as many."""

    def __init__(self, kind="chain"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        skip = x
        for block in self.blocks[: len(x) if self.kind == "early" else None]:
            x = block(input=x)
            if self.kind == "skip":
                x, skip = x + skip, x
        if self.kind == "twice":
            x = self.blocks[0](x)
        return self.last(x)


@pytest.mark.parametrize("budget", [None, 8 * 2 * 64])
@pytest.mark.parametrize(("kind", "warning"), [("chain", None), ("skip", "another output"), ("twice", "once each")])
def test_layers_outside_of_the_stack_and_stacks_that_are_no_chain(kind, warning, budget):
    """What cannot be streamed goes through the model as a whole, and a warning says why."""
    model = Surrounded(kind)
    data = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    lora = LoraConfig(r=2, target_modules=r"first|last|blocks\.\d\.0")
    expected = build_factors(model, collect_context(model, data), lora)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = stream_factors(model, data, lora, memory_budget=budget)
    assert [warning in str(w.message) for w in caught if "not streamed" in str(w.message)] == [True] * bool(warning)
    assert_same(found, expected)


def test_a_batch_that_leaves_the_stack_early():
    lora = LoraConfig(r=2, target_modules=r"blocks\.\d\.0")
    with pytest.raises(UserError, match="a batch takes another path through blocks than the first one"):
        stream_factors(Surrounded("early"), [torch.randn(rows, 5, 6).double() for rows in (3, 2)], lora)


def test_a_function_is_called_once_for_each_pass(blocks, data):
    calls = []

    def run_model():
        calls.append(0)
        for batch in data:
            calls[-1] += 1
            blocks(**batch)

    expected = build_factors(blocks, collect_context(blocks, data), LORA)
    assert_same(stream_factors(blocks, run_model, LORA), expected)
    assert calls == [3]
    calls.clear()
    assert_same(stream_factors(blocks, run_model, LORA, memory_budget="12kB"), expected)
    assert calls == [1, 3, 3, 3], "the first one sees which layers share an input"


def test_blocks_that_get_different_arguments(data):
    """Gemma's blocks take turns in their masks and position embeddings."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = Gemma3ForCausalLM(config).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = stream_factors(model, data, LORA)
    assert_same(found, build_factors(model, collect_context(model, data), LORA))


def test_an_encoder_and_a_decoder():
    """The first block of T5 computes a bias for the others: neither stack is a chain."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).double()
    ids = torch.randint(64, (2, 12))
    data = [{"input_ids": ids, "decoder_input_ids": ids[:, :7]}]
    lora = LoraConfig(r=2, target_modules=["q", "v", "wo"], task_type="SEQ_2_SEQ_LM")
    with pytest.warns(UserWarning, match="is not streamed"):
        found = stream_factors(model, data, lora)
    assert_same(found, build_factors(model, collect_context(model, data, list(found.targets)), lora))


def test_without_statistics(blocks):
    assert_same(
        stream_factors(blocks, [], LORA, CordaInit(power=0)), build_factors(blocks, None, LORA, CordaInit(power=0))
    )


def test_bad_budgets_and_data(blocks, data):
    for size in ("6 gigs", "GB", "-1GB", "0", 0, "inf"):
        with pytest.raises(UserError, match=f"^memory_budget: .*'{size}'"):
            stream_factors(blocks, data, LORA, memory_budget=size)
    with pytest.raises(
        ValueError, match=r"of 5000 bytes: the statistics of layer model.layers.0.mlp.down_proj alone take 5120"
    ):
        stream_factors(blocks, data, LORA, memory_budget=5000)
    with pytest.raises(
        UserError, match="one pass uses the calibration data up; give a list, a DataLoader or a function"
    ):
        stream_factors(blocks, iter(data), LORA)
    with pytest.raises(UserError, match="holds no batch"):
        stream_factors(blocks, [], LORA)


def test_two_ranks_give_what_one_gives(tmp_path):
    """With processes: shares of different size and none at all, one owner for each solve, errors on both."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["corda.streaming", "peft.tuners.lora"])
    pipes = [forks.Pipe() for _ in range(2)]
    ranks = [
        forks.Process(target=ranks_run.in_group, args=(rank, tmp_path / "store", pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    outcomes = [pipe[0].recv() if pipe[0].poll(60) else None for pipe in pipes]
    for process in ranks:
        process.join(20)
        process.kill()
    alone = ranks_run.alone()
    for found in outcomes:
        assert found is not None, "a rank failed"
        assert [error.split(";")[0] for error in found["errors"]] == [
            "UserError: statistics of another scale cannot be added",
            "UserError: the ranks hold different statistics, layers or settings",
            "RuntimeError: rank 1: RuntimeError: no luck" if found["rank"] == 0 else "RuntimeError: no luck",
            "TargetNotReachedError: never reached by the calibration data: idle",
        ]
        for arm in ("reduced", "empty share", "streamed"):
            expected = alone["streamed" if arm == "streamed" else "reduced"]
            assert found[arm]["tokens"] == expected["tokens"]
            for name, product in expected["products"].items():
                assert_same_as_reference(
                    torch.tensor(found[arm]["products"][name]), torch.tensor(product), relative=1e-9
                )
        assert found["owners"] == {0, 1}
    assert outcomes[0]["reduced"] == outcomes[1]["reduced"], "bit for bit"
    assert outcomes[0]["streamed"] == outcomes[1]["streamed"]
