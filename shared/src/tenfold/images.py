"""Images as tensors of bytes: from arrays and from files, in squares, at random crops, in stratified shares; needs torch.

What is drawn at random comes from torch's global generator, which ``tenfold.training.KeyedLoader`` keys.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tenfold.errors import UserError
from tenfold.readers import ImageFolder, Images, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

Decode = Callable[[Path, int], NDArray[np.uint8]]
"""What makes (size, size, 3) pixels from a file and a size."""


_CHUNK = 1 << 20
"""Values that are in double precision at once."""


def to_tensor(images: NDArray[np.uint8], *, color: bool = False, channels_last: bool = False) -> Tensor:
    """Arrays (N, H, W) or (N, H, W, 3) as a tensor (N, C, H, W) uint8.

    Args:
        images: gray or in color; the tensor shares their memory where it can.
        color: repeat gray images in three channels. Else C is 1 for them.
        channels_last: keep the channels last in memory, as the arrays have them.
    """
    if images.ndim == 3 and color:
        images = np.repeat(images[..., None], 3, axis=3)
    images = np.ascontiguousarray(images)
    tensor = torch.from_numpy(images if images.flags.writeable else images.copy())
    if tensor.ndim == 3:
        return tensor[:, None]
    tensor = tensor.permute(0, 3, 1, 2)
    return tensor if channels_last else tensor.contiguous()


def pixel_statistics(images: Tensor, *, scale: float = 255, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pixels per channel, in double precision, in memory that does not grow with them.

    Args:
        images: (N, C, H, W).
        scale: the value that counts as 1.
        most: images that suffice; of more, every n-th is taken.
    """
    step = 1 if most is None else max(1, len(images) // most)
    count, mean = 0, torch.zeros(images.shape[1], dtype=torch.float64, device=images.device)
    squares = torch.zeros_like(mean)
    for part in torch.split(images[::step], max(1, _CHUNK // max(1, images[0].numel()))):
        pixels = part.double() / scale
        size, own = pixels[:, 0].numel(), pixels.mean(dim=(0, 2, 3))
        shift, whole = own - mean, count + size
        squares += (pixels - own.view(-1, 1, 1)).square().sum(dim=(0, 2, 3)) + shift.square() * (count * size / whole)
        mean, count = mean + shift * (size / whole), whole
    return mean, (squares / max(count - 1, 1)).sqrt()


def of_each(labels: Tensor, number: Callable[[int], int]) -> list[int]:
    """Indices of ``number(count)`` items of each class that has ``count``, sorted; equal labels, equal answer."""
    generator = torch.Generator().manual_seed(0)
    taken: list[int] = []
    for label in torch.unique(labels):
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        taken += members[order[: number(len(members))]].tolist()
    return sorted(taken)


def stratified(labels: Tensor, share: float) -> tuple[list[int], list[int]]:
    """Indices of about a share of each class, and of the rest; equal labels, equal answer.

    Of each class at least one item is taken and at least one is left; the only one of a class is left.
    """
    taken = of_each(labels, lambda count: min(max(1, round(count * share)), count - 1))
    return taken, sorted(set(range(len(labels))) - set(taken))


def open_image(path: str | Path) -> "Image":
    """A decoded file, upright and in color, for transforms that take Pillow's images.

    Raises:
        UserError: it cannot be decoded; the message names it.
    """
    pixels = read_image(path)
    from PIL import Image

    return Image.fromarray(pixels)


def square(image: "Image", size: int) -> NDArray[np.uint8]:
    """The middle of an image as (size, size, 3) uint8.

    Its shorter side is scaled to ``size``, from 128 pixels on to 256 / 224 of it as is usual for ImageNet; then the middle is
    cut.
    """
    short = max(size, round(size * 256 / 224)) if size >= 128 else size
    scale = short / min(image.size)
    image = image.resize((max(short, round(image.width * scale)), max(short, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """The middle of an image file, see ``square``."""
    return square(open_image(path), size)


def random_resized_crop(
    image: "Image",
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> NDArray[np.uint8]:
    """A random part of an image as (size, size, 3) uint8, as is usual for ImageNet.

    Args:
        image: the image.
        size: side of the result.
        area: least and largest share of the image's area.
        ratio: least and largest width over height of the part.
        flip: probability of mirroring it.

    Source: Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6: 8 to 100 % of the area, ratios of 3:4 to 4:3.
    """
    whole, (low, high) = image.width * image.height, np.log(ratio)
    for _ in range(10):
        u = torch.rand(4).tolist()
        target, shape = whole * (area[0] + (area[1] - area[0]) * u[0]), float(np.exp(low + (high - low) * u[1]))
        w, h = round((target * shape) ** 0.5), round((target / shape) ** 0.5)
        if 0 < w <= image.width and 0 < h <= image.height:
            left, top = int(u[2] * (image.width - w + 1)), int(u[3] * (image.height - h + 1))
            break
    else:
        w = h = min(image.size)
        left, top = (image.width - w) // 2, (image.height - h) // 2
    pixels = np.asarray(image.resize((size, size), box=(left, top, left + w, top + h)))
    return pixels[:, ::-1] if torch.rand(()).item() < flip else pixels


def read_random_crop(path: Path, size: int) -> NDArray[np.uint8]:
    """A random part of an image file, see ``random_resized_crop``."""
    return random_resized_crop(open_image(path), size)


def middle_square(image: "Image", size: int, *, share: float = 7 / 8) -> NDArray[np.uint8]:
    """The middle of an image as (size, size, 3) uint8: a square of a share of its shorter side, scaled at once."""
    side = int(min(image.size) * share)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.resize((size, size), box=(left, top, left + side, top + side)))


def random_square(image: "Image", size: int, *, area: tuple[float, float] = (0.35, 1.0)) -> NDArray[np.uint8]:
    """A random square of an image as (size, size, 3) uint8, mirrored half of the time.

    Args:
        image: the image.
        size: side of the result.
        area: least and largest share of the area of the largest square.
    """
    share, x, y, flip = torch.rand(4).tolist()
    side = max(1, int(min(image.size) * (area[0] + (area[1] - area[0]) * share) ** 0.5))
    left, top = int(x * (image.width - side)), int(y * (image.height - side))
    pixels = np.asarray(image.resize((size, size), box=(left, top, left + side, top + side)))
    return pixels[:, ::-1] if flip < 0.5 else pixels


@dataclass(frozen=True)
class Split:
    """Images with labels, in memory or in files that are decoded as needed; either ``images`` or ``paths`` is there.

    Attributes:
        labels: (N,) int64.
        images: (N, C, H, W) uint8; None where files are decoded as needed.
        paths: files; empty for data that does not come in files.
        size: side that files are brought to.
        numbers: (N,) number of each image in what the user gave; None where all are there in their order.
        channels: channels that files are brought to: 3, or 1 for gray.
    """

    labels: Tensor
    images: Tensor | None
    paths: tuple[Path, ...]
    size: int
    numbers: Tensor | None = None
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file of an image, or its number in the user's array."""
        if self.paths:
            return str(self.paths[index])
        return str(index if self.numbers is None else int(self.numbers[index]))

    def part(self, indices: Sequence[int] | Tensor) -> "Split":
        """Some of the images, in the order given."""
        where = torch.as_tensor(indices, dtype=torch.int64)
        return dataclasses.replace(
            self,
            labels=self.labels[where],
            images=None if self.images is None else self.images[where],
            paths=tuple(self.paths[i] for i in where.tolist()) if self.paths else (),
            numbers=where if self.numbers is None else self.numbers[where],
        )

    def pixels(self, indices: Tensor) -> Tensor:
        """Images (B, C, size, size) uint8 without augmentation.

        Raises:
            UserError: a file cannot be decoded; the message names it.
        """
        if self.images is not None:
            return self.images[indices]
        rows = [_channels_first(read_square(self.paths[i], self.size)) for i in indices.tolist()]
        return in_channels(torch.stack(rows), self.channels)

    def decoded(self, decode: Decode = read_square) -> "Split":
        """With all images in memory, channels last.

        Raises:
            UserError: a file cannot be decoded; the message names it.
        """
        if self.images is not None:
            return self
        images = np.empty((len(self), self.size, self.size, self.channels), np.uint8)
        for row, path in zip(images, self.paths, strict=True):
            pixels = decode(path, self.size)
            row[:] = pixels if self.channels == 3 else _gray(pixels)
        return dataclasses.replace(self, images=torch.from_numpy(images).permute(0, 3, 1, 2))

    def resized(self, size: int) -> "Split":
        """With images in memory scaled to another side, by antialiased bilinear interpolation."""
        if self.images is None or size == self.size:
            return dataclasses.replace(self, size=size)
        images = torch.empty(len(self), self.images.shape[1], size, size, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)
        for rows, part in zip(torch.split(images, 256), torch.split(self.images, 256), strict=True):
            scaled = F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
            rows.copy_(scaled.round_().clamp_(0, 255))
        return dataclasses.replace(self, images=images, size=size)

    @property
    def decoded_bytes(self) -> int:
        """Memory that the images take, or would take."""
        return self.images.numel() if self.images is not None else len(self) * self.channels * self.size**2


def in_channels(images: Tensor, channels: int) -> Tensor:
    """Images (N, C, H, W) uint8 with another number of channels: gray repeated, or the luma of color (ITU-R BT.601).

    Raises:
        UserError: neither; four channels are no color with transparency to us.
    """
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    if channels == 1 and images.shape[1] == 3:
        return torch.from_numpy(_gray(images.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
    raise UserError(f"images of {images.shape[1]} channels cannot be brought to {channels}")


def _gray(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The luma of (..., 3) as (..., 1)."""
    return np.rint(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]


def in_memory(part: Images, *, color: bool = True) -> Split:
    """Square images of arrays as a split, channels last in memory; gray ones in three channels unless told otherwise."""
    pixels = to_tensor(part.images, color=color, channels_last=True)
    return Split(
        torch.from_numpy(part.labels.astype(np.int64)), pixels, (), part.images.shape[1], channels=pixels.shape[1]
    )


def in_files(folder: ImageFolder, size: int, *, channels: int = 3) -> Split:
    """Pictures of a folder as a split that decodes them as needed."""
    return Split(torch.from_numpy(folder.labels), None, folder.paths, size, channels=channels)


class Indexed(Dataset[Any]):
    """Items for a loader: (index, label), and the decoded image (C, size, size) where images are not in memory.

    Args:
        split: the images.
        decode: what makes pixels from a file, ``read_random_crop`` for training.
    """

    def __init__(self, split: Split, decode: Decode = read_square) -> None:
        self.split = split
        self.decode = decode

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        label = int(self.split.labels[index])
        if self.split.images is not None:
            return index, label
        pixels = _channels_first(self.decode(self.split.paths[index], self.split.size))
        return index, label, in_channels(pixels[None], self.split.channels)[0]


@dataclass(frozen=True)
class ImageData:
    """Images that a command works on.

    Attributes:
        train: training images.
        val: images held out of them to choose settings or epochs by, or None.
        test: images for the report only.
        classes: name of each label.
        mean: mean of the pixels in [0, 1], per channel.
        std: their standard deviation, likewise.
        source: what the data are, and whether they are real.
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


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
