"""Tables as tools write them: encodings, separators, preambles, decimal commas, units; and their values as numbers."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from tenfold import UserError
from tenfold.errors import needs

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
_SNIFFED = 1 << 18
"""Bytes that decide encoding, separator and header."""
_PREAMBLE = 200
"""Lines among which the header is looked for."""
_ROWS = 20_000
"""Rows that are held as text at once."""
_NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
"""Characters that nobody sees, which some exports have in their header."""
_MISSING = frozenset({"", "-", "--", "?", "-?", "nan", "na", "n/a", "null", "none", "nil", "unknown", "inf", "-inf"})
"""What tools write where they have no value, in small letters."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a text table is written.

    Args:
        encoding: of the file.
        delimiter: between fields.
        names: the columns, stripped.
        skip: lines before the first row of values.
        comma: whether numbers have a decimal comma.
    """

    encoding: str
    delimiter: str
    names: tuple[str, ...]
    skip: int
    comma: bool


@dataclasses.dataclass(frozen=True)
class Column:
    """A column's name taken apart.

    Args:
        name: as it stands in the file.
        plain: small letters and digits, other signs as underscores, without unit and index.
        unit: what stood in brackets or at the end: dbm, mhz, ...
        index: number in square brackets at the end, of tables with several values in a row.
    """

    name: str
    plain: str
    unit: str
    index: int | None


def column(name: str) -> Column:
    """A column's name taken apart: ``Serving Cell RSRP (dBm)[0]`` is ``serving_cell_rsrp``, dbm, 0."""
    text = name.strip().lstrip("#!").strip().strip("*").strip()
    index = None
    if (found := re.search(r"\[(\d+)\]\s*$", text)) is not None:
        index, text = int(found[1]), text[: found.start()]
    unit = ""
    if (found := re.search(r"[(\[]([^)\]]*)[)\]]\s*$", text)) is not None:
        unit, text = found[1].strip().lower(), text[: found.start()]
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    if not unit and (found := re.search(r"_(dbm|dbuv|mhz|ghz|khz|hz)$", plain)) is not None:
        unit = found[1]
    return Column(name, plain, unit, index)


def encoding_of(path: Path) -> str:
    """utf-8 (with or without a byte order mark), utf-16, or latin-1 where neither fits."""
    with path.open("rb") as file:
        head = file.read(_SNIFFED)
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if head.count(0) > len(head) // 4:
        return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    try:
        head[: head.rfind(b"\n") + 1 or None].decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def sniff(path: Path, is_header: Callable[[Sequence[str]], bool]) -> Layout:
    """How a file is written; the header is the first line whose fields ``is_header`` accepts.

    Where no line is a header, ``names`` are the fields of the first line that has the most, and ``skip`` is 0.

    Raises:
        UserError: no such file, or an empty one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    encoding = encoding_of(path)
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        text = file.read(_SNIFFED)
    lines = text.splitlines()
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: expected a line of column names and a line for each measurement")
    best: tuple[int, str, list[str]] = (0, ",", [])
    for number, line in enumerate(lines[:_PREAMBLE]):
        for delimiter in ";\t,|":
            fields = split(line, delimiter)
            if len(fields) > 1 and is_header(fields):
                body = lines[number + 1 : number + 50]
                return Layout(encoding, delimiter, tuple(fields), number + 1, _comma(body, delimiter))
            if len(fields) > best[0]:
                best = len(fields), delimiter, fields
    return Layout(encoding, best[1], tuple(best[2]), 0, _comma(lines[:50], best[1]))


def split(line: str, delimiter: str) -> list[str]:
    """The fields of a line, without spaces and marks of no width around them; an empty last one does not count."""
    fields = [field.strip().strip(_NO_WIDTH).strip() for field in next(csv.reader([line], delimiter=delimiter), [])]
    return fields[:-1] if fields and not fields[-1] else fields


def _comma(lines: Sequence[str], delimiter: str) -> bool:
    """Whether the numbers of some rows have a decimal comma."""
    if delimiter == ",":
        return False
    fields = [field for line in lines for field in split(line, delimiter)]
    commas = sum(re.fullmatch(r"-?\d+,\d+", field) is not None for field in fields)
    points = sum(re.fullmatch(r"-?\d+\.\d+", field) is not None for field in fields)
    return commas > points


def chunks(path: Path, layout: Layout, wanted: Sequence[int]) -> "Iterator[tuple[int, pandas.DataFrame]]":
    """Some columns of a text table as strings, some thousand rows at a time, each with the line number of its first row.

    Args:
        path: the file.
        layout: how it is written.
        wanted: numbers of the columns, which become the names in the frames.

    Raises:
        UserError: a row with more fields than there are columns.
    """
    import pandas

    columns = sorted(set(wanted) | {0})
    if path.suffix.lower() in {".parquet", ".pq"}:
        yield from _parquet(path, layout, columns)
        return
    count = len(layout.names)
    options: dict[str, Any] = {
        "sep": layout.delimiter,
        "usecols": [*columns, count],
        "index_col": False,
        "skip_blank_lines": False,
        "dtype": str,
        "keep_default_na": False,
        "na_filter": False,
        "chunksize": _ROWS,
        "skipinitialspace": True,
    }
    line = layout.skip + 1
    try:
        with (
            path.open(encoding=layout.encoding, errors="replace", newline="") as file,
            pandas.read_csv(_Numbered(file, layout), **options) as reader,
        ):
            for frame in reader:
                frame.columns = [*columns, count]
                frame.index = np.arange(line, line + len(frame))
                line += len(frame)
                first = frame[columns[0]].fillna("")
                comment = first.str.startswith(("#", "!")).to_numpy(dtype=bool)
                over = (frame.pop(count).fillna("").str.strip() != "").to_numpy(dtype=bool) & ~comment
                if over.any():
                    number = frame.index[int(np.argmax(over))]
                    raise UserError(f"{path}, line {number}: more than {count} fields, expected {count}")
                blank = (frame.fillna("") == "").all(axis=1).to_numpy(dtype=bool)
                yield line - len(frame), frame[~(comment | blank)]
    except pandas.errors.ParserError as error:
        found = re.search(r"in line (\d+), saw (\d+)", str(error))
        said = (
            f", line {int(found[1]) + layout.skip - 1}: {found[2]} fields, expected {count}" if found else f": {error}"
        )
        raise UserError(f"{path}{said}") from error


class _Numbered(io.TextIOBase):
    """A text table whose header is replaced by numbers, one more than it has columns: a row with more fields then shows."""

    def __init__(self, file: TextIO, layout: Layout) -> None:
        for _ in range(layout.skip):
            file.readline()
        self.file = file
        self.head = layout.delimiter.join(map(str, range(len(layout.names) + 1))) + "\n"

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int | None = -1, /) -> str:
        head, self.head = self.head, ""
        return head or self.file.read(-1 if size is None else size)

    @override
    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        head, self.head = self.head, ""
        return head or self.file.readline(size)


def _parquet(path: Path, layout: Layout, columns: Sequence[int]) -> "Iterator[tuple[int, pandas.DataFrame]]":
    import pyarrow.parquet

    line = 1
    file = pyarrow.parquet.ParquetFile(path)
    for batch in file.iter_batches(batch_size=_ROWS, columns=[layout.names[i] for i in columns]):
        frame = batch.to_pandas()[[layout.names[i] for i in columns]]
        frame.columns = columns
        frame.index = np.arange(line, line + len(frame))
        line += len(frame)
        yield int(frame.index[0]), frame


def parquet_layout(path: Path) -> Layout:
    """The columns of a parquet file.

    Raises:
        UserError: no such file, or another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    needs("pyarrow", "geo", "radiogat", why="parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({error})") from error
    return Layout("utf-8", ",", tuple(names), 0, comma=False)


def text_of(values: "pandas.Series[Any]") -> "pandas.Series[Any]":
    """A column as stripped strings; what stands for a missing value is empty."""
    text = values.astype("str").str.strip()
    return text.mask(text.str.lower().isin(_MISSING), "")


def numbers(values: "pandas.Series[Any]", *, comma: bool, degrees: bool = False) -> tuple[Floats, NDArray[np.bool_]]:
    """A column as numbers, NaN where there is no value, and which of these hold text that is no number.

    Args:
        values: the column, text or numbers.
        comma: numbers have a decimal comma.
        degrees: also ``48 08' 24.5" N`` and ``N48.14``.
    """
    import pandas
    from pandas.api.types import is_numeric_dtype

    if is_numeric_dtype(values.dtype):
        plain = values.to_numpy(dtype=np.float64, na_value=np.nan)
        plain = np.where(np.isfinite(plain), plain, np.nan)
        return plain, np.zeros(len(plain), dtype=bool)
    text = text_of(values)
    if comma:
        text = text.str.replace(",", ".", regex=False)
    found = pandas.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, copy=True)
    found[~np.isfinite(found)] = np.nan
    left = np.flatnonzero(np.isnan(found) & (text != "").to_numpy(dtype=bool))
    odd = np.zeros(len(found), dtype=bool)
    for i in left:
        value = _angle(text.iloc[i]) if degrees else _with_unit(text.iloc[i])
        odd[i] = value is None
        found[i] = np.nan if value is None else value
    return found, odd


def _with_unit(text: str) -> float | None:
    found = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)\s*(?:dbm|dbuv|db|mhz|m|°)", text, re.IGNORECASE)
    return float(found[1]) if found else None


def _angle(text: str) -> float | None:
    """Degrees of ``48°08'24.5"N``, ``N 48.14``, ``48 8.4 N``; None where it is no angle."""
    upper = text.upper()
    side = re.search(r"[NSEWO]", upper)
    parts = re.findall(r"\d+(?:\.\d+)?", upper)
    rest = re.sub(r"[^A-Z]", "", upper).replace("DEG", "")
    if len(rest) > 1 or (rest and side is None) or not 1 <= len(parts) <= 3:
        return None
    value = sum(float(part) / 60**i for i, part in enumerate(parts))
    negative = upper.strip().startswith("-") or (side is not None and side[0] in "SW")
    return -value if negative else value
