"""A small scene of known geometry: colored points on balls, seen by cameras around them, and refit to edited views.

A pixel shows the points that it sees, W c + (1 - W 1) white, with weights W that geometry alone gives. Colors refit to edited
views by least squares explain what all views agree on; what is left over is where they contradict each other. So the residual
of the refit is the inconsistency between views, without a radiance field. Each ball looks like a disc, as in ``blobs``.

Shapes: V views of S x S pictures in [-1, 1], P points.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visctrl.blobs import SIZE, WHITE

Floats = NDArray[np.float64]
FINE = 3
"""Rays per side of a pixel."""
DISTANCE, FOCAL = 6.0, 1.9
"""From the cameras to the middle of the scene, and their focal length in picture widths."""


@dataclass(frozen=True)
class PointScene:
    """Points and the weights with which cameras see them.

    Attributes:
        points: places (P, 3).
        balls: which ball each lies on (P,).
        weights: (V, S, S, P), each pixel's sum its share of the scene.
        eyes: places of the cameras (V, 3).
    """

    points: Floats
    balls: NDArray[np.int64]
    weights: Tensor
    eyes: Floats

    @property
    def masks(self) -> Tensor:
        """Where the scene is in each view. Shapes: -> (V, S, S)."""
        return self.weights.sum(dim=-1)

    def render(self, colors: Tensor) -> Tensor:
        """The views of points of these colors. Shapes: (P, 3) -> (V, 3, S, S)."""
        seen = torch.einsum("vhwp,pc->vchw", self.weights, colors.to(self.weights))
        return seen + (1 - self.masks[:, None]) * WHITE

    def view(self, colors: Tensor, number: int) -> Tensor:
        """One view. Shapes: (P, 3) -> (1, 3, S, S)."""
        return self.render(colors)[number : number + 1]

    def refit(self, images: Tensor) -> tuple[Tensor, float]:
        """Colors that explain views best, and the root mean square of what they leave over.

            min_c  sum over pixels that show the scene |W c + (1 - W 1) white - y|^2

        A pixel shows the scene where half of it or more is covered. Points that no view sees have no color of their own: 0.

        Shapes: (V, 3, S, S) -> (P, 3).
        """
        covered = self.masks.double()
        shown = covered >= 0.5
        w = self.weights.double()[shown]
        y = images.double().permute(0, 2, 3, 1)[shown] - (1 - covered[shown])[:, None] * WHITE
        colors = torch.linalg.lstsq(w, y, driver="gelsd").solution
        return colors.float(), float((w @ colors - y).square().mean().sqrt())


def make_scene(seed: int, views: int = 6, *, balls: int = 3, points: int = 40) -> PointScene:
    """Balls of different sizes around a middle, seen from all sides.

    Args:
        seed: seed of places and sizes.
        views: number of cameras.
        balls: number of balls.
        points: points on each.
    """
    rng = np.random.default_rng((seed, 3))
    middles = np.stack(
        [[0.95 * np.cos(a), 0.95 * np.sin(a), rng.uniform(-0.7, 0.7)] for a in rng.uniform(0, 0.6) + turns(balls)]
    )
    radii = rng.uniform(0.55, 0.75, balls)
    sphere = _fibonacci(points)
    places = (middles[:, None] + radii[:, None, None] * sphere).reshape(-1, 3)
    heights = rng.uniform(-0.35, 0.35, views)
    eyes = DISTANCE * np.stack(
        [
            [np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)]
            for a, e in zip(rng.uniform(0, 2 * np.pi) + turns(views), heights, strict=True)
        ]
    )
    weights = np.stack([_seen(eye, middles, radii, sphere) for eye in eyes])
    return PointScene(places, np.repeat(np.arange(balls), points), torch.from_numpy(weights).float(), eyes)


def turns(number: int) -> Floats:
    """Angles of equal distance around a circle."""
    return 2 * np.pi * np.arange(number) / number


def _fibonacci(number: int) -> Floats:
    """Evenly spread directions."""
    z = 1 - (2 * np.arange(number) + 1) / number
    angle = np.pi * (3 - np.sqrt(5)) * np.arange(number)
    ring = np.sqrt(1 - z**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), z], axis=1)


def _seen(eye: Floats, middles: Floats, radii: Floats, sphere: Floats) -> Floats:
    """Weights of all points in the pixels of a camera that looks at the middle. Shapes: -> (S, S, P)."""
    ahead = -eye / np.linalg.norm(eye)
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(ahead, right)
    steps = (np.arange(SIZE * FINE) + 0.5) / (SIZE * FINE) - 0.5
    rays = FOCAL * ahead + steps[None, :, None] * right + steps[:, None, None] * down
    rays = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
    near, hit = np.full(len(rays), np.inf), np.full(len(rays), -1)
    for ball, (middle, radius) in enumerate(zip(middles, radii, strict=True)):
        along = rays @ (middle - eye)
        off = ((middle - eye) ** 2).sum() - along**2
        distance = along - np.sqrt(np.maximum(radius**2 - off, 0))
        nearer = (off < radius**2) & (distance < near)
        near, hit = np.where(nearer, distance, near), np.where(nearer, ball, hit)
    weights = np.zeros((len(rays), len(middles) * len(sphere)))
    for ball, (middle, radius) in enumerate(zip(middles, radii, strict=True)):
        there = np.nonzero(hit == ball)[0]
        normals = (eye + near[there, None] * rays[there] - middle) / radius
        weights[there, ball * len(sphere) + (normals @ sphere.T).argmax(axis=1)] = 1
    fine = weights.reshape(SIZE, FINE, SIZE, FINE, -1)
    found: Floats = fine.mean(axis=(1, 3))
    return found


def trainer(scene: PointScene, colors: Tensor) -> tuple[Callable[[int], Tensor], Callable[[int, Tensor], None]]:
    """``render_fn`` and ``update_fn`` for ``visctrl.update_dataset``: the scene's views, refit after every edited one."""
    images = scene.render(colors)
    state = {"colors": colors}

    def render(view: int) -> Tensor:
        return scene.view(state["colors"], view)

    def update(view: int, image: Tensor) -> None:
        images[view] = image[0].to(images)
        state["colors"], _ = scene.refit(images)

    return render, update
