"""Readers of the layouts that people have, each of which checks what it reads; images as uint8, in memory or by path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pckd.config import DATA_KINDS, EMBEDDED_DATA, DataSettings
from pckd.models import IMAGENET
from tenfold import UserError, datasets

CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)),
}
"""Mean and standard deviation of the training pixels, by number of classes; the second as in the authors' code."""
HELD_OUT = 0.2
"""Share that is held out for testing where the data has no test part of its own."""


class DataError(UserError):
    """Data that cannot be used; the message names the file or folder."""


@dataclass(frozen=True)
class Split:
    """Images with labels; either ``images`` or ``paths`` is there.

    Attributes:
        labels: (N,) int64.
        images: (N, 3, H, W) uint8, channels last in memory; None when they are decoded as they are needed.
        paths: of the files; empty for data that does not come in files.
        size: side that files are brought to.
    """

    labels: Tensor
    images: Tensor | None
    paths: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file, or the number."""
        return str(self.paths[index]) if self.paths else str(index)

    def part(self, indices: Sequence[int] | Tensor) -> "Split":
        """Some of the images."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        paths = tuple(self.paths[i] for i in where.tolist()) if self.paths else ()
        return Split(self.labels[where], None if self.images is None else self.images[where], paths, self.size)

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, 3, size, size) uint8 of these images, without augmentation."""
        if self.images is not None:
            return self.images[indices]
        return torch.stack([_channels_first(read_square(self.paths[i], self.size)) for i in indices.tolist()])


@dataclass(frozen=True)
class Data:
    """What a command works on.

    Attributes:
        train: training images.
        val: held out of them to choose the best epoch, or None.
        test: for the report only.
        classes: name of each label.
        mean: of the pixels in [0, 1], a channel.
        std: likewise.
        source: what it is, and whether it is real.
    """

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @property
    def size(self) -> int:
        """Side of an image."""
        return self.train.size


class Indexed(Dataset[Any]):
    """Items for a loader: (index, label), and the decoded image where images are not in memory.

    Files come as random resized crops, drawn from the global generator of the process, which the loader keys.
    """

    def __init__(self, split: Split, *, crops: bool) -> None:
        self.split = split
        self.crops = crops

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        label = int(self.split.labels[index])
        if self.split.images is not None:
            return index, label
        path, size = self.split.paths[index], self.split.size
        return index, label, _channels_first(_random_crop(path, size) if self.crops else read_square(path, size))


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def _square_side(side: int) -> int:
    return max(side, round(side * 256 / 224)) if side >= 128 else side


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """(size, size, 3): the shorter side is scaled to ``size`` (256 / 224 of it from 128 pixels on), then the middle is cut."""
    from PIL import Image

    image = Image.fromarray(datasets.read_image(path))
    short = _square_side(size)
    scale = short / min(image.size)
    image = image.resize((max(short, round(image.width * scale)), max(short, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _random_crop(path: Path, size: int) -> NDArray[np.uint8]:
    """A crop of 8 to 100 % of the area and sides of 3:4 to 4:3, as is usual for ImageNet; mirrored in half of the cases."""
    from PIL import Image

    image = Image.fromarray(datasets.read_image(path))
    area, (low, high) = image.width * image.height, np.log([3 / 4, 4 / 3])
    for _ in range(10):
        u = torch.rand(4).tolist()
        target, ratio = area * (0.08 + 0.92 * u[0]), float(np.exp(low + (high - low) * u[1]))
        w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < w <= image.width and 0 < h <= image.height:
            left, top = int(u[2] * (image.width - w + 1)), int(u[3] * (image.height - h + 1))
            break
    else:
        w = h = min(image.size)
        left, top = (image.width - w) // 2, (image.height - h) // 2
    crop = image.resize((size, size), box=(left, top, left + w, top + h))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if torch.rand(()).item() < 0.5 else pixels


def load(source: str, settings: DataSettings | None = None) -> Data:
    """Read what ``--data`` names.

    Raises:
        UserError: an unknown kind, a file that is missing, broken or of another layout; the message names it.
    """
    settings = settings or DataSettings()
    kind, path = datasets.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA)
    if path is None:
        data = _embedded(kind, settings)
    elif kind == "npz":
        data = _npz(path)
    elif kind in {"cifar10", "cifar100"}:
        data = _cifar(path, int(kind.removeprefix("cifar")))
    else:
        data = (_image_folder if kind == "imagefolder" else _tiny_imagenet)(path, settings)
    if settings.size not in (None, data.size):
        raise DataError(f"--data {source}: images are {data.size} pixels wide; size is for folders of files")
    train = data.train
    if settings.limit:
        each = settings.limit // len(data.classes)
        if not each:
            raise DataError(
                f"limit is {settings.limit}, but there are {len(data.classes)} classes: one of each is needed"
            )
        train = train.part(_of_each(train.labels, lambda count: min(count, each)))
    if not len(train) or not len(data.test):
        raise DataError(
            f"--data {source}: {len(train)} training and {len(data.test)} test images: one of each at least is needed"
        )
    val = None
    if settings.val_fraction:
        chosen, rest = _stratified(train.labels, settings.val_fraction)
        train, val = train.part(rest), train.part(chosen)
    return Data(train, val, data.test, data.classes, data.mean, data.std, data.source)


def _stratified(labels: Tensor, share: float) -> tuple[list[int], list[int]]:
    """Indices of about that share of each class (one at least, never all), and of the rest; equal labels, equal answer."""
    taken = _of_each(labels, lambda count: min(max(1, round(count * share)), count - 1))
    return taken, sorted(set(range(len(labels))) - set(taken))


def _of_each(labels: Tensor, number: Callable[[int], int]) -> list[int]:
    """Indices of ``number(count)`` images of each class that has ``count``; equal labels, equal answer."""
    generator = torch.Generator().manual_seed(0)
    taken: list[int] = []
    for label in torch.unique(labels):
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        taken += members[order[: number(len(members))]].tolist()
    return sorted(taken)


def _resident(images: NDArray[np.uint8], labels: NDArray[Any]) -> Split:
    """(N, H, W) gray or (N, H, W, 3) -> a split in memory, in color, square."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    return Split(torch.from_numpy(labels.astype(np.int64)), pixels, (), images.shape[1])


def _statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    assert split.images is not None
    pixels = split.images.double() / 255
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3)).clamp_min(1e-3)
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())


def _embedded(name: str, settings: DataSettings) -> Data:
    images: tuple[datasets.Images, datasets.Images]
    images = datasets.digits() if name == "digits" else datasets.glyphs(settings.size or 32, classes=62)
    return from_images(*images)


def from_images(train: datasets.Images, test: datasets.Images) -> Data:
    """Embedded images of ``tenfold.datasets`` as data; pixel statistics of the training part."""
    splits = [_resident(part.images, part.labels) for part in (train, test)]
    return Data(splits[0], None, splits[1], train.classes, *_statistics(splits[0]), train.source)


def _cifar(path: Path, classes: int) -> Data:
    train, test = datasets.cifar(path)
    if len(train.classes) != classes:
        raise DataError(f"{path} holds CIFAR-{len(train.classes)}, not CIFAR-{classes}")
    splits = [_resident(part.images, part.labels) for part in (train, test)]
    return Data(
        splits[0], None, splits[1], train.classes, *CIFAR_STATISTICS[classes], f"real: CIFAR-{classes} ({path})"
    )


def _npz(path: Path) -> Data:
    """train_images, train_labels, test_images, test_labels and, perhaps, classes; or x and y, of which a fifth is held out."""
    train, test = datasets.npz_images(path)
    for part in (train, test):
        if part is not None and part.images.shape[1] != part.images.shape[2]:
            raise DataError(
                f"{path}: images of {part.images.shape[1]} x {part.images.shape[2]} pixels, expected square ones"
            )
    whole = _resident(train.images, train.labels)
    if test is None:
        held, rest = _stratified(whole.labels, HELD_OUT)
        splits = [whole.part(rest), whole.part(held)]
    else:
        splits = [whole, _resident(test.images, test.labels)]
    return Data(splits[0], None, splits[1], train.classes, *_statistics(splits[0]), train.source)


def _decoded(split: Split, budget: float) -> Split:
    """With the images in memory where they fit into ``budget`` bytes; every file is then decoded here and now."""
    if len(split) * 3 * split.size**2 > budget:
        return split
    images = np.empty((len(split), split.size, split.size, 3), np.uint8)
    for row, path in zip(images, split.paths, strict=True):
        row[:] = read_square(path, split.size)
    return Split(split.labels, torch.from_numpy(images).permute(0, 3, 1, 2), split.paths, split.size)


def _from_files(train: Split, test: Split, classes: tuple[str, ...], settings: DataSettings, source: str) -> Data:
    budget = settings.resident_gb * 1e9
    total = (len(train) + len(test)) * 3 * train.size**2
    splits = [_decoded(split, budget if total <= budget else 0) for split in (train, test)]
    return Data(splits[0], None, splits[1], classes, *IMAGENET, source)


def _image_folder(root: Path, settings: DataSettings) -> Data:
    """train/CLASS/*.png with val/ or test/ beside it, or CLASS/*.png alone, of which a fifth is held out."""
    size = settings.size or 224
    train, test = datasets.image_folders(root)
    whole = Split(torch.from_numpy(train.labels), None, train.paths, size)
    if test is None:
        held, rest = _stratified(whole.labels, HELD_OUT)
        splits = [whole.part(rest), whole.part(held)]
    else:
        splits = [whole, Split(torch.from_numpy(test.labels), None, test.paths, size)]
    return _from_files(splits[0], splits[1], train.classes, settings, f"the user's images ({root.name})")


def _tiny_imagenet(root: Path, settings: DataSettings) -> Data:
    """train/WNID/images/*.JPEG, and val/images with val/val_annotations.txt."""
    folder = datasets.image_folder(root / "train")
    number = {name: i for i, name in enumerate(folder.classes)}
    listing = root / "val" / "val_annotations.txt"
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{listing}: {error.strerror}") from error
    paths, labels = [], []
    for row, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        path = root / "val" / "images" / name
        if wnid not in number or not path.is_file() or path.resolve().parent != (root / "val" / "images").resolve():
            raise DataError(
                f"{listing}, line {row}: expected an image of val/images and a class of train/, found '{line}'"
            )
        paths.append(path)
        labels.append(number[wnid])
    if not paths:
        raise DataError(f"{listing} is empty")
    size = settings.size or 64
    train = Split(torch.from_numpy(folder.labels), None, folder.paths, size)
    test = Split(torch.tensor(labels), None, tuple(paths), size)
    return _from_files(train, test, folder.classes, settings, "real: Tiny ImageNet (the user's copy)")
