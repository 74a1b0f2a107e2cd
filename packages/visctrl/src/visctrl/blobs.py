"""Rendered pictures in which self-attention has work to do: several blobs of one material on white.

A network that denoises them has to pool the color over blobs that lie apart, which is what attention is for; one flat shape
on gray is solved by convolutions, and injection then changes nothing. Since structure and material are drawn apart, the ideal
result of an edit, the target's structure in the reference's material, is known.

Shapes: pictures (N, 3, S, S) in [-1, 1], masks (N, S, S) in [0, 1].
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 32
WHITE = 0.97
JITTER = 0.05
"""Largest difference of the hues of a film's references from their middle."""
BLOBS = 3
APART = 0.3
"""Least distance of the hues of a target and its reference, on a circle of length 1."""


@dataclass(frozen=True)
class Blobs:
    """Pictures with what they were made of.

    Attributes:
        images: pictures.
        masks: where the blobs are.
        colors: material of each picture (N, 3) in [-1, 1].
    """

    images: Tensor
    masks: Tensor
    colors: Tensor


@dataclass(frozen=True)
class Film:
    """A video of blobs that move, references that differ a little, and what the edit should give.

    Attributes:
        frames: the frames.
        references: pictures of one object, whose hues differ as lighting makes them.
        ideal: the frames' structures in the mean of the references' materials.
    """

    frames: Blobs
    references: Blobs
    ideal: Tensor


@dataclass(frozen=True)
class Pairs:
    """Targets, references, references of another material, and what the edits should give.

    Attributes:
        target: the targets.
        reference: the references.
        wrong: references of a third material.
        ideal: the targets' structures in the references' materials.
    """

    target: Blobs
    reference: Blobs
    wrong: Blobs
    ideal: Tensor


def structures(number: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Masks of discs and squares, anti-aliased. Shapes: -> (number, SIZE, SIZE)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    found = np.zeros((number, SIZE, SIZE))
    for mask in found:
        for _ in range(BLOBS):
            cy, cx = rng.uniform(5, SIZE - 5, 2)
            radius = rng.uniform(4, 8)
            dy, dx = np.abs(y - cy), np.abs(x - cx)
            distance = np.hypot(dy, dx) if rng.random() < 0.5 else np.maximum(dy, dx)
            np.maximum(mask, np.clip(radius - distance + 0.5, 0, 1), out=mask)
    return found


def moving_structures(number: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Masks of discs and squares that move on straight lines, anti-aliased. Shapes: -> (number, SIZE, SIZE)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    found = np.zeros((number, SIZE, SIZE))
    for _ in range(BLOBS):
        (y0, x0), (y1, x1) = rng.uniform(8, SIZE - 8, (2, 2))
        radius, round_ = rng.uniform(4, 7), rng.random() < 0.5
        for n, share in enumerate(np.linspace(0, 0.5, number)):
            dy, dx = np.abs(y - y0 - share * (y1 - y0)), np.abs(x - x0 - share * (x1 - x0))
            distance = np.hypot(dy, dx) if round_ else np.maximum(dy, dx)
            np.maximum(found[n], np.clip(radius - distance + 0.5, 0, 1), out=found[n])
    return found


def render_film(number: int, references: int, seed: int) -> Film:
    """A video of ``number`` frames, and references whose hues differ by up to ``JITTER``."""
    rng = np.random.default_rng((seed, 3))
    masks = moving_structures(number, rng)
    hue = rng.random()
    own = material(hue + APART + rng.uniform(0, 0.4 - 2 * JITTER), rng)
    bright = rng.uniform(0.35, 0.95)
    shades = [
        2 * np.array(colorsys.hsv_to_rgb((hue + d) % 1, 0.85, bright)) - 1
        for d in rng.uniform(-JITTER, JITTER, references)
    ]
    frames = paint(masks, np.stack([own] * number))
    others = paint(structures(references, rng), np.stack(shades))
    return Film(frames, others, paint(masks, np.stack([np.mean(shades, axis=0)] * number)).images)


def material(hue: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A color of this hue, of strong saturation and any brightness, in [-1, 1]."""
    return 2 * np.array(colorsys.hsv_to_rgb(hue % 1, 0.85, rng.uniform(0.35, 0.95))) - 1


def paint(masks: NDArray[np.float64], colors: NDArray[np.float64]) -> Blobs:
    """Blobs of these colors on white."""
    m = masks[:, None]
    images = m * colors[:, :, None, None] + (1 - m) * WHITE
    return Blobs(*(torch.from_numpy(x).float() for x in (images, masks, colors)))


def textured(masks: NDArray[np.float64], crops: NDArray[np.float64]) -> Blobs:
    """Blobs cut out of pictures (N, SIZE, SIZE, 3) in [-1, 1], on white; their colors are means over the blobs."""
    m = masks[:, None]
    images = m * crops.transpose(0, 3, 1, 2) + (1 - m) * WHITE
    colors = (m * images).sum(axis=(2, 3)) / np.maximum(m.sum(axis=(2, 3)), 1e-9)
    return Blobs(*(torch.from_numpy(x).float() for x in (images, masks, colors)))


def render(number: int, seed: int) -> Blobs:
    """Pictures for training."""
    rng = np.random.default_rng((seed, 1))
    masks = structures(number, rng)
    return paint(masks, np.stack([material(rng.random(), rng) for _ in range(number)]))


def render_pairs(number: int, seed: int) -> Pairs:
    """Pairs for testing, with hues at least ``APART`` apart among target, reference and wrong reference."""
    rng = np.random.default_rng((seed, 2))
    masks = [structures(number, rng) for _ in range(3)]
    colors = []
    for _ in range(number):
        first = rng.random()
        colors.append([material(first + shift, rng) for shift in (0, APART + rng.uniform(0, 0.03), -APART)])
    table = np.asarray(colors)
    target, reference, wrong = (paint(masks[i], table[:, i]) for i in range(3))
    return Pairs(target, reference, wrong, paint(masks[0], table[:, 1]).images)
