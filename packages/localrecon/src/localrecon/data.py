"""Readers of the data that the command line takes; each checks what it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset

from localrecon.config import AugmentSettings, ModelSettings, TrainingSettings
from localrecon.models import DataForm
from tenfold import UserError, datasets
from tenfold.errors import MissingExtraError

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
        test: likewise, without augmentation.
        plain: the training items without augmentation.
        form: what a model has to know.
        source: what it is, and whether it is real or rendered.
        classes: names.
    """

    train: Dataset[Item]
    test: Dataset[Item]
    plain: Dataset[Item]
    form: DataForm
    source: str
    classes: tuple[str, ...] = ()


class _Images(Dataset[Item]):
    """Arrays (N, C, H, W), normalized when asked for; with ``crop``, padded by an eighth, cropped at random, flipped."""

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

    def __init__(self, folder: datasets.ImageFolder, transform: Callable[[Any], Tensor]) -> None:
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.folder.paths)

    def __getitem__(self, index: int) -> Item:
        from PIL import Image

        image = Image.fromarray(datasets.read_image(self.folder.paths[index]))
        return self.transform(image), int(self.folder.labels[index])


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
    """
    kind, path = datasets.parse_source(settings.data, kinds=KINDS, embedded=EMBEDDED)
    if kind in {"text", "topics"}:
        return _text(path, settings.window)
    augment = augment or AugmentSettings()
    if augment.augment == "timm" and kind != "imagefolder":
        raise UserError(f"--augment timm goes with --data imagefolder:DIR, not with {kind}: take crop or none")
    if kind == "imagefolder":
        assert path is not None
        return _image_folder(path, settings.image_size, augment)
    if kind == "npz":
        assert path is not None
        train, held = datasets.npz_images(path)
        test = _tested(held, path)
    elif kind == "cifar10":
        assert path is not None
        train, test = datasets.cifar(path)
    elif kind == "glyphs":
        train, test = datasets.glyphs(classes=GLYPHS)
    else:
        train, test = datasets.digits()
    return images_data(train, test, crop=augment.augment == "crop")


def _tested(part: Part | None, path: Path) -> Part:
    if part is None:
        raise UserError(f"{path}: expected a part to test on beside the one to train on, found none")
    return part


def images_data(train: datasets.Images, test: datasets.Images, *, crop: bool = False) -> Data:
    """Arrays as tensors, every channel of mean 0 and deviation 1 on the training images."""
    images = [_channels_first(part.images) for part in (train, test)]
    labels = [torch.from_numpy(part.labels) for part in (train, test)]
    sample = images[0][:: max(1, len(images[0]) // 10_000)].double()
    mean = sample.mean(dim=(0, 2, 3)).float()[:, None, None]
    std = sample.std(dim=(0, 2, 3)).float()[:, None, None].clamp_min(1e-6)
    shape = tuple(images[0].shape[1:])
    if shape != tuple(images[1].shape[1:]):
        raise UserError(
            f"training images are {shape}, test images {tuple(images[1].shape[1:])}: expected the same size"
        )
    return Data(
        _Images(images[0], labels[0], mean, std, crop=crop),
        _Images(images[1], labels[1], mean, std, crop=False),
        _Images(images[0], labels[0], mean, std, crop=False),
        DataForm("classify", shape, len(train.classes)),
        train.source,
        train.classes,
    )


def _channels_first(images: NDArray[Any]) -> Tensor:
    tensor = torch.tensor(images)  # a copy, since embedded data are read-only
    return tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()


def _text(path: Path | None, window: int) -> Data:
    """Bytes of a file, or Python's documentation; the last tenth tests."""
    if path is None:
        source, content = str(datasets.topics()), datasets.topics().text.encode()
    else:
        try:
            source, content = f"of the user: {path.name}", path.read_bytes()
        except OSError as error:
            raise UserError(f"--data text:{path}: {error.strerror}") from error
    text = np.frombuffer(content, np.uint8)
    cut = len(text) * 9 // 10
    return Data(
        _Windows(text[:cut], window, move=True),
        _Windows(text[cut:], window, move=False),
        _Windows(text[:cut], window, move=False),
        DataForm("lm", (window,), 256),
        source,
    )


def _image_folder(path: Path, size: int, augment: AugmentSettings) -> Data:
    """DIR/train/CLASS/... and DIR/val/CLASS/... (or test)."""
    train, held = datasets.image_folders(path)
    test = _tested(held, path)
    plain = _EvaluationTransform(size)
    form = DataForm("classify", (3, size, size), len(train.classes))
    return Data(
        _Files(train, _training_transform(size, augment)),
        _Files(test, plain),
        _Files(train, plain),
        form,
        f"of the user: {path.name}",
        train.classes,
    )


_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
"""Of ImageNet, as everybody uses them."""


def _tensor(image: Any) -> Tensor:
    return (torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1) - _MEAN) / _STD


class _EvaluationTransform:
    """The middle of the image, 7/8 of its shorter side."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Tensor:
        side = min(image.size) * 7 // 8
        left, top = ((n - side) // 2 for n in image.size)
        return _tensor(image.resize((self.size, self.size), resample=3, box=(left, top, left + side, top + side)))


class _CropTransform:
    """A random part of 35 to 100 % of the image, flipped half of the time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Tensor:
        share, x, y, flip = torch.rand(4).tolist()
        side = max(1, int(min(image.size) * (0.35 + 0.65 * share) ** 0.5))
        left, top = int(x * (image.width - side)), int(y * (image.height - side))
        cut = _tensor(image.resize((self.size, self.size), resample=3, box=(left, top, left + side, top + side)))
        return cut.flip(2) if flip < 0.5 else cut


def _training_transform(size: int, augment: AugmentSettings) -> Callable[[Any], Tensor]:
    if augment.augment == "none":
        return _EvaluationTransform(size)
    if augment.augment == "crop":
        return _CropTransform(size)
    try:
        from timm.data.transforms_factory import create_transform
    except ImportError as error:
        raise MissingExtraError('--augment timm needs timm; pip install "localrecon[timm]"') from error
    transform: Callable[[Any], Tensor] = create_transform(
        size,
        is_training=True,
        auto_augment=augment.randaugment or None,
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    return transform


def mixing(settings: TrainingSettings, classes: int) -> Callable[[Any, Tensor], tuple[Any, Tensor]] | None:
    """Mixup and CutMix of timm for a batch, or None where neither is asked for."""
    if not (settings.mixup or settings.cutmix):
        return None
    try:
        from timm.data.mixup import Mixup
    except ImportError as error:
        raise MissingExtraError('--mixup and --cutmix need timm; pip install "localrecon[timm]"') from error
    mixup: Any = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.head.label_smoothing,
        num_classes=classes,
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
