"""What is known of pictures of hands: whose, which side, where the points lie; in memory, brought to look like right hands."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handmstn.parts import PartSpec, mirror_points
from tenfold import UserError, readers

Strings = NDArray[np.str_]


def letterboxed(picture: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The whole picture in a black square, (3, size, size): the longer side is fitted."""
    from PIL import Image

    height, width = picture.shape[:2]
    longest = max(height, width)
    new = max(1, round(width * size / longest)), max(1, round(height * size / longest))
    small = np.asarray(Image.fromarray(picture).resize(new, Image.Resampling.BILINEAR))
    out = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new[1]) // 2, (size - new[0]) // 2
    out[top : top + new[1], left : left + new[0]] = small
    return np.ascontiguousarray(out.transpose(2, 0, 1))


def to_unit(pixels: NDArray[np.float64], width: int, height: int) -> NDArray[np.float64]:
    """Pixel places of a picture in the square around it: -1 to 1 along the longer side."""
    longest = max(width, height)
    middle = np.asarray([(width - 1) / 2, (height - 1) / 2])
    out: NDArray[np.float64] = (np.asarray(pixels, np.float64) - middle) / (max(longest - 1, 1) / 2)
    return out


@dataclasses.dataclass(frozen=True)
class Hands:
    """Pictures of hands with what is known of them, (N,) each.

    Attributes:
        names: what each picture is called: its path as the data has it.
        files: the files; empty where the pictures are in memory only.
        persons: id of the person, a text as the data has it.
        sides: left, right or unknown.
        views: palmar, dorsal or empty.
        splits: train, gallery, probe, test or empty.
        points: control points of the parts they were read for, or 21 landmarks, NaN where unknown; (N, K, 2), K may be 0.
        visibility: of each part, NaN where unknown, (N, P).
        guessed: what was guessed of each picture, in words; empty for nothing.
        source: where they come from, and whether they are real or rendered.
        images: (N, 3, S, S) uint8; None while they are files.
        skipped: rows that were left out, in words.
        identity: whether the two hands of a person are two classes.
        rows: line of each picture in its list, or its number from 1.
    """

    names: Strings
    files: tuple[Path, ...]
    persons: Strings
    sides: Strings
    views: Strings
    splits: Strings
    points: NDArray[np.float32]
    visibility: NDArray[np.float32]
    guessed: Strings
    source: str
    images: Tensor | None = None
    skipped: tuple[str, ...] = ()
    identity: str = "hand"
    rows: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.names):
            object.__setattr__(self, "rows", np.arange(1, len(self.names) + 1))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> Strings:
        """The class of each picture: ``person`` or, with known sides, ``person:side``."""
        if self.identity == "person":
            return self.persons
        both = [p if s == "unknown" else f"{p}:{s}" for p, s in zip(self.persons, self.sides, strict=True)]
        return np.asarray(both, dtype=np.str_)

    def part(self, chosen: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> "Hands":
        """Some of the pictures."""
        index = np.asarray(chosen)
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        fields = ("names", "persons", "sides", "views", "splits", "points", "visibility", "guessed", "rows")
        own = {name: getattr(self, name)[index] for name in fields}
        files = tuple(self.files[i] for i in index) if self.files else ()
        images = None if self.images is None else self.images[torch.from_numpy(index)]
        return dataclasses.replace(self, **own, files=files, images=images)

    def split(self, name: str) -> "Hands":
        """The pictures of one part of the data.

        Raises:
            UserError: there are none.
        """
        if not (self.splits == name).any():
            there = ", ".join(sorted({s for s in self.splits.tolist() if s})) or "none"
            raise UserError(f"{self.source}: no picture of the part '{name}' (parts: {there})")
        return self.part(self.splits == name)

    @property
    def has_points(self) -> bool:
        """Whether any picture has points."""
        return self.points.shape[1] > 0 and bool(np.isfinite(self.points).any())

    def digest(self, index: int) -> str:
        """A fingerprint of a picture's pixels."""
        assert self.images is not None, "decoded"
        return hashlib.sha256(self.images[index].numpy().tobytes()).hexdigest()[:32]

    def decoded(self, size: int, *, skip_bad: bool = False, show: Callable[[range], Sequence[int]] = list) -> "Hands":
        """With every picture in memory, upright by the camera's tag, in a square of ``size`` pixels.

        Raises:
            UserError: a file that cannot be decoded, unless ``skip_bad`` leaves it out; the message names it and its row.
        """
        if self.images is not None:
            return self
        kept, pictures, skipped = [], [], list(self.skipped)
        for row in show(range(len(self))):
            try:
                pictures.append(torch.from_numpy(letterboxed(readers.read_image(self.files[row]), size)))
            except UserError as error:
                if not skip_bad:
                    raise UserError(
                        f"row {self.rows[row]}: {error}; --reading.skip_bad true leaves such pictures out"
                    ) from error
                skipped.append(f"row {self.rows[row]}: {error}")
                continue
            kept.append(row)
        if not kept:
            raise UserError(f"{self.source}: none of {len(self)} pictures can be decoded ({skipped[0]})")
        return dataclasses.replace(self.part(kept), images=torch.stack(pictures), skipped=tuple(skipped))

    def rightened(self, parts: tuple[PartSpec, ...]) -> "Hands":
        """With left hands mirrored, points and all, to look like right ones; the sides still say what they are."""
        assert self.images is not None, "decoded"
        left = self.sides == "left"
        if not left.any():
            return self
        images = self.images.clone()
        where = torch.from_numpy(np.flatnonzero(left))
        images[where] = images[where].flip(-1)
        points = self.points.copy()
        if points.shape[1] == sum(part.count for part in parts):
            points[left] = mirror_points(points[left], parts)
        elif points.shape[1]:
            points[left] *= np.asarray([-1, 1], np.float32)
        return dataclasses.replace(self, images=images, points=points)


def hands_of(
    names: Sequence[str],
    persons: Sequence[str],
    source: str,
    *,
    files: Sequence[Path] = (),
    sides: Sequence[str] | None = None,
    views: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    points: NDArray[np.float32] | None = None,
    visibility: NDArray[np.float32] | None = None,
    images: Tensor | None = None,
    skipped: Sequence[str] = (),
    identity: str = "hand",
    rows: Sequence[int] = (),
) -> Hands:
    """``Hands`` with what is not known left open."""
    count = len(names)

    def strings(given: Sequence[str] | None, fill: str) -> Strings:
        return np.asarray([fill] * count if given is None else list(given), dtype=np.str_)

    return Hands(
        strings(names, ""),
        tuple(files),
        strings(persons, ""),
        strings(sides, "unknown"),
        strings(views, ""),
        strings(splits, ""),
        np.zeros((count, 0, 2), np.float32) if points is None else points.astype(np.float32),
        np.zeros((count, 0), np.float32) if visibility is None else visibility.astype(np.float32),
        strings(None, ""),
        source,
        images,
        tuple(skipped),
        identity,
        np.asarray(rows, np.int64),
    )
