"""A road world with exact depth and labels: three simulators and one "real" target, rendered by ray casting.

A scene's layout depends on (seed, index) alone, so two domains show the same roads where they share a layout; camera and looks
are drawn per domain. Asphalt and sidewalk swap their colors between the sources and the target, and a curb is 15 cm.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DomainName = Literal["roads-flat", "roads-noisy", "roads-city", "roads-real"]
Color = tuple[float, float, float]
Range = tuple[float, float]
CURB = 0.15
FARTHEST = 90.0
HALF: dict[str, Range] = {"open": (3.0, 4.6), "city": (3.5, 5.0)}
"""Half widths of the road by layout."""
WALK: dict[str, Range] = {"open": (1.5, 4.0), "city": (1.5, 4.0)}
"""Widths of what is paved beside it: sidewalks, forecourts."""
SKY, ROAD, PAINT, SIDEWALK, GRASS, WALL, CAR = range(7)


@dataclasses.dataclass(frozen=True)
class Domain:
    """How a world looks and is looked at; pairs are ranges that are drawn from, lengths are meters.

    Args:
        height: camera above the road.
        focal: focal length over the picture's width.
        horizon: row of the horizon over the picture's height, for a level camera.
        pitch: mean and deviation of the pitch downward in radians.
        asphalt: color, each in [0, 1]; likewise the next four.
        sidewalk: color.
        grass: color.
        wall: color.
        sky: color.
        texture: amplitude of the texture.
        color_noise: deviation of each color from scene to scene.
        image_noise: deviation of each pixel.
        paintless: share of the scenes without lane paint.
        real: whether there are shadows, fog, vignetting, blur, and another white balance and gamma.
        depth_noise: relative deviation of depth, and deviation per squared meter.
        dropout: share of the pixels that lose their depth.
        holes: largest number of rectangular holes.
        reach: distance without depth from there on.
        layout: open (grass, walls with gaps) or city (sidewalks always, near and high walls, more cars).
        flush: share of the sidewalks that lie as low as the road, without a curb: only colors tell them apart.
    """

    height: Range = (1.6, 1.6)
    focal: Range = (0.52, 0.57)
    horizon: float = 0.42
    pitch: tuple[float, float] = (0.0, 0.01)
    asphalt: Color = (0.33, 0.33, 0.35)
    sidewalk: Color = (0.62, 0.60, 0.57)
    grass: Color = (0.25, 0.62, 0.18)
    wall: Color = (0.70, 0.48, 0.38)
    sky: Color = (0.45, 0.65, 0.95)
    texture: Range = (0.03, 0.08)
    color_noise: float = 0.0
    image_noise: float = 0.008
    paintless: float = 0.0
    real: bool = False
    depth_noise: tuple[float, float] = (0.0, 0.0)
    dropout: float = 0.0
    holes: int = 0
    reach: float = FARTHEST
    layout: Literal["open", "city"] = "open"
    flush: float = 0.0


DOMAINS: dict[str, Domain] = {
    "roads-flat": Domain(),
    "roads-noisy": Domain(
        color_noise=0.06, image_noise=0.03, texture=(0.06, 0.14), depth_noise=(0.004, 0.0006), dropout=0.02, holes=3, reach=70.0
    ),
    "roads-city": Domain(
        height=(1.2, 1.3), focal=(0.75, 0.85), horizon=0.5, pitch=(0.02, 0.01), layout="city", wall=(0.55, 0.50, 0.48)
    ),
    "roads-real": Domain(
        height=(1.25, 1.45), focal=(0.635, 0.72), horizon=0.47, pitch=(0.03, 0.015), asphalt=(0.55, 0.52, 0.47),
        sidewalk=(0.42, 0.41, 0.42), grass=(0.43, 0.40, 0.30), wall=(0.50, 0.50, 0.52), sky=(0.90, 0.91, 0.93),
        texture=(0.10, 0.15), color_noise=0.02, image_noise=0.03, paintless=0.4, real=True, depth_noise=(0.02, 0.006),
        dropout=0.15, holes=5, reach=40.0,
    ),
}  # fmt: skip
"""Three sources and the target."""


@dataclasses.dataclass(frozen=True)
class Camera:
    """Intrinsics, height above the road and pitch downward."""

    intrinsics: NDArray[np.float64]
    height: float
    pitch: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A rendered picture with everything that is known of it.

    Attributes:
        rgb: (H, W, 3) uint8.
        depth: as a sensor of this domain gives it, (H, W) float32 in meters along z, 0 where it gives none.
        exact: the same without a fault of the sensor; 0 for the sky and beyond 90 m.
        label: (H, W) uint8, 1 on the drivable road, 255 on road beyond 90 m, else 0.
        camera: the camera.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    exact: NDArray[np.float32]
    label: NDArray[np.uint8]
    camera: Camera


@dataclasses.dataclass(frozen=True)
class _Layout:
    half: float
    offset: float
    bend: float
    walks: tuple[float, float]  # widths on the left and on the right; 0: none
    curbs: tuple[float, float]  # their heights
    walls: tuple[float, float]
    wall_height: tuple[float, float]
    gaps: NDArray[np.bool_]
    cars: NDArray[np.float64]  # x, z, half width, half length, height, and whether in the own lane's way

    def center(self, z: Any) -> Any:
        return self.offset + self.bend * z**2


def _noise(x: NDArray[Any], y: NDArray[Any], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smooth noise of the plane in [-1, 1] from a periodic table of values."""
    i, j = np.floor(x), np.floor(y)
    a, b = x - i, y - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    n = len(table)
    i0, j0 = i.astype(np.int64) % n, j.astype(np.int64) % n
    i1, j1 = (i0 + 1) % n, (j0 + 1) % n
    low = table[i0, j0] * (1 - a) + table[i1, j0] * a
    high = table[i0, j1] * (1 - a) + table[i1, j1] * a
    return low * (1 - b) + high * b


class RoadWorld:
    """Scenes of one domain; ``world[i]`` renders the i-th.

    Args:
        domain: name of a domain, or one of the user's own.
        size: width and height in pixels.
        seed: seed of everything.
        length: number of scenes.

    Raises:
        ValueError: no such domain, or fewer than 8 pixels on a side.
    """

    def __init__(
        self, domain: str | Domain = "roads-flat", size: tuple[int, int] = (160, 64), seed: int = 0, length: int = 100
    ) -> None:
        if isinstance(domain, str) and domain not in DOMAINS:
            raise ValueError(f"domain: expected one of {', '.join(DOMAINS)}, got {domain!r}")
        if min(size) < 8:
            raise ValueError(f"size: expected 8 pixels or more on a side, got {size}")
        self.domain = DOMAINS[domain] if isinstance(domain, str) else domain
        self.number = sorted(DOMAINS).index(domain) if isinstance(domain, str) else 99
        self.size, self.seed, self.length = size, seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.render(index)

    def camera(self, index: int) -> Camera:
        """The camera of a scene."""
        g = np.random.default_rng((self.seed, index, 2, self.number))
        d, (width, height) = self.domain, self.size
        focal = g.uniform(*d.focal) * width
        pitch = g.normal(*d.pitch)
        up = g.uniform(*d.height)
        k = np.array([[focal, 0, (width - 1) / 2], [0, focal, d.horizon * height], [0, 0, 1.0]])
        return Camera(k, float(up), float(pitch))

    def _layout(self, index: int) -> _Layout:
        g = np.random.default_rng((self.seed, index, 1, int(self.domain.layout == "city")))
        city = self.domain.layout == "city"
        half = g.uniform(*HALF[self.domain.layout])
        offset, bend = g.uniform(-1.2, 1.2), g.normal(0, 0.0035)
        walks = tuple(
            float(g.uniform(*WALK[self.domain.layout])) if g.uniform() < (1.0 if city else 0.9) else 0.0
            for _ in range(2)
        )
        curbs = tuple(0.0 if g.uniform() < self.domain.flush else CURB for _ in range(2))
        walls = tuple(float(g.uniform(6.5, 8.5) if city else g.uniform(7.5, 12)) for _ in range(2))
        tall = tuple(float(g.uniform(6, 14) if city else g.uniform(3, 7)) for _ in range(2))
        gaps = g.uniform(size=(2, 16)) < (0.1 if city else 0.3)
        count = int(g.integers(2, 6)) if city else int(g.integers(1, 4))
        z = g.uniform(8, 35, count)
        side = g.choice([-0.6, 0.55, 0.8, -0.85], count)
        x = offset + bend * z**2 + side * half
        cars = np.stack([x, z, np.full(count, 0.9), g.uniform(1.8, 2.3, count), g.uniform(1.4, 1.7, count), side], 1)
        return _Layout(half, offset, bend, walks, curbs, walls, tall, gaps, cars)  # type: ignore[arg-type]

    def render(self, index: int, camera: Camera | None = None) -> Scene:
        """A scene, maybe through another camera."""
        camera = camera or self.camera(index)
        layout = self._layout(index)
        g = np.random.default_rng((self.seed, index, 3, self.number))
        table = np.random.default_rng((self.seed, index, 4)).uniform(-1, 1, (64, 64))
        width, height = self.size
        k = camera.intrinsics
        dx = np.broadcast_to((np.arange(width) - k[0, 2]) / k[0, 0], (height, width))
        v = np.broadcast_to(((np.arange(height) - k[1, 2]) / k[1, 1])[:, None], (height, width))
        c, s = np.cos(camera.pitch), np.sin(camera.pitch)
        dy, dz = c * v + s, -s * v + c  # downward and ahead, per meter of depth
        depth, kind, at, shade = _cast(camera.height, dx, dy, dz, layout, table)
        exact = np.where(np.isfinite(depth) & (depth < FARTHEST), depth, 0.0)
        label = np.isin(kind, (ROAD, PAINT)).astype(np.uint8)
        label[(label == 1) & (exact == 0)] = 255
        rgb = self._paint(g, depth, kind, at, shade, layout, table, v)
        measured = self._measured(g, exact, kind)
        return Scene(rgb, measured.astype(np.float32), exact.astype(np.float32), label, camera)

    def _paint(
        self,
        g: np.random.Generator,
        depth: NDArray[Any],
        kind: NDArray[Any],
        at: tuple[NDArray[Any], NDArray[Any]],
        shade: NDArray[Any],
        layout: _Layout,
        table: NDArray[Any],
        v: NDArray[Any],
    ) -> NDArray[np.uint8]:
        d = self.domain
        x, z = at
        own = {
            SKY: d.sky,
            ROAD: d.asphalt,
            PAINT: (0.93, 0.93, 0.90),
            SIDEWALK: d.sidewalk,
            GRASS: d.grass,
            WALL: d.wall,
        }
        car = g.uniform(0.1, 0.9, 3) if d.real else np.array([0.80, 0.12, 0.12])
        colors = np.stack([*(np.asarray(own[i]) for i in range(6)), car])
        colors = (colors + d.color_noise * g.normal(size=colors.shape)).clip(0.03, 1)
        if g.uniform() < d.paintless:
            colors[PAINT] = colors[ROAD]
        amplitude = g.uniform(*d.texture)
        grain = 0.5 * _noise(x * 1.1, z * 1.1, table) + 0.5 * _noise(x * 4.3 + 7, z * 3.1 + 3, table)
        grain = np.where(kind == SKY, 0.0, grain)
        image = colors[kind] * (1 + 2 * amplitude * grain[..., None]) * shade[..., None]
        if d.real:
            dark = 1 / (
                1 + np.exp(-14 * (_noise(x * 0.13 + g.uniform(0, 60), z * 0.10 + g.uniform(0, 60), table) - 0.25))
            )
            ground = np.isin(kind, (ROAD, PAINT, SIDEWALK, GRASS))
            image = image * np.where(ground, 1 - 0.45 * dark, 1.0)[..., None]
            reach = g.uniform(45, 110)
            clear = np.exp(-np.minimum(np.nan_to_num(depth, posinf=500.0), 500.0) / reach)[..., None]
            image = image * clear + colors[SKY] * (1 - clear)
            image = image * (1 + 0.12 * g.uniform(-1, 1, 3))
            height, width = kind.shape
            radius = ((np.arange(width) / width - 0.5) ** 2)[None] + ((np.arange(height) / height - 0.5) ** 2)[:, None]
            image = image * (1 - 0.45 * 2 * radius)[..., None]
            image = _blurred(image).clip(0, 1) ** g.uniform(0.8, 1.25)
        image = image + d.image_noise * g.normal(size=image.shape)
        return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    def _measured(self, g: np.random.Generator, exact: NDArray[Any], kind: NDArray[Any]) -> NDArray[Any]:
        d = self.domain
        depth = exact * (1 + d.depth_noise[0] * g.normal(size=exact.shape))
        depth = depth + d.depth_noise[1] * exact**2 * g.normal(size=exact.shape)
        lost = g.uniform(size=exact.shape) < d.dropout
        if d.real:
            lost |= (kind == CAR) & (g.uniform(size=exact.shape) < 0.5)
        height, width = exact.shape
        for _ in range(int(g.integers(2, d.holes + 1)) if d.holes else 0):
            rows, columns = max(1, height * 6 // 64), max(1, width * 14 // 208)
            top, left = int(g.integers(height // 3, height - rows)), int(g.integers(0, width - columns))
            lost[top : top + rows, left : left + columns] = True
        return np.where(lost | (exact >= d.reach), 0.0, depth.clip(0))


def _blurred(image: NDArray[Any]) -> NDArray[Any]:
    """A 3 x 3 binomial blur."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    found: NDArray[Any] = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    return found


def _region(x: NDArray[Any], z: NDArray[Any], layout: _Layout) -> NDArray[np.int64]:
    """What the ground is at points of the plane."""
    s = x - layout.center(z)
    kind = np.full(s.shape, GRASS)
    left, right = layout.walks
    kind[(s <= -layout.half) & (s > -layout.half - left)] = SIDEWALK
    kind[(s >= layout.half) & (s < layout.half + right)] = SIDEWALK
    kind[np.abs(s) < layout.half] = ROAD
    return kind


def _grass(x: NDArray[Any], z: NDArray[Any], table: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = 0.05 + 0.05 * _noise(x * 1.3, z * 1.3, table) + 0.02 * _noise(x * 4, z * 4, table)
    return found


def _cast(
    up: float, dx: NDArray[Any], dy: NDArray[Any], dz: NDArray[Any], layout: _Layout, table: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], tuple[NDArray[Any], NDArray[Any]], NDArray[Any]]:
    """Depth (infinite for the sky), kind, texture coordinates and shading of the first surface that each ray meets."""
    down = np.where(dy > 1e-9, dy, np.nan)
    depth = np.full(dx.shape, np.inf)
    kind = np.full(dx.shape, SKY)

    def take(t: NDArray[Any], ok: NDArray[Any], what: Any) -> NDArray[np.bool_]:
        new: NDArray[np.bool_] = ok & (t > 0.1) & (t < depth)
        depth[new] = t[new]
        kind[new] = what[new] if isinstance(what, np.ndarray) else what
        return new

    with np.errstate(invalid="ignore"):
        on_road = up / down
        road = _region(np.nan_to_num(on_road * dx), np.nan_to_num(on_road * dz), layout)
        take(on_road, np.isfinite(on_road) & (road == ROAD), ROAD)
        on_walk = on_road
        for side, curb in enumerate(layout.curbs):
            t = (up - curb) / down
            x, z = np.nan_to_num(t * dx), np.nan_to_num(t * dz)
            here = (x > layout.center(z)) == bool(side)
            take(t, np.isfinite(t) & here & (_region(x, z, layout) == SIDEWALK), SIDEWALK)
            on_walk = np.fmin(on_walk, t)
        on_grass = (up - 0.05) / down
        for _ in range(3):
            high = _grass(np.nan_to_num(on_grass * dx), np.nan_to_num(on_grass * dz), table)
            on_grass = (up - high) / down
        grass = _region(np.nan_to_num(on_grass * dx), np.nan_to_num(on_grass * dz), layout)
        take(on_grass, np.isfinite(on_grass) & (grass == GRASS), GRASS)
        # over the edge of the road, into the face of what is raised beside it
        face = np.isfinite(on_road) & ~np.isfinite(depth)
        low, far = np.where(face, np.minimum(on_walk, on_grass), 0.0), np.where(face, on_road, 0.0)
        start = _region(low * dx, low * dz, layout) == ROAD
        for _ in range(12):
            middle = (low + far) / 2
            same = (_region(middle * dx, middle * dz, layout) == ROAD) == start
            low, far = np.where(same, middle, low), np.where(same, far, middle)
        take(far, face, np.where(_region(far * dx, far * dz, layout) == GRASS, GRASS, SIDEWALK))
        u, w = np.nan_to_num(depth * dx, posinf=0, neginf=0), np.nan_to_num(depth * dz, posinf=0, neginf=0)
        shade = np.ones(dx.shape)
        for side, sign in enumerate((-1, 1)):
            across = np.where(sign * dx > 1e-9, sign * dx, np.nan)
            t = layout.walls[side] / across
            z, high = t * dz, up - t * dy
            gap = layout.gaps[side][np.nan_to_num(z / 12).astype(np.int64) % 16]
            new = take(t, np.isfinite(t) & (high > 0) & (high < layout.wall_height[side]) & (z > 0) & ~gap, WALL)
            u, w, shade = np.where(new, z, u), np.where(new, high, w), np.where(new, 0.82 if sign < 0 else 1.0, shade)
        for x, z0, half, length, tall, _ in layout.cars:
            t, face_of = _box(up, dx, dy, dz, (x - half, 0.0, z0 - length), (x + half, tall, z0 + length))
            new = take(t, np.isfinite(t), CAR)
            u, w = np.where(new, t * dx, u), np.where(new, t * dz, w)
            shade = np.where(new, np.array([0.75, 1.05, 0.9])[face_of], shade)
    s = u - layout.center(w)
    dash = (np.abs(s) < 0.07) & (np.mod(w, 6) < 3)
    edge = np.abs(np.abs(s) - (layout.half - 0.25)) < 0.07
    kind[(kind == ROAD) & (dash | edge)] = PAINT
    return depth, kind, (u, w), shade


def _box(
    up: float, dx: NDArray[Any], dy: NDArray[Any], dz: NDArray[Any], low: tuple[float, ...], high: tuple[float, ...]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Depth at which rays enter an upright box (x, height, z), infinite where they miss it; and by which face."""
    ways = (dx, -dy, dz)
    enter, leave = np.full(dx.shape, -np.inf), np.full(dx.shape, np.inf)
    face = np.zeros(dx.shape, np.int64)
    for axis, way in enumerate(ways):
        start = up if axis == 1 else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (low[axis] - start) / way, (high[axis] - start) / way
        first, last = np.fmin(a, b), np.fmax(a, b)
        face = np.where(first > enter, axis, face)
        enter, leave = np.fmax(enter, first), np.fmin(leave, last)
    return np.where((enter < leave) & (enter > 0), enter, np.inf), face
