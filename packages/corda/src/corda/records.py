"""Files of text that people have on disk, and what their records hold: text, tokens or conversations."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from corda.config import EMBEDDED_DATA, Calibration
from corda.texts import standard_library_code, unicode_names
from tenfold import UserError, datasets
from tenfold.errors import did_you_mean, needs
from tenfold.readers import parse_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
"""Field names of common instruction data sets; the first set of which a record holds all is joined by newlines."""
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

Message = dict[str, str]
"""One turn of a conversation: its role and its content."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that a chat template has yet to turn into text.

    Attributes:
        where: file and place, for messages.
        messages: its turns.
    """

    where: str
    messages: list[Message]


@dataclasses.dataclass(frozen=True)
class Pair:
    """What an encoder reads and what a decoder is to say."""

    source: str
    target: str


Content = str | Tensor | Chat | Pair
"""The text of a record, its tokens, its conversation, or what is asked and answered in it."""


@dataclasses.dataclass(frozen=True)
class Records:
    """What a calibration source holds, read and checked as far as no tokenizer is needed for it.

    Attributes:
        shown: option and source, for messages.
        calibration: how it was read.
        contents: of the records that are not empty; either tokens, or texts and conversations.
        bad: what is wrong with each record that was left out.
    """

    shown: str
    calibration: Calibration
    contents: list[Content]
    bad: list[str]

    def texts(self, tokenizer: "PreTrainedTokenizerBase | None") -> list[str] | list[Tensor] | list[Pair]:
        """Their texts, or their tokens where the records hold ``input_ids``.

        Args:
            tokenizer: its chat template renders conversations.

        Raises:
            UserError: a conversation that cannot be rendered, or no text.
        """
        found: list[Any] = []
        bad = list(self.bad)
        for content in self.contents:
            if not isinstance(content, Chat):
                found.append(content)
                continue
            try:
                text = _rendered(content, self.calibration.chat_template, tokenizer)
            except UserError as error:
                if not self.calibration.skip_bad:
                    raise
                bad.append(str(error))
                continue
            if text.strip():
                found.append(text)
        if bad:
            warnings.warn(
                f"{self.shown}: skipped {len(bad)} records, kept {len(found)}; the first skipped: {bad[0]}",
                stacklevel=2,
            )
        if not found:
            raise UserError(f"{self.shown}: no text in it")
        return found


def read_records(
    source: str, calibration: Calibration | None = None, *, option: str = "--data", pairs: bool = False
) -> Records:
    """What a calibration source holds.

    A record is what its ``fields`` hold; without ``fields``, its ``input_ids`` (less those whose ``attention_mask`` is
    0), ``messages`` (role, content), ``conversations`` (from, value), ``conversation`` (human, assistant), or the first
    of ``FIELD_SETS`` that it holds. Empty texts are left out.

    Args:
        source: ``text:FILE`` (plain text, blank lines separate texts), ``jsonl:FILE`` (one JSON object per line),
            ``json:FILE`` (a list of objects), ``parquet:FILE``, ``dataset:FOLDER`` (what ``datasets`` wrote by
            ``save_to_disk``), or an embedded name: ``topics`` (Python's documentation), ``code`` (source of the
            standard library), ``names`` (names of Unicode characters).
        calibration: ``fields``, ``chat_template`` and ``skip_bad`` are used; default ``Calibration()``.
        option: option that gave the source, for messages.
        pairs: whether a record is what is asked and, by its last field, what is answered, for an encoder-decoder.

    Raises:
        UserError: unknown kind, no such file, not UTF-8, a malformed record (file, line or row, field), a chat template
            that is no file, or no text.
        MissingExtraError: parquet or dataset without pyarrow.
    """
    calibration = calibration or Calibration()
    shown = f"{option} {source}"
    if pairs and calibration.pack:
        raise UserError(f"{shown}: an encoder-decoder takes each record as a row of its own: give --calibration.pack 0")
    kind, path = parse_source(source, kinds=list(READERS), embedded=EMBEDDED_DATA, option=option)
    if path is None and pairs:
        raise UserError(f"{shown}: a text without answers; an encoder-decoder needs records of two fields or more")
    if path is None:
        return Records(shown, calibration, _embedded(kind), [])
    contents: list[Content] = []
    bad: list[str] = []
    try:
        for where, record in READERS[kind](path):
            try:
                content = _content(where, record, calibration, pairs)
                if contents and _kind(content) != _kind(contents[0]):
                    raise UserError(f"{where}: {_kind(content)}, where the records before hold {_kind(contents[0])}")
            except UserError as error:
                if not calibration.skip_bad:
                    raise
                bad.append(str(error))
                continue
            if content.strip() if isinstance(content, str) else isinstance(content, Chat | Pair) or len(content):
                contents.append(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror or error}") from error
    if any(isinstance(content, Chat) for content in contents):
        _jinja(calibration.chat_template)
    if not contents and not bad:
        raise UserError(f"{shown}: no text in it")
    return Records(shown, calibration, contents, bad)


def _kind(content: Content) -> str:
    return TOKENS if isinstance(content, Tensor) else "text"


def _embedded(name: str) -> list[Content]:
    sources = {"topics": datasets.topics, "code": standard_library_code, "names": unicode_names}
    return [text for text in sources[name]().text.split("\n\n") if text.strip()]


def _plain_texts(path: Path) -> Iterator[tuple[str, Any]]:
    content = path.read_text(encoding="utf-8-sig")
    return ((f"{path}, text {index}", text) for index, text in enumerate(content.split("\n\n")))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields lines as bytes: each is decoded later, where a fault in it can be skipped."""
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
    """Yields the rows of a folder of ``datasets.Dataset.save_to_disk``: Arrow streams, listed in state.json."""
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
    needs("pyarrow", "data", "corda", why=f"{kind}:")
    import pyarrow
    import pyarrow.ipc

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
"""Kind of a source -> function that yields its records, each with its place."""


def _content(where: str, record: Any, calibration: Calibration, pairs: bool = False) -> Content:
    """What a record holds, according to the settings."""
    if isinstance(record, bytes):
        record = _parsed(where, record)
    if isinstance(record, str) and not pairs:
        return record
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named fields, found {type(record).__name__}")
    fields = calibration.fields or _known_fields(where, record)
    for name in fields:
        if name not in record:
            raise UserError(f"{where}: no field '{name}': {did_you_mean(name, record)}")
    if pairs and (fields[0] == TOKENS or fields[0] in TURNS):
        raise UserError(f"{where}: expected what is asked and what is answered, found {fields[0]}")
    if fields[0] == TOKENS:
        return _tokens(where, record)
    if fields[0] in TURNS:
        where = f"{where}, field {fields[0]}"
        messages = _turns(where, TURNS[fields[0]], record[fields[0]])
        return _joined(messages) if calibration.chat_template == "plain" else Chat(where, messages)
    texts = ["" if record[name] is None else record[name] for name in fields]
    for name, text in zip(fields, texts, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{where}, field {name}: expected text, found {type(text).__name__}")
    *asked, answered = texts
    if pairs:
        if not asked or not answered:
            raise UserError(f"{where}: expected what is asked and what is answered, found {', '.join(fields)} alone")
        return Pair("\n".join(text for text in asked if text), answered)
    if calibration.chat_template and calibration.chat_template != "plain" and asked:
        user = "\n".join(text for text in asked if text)
        return Chat(where, [{"role": "user", "content": user}, {"role": "assistant", "content": answered}])
    return "\n".join(text for text in texts if text)


def _turns(where: str, turns_of: Callable[[Any], Iterator[tuple[Any, Any]]], value: Any) -> list[Message]:
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
            raise UserError(f"{where}, turn {number}: expected one of {', '.join(ROLES)}, found {', '.join(item)}")
    return messages


def _joined(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _rendered(chat: Chat, template: str | None, tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """The text of a conversation, by the template of the settings or the tokenizer's."""
    jinja = _jinja(template)
    if tokenizer is None or not (jinja or tokenizer.chat_template):
        raise UserError(
            f"{chat.where}: needs a chat template, and the model's tokenizer has none; give --calibration.chat_template"
            " plain or a Jinja file"
        )
    try:
        text = tokenizer.apply_chat_template(chat.messages, chat_template=jinja, tokenize=False)
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # the first, when roles do not alternate
        raise UserError(f"{chat.where}: the chat template cannot render it ({_first_line(error)})") from error
    start = tokenizer.bos_token
    return str(text).removeprefix(start) if start and _adds_start(tokenizer) else str(text)


def _adds_start(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself adds the start token; one in a template would double it."""
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
    """The fields that a record is made of: tokens, turns, the first known set with text only, or the first that it holds."""
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
    tokens = torch.tensor(ids, dtype=torch.long)
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
"""Field of a conversation -> function that yields role and text of each turn in one item of its list."""
