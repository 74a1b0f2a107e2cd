"""Readers of the layouts that people have, each of which checks what it reads; pictures by key, with or without labels."""

import csv
import io
import json
import math
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from genview.config import DATA_KINDS, EMBEDDED_DATA
from tenfold import UserError, datasets, readers
from tenfold.images import square, stratified
from tenfold.reading import Reading

Read = Callable[[int], NDArray[np.uint8]]
_COLUMNS = ("image", "prompt", "label", "noise_level", "guidance_scale")


@dataclass(frozen=True)
class Pictures:
    """Pictures by key.

    Attributes:
        keys: name of each, unique: a path with slashes below the data's folder, or a part and a number.
        labels: (N,) int64, or None.
        read: number -> (H, W, 3) uint8; raises UserError where it cannot be decoded.
        captions: one per picture, or empty.
        levels: noise level that the data ask for, one per picture, or empty; -1 where one asks for none.
        guidance: guidance scale that the data ask for, or empty; NaN where one asks for none.
        side: side of all pictures where they are square and of one size, else 0.
    """

    keys: tuple[str, ...]
    labels: Tensor | None
    read: Read
    captions: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    guidance: tuple[float, ...] = ()
    side: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, indices: Sequence[int]) -> "Pictures":
        """Some of the pictures, in the order given."""
        chosen = list(indices)

        def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[i] for i in chosen) if values else ()

        labels = None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.int64)]
        read = self.read
        return Pictures(
            cut(self.keys),
            labels,
            lambda i: read(chosen[i]),
            cut(self.captions),
            cut(self.levels),
            cut(self.guidance),
            self.side,
        )


@dataclass(frozen=True)
class PictureData:
    """What ``--data`` names.

    Attributes:
        train: pictures to learn from and to make views of.
        test: labeled pictures for evaluation, or None.
        classes: name of each label.
        source: what the data are, and whether they are real.
    """

    train: Pictures
    test: Pictures | None
    classes: tuple[str, ...]
    source: str


def load(source: str, *, option: str = "--data", reading: Reading | None = None) -> PictureData:
    """Read what ``--data`` names.

    Raises:
        UserError: an unknown kind, a file that is missing, broken or of another layout; the message names it.
    """
    kind, path = readers.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA, option=option)
    if path is None:
        return _of_arrays(*datasets.digits())
    if kind in {"cifar10", "cifar100"}:
        return _of_arrays(*readers.cifar(path))
    if kind == "npz":
        return _of_arrays(*readers.npz_images(path))
    if kind == "imagefolder":
        return _image_folders(path, reading)
    if kind == "folder":
        train = _folder(path)
    elif kind == "csv":
        train = _table(path)
    elif kind == "list":
        train = _listed(path)
    else:
        train = _tars(path)
    if not len(train):
        raise UserError(f"{option} {source}: no picture there ({', '.join(sorted(readers.IMAGE_SUFFIXES))})")
    return PictureData(train, None, (), f"the user's pictures ({path.name})")


def _of_arrays(train: readers.Images, test: readers.Images | None) -> PictureData:
    def part(images: readers.Images, name: str) -> Pictures:
        pixels = images.images
        side = pixels.shape[1] if pixels.shape[1] == pixels.shape[2] else 0
        keys = tuple(f"{name}/{i:07d}" for i in range(len(pixels)))

        def read(i: int) -> NDArray[np.uint8]:
            return pixels[i] if pixels.ndim == 4 else np.repeat(pixels[i][..., None], 3, axis=2)

        return Pictures(keys, torch.from_numpy(images.labels.astype(np.int64)), read, side=side)

    return PictureData(part(train, "train"), None if test is None else part(test, "test"), train.classes, train.source)


def _image_folders(root: Path, reading: Reading | None) -> PictureData:
    """train/CLASS/* with val/ or test/ beside it; of class folders alone, a fifth of each class is held out for testing."""
    train, test = readers.image_folders(root, reading)

    def part(folder: readers.ImageFolder, base: Path) -> Pictures:
        keys = tuple(path.relative_to(base).as_posix() for path in folder.paths)
        return Pictures(keys, torch.from_numpy(folder.labels), lambda i: readers.read_image(folder.paths[i]))

    first = part(train, root)
    if test is not None:
        return PictureData(first, part(test, root), train.classes, f"the user's pictures ({root.name})")
    assert first.labels is not None
    held, rest = stratified(first.labels, 0.2)
    return PictureData(first.part(rest), first.part(held), train.classes, f"the user's pictures ({root.name})")


def _folder(root: Path) -> Pictures:
    """All pictures at any depth, without labels; a link out of the folder or to nowhere becomes a picture that is broken."""
    if not root.is_dir():
        raise UserError(f"--data folder:{root}: expected a folder")
    paths: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths += [
            Path(folder) / name
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in readers.IMAGE_SUFFIXES
        ]
    inside = root.resolve()
    paths.sort(key=lambda path: os.fsencode(path.relative_to(root)))

    def read(i: int) -> NDArray[np.uint8]:
        path = paths[i]
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(f"{path}: a link that leads outside of {root}")
        return readers.read_image(path)

    return Pictures(tuple(path.relative_to(root).as_posix() for path in paths), None, read)


def _under(root: Path, name: str, where: str) -> Path:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: expected a path below {root}, found '{name}'")
    return root / path


def _distinct(keys: Sequence[str], where: Path) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for number, name in enumerate(keys, 1):
        if name in seen:
            raise UserError(f"{where}: '{name}' stands there twice, as entries {seen[name]} and {number}")
        seen[name] = number
    return tuple(keys)


def _listed(file: Path) -> Pictures:
    """One path a line, below the list's own folder; the whole line is the path, so that it may hold spaces."""
    lines = [line for line in _text(file).splitlines() if line.strip()]
    paths = [_under(file.parent, line, f"{file}, line {row}") for row, line in enumerate(lines, 1)]
    return Pictures(_distinct(lines, file), None, lambda i: readers.read_image(paths[i]))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error


def _table(file: Path) -> Pictures:
    """A csv with a column image, and any of prompt, label, noise_level, guidance_scale."""
    reader = csv.DictReader(io.StringIO(_text(file)))
    if reader.fieldnames is None or "image" not in reader.fieldnames:
        raise UserError(f"{file}: expected a header with 'image' and any of {', '.join(_COLUMNS[1:])}")
    rows = list(reader)
    paths, levels, scales, labels = [], [], [], []
    for line, row in enumerate(rows, 2):
        where = f"{file}, line {line}"
        paths.append(_under(file.parent, row["image"] or "", where))
        levels.append(int(_number(row, "noise_level", where, -1)))
        scales.append(_number(row, "guidance_scale", where, float("nan")))
        labels.append(int(_number(row, "label", where, -1)))
        if not -1 <= levels[-1] <= 999:
            raise UserError(f"{where}: noise_level must be in 0..999, found {levels[-1]}")
    captions = tuple(row.get("prompt") or "" for row in rows) if "prompt" in reader.fieldnames else ()
    return Pictures(
        _distinct([row["image"] for row in rows], file),
        torch.tensor(labels) if "label" in reader.fieldnames else None,
        lambda i: readers.read_image(paths[i]),
        captions,
        tuple(levels) if "noise_level" in reader.fieldnames else (),
        tuple(scales) if "guidance_scale" in reader.fieldnames else (),
    )


def _number(row: Mapping[str, str | None], name: str, where: str, default: float) -> float:
    text = row.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if math.isinf(value):
        raise UserError(f"{where}: {name} is '{text}', expected a number")
    return default if math.isnan(value) else value


def _tars(path: Path) -> Pictures:
    """Pictures of one WebDataset tar, or of all tars of a folder, with captions from .txt members of the same name."""
    files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    keys: list[str] = []
    where: list[tuple[Path, int, int]] = []
    captions: dict[str, str] = {}
    for file in files:
        try:
            with tarfile.open(file, "r:") as archive:  # not compressed, so that members can be read in any order
                for member in archive:
                    name = PurePosixPath(member.name)
                    stem = f"{file.stem}/{name.as_posix()}"
                    if not member.isfile() or name.is_absolute() or ".." in name.parts:
                        continue
                    if name.suffix.lower() in readers.IMAGE_SUFFIXES:
                        keys.append(stem)
                        where.append((file, member.offset_data, member.size))
                    elif name.suffix == ".txt":
                        content = archive.extractfile(member)
                        assert content is not None
                        captions[stem.removesuffix(".txt")] = content.read().decode("utf-8", "replace").strip()
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"--data webdataset:{file}: not a whole, uncompressed tar ({error})") from error

    def read(i: int) -> NDArray[np.uint8]:
        file, offset, size = where[i]
        with file.open("rb") as content:
            content.seek(offset)
            return decode(content.read(size), f"{file}: {keys[i]}")

    texts = tuple(captions.get(str(PurePosixPath(key).with_suffix("")), "") for key in keys) if captions else ()
    return Pictures(_distinct(keys, path), None, read, texts)


def decode(content: bytes, shown: str) -> NDArray[np.uint8]:
    """Decode a picture's bytes as ``tenfold.readers.read_image`` decodes a file.

    Raises:
        UserError: it cannot be decoded; the message begins with ``shown``.
    """
    try:
        return readers.read_image(io.BytesIO(content))  # type: ignore[arg-type]  # Pillow takes both
    except UserError as error:
        raise UserError(f"{shown}: {str(error).partition(': ')[2]}") from error


def squared(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of a picture at a side; pixels of that size already stay as they are."""
    if pixels.shape[:2] == (size, size):
        return pixels
    from PIL import Image

    return square(Image.fromarray(pixels), size)


@dataclass(frozen=True)
class GeneratedViews:
    """Generated views of a data set, by the key of their picture.

    Attributes:
        files: key -> files of its views, by variation.
        quality: key -> static quality of its first view; empty where none was scored.
        path: where they come from.
    """

    files: Mapping[str, tuple[Path, ...]]
    quality: Mapping[str, float] = field(default_factory=dict)
    path: Path = Path()


def read_manifest(folder: str | os.PathLike[str]) -> GeneratedViews:
    """The views of a finished ``genview merge``; rows that failed or were dropped are left out.

    Raises:
        UserError: no manifest there, a row that is not one of ours, a path that leads outside of the folder of views.
    """
    path = Path(folder).expanduser()
    file = path if path.is_file() else path / "manifest.jsonl"
    if not file.is_file():
        raise UserError(f"--views {folder}: expected the folder of a finished `genview merge`, found no manifest.jsonl")
    files: dict[str, list[tuple[int, Path]]] = {}
    quality: dict[str, float] = {}
    root: Path | None = None
    for number, row in enumerate(json_lines(file), 1):
        if "views" in row:
            root = Path(str(row["views"]))
            root = root if root.is_absolute() else (file.parent / root)
            continue
        try:
            if row["status"] != "ok":
                continue
            assert root is not None
            name = PurePosixPath(str(row["path"]))
            if name.is_absolute() or ".." in name.parts:
                raise UserError(f"{file}, line {number}: '{name}' leads outside of the folder of views")
            files.setdefault(str(row["key"]), []).append((int(row["variation"]), root / name))
            if row.get("q") is not None and int(row["variation"]) == 0:
                quality[str(row["key"])] = float(row["q"])
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file}, line {number}: not a row of a manifest of ours ({error})") from error
    ordered = {key: tuple(path for _, path in sorted(found)) for key, found in files.items()}
    return GeneratedViews(ordered, quality, file)


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of one JSON a line.

    Raises:
        UserError: no such file, or a line that is none.
    """
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}, line {number}: expected an object")
                yield row
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: a line is not JSON ({error})") from error


class PairedViewDataset(Dataset[Any]):
    """Pictures with their generated views: (index, picture, view, whether there is one), uint8 (3, S, S).

    Augmentation is a matter of batches, see ``genview.augment.make_pairs``. Of several views of a picture one is taken at
    random, from torch's global generator, which ``KeyedLoader`` keys.

    Args:
        pictures: the pictures.
        views: their generated views, or None.
        size: side that both are brought to, so that neither is told by its resolution.
        resident: keep all pixels in memory, decoded here and now.

    Raises:
        UserError: no picture has a view; with ``resident``, a picture that cannot be decoded.
    """

    def __init__(self, pictures: Pictures, views: GeneratedViews | None, size: int, *, resident: bool = False) -> None:
        self.pictures, self.size = pictures, size
        self.files = [() if views is None else views.files.get(key, ()) for key in pictures.keys]
        if views is not None and not any(self.files):
            example = next(iter(views.files), "none")
            raise UserError(
                f"--views {views.path}: no picture of the data has a view there; keys differ: '{pictures.keys[0]}' in the"
                f" data, '{example}' in the views"
            )
        self.images: Tensor | None = None
        self.views: list[tuple[Tensor, ...]] = []
        if resident:
            self.images = torch.stack([self._picture(i) for i in range(len(pictures))])
            self.views = [tuple(self._file(path) for path in files) for files in self.files]

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def with_view(self) -> Tensor:
        """Which pictures have a generated view (N,)."""
        return torch.tensor([bool(files) for files in self.files])

    def _picture(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(squared(self.pictures.read(i), self.size))).permute(2, 0, 1)

    def _file(self, path: Path) -> Tensor:
        return torch.from_numpy(np.array(squared(readers.read_image(path), self.size))).permute(2, 0, 1)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, bool]:
        image = self._picture(index) if self.images is None else self.images[index]
        files = self.files[index]
        if not files:
            return index, image, image, False
        number = int(torch.randint(len(files), ())) if len(files) > 1 else 0
        view = self.views[index][number] if self.views else self._file(files[number])
        return index, image, view, True


def pixels_of(pictures: Pictures, size: int) -> Tensor:
    """All pictures as middle squares (N, 3, size, size) uint8, without augmentation.

    Raises:
        UserError: one cannot be decoded.
    """
    return torch.stack(
        [torch.from_numpy(np.array(squared(pictures.read(i), size))).permute(2, 0, 1) for i in range(len(pictures))]
    )
