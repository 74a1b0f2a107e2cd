"""Calibration text: the files that people have on disk, the model and tokenizer that read it, and batches out of both."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda.config import EMBEDDED_DATA, Calibration
from tenfold import UserError
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELD_SETS = (
    ("text",),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("query", "response"),
    ("query", "answer"),
    ("question", "answer"),
    ("question",),
    ("prompt", "completion"),
)
"""Field names of common instruction data sets; the first set that a record holds whole is joined by newlines."""


def load_model(name: str, device: str = "auto") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A causal language model, in the dtype that it is stored in, and its tokenizer.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name on the hub. Only safetensors weights are read, and no
            code that comes with a model is run.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` ...

    Raises:
        UserError: nothing there that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name}: cannot be loaded as a causal language model ({reason})") from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def read_texts(
    source: str, fields: Sequence[str] | None = None, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> list[str]:
    """The texts of a calibration source.

    Args:
        source: ``text:FILE`` (plain text, blank lines separate texts), ``jsonl:FILE`` (one JSON object a line),
            ``json:FILE`` (a list of objects), or an embedded name: ``topics`` (Python's documentation), ``code``
            (source of the standard library), ``names`` (names of Unicode characters).
        fields: for JSON, the fields to join by newlines; default: the first of ``FIELD_SETS`` that the record holds,
            or ``messages``, rendered by the tokenizer's chat template.
        tokenizer: needed for ``messages`` only.

    Raises:
        UserError: unknown kind, no such file, not UTF-8, a malformed line (file, line, field), or no text at all.
    """
    kind, colon, path_text = source.partition(":")
    if not colon:
        return _embedded(kind)
    path = Path(path_text)
    readers = {"text": _plain_texts, "jsonl": _json_lines, "json": _json_list}
    if kind not in readers:
        known = [*(f"{name}:" for name in readers), *EMBEDDED_DATA]
        raise UserError(f"--data {source}: unknown kind '{kind}': {did_you_mean(kind, known)}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {source}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"--data {source}: {error.strerror}") from error
    if kind == "text":
        texts = _plain_texts(content)
    else:
        records = _json_lines(path, content) if kind == "jsonl" else _json_list(path, content)
        texts = [_record_text(where, record, fields, tokenizer) for where, record in records]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"--data {source}: no text in it")
    return texts


def _embedded(name: str) -> list[str]:
    from tenfold import datasets

    sources = {"topics": datasets.topics, "code": datasets.standard_library_code, "names": datasets.unicode_names}
    if name not in sources:
        raise UserError(f"--data {name}: unknown: {did_you_mean(name, sources)}; a file is text:FILE or jsonl:FILE")
    return _plain_texts(sources[name]().text)


def _plain_texts(content: str) -> list[str]:
    return content.split("\n\n")


def _json_lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error


def _json_list(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of objects, found {type(records).__name__}")
    for index, record in enumerate(records):
        yield f"{path}, item {index}", record


def _record_text(
    where: str, record: Any, fields: Sequence[str] | None, tokenizer: "PreTrainedTokenizerBase | None"
) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
    if fields is None and "messages" in record:
        if tokenizer is None or not tokenizer.chat_template:
            raise UserError(f"{where}: field messages needs a tokenizer with a chat template; name other --fields")
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    if fields is None:
        fields = next((names for names in FIELD_SETS if all(name in record for name in names)), None)
        if fields is None:
            raise UserError(f"{where}: none of the known fields; name them with --fields (found: {', '.join(record)})")
    for name in fields:
        if name not in record:
            raise UserError(f"{where}: no field '{name}': {did_you_mean(name, record)}")
        if not isinstance(record[name], str):
            raise UserError(f"{where}, field {name}: expected text, found {type(record[name]).__name__}")
    return "\n".join(record[name] for name in fields if record[name])


def calibration_batches(
    source: str, calibration: Calibration, tokenizer: "PreTrainedTokenizerBase", device: str | torch.device = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches ``{"input_ids", "attention_mask"}`` of shape (batch_size, length) for ``corda.collect_context``.

    With ``pack`` the texts are joined by blank lines and cut into windows of exactly that many tokens, as the authors'
    code does: C then has full rank from enough tokens. Windows do not overlap as long as the text is long enough
    (our choice, since duplicated windows add nothing); a shorter text gives random, overlapping ones. Without ``pack``
    every text is a row of its own, cut at ``max_length`` and padded, with the padding masked.

    Raises:
        UserError: fewer tokens than one window.
    """
    texts = read_texts(source, calibration.fields, tokenizer)
    generator = torch.Generator().manual_seed(calibration.seed)
    if calibration.pack:
        joined = tokenizer("\n\n".join(texts), return_tensors="pt", truncation=False)["input_ids"][0]
        rows = [
            {"input_ids": row} for row in _windows(joined, calibration.pack, calibration.windows, generator, source)
        ]
    else:
        chosen = torch.randperm(len(texts), generator=generator)[: calibration.windows]
        limit = calibration.max_length
        encoded = (tokenizer(texts[i], truncation=True, max_length=limit, return_tensors="pt") for i in chosen.tolist())
        rows = [{"input_ids": item["input_ids"][0]} for item in encoded]
    size = calibration.batch_size
    return [_collate(rows[start : start + size], device) for start in range(0, len(rows), size)]


def _windows(tokens: Tensor, length: int, count: int, generator: torch.Generator, source: str) -> Tensor:
    """``count`` windows (count, length) of a token sequence, disjoint where it is long enough."""
    slack = len(tokens) - length
    if slack < 0:
        raise UserError(
            f"--data {source}: {len(tokens)} tokens are less than one window; lower --calibration.pack {length}"
        )
    offset = int(torch.randint(len(tokens) % length + 1, (1,), generator=generator))
    starts = torch.arange(offset, slack + 1, length)
    if len(starts) >= count:
        starts = starts[torch.randperm(len(starts), generator=generator)[:count]]
    else:
        starts = torch.randint(slack + 1, (count,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def _collate(rows: Sequence[dict[str, Tensor]], device: str | torch.device) -> dict[str, Tensor]:
    """Rows of unequal length as one right-padded batch; padding has token 0 and mask 0."""
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
