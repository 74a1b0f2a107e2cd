"""Data as sessions: base classes with many pictures, then a few classes with a few pictures each, and a test set of all."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_fscil.config import DATA_KINDS, EMBEDDED_DATA, DataSettings, ProtocolConfig
from mamba_fscil.layouts import cub200, miniimagenet
from mamba_fscil.memory import check_maps
from tenfold import UserError, datasets, readers
from tenfold.errors import did_you_mean
from tenfold.images import Split, in_files, in_memory, of_each, pixel_statistics, stratified
from tenfold.models import IMAGENET
from tenfold.randomness import generator

PRESETS: Mapping[str, tuple[int, int, int, int]] = {
    "cifar100": (60, 5, 5, 8),
    "miniimagenet": (60, 5, 5, 8),
    "cub200": (100, 10, 5, 10),
    "cifar10": (6, 2, 5, 2),
    "digits": (6, 2, 5, 2),
    "glyphs": (40, 5, 5, 4),
}
"""Base classes, new classes per session, pictures of each, sessions: those of TOPIC and CEC, and ours for ten classes."""
SIZES = {"imagefolder": 224, "cub200": 224, "miniimagenet": 84, "glyphs": 32}
"""Side of an image by kind, where the images come in no size of their own."""
HELD_OUT = 0.2
"""Share that is held out for testing where the data has no test part of its own."""
RESIDENT = 2e9
"""Bytes of decoded images up to which they are kept in memory."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Images or maps with labels; one of ``split`` and ``maps`` is there."""

    labels: Tensor
    split: Split | None = None
    maps: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Sequence[int] | Tensor) -> "Part":
        """Some of the rows, in the order given."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        split = None if self.split is None else self.split.part(where)
        return Part(self.labels[where], split, None if self.maps is None else self.maps[where])

    def relabeled(self, labels: Tensor) -> "Part":
        """With other labels."""
        split = None if self.split is None else dataclasses.replace(self.split, labels=labels)
        return Part(labels, split, self.maps)


@dataclasses.dataclass(frozen=True)
class SessionData:
    """A whole protocol.

    Attributes:
        classes: names, in the order in which the classes come: base classes first, then session by session.
        base_classes: number of base classes.
        base: their training images.
        shots: for each session, the few pictures of its classes.
        test: test pictures of all classes.
        mean: mean of the pixels in [0, 1], per channel.
        std: their standard deviation.
        size: side of an image; 0 for maps.
        source: what the data are, and whether they are real.
    """

    classes: tuple[str, ...]
    base_classes: int
    base: Part
    shots: tuple[Part, ...]
    test: Part
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    source: str

    def seen(self, session: int) -> int:
        """Number of classes after a session; 0 is the base session."""
        labels = [int(part.labels.max()) + 1 for part in self.shots[:session]]
        return max([self.base_classes, *labels])

    def test_until(self, session: int) -> Part:
        """Test pictures of the classes seen after a session."""
        return self.test.part((self.test.labels < self.seen(session)).nonzero()[:, 0])


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Data before it is cut into sessions."""

    train: Part
    test: Part
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    source: str


def normalized(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes as numbers: (x / 255 - mean) / std. Shapes: (b, C, H, W) uint8 -> float."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(-1, 1, 1)
    return images.float() * scale - shift


def load(
    source: str, protocol: ProtocolConfig | None = None, reading: DataSettings | None = None, *, seed: int = 0
) -> SessionData:
    """Read what ``--data`` names, as sessions.

    Args:
        source: KIND:PATH, or an embedded name.
        protocol: how the classes come.
        reading: how images are read.
        seed: seed of the few-shot pictures, where no lists are given.

    Raises:
        UserError: an unknown kind, a file that is missing or broken, too few classes or pictures for the protocol.
    """
    protocol, reading = protocol or ProtocolConfig(), reading or DataSettings()
    kind, path = readers.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA)
    if kind == "imagefolder" and path is not None and (path / "base").is_dir():
        found = _session_folders(path, protocol, reading)
    else:
        found = _cut(kind, _whole(kind, path, protocol, reading, source), protocol, seed, source)
    if reading.size is not None and not found.size:
        raise UserError(f"--reading.size {reading.size}: --data {source} are maps, not images")
    if reading.limit:
        base = found.base.part(of_each(found.base.labels, lambda count: min(count, reading.limit)))
        found = dataclasses.replace(found, base=base)
    return found


def load_tests(
    source: str, protocol: ProtocolConfig | None = None, reading: DataSettings | None = None, *, plain: bool = False
) -> SessionData:
    """Read the test part of what ``--data`` names, for a learner: of ``DIR/test`` any class is taken, also without a session.

    Args:
        source: KIND:PATH, or an embedded name.
        protocol: how the classes come.
        reading: how images are read.
        plain: take all pictures of a folder that holds one folder per class, not the fifth that a training holds out.

    Raises:
        UserError: as ``load``.
    """
    protocol, reading = protocol or ProtocolConfig(), reading or DataSettings()
    kind, path = readers.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA)
    if kind != "imagefolder" or path is None:
        return load(source, protocol, reading)
    inside = {p.name.lower() for p in path.iterdir() if p.is_dir()} if path.is_dir() else set()
    tested = "test" in inside and not inside & {"val", "valid", "validation"}  # which training would have tested on
    parted = inside & {"base", "train", "training", "test", "val", "valid", "validation"}
    if not tested and (parted or not plain):
        return load(source, protocol, reading)
    _without(protocol, ("base", "way", "shot", "sessions", "index_list"), path)
    size = reading.size or SIZES["imagefolder"]
    found = readers.image_folder(
        next(p for p in path.iterdir() if p.name.lower() == "test") if tested else path, reading
    )
    split = in_files(found, size)
    test = _resident(Part(split.labels, split))
    count, what = len(found.classes), f"the user's images ({path.name})"
    return SessionData(tuple(found.classes), count, test.part([]), (), test, *IMAGENET, size, what)


def _whole(kind: str, path: Path | None, protocol: ProtocolConfig, reading: DataSettings, source: str) -> _Whole:
    if path is None:
        if kind == "digits":
            return _arrays(*datasets.digits(), reading.size)
        base, way, _, sessions = PRESETS["glyphs"]
        count = (protocol.base or base) + (protocol.way or way) * (protocol.sessions or sessions)
        return _arrays(*datasets.glyphs(reading.size or SIZES["glyphs"], classes=count))
    if kind in {"cifar10", "cifar100"}:
        train, test = readers.cifar(path)
        if f"cifar{len(train.classes)}" != kind:
            raise UserError(f"--data {source}: {path} holds CIFAR-{len(train.classes)}")
        return _arrays(train, test, reading.size)
    if kind == "npz":
        return _npz(path, reading.size)
    size = reading.size or SIZES[kind]
    if kind == "imagefolder":
        first, second = readers.image_folders(path, reading)
        training, testing = in_files(first, size), None if second is None else in_files(second, size)
        names, what = first.classes, f"the user's images ({path.name})"
    else:
        names, training, testing = (cub200 if kind == "cub200" else miniimagenet)(path, size)
        what = f"real: {'CUB-200-2011' if kind == 'cub200' else 'miniImageNet'} (the user's copy)"
    parts = _parted(Part(training.labels, training), None if testing is None else Part(testing.labels, testing))
    return _Whole(_resident(parts[0]), _resident(parts[1]), tuple(names), *IMAGENET, size, what)


def _resident(part: Part) -> Part:
    """With its images in memory, where they fit."""
    assert part.split is not None
    return Part(part.labels, part.split.decoded()) if part.split.decoded_bytes <= RESIDENT else part


def _parted(train: Part, test: Part | None) -> tuple[Part, Part]:
    """Both parts; where there is none for testing, a fifth of each class."""
    if test is not None:
        return train, test
    held, rest = stratified(train.labels, HELD_OUT)
    return train.part(rest), train.part(held)


def _resized(split: Split, size: int | None) -> Split:
    """Images in memory at another size."""
    if size in {None, split.size}:
        return split
    assert split.images is not None
    parts = [F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in torch.split(split.images, 256)]
    images = torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])
    return dataclasses.replace(split, images=images, size=size)


def _arrays(train: readers.Images, test: readers.Images | None, size: int | None = None) -> _Whole:
    for part in (train, test):
        if part is not None and part.images.shape[1] != part.images.shape[2]:
            h, w = part.images.shape[1:3]
            raise UserError(f"{part.source}: images of {h} x {w} pixels, expected square ones")
    splits = [None if part is None else _resized(in_memory(part), size) for part in (train, test)]
    assert splits[0] is not None
    parts = _parted(Part(splits[0].labels, splits[0]), None if splits[1] is None else Part(splits[1].labels, splits[1]))
    assert parts[0].split is not None
    assert parts[0].split.images is not None
    mean, std = pixel_statistics(parts[0].split.images)
    rounded = [tuple(round(x, 4) for x in value.clamp_min(1e-3).tolist()) for value in (mean, std)]
    return _Whole(*parts, train.classes, rounded[0], rounded[1], parts[0].split.size, train.source)


def _npz(path: Path, size: int | None) -> _Whole:
    """Images as ``tenfold.readers.npz_images`` takes them; or maps: ``train_maps, train_labels, test_maps, test_labels``."""
    keys = _npz_keys(path)
    if "train_maps" not in keys:
        return _arrays(*readers.npz_images(path), size)
    shape = ("c", "H", "W")
    expected: dict[str, Any] = {}
    for name in ("train", "test") if "test_maps" in keys else ("train",):
        expected[f"{name}_maps"] = ("float32|float16|float64", (name, *shape))
        expected[f"{name}_labels"] = ("uint8|int16|int32|int64", (name,))
    found = readers.npz_arrays(path, expected, finite=False)
    parts = {}
    for name in ("train", "test"):
        if f"{name}_maps" in found:
            maps = torch.from_numpy(found[f"{name}_maps"].astype(np.float32))
            check_maps(maps, f"{path}: '{name}_maps'")
            parts[name] = Part(torch.from_numpy(found[f"{name}_labels"].astype(np.int64)), None, maps)
    top = max(int(part.labels.max()) for part in parts.values())
    names = tuple(map(str, range(top + 1)))
    if "classes" in keys:
        with np.load(path, allow_pickle=False) as file:
            names = tuple(map(str, file["classes"]))
        if top >= len(names):
            raise UserError(f"{path}: a label is {top}, but 'classes' has {len(names)} names")
    return _Whole(*_parted(parts["train"], parts.get("test")), names, (), (), 0, f"the user's maps: {path.name}")


def _npz_keys(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(getattr(file, "files", []))
    except readers.BROKEN_ARRAYS:
        return []


def read_maps(path: Path) -> Tensor:
    """Maps (N, c, H, W) of an ``.npz`` file, under ``maps`` or ``train_maps``.

    Raises:
        UserError: no such array, or of another shape.
        NonFiniteError: NaN or infinity; the message names the row.
    """
    key = "train_maps" if "train_maps" in _npz_keys(path) else "maps"
    found = readers.npz_arrays(path, {key: ("float32|float16|float64", ("N", "c", "H", "W"))}, finite=False)
    maps = torch.from_numpy(found[key].astype(np.float32))
    check_maps(maps, f"{path}: '{key}'")
    return maps


def _cut(kind: str, whole: _Whole, protocol: ProtocolConfig, seed: int, source: str) -> SessionData:
    """The whole as sessions: the first classes are base classes, then ``way`` classes after ``way`` classes."""
    count = len(whole.classes)
    preset = PRESETS.get(kind)
    base = protocol.base or (preset[0] if preset else count)
    way = protocol.way or (preset[1] if preset else 1)
    shot = protocol.shot or (preset[2] if preset else 5)
    sessions = protocol.sessions or (preset[3] if preset else (count - base) // way)
    if base + way * sessions > count:
        raise UserError(
            f"--data {source} has {count} classes; --protocol.base {base} and {sessions} sessions of {way} need"
            f" {base + way * sessions}"
        )
    used = base + way * sessions
    labels = whole.train.labels
    missing = [whole.classes[k] for k in range(used) if not bool((labels == k).any())]
    if missing:
        raise UserError(f"--data {source}: no training picture of class {missing[0]} ({len(missing)} in all)")
    lists = None if protocol.index_list is None else _lists(Path(protocol.index_list), whole, sessions)
    shots = []
    for number in range(sessions):
        classes = range(base + number * way, base + (number + 1) * way)
        chosen = lists[number] if lists else _draw(whole, classes, shot, seed, source)
        strange = [whole.classes[int(labels[i])] for i in chosen if int(labels[i]) not in classes]
        if strange:
            raise UserError(
                f"--protocol.index_list {protocol.index_list}: session {number + 1} names a picture of {strange[0]},"
                f" expected one of {', '.join(whole.classes[k] for k in classes)}"
            )
        shots.append(whole.train.part(chosen))
    tested = (whole.test.labels < used).nonzero()[:, 0]
    first = (labels < base).nonzero()[:, 0]
    rest = (whole.mean, whole.std, whole.size, whole.source)
    return SessionData(
        whole.classes[:used], base, whole.train.part(first), tuple(shots), whole.test.part(tested), *rest
    )


def _draw(whole: _Whole, classes: range, shot: int, seed: int, source: str) -> list[int]:
    """``shot`` pictures of each class, by the seed and the class alone."""
    chosen: list[int] = []
    for k in classes:
        members = (whole.train.labels == k).nonzero()[:, 0]
        if len(members) < shot:
            raise UserError(
                f"--data {source}: class {whole.classes[k]} has {len(members)} training pictures,"
                f" --protocol.shot asks for {shot}"
            )
        order = torch.randperm(len(members), generator=generator(seed, k))
        chosen += sorted(members[order[:shot]].tolist())
    return chosen


def _lists(folder: Path, whole: _Whole, sessions: int) -> list[list[int]]:
    """Rows of the few-shot pictures of each session, from ``session_2.txt`` on: numbers of rows, or paths of pictures."""
    found = []
    split = whole.train.split
    names: dict[str, int] = {}
    if split is not None and split.paths:
        names = {path.name: i for i, path in enumerate(split.paths)}
    for number in range(sessions):
        path = folder / f"session_{number + 2}.txt"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--protocol.index_list {path}: {error}") from error
        rows = []
        for line, text in enumerate(lines, 1):
            word = text.strip()
            if not word:
                continue
            row = names.get(word.replace("\\", "/").rpartition("/")[2]) if names else _number(word, len(whole.train))
            if row is None:
                what = "a picture of the training part" if names else f"a row of 0 to {len(whole.train) - 1}"
                raise UserError(f"--protocol.index_list {path}, line {line}: expected {what}, found '{word}'")
            rows.append(row)
        found.append(rows)
    return found


def _number(word: str, rows: int) -> int | None:
    return int(word) if word.isdigit() and int(word) < rows else None


def _without(protocol: ProtocolConfig, names: Sequence[str], root: Path) -> None:
    for name in names:
        if getattr(protocol, name) is not None:
            raise UserError(f"--protocol.{name}: the folders of {root} say how the classes come")


def _session_folders(root: Path, protocol: ProtocolConfig, reading: DataSettings) -> SessionData:
    """``base/CLASS``, ``session-01/CLASS``..., ``test/CLASS``."""
    size = reading.size or SIZES["imagefolder"]
    folders = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    later = {}
    for name, path in folders.items():
        if match := re.fullmatch(r"session[-_ ]?0*(\d+)", name, re.IGNORECASE):
            if int(match[1]) in later:
                raise UserError(f"{path}: session {match[1]} is there twice")
            later[int(match[1])] = path
        elif name not in {"base", "test"}:
            raise UserError(
                f"{path}: expected base, session-01, session-02... and test, {did_you_mean(name, ['base', 'test'])}"
            )
    if sorted(later) != list(range(1, len(later) + 1)):
        raise UserError(f"{root}: expected session-01 to session-{len(later):02d}, found numbers {sorted(later)}")
    if "test" not in folders:
        raise UserError(f"{root}: expected test/CLASS beside base/, found none")
    _without(protocol, ("base", "way", "sessions", "index_list"), root)
    names: list[str] = []
    parts = []
    for path in [folders["base"], *(later[number] for number in sorted(later))]:
        found = readers.image_folder(path, reading)
        if twice := [name for name in found.classes if _plain(name) in map(_plain, names)]:
            raise UserError(f"{path / twice[0]}: this class is there in an earlier session")
        labels = torch.from_numpy(found.labels) + len(names)
        parts.append(_resident(Part(labels, dataclasses.replace(in_files(found, size), labels=labels))))
        names += found.classes
    if protocol.shot is not None:
        for number, part in enumerate(parts[1:], 1):
            for k in torch.unique(part.labels).tolist():
                if (count := int((part.labels == k).sum())) != protocol.shot:
                    raise UserError(
                        f"{later[number] / names[k]}: {count} pictures, --protocol.shot asks for {protocol.shot}"
                    )
    tested = readers.image_folder(folders["test"], reading)
    labels = match_classes(tested.classes, names, folders["test"])[torch.from_numpy(tested.labels)]
    test = _resident(Part(labels, dataclasses.replace(in_files(tested, size), labels=labels)))
    source = f"the user's images ({root.name})"
    base_classes = int(parts[0].labels.max()) + 1
    return SessionData(tuple(names), base_classes, parts[0], tuple(parts[1:]), test, *IMAGENET, size, source)


def _plain(name: str) -> str:
    """A name without case, spaces and hyphens; a single letter keeps its case."""
    if len(name.strip()) == 1:
        return name.strip()
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def match_classes(theirs: Sequence[str], ours: Sequence[str], where: object) -> Tensor:
    """Number in ``ours`` of each name of ``theirs``, which may be in another order; some of ours may be missing.

    Raises:
        UserError: a name that is not there, with the nearest ones.
    """
    number = {name: k for k, name in enumerate(ours)}
    for name in theirs:
        if name not in number:
            alike = [known for known in ours if _plain(known) == _plain(name)]
            hint = f"did you mean {alike[0]}?" if alike else did_you_mean(name, ours)
            raise UserError(f"{where}: unknown class '{name}': {hint}")
    return torch.tensor([number[name] for name in theirs], dtype=torch.int64)


def same_name(name: str, known: Sequence[str]) -> str | None:
    """The known class that a name is, but for case, spaces and hyphens; None where there is none."""
    return next((other for other in known if _plain(other) == _plain(name)), None)
