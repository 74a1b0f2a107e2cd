"""Rendered pictures of two materials: a few large discs in one color, many small squares in another, apart on white.

Here matching mean and deviation of all subject colors is not enough: a method has to know which color belongs to which kind.
What makes a small network use its attention for that was found on seeds 100 and 101: many small blobs per kind, so that a
blob's color is known only through the others of its kind where noise hides it; muted colors, which noise hides before it
hides shapes; kinds that differ in size, so that they are told apart in noise; and training at middling noise.

Shapes: pictures (N, 3, S, S) in [-1, 1], masks (N, 2, S, S) in [0, 1], colors (N, 2, 3) in [-1, 1]; the first kind is discs.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visctrl.blobs import SIZE, WHITE

KINDS = ((3, 3.6, 4.6), (6, 1.8, 2.4))
"""Number, least and largest radius (half a side) of discs and of squares."""
SATURATION, BRIGHTNESS = 0.5, (0.4, 0.8)
TRIES = 30
"""Places that are tried for a blob, which is left out if none of them is free."""


@dataclass(frozen=True)
class Duos:
    """Pictures with what they were made of.

    Attributes:
        images: pictures.
        masks: where the discs are, and where the squares.
        colors: material of the discs and of the squares.
    """

    images: Tensor
    masks: Tensor
    colors: Tensor

    @property
    def subject(self) -> Tensor:
        """Where any blob is. Shapes: -> (N, S, S)."""
        return self.masks.sum(dim=1)


@dataclass(frozen=True)
class DuoPairs:
    """Targets, references, references of other materials, and what the edits should give.

    Attributes:
        target: the targets.
        reference: the references.
        wrong: references of a third pair of materials.
        ideal: the targets' structures in the references' materials, kind by kind.
    """

    target: Duos
    reference: Duos
    wrong: Duos
    ideal: Tensor


def structures(number: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Anti-aliased masks of discs and squares that lie apart, but for a corner at times. Shapes: -> (number, 2, SIZE, SIZE)."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    found = np.zeros((number, 2, SIZE, SIZE))
    for masks in found:
        placed: list[tuple[float, float, float]] = []
        for kind, (count, least, most) in enumerate(KINDS):
            for _ in range(count):
                for _ in range(TRIES):
                    radius = rng.uniform(least, most)
                    cy, cx = rng.uniform(radius, SIZE - radius, 2)
                    if all(np.hypot(cy - a, cx - b) > radius + r + 1 for a, b, r in placed):
                        break
                else:
                    continue
                placed.append((cy, cx, radius if kind == 0 else 1.2 * radius))
                dy, dx = np.abs(y - cy), np.abs(x - cx)
                inside = np.clip(radius - (np.hypot(dy, dx) if kind == 0 else np.maximum(dy, dx)) + 0.5, 0, 1)
                masks[1 - kind] *= 1 - inside
                masks[kind] = np.maximum(masks[kind], inside)
    return found


def material(hue: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A muted color of this hue, in [-1, 1]."""
    return 2 * np.array(colorsys.hsv_to_rgb(hue % 1, SATURATION, rng.uniform(*BRIGHTNESS))) - 1


def paint(masks: NDArray[np.float64], colors: NDArray[np.float64]) -> Duos:
    """Both kinds in their colors, on white."""
    images = np.einsum("nkhw,nkc->nchw", masks, colors) + (1 - masks.sum(axis=1, keepdims=True)) * WHITE
    return Duos(*(torch.from_numpy(x).float() for x in (images, masks, colors)))


def render_duos(number: int, seed: int, paints: int = 4) -> Tensor:
    """``number`` structures, each in ``paints`` pairs of colors, for training. Shapes: -> (number * paints, 3, S, S)."""
    rng = np.random.default_rng((seed, 5))
    masks = structures(number, rng)
    found = []
    for _ in range(paints):
        hues = rng.random(number)
        both = [[material(hue, rng), material(hue + rng.uniform(0.3, 0.7), rng)] for hue in hues]
        found.append(paint(masks, np.asarray(both)).images)
    return torch.cat(found)


def render_duo_pairs(number: int, seed: int) -> DuoPairs:
    """Pairs for testing: a picture's two hues are opposite, and those of the others a quarter of the circle away."""
    rng = np.random.default_rng((seed, 6))
    masks = [structures(number, rng) for _ in range(3)]
    table = []
    for _ in range(number):
        hue = rng.random()
        table.append([[material(hue + shift + half, rng) for half in (0, 0.5)] for shift in (0, 0.25, -0.25)])
    colors = np.asarray(table)
    target, reference, wrong = (paint(masks[i], colors[:, i]) for i in range(3))
    return DuoPairs(target, reference, wrong, paint(masks[0], colors[:, 1]).images)
