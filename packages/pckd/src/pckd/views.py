"""Views of a batch on the device where it lies: uint8 in, turned and cropped by indexing, normalized once.

What is drawn depends on (seed, epoch, image, number of the draw) alone, through a counter-based generator: on no order, no
batch, no worker. So a resumed run sees the same views, and a teacher's outputs can be kept for them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pckd.config import Views

_ODD = -7046029254386353131  # 0x9E3779B97F4A7C15, of splitmix64
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _splitmix(x: Tensor) -> Tensor:
    """The mixing of splitmix64 on int64, which wraps; its shifts are logical."""
    for shift, factor in _MIX:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draws(seed: int, epoch: int, index: Tensor, count: int) -> Tensor:
    """Integers in [0, 2^31) that depend on (seed, epoch, index, number) alone. (B,) int64 -> (B, count) int64."""
    key = torch.zeros_like(index)
    for part in (torch.full_like(index, seed), torch.full_like(index, epoch), index):
        key = _splitmix(key * _ODD + part + 1)
    number = torch.arange(1, count + 1, device=index.device)
    return _splitmix(key[:, None] + number * _ODD) >> 33 & 0x7FFFFFFF


class MultiView:
    """V augmented views of each image, image-major: row V b + v, view 0 upright. Images have one to four channels.

    An image is mirrored in half of the cases, once for all of its views; then each view is turned (rot90: view k by 90 k
    degrees counter-clockwise; flip: odd views are mirrored once more) and cropped by itself out of black padding. Bit for bit
    what PIL gives on the same draws.

    Args:
        views: settings.
        seed: of the draws.
    """

    def __init__(self, views: Views, seed: int = 0) -> None:
        self.views = views
        self.seed = seed

    def parameters(self, index: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Whether an image is mirrored (B,) bool, and the corner (row, column) of each view's crop (B, V, 2)."""
        views = self.views
        B, V = len(index), views.count
        if views.kind == "none":
            zero = torch.zeros(B, V, 2, dtype=torch.int64, device=index.device)
            return torch.zeros(B, dtype=torch.bool, device=index.device), zero
        drawn = draws(self.seed, epoch, index, 1 + 2 * V)
        mirrored = (drawn[:, 0] & 1).bool() if views.mirror else torch.zeros_like(drawn[:, 0], dtype=torch.bool)
        return mirrored, drawn[:, 1:].view(B, V, 2) % (2 * views.padding + 1)

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Shapes: images (B, C, H, W) uint8, index (B,) -> (B V, C, H, W) uint8.

        Images (B, V, C, H, W), whose views are crops already, are mirrored alone.

        Raises:
            ValueError: quarter turns of an image that is not square.
        """
        views = self.views
        if images.dtype != torch.uint8:
            raise ValueError(f"views are made of uint8 images, got {images.dtype}")
        if images.ndim == 5:
            mirrored, _ = self.parameters(index, epoch)
            return torch.where(mirrored.view(-1, 1, 1, 1, 1), images.flip(-1), images).flatten(0, 1)
        if views.kind == "none":
            return images
        B, C, H, W = images.shape
        V, P = views.count, views.padding
        if views.kind == "rot90" and V > 1 and H != W:
            raise ValueError(f"quarter turns need square images, got {H} x {W}")
        mirrored, corner = self.parameters(index, epoch)
        padded = images.new_zeros(B, H + 2 * P, W + 2 * P, 4)  # of four bytes, so that a pixel is one number to gather
        _copy_channels(padded[:, P : P + H, P : P + W].permute(0, 3, 1, 2), images)
        side = H + 2 * P - 1
        rows = torch.arange(H, dtype=torch.int32, device=images.device)[:, None]
        columns = torch.arange(W, dtype=torch.int32, device=images.device)
        base = torch.arange(B, dtype=torch.int32, device=images.device).view(B, 1, 1) * (H + 2 * P)
        places = torch.empty(B, V, H, W, dtype=torch.int32, device=images.device)
        corner = corner.int()
        for v in range(V):
            r, c = rows + corner[:, v, 0].view(B, 1, 1), columns + corner[:, v, 1].view(B, 1, 1)
            for _ in range(v if views.kind == "rot90" else 0):
                r, c = c, side - r  # the pixel at (r, c) of an image turned counter-clockwise is that at (c, side - r)
            flipped = mirrored ^ (views.kind == "flip" and v % 2 == 1)
            c = torch.where(flipped.view(B, 1, 1), W + 2 * P - 1 - c, c)
            torch.add((base + r) * (W + 2 * P), c, out=places[:, v])
        out = padded.view(torch.int32).view(-1).index_select(0, places.view(-1))
        return out.view(torch.uint8).view(B * V, H, W, 4)[..., :C].permute(0, 3, 1, 2)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std, (N, C, H, W) uint8 -> float32, dense, channels last where they are so in ``images``.

    A copy for each channel and factors as large as an image: loops over three channels would take most of the time.
    """
    form = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
    pixels = torch.empty(images.shape, device=images.device, memory_format=form)
    _copy_channels(pixels, images)
    factors = torch.tensor([[1 / (255 * s), -m / s] for m, s in zip(mean, std, strict=True)], device=images.device)
    scale, shift = (
        factor.view(1, -1, 1, 1).expand(1, *images.shape[1:]).contiguous(memory_format=form)
        for factor in factors.unbind(1)
    )
    return torch.addcmul(shift, pixels, scale, out=pixels)


def _copy_channels(to: Tensor, images: Tensor) -> None:
    """Into the first channels of ``to``; both (N, C, H, W)."""
    for channel in range(images.shape[1]):
        to[:, channel].copy_(images[:, channel])
