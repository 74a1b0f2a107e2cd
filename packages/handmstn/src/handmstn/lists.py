"""Lists of pictures as people have them: CSV files with or without points, and text files of path and label."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handmstn.config import HandReading
from handmstn.parts import PartSpec, from_landmarks
from handmstn.records import Hands, hands_of, to_unit
from tenfold import UserError

SIDES = {"l": "left", "left": "left", "r": "right", "right": "right", "": "unknown", "unknown": "unknown"}
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
"""What spreadsheets and web pages leave in a cell and nobody sees: a byte-order mark, spaces and joints of no width."""


def bare(text: str) -> str:
    """A cell without spaces around it, those that break no line and those of no width among them."""
    while (stripped := text.strip().strip(INVISIBLE)) != text:
        text = stripped
    return text


def resolve(base: Path, name: str, where: str, follow_links: bool) -> Path:
    """A path of a list, below the list's own folder or as it is.

    Raises:
        UserError: there is no such picture, or it lies outside of the folder; the message has the row.
    """
    path = Path(name.replace("\\", "/")).expanduser()
    full = path if path.is_absolute() else base / path
    if not full.is_file():
        if re.match(r"[A-Za-z]:/", path.as_posix()):
            raise UserError(
                f"{where}: no such picture: {name}: paths of another machine; make them relative to the list's folder"
            )
        near = _other_case(full)
        raise UserError(f"{where}: no such picture: {name}{f'; did you mean {near}?' if near else ''}")
    if not path.is_absolute() and not follow_links and not full.resolve().is_relative_to(base.resolve()):
        raise UserError(f"{where}: {name} leads outside of {base}; --reading.follow_links true follows it")
    return full


def _other_case(path: Path) -> str:
    """A file whose name differs in upper and lower case only."""
    if not path.parent.is_dir():
        return ""
    return next((p.name for p in path.parent.iterdir() if p.name.lower() == path.name.lower()), "")


def text_of(path: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


class _Rows:
    """Collects rows; a bad one is refused with its number, or left out and counted."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []

    def each(self, items: Iterator[tuple[int, Callable[[], None]]]) -> None:
        for _, take in items:
            try:
                take()
            except UserError as error:
                if not self.skip_bad:
                    raise
                self.skipped.append(str(error))


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV as text.

    Attributes:
        path: the file.
        columns: their names in lower case.
        rows: number of the line that a row ends at, and its cells.
        decimal_comma: whether numbers may be written with a comma, as where semicolons part the columns.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    decimal_comma: bool

    def cells(self, number: int, row: Sequence[str]) -> Mapping[str, str]:
        """A row by the names of its columns.

        Raises:
            UserError: it has more or fewer cells.
        """
        if len(row) != len(self.columns):
            raise UserError(f"{self.path}, row {number}: expected {len(self.columns)} columns, found {len(row)}")
        return dict(zip(self.columns, row, strict=True))


def table_of(path: Path, needed: Sequence[str], form: str) -> Table:
    """Read a CSV of commas, semicolons or tabs, with or without a spreadsheet's first line ``sep=;``.

    Args:
        path: the file.
        needed: columns that it must have.
        form: what was expected, for messages.

    Raises:
        UserError: it is empty, or a column is missing or there twice.
    """
    text = text_of(path)
    told = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)
    skipped = 0 if told is None else 1
    text = text if told is None else text[told.end() :]
    first = text.partition("\n")[0]
    if not first.strip():
        raise UserError(f"{path} is empty" if not text.strip() else f"{path}: its first line is empty, expected {form}")
    delimiter = max(",;\t", key=first.count) if told is None else told[1]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = tuple(bare(name).lower() for name in next(reader))
        rows = tuple((reader.line_num + skipped, tuple(row)) for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        raise UserError(f"{path}, row {reader.line_num + skipped}: not a CSV ({error})") from error
    for name in needed:
        if name not in columns:
            raise UserError(f"{path}: no column '{name}': expected {form}")
    twice = next((name for name in columns if name and columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two columns are called '{twice}'")
    return Table(path, columns, rows, delimiter != ",")


def read_csv(path: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """Columns path, id, and maybe side, view, split, x1, y1, x2, y2, ... in any order; the first line names them."""
    table = table_of(path, ("path", "id"), "path, id, and maybe side, view, split, x1, y1, ...")
    numbers = sorted(int(m[2]) for name in table.columns if (m := re.fullmatch(r"([xy])(\d+)", name)))
    count = max(numbers, default=0)
    for number in range(1, count + 1):
        for own, other in (("x", "y"), ("y", "x")):
            if f"{own}{number}" not in table.columns:
                hint = f"there is {other}{number} but no" if f"{other}{number}" in table.columns else "no"
                raise UserError(f"{path}: {hint} {own}{number}, expected x1, y1 to x{count}, y{count}")
    fields: dict[str, list[str]] = {name: [] for name in ("path", "id", "side", "view", "split")}
    files: list[Path] = []
    points: list[NDArray[np.float64]] = []
    lines: list[int] = []

    def taker(number: int, row: Sequence[str]) -> Callable[[], None]:
        def take() -> None:
            where = f"{path}, row {number}"
            got = table.cells(number, row)
            side = bare(got.get("side", "")).lower().removesuffix(" hand")
            if side not in SIDES:
                raise UserError(f"{where}: side '{got['side']}': expected left, right or nothing")
            if not bare(got["id"]):
                raise UserError(f"{where}: the id is empty")
            name = bare(got["path"])
            if not name:
                raise UserError(f"{where}: the path is empty")
            file = resolve(path.parent, name, where, reading.follow_links)
            spots = _spots(got, count, where, table.decimal_comma)
            files.append(file)
            points.append(spots)
            lines.append(number)
            for key, value in (("path", name), ("id", got["id"]), ("side", SIDES[side])):
                fields[key].append(value)
            for key in ("view", "split"):
                fields[key].append(bare(got.get(key, "")).lower())

        return take

    rows = _Rows(reading.skip_bad)
    rows.each((number, taker(number, row)) for number, row in table.rows)
    if not files:
        raise UserError(
            f"{path}: no row can be used ({rows.skipped[0] if rows.skipped else 'it has a first line only'})"
        )
    spots = np.stack(points)
    found = hands_of(
        fields["path"],
        fields["id"],
        f"the user's pictures ({path.name})",
        files=files,
        sides=fields["side"],
        views=fields["view"],
        splits=["probe" if split == "query" else split for split in fields["split"]],
        skipped=rows.skipped,
        rows=lines,
    )
    return _placed(found, spots, reading.points, parts, str(path))


def _spots(row: Mapping[str, str], count: int, where: str, decimal_comma: bool) -> NDArray[np.float64]:
    """The points of a row, (count, 2); empty cells are unknown."""
    out = np.full((count, 2), np.nan)
    for number in range(1, count + 1):
        for axis, letter in enumerate("xy"):
            text = bare(row[f"{letter}{number}"])
            if text:
                try:
                    out[number - 1, axis] = float(text.replace(",", ".") if decimal_comma else text)
                except ValueError:
                    raise UserError(f"{where}: {letter}{number} is '{text}', expected a number") from None
                if np.isinf(out[number - 1, axis]):
                    raise UserError(f"{where}: {letter}{number} is '{text}', expected a number")
    return out


def _placed(hands: Hands, spots: NDArray[np.float64], unit: str, parts: tuple[PartSpec, ...], source: str) -> Hands:
    """With the points of a list as the control points of the parts: given ones, 21 landmarks, or nine of the palm."""
    if not spots.shape[1] or not parts:
        return hands
    wanted = sum(part.count for part in parts)
    if spots.shape[1] not in {wanted, 21, 9}:
        raise UserError(
            f"{source}: {spots.shape[1]} points per picture, expected {wanted} (the parts of the preset), 21 (landmarks from"
            " the wrist to the little finger) or 9 (the palm)"
        )
    out = np.full((len(hands), wanted, 2), np.nan, np.float32)
    for row, file in enumerate(hands.files):
        if not np.isfinite(spots[row]).any():
            continue
        width, height = picture_size(file)
        if unit == "pixels":
            beyond = (spots[row] < -0.5 * max(width, height)) | (spots[row] > 1.5 * max(width, height))
            if beyond.any():
                bad = int(np.argwhere(beyond)[0, 0])
                raise UserError(
                    f"{source}, row {hands.rows[row]}: point {bad + 1} at {spots[row, bad].round(1).tolist()} lies far outside"
                    f" of the picture of {width} x {height} pixels; --reading.points unit is for values from -1 to 1"
                )
            placed = to_unit(spots[row], width, height)
        else:
            placed = to_unit((spots[row] + 1) / 2 * (np.asarray([width, height]) - 1), width, height)
            if np.nanmax(np.abs(spots[row])) > 3:
                bad = int(np.nanargmax(np.abs(spots[row]).max(1)))
                raise UserError(
                    f"{source}, row {hands.rows[row]}: point {bad + 1} is {spots[row, bad].tolist()}, expected about -1 to 1"
                )
        out[row] = spread(placed, parts)
    return dataclasses.replace(hands, points=out, visibility=np.full((len(hands), len(parts)), np.nan, np.float32))


def spread(placed: NDArray[np.float64], parts: tuple[PartSpec, ...]) -> NDArray[np.float32]:
    """Points of one picture as the control points of the parts; those of parts that they do not tell are NaN."""
    wanted = sum(part.count for part in parts)
    if len(placed) == wanted and len(placed) != 21:
        return placed.astype(np.float32)
    if len(placed) == 21:
        return from_landmarks(placed, parts)
    out = np.full((wanted, 2), np.nan, np.float32)
    start = 0
    for part in parts:
        if part.name == "palm":
            out[start : start + 9] = placed
        start += part.count
    return out


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height of a picture as it stands upright, without decoding it."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) in {5, 6, 7, 8}
            return (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: cannot be decoded as an image ({' '.join(str(error).split())})") from error


def read_list(path: Path, reading: HandReading, parts: tuple[PartSpec, ...]) -> Hands:
    """``path label`` per line, as CCNet has it; a path may hold spaces or stand in quotes, a label keeps its zeros."""
    names: list[str] = []
    persons: list[str] = []
    files: list[Path] = []
    lines: list[int] = []
    rows = _Rows(reading.skip_bad)

    def taker(number: int, line: str) -> Callable[[], None]:
        def take() -> None:
            name, label = _path_and_label(bare(line))
            if not name or not label:
                raise UserError(f"{path}, row {number}: expected 'path label', found '{bare(line)[:60]}'")
            files.append(resolve(path.parent, name, f"{path}, row {number}", reading.follow_links))
            names.append(name)
            persons.append(label)
            lines.append(number)

        return take

    kept = [(n, line) for n, line in enumerate(text_of(path).split("\n"), 1) if bare(line)]
    rows.each((number, taker(number, line)) for number, line in kept)
    if not files:
        raise UserError(f"{path}: no row can be used" + (f" ({rows.skipped[0]})" if rows.skipped else ": it is empty"))
    source = f"the user's pictures ({path.name})"
    return hands_of(names, persons, source, files=files, skipped=rows.skipped, rows=lines)


def _path_and_label(line: str) -> tuple[str, str]:
    """What stands before and after the last tab or, where there is none, the last space; a path in quotes ends with them."""
    quoted = re.fullmatch(r"\"([^\"]+)\"\s+(.+)", line) or re.fullmatch(r"'([^']+)'\s+(.+)", line)
    if quoted is not None:
        return bare(quoted[1]), bare(quoted[2])
    if "\t" in line:
        name, _, label = line.rpartition("\t")
        return bare(name), bare(label)
    parted = re.fullmatch(r"(.*\S)\s+(\S+)", line)
    return ("", line) if parted is None else (bare(parted[1]), bare(parted[2]))


def as_rows(hands: Hands, sizes: Sequence[tuple[int, int]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a CSV that ``csv:`` takes back: points in pixels of the upright pictures.

    Args:
        hands: with points.
        sizes: width and height of each picture.
    """
    count = hands.points.shape[1]
    headers = ["path", "id", "side", "view", "split", *(f"{axis}{n}" for n in range(1, count + 1) for axis in "xy")]
    rows = []
    for i, (width, height) in enumerate(sizes):
        longest = max(width, height)
        pixels = hands.points[i].astype(np.float64) * (longest - 1) / 2 + np.asarray(
            [(width - 1) / 2, (height - 1) / 2]
        )
        cells = ["" if not np.isfinite(v) else f"{v:.2f}" for v in pixels.ravel().tolist()]
        side = "" if hands.sides[i] == "unknown" else str(hands.sides[i])
        rows.append(
            [str(hands.names[i]), str(hands.persons[i]), side, str(hands.views[i]), str(hands.splits[i]), *cells]
        )
    return headers, rows
