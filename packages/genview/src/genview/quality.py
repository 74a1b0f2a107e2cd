"""How good a pair of views is: similar foregrounds, different backgrounds, as a frozen encoder sees them.

Shapes: N pairs, L tokens of a view (its map of H x W cells), K channels, G rows and columns of a stored map.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genview.foreground import ForegroundModel, soft_maps
from tenfold import UserError

Mode = Literal["online", "cached", "static"]


@dataclass(frozen=True)
class PairQuality:
    """Quality of pairs.

    Attributes:
        q: s_fg - s_bg, in [-2, 2] (N,).
        s_fg: cosine of the foreground vectors (N,).
        s_bg: cosine of the background vectors (N,).
    """

    q: Tensor
    s_fg: Tensor
    s_bg: Tensor


def pooled(tokens: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """Foreground and background vector of each view.

        z_f = sum_h M_f,h F_h,    z_b = sum_h M_b,h F_h

    Shapes: ``tokens`` (N, L, K), ``projections`` (N, L) -> (N, K), (N, K), float32.
    """
    front, back = soft_maps(projections)
    f_NLK = tokens.float()
    return torch.einsum("nl,nlk->nk", front, f_NLK), torch.einsum("nl,nlk->nk", back, f_NLK)


def pair_quality(tokens_a: Tensor, tokens_b: Tensor, direction: Tensor, *, mean: Tensor | None = None) -> PairQuality:
    """q of each pair of views, from their tokens and the direction that tells foreground from background.

        q = cos(z_f, z_f+) - cos(z_b, z_b+)

    A constant added to all projections of an image changes nothing, since they are scaled to [0, 1]; so the mean has no
    part in q, and is taken only so that projections stay small in number.

    Args:
        tokens_a: of the first views.
        tokens_b: of the second views.
        direction: u.
        mean: m of the foreground model.

    Shapes: (N, L, K), (N, L, K), (K,) -> three of (N,). In float32, without gradient.

    Raises:
        ValueError: tokens of different shapes.

    Source: GenView, ECCV 2024, figure of the quality-driven loss and the authors' code.
    """
    if tokens_a.shape != tokens_b.shape:
        raise ValueError(f"views of {tuple(tokens_a.shape)} and {tuple(tokens_b.shape)} tokens do not form pairs")
    with torch.no_grad(), torch.autocast(tokens_a.device.type, enabled=False):
        vectors = []
        for tokens in (tokens_a, tokens_b):
            x = tokens.float() if mean is None else tokens.float() - mean.to(tokens.device)
            vectors.append(pooled(tokens, x @ direction.to(tokens.device).float()))
        (fa, ba), (fb, bb) = vectors
        s_fg, s_bg = F.cosine_similarity(fa, fb, dim=1), F.cosine_similarity(ba, bb, dim=1)
        s_fg, s_bg = s_fg.clamp(-1, 1), s_bg.clamp(-1, 1)
        return PairQuality(s_fg - s_bg, s_fg, s_bg)


def crop_maps(maps: Tensor, boxes: Tensor, flip: Tensor, size: int = 7) -> Tensor:
    """What a crop of an image would look like to the encoder, cut out of the map of the whole image.

    Args:
        maps: maps of the unaugmented images.
        boxes: top, left, height, width of each crop, as shares of the image.
        flip: which crops are mirrored.
        size: rows and columns of the result.

    Shapes: (N, K, G, G), (N, 4), (N,) bool -> (N, size * size, K) tokens.
    """
    cells = (torch.arange(size, device=maps.device) + 0.5) / size
    top, left, height, width = boxes.to(maps.device).float().unbind(dim=1)
    y = top[:, None] + cells[None] * height[:, None]
    across = torch.where(flip.to(maps.device)[:, None], 1 - cells[None], cells[None])
    x = left[:, None] + across * width[:, None]
    where = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    cut = F.grid_sample(maps.float(), where * 2 - 1, align_corners=False, padding_mode="border")
    return cut.flatten(2).transpose(1, 2)


class MapEncoder(Protocol):
    """What a scorer needs of a frozen encoder."""

    name: str

    def __call__(self, images: Tensor) -> "Tokens":
        """Tokens of images (N, 3, H, W) in [0, 1]."""


@dataclass(frozen=True)
class Tokens:
    """What an encoder sees.

    Attributes:
        tokens: (N, L, K).
        pooled: one vector per image (N, D).
        grid: rows and columns of the tokens.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]


class QualityScorer:
    """Scores pairs of views by a frozen encoder, in one of three ways that are never changed in silence.

    ``online`` runs the encoder on both augmented views, as the authors do. ``cached`` keeps its map of each unaugmented
    image and cuts the crop out of it. ``static`` takes one q per pair that was computed beforehand. It is no module: the
    encoder gets into no checkpoint, no wrapper of DistributedDataParallel, no momentum copy, no ``train()``.

    Args:
        encoder: the frozen encoder, which takes images in [0, 1]; None for static.
        foreground: the foreground model of this encoder; None for static.
        mode: online, cached or static.
        mean: pixel mean of the views that it is given, per channel.
        std: their standard deviation.

    Raises:
        ValueError: an encoder or a foreground model is missing.
        UserError: the foreground model is of another encoder.
    """

    def __init__(
        self,
        encoder: MapEncoder | None,
        foreground: ForegroundModel | None,
        mode: Mode = "online",
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
    ) -> None:
        if mode != "static" and (encoder is None or foreground is None):
            raise ValueError(f"mode {mode} needs an encoder and its foreground model")
        if encoder is not None and foreground is not None and encoder.name != foreground.encoder:
            raise UserError(
                f"the foreground model is of {foreground.encoder}, the quality encoder is {encoder.name}: fit one for it"
            )
        self.encoder, self.foreground, self.mode = encoder, foreground, mode
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def pixels(self, views: Tensor) -> Tensor:
        """Views as pixels in [0, 1] again, whatever mean and deviation they were normalized by."""
        return views.float() * self.std.to(views.device) + self.mean.to(views.device)

    @torch.no_grad()
    def maps(self, images: Tensor, *, cells: int = 14) -> Tensor:
        """Maps of unaugmented images in [0, 1], for ``cached``. Shapes: (N, 3, H, W) -> (N, K, cells, cells) float16."""
        assert self.encoder is not None
        seen = self.encoder(images)
        maps = seen.tokens.transpose(1, 2).reshape(len(images), -1, *seen.grid)
        return F.interpolate(maps.float(), (cells, cells), mode="bilinear", align_corners=False).half()

    @torch.no_grad()
    def __call__(self, view_a: Tensor, view_b: Tensor) -> PairQuality:
        """Quality of pairs of normalized views, online. Shapes: (N, 3, H, W) twice -> three of (N,)."""
        if self.mode != "online":
            raise ValueError(f"this scorer is {self.mode}: it does not look at views")
        assert self.encoder is not None
        assert self.foreground is not None
        a, b = (self.encoder(self.pixels(view)) for view in (view_a, view_b))
        return pair_quality(a.tokens, b.tokens, self.foreground.direction, mean=self.foreground.mean)

    @torch.no_grad()
    def from_maps(
        self,
        maps_a: Tensor,
        maps_b: Tensor,
        boxes_a: Tensor,
        boxes_b: Tensor,
        flips: tuple[Tensor, Tensor],
        *,
        size: int = 7,
    ) -> PairQuality:
        """Quality of pairs of crops out of kept maps, see ``crop_maps``.

        Args:
            maps_a: maps of the images that the first views are of (N, K, G, G).
            maps_b: likewise for the second views.
            boxes_a: crops of the first views (N, 4).
            boxes_b: likewise.
            flips: which of the first and which of the second views are mirrored.
            size: rows and columns that a crop's map is brought to.

        Raises:
            ValueError: the scorer is not ``cached``.
        """
        if self.mode != "cached":
            raise ValueError(f"this scorer is {self.mode}: it does not look at kept maps")
        assert self.foreground is not None
        a = crop_maps(maps_a, boxes_a, flips[0], size)
        b = crop_maps(maps_b, boxes_b, flips[1], size)
        return pair_quality(a, b, self.foreground.direction, mean=self.foreground.mean)
