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
_PREAMBLE = 1000
"""Lines among which the header is looked for."""
_LONGEST = 100_000
"""Characters of a line that are looked at for its fields."""
_ROWS = 20_000
"""Rows that are held as text at once."""
_NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
"""Characters that nobody sees, which some exports have in their header."""
_MISSING = frozenset(
    {
        *("", "-", "--", "---", "?", "-?", "*", "nan", "na", "n/a", "n.a.", "n/d", "#n/a", "#na", "<na>", "nat"),
        *("null", "(null)", "\\n"),
        *("none", "nil", "unknown", "not available", "no data", "nodata", "invalid", "#value!", "#div/0!", "#ref!"),
        *("inf", "-inf", "infinity", "-infinity"),
    }
)
"""What tools write where they have no value, in small letters."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a text table is written.

    Args:
        encoding: of the file.
        delimiter: between fields; ``WHITE`` for spaces and tabs of any number.
        names: the columns, stripped.
        skip: lines before the first row of values.
        comma: whether numbers have a decimal comma.
        units: of the columns, where a line below their names holds them.
    """

    encoding: str
    delimiter: str
    names: tuple[str, ...]
    skip: int
    comma: bool
    units: tuple[str, ...] = ()


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

    @property
    def keys(self) -> frozenset[str]:
        """What it may be called in ``radiogat.roles.COLUMNS``: as it is, without unit, without underscores."""
        base = re.sub(r"_(dbm|mhz|ghz|khz|hz|deg|degrees|dec|decimal)$", "", self.plain)
        return frozenset({self.plain, base, self.name.lower(), squeezed(self.plain), squeezed(base)})


def squeezed(name: str) -> str:
    """A name without underscores, where it is long enough to mean the same: ``ssrsrp`` of ``ss_rsrp``, not ``ci`` of C/I."""
    short = name.replace("_", "")
    return short if len(short) > 3 else name


def column(name: str, unit: str = "") -> Column:
    """A column's name taken apart: ``Serving Cell RSRP (dBm)[0]`` is ``serving_cell_rsrp``, dbm, 0.

    Args:
        name: as it stands in the file.
        unit: its unit, where a line of its own says it.
    """
    text = name.strip().lstrip("#!%").strip().strip("*").strip()
    index = None
    if (found := re.search(r"\[(\d+)\]\s*$", text)) is not None:
        index, text = int(found[1]), text[: found.start()]
    unit = unit.strip().strip("()[]").lower()
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
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd > len(head) // 4 and max(even, odd) > 3 * min(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    try:
        head[: head.rfind(b"\n") + 1 or None].decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


_OTHER = (
    (b"PK\x03\x04", "a workbook (xlsx, ods) or a zip archive: export the sheet as CSV, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: export the sheet as CSV"),
    (b"\x1f\x8b", "compressed: unpack it first (gunzip)"),
    (b"SQLite format 3\x00", "a database: export its table as CSV (sqlite3 -header -csv FILE 'select ...')"),
    (b"\x89HDF", "HDF5 or netCDF: give netcdf:FILE for maps, or export a table as CSV"),
    (b"PAR1", "parquet: give parquet:FILE, with that ending"),
    (b"<?xml", "XML (KML, GPX): export a table as CSV"),
    (b"<kml", "KML: export a table as CSV"),
    (b"<gpx", "GPX: export a table as CSV"),
    (b"<html", "a web page: download the table itself"),
    (b"<!DOCTYPE", "a web page: download the table itself"),
    (b"{", "JSON: export a table as CSV"),
)
"""How files begin that are no text tables, and what to do with them."""


def sniff(path: Path, is_header: Callable[[Sequence[str]], bool]) -> Layout:
    """How a file is written; the header is the first line whose fields ``is_header`` accepts.

    Lines that hold numbers are headers only where no other line is. Where no line is a header, ``names`` are the fields of the
    first line that has the most, and ``skip`` is 0.

    Raises:
        UserError: no such file, an empty one, or no text table.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as binary:
        start = binary.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    for mark, what in _OTHER:
        if start.startswith(mark):
            raise UserError(f"{path} is {what}")
    encoding = encoding_of(path)
    with path.open(encoding=encoding, errors="replace", newline="") as file:
        text = file.read(_SNIFFED).replace("\0", "")
    lines = re.split(r"\r\n|\r|\n", text)  # as files are iterated; str.splitlines knows more ends of lines
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: expected a line of column names and a line for each measurement")
    best: tuple[int, str, list[str]] = (0, ",", [])
    doubtful: tuple[int, str, list[str]] | None = None
    for delimiters in (";\t,|", (WHITE,)):
        for number, line in enumerate(lines[:_PREAMBLE]):
            for delimiter in delimiters:
                fields = split(line, delimiter)
                if (
                    len(fields) > 1
                    and is_header(fields)
                    and (delimiter != WHITE or _as_long(lines, number, len(fields)))
                ):
                    if not any(_NUMBER.fullmatch(field) for field in fields):
                        return _with_header(lines, number, delimiter, fields, encoding)
                    doubtful = doubtful or (number, delimiter, fields)
                if len(fields) > best[0] and delimiter != WHITE:
                    best = len(fields), delimiter, fields
    if doubtful is not None:
        return _with_header(lines, *doubtful, encoding)
    return Layout(encoding, best[1], tuple(best[2]), 0, _comma(lines[:50], best[1]))


def _as_long(lines: Sequence[str], number: int, count: int) -> bool:
    """Whether the line below has as many words: where words are columns, prose may look like a header."""
    return number + 1 < len(lines) and len(split(lines[number + 1], WHITE)) == count


def _with_header(lines: Sequence[str], number: int, delimiter: str, fields: list[str], encoding: str) -> Layout:
    """The layout of a file whose header is known; a line of units below it belongs to it."""
    skip, units = number + 1, ("",) * len(fields)
    below = [field.strip("()[]").lower() for field in split(lines[skip], delimiter)] if skip < len(lines) else []
    if len(set(below) - {"", "-", "#"}) > 0 and sum(map(bool, below)) > 1 and _UNIT_WORDS.issuperset(below):
        skip, units = skip + 1, tuple([*below, *[""] * len(fields)][: len(fields)])
    comma = _comma(lines[skip : skip + 50], delimiter)
    return Layout(encoding, delimiter, tuple(fields), skip, comma, units)


WHITE = r"\s+"
"""Delimiter of tables whose columns stand apart by spaces."""
_NUMBER = re.compile(r"[-+]?\d+(?:[.,]\d+)?(?:[eE][-+]?\d+)?")
_UNIT_WORDS = frozenset(
    {
        *(
            "",
            "-",
            "#",
            "dbm",
            "db",
            "dbuv",
            "dbµv",
            "dbμv",
            "mw",
            "w",
            "hz",
            "khz",
            "mhz",
            "ghz",
            "s",
            "ms",
            "sec",
            "utc",
        ),
        *(
            "m",
            "km",
            "km/h",
            "m/s",
            "kmh",
            "mph",
            "deg",
            "degree",
            "degrees",
            "°",
            "deg n",
            "deg e",
            "°n",
            "°e",
            "text",
        ),
        *("number", "string", "int", "float", "kbps", "mbps", "kbit/s", "mbit/s", "%", "id", "hh:mm:ss", "yyyy-mm-dd"),
    }
)


def split(line: str, delimiter: str) -> list[str]:
    """The fields of a line, without spaces and marks of no width around them; an empty last one does not count."""
    line = line[:_LONGEST]
    if delimiter == WHITE:
        reader = csv.reader([" ".join(line.lstrip("#%!/ \t").split())], delimiter=" ")
    else:
        reader = csv.reader([line], delimiter=delimiter)
    fields = [field.strip().strip(_NO_WIDTH).strip() for field in next(reader, [])]
    return fields[:-1] if fields and not fields[-1] else fields


def _comma(lines: Sequence[str], delimiter: str) -> bool:
    """Whether the numbers of some rows have a decimal comma; between commas these stand in quotes."""
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
                comment = first.str.startswith(("#", "!", "%", "//")).to_numpy(dtype=bool)
                over = (frame.pop(count).fillna("").str.strip() != "").to_numpy(dtype=bool) & ~comment
                if over.any():
                    number = frame.index[int(np.argmax(over))]
                    raise UserError(f"{path}, line {number}: more than {count} fields, expected {count}")
                blank = (frame.fillna("") == "").all(axis=1).to_numpy(dtype=bool)
                again = np.full(len(frame), len(columns) > 1)  # the header once more: logs that were joined
                for number in columns:
                    name = layout.names[number].strip("#!% ").lower()
                    again &= (frame[number].fillna("").str.strip().str.lower() == name).to_numpy(dtype=bool)
                yield line - len(frame), frame[~(comment | blank | again)]
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
        gap = " " if layout.delimiter == WHITE else layout.delimiter
        self.head = gap.join(map(str, range(len(layout.names) + 1))) + "\n"

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int | None = -1, /) -> str:
        head, self.head = self.head, ""
        while not head and (text := self.file.read(-1 if size is None else size)):
            head = text.replace("\0", "")  # where a recorder lost its power
        return head

    @override
    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        head, self.head = self.head, ""
        while not head and (text := self.file.readline(size)):
            head = text.replace("\0", "")
        return head


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
    read = np.flatnonzero(~np.isnan(found))
    found[read] = (
        text.iloc[read].to_numpy(dtype=object).astype(np.float64)
    )  # pandas before 3.1 may be off by a last unit
    left = np.flatnonzero(np.isnan(found) & (text != "").to_numpy(dtype=bool))
    odd = np.zeros(len(found), dtype=bool)
    for i in left:
        value = _angle(text.iloc[i]) if degrees else _with_unit(text.iloc[i])
        odd[i] = value is None
        found[i] = np.nan if value is None else value
    return found, odd


def _with_unit(text: str) -> float | None:
    """The number of `-80 dBm`, or of one with a typographic minus."""
    plain = text.replace("\u2212", "-").replace("\u2013", "-").replace("\u00a0", " ").strip()
    found = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)\s*(?:dbm|dbuv|db|mhz|m|°)?", plain, re.IGNORECASE)
    return float(found[1]) if found else None


def _angle(text: str) -> float | None:
    """Degrees of ``48°08'24.5"N``, ``N 48.14``, ``48 8.4 N``; None where it is no angle, or says O, which is east or west."""
    plain = re.sub("[\u00b0\u00ba:\u2032\u2019\u2033\u201d\u00a0\"']|DEG", " ", text.upper().replace("\u2212", "-"))
    found = re.fullmatch(r"([NSEW]?)\s*([-+]?)([\d.]+)(?:\s+([\d.]+))?(?:\s+([\d.]+))?\s*([NSEW]?)", plain.strip())
    if found is None or (found[1] and found[6]):
        return None
    side, sign, parts = found[1] or found[6], found[2], [part for part in found.groups()[2:5] if part]
    if not all(re.fullmatch(r"\d+", part) for part in parts[:-1]) or not re.fullmatch(r"\d+(\.\d+)?", parts[-1]):
        return None
    if any(float(part) >= 60 for part in parts[1:]) or (sign == "-" and side in {"N", "E"}):
        return None
    value = sum(float(part) / 60**i for i, part in enumerate(parts))
    return -value if sign == "-" or side in {"S", "W"} else value
