"""The model of the demonstration and what it reads: facts and text, character by character, learned from scratch.

Facts are names of Unicode characters, one per line; text is Python's documentation, code the source of its standard library.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corda.texts import standard_library_code, unicode_names
from tenfold import NonFiniteError, datasets
from tenfold.terminal import track

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

DATA = f"real: {datasets.topics()}; {standard_library_code()}; facts from {unicode_names().source}"
LENGTH = 128
"""Characters (tokens) of a window."""
ROWS = {"facts": 5, "text": 3}
"""Windows of a training batch."""
MEASURED_WINDOWS = 48
"""Windows of held-out text that a loss is the mean of."""


@cache
def tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of one token per character: printable ASCII and the newline, <unk> for everything else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "\n", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))  # noqa: S106
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", clean_up_tokenization_spaces=False)  # type: ignore[no-untyped-call]  # noqa: S106


def encode(text: str) -> Tensor:
    """Token ids (T,) of a text."""
    return torch.tensor(tokenizer()(text)["input_ids"])


@cache
def texts(kind: str) -> dict[str, str]:
    """Distinct paragraphs of the documentation ("text") or of Python source ("code"), in two parts.

    Nine tenths train and calibrate, the last tenth is measured.
    """
    source = {"text": datasets.topics, "code": standard_library_code}[kind]()
    paragraphs = list(dict.fromkeys(source.text.split("\n\n")))
    cut = len(paragraphs) * 9 // 10
    return {"calibration": "\n\n".join(paragraphs[:cut]), "measured": "\n\n".join(paragraphs[cut:])}


@cache
def token_ids(kind: str) -> dict[str, Tensor]:
    """Tokens (T,) of ``texts``, by part."""
    return {part: encode(text) for part, text in texts(kind).items()}


def halves(facts: int, seed: int) -> dict[str, list[str]]:
    """Facts in two halves that the seed draws, "calibration" and "measured"; both are trained on."""
    lines = unicode_names(count=facts).text.splitlines()
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = {"calibration": order[: len(lines) // 2], "measured": order[len(lines) // 2 :]}
    return {part: [lines[i] for i in sorted(chosen)] for part, chosen in parts.items()}


def fact_windows(facts: Sequence[str], count: int, generator: torch.Generator) -> Tensor:
    """Windows (count, LENGTH) of facts, one per line, in random order; each begins with a newline and a fact."""
    windows = [""]
    while len(windows) <= count:
        for i in torch.randperm(len(facts), generator=generator).tolist():
            windows[-1] += "\n" + facts[i]
            if len(windows[-1]) >= LENGTH:
                windows.append("")
    return encode("".join(window[:LENGTH] for window in windows[:count])).view(count, LENGTH)


def text_windows(kind: str, part: str, count: int, generator: torch.Generator) -> Tensor:
    """Windows (count, LENGTH) of running text or code at random places."""
    text = token_ids(kind)[part]
    starts = torch.randint(len(text) - LENGTH, (count,), generator=generator)
    return text[starts[:, None] + torch.arange(LENGTH)]


def train(facts: dict[str, list[str]], seed: int, steps: int, *, quiet: bool = False) -> "LlamaForCausalLM":
    """A Llama of 0.6 million parameters, trained from scratch on facts and text.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message gives the step.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.08,  # about 1 / sqrt(128); the usual 0.02 is meant for wider models and learns later
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    generator = torch.Generator().manual_seed(seed)
    known = fact_windows(facts["calibration"] + facts["measured"], steps * ROWS["facts"], generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    batches = known.view(steps, ROWS["facts"], LENGTH)
    for step, rows in enumerate(track(batches, f"seed {seed}: training a small Llama", steps, quiet=quiet)):
        ids = torch.cat([rows, text_windows("text", "calibration", ROWS["text"], generator)])
        loss = token_loss(model(input_ids=ids, use_cache=False).logits, ids)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"training the small Llama: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy (nats per character) of the next token; targets (B, L) of -100 do not count."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


@torch.no_grad()
def losses(model: nn.Module, facts: Sequence[str], windows: int | None = None) -> dict[str, float]:
    """Loss (nats per character) of the facts' names, percentage of facts known, and loss of the held-out text.

    A fact is known when each character of its name, and the newline after it, is the likeliest given those before.
    """
    targets = nn.utils.rnn.pad_sequence([encode(f"\n{line}\n") for line in facts], True, -100)
    ids = targets.clamp_min(0)
    for row, line in zip(targets, facts, strict=True):
        row[: 1 + line.index("-> ") + 3] = -100  # the code point is given
    logits = model(input_ids=ids, use_cache=False).logits
    right = (logits[:, :-1].argmax(dim=2) == targets[:, 1:]) | (targets[:, 1:] == -100)
    return {
        "facts loss": token_loss(logits, targets).item(),
        "facts known": 100 * right.all(dim=1).double().mean().item(),
        "text loss": held_out_loss(model, "text", windows or MEASURED_WINDOWS),
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, kind: str, count: int) -> float:
    """Loss (nats per character) of evenly spaced windows of the text or code that is neither trained on nor calibrated on."""
    text = token_ids(kind)["measured"]
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[:: len(windows) // count][:count]
    return token_loss(model(input_ids=windows, use_cache=False).logits, windows).item()
