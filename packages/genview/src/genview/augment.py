"""Augmentation of whole batches as tensors; what a picture gets depends on (seed, epoch, index) alone.

It runs on the device, with no workers: crops by bilinear sampling, color jitter in a fixed order, grayscale, blur, solarize.

Shapes: B images of S x S pixels in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genview.config import ViewSettings
from tenfold.randomness import generator

_DRAWS = 20
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Views:
    """Augmented images.

    Attributes:
        images: in [0, 1] (B, 3, size, size).
        boxes: top, left, height and width of each crop, as shares of the image (B, 4).
        flips: which crops are mirrored (B,).
    """

    images: Tensor
    boxes: Tensor
    flips: Tensor


def uniforms(seed: int, epoch: int, index: Sequence[int], slots: int = 2) -> Tensor:
    """What a batch draws: uniform numbers, keyed by (seed, epoch, index). Shapes: -> (slots, B, 20)."""
    rows = [torch.rand(slots, _DRAWS, generator=generator(seed, epoch, i)) for i in index]
    return torch.stack(rows, dim=1)


def crop_boxes(u: Tensor, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """Random crops of a square image: area uniform in ``scale``, aspect log-uniform in ``ratio``, kept inside.

    Shapes: uniforms (B, 4) -> top, left, height, width (B, 4), shares.
    """
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * u[:, 1])
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    return torch.stack([u[:, 2] * (1 - height), u[:, 3] * (1 - width), height, width], dim=1)


def crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut boxes out of images and bring them to ``size``. Shapes: (B, C, H, W), (B, 4), (B,) -> (B, C, size, size)."""
    cells = (torch.arange(size, device=images.device) + 0.5) / size
    top, left, height, width = boxes.to(images.device, images.dtype).unbind(dim=1)
    across = torch.where(flips.to(images.device)[:, None], 1 - cells[None], cells[None])
    x = left[:, None] + across * width[:, None]
    y = top[:, None] + cells[None] * height[:, None]
    where = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, where * 2 - 1, align_corners=False, padding_mode="reflection")


def _gray(x: Tensor) -> Tensor:
    return (x * x.new_tensor(_LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Colors turned about the gray axis by a share of the circle."""
    angle = turn * 2 * math.pi
    c, s = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    one = torch.eye(3, device=x.device, dtype=x.dtype)[None]
    axis = torch.full((1, 3, 3), 1 / 3, device=x.device, dtype=x.dtype)
    k = 3**-0.5
    cross = x.new_tensor([[0.0, -k, k], [k, 0.0, -k], [-k, k, 0.0]])[None]
    return torch.einsum("bij,bjhw->bihw", c * one + (1 - c) * axis + s * cross, x)


def jitter(images: Tensor, u: Tensor, strength: Sequence[float], apply: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, in this order, on those images that ``apply`` says.

    Hue turns colors about the gray axis, which needs no conversion and is close to a turn in HSV.

    Shapes: (B, 3, H, W), uniforms (B, 4), (B,) bool.
    """
    s = images.new_tensor(strength)
    factors = (1 + (2 * u[:, :4].to(images) - 1) * s).clamp_min(0)[:, :, None, None, None]
    x = (images * factors[:, 0]).clamp(0, 1)
    mean = _gray(x).mean(dim=(2, 3), keepdim=True)
    x = (mean + (x - mean) * factors[:, 1]).clamp(0, 1)
    gray = _gray(x)
    x = (gray + (x - gray) * factors[:, 2]).clamp(0, 1)
    x = _hue(x, (2 * u[:, 3].to(images) - 1) * strength[3]).clamp(0, 1)
    return torch.where(apply.to(images.device).view(-1, 1, 1, 1), x, images)


def blur(images: Tensor, sigma: Tensor, apply: Tensor) -> Tensor:
    """A Gaussian blur of each image's own width in pixels. Shapes: (B, 3, H, W), (B,), (B,) bool."""
    if not bool(apply.any()):
        return images
    b, c, h, w = images.shape
    reach = max(1, min(h // 2 - 1, round(3 * float(sigma.max()))))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma.to(images)[:, None].clamp_min(1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    x = F.pad(images.reshape(1, b * c, h, w), (reach,) * 4, mode="reflect")
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)
    return torch.where(apply.to(images.device).view(-1, 1, 1, 1), x, images)


def augment(images: Tensor, u: Tensor, settings: ViewSettings, *, size: int, second: bool = False) -> Views:
    """One view of each image.

    Args:
        images: uint8, or float in [0, 1].
        u: what ``uniforms`` drew for this slot.
        settings: settings of the views.
        size: side of the result.
        second: whether this is the second slot, whose blur and solarization may differ (MoCo v3, BYOL).

    Shapes: (B, 3, S, S), (B, 20) -> (B, 3, size, size).
    """
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    u = u.to(x.device)
    aspect = (1.0, 1.0) if settings.least_area == 1 else (3 / 4, 4 / 3)
    boxes = crop_boxes(u[:, :4], (settings.least_area, 1.0), aspect)
    flips = u[:, 4] < settings.flip
    x = crop(x, boxes, flips, size)
    x = jitter(x, u[:, 5:9], settings.jitter, u[:, 9] < settings.jitter_share)
    x = torch.where((u[:, 10] < settings.gray).view(-1, 1, 1, 1), _gray(x).expand_as(x), x)
    share = settings.second_blur if second and settings.second_blur is not None else settings.blur
    if share > 0:
        x = blur(x, (0.1 + 1.9 * u[:, 11]) * size / 224, u[:, 12] < share)
    if second and settings.second_solarize > 0:
        turned = (u[:, 13] < settings.second_solarize).view(-1, 1, 1, 1)
        x = torch.where(turned & (x >= 128 / 255), 1 - x, x)
    return Views(x, boxes, flips)


@dataclass(frozen=True)
class Pair:
    """Two views of each image of a batch.

    Attributes:
        first: views of the first slot.
        second: views of the second slot.
        generated: slot whose source is the generated view, 0 or 1; -1 where none is (B,).
    """

    first: Views
    second: Views
    generated: Tensor


def make_pairs(
    images: Tensor,
    views: Tensor,
    has_view: Tensor,
    u: Tensor,
    settings: ViewSettings,
    *,
    size: int,
) -> Pair:
    """Two views of each image, one of them of its generated view with a probability, in a slot at random.

    The slot matters where the two pipelines differ. Images without a generated view give two views of themselves.

    Args:
        images: the images, uint8.
        views: their generated views; any pixels where there is none.
        has_view: which have one.
        u: uniforms of both slots, see ``uniforms``.
        settings: settings of the views.
        size: side of the result.

    Shapes: (B, 3, S, S), (B, 3, S, S), (B,) bool, (2, B, 20).
    Source: GenView, ECCV 2024, and the authors' code: the probability is 1 in all their settings.
    """
    use = has_view & (u[0, :, 18].to(has_view.device) < settings.generated)
    slot = (u[0, :, 19].to(has_view.device) >= 0.5).long()
    generated = torch.where(use, slot, -1)
    sources = [torch.where((generated == s).view(-1, 1, 1, 1), views, images) for s in (0, 1)]
    first = augment(sources[0], u[0], settings, size=size)
    second = augment(sources[1], u[1], settings, size=size, second=True)
    return Pair(first, second, generated)
