"""Rendered scenes for the demonstration: real digits of scikit-learn on rendered backgrounds, 16 x 16 pixels in color.

Glyphs are split once: those of the external world (which encoder and generator learn from, with captions) and those of the
target world (which has no captions, and labels only for evaluation) are different handwriting.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 16
EXTERNAL, TARGET_TRAIN = 898, 449
"""Glyphs of each part; the rest, 450, are for testing."""
PALETTE = np.asarray(
    [[220, 60, 50], [60, 170, 75], [60, 95, 220], [230, 200, 60], [160, 70, 190], [60, 190, 200]], np.float64
)
"""Colors of glyphs and backgrounds, numbered."""
ATTRIBUTES = (10, 3, 3, 6, 4, 6, 5, 5)
"""Number of values of each attribute: digit, slant, stroke, color of the glyph, size, color of the background, row, column."""
FRONT, GROUND = 3, 5
"""Columns of the colors."""
SMALLEST = 11
"""Side of the smallest glyph in pixels."""


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes.

    Attributes:
        images: (N, 16, 16, 3) uint8.
        labels: digit of each (N,).
        ratio: share of the picture that the glyph covers (N,).
        attributes: numbers of each scene's attributes (N, 8), see ``ATTRIBUTES``.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ratio: NDArray[np.float64]
    attributes: NDArray[np.int64]


def glyphs() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """scikit-learn's 1,797 digits of 8 x 8 pixels in [0, 1], in an order of ours, with their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.images[order] / 16.0, found.target[order].astype(np.int64)


def part(name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Glyphs of ``external``, ``train`` or ``test``."""
    images, labels = glyphs()
    first, second = EXTERNAL, EXTERNAL + TARGET_TRAIN
    chosen = {"external": slice(0, first), "train": slice(first, second), "test": slice(second, None)}[name]
    return images[chosen], labels[chosen]


def _bilinear(small: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Pictures (N, h, w) drawn at (N, size, size), linear in between, clamped at the border."""
    for axis in (1, 2):
        n = small.shape[axis]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), n - 2)
        shape = [1, 1, 1]
        shape[axis] = size
        share = (at - low).reshape(shape)
        small = np.take(small, low, axis) * (1 - share) + np.take(small, low + 1, axis) * share
    return small


def _slants(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each glyph leans: the slope of x over y, by its ink."""
    y, x = np.mgrid[0:8, 0:8].astype(np.float64)
    total = images.sum(axis=(1, 2))
    dx = x - ((images * x).sum(axis=(1, 2)) / total)[:, None, None]
    dy = y - ((images * y).sum(axis=(1, 2)) / total)[:, None, None]
    slopes: NDArray[np.float64] = (images * dx * dy).sum(axis=(1, 2)) / (images * dy**2).sum(axis=(1, 2))
    return slopes


def render(name: str, each: int, seed: int) -> Scenes:
    """``each`` scenes per glyph of a part; equal arguments, equal pictures.

    A glyph of 11 to 16 pixels stands at a random place, in a color that differs from its background's; the background is a
    color with slow changes of brightness and a wave.
    """
    images, labels = part(name)
    rng = np.random.default_rng((("external", "train", "test").index(name), seed))
    glyph = np.arange(len(images)).repeat(each)
    n = len(glyph)
    ground = rng.integers(len(PALETTE), size=n)
    front = (ground + 1 + rng.integers(len(PALETTE) - 1, size=n)) % len(PALETTE)
    base = PALETTE[ground] * rng.uniform(0.45, 0.75, (n, 1)) + rng.normal(0, 8, (n, 3))
    low = _bilinear(rng.uniform(-127, 128, (n, 3, 3)), SIZE) * 0.35
    grid = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    wave = 22 * np.sin(np.tensordot(rng.normal(0, 0.6, (n, 2)), grid, axes=1) + rng.uniform(0, 6.28, (n, 1, 1)))
    side = rng.integers(SMALLEST, SIZE + 1, size=n)
    corner = (rng.random((n, 2)) * (SIZE - side + 1)[:, None]).astype(int)
    mask = np.zeros((n, SIZE, SIZE))
    for s in range(SMALLEST, SIZE + 1):
        chosen = np.flatnonzero(side == s)
        drawn = _bilinear(images[glyph[chosen]], s)
        for i, ink in zip(chosen, drawn, strict=True):
            top, left = corner[i]
            mask[i, top : top + s, left : left + s] = ink
    color = np.clip(PALETTE[front] * rng.uniform(1.0, 1.2, (n, 1)) + rng.normal(0, 10, (n, 3)), 0, 255)
    canvas = base[:, None, None] + (low + wave)[..., None]
    canvas = canvas * (1 - mask[..., None]) + color[:, None, None] * mask[..., None]
    slant = np.digitize(_slants(images), (-0.01, 0.09))[glyph]
    stroke = np.digitize(images.mean(axis=(1, 2)), (0.28, 0.34))[glyph]
    place = np.digitize(corner.T + side / 2, (6.6, 7.6, 8.6, 9.6))
    size = np.digitize(side, (12, 14, 15))
    attributes = np.stack([labels[glyph], slant, stroke, front, size, ground, *place], axis=1)
    pictures = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return Scenes(pictures, labels[glyph], (mask > 0.5).mean(axis=(1, 2)), attributes.astype(np.int64))
