"""A plan: one row per picture and variation, grouped into units of one level, which any number of workers divide."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import UserError
from tenfold.runs import Run

ROWS, EMBEDDINGS = "plan.jsonl", "embeddings.npy"


@dataclass(frozen=True)
class PlanRow:
    """One picture that is to be generated.

    Attributes:
        number: of the row.
        picture: number of the source in its data.
        key: name of the source.
        variation: number of the view of this source.
        ratio: foreground ratio, or -1 where none was measured.
        level: noise level.
        guidance: guidance scale.
        prompt: text beside the picture.
        seed: seed of everything that is drawn for it.
        unit: unit of work that it belongs to; -1 where the source cannot be read.
        error: why not.
    """

    number: int
    picture: int
    key: str
    variation: int
    ratio: float
    level: int
    guidance: float
    prompt: str
    seed: int
    unit: int
    error: str = ""

    @property
    def name(self) -> tuple[str, int]:
        """What tells rows apart."""
        return self.key, self.variation


def seed_of(root: int, key: str, variation: int) -> int:
    """The seed of a view: the first 63 bits of SHA-256 of root seed, key and variation, whatever else is generated."""
    text = json.dumps([root, key, variation])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def in_units(rows: Sequence[PlanRow], size: int) -> list[PlanRow]:
    """The rows with their units: up to ``size`` rows of one level and one guidance scale."""
    groups: dict[tuple[int, float], list[int]] = {}
    for index, row in enumerate(rows):
        if not row.error:
            groups.setdefault((row.level, row.guidance), []).append(index)
    unit_of: dict[int, int] = {}
    unit = 0
    for key in sorted(groups):
        for start in range(0, len(groups[key]), size):
            unit_of.update(dict.fromkeys(groups[key][start : start + size], unit))
            unit += 1
    return [PlanRow(**{**asdict(row), "unit": unit_of.get(index, -1)}) for index, row in enumerate(rows)]


@dataclass(frozen=True)
class Plan:
    """What a finished `genview plan` says.

    Attributes:
        path: its folder.
        rows: all rows, in the order of the data.
        id: digest of the rows; views of two plans are never mixed.
        embeddings: embeddings of the pictures by number (N, D) float16, or None.
    """

    path: Path
    rows: tuple[PlanRow, ...]
    id: str
    embeddings: Any

    def units(self) -> list[list[PlanRow]]:
        """Rows by unit."""
        found: dict[int, list[PlanRow]] = {}
        for row in self.rows:
            if row.unit >= 0:
                found.setdefault(row.unit, []).append(row)
        return [found[unit] for unit in sorted(found)]

    def embedding(self, rows: Sequence[PlanRow]) -> Tensor:
        """Kept embeddings of the sources of rows. Shapes: -> (N, D) float32."""
        assert self.embeddings is not None
        return torch.from_numpy(np.asarray(self.embeddings[[row.picture for row in rows]], np.float32))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "Plan":
        """Read a plan.

        Raises:
            UserError: no plan there, or a row that is not one of ours.
        """
        path = Path(folder).expanduser()
        path = path.parent if path.is_file() else path
        file = path / ROWS
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"--plan {folder}: expected the folder of a finished `genview plan`, found no {ROWS}"
            ) from error
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            try:
                rows.append(PlanRow(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}, line {number}: not a row of a plan of ours ({error})") from error
        embeddings = None
        if (path / EMBEDDINGS).is_file():
            try:
                embeddings = np.load(path / EMBEDDINGS, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"{path / EMBEDDINGS}: not a whole array ({error})") from error
        return cls(path, tuple(rows), hashlib.sha256(content).hexdigest()[:16], embeddings)


def write(run: Run, rows: Sequence[PlanRow], embeddings: Tensor | None = None) -> None:
    """Write the rows, and the embeddings of the pictures where a generator was given."""
    if embeddings is not None:
        with run.replacing(EMBEDDINGS) as temporary, temporary.open("wb") as file:
            np.save(file, embeddings.half().numpy())
    with run.replacing(ROWS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(line_of(asdict(row)))


def line_of(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON; names that are no Unicode (of files in other encodings) survive as escapes."""
    values = {k: (round(v, 6) if isinstance(v, float) and math.isfinite(v) else v) for k, v in row.items()}
    return json.dumps(values, ensure_ascii=True, allow_nan=False) + "\n"


def spread(rows: Sequence[PlanRow]) -> Iterator[tuple[int, int]]:
    """Number of rows at each level, by level."""
    counts: dict[int, int] = {}
    for row in rows:
        if not row.error:
            counts[row.level] = counts.get(row.level, 0) + 1
    yield from sorted(counts.items())
