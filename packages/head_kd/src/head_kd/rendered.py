"""Small detection images that are drawn, not downloaded: six shapes on textured, cluttered images of 128 pixels."""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASSES = ("disc", "square", "triangle", "star", "cross", "heart")
_GLYPHS = dict(zip(CLASSES, "\u25cf\u25a0\u25b2\u2605\u271a\u2665", strict=True))
SIZE = 128
SOURCE = "rendered: six shapes of matplotlib's DejaVu font on colored noise with lines and letters"


@functools.cache
def font(points: int) -> Any:
    """DejaVu Sans, which matplotlib ships."""
    from importlib import resources

    from PIL import ImageFont

    face = resources.files("matplotlib").joinpath("mpl-data/fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(face), points)


def _texture(rng: np.random.Generator, strength: float) -> NDArray[np.float32]:
    """Colored noise of several octaves, (SIZE, SIZE, 3) around a random color."""
    from PIL import Image

    image = np.zeros((SIZE, SIZE, 3), dtype=np.float32) + rng.uniform(60, 195, 3)
    for cells, deviation in ((2, 40.0), (5, 28.0), (12, 18.0), (32, 10.0)):
        coarse = rng.normal(0, strength * deviation, (cells, cells, 3)).astype(np.float32)
        octave = np.stack(
            [
                np.asarray(Image.fromarray(coarse[..., c]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
                for c in range(3)
            ],
            axis=-1,
        )
        image += octave
    return image.astype(np.float32)


def _mask(character: str, size: float, angle: float) -> NDArray[np.float32]:
    """Coverage of a glyph whose box has sides of geometric mean ``size``, turned, cropped to what is covered."""
    from PIL import Image, ImageDraw

    face = font(64)
    left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), character, fill=255, font=face)
    turned = canvas.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = turned.point(lambda v: 255 * (v > 64)).getbbox()
    assert box is not None
    glyph = turned.crop(box)
    scale = size / math.sqrt(glyph.width * glyph.height)
    target = (max(3, round(glyph.width * scale)), max(3, round(glyph.height * scale)))
    return np.asarray(glyph.resize(target, Image.Resampling.BILINEAR)).astype(np.float32) / np.float32(255)


def _color_far_from(base: NDArray[np.floating[Any]], rng: np.random.Generator) -> NDArray[np.float64]:
    """A color at least 150 (sum of absolute differences) from ``base``."""
    while True:
        color = rng.uniform(0, 255, 3)
        if np.abs(color - base).sum() >= 150:
            return color


def draw(index: int, *, clutter: bool = True) -> tuple[NDArray[np.uint8], list[tuple[int, list[float]]]]:
    """Draw image number ``index``: (128, 128, 3) uint8, and its objects as (class, [x, y, width, height]).

    Args:
        index: number of the image, and the seed of all that is drawn.
        clutter: whether to draw strong texture, lines and letters; without them, shapes on a weak texture are learned in fewer
            steps.
    """
    from PIL import Image, ImageDraw

    rng = np.random.default_rng([7, index])
    image = _texture(rng, 1.0 if clutter else 0.3)
    lines = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(lines)
    for _ in range(int(rng.integers(3, 8)) if clutter else 0):
        ends = tuple(rng.uniform(0, SIZE, 4).tolist())
        pen.line(ends, fill=tuple(int(v) for v in rng.integers(0, 256, 3)), width=int(rng.integers(1, 3)))
    image = np.asarray(lines, dtype=np.float32).copy()
    boxes: list[list[float]] = []
    objects = []
    things = ["letter"] * (int(rng.integers(1, 4)) if clutter else 0) + ["object"] * int(rng.integers(1, 6))
    for kind in things:
        label = int(rng.integers(len(CLASSES)))
        character = _GLYPHS[CLASSES[label]] if kind == "object" else chr(int(rng.integers(65, 91)))
        size = math.exp(rng.uniform(math.log(18), math.log(59))) if kind == "object" else rng.uniform(14, 34)
        mask = _mask(character, size, rng.uniform(-25, 25))
        h, w = mask.shape
        if h >= SIZE or w >= SIZE:
            continue
        x, y = int(rng.integers(0, SIZE - w + 1)), int(rng.integers(0, SIZE - h + 1))
        crowded = any(
            min(x + w, bx + bw) - max(x, bx) > 0.3 * min(w, bw) and min(y + h, by + bh) - max(y, by) > 0.3 * min(h, bh)
            for bx, by, bw, bh in boxes
        )
        if crowded:
            continue
        patch = image[y : y + h, x : x + w]
        color = _color_far_from(patch.mean(axis=(0, 1)), rng)
        cover = (mask * rng.uniform(0.65, 1.0))[..., None]
        image[y : y + h, x : x + w] = patch * (1 - cover) + color * cover
        boxes.append([x, y, w, h])
        if kind == "object":
            objects.append((label, [float(x), float(y), float(w), float(h)]))
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), objects
