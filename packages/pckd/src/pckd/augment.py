"""Training images that have to be decoded, cropped or augmented outside of the device: one item, keyed by the loader."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pckd.config import Views
from tenfold import UserError
from tenfold.errors import needs
from tenfold.images import Split, open_image, random_resized_crop

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class TrainingImages(Dataset[Any]):
    """(index, label), and the pixels where they cannot be made on the device from images in memory.

    Pixels are (C, S, S) uint8, or (V, C, S, S) where each view is a crop of its own. They are the same for a file of S x S
    pixels whether it lies in memory or is decoded as needed. What is drawn comes from the global generators, which
    ``tenfold.loading.KeyedLoader`` keys by (seed, epoch, index).

    Args:
        split: the images.
        views: settings of the views.

    Raises:
        UserError: a policy that timm does not know, or one for images that are not RGB.
    """

    def __init__(self, split: Split, views: Views) -> None:
        self.split = split
        self.views = views
        self.resized = views.resized(split.size)
        self.on_device = split.images is not None and not self.resized and views.auto_augment is None
        self.channels = split.channels if split.images is None else split.images.shape[1]
        self._policy: Callable[[Any], Any] | None = None
        if views.auto_augment is not None:
            if self.channels != 3:
                raise UserError(f"--views.auto_augment is for images of 3 channels, the data have {self.channels}")
            _policy(views.auto_augment, split.size)  # refused before training begins

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        label = int(self.split.labels[index])
        if self.on_device:
            return index, label
        if not self.resized and self.views.auto_augment is None:
            return index, label, self.split.pixels(torch.tensor([index]))[0]
        image = self._image(index)
        own = self.resized and self.views.kind == "crop"
        parts = [self._augmented(image) for _ in range(self.views.count if own else 1)]
        return index, label, torch.stack(parts) if own and len(parts) > 1 else parts[0]

    def _image(self, index: int) -> "Image":
        """The image to take crops of: as the file has it, or the square in memory."""
        if self.split.images is None and self.resized:
            return open_image(self.split.paths[index]).convert(_MODES[self.channels])
        from PIL import Image

        pixels = self.split.pixels(torch.tensor([index]))[0].permute(1, 2, 0).numpy()
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if self.channels == 1 else pixels))

    def _augmented(self, image: "Image") -> Tensor:
        pixels = np.asarray(image)
        if self.resized:
            pixels = random_resized_crop(image, self.split.size, area=(self.views.area, 1.0), flip=0.0)
        if self.views.auto_augment is not None:
            from PIL import Image

            if self._policy is None:
                self._policy = _policy(self.views.auto_augment, self.split.size)
            pixels = np.asarray(self._policy(Image.fromarray(pixels)))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_policy": None}  # timm's hold functions that go to no other process


def _policy(name: str, size: int) -> Callable[[Any], Any]:
    """A policy of timm by its name."""
    needs("timm", "timm", "pckd", why="--views.auto_augment")
    from timm.data import auto_augment as timm_policies

    hparams = {"translate_const": int(size * 0.45), "img_mean": (128, 128, 128)}
    make = {
        "rand": timm_policies.rand_augment_transform,
        "augmix": timm_policies.augment_and_mix_transform,
    }.get(name.partition("-")[0], timm_policies.auto_augment_transform)
    try:
        made: Callable[[Any], Any] = make(name, dict(hparams))
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"--views.auto_augment {name}: not a policy of timm ({error})") from error
    return made
