"""`handmstn convert`: other people's lists and landmarks -> a CSV that every command takes."""

import csv
import dataclasses
import io
import re
import sys
from pathlib import Path

import numpy as np

from handmstn.config import DATA_KINDS, LANDMARK_KINDS, ConvertSettings
from handmstn.data import listed, with_ids, with_landmark_files
from handmstn.lists import as_rows, bare, picture_size, table_of
from handmstn.parts import preset
from handmstn.records import Hands
from tenfold import UserError, readers
from tenfold.cli import Invocation


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Write ``hands.csv``; its paths are absolute, so that it can be moved."""
    readers.parse_source(settings.data, kinds=DATA_KINDS)
    parts = preset(settings.preset)
    hands = with_ids(listed(settings.data, settings.reading, parts), settings.data)
    if settings.landmarks is not None:
        hands = _with_landmarks(hands, settings)
    if not hands.has_points:
        raise UserError(
            f"--data {settings.data}: no landmarks: --landmarks {', '.join(f'{k}:PATH' for k in LANDMARK_KINDS)}"
        )
    names = np.asarray([str(file.resolve()) for file in hands.files], dtype=np.str_)
    sizes = [picture_size(file) for file in hands.files]
    headers, rows = as_rows(dataclasses.replace(hands, names=names), sizes)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headers, *rows])
    invocation.folder.write_text("hands.csv", text.getvalue())
    with_points = int(np.isfinite(hands.points).all((1, 2)).sum())
    sys.stdout.write(
        f"{len(hands)} pictures, {with_points} with all points of {settings.preset},"
        f" in {invocation.folder.path / 'hands.csv'}\n"
    )


def _with_landmarks(hands: Hands, settings: ConvertSettings) -> Hands:
    assert settings.landmarks is not None
    kind, path = readers.parse_source(settings.landmarks, kinds=LANDMARK_KINDS, option="--landmarks")
    assert path is not None
    parts = preset(settings.preset)
    if kind != "csv":
        if kind == "mat" and settings.unit is not None:
            raise UserError("--unit: a .mat file of the predecessor has a unit of its own")
        return with_landmark_files(hands, path, kind, parts, settings.unit)
    if settings.unit == "share":
        raise UserError("--unit share is for JSON files; a CSV has pixels or unit")
    reading = dataclasses.replace(settings.reading, points=settings.unit or "pixels", skip_bad=False)
    own = _ids(hands)
    with _Joined(path, own) as whole:
        return listed(f"csv:{whole}", reading, parts)


def _ids(hands: Hands) -> dict[str, tuple[str, ...]]:
    """Known facts of a picture by its file name."""
    found: dict[str, tuple[str, ...]] = {}
    for row, file in enumerate(hands.files):
        if file.name in found:
            raise UserError(f"two pictures are called {file.name}: put the ids into the CSV of landmarks")
        side = "" if hands.sides[row] == "unknown" else str(hands.sides[row])
        found[file.name] = (
            str(file.resolve()),
            str(hands.persons[row]),
            side,
            str(hands.views[row]),
            str(hands.splits[row]),
        )
    return found


class _Joined:
    """A CSV of path, x1, y1, ... with the ids of the data, in a temporary file."""

    def __init__(self, path: Path, known: dict[str, tuple[str, ...]]) -> None:
        self.path, self.known = path, known

    def __enter__(self) -> Path:
        import tempfile

        table = table_of(self.path, ("path",), "path, x1, y1, x2, y2, ...")
        spots = [name for name in table.columns if re.fullmatch(r"[xy]\d+", name)]
        rows = [["path", "id", "side", "view", "split", *spots]]
        for number, row in table.rows:
            cells = table.cells(number, row)
            known = self.known.get(Path(bare(cells["path"]).replace("\\", "/")).name)
            if known is None:
                raise UserError(f"--landmarks {self.path}, row {number}: no picture of the data is called so")
            values = [cells[name] for name in spots]
            rows.append([*known, *(v.replace(",", ".") if table.decimal_comma else v for v in values)])
        self.file = tempfile.NamedTemporaryFile("w", suffix=".csv", delete=False, encoding="utf-8", newline="")
        with self.file as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        return Path(self.file.name)

    def __exit__(self, *error: object) -> None:
        Path(self.file.name).unlink(missing_ok=True)
