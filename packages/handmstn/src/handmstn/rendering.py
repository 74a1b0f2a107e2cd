"""Rendered hands with free labels: identity lies in creases, everything else (pose, skin, light, background) is drawn anew.

Recipe: a palm (rounded rectangle) and five tapering fingers; per identity three principal lines, secondary creases, smooth
ridges, joint creases; per picture rotation, scale, perspective, spread and bending of fingers, skin tone, light, background,
a bar that covers part of the hand, blur and noise. Pixels are mapped back to palm and finger coordinates, all pictures of a
batch at once. Skin, light and background do not depend on the identity, or a network would read those.
"""

import dataclasses
import io
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from handmstn.parts import ANGLES, BASES, FINGERS, HALF_WIDTHS, LENGTHS, PALM_CENTER, PALM_HALF, TAPER, WIDER
from tenfold.randomness import key

Domain = Literal["a", "b"]
PALM_TEXTURE, FINGER_TEXTURE = 192, (96, 32)
CONTRAST = 0.42


def _noise(rng: np.random.Generator, cells: int, height: int, width: int) -> NDArray[np.float32]:
    """Smooth noise with ``cells`` cells across."""
    rows = max(2, round(cells * height / max(height, width)))
    columns = max(2, round(cells * width / max(height, width)))
    coarse = torch.from_numpy(rng.standard_normal((1, 1, rows, columns)).astype(np.float32))
    fine: NDArray[np.float32] = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0].numpy()
    return fine


def _crease(x: NDArray[Any], y: NDArray[Any], control: NDArray[Any], sigma: float) -> NDArray[Any]:
    """Gaussian profile around a cubic Bezier curve."""
    t = np.linspace(0, 1, 28)[:, None]
    weights = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]
    curve = np.asarray(sum(w * c for w, c in zip(weights, control, strict=True)))
    squared = (x[..., None] - curve[:, 0]) ** 2 + (y[..., None] - curve[:, 1]) ** 2
    profile: NDArray[Any] = np.exp(-squared.min(-1) / (2 * sigma**2))
    return profile


_PRINCIPAL = (
    ((-0.95, -0.30), (-0.45, -0.25), (0.05, 0.25), (0.10, 0.95)),  # life line, around the thumb
    ((-0.95, -0.32), (-0.40, -0.20), (0.30, 0.05), (0.85, 0.35)),  # head line
    ((0.98, -0.25), (0.45, -0.15), (-0.05, -0.40), (-0.35, -0.80)),  # heart line
)


def identity_textures(seed: int, person: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How dark each place of a person's palm (192, 192) and fingers (5, 96, 32) is, 0 to about 1, in part coordinates."""
    rng = np.random.default_rng(key(seed, person, 1))
    line = np.linspace(-1, 1, PALM_TEXTURE // 2, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    dark = np.zeros_like(x)
    for control in _PRINCIPAL:
        moved = np.asarray(control) + rng.normal(0, 0.11, (4, 2))
        dark = np.maximum(dark, rng.uniform(0.55, 0.70) * _crease(x, y, moved, 0.032))
    for _ in range(int(rng.integers(6, 12))):
        start, angle, length = rng.uniform(-0.9, 0.9, 2), rng.uniform(0, math.pi), rng.uniform(0.2, 0.55)
        step = length / 3 * np.asarray([math.cos(angle), math.sin(angle)])
        moved = start + np.arange(4)[:, None] * step + rng.normal(0, 0.03, (4, 2))
        dark = np.maximum(dark, rng.uniform(0.3, 0.5) * _crease(x, y, moved, 0.02))
    coarse = torch.from_numpy(dark)[None, None]
    palm = F.interpolate(coarse, (PALM_TEXTURE, PALM_TEXTURE), mode="bicubic", align_corners=True)[0, 0].numpy()
    for cells, depth in ((24, 0.10), (9, 0.08)):
        palm = palm + depth * _noise(rng, cells, PALM_TEXTURE, PALM_TEXTURE)
    height, width = FINGER_TEXTURE
    v, u = np.meshgrid(np.linspace(0, 1, height), np.linspace(-1, 1, width), indexing="ij")  # v from base to tip
    fingers = np.zeros((5, height, width))
    for finger in range(5):
        for place in (0.05, 0.42, 0.72)[: 2 if finger == 0 else 3]:
            spots = [place + rng.normal(0, 0.035)]
            spots += [spots[0] + rng.uniform(0.03, 0.06)] if rng.random() < 0.6 else []
            for spot in spots:
                bow = rng.normal(0, 0.02) * u**2 + rng.normal(0, 0.015) * u
                depth = rng.uniform(0.4, 0.7)
                fingers[finger] = np.maximum(fingers[finger], depth * np.exp(-((v - spot - bow) ** 2) / (2 * 0.016**2)))
        for _ in range(6):
            start, angle = rng.uniform((0.0, -1), (1, 1)), rng.uniform(0, math.pi)
            away = (v - start[0]) * math.cos(angle) * 3 + (u - start[1]) * math.sin(angle)
            near = (v - start[0]) ** 2 * 9 + (u - start[1]) ** 2 < rng.uniform(0.1, 0.5)
            fingers[finger] = np.maximum(fingers[finger], 0.3 * near * np.exp(-(away**2) / (2 * 0.05**2)))
        fingers[finger] += 0.08 * _noise(rng, 24, height, width)
    return palm.astype(np.float32), fingers.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A batch of rendered pictures.

    Attributes:
        images: (B, 3, S, S) uint8.
        points: control points of palm (9) and fingers (6 each), (B, 39, 2), in half widths.
        visibility: share of each of the six parts that is inside the picture and not covered, (B, 6).
        masks: where the hand is seen, (B, S, S) bool.
        joints: 21 landmarks (wrist, then four per finger from thumb to little), (B, 21, 2).
    """

    images: NDArray[np.uint8]
    points: NDArray[np.float32]
    visibility: NDArray[np.float32]
    masks: NDArray[np.bool_]
    joints: NDArray[np.float32]


def _uniform(rng: np.random.Generator, count: int, low: float, high: float) -> Tensor:
    return torch.from_numpy(rng.uniform(low, high, count).astype(np.float32))


def _normal(rng: np.random.Generator, count: int, sigma: float) -> Tensor:
    return torch.from_numpy(rng.normal(0, sigma, count).astype(np.float32))


class _Pose:
    """Where palm and fingers of a batch lie, and the map between hand units and the picture."""

    def __init__(self, rng: np.random.Generator, shape: dict[str, NDArray[Any]], upright: bool) -> None:
        count = len(shape["width"])
        angle = _uniform(rng, count, -math.pi, math.pi) * (0.05 if upright else 1.0)
        self.scale = _uniform(rng, count, 0.36, 0.48)
        self.rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        self.shift = torch.stack([_uniform(rng, count, -0.22, 0.22), _uniform(rng, count, -0.22, 0.22)], 1)
        self.slant = torch.stack([_normal(rng, count, 0.12), _normal(rng, count, 0.12)], 1).clamp(-0.2, 0.2)
        self.width = torch.from_numpy(shape["width"].astype(np.float32))
        fan = _normal(rng, count, 0.08)[:, None] * torch.linspace(-1, 1, 5)
        spread = torch.from_numpy(rng.normal(0, 0.10, (count, 5)).astype(np.float32))
        self.angle = torch.tensor(ANGLES).deg2rad() + fan + spread
        bent = torch.from_numpy(np.where(rng.random((count, 5)) < 0.3, rng.uniform(0.6, 1.0, (count, 5)), 1.0))
        self.length = torch.tensor(LENGTHS) * torch.from_numpy(shape["length"].astype(np.float32)) * bent.float()
        self.half = torch.tensor(HALF_WIDTHS) * torch.from_numpy(shape["half"].astype(np.float32))
        base = torch.tensor(BASES)[None] * torch.stack([self.width, torch.ones_like(self.width)], 1)[:, None]
        self.base = base  # (B, 5, 2)

    def to_picture(self, hand: Tensor) -> Tensor:
        """Hand units (B, K, 2) -> half widths of the picture; the wrist's side of the hand lies off its middle."""
        moved = hand + torch.tensor([0.0, 0.45])
        seen = moved / (1 + (moved * self.slant[:, None]).sum(-1, keepdim=True))
        return self.scale[:, None, None] * (seen @ self.rotation.transpose(1, 2)) + self.shift[:, None]

    def to_hand(self, picture: Tensor) -> Tensor:
        """The inverse of ``to_picture``, (B, N, 2)."""
        seen = ((picture - self.shift[:, None]) / self.scale[:, None, None]) @ self.rotation
        return seen / (1 - (seen * self.slant[:, None]).sum(-1, keepdim=True)).clamp_min(0.2) - torch.tensor(
            [0.0, 0.45]
        )

    def finger(self, finger: int, share: float, across: float) -> Tensor:
        """Hand units of a place on a finger, (B, 2)."""
        angle = self.angle[:, finger]
        along = share * self.length[:, finger]
        aside = across * self.half[:, finger] * (1 - TAPER * share)
        x = self.base[:, finger, 0] + along * angle.sin() + aside * angle.cos()
        y = self.base[:, finger, 1] - along * angle.cos() + aside * angle.sin()
        return torch.stack([x, y], 1)

    def points(self) -> Tensor:
        """The 39 control points in the picture."""
        (cx, cy), (hx, hy) = PALM_CENTER, PALM_HALF
        grid = torch.tensor([[cx + hx * x, cy + hy * y] for y in (-1, 0, 1) for x in (-1, 0, 1)])
        palm = grid[None] * torch.stack([self.width, torch.ones_like(self.width)], 1)[:, None]
        fingers = [
            self.finger(f, (1 - y) / 2, WIDER * x) for f in range(5) for y in (1.0, 0.0, -1.0) for x in (-1.0, 1.0)
        ]
        return self.to_picture(torch.cat([palm, torch.stack(fingers, 1)], 1))

    def joints(self) -> Tensor:
        """The 21 landmarks in the picture."""
        wrist = torch.tensor([[0.0, 1.05]]).expand(len(self.width), 2)
        found = [self.finger(f, share, 0.0) for f in range(5) for share in (-0.12, 0.42, 0.72, 1.0)]
        return self.to_picture(torch.stack([wrist, *found], 1))


def render(
    textures: tuple[NDArray[np.float32], NDArray[np.float32]],
    shape: dict[str, NDArray[Any]],
    seed: tuple[int, ...],
    size: int = 160,
    domain: Domain = "a",
    *,
    upright: bool = False,
    jpeg: bool = True,
) -> Rendered:
    """Render one picture per row of the textures.

    Args:
        textures: palm (B, 192, 192) and fingers (B, 5, 96, 32), as of ``identity_textures``.
        shape: factors of an identity's form: width (B,), length (B, 5), half (B, 5).
        seed: key of everything else.
        size: side of the pictures.
        domain: a, or b: another range of skin, light from one side, structured background, another camera.
        upright: hands upright within 9 degrees, and nothing covered.
        jpeg: compress with quality 60 to 95.
    """
    rng = np.random.default_rng(key(*seed))
    count = len(textures[0])
    pose = _Pose(rng, shape, upright)
    line = torch.linspace(-1, 1, size)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    pixels = torch.stack([columns, rows], -1).view(1, -1, 2).expand(count, -1, -1)
    hand = pose.to_hand(pixels)  # (B, N, 2)
    palm_map = torch.stack([hand[..., 0] / pose.width[:, None], hand[..., 1]], -1)
    corner = (palm_map - torch.tensor([0.0, 0.02])).abs() - torch.tensor([0.55, 0.65])
    inside = corner.clamp_min(0).norm(dim=-1) < 0.38
    owner = torch.where(inside, 0, -1)  # part of each pixel
    place = (palm_map - torch.tensor(PALM_CENTER)) / torch.tensor(PALM_HALF)
    dark = _lookup(torch.from_numpy(textures[0])[:, None], place)
    shade = 1 - 0.10 * palm_map.square().sum(-1).clamp_max(1.6)
    every = {}
    for finger in range(5):
        angle = pose.angle[:, finger, None]
        offset = hand - pose.base[:, finger, None]
        along = offset[..., 0] * angle.sin() - offset[..., 1] * angle.cos()
        across = offset[..., 0] * angle.cos() + offset[..., 1] * angle.sin()
        length, half = pose.length[:, finger, None], pose.half[:, finger, None]
        share = along / length
        wide = half * (1 - TAPER * share.clamp(0, 1))
        past = (along - (length - 0.8 * half)).clamp_min(0) / (0.8 * half)
        mine = (along > -0.12) & (across.abs() < wide * (1 - past.square()).clamp_min(0).sqrt())
        uv = torch.stack([across / wide, 2 * share - 1], -1)
        texture = torch.from_numpy(np.ascontiguousarray(textures[1][:, finger]))[:, None]
        dark = torch.where(mine, _lookup(texture, uv), dark)
        shade = torch.where(mine, 1 - 0.28 * (across / wide).square(), shade)
        owner = torch.where(mine, finger + 1, owner)
        every[finger] = mine
    shown = owner >= 0
    covered = _bar(rng, count, pixels, pose) if not upright else torch.zeros_like(shown)
    colors = _picture(rng, count, size, domain, dark, shade, shown, covered, pixels)
    images = _camera(rng, colors.view(count, 3, size, size), domain, jpeg)
    visible = torch.stack([_share(owner == part, ~covered) for part in range(6)], 1)
    points = pose.points()
    inside_share = (points.abs() <= 1).all(-1).float()
    parts = torch.stack([part.mean(1) for part in torch.split(inside_share, [9, *[6] * 5], 1)], 1)
    masks = (shown & ~covered).view(count, size, size).numpy()
    return Rendered(images, points.numpy(), (visible * parts).numpy(), masks, pose.joints().numpy())


def _lookup(texture: Tensor, place: Tensor) -> Tensor:
    """Texture (B, 1, h, w) at places (B, N, 2)."""
    found = F.grid_sample(texture, place[:, None], mode="bilinear", padding_mode="border", align_corners=True)
    return found[:, 0, 0]


def _share(part: Tensor, free: Tensor) -> Tensor:
    return (part & free).sum(1) / part.sum(1).clamp_min(1)


def _bar(rng: np.random.Generator, count: int, pixels: Tensor, pose: _Pose) -> Tensor:
    """A bar over part of the hand, in half of the pictures."""
    angle, width = _uniform(rng, count, 0, math.pi), _uniform(rng, count, 0.10, 0.28)
    target = pose.to_picture(
        torch.stack([_uniform(rng, count, -0.9, 0.9), _uniform(rng, count, -1.6, 0.8)], 1)[:, None]
    )
    normal = torch.stack([angle.cos(), angle.sin()], 1)
    away = ((pixels - target) * normal[:, None]).sum(-1).abs()
    used = torch.from_numpy(rng.random(count) < 0.5)
    return (away < width[:, None]) & used[:, None]


def _picture(
    rng: np.random.Generator,
    count: int,
    size: int,
    domain: Domain,
    dark: Tensor,
    shade: Tensor,
    shown: Tensor,
    covered: Tensor,
    pixels: Tensor,
) -> Tensor:
    """Skin, light, background and bar, (B, 3, N)."""
    skin = torch.tensor([0.80, 0.60, 0.50] if domain == "a" else [0.52, 0.36, 0.28])
    tone = skin * (1 + torch.from_numpy(rng.uniform(-0.1, 0.1, (count, 3)).astype(np.float32)))
    gradient = torch.from_numpy(rng.normal(0, 0.18, (count, 2)).astype(np.float32))
    if domain == "b":
        gradient = gradient + torch.tensor([0.30, 0.0])
    light = (1 + (pixels * gradient[:, None]).sum(-1)).clamp(0.4, 1.6)
    flesh = tone[:, :, None] * ((1 - CONTRAST * dark) * shade * light)[:, None]
    plain = torch.from_numpy(rng.uniform(0.1, 0.9, (count, 3)).astype(np.float32))
    like_skin = torch.from_numpy(rng.random(count) < 0.3)
    plain = torch.where(like_skin[:, None], tone, plain)
    cells = 12 if domain == "a" else 30
    coarse = torch.from_numpy(
        rng.normal(0, 0.10 if domain == "a" else 0.16, (count, 3, cells, cells)).astype(np.float32)
    )
    background = plain[:, :, None, None] + F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    if domain == "b":
        stripes = (pixels * _normal(rng, 2 * count, 14.0).view(count, 1, 2)).sum(-1).sin() * 0.12
        background = background + stripes.view(count, 1, size, size)
    background = background.flatten(2) * light[:, None].clamp(0.6, 1.4)
    colors = torch.where(shown[:, None], flesh, background)
    bar = torch.from_numpy(rng.uniform(0.05, 0.95, (count, 3)).astype(np.float32))
    return torch.where(covered[:, None], bar[:, :, None] * light[:, None], colors)


def _camera(rng: np.random.Generator, colors: Tensor, domain: Domain, jpeg: bool) -> NDArray[np.uint8]:
    """Blur in half of the pictures, noise, gamma in domain b, JPEG."""
    from PIL import Image

    blurred = F.avg_pool2d(F.pad(colors, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = _uniform(rng, len(colors), 0.3, 0.9) * torch.from_numpy(rng.random(len(colors)) < 0.5)
    if domain == "b":
        share = share.clamp_min(0.35)
        colors, blurred = colors.clamp(0, 1) ** 0.8, blurred.clamp(0, 1) ** 0.8
    colors = colors + share[:, None, None, None] * (blurred - colors)
    noise = rng.standard_normal(colors.shape, np.float32) * (0.025 if domain == "a" else 0.035)
    out = ((colors + torch.from_numpy(noise)).clamp(0, 1) * 255).round().to(torch.uint8)
    if not jpeg:
        return out.numpy()
    quality = rng.integers(60, 96, len(out))
    pictures = []
    for image, q in zip(out.permute(0, 2, 3, 1).numpy(), quality.tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=q)
        pictures.append(np.asarray(Image.open(buffer)))
    return np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2))


class SyntheticHands(Dataset[Any]):
    """Pictures of invented people, rendered when it is made: ``views`` of each.

    Args:
        n_ids: number of people.
        views: pictures of each.
        size: side in pixels; below 160, a finger is too thin to carry anything.
        seed: of everything.
        first: number of the first person, so that sets of one seed can hold different people.
        domain: a or b, see ``render``.
        upright: upright and uncovered hands.
        jpeg: compress as a camera would.

    Attributes:
        rendered: pictures and labels.
        labels: number of the person, (N,).
    """

    def __init__(
        self,
        n_ids: int,
        views: int,
        size: int = 160,
        seed: int = 0,
        first: int = 0,
        domain: Domain = "a",
        *,
        upright: bool = False,
        jpeg: bool = True,
    ) -> None:
        if n_ids < 1 or views < 1 or size < 16:
            raise ValueError(f"expected people, views and 16 pixels or more, got {n_ids}, {views}, {size}")
        self.labels = np.repeat(np.arange(first, first + n_ids), views)
        parts = []
        for person in range(first, first + n_ids):
            palm, fingers = identity_textures(seed, person)
            rng = np.random.default_rng(key(seed, person, 2))
            own = {"width": rng.uniform(0.95, 1.05, 1), "length": rng.uniform(0.95, 1.05, (1, 5))}
            own["half"] = rng.uniform(0.95, 1.05, (1, 5))
            shape = {name: np.repeat(value, views, 0) for name, value in own.items()}
            repeated = (np.repeat(palm[None], views, 0), np.repeat(fingers[None], views, 0))
            number = (seed, person, 3 if domain == "a" else 4)
            parts.append(render(repeated, shape, number, size, domain, upright=upright, jpeg=jpeg))
        fields = [field.name for field in dataclasses.fields(Rendered)]
        self.rendered = Rendered(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The picture (3, S, S) in [0, 1], its label, points, visibility and mask."""
        r = self.rendered
        return {
            "image": torch.from_numpy(r.images[index]).float() / 255,
            "label": int(self.labels[index]),
            "points": torch.from_numpy(r.points[index]),
            "visibility": torch.from_numpy(r.visibility[index]),
            "mask": torch.from_numpy(r.masks[index]),
        }


PART_NAMES = ("palm", *FINGERS)
"""The parts that the renderer labels."""
