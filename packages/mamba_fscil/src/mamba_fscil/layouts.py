"""The layouts of CUB-200-2011 and miniImageNet as they are published."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from tenfold import UserError
from tenfold.images import Split
from tenfold.readers import ImageFolder, image_folder

Layout = tuple[tuple[str, ...], Split, Split]
"""Class names, training part, test part."""


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def cub200(root: Path, size: int) -> Layout:
    """``CUB_200_2011`` with ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt`` and ``images/``.

    Classes come by their numbers, as in the protocol.

    Raises:
        UserError: a list that is missing, a line that is none of its form, or a picture that is not there.
    """
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    tables = {}
    for name in ("images", "image_class_labels", "train_test_split"):
        path = root / f"{name}.txt"
        for number, words in enumerate(_lines(path), 1):
            if len(words) != 2 or not words[0].isdigit() or (name != "images" and not words[1].isdigit()):
                raise UserError(f"{path}, line {number}: expected a number and a value, found '{' '.join(words)}'")
        tables[name] = {int(words[0]): words[1] for words in _lines(path)}
    rows = []
    for key, file in sorted(tables["images"].items()):
        if key not in tables["image_class_labels"] or key not in tables["train_test_split"]:
            raise UserError(f"{root}: image {key} ({file}) has no class or no split")
        path = _inside(root / "images", file)
        rows.append((path, int(tables["image_class_labels"][key]) - 1, tables["train_test_split"][key] == "1"))
    return _split(rows, size, root)


def miniimagenet(root: Path, size: int) -> Layout:
    """``images/`` with ``split/train.csv`` and ``split/test.csv`` (``filename,label``), or ``train/WNID`` with ``test/WNID``.

    Classes come by their names in the order of WordNet's numbers, as in the protocol.

    Raises:
        UserError: neither layout, a line that is none of its form, or a picture that is not there.
    """
    for folder in (root, root / "MINI-ImageNet", root / "miniimagenet"):
        if (folder / "split" / "train.csv").is_file():
            return _csv_layout(folder, size)
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            first, second = image_folder(folder / "train"), image_folder(folder / "test")
            if first.classes != second.classes:
                raise UserError(f"{folder}: train/ and test/ have other classes")
            return first.classes, _of_folder(first, size), _of_folder(second, size)
    raise UserError(f"{root}: expected split/train.csv and split/test.csv, or train/WNID and test/WNID, found neither")


def _csv_layout(root: Path, size: int) -> Layout:
    rows: list[tuple[Path, str, bool]] = []
    for name in ("train", "test"):
        path = root / "split" / f"{name}.csv"
        try:
            table = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: {error}") from error
        for number, words in enumerate(table[1:], 2):
            if len(words) != 2:
                raise UserError(f"{path}, line {number}: expected filename,label, found '{','.join(words)}'")
            rows.append((_inside(root / "images", words[0]), words[1], name == "train"))
    wnids = sorted({row[1] for row in rows})
    numbered = [(path, wnids.index(wnid), training) for path, wnid, training in rows]
    _, train, test = _split(numbered, size, root)
    return tuple(wnids), train, test


def _of_folder(folder: ImageFolder, size: int) -> Split:
    return Split(torch.from_numpy(folder.labels), None, folder.paths, size)


def _inside(folder: Path, name: str) -> Path:
    """A picture that a list names.

    Raises:
        UserError: it is not there, or lies elsewhere.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name} leads outside of {folder}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def _split(rows: Sequence[tuple[Path, int, bool]], size: int, root: Path) -> Layout:
    """Training and test part; a class is called by the folder of its first picture."""
    if not rows:
        raise UserError(f"{root}: no pictures are listed")
    parts = []
    for training in (True, False):
        chosen = [(path, label) for path, label, kind in rows if kind == training]
        labels = torch.tensor([label for _, label in chosen], dtype=torch.int64)
        parts.append(Split(labels, None, tuple(path for path, _ in chosen), size))
    count = max(label for _, label, _ in rows) + 1
    names = {label: path.parent.name for path, label, _ in reversed(rows)}
    return tuple(names.get(k, str(k)) for k in range(count)), parts[0], parts[1]
