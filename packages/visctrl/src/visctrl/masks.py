"""Subjects and masks: cut a subject out onto white, put it back, and keep everything else as it was, bit for bit.

Pictures are arrays (H, W, 3) uint8, masks (H, W) in [0, 1], 1 on the subject.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from visctrl.errors import ShapeMismatchError

Picture = NDArray[np.uint8]
Mask = NDArray[np.floating]
WHITE = 255


def check_mask(mask: Mask, picture: Picture, name: str = "mask") -> None:
    """Make sure that a mask is of a picture's size and not empty.

    Raises:
        ShapeMismatchError: another size; the message names both.
        ValueError: nothing is masked.
    """
    if mask.shape != picture.shape[:2]:
        (h, w), (ph, pw) = mask.shape[:2], picture.shape[:2]
        raise ShapeMismatchError(f"{name}: {w} x {h} pixels, the picture has {pw} x {ph}")
    if not (mask >= 0.5).any():
        raise ValueError(f"{name}: no pixel of the subject (1/2 or more) is in it")


def resized(picture: Picture, height: int, width: int) -> Picture:
    """A picture of another size, antialiased where it gets smaller."""
    if picture.shape[:2] == (height, width):
        return picture.copy()
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def resized_mask(mask: Mask, height: int, width: int) -> Mask:
    """A mask of another size."""
    if mask.shape == (height, width):
        return mask.copy()
    x = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None]
    found: Mask = F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()
    return found


@dataclass(frozen=True)
class Crop:
    """A subject on a white square, and where it came from.

    Attributes:
        picture: the square, (size, size, 3).
        mask: the subject in it, (size, size).
        box: top, left, bottom, right of the subject in the photograph.
        inner: top, left, bottom, right of the same in the square.
    """

    picture: Picture
    mask: Mask
    box: tuple[int, int, int, int]
    inner: tuple[int, int, int, int]


def crop_subject(picture: Picture, mask: Mask, size: int, *, margin: float = 0.05) -> Crop:
    """The subject alone, on white, centered in a square, with its aspect ratio.

    Args:
        picture: the photograph.
        mask: its subject.
        size: side of the square.
        margin: white on each side of the longer side of the subject, as a share of the square.

    Raises:
        ShapeMismatchError: a mask of another size than the picture.
        ValueError: an empty mask, or a margin that leaves no room.

    Example:
        >>> picture, mask = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30))
        >>> mask[5:10, 8:20] = 1
        >>> crop_subject(picture, mask, 32).picture.shape
        (32, 32, 3)
    """
    check_mask(mask, picture)
    if not 0 <= margin < 0.5:
        raise ValueError(f"margin must be in [0, 0.5), got {margin}")
    rows, columns = np.nonzero((mask >= 0.5).any(axis=1))[0], np.nonzero((mask >= 0.5).any(axis=0))[0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    room = size - 2 * round(margin * size)
    scale = room / max(bottom - top, right - left)
    h, w = (max(1, round(scale * side)) for side in (bottom - top, right - left))
    y, x = (size - h) // 2, (size - w) // 2
    alpha = mask[top:bottom, left:right, None]
    white = alpha * picture[top:bottom, left:right] + (1 - alpha) * WHITE
    canvas, where = np.full((size, size, 3), WHITE, np.uint8), np.zeros((size, size), np.float32)
    canvas[y : y + h, x : x + w] = resized(white.round().astype(np.uint8), h, w)
    where[y : y + h, x : x + w] = resized_mask(mask[top:bottom, left:right], h, w)
    return Crop(canvas, where, (top, left, bottom, right), (y, x, y + h, x + w))


def paste_back(edited: Picture, crop: Crop, picture: Picture, mask: Mask, *, feather: float = 0.0) -> Picture:
    """The photograph with the edited subject in place of its own; outside of the mask it is the photograph's bit for bit.

    A square that was not edited gives the photograph back.

    Args:
        edited: the edited square.
        crop: how it was cut out.
        picture: the photograph.
        mask: its subject.
        feather: as for ``blend``.

    Raises:
        ShapeMismatchError: the edited square is of another size than the crop.
    """
    if edited.shape != crop.picture.shape:
        raise ShapeMismatchError(f"the edited square is {edited.shape[:2]}, the crop {crop.picture.shape[:2]}")
    if np.array_equal(edited, crop.picture):
        return picture.copy()
    top, left, bottom, right = crop.box
    y, x, y_end, x_end = crop.inner
    whole = picture.copy()
    whole[top:bottom, left:right] = resized(edited[y:y_end, x:x_end], bottom - top, right - left)
    return blend(picture, whole, mask, feather=feather)


def blend(picture: Picture, edited: Picture, mask: Mask, *, feather: float = 0.0) -> Picture:
    """The edited picture inside of a mask, the photograph outside of it; where the mask is 0, bit for bit.

    Args:
        picture: the photograph.
        edited: of the same size.
        mask: the subject.
        feather: pixels within the mask over which one passes into the other.
    """
    alpha = np.clip(mask, 0, 1).astype(np.float64)
    if feather > 0:
        from scipy.ndimage import distance_transform_edt

        padded = np.pad(mask >= 0.5, 1, mode="edge")
        alpha *= np.clip(distance_transform_edt(padded)[1:-1, 1:-1] / feather, 0, 1)
    mixed = alpha[..., None] * edited + (1 - alpha[..., None]) * picture
    out = np.where(alpha[..., None] > 0, mixed.round(), picture).astype(np.uint8)
    return out


def to_images(pictures: list[Picture], multiple: int = 1) -> Tensor:
    """Pictures of one size as (B, 3, H, W) in [-1, 1], their edges repeated up to a multiple of pixels.

    Raises:
        ShapeMismatchError: pictures of different sizes.
    """
    if len({picture.shape for picture in pictures}) != 1:
        raise ShapeMismatchError(f"pictures of different sizes: {sorted({p.shape[:2] for p in pictures})}")
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    h, w = x.shape[-2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


def to_pictures(images: Tensor, height: int, width: int) -> list[Picture]:
    """Images in [-1, 1] as pictures, without what was added at their edges. Shapes: (B, 3, H, W) -> B of (h, w, 3)."""
    x = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [picture[:, :height, :width].permute(1, 2, 0).cpu().numpy() for picture in x]
