"""Calibration text: the files that people have on disk, the model and tokenizer that read it, and batches out of both."""

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from corda.config import EMBEDDED_DATA, Calibration
from tenfold import UserError
from tenfold.errors import MissingExtraError, did_you_mean

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
TOKENS = "input_ids"
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""Who speaks, in the words of common conversation data sets -> role in a chat template."""
PIECE = 2**14
"""Characters that are tokenized at once."""
TEXT_A_TOKEN = 16
"""Characters that are read for each token that is needed, so that windows come from all over a long text."""

Content = str | Tensor


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model, or None where there is none that loads.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        UserError: no model there.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # the last by older transformers, for want of what reads other formats
        return None


def load_model(name: str, device: str = "auto") -> "PreTrainedModel":
    """A causal language model, in the dtype that it is stored in.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name on the hub. Only safetensors weights are read, and no
            code that comes with a model is run.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` ...

    Raises:
        UserError: nothing there that can be loaded, or no such device.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"--device {device}: {_first_line(error)}") from error


def _no_model(name: str, error: Exception) -> UserError:
    return UserError(f"--model {name}: cannot be loaded as a causal language model ({_first_line(error)})")


def read_texts(
    source: str,
    calibration: Calibration | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> list[str] | list[Tensor]:
    """The texts of a calibration source, or their tokens where the records hold ``input_ids``.

    Args:
        source: ``text:FILE`` (plain text, blank lines separate texts), ``jsonl:FILE`` (one JSON object a line),
            ``json:FILE`` (a list of objects), ``parquet:FILE``, ``dataset:FOLDER`` (what ``datasets`` wrote by
            ``save_to_disk``), or an embedded name: ``topics`` (Python's documentation), ``code`` (source of the
            standard library), ``names`` (names of Unicode characters).
        calibration: ``fields``, ``chat_template`` and ``skip_bad`` are used; default ``Calibration()``.
        tokenizer: its chat template renders messages and conversations.

    A record is what its ``fields`` hold; without ``fields``, its ``input_ids`` (less those whose ``attention_mask`` is
    0), ``messages`` (role, content), ``conversations`` (from, value), ``conversation`` (human, assistant), or the first
    of ``FIELD_SETS`` that it holds. Empty texts are left out.

    Raises:
        UserError: unknown kind, no such file, not UTF-8, a malformed record (file, line or row, field), or no text.
        MissingExtraError: parquet or dataset without pyarrow.
    """
    calibration = calibration or Calibration()
    kind, colon, path = source.partition(":")
    if not colon:
        return _embedded(kind)
    if kind not in READERS:
        known = [*(f"{name}:" for name in READERS), *EMBEDDED_DATA]
        raise UserError(f"data {source}: unknown kind '{kind}': {did_you_mean(kind, known)}")
    reader = _Records(calibration, tokenizer)
    contents: list[Any] = []
    bad: list[str] = []
    try:
        for where, record in READERS[kind](Path(path)):
            try:
                content = reader.content(where, record)
                if contents and type(content) is not type(contents[0]):
                    raise UserError(f"{where}: {_name(content)}, where the records before hold {_name(contents[0])}")
            except UserError as error:
                if not calibration.skip_bad:
                    raise
                bad.append(str(error))
                continue
            if content.strip() if isinstance(content, str) else len(content):
                contents.append(content)
    except UnicodeDecodeError as error:
        raise UserError(f"data {source}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"data {source}: {error.strerror or error}") from error
    if bad:
        sys.stderr.write(
            f"data {source}: skipped {len(bad)} records, kept {len(contents)}; the first skipped: {bad[0]}\n"
        )
    if not contents:
        raise UserError(f"data {source}: no text in it")
    return contents


def _name(content: Content) -> str:
    return "text" if isinstance(content, str) else TOKENS


def _embedded(name: str) -> list[str]:
    from tenfold import datasets

    sources = {"topics": datasets.topics, "code": datasets.standard_library_code, "names": datasets.unicode_names}
    if name not in sources:
        raise UserError(f"data {name}: unknown: {did_you_mean(name, sources)}; a file is text:FILE or jsonl:FILE")
    return [text for text in sources[name]().text.split("\n\n") if text.strip()]


def _plain_texts(path: Path) -> Iterator[tuple[str, Any]]:
    content = path.read_text(encoding="utf-8-sig")
    return ((f"{path}, text {index}", text) for index, text in enumerate(content.split("\n\n")))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines as bytes: each is decoded where a fault in it can be skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; one object a line is jsonl:" if error.msg == "Extra data" else ""
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of objects, found {type(records).__name__}")
    for index, record in enumerate(records):
        yield f"{path}, item {index}", record


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    arrow = _arrow("parquet")
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    yield f"{path}, row {index}", record
                    index += 1
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a whole parquet file ({_first_line(error)})") from error


def _dataset_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a folder of ``datasets.Dataset.save_to_disk``: Arrow streams, listed in state.json."""
    arrow = _arrow("dataset")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise UserError(f"{path} holds the splits {', '.join(splits)}: give one of them, dataset:{path / splits[0]}")
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: no state.json in it; expected a folder that datasets wrote by save_to_disk")
    try:
        names = [entry["filename"] for entry in json.loads((path / "state.json").read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'}: not the list of files of a dataset") from error
    index = 0
    for name in names:
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path / 'state.json'}: {name} leads outside of the folder")
        try:
            with arrow.memory_map(str(file)) as stream, arrow.ipc.open_stream(stream) as batches:
                for batch in batches:
                    for record in batch.to_pylist():
                        yield f"{path}, row {index}", record
                        index += 1
        except arrow.ArrowInvalid as error:
            raise UserError(f"{file}: not a whole file of a dataset ({_first_line(error)})") from error


def _arrow(kind: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise MissingExtraError(f'{kind}: needs pyarrow, which is not installed; pip install "corda[data]"') from error
    return pyarrow


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "text": _plain_texts,
    "jsonl": _json_lines,
    "json": _json_list,
    "parquet": _parquet_rows,
    "dataset": _dataset_rows,
}
"""Kind of a source -> its records, each with where it stands."""


class _Records:
    """What a record holds, by the settings."""

    def __init__(self, calibration: Calibration, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        self.fields = calibration.fields
        self.template = calibration.chat_template
        self.tokenizer = tokenizer

    def content(self, where: str, record: Any) -> Content:
        """Its text or tokens.

        Raises:
            UserError: malformed; the message says where and which field.
        """
        if isinstance(record, bytes):
            record = _parsed(where, record)
        if isinstance(record, str):
            return record
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
        fields = self.fields or _known_fields(where, record)
        for name in fields:
            if name not in record:
                raise UserError(f"{where}: no field '{name}': {did_you_mean(name, record)}")
        if fields[0] == TOKENS:
            return _tokens(where, record)
        if fields[0] in TURNS:
            return self._chat(f"{where}, field {fields[0]}", TURNS[fields[0]], record[fields[0]])
        texts = ["" if record[name] is None else record[name] for name in fields]
        for name, text in zip(fields, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{where}, field {name}: expected text, found {type(text).__name__}")
        *asked, answered = texts
        if self.template and self.template != "plain" and asked:
            user = "\n".join(text for text in asked if text)
            return self._render(where, [{"role": "user", "content": user}, {"role": "assistant", "content": answered}])
        return "\n".join(text for text in texts if text)

    def _chat(self, where: str, turns_of: Callable[[Any], Iterator[tuple[Any, Any]]], value: Any) -> str:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{where}: expected a list of turns, found {type(value).__name__}")
        messages = []
        for number, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise UserError(f"{where}, turn {number}: expected an object, found {type(item).__name__}")
            turns = list(turns_of(item))
            for role, text in turns:
                if role not in ROLES:
                    raise UserError(f"{where}, turn {number}: unknown role {role!r}: {did_you_mean(str(role), ROLES)}")
                if not isinstance(text, str):
                    raise UserError(f"{where}, turn {number}: expected text, found {type(text).__name__}")
                messages.append({"role": ROLES[role], "content": text})
            if not turns:
                raise UserError(f"{where}, turn {number}: nobody of {', '.join(ROLES)} in it: {', '.join(item)}")
        return self._render(where, messages)

    def _render(self, where: str, messages: list[dict[str, str]]) -> str:
        if self.template == "plain":
            return "\n".join(message["content"] for message in messages)
        template = _jinja(self.template)
        if self.tokenizer is None or not (template or self.tokenizer.chat_template):
            raise UserError(
                f"{where}: needs a chat template, and the model's tokenizer has none; give --calibration.chat_template"
                " plain or a Jinja file"
            )
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # a template raises what it likes, for example when roles do not alternate
            raise UserError(f"{where}: the chat template cannot render it ({_first_line(error)})") from error
        start = self.tokenizer.bos_token
        return str(text).removeprefix(start) if start and _adds_start(self.tokenizer) else str(text)


def _adds_start(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts the token of a beginning first by itself; a template that does too would double it."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


@functools.cache
def _jinja(template: str | None) -> str | None:
    if template is None or template == "tokenizer":
        return None
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--calibration.chat_template {template}: expected tokenizer, plain, a Jinja template or a file of one ({error})"
        ) from error


def _parsed(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error


def _known_fields(where: str, record: dict[str, Any]) -> Sequence[str]:
    """The fields that a record is made of: tokens, turns, or the first set that holds text only, else that it holds."""
    for name in (TOKENS, *TURNS):
        if name in record:
            return (name,)
    whole = [names for names in FIELD_SETS if all(name in record for name in names)]
    if not whole:
        raise UserError(
            f"{where}: none of the known fields; name them with --calibration.fields (found: {', '.join(record)})"
        )
    return next((names for names in whole if all(isinstance(record[n], str | None) for n in names)), whole[0])


def _tokens(where: str, record: dict[str, Any]) -> Tensor:
    ids, mask = record[TOKENS], record.get("attention_mask")
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f"{where}, field {TOKENS}: expected a list of token numbers")
    tokens = _ids(ids)
    if mask is None:
        return tokens
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise UserError(f"{where}, field attention_mask: expected one entry for each of {len(ids)} tokens")
    return tokens[torch.tensor(mask, dtype=torch.bool)]


def _messages(item: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield item.get("role"), item.get("content")


def _from_value(item: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield item.get("from"), item.get("value")


def _human_assistant(item: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((who, item[who]) for who in ROLES if item.get(who) is not None)


TURNS: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[Any, Any]]]] = {
    "messages": _messages,
    "conversations": _from_value,
    "conversation": _human_assistant,
}
"""Field of a conversation -> who says what in one item of its list."""


Batches = list[dict[str, Tensor]]


def calibration_batches(
    source: str,
    calibration: Calibration,
    tokenizer: "PreTrainedTokenizerBase | None",
    parts: int = 1,
    *,
    disjoint: bool = False,
) -> list[Batches]:
    """Batches ``{"input_ids", "attention_mask"}`` of shape (batch_size, length) for ``corda.collect_context``.

    With ``pack`` the texts are joined by blank lines and cut into windows of exactly that many tokens, as the authors'
    code does: C then has full rank from enough tokens. Windows do not overlap as long as the text is long enough
    (our choice, since duplicated windows add nothing); a shorter text gives random, overlapping ones. Of a text that is
    much longer than the windows, random stretches are read. Without ``pack`` every text is a row of its own, cut at
    ``max_length`` and padded, with the padding masked. Records of tokens are joined as they are.

    Args:
        source: as for ``read_texts``.
        calibration: how it is read.
        tokenizer: None for records of ``input_ids``.
        parts: the windows are dealt out to so many lists of batches, in random order.
        disjoint: refuse a text that is too short for windows that do not overlap.

    Returns:
        The batches of each part, on the CPU.

    Raises:
        UserError: fewer tokens than one window, fewer rows than parts, text without a tokenizer, or as for
            ``read_texts``.
    """
    contents: list[Any] = list(read_texts(source, calibration, tokenizer))
    if tokenizer is None and isinstance(contents[0], str):
        raise UserError(f"data {source}: text needs a tokenizer, which the model lacks; give records of {TOKENS}")
    generator = torch.Generator().manual_seed(calibration.seed)
    if calibration.pack:
        needed = calibration.pack * calibration.windows
        if isinstance(contents[0], str):
            joined = _encode_long("\n\n".join(contents), needed, tokenizer, generator)
        else:
            joined = torch.cat(contents)
        rows = list(_windows(joined, calibration.pack, calibration.windows, generator, source, disjoint))
    else:
        chosen = [contents[i] for i in torch.randperm(len(contents), generator=generator)[: calibration.windows]]
        limit = calibration.max_length
        if tokenizer is not None and isinstance(chosen[0], str):
            chosen = [_ids(tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in chosen]
        rows = [tokens[:limit] for tokens in chosen]
    if len(rows) < parts:
        raise UserError(f"data {source}: {len(rows)} rows cannot be split into {parts} parts")
    size = calibration.batch_size
    dealt = [rows[part::parts] for part in range(parts)]
    return [[_collate(part[start : start + size]) for start in range(0, len(part), size)] for part in dealt]


def on_model(batches: Batches, model: "PreTrainedModel") -> Iterator[dict[str, Tensor]]:
    """The batches on the model's device.

    Raises:
        UserError: a token that the model does not know, before the first batch.
    """
    known: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    highest = max(int(batch["input_ids"].max()) for batch in batches)
    if highest >= known:
        raise UserError(f"token {highest} in the data, but the model knows {known}: tokenized for another model?")
    return ({name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches)


def _encode_long(text: str, needed: int, tokenizer: Any, generator: torch.Generator) -> Tensor:
    """Tokens (T,) of a text, or of random stretches of it in their order where it holds many more than are needed."""
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    wanted = max(64, TEXT_A_TOKEN * needed // PIECE)
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


def _windows(
    tokens: Tensor, length: int, count: int, generator: torch.Generator, source: str, disjoint: bool
) -> Tensor:
    """``count`` windows (count, length) of a token sequence, disjoint where it is long enough."""
    slack = len(tokens) - length
    if slack < 0:
        raise UserError(
            f"data {source}: {len(tokens)} tokens are less than one window; lower --calibration.pack {length}"
        )
    offset = int(torch.randint(len(tokens) % length + 1, (1,), generator=generator))
    starts = torch.arange(offset, slack + 1, length)
    if len(starts) >= count:
        starts = starts[torch.randperm(len(starts), generator=generator)[:count]]
    elif disjoint:
        raise UserError(
            f"data {source}: {len(tokens)} tokens hold {len(starts)} separate windows of {length}, and {count} are needed"
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
