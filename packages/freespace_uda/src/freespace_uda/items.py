"""Scenes as tensors: normals at the pictures' own size, then the size of the network; and the augmentation of training.

Whatever is drawn comes from torch's global generator, which the loader keys by seed, epoch and index.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from freespace_uda.config import Augment, NetSettings, NormalSettings
from freespace_uda.normal_cache import NormalCache
from freespace_uda.normals import depth_to_normals, flip_normals, resize_normals
from freespace_uda.scenes import Item

ORIENT = "camera"
"""Normals face the camera, so that a wall keeps its sign where n_y is about 0; on the ground it is the same as up."""


class Readable(Protocol):
    """What training and prediction need of scenes."""

    @property
    def source(self) -> str: ...  # noqa: D102
    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...  # noqa: D102
    def item(self, index: int) -> Item: ...  # noqa: D102
    def label(self, index: int) -> NDArray[np.uint8]: ...  # noqa: D102


def normals_of(depth: NDArray[np.float32], intrinsics: NDArray[Any], settings: NormalSettings) -> tuple[Tensor, Tensor]:
    """Normals (1, 3, H, W) and validity (1, 1, H, W) of one depth map."""
    return depth_to_normals(
        torch.from_numpy(np.require(depth, requirements=["C", "W"]))[None, None],
        torch.from_numpy(np.asarray(intrinsics, np.float32)),
        settings.method,
        orient="camera",
        edges=settings.edges,
        fill=settings.fill,
    )


def to_network(item: Item, settings: NetSettings) -> tuple[Tensor, Tensor, Tensor]:
    """RGB (3, h, w) in [0, 1], normals (3, h, w) and validity (1, h, w) at the network's size.

    What is missing is gray, or 0.
    """
    size = (settings.size[1], settings.size[0])
    if item.depth is None:
        normals, valid = torch.zeros(1, 3, *size), torch.zeros(1, 1, *size)
    else:
        normals, valid = resize_normals(*normals_of(item.depth, item.intrinsics, settings.normals), size)
    return resized_rgb(item.rgb, size), normals[0], valid[0]


def resized_rgb(rgb: NDArray[np.uint8] | None, size: tuple[int, int]) -> Tensor:
    """Pixels in [0, 1], (3, h, w); gray where there is no picture."""
    if rgb is None:
        return torch.full((3, *size), 0.5)
    pixels = torch.from_numpy(np.require(rgb, requirements=["C", "W"])).permute(2, 0, 1).float() / 255
    if pixels.shape[1:] == size:
        return pixels
    smaller = size[0] < pixels.shape[1] or size[1] < pixels.shape[2]
    found: Tensor = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=smaller)[0]
    return found.clamp(0, 1)


def resized_label(label: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """Labels at another size by the nearest pixel, (h, w) uint8."""
    found = torch.from_numpy(np.require(label, requirements=["C", "W"]))
    if found.shape == size:
        return found
    return F.interpolate(found[None, None].float(), size, mode="nearest-exact")[0, 0].to(torch.uint8)


class SceneItems(Dataset[Any]):
    """Augmented scenes: ``rgb``, ``normals``, ``valid`` and, where they are asked for, ``labels``.

    Args:
        scenes: the scenes.
        settings: size and normals.
        augment: what is drawn.
        labels: whether labels are read.
        faults: whether faults of depth and missing modalities are drawn.
        cache: normals that were computed before; faults of depth are then holes and missing depth alone.
    """

    def __init__(
        self,
        scenes: Readable,
        settings: NetSettings,
        augment: Augment,
        *,
        labels: bool,
        faults: bool,
        cache: NormalCache | None = None,
    ) -> None:
        self.scenes, self.settings, self.augment = scenes, settings, augment
        self.labels, self.faults, self.cache = labels, faults, cache

    def __len__(self) -> int:
        return len(self.scenes)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item, a = self.scenes.item(index), self.augment
        size = (self.settings.size[1], self.settings.size[0])
        depth = item.depth
        if self.cache is not None:
            n, v = self.cache.read(self.scenes.name(index))
            normals, valid = resize_normals(torch.from_numpy(n)[None], torch.from_numpy(v)[None], size)
        elif depth is None:
            normals, valid = torch.zeros(1, 3, *size), torch.zeros(1, 1, *size)
        else:
            if self.faults:
                depth = faulty_depth(torch.from_numpy(depth), a).numpy()
            found = normals_of(depth, item.intrinsics, self.settings.normals)
            normals, valid = resize_normals(*found, size)
        if self.faults and self.cache is not None:
            lost = _holes(size, a)
            normals, valid = normals * lost, valid * lost
        rgb = resized_rgb(item.rgb, size)
        if item.rgb is not None:
            rgb = colored(rgb, a)
        out = {"rgb": rgb, "normals": normals[0], "valid": valid[0]}
        if self.labels:
            out["labels"] = resized_label(self.scenes.label(index), size)
        if a.flip and float(torch.rand(())) < a.flip:
            out = {name: value.flip(-1) for name, value in out.items()}
            out["normals"] = flip_normals(normals[0])
        if self.faults:
            drawn = float(torch.rand(()))
            if drawn < a.no_depth:
                out["normals"], out["valid"] = torch.zeros_like(out["normals"]), torch.zeros_like(out["valid"])
            elif drawn < a.no_depth + a.no_rgb and bool((out["valid"] > 0).any()):
                out["rgb"] = torch.full_like(out["rgb"], 0.5)
        return out


def _holes(size: tuple[int, int], augment: Augment) -> Tensor:
    """1, and 0 in rectangles of a tenth of the height and a fifteenth of the width."""
    out = torch.ones(size)
    rows, columns = max(1, size[0] // 10), max(1, size[1] // 15)
    for _ in range(int(torch.randint(augment.holes + 1, ()))):
        top, left = int(torch.randint(size[0] - rows, ())), int(torch.randint(size[1] - columns, ()))
        out[top : top + rows, left : left + columns] = 0
    return out


def faulty_depth(depth: Tensor, augment: Augment) -> Tensor:
    """Depth (H, W) as a real sensor would have given it: noise that grows with the square of the distance, dropouts, holes."""
    shape = (depth.shape[0], depth.shape[1])
    strength = float(torch.rand(()) * 1.5)  # from a perfect sensor to one worse than expected
    noise = (
        augment.depth_noise * torch.randn(shape) * depth + augment.depth_square * torch.randn(shape) * depth.square()
    )
    kept = (torch.rand(shape) >= augment.dropout * strength) & (_holes(shape, augment) > 0)
    return torch.where(kept & (depth > 0), (depth + strength * noise).clamp_min(0), 0.0)


_LUMA = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)


def colored(rgb: Tensor, augment: Augment) -> Tensor:
    """Pixels (3, H, W) with another brightness, contrast, saturation, hue, gamma and sharpness; or gray."""
    a = augment
    drawn = torch.rand(8).tolist()
    gray = drawn[0] < a.gray

    def factor(value: float) -> float:
        return 1 + min(1.0, a.color) * (2 * value - 1)

    turn = 2 * math.pi * a.hue * (2 * drawn[1] - 1)
    saturation = 0.0 if gray else factor(drawn[2])
    c, s = saturation * math.cos(turn), saturation * math.sin(turn)
    matrix = _FROM_YIQ @ torch.tensor([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]) @ _TO_YIQ
    pixels = (matrix @ rgb.reshape(3, -1)).view_as(rgb) * factor(drawn[3])
    mean = (_LUMA @ pixels.reshape(3, -1)).mean()
    pixels = ((pixels - mean) * factor(drawn[4]) + mean).clamp(0, 1)
    if a.gamma > 1:
        pixels = pixels.clamp_min(1e-4) ** (a.gamma ** (2 * drawn[5] - 1))
    if drawn[6] < a.blur:
        pixels = F.avg_pool2d(F.pad(pixels[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    return pixels
