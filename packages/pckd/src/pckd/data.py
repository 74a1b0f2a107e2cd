"""Readers of the layouts that people have, each of which checks what it reads; images as uint8, in memory or by path."""

import dataclasses
from pathlib import Path

import torch

from pckd.config import DATA_KINDS, EMBEDDED_DATA, DataSettings
from tenfold import UserError, datasets, readers
from tenfold.images import ImageData, Split, in_channels, in_files, in_memory, of_each, pixel_statistics, stratified
from tenfold.models import IMAGENET

CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)),
}
"""Mean and standard deviation of the training pixels, by number of classes; the second as in the authors' code."""
HELD_OUT = 0.2
"""Share that is held out for testing where the data has no test part of its own."""


class DataError(UserError):
    """Data that cannot be used; the message names the file or folder."""


def load(source: str, settings: DataSettings | None = None) -> ImageData:
    """Read what ``--data`` names.

    Raises:
        UserError: an unknown kind, a file that is missing, broken or of another layout; the message names it.
    """
    settings = settings or DataSettings()
    kind, path = readers.parse_source(source, kinds=DATA_KINDS, embedded=EMBEDDED_DATA)
    if path is None:
        data = _embedded(kind, settings)
    elif kind == "npz":
        data = _npz(path, settings)
    elif kind in {"cifar10", "cifar100"}:
        data = _cifar(path, int(kind.removeprefix("cifar")), settings)
    else:
        data = (_image_folder if kind == "imagefolder" else _tiny_imagenet)(path, settings)
    train = data.train
    if settings.limit:
        each = settings.limit // len(data.classes)
        if not each:
            raise DataError(
                f"limit is {settings.limit}, but there are {len(data.classes)} classes: one of each is needed"
            )
        train = train.part(of_each(train.labels, lambda count: min(count, each)))
    if not len(train) or not len(data.test):
        raise DataError(
            f"--data {source}: {len(train)} training and {len(data.test)} test images: one of each at least is needed"
        )
    val, test = None, data.test
    if settings.val_fraction:
        chosen, rest = stratified(train.labels, settings.val_fraction)
        train, val = train.part(rest), train.part(chosen)
    if settings.size is not None:
        train, test = train.resized(settings.size), test.resized(settings.size)
        val = None if val is None else val.resized(settings.size)
    return ImageData(train, val, test, data.classes, data.mean, data.std, data.source)


def _statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    assert split.images is not None
    mean, std = pixel_statistics(split.images)
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.clamp_min(1e-3).tolist())


def _embedded(name: str, settings: DataSettings) -> ImageData:
    images: tuple[readers.Images, readers.Images]
    images = datasets.digits() if name == "digits" else datasets.glyphs(settings.size or 32, classes=62)
    return from_images(*images, settings)


def from_images(train: readers.Images, test: readers.Images, settings: DataSettings | None = None) -> ImageData:
    """Embedded images as data, with the pixel statistics of the training part."""
    splits = [_in_channels(in_memory(part, color=False), settings or DataSettings()) for part in (train, test)]
    return ImageData(splits[0], None, splits[1], train.classes, *_statistics(splits[0]), train.source)


def _cifar(path: Path, classes: int, settings: DataSettings) -> ImageData:
    train, test = readers.cifar(path)
    if len(train.classes) != classes:
        raise DataError(f"{path} holds CIFAR-{len(train.classes)}, not CIFAR-{classes}")
    splits = [_in_channels(in_memory(part), settings) for part in (train, test)]
    source = f"real: CIFAR-{classes} ({path})"
    statistics = CIFAR_STATISTICS[classes] if splits[0].channels == 3 else _statistics(splits[0])
    return ImageData(splits[0], None, splits[1], train.classes, *statistics, source)


def _in_channels(split: Split, settings: DataSettings) -> Split:
    """A split in memory with the channels that are asked for; gray images otherwise in three."""
    assert split.images is not None
    channels = settings.channels or max(3, split.channels)
    images = in_channels(split.images, channels).contiguous(memory_format=torch.channels_last)
    return dataclasses.replace(split, images=images, channels=channels)


def _npz(path: Path, settings: DataSettings) -> ImageData:
    """Arrays of a training and a test part; of one part alone, a fifth is held out."""
    train, test = readers.npz_images(path, channels=(3, 1, 4))
    for part in (train, test):
        if part is not None and part.images.shape[1] != part.images.shape[2]:
            raise DataError(
                f"{path}: images of {part.images.shape[1]} x {part.images.shape[2]} pixels, expected square ones"
            )
    own = [None if part is None else _in_channels(in_memory(part, color=False), settings) for part in (train, test)]
    assert own[0] is not None
    splits = _parted(own[0], own[1])
    return ImageData(splits[0], None, splits[1], train.classes, *_statistics(splits[0]), train.source)


def _parted(train: Split, test: Split | None) -> tuple[Split, Split]:
    """Both parts; where there is none for testing, a fifth of each class."""
    if test is not None:
        return train, test
    held, rest = stratified(train.labels, HELD_OUT)
    return train.part(rest), train.part(held)


def _from_files(
    splits: tuple[Split, Split], classes: tuple[str, ...], settings: DataSettings, source: str
) -> ImageData:
    """With the images in memory where all of them fit; every file is then decoded here and now."""
    if settings.channels == 4:
        raise DataError("--reading.channels 4 is for npz files whose images have four; pictures are read in color")
    statistics = IMAGENET if settings.channels != 1 else tuple((sum(values) / 3,) for values in IMAGENET)
    fits = sum(split.decoded_bytes for split in splits) <= settings.resident_gb * 1e9
    train, test = (split.decoded() if fits else split for split in splits)
    return ImageData(train, None, test, classes, statistics[0], statistics[1], source)


def _image_folder(root: Path, settings: DataSettings) -> ImageData:
    """train/CLASS/*.png with val/ or test/ beside it, or CLASS/*.png alone, of which a fifth is held out."""
    size = settings.size or 224
    train, test = readers.image_folders(root, settings)
    channels = settings.channels or 3
    splits = _parted(
        in_files(train, size, channels=channels), None if test is None else in_files(test, size, channels=channels)
    )
    return _from_files(splits, train.classes, settings, f"the user's images ({root.name})")


def _tiny_imagenet(root: Path, settings: DataSettings) -> ImageData:
    """train/WNID/images/*.JPEG, and val/images with val/val_annotations.txt."""
    folder = readers.image_folder(root / "train", settings)
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
    channels = settings.channels or 3
    test = Split(torch.tensor(labels), None, tuple(paths), size, channels=channels)
    return _from_files(
        (in_files(folder, size, channels=channels), test),
        folder.classes,
        settings,
        "real: Tiny ImageNet (the user's copy)",
    )
