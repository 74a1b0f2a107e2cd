"""Readers of the data that the command line takes; each checks what it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from localrecon.config import AugmentSettings, ModelSettings, TrainingSettings
from localrecon.models import DataForm
from tenfold import UserError, datasets, images, readers
from tenfold.errors import needs
from tenfold.models import IMAGENET

KINDS = ("imagefolder", "cifar10", "npz", "text")
EMBEDDED = ("digits", "glyphs", "topics")
GLYPHS = 62
"""0-9, A-Z, a-z."""
Item = tuple[Tensor, Any]
Part = TypeVar("Part")


@dataclass(frozen=True)
class Data:
    """Items to train on and items to test on.

    Attributes:
        train: gives (input, label) for an index; what it draws at random comes from torch's global generator.
        test: gives (input, label) for an index, without augmentation.
        plain: the training items without augmentation.
        form: what a model has to know.
        source: what the data are, and whether they are real or rendered.
        classes: names of the classes; empty for text.
    """

    train: Dataset[Item]
    test: Dataset[Item]
    plain: Dataset[Item]
    form: DataForm
    source: str
    classes: tuple[str, ...] = ()


class _Arrays(Dataset[Item]):
    """Images (N, C, H, W), normalized when asked for; with ``crop``, padded by an eighth, cropped at random, mirrored."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, *, crop: bool) -> None:
        self.images, self.labels, self.mean, self.std, self.crop = images, labels, mean, std, crop

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        image = (self.images[index].float() - self.mean) / self.std
        if self.crop:
            height, width = image.shape[1:]
            pad = height // 8
            top, left, flip = (int(torch.randint(n, ())) for n in (2 * pad + 1, 2 * pad + 1, 2))
            padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
            image = padded[:, top : top + height, left : left + width]
            image = image.flip(2) if flip else image
        return image, self.labels[index]


class _Files(Dataset[Item]):
    """Image files, decoded and transformed when asked for."""

    def __init__(self, folder: readers.ImageFolder, transform: Callable[[Any], Tensor]) -> None:
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getitem__(self, index: int) -> Item:
        return self.transform(images.open_image(self.folder.paths[index])), int(self.folder.labels[index])


class _Windows(Dataset[Item]):
    """Rows of bytes with the byte that follows each; with ``move``, each begins at random within its stride."""

    def __init__(self, text: NDArray[np.uint8], window: int, *, move: bool) -> None:
        self.text, self.window, self.move = torch.from_numpy(text.astype(np.int64)), window, move
        self.count = (len(text) - 1) // window - int(move)
        if self.count < 1:
            raise UserError(f"{len(text)} bytes of text do not fill two windows of {window}: give more, or --window")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        start = index * self.window + (int(torch.randint(self.window, ())) if self.move else 0)
        row = self.text[start : start + self.window + 1]
        return row[:-1], row[1:]


def load_data(settings: ModelSettings, augment: AugmentSettings | None = None) -> Data:
    """The data that ``--data`` names.

    Args:
        settings: source and sizes.
        augment: how training items are varied; default: not at all.

    Raises:
        UserError: it cannot be read, or is not of the form that its kind has.
        MissingExtraError: the augmentation needs a library that is not installed.
    """
    kind, path = readers.parse_source(settings.data, kinds=KINDS, embedded=EMBEDDED)
    augment = augment or AugmentSettings()
    if augment.augment != "none" and kind in {"text", "topics"}:
        raise UserError(f"--augment {augment.augment} is for images, not for --data {settings.data}")
    if augment.augment == "timm" and kind != "imagefolder":
        raise UserError(f"--augment timm goes with --data imagefolder:DIR, not with {kind}: take crop or none")
    if path is None:
        if kind == "topics":
            pages = datasets.topics()
            return _text(pages.text.encode(), str(pages), settings.window)
        train, test = datasets.glyphs(classes=GLYPHS) if kind == "glyphs" else datasets.digits()
        return images_data(train, test, crop=augment.augment == "crop")
    if kind == "text":
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"--data {settings.data}: {error.strerror}") from error
        return _text(content, f"the user's: {path.name}", settings.window)
    if kind == "imagefolder":
        return _image_folder(path, settings, augment)
    train, held = readers.npz_images(path) if kind == "npz" else readers.cifar(path)
    return images_data(train, _tested(held, path), crop=augment.augment == "crop")


def _tested(part: Part | None, path: Path) -> Part:
    if part is None:
        raise UserError(f"{path}: expected a part to test on beside the one to train on, found none")
    return part


def images_data(train: readers.Images, test: readers.Images, *, crop: bool = False) -> Data:
    """Arrays as tensors, every channel of mean 0 and deviation 1 on the training images.

    Raises:
        UserError: training and test images of different sizes.
    """
    pixels = [images.to_tensor(part.images) for part in (train, test)]
    labels = [torch.from_numpy(part.labels) for part in (train, test)]
    shape, other = (tuple(part.shape[1:]) for part in pixels)
    if shape != other:
        raise UserError(f"training images are {shape}, test images {other}: expected the same size")
    mean, std = (value.float()[:, None, None] for value in images.pixel_statistics(pixels[0], scale=1, most=10_000))
    std = std.clamp_min(1e-6)
    return Data(
        _Arrays(pixels[0], labels[0], mean, std, crop=crop),
        _Arrays(pixels[1], labels[1], mean, std, crop=False),
        _Arrays(pixels[0], labels[0], mean, std, crop=False),
        DataForm("classify", shape, len(train.classes)),
        train.source,
        train.classes,
    )


def _text(content: bytes, source: str, window: int) -> Data:
    """Bytes; the last tenth tests."""
    text = np.frombuffer(content, np.uint8)
    cut = len(text) * 9 // 10
    return Data(
        _Windows(text[:cut], window, move=True),
        _Windows(text[cut:], window, move=False),
        _Windows(text[:cut], window, move=False),
        DataForm("lm", (window,), 256),
        source,
    )


def _image_folder(path: Path, settings: ModelSettings, augment: AugmentSettings) -> Data:
    train, held = readers.image_folders(path, settings.reading)
    test, size = _tested(held, path), settings.image_size
    left_out = len(train.skipped) + len(test.skipped)
    return Data(
        _Files(train, _transform(size, augment)),
        _Files(test, _transform(size, AugmentSettings())),
        _Files(train, _transform(size, AugmentSettings())),
        DataForm("classify", (3, size, size), len(train.classes)),
        f"the user's: {path.name}" + (f", without {left_out} broken pictures" if left_out else ""),
        train.classes,
    )


_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)


def _normalized(cut: Callable[[Any, int], NDArray[np.uint8]], size: int, image: Any) -> Tensor:
    """What a cut makes of an image, by ImageNet's statistics."""
    return (torch.from_numpy(cut(image, size).astype(np.float32) / 255).permute(2, 0, 1) - _MEAN) / _STD


def _transform(size: int, augment: AugmentSettings) -> Callable[[Any], Tensor]:
    if augment.augment == "none":
        return partial(_normalized, images.middle_square, size)
    if augment.augment == "crop":
        return partial(_normalized, images.random_square, size)
    needs("timm", "timm", "localrecon", why="--augment timm")
    from timm.data.transforms_factory import create_transform

    transform: Callable[[Any], Tensor] = create_transform(
        size,
        is_training=True,
        auto_augment=augment.randaugment or None,
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    return transform


def mixing(settings: TrainingSettings, form: DataForm) -> Callable[[Any, Tensor], tuple[Any, Tensor]] | None:
    """Mixup and CutMix of timm for a batch, or None where neither is asked for.

    Raises:
        UserError: the data are text.
        MissingExtraError: timm is not installed.
    """
    if not (settings.mixup or settings.cutmix):
        return None
    if form.task != "classify":
        raise UserError(f"--mixup and --cutmix are for images, not for --data {settings.data}")
    needs("timm", "timm", "localrecon", why="--mixup")
    from timm.data.mixup import Mixup

    mixup: Any = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.head.label_smoothing,
        num_classes=form.classes,
    )

    def mix(inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        mixed, soft = mixup(inputs, labels)
        return mixed, torch.as_tensor(soft).to(inputs.device)

    return mix


def split_validation(data: Data, share: float, seed: int) -> tuple[Dataset[Item], Dataset[Item] | None]:
    """Training items and, where a share is held out, validation items (without augmentation)."""
    if not share:
        return data.train, None
    count = len(data.train)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = max(1, round(share * count))
    return Subset(data.train, sorted(order[held:])), Subset(data.plain, sorted(order[:held]))
