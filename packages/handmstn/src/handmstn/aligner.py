"""The aligner: a network that says where palm and fingers lie, in two levels that are composed before anything is sampled."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmstn.backbones import build_map
from handmstn.parts import PartSpec
from handmstn.warping import ControlPointGrid, compose, fit_similarity, similarity


@dataclasses.dataclass
class AlignedHand:
    """What an aligner found in a batch of pictures.

    Attributes:
        points: control points of all parts in the picture, (B, sum K, 2).
        visibility: share of each part that is seen, by the network, (B, P).
        visibility_logits: their logits.
        side_logits: positive where the hand looks like a right one (or a mirrored left one), (B,).
        transform: the hand's similarity of level 0, (B, 2, 3); the identity with one level.
        first: the points as level 0 has them, (B, sum K, 2).
        features: the last hidden layer of the last level, (B, H), from which ``familiar`` tells what is unlike any hand.
    """

    points: Tensor
    visibility: Tensor
    visibility_logits: Tensor
    side_logits: Tensor
    transform: Tensor
    first: Tensor
    features: Tensor


class ChannelNorm(nn.Module):
    """x / sqrt(1e-6 + sum over channels of x^2) at each pixel.

    MatConvNet's normalization with the parameters (1024, 1e-6, 1, 0.5) of the predecessor is this; torch's
    ``LocalResponseNorm`` takes other arguments in another order, and divides alpha by the window.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W)."""
        return x / (1e-6 + x.square().sum(1, keepdim=True)).sqrt()


class _Head(nn.Module):
    """Flatten, 128 hidden units, outputs that begin near zero.

    The normalized map is scaled to a mean square of 1, without which the first hundreds of steps hardly move the head.
    """

    def __init__(self, inputs: int, outputs: int, scale: float, hidden: int = 128) -> None:
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(inputs, hidden)
        self.last = nn.Linear(hidden, outputs)
        nn.init.normal_(self.last.weight, std=1e-3)
        nn.init.zeros_(self.last.bias)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and hidden units."""
        hidden = F.leaky_relu(self.hidden(maps.flatten(1) * self.scale), 0.01)
        return self.last(hidden), hidden


class _Places(nn.Module):
    """Two layers on the flattened map, and for each point a map of where it is expected, whose mean is added.

    Both begin at zero: the maps of expectation begin around the pose (``spread``, in half widths), or even.
    """

    def __init__(self, maps: Tensor, pose: Tensor, outputs: int, spread: float) -> None:
        super().__init__()
        self.dense = _Head(maps[0].numel(), outputs, 1.0, hidden=256)
        self.expect = nn.Conv2d(maps.shape[1], len(pose), 1)
        nn.init.normal_(self.expect.weight, std=1e-3)
        assert self.expect.bias is not None
        nn.init.zeros_(self.expect.bias)
        rows, columns = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in maps.shape[-2:])
        where = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 2)
        prior = (
            -(pose[:, None] - where).square().sum(-1) / (2 * spread**2)
            if spread
            else torch.zeros(len(pose), len(where))
        )
        self.register_buffer("where", where, persistent=False)
        self.register_buffer("prior", prior, persistent=False)
        self.register_buffer("mean", prior.softmax(1) @ where, persistent=False)

    where: Tensor
    prior: Tensor
    mean: Tensor

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and hidden units."""
        out, hidden = self.dense(maps)
        expected = (4 * self.expect(maps).flatten(2) + self.prior).softmax(2) @ self.where - self.mean
        count = expected.shape[1] * 2
        return torch.cat([out[:, :count] + expected.flatten(1), out[:, count:]], 1), hidden


class MultiSpatialTransformer(nn.Module):
    """Picture -> control points and visibility of every part.

    Level 0 sees the coarse picture and predicts all points, of which it keeps the similarity T (rotation, scale, shift) that
    carries the upright hand nearest to them; cosine and sine as outputs begin on a saddle that takes a thousand steps to leave.
    Level 1 sees the coarse picture warped by T and predicts the points in that frame; the points in the picture are T(points).
    Nothing is resampled twice: the crops are taken from the full picture by the composed grid. An untrained network puts every
    part where it lies on an upright hand in the middle of the picture, so the first crops are valid.

    Args:
        parts: the parts.
        backbone: network of both levels (one each): ``hand:loc`` (five small blocks), ``timm:NAME`` or ``packaged:NAME``.
        levels: 2, or 1 for points straight from the picture.
        loc_size: side of the coarse picture in pixels.
        normalize: per-pixel normalization of the backbone's map.
        passes: how often level 1 looks in evaluation; each further time in the frame of the points that it found.
        votes: quarter turns of the picture that level 0 looks at in evaluation, 1 or 4; the mean of what they say, turned
            back, is taken where they agree. 4 is for an aligner that has learned from hands at any angle.
        head: dense, or places; places does without the per-pixel normalization.

    Source: the two levels, the pose at the start and the visibility are choices of ours; the head is the predecessor's.

    Example:
        >>> parts = preset("eeprnet", 8)
        >>> aligner = MultiSpatialTransformer(parts, "hand:loc", levels=1, loc_size=64).eval()
        >>> found = aligner(torch.rand(2, 3, 96, 96))
        >>> found.points.shape, found.visibility.shape
        (torch.Size([2, 9, 2]), torch.Size([2, 1]))
    """

    pose: Tensor
    view: Tensor

    def __init__(
        self,
        parts: Sequence[PartSpec],
        backbone: str = "timm:resnet18",
        levels: int = 2,
        loc_size: int = 112,
        normalize: bool = True,
        passes: int = 2,
        votes: int = 4,
        head: Literal["dense", "places"] = "dense",
    ) -> None:
        super().__init__()
        if levels not in {1, 2}:
            raise ValueError(f"levels is 1 or 2, got {levels}")
        self.parts = tuple(parts)
        self.levels, self.loc_size, self.passes, self.votes = levels, loc_size, passes, votes
        self.grid = ControlPointGrid(self.parts)
        pose = torch.cat([torch.from_numpy(part.start) for part in self.parts]).float()
        self.register_buffer("pose", pose, persistent=False)
        outputs = pose.numel() + len(self.parts) + 1
        sizes = [pose.numel(), outputs] if levels == 2 else [outputs]
        normalize = normalize and head == "dense"
        self.nets, self.heads = nn.ModuleList(), nn.ModuleList()
        for size in sizes:
            net = build_map(backbone, loc_size)
            with torch.no_grad():
                maps = net.eval()(torch.zeros(1, 3, loc_size, loc_size))
            self.nets.append(net.train())
            if head == "places":
                spread = 0.3 if size == outputs and levels == 2 else 0.0  # level 1 alone sees the hand upright
                self.heads.append(_Places(maps, pose, size, spread))
            else:
                self.heads.append(_Head(maps[0].numel(), size, math.sqrt(maps.shape[1]) if normalize else 1.0))
        self.norm = ChannelNorm() if normalize else nn.Identity()
        self.register_buffer("view", _view(loc_size), persistent=False)

    def coarse(self, images: Tensor) -> Tensor:
        """The picture at ``loc_size``, each pixel the mean of what it covers."""
        size = self.loc_size
        if images.shape[-2:] == (size, size):
            return images
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)

    def forward(self, images: Tensor, frames: Tensor | None = None) -> AlignedHand:
        """Points and visibility.

        Args:
            images: pixels in [0, 1], (B, 3, H, W).
            frames: frames in which level 1 looks, (B, 2, 3), for training it beside a level 0 that still learns; NaN, or None,
                is level 0's.

        Raises:
            ValueError: pictures of another number of channels.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected color pictures (B, 3, H, W), got {tuple(images.shape)}; gray ones need 3 channels"
            )
        coarse = (self.coarse(images) - 0.5) * 4
        batch = images.shape[0]
        transform = torch.eye(2, 3, device=images.device, dtype=images.dtype).expand(batch, 2, 3)
        if self.levels == 1:
            points, out, hidden = self._points(coarse)
            first = points
        else:
            first = self._voted(coarse) if self.votes > 1 and not self.training else self._first(coarse)
            transform = _bounded(fit_similarity(self.pose, first))
            frame = transform if frames is None else torch.where(torch.isfinite(frames), frames, transform)
            points, out, hidden = self._in_frame(coarse, frame)
            for _ in range(0 if self.training else self.passes - 1):
                points, out, hidden = self._in_frame(coarse, fit_similarity(self.pose, points))
        logits = out[:, self.pose.numel() : self.pose.numel() + len(self.parts)]
        return AlignedHand(points, logits.sigmoid(), logits, out[:, -1], transform, first, hidden)

    def _first(self, coarse: Tensor) -> Tensor:
        """The points by level 0."""
        out, _ = self.heads[0](self.norm(self.nets[0](coarse)))
        points: Tensor = self.pose + out.view(coarse.shape[0], -1, 2)
        return points

    def _voted(self, coarse: Tensor) -> Tensor:
        """The mean over quarter turns of the picture; what the picture itself says where they cancel out."""
        found = []
        for turns in range(4):
            points = self._first(torch.rot90(coarse, turns, (2, 3)))
            for _ in range(turns):  # back: the turn took (x, y) to (y, -x)
                points = torch.stack([-points[..., 1], points[..., 0]], -1)
            found.append(points)
        mean = torch.stack(found).mean(0)
        extents = [(points - points.mean(1, keepdim=True)).square().mean((1, 2)).sqrt() for points in (mean, *found)]
        agreed = extents[0] > 0.5 * torch.stack(extents[1:]).mean(0)
        return torch.where(agreed[:, None, None], mean, found[0])

    def _in_frame(self, coarse: Tensor, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What level 1 says of the coarse picture as seen in a frame; its loss does not move what it sees."""
        batch, size = coarse.shape[0], self.loc_size
        grid = compose(frame.detach(), self.view.expand(batch, -1, -1)).view(batch, size, size, 2)
        points, out, hidden = self._points(F.grid_sample(coarse, grid, padding_mode="zeros", align_corners=True))
        return compose(frame.detach() if self.training else frame, points), out, hidden

    def _points(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points in the frame of what is seen, all outputs of the last level, and its hidden units."""
        out, hidden = self.heads[-1](self.norm(self.nets[-1](seen)))
        return self.pose + out[:, : self.pose.numel()].view(seen.shape[0], -1, 2), out, hidden

    def placed(self, transform: Tensor) -> Tensor:
        """The pose carried by level 0 alone, (B, sum K, 2)."""
        return compose(transform, self.pose.expand(transform.shape[0], -1, -1))


def _bounded(transform: Tensor) -> Tensor:
    """With a scale of 0.2 to 5: the hand neither vanishes nor leaves the picture."""
    scale = transform[:, :, 0].norm(dim=1).clamp_min(1e-6)
    factor = (scale.clamp(0.2, 5.0) / scale)[:, None, None]
    return torch.cat([transform[:, :, :2] * factor, transform[:, :, 2:]], 2)


def _view(size: int) -> Tensor:
    line = torch.linspace(-1, 1, size)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([columns, rows], -1).view(1, -1, 2)


def warped(
    images: Tensor, generator: torch.Generator, scale: float = 0.22, shift: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Random similarities of pictures with their targets.

    A picture is turned by any angle, scaled by e^-scale to e^scale and shifted by up to ``shift``.

    Returns:
        The warped pictures, and the map from a place in the given picture to its place in the warped one, (B, 2, 3).
    """
    batch, size = images.shape[0], images.shape[-1]
    angle = (2 * torch.rand(batch, generator=generator) - 1) * math.pi
    log_scale = (2 * torch.rand(batch, generator=generator) - 1) * scale
    moved = (2 * torch.rand(batch, 2, generator=generator) - 1) * shift
    forward = similarity(torch.stack([angle.cos(), angle.sin()], 1), log_scale, moved)
    linear = torch.linalg.inv(forward[:, :, :2])
    back = torch.cat([linear, -(linear @ forward[:, :, 2:])], 2).to(images)
    grid = compose(back, _view(size).to(images).expand(batch, -1, -1)).view(batch, size, size, 2)
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return out, forward.to(images)


def quartered(images: Tensor, points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Square pictures and their points (B, K, 2), each by one of its four quarter turns at random."""
    images, points = images.clone(), points.clone()
    which = torch.randint(4, (len(images),), generator=generator)
    for turns in range(1, 4):
        rows = which == turns
        images[rows] = torch.rot90(images[rows], turns, (2, 3))
        for _ in range(turns):  # a quarter turn takes (x, y) to (y, -x)
            points[rows] = torch.stack([points[rows][..., 1], -points[rows][..., 0]], -1)
    return images, points


def near(transform: Tensor, generator: torch.Generator) -> Tensor:
    """Frames beside given ones: turned by 0.25 rad, scaled by 12 %, shifted by 0.1 of the hand's frame (deviations)."""
    count = len(transform)
    angle = 0.25 * torch.randn(count, generator=generator)
    log_scale = 0.12 * torch.randn(count, generator=generator)
    shift = 0.10 * torch.randn(count, 2, generator=generator)
    noise = similarity(torch.stack([angle.cos(), angle.sin()], 1), log_scale, shift).to(transform)
    linear = transform[:, :, :2]
    return torch.cat([linear @ noise[:, :, :2], linear @ noise[:, :, 2:] + transform[:, :, 2:]], 2)


def scrambled(images: Tensor, generator: torch.Generator, blocks: int = 8) -> Tensor:
    """Pictures whose blocks are shuffled: the same colors and textures, and no hand."""
    batch, channels, height, width = images.shape
    h, w = height // blocks, width // blocks
    tiles = images[:, :, : h * blocks, : w * blocks].reshape(batch, channels, blocks, h, blocks, w)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, blocks * blocks, channels, h, w)
    order = torch.rand(batch, blocks * blocks, generator=generator).argsort(1)
    tiles = tiles[torch.arange(batch)[:, None], order]
    tiles = tiles.reshape(batch, blocks, blocks, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    out = images.clone()
    out[:, :, : h * blocks, : w * blocks] = tiles.reshape(batch, channels, h * blocks, w * blocks)
    return out
