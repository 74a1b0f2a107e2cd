"""Normals that were computed once, as a file that is mapped into memory: int8 or oct16, with validity."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tenfold import UserError

Encoding = Literal["int8", "oct16"]
NUMBERS, INDEX = "normals.bin", "normals.json"
_WIDTHS = {"int8": 3, "oct16": 4}


def encode(normals: NDArray[np.float32], encoding: Encoding) -> NDArray[np.uint8]:
    """Bytes of unit vectors (3, H, W): (H, W, 3) or, for ``oct16``, (H, W, 4)."""
    n = np.moveaxis(np.asarray(normals, np.float64), 0, -1)
    if encoding == "int8":
        return np.ascontiguousarray(np.rint(127 * n).astype(np.int8)).view(np.uint8)
    flat = np.abs(n).sum(-1, keepdims=True)
    p = n[..., :2] / np.maximum(flat, 1e-12)
    folded = (1 - np.abs(p[..., ::-1])) * np.where(p >= 0, 1.0, -1.0)
    p = np.where(n[..., 2:] < 0, folded, p)
    return np.ascontiguousarray(np.rint(32767 * p).astype("<i2")).view(np.uint8)


def decode(numbers: NDArray[np.uint8], encoding: Encoding, valid: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Unit vectors (3, H, W); 0 where ``valid`` (H, W) is 0."""
    if encoding == "int8":
        n = np.ascontiguousarray(numbers).view(np.int8).astype(np.float32)
    else:
        p = np.ascontiguousarray(numbers).view("<i2").astype(np.float32) / 32767
        z = 1 - np.abs(p).sum(-1, keepdims=True)
        unfolded = (1 - np.abs(p[..., ::-1])) * np.where(p >= 0, 1.0, -1.0)
        n = np.concatenate([np.where(z < 0, unfolded, p), z], -1)
    n = n / np.maximum(np.linalg.norm(n, axis=-1, keepdims=True), 1e-12)
    n[valid == 0] = 0
    return np.moveaxis(n, -1, 0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class NormalCache:
    """A folder of normals by picture name; reading one maps its part of the file into memory.

    Attributes:
        path: the folder.
        head: what the normals are: source, method, encoding.
        places: name -> offset in bytes, rows and columns.
    """

    path: Path
    head: dict[str, Any]
    places: dict[str, tuple[int, int, int]]

    @classmethod
    def open(cls, path: str | Path) -> "NormalCache":
        """The cache that ``write`` made.

        Raises:
            UserError: no such folder, or none of ours, or the file of numbers is shorter than its index says.
        """
        path = Path(path)
        try:
            found = json.loads((path / INDEX).read_text(encoding="utf-8"))
            places = {name: (int(o), int(h), int(w)) for name, (o, h, w) in found.pop("places").items()}
            size = (path / NUMBERS).stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no folder of `freespace-uda normals` ({error})") from error
        width = _WIDTHS[found["encoding"]] + 1
        if any(o + h * w * width > size for o, h, w in places.values()):
            raise UserError(f"{path / NUMBERS}: shorter than {INDEX} says: compute the normals again")
        return cls(path, found, places)

    def read(self, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Normals (3, H, W) and validity (1, H, W) of a picture.

        Raises:
            UserError: it is not in the cache.
        """
        if name not in self.places:
            raise UserError(f"{self.path}: no normals of {name}: they are of {self.head.get('source', 'other data')}")
        offset, rows, columns = self.places[name]
        encoding: Encoding = self.head["encoding"]
        width = _WIDTHS[encoding]
        mapped = np.memmap(self.path / NUMBERS, np.uint8, "r", offset, (rows * columns * (width + 1),))
        numbers = np.array(mapped[: rows * columns * width]).reshape(rows, columns, width)
        valid = np.array(mapped[rows * columns * width :]).reshape(rows, columns)
        return decode(numbers, encoding, valid), (valid[None] / np.float32(2)).astype(np.float32)


def write(
    file: Any,
    items: Iterable[tuple[str, NDArray[np.float32], NDArray[np.float32]]],
    encoding: Encoding,
) -> dict[str, Sequence[int]]:
    """Write normals one after another, and return where each lies.

    Args:
        file: opened for binary writing.
        items: name, normals (3, H, W), validity (1, H, W) of 0, 0.5 and 1.
        encoding: int8 or oct16.
    """
    places: dict[str, Sequence[int]] = {}
    offset = 0
    for name, normals, valid in items:
        _, rows, columns = normals.shape
        parts = (encode(normals, encoding).tobytes(), np.rint(2 * valid[0]).astype(np.uint8).tobytes())
        places[name] = (offset, rows, columns)
        for part in parts:
            file.write(part)
            offset += len(part)
    return places
