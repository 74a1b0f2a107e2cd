"""Batches of calibration text: windows of many tokens, or one row per text."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda.config import SEED, Calibration
from corda.records import TOKENS, Pair, Records, read_records
from corda.streams import IGNORED
from tenfold import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECE = 2**14
"""Characters that are tokenized at once."""
TEXT_PER_TOKEN = 16
"""Characters that are read per token that is needed, so that windows come from all over a long text."""

Batches = list[dict[str, Tensor]]


def calibration_batches(
    source: str | Records,
    calibration: Calibration,
    tokenizer: "PreTrainedTokenizerBase | None",
    parts: int = 1,
    *,
    seed: int = SEED,
    disjoint: bool = False,
) -> list[Batches]:
    """Batches ``{"input_ids", "attention_mask"}`` of shape (batch_size, length) for ``corda.collect_context``.

    With ``pack`` the texts are joined by blank lines and cut into windows of exactly that many tokens, as in the authors'
    code: with enough tokens, C then has full rank. Windows do not overlap if the text is long enough (our choice, since
    duplicated windows add nothing); a shorter text gives random, overlapping ones. From a text that is much longer than the
    windows, random stretches are read. Without ``pack`` each text is one row, cut at ``max_length`` and padded, with the
    padding masked. Records of tokens are joined as they are.

    Args:
        source: as for ``read_records``, or what that has read.
        calibration: how it is read.
        tokenizer: None for records of ``input_ids``.
        parts: number of lists of batches to which the windows are dealt out, in random order.
        seed: seed of the choice of windows or rows.
        disjoint: True refuses a text that is too short for windows that do not overlap.

    Returns:
        The batches of each part, on the CPU.

    Raises:
        UserError: fewer tokens than one window, fewer rows than parts, text without a tokenizer, or as for
            ``read_records`` and ``Records.texts``.
    """
    records = source if isinstance(source, Records) else read_records(source, calibration)
    shown = records.shown
    contents: list[Any] = list(records.texts(tokenizer))
    if tokenizer is None and isinstance(contents[0], str | Pair):
        raise UserError(f"{shown}: text needs a tokenizer, which the model lacks; give records of {TOKENS}")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(contents[0], Pair):
        return _pairs(contents, calibration, tokenizer, parts, generator, shown)
    if calibration.pack:
        needed = calibration.pack * calibration.windows
        if isinstance(contents[0], str):
            joined = _encode_long("\n\n".join(contents), needed, tokenizer, generator)
        else:
            joined = torch.cat(contents)
        rows = list(_windows(joined, calibration.pack, calibration.windows, generator, shown, disjoint))
    else:
        chosen = [contents[i] for i in torch.randperm(len(contents), generator=generator)[: calibration.windows]]
        limit = calibration.max_length
        if tokenizer is not None and isinstance(chosen[0], str):
            chosen = [_ids(tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in chosen]
        rows = [tokens[:limit] for tokens in chosen]
    if len(rows) < parts:
        raise UserError(f"{shown}: {len(rows)} rows cannot be split into {parts} parts")
    size = calibration.batch_size
    dealt = [rows[part::parts] for part in range(parts)]
    return [[_collate(part[start : start + size]) for start in range(0, len(part), size)] for part in dealt]


def _pairs(
    pairs: Sequence[Pair],
    calibration: Calibration,
    tokenizer: Any,
    parts: int,
    generator: torch.Generator,
    shown: str,
) -> list[Batches]:
    """Batches with ``labels``, of which an encoder-decoder makes its decoder's input."""
    chosen = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[: calibration.windows]]
    if len(chosen) < parts:
        raise UserError(f"{shown}: {len(chosen)} rows cannot be split into {parts} parts")

    cut: Any = {"truncation": True, "max_length": calibration.max_length}
    rows = [
        (_ids(tokenizer(pair.source, **cut)["input_ids"]), _ids(tokenizer(text_target=pair.target, **cut)["input_ids"]))
        for pair in chosen
    ]
    size = calibration.batch_size
    batches = []
    for part in range(parts):
        own = rows[part::parts]
        batches.append([_collate_pairs(own[start : start + size]) for start in range(0, len(own), size)])
    return batches


def _collate_pairs(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    labels = pad_sequence([target for _, target in rows], batch_first=True, padding_value=IGNORED)
    return {**_collate([source for source, _ in rows]), "labels": labels}


def on_model(batches: Batches, model: "PreTrainedModel") -> Iterator[dict[str, Tensor]]:
    """The batches, moved to the model's device.

    Raises:
        UserError: a token that the model does not know; raised before the first batch.
    """
    known: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    highest = max(int(batch["input_ids"].max()) for batch in batches)
    if highest >= known:
        raise UserError(f"token {highest} in the data, but the model knows {known}: tokenized for another model?")
    return ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches)


def _encode_long(text: str, needed: int, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Tokens (T,) of a text, or of random stretches of it, in order, where it holds many more than are needed."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    wanted = max(64, TEXT_PER_TOKEN * needed // PIECE)
    if len(pieces) > wanted:
        chosen = torch.randperm(len(pieces), generator=generator)[:wanted].sort().values
        pieces = [pieces[i] for i in chosen.tolist()]
    first, rest = pieces[:1], pieces[1:]  # what a tokenizer puts before a text comes once
    found = tokenizer(first, verbose=False)["input_ids"]
    if rest:
        found += tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([_ids(ids) for ids in found])


def _ids(tokens: Any) -> Tensor:
    return torch.tensor(tokens, dtype=torch.long)


def _windows(tokens: Tensor, length: int, count: int, generator: torch.Generator, shown: str, disjoint: bool) -> Tensor:
    """``count`` windows (count, length) of a token sequence, disjoint where it is long enough."""
    slack = len(tokens) - length
    if slack < 0:
        raise UserError(f"{shown}: {len(tokens)} tokens are less than one window; lower --calibration.pack {length}")
    offset = int(torch.randint(len(tokens) % length + 1, (1,), generator=generator))
    starts = torch.arange(offset, slack + 1, length)
    if len(starts) >= count:
        starts = starts[torch.randperm(len(starts), generator=generator)[:count]]
    elif disjoint:
        raise UserError(
            f"{shown}: {len(tokens)} tokens hold {len(starts)} separate windows of {length}, and {count} are needed"
        )
    else:
        starts = torch.randint(slack + 1, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _collate(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of unequal length as one right-padded batch; padding has token 0 and mask 0."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence(list(rows), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}
