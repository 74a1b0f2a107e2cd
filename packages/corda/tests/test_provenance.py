"""What was made of what: keys and values of normalized states, rows that only look like one per sample."""

import contextlib
import copy
import warnings

import pytest
import torch
from corda import CordaInit, build_factors, collect_context, stream_factors
from corda.provenance import Provenance
from corda_families import moments_alone
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

WIDTH = 6


class KeysAndValues(nn.Module):
    """A module of its own, so that its calls are followed too."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, states):
        return self.k(states), self.v(states)


class Reader(nn.Module):
    """Attends to states that it normalizes first."""

    def __init__(self, normalize=lambda x: F.layer_norm(x, x.shape[-1:])):
        super().__init__()
        self.normalize = normalize
        self.q, self.o, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.kv = KeysAndValues()

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None):
        k, v = self.kv(self.normalize(encoder_hidden_states))
        scores = self.q(F.layer_norm(hidden_states, (WIDTH,))) @ k.transpose(1, 2)
        if encoder_attention_mask is not None:
            scores = scores.masked_fill(encoder_attention_mask[:, None] == 0, -1e9)
        hidden_states = hidden_states + self.o(scores.softmax(-1) @ v)
        return hidden_states + self.up(F.layer_norm(hidden_states, (WIDTH,)))


class Decoder(nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.layers = nn.ModuleList(Reader(*options) for _ in range(2))

    def forward(self, hidden_states, **others):
        for layer in self.layers:
            hidden_states = layer(hidden_states, **others)
        return hidden_states


class Memory(nn.Module):
    """The same under other names, with the mask of the states known from further out."""

    def __init__(self):
        super().__init__()
        self.norm, self.k, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tgt, memory):
        return tgt + self.up(tgt * 2) + self.k(self.norm(memory)).mean()


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Memory()

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None):
        return self.inner(hidden_states, encoder_hidden_states)


SIZES = ((8, 3), (5, 8), (4, 6))


def readings(own_mask=True, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "hidden_states": torch.randn(a, WIDTH, generator=generator).double(),
            "encoder_hidden_states": torch.randn(b, WIDTH, generator=generator).double(),
        }
        for a, b in sizes
    ]
    keys = ("hidden_states", "encoder_hidden_states")
    batch = {key: nn.utils.rnn.pad_sequence([sample[key] for sample in samples], True) for key in keys}
    for key, mask in zip(keys, ("attention_mask", "encoder_attention_mask"), strict=True):
        lengths = torch.tensor([len(sample[key]) for sample in samples])[:, None]
        if own_mask or key != "hidden_states":
            batch[mask] = (torch.arange(batch[key].shape[1]) < lengths).long()
    return samples, batch


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def assert_literal(model, samples, batch):
    """No warning, and the sums over each sample alone and without padding."""
    names = linear_names(model)
    expected, tokens = moments_alone(model, samples, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = collect_context(model, [batch], names)
    for name in names:
        assert stats.tokens[stats.groups[name]] == tokens[name], name
        torch.testing.assert_close(stats.covariance(name), expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("make", [Reader, Decoder, Outside, lambda: Reader(nn.LayerNorm(WIDTH))])
def test_normalized_states_keep_the_mask_of_the_states(make):
    """Both have eight tokens, with the padding elsewhere."""
    torch.manual_seed(0)
    model = make().double()
    assert_literal(model, *readings())


def test_states_with_padding_beside_tokens_without_a_mask():
    torch.manual_seed(0)
    assert_literal(Decoder().double(), *readings(own_mask=False, sizes=((8, 3), (8, 6), (8, 4))))
    assert_literal(Decoder().double(), *readings(own_mask=False, sizes=((8, 3), (8, 8), (8, 4))))


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.enable_grad, torch.inference_mode])
def test_whoever_calls_the_model_and_however(context):
    torch.manual_seed(0)
    model = Decoder().double()
    samples, batch = readings()
    names = linear_names(model)
    expected, _ = moments_alone(model, samples, names)

    def run_model():
        with context():
            model(**batch)

    stats = collect_context(model, run_model, names)
    for name in names:
        torch.testing.assert_close(stats.covariance(name), expected[name], rtol=1e-6, atol=1e-9, msg=name)


def test_streamed_block_by_block_the_same_tokens_count():
    torch.manual_seed(0)
    model = Decoder()
    _, batch = readings()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "o", "up"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed = stream_factors(model, [batch], config, CordaInit(mode="ipm"))
    hooks = build_factors(model, collect_context(model, [batch], linear_names(model)), config, CordaInit(mode="ipm"))
    for name, found in streamed.factors.items():
        torch.testing.assert_close(
            found.B @ found.A, hooks.factors[name].B @ hooks.factors[name].A, rtol=1e-4, atol=1e-5
        )


def test_states_that_have_left_torch_are_a_warning_where_the_masks_differ():
    model = Reader(lambda x: torch.from_numpy(x.numpy() * 2))
    _, batch = readings()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    with pytest.warns(UserWarning, match=r"layer kv\.k: .*fits two masks that differ") as caught:
        collect_context(model, [batch])
    assert len([found for found in caught if "fits two masks" in str(found.message)]) == 1
    batch["encoder_attention_mask"] = batch["attention_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_context(model, [batch])


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_marks_go_with_views_copies_and_what_is_written_into(mode):
    with mode(), Provenance() as provenance:
        a, b, c, buffer = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.zeros(6, 4)
        provenance.mark(a, "a")
        provenance.mark(b, "b")
        assert provenance.of(a.T[1:]) == {"a"}
        assert provenance.of((a.view(2, 6).clone().double() + 1).softmax(0)) == {"a"}
        assert provenance.of(a @ b.T) == provenance.of(torch.cat([b, a])) == {"a", "b"}
        assert provenance.of(c) == provenance.of(c * 2) == frozenset()
        buffer[:3] = b
        assert provenance.of(buffer) == {"b"}
        assert provenance.of(b) == {"b"}


# Rows that only look like one per sample


class Rows(nn.Module):
    """Gives its second layer rows in two dimensions, or with the tokens first."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen, self.first, self.after = chosen, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        return self.after(self.chosen(self.first(hidden_states))).sum()


def rows(count=3, length=8):
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def test_the_mean_of_each_sample_is_a_row_of_that_sample():
    torch.manual_seed(0)
    model, x = Rows(lambda x: x.mean(1)).double(), rows()
    assert_literal(model, [{"hidden_states": sample} for sample in x], {"hidden_states": x})
    assert collect_context(model, [{"hidden_states": x}]).samples["after"] == 3


@pytest.mark.parametrize(
    ("chosen", "length"),
    [
        (lambda x: 2 * x[0, :3], 8),  # as many rows of one sample as there are samples
        (lambda x: x.sum(0)[:3], 8),  # sums over the samples
        (lambda x: 2 * x.transpose(0, 1), 3),  # as many tokens as samples, and the tokens first
        (lambda x: (2 * x.transpose(0, 1)).flatten(0, 1), 3),
    ],
)
def test_rows_that_do_not_follow_their_samples_are_a_warning_with_the_layers_name(chosen, length):
    model = Rows(chosen).double()
    with pytest.warns(UserWarning, match="layer after: its input was taken apart by samples .* do not follow them"):
        collect_context(model, [{"hidden_states": rows(length=length)}])


def test_tokens_first_is_a_warning_for_any_number_of_tokens():
    model = Rows(lambda x: x.transpose(0, 1)).double()
    with pytest.warns(
        UserWarning, match="layer after: its input of 7 x 3 tokens does not have the batch's 3 samples first"
    ):
        collect_context(model, [{"hidden_states": rows(length=7)}])
    with pytest.warns(UserWarning, match="layer after: .* do not follow them"):
        collect_context(model, [{"hidden_states": rows(length=6)}])


def test_where_a_function_runs_the_model_it_cannot_be_checked_and_that_is_said():
    model, x = Rows(lambda x: x.mean(1)).double(), rows()
    with pytest.warns(UserWarning, match="layer after: .* where a function runs the model; give batches"):
        collect_context(model, lambda: model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect_context(model, lambda: [model(sample[None]) for sample in x])


class Gated(nn.Module):
    """A block that adds to each token what it makes of the sample's mean."""

    def __init__(self):
        super().__init__()
        self.mean, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states):
        return hidden_states + self.mean(hidden_states.mean(1))[:, None] + self.up(hidden_states)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def test_rows_inside_of_streamed_blocks_are_checked_too():
    torch.manual_seed(0)
    model, data = Stacked(), [{"hidden_states": rows().float()}] * 2
    config = LoraConfig(r=2, target_modules=["mean", "up"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed = stream_factors(copy.deepcopy(model), data, config, CordaInit(mode="ipm"))
    hooks = build_factors(model, collect_context(model, data), config, CordaInit(mode="ipm"))
    for name, found in streamed.factors.items():
        torch.testing.assert_close(
            found.B @ found.A, hooks.factors[name].B @ hooks.factors[name].A, rtol=1e-4, atol=1e-5
        )


class ScaledExperts(nn.Module):
    """Experts that are layers in lists of their own, and rows that are scaled before they get there."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.w2 = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, hidden_states):
        tokens = hidden_states.flatten(0, 1)
        parts = tokens[:5], 2 * tokens[-5:]
        return sum(self.w2[i](self.w1[i](part).relu()).sum() for i, part in enumerate(parts))


def test_an_experts_rows_are_not_taken_for_those_of_the_one_before():
    model = ScaledExperts().double()
    with pytest.warns(UserWarning, match=r"layer w1\.1: its input of 5 rows fits no sample"):
        stats = collect_context(model, [{"hidden_states": rows()}])
    assert stats.samples["w2.0"] == 1
