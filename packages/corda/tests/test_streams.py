"""Which tokens count: masks of every form, labels, functions, experts, and what cannot be told."""

import copy
import warnings

import pytest
import torch
from corda import CordaInit, collect_context, get_corda_model, stream_factors
from corda.context import TargetNotReachedError
from corda.rows import matching_rows
from corda_families import RoutedModel, alone, bart, ids, llama, made, moments_alone, together, whisper
from peft import LoraConfig
from torch import nn

from tenfold import UserError


@pytest.fixture(scope="module")
def decoder():
    """A tiny Llama, its samples and their padded batch."""
    model, samples = made(llama)
    return model, samples, together(samples)


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def assert_equal(found, expected, names=NAMES):
    for name in names:
        expected_moment = expected.covariance(name) if hasattr(expected, "covariance") else expected[name]
        torch.testing.assert_close(found.covariance(name), expected_moment, rtol=1e-6, atol=1e-9)


def causal(mask):
    """(B, 1, T, T), True where a query sees a key."""
    size = mask.shape[1]
    return torch.ones(size, size, dtype=torch.bool).tril() & mask.bool()[:, None, None]


def added(seen):
    """As a model adds it to its scores."""
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)


def test_padding_does_not_count_whichever_part_of_the_model_the_users_function_runs(decoder):
    model, samples, batch = decoder
    expected, _ = moments_alone(model, samples, NAMES)
    for run_model in (
        lambda: model(**batch),
        lambda: model.model(**batch),
        lambda: model.model(
            inputs_embeds=model.model.embed_tokens(batch["input_ids"]), attention_mask=batch["attention_mask"]
        ),
        lambda: [model(**alone(sample)) for sample in samples],
    ):
        assert_equal(collect_context(model, run_model, NAMES), expected)


@pytest.mark.parametrize("form", [causal, lambda mask: added(causal(mask))])
def test_a_mask_of_four_dimensions_says_which_tokens_are_padding(decoder, form):
    model, samples, batch = decoder
    expected, _ = moments_alone(model, samples, NAMES)
    given = {"input_ids": batch["input_ids"], "attention_mask": form(batch["attention_mask"])}
    assert_equal(collect_context(model, [given], NAMES), expected)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden_states, attention_mask=None):
        return self.fc(hidden_states)


class Padding(nn.Module):
    """Pads to a multiple of four tokens, and gives its inner module what is added to the scores, as Longformer does."""

    def __init__(self, seen, hidden):
        super().__init__()
        self.encoder, self.seen, self.hidden = Inner(), seen, hidden

    def forward(self, inputs_embeds, attention_mask):
        more = -attention_mask.shape[1] % 4
        mask = nn.functional.pad(attention_mask, (0, more))
        added = torch.where(mask.bool(), self.seen, self.hidden)
        return self.encoder(nn.functional.pad(inputs_embeds, (0, 0, 0, more)), attention_mask=added)


@pytest.mark.parametrize(("seen", "hidden"), [(0.0, -1e4), (0.0, float("-inf")), (1e4, -1e4), (1.0, 0.0), (0.5, 0.0)])
def test_a_mask_inside_of_a_model_may_be_what_is_added_to_the_scores(seen, hidden):
    x = torch.randn(2, 6, 4)
    mask = (torch.arange(6) < torch.tensor([6, 3])[:, None]).long()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = collect_context(Padding(seen, hidden), [{"inputs_embeds": x, "attention_mask": mask}], ["encoder.fc"])
    assert stats.tokens == {"encoder.fc": 9}
    alone_ = collect_context(
        Padding(seen, hidden),
        [{"inputs_embeds": x[i, None, :n], "attention_mask": torch.ones(1, n)} for i, n in ((0, 6), (1, 3))],
        ["encoder.fc"],
    )
    torch.testing.assert_close(stats.covariance("encoder.fc"), alone_.covariance("encoder.fc"))


@pytest.mark.parametrize("skip_first", [0, 1])
def test_only_tokens_with_a_label_count_if_that_is_asked_for(decoder, skip_first):
    model, samples, batch = decoder
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    init = CordaInit(skip_first=skip_first)
    by_labels = collect_context(model, [{**batch, "labels": labels}], NAMES, init, tokens="labels")
    by_function = collect_context(
        model, [{**batch, "labels": labels}], NAMES, init, tokens=lambda given: given["labels"] != -100
    )
    expected, tokens = moments_alone(model, samples, NAMES, lambda name, sample, found: found[2 + skip_first :])
    assert_equal(by_labels, expected)
    assert_equal(by_function, expected)
    assert by_labels.tokens[NAMES[1]] == tokens[NAMES[1]]
    with pytest.raises(UserError, match="tokens='labels': batch 0 holds no labels"):
        collect_context(model, [batch], NAMES, tokens="labels")
    with pytest.raises(UserError, match="tokens: expected all, labels or a function"):
        collect_context(model, [batch], NAMES, tokens="some")
    with pytest.raises(UserError, match=r"tokens: a mask of \(3, 2\) for tokens of \(3, 9\)"):
        collect_context(model, [batch], NAMES, tokens=lambda given: torch.ones(3, 2))


def test_streamed_and_in_one_call_the_same_tokens_count(decoder):
    model, _, batch = decoder
    labels = batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.5, -100)
    data, config = [{**batch, "labels": labels}], LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    streamed = stream_factors(model, data, config, CordaInit(mode="ipm"), tokens="labels")
    stats = collect_context(model, data, list(streamed.targets), CordaInit(mode="ipm"), tokens="labels", reusable=False)
    wrapped = get_corda_model(
        copy.deepcopy(model), config, data, CordaInit(mode="ipm"), attach="anchor", tokens="labels"
    )
    for name, found in streamed.factors.items():
        layer = wrapped.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.lora_A["default"].anchor, found.A, rtol=1e-4, atol=1e-6)
        assert stats.tokens[stats.groups[name]] < int(batch["attention_mask"].sum())


@pytest.fixture(scope="module")
def translator():
    return made(bart)


def test_a_decoder_sees_its_own_mask_and_keys_and_values_that_of_the_encoder(translator):
    """Also where encoder and decoder have tokens of the same number, and the padding is elsewhere."""
    model, _ = translator
    samples = [{"input_ids": ids(a, a), "decoder_input_ids": ids(b, b)} for a, b in ((8, 3), (5, 8), (4, 6))]
    batch = {
        key: nn.utils.rnn.pad_sequence([sample[key] for sample in samples], True)
        for key in ("input_ids", "decoder_input_ids")
    }
    lengths = {"attention_mask": (8, 5, 4), "decoder_attention_mask": (3, 8, 6)}
    batch |= {key: (torch.arange(8) < torch.tensor(found)[:, None]).long() for key, found in lengths.items()}
    names = ["model.encoder.layers.1.fc1", "model.decoder.layers.1.self_attn.q_proj", "model.decoder.layers.1.fc2"]
    names += ["model.decoder.layers.0.encoder_attn.k_proj", "model.decoder.layers.0.encoder_attn.out_proj", "lm_head"]
    names = [name for name in names if name != "lm_head"]  # tied to the embedding
    expected, _ = moments_alone(model, samples, names)
    assert_equal(collect_context(model, [batch], names), expected, names)


def test_a_decoder_that_is_given_nothing_is_calibrated_on_the_source_with_a_warning(translator):
    model, samples = translator
    with pytest.warns(
        UserWarning, match="neither labels nor decoder_input_ids: the decoder is calibrated on the source"
    ):
        collect_context(model, [{"input_ids": samples[0]["input_ids"][None]}])


def test_sound_without_a_mask_counts_whole():
    model, samples = made(whisper)
    sound = [{key: value for key, value in sample.items() if key != "attention_mask"} for sample in samples]
    names = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"]
    expected, _ = moments_alone(model, sound, names)
    assert_equal(collect_context(model, [together(sound) | {}], names), expected, names)


class Pooled(nn.Module):
    """Rows that no mask speaks of: the mean of two tokens of each sample at a time."""

    def __init__(self, every=2):
        super().__init__()
        self.every, self.first, self.after = every, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states, attention_mask=None):
        return self.after(self.first(hidden_states).unflatten(1, (-1, self.every)).mean(2).flatten(0, 1))


def test_what_cannot_be_told_is_one_warning_with_the_layers_name():
    x = torch.randn(3, 8, 4)
    mask = (torch.arange(8) < torch.tensor([8, 6, 4])[:, None]).long()
    model = Pooled()
    with pytest.warns(UserWarning, match="layer after: its input of 12 rows fits no sample or mask") as caught:
        stats = collect_context(model, [{"hidden_states": x, "attention_mask": mask}] * 2)
    assert len([found for found in caught if "fits no" in str(found.message)]) == 1
    assert stats.tokens == {"first": 36, "after": 24}


def test_rows_of_one_dimension_are_samples_unless_peft_would_have_taken_them_for_tokens():
    rows = torch.randn(5, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apart = collect_context(model, [row[None] for row in rows])
    together_ = collect_context(model, [rows])
    for name in ("0", "1"):
        torch.testing.assert_close(together_.covariance(name), apart.covariance(name), rtol=1e-5, atol=1e-6)
        assert together_.samples[name] == 5
    one = collect_context(model, [rows], rows_are_tokens=True)
    torch.testing.assert_close(
        one.covariance("0"), (rows / rows.max().abs()).double().T @ (rows / rows.max().abs()).double()
    )
    assert one.samples["1"] == 1


def test_equal_rows_are_matched_in_their_order():
    source = torch.tensor([[1.0, 2], [3, 4], [1, 2], [5, 6]])
    assert matching_rows(source[[2, 1, 0]], source).tolist() == [0, 1, 2]
    assert matching_rows(torch.tensor([[1.0, 2], [7, 8]]), source) is None
    assert matching_rows(torch.tensor([[5.0, 6], [5, 6]]), source) is None, "twice, but there is one"


def test_an_expert_that_nobody_is_routed_to_takes_the_sums_of_its_block_with_a_warning():
    """One token goes to two of four experts."""
    torch.manual_seed(0)
    model = RoutedModel().double()
    block = model.layers[0].block_sparse_moe.experts
    reached = set()
    for number, expert in enumerate(block):
        expert.register_forward_pre_hook(lambda layer, args, number=number: reached.add(number))
    names = [f"layers.0.block_sparse_moe.experts.{n}.{w}" for n in range(4) for w in ("w1", "w2", "w3")]
    with pytest.warns(UserWarning, match=r"no token was routed to .*experts\.\d\.w1.* \(6 layers\)") as caught:
        stats = collect_context(model, [{"input_ids": ids(1, 1)[None]}], names)
    assert sum("no token was routed" in str(found.message) for found in caught) == 1
    assert len(reached) == 2
    idle = min({0, 1, 2, 3} - reached)
    for w in ("w1", "w2"):
        found = [stats.groups[f"layers.0.block_sparse_moe.experts.{n}.{w}"] for n in (idle, *sorted(reached))]
        torch.testing.assert_close(stats.moments[found[0]], stats.moments[found[1]] + stats.moments[found[2]])
        assert stats.samples[found[0]] == 2
    with pytest.raises(TargetNotReachedError, match="exclude_modules"):
        collect_context(model, [{"input_ids": ids(1, 1)[None]}], [f"layers.0.block_sparse_moe.experts.{idle}.w1"])


@pytest.mark.parametrize("form", ["{}", "expert_{}"])
def test_experts_are_known_by_their_number_whatever_the_model_calls_them(form):
    """Switch's and NLLB's are ``experts.expert_3``."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleDict({form.format(n): nn.Sequential(nn.Linear(4, 4)) for n in range(3)})

        def forward(self, hidden_states):
            return self.experts[form.format(1)](hidden_states)

    with pytest.warns(UserWarning, match=r"no token was routed to .*\(2 layers\)"):
        stats = collect_context(Block(), [torch.randn(1, 5, 4)])
    torch.testing.assert_close(
        stats.covariance(f"experts.{form.format(0)}.0"), stats.covariance(f"experts.{form.format(1)}.0")
    )


def test_a_sample_that_outweighs_the_others_is_named():
    x = torch.randn(5, 6, 4)
    x[3] = -x[3].abs() - 0.1
    x[3, 0, 0] = 1e-4
    with pytest.warns(UserWarning, match=r"sample 3 of batch 0 has \d+ times the usual weight in layer 0"):
        collect_context(nn.Sequential(nn.Linear(4, 4)), [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_context(nn.Sequential(nn.Linear(4, 4)), [x], init=CordaInit(scale="token_mean"))
