"""The demonstration with real photographs: blobs cut out of them, as a picture. No ideal is known, and nothing is claimed."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tenfold.errors import needs
from tenfold.figures import image_grid
from tenfold.runs import Run
from tenfold.terminal import track
from visctrl import metrics
from visctrl.blobs import SIZE, Blobs, structures, textured
from visctrl.config import VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.masks import resized, to_pictures
from visctrl.toy import Arch, Training, toy_adapter, train_toy

FROM_SKIMAGE = ("brick", "grass", "gravel", "coffee")
FROM_SKLEARN = ("china", "flower")
SHORT = 64
"""Shorter side that photographs are brought to, so that a picture of 32 pixels shows more than a speck of one."""
SHOWN = 8
STEPS = {"quick": 5, "default": 2500, "full": 2500}


def check() -> None:
    """Make sure that the photographs are there.

    Raises:
        UserError: scikit-image is not; the message names the extra.
    """
    needs("skimage", "photos", "visctrl", why="--materials photos")


def photographs() -> list[NDArray[np.float64]]:
    """The photographs, (h, w, 3) in [-1, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    found = [getattr(data, name)() for name in FROM_SKIMAGE]
    found += [load_sample_image(f"{name}.jpg") for name in FROM_SKLEARN]
    shown = []
    for photo in found:
        color = np.ascontiguousarray(photo if photo.ndim == 3 else np.stack([photo] * 3, axis=-1), np.uint8)
        scale = SHORT / min(color.shape[:2])
        h, w = (max(SIZE, round(scale * side)) for side in color.shape[:2])
        shown.append(resized(color, h, w).astype(np.float64) / 127.5 - 1)
    return shown


def render(number: int, seed: int, photos: list[NDArray[np.float64]]) -> tuple[Blobs, NDArray[np.int64]]:
    """Blobs cut out of photographs, and which photograph each picture is of."""
    rng = np.random.default_rng((seed, 7))
    masks, of = structures(number, rng), rng.integers(len(photos), size=number)
    crops = np.empty((number, SIZE, SIZE, 3))
    for crop, n in zip(crops, of, strict=True):
        y, x = (int(rng.integers(side - SIZE + 1)) for side in photos[n].shape[:2])
        crop[:] = photos[n][y : y + SIZE, x : x + SIZE]
    return textured(masks, crops), of


def draw(folder: Run, level: str, seed: int, config: VisCtrlConfig, arch: Arch, *, quiet: bool) -> dict[str, str]:
    """Train on blobs cut out of photographs, edit some, and draw them; returns the caption by the figure's name."""
    photos = photographs()
    show = partial(track, description="training on photographs", quiet=quiet)
    images = render(4096 if level != "quick" else 64, seed, photos)[0].images
    model, codec = train_toy(images, Training(steps=STEPS[level]), seed, show, arch)
    engine = VisCtrl(toy_adapter(model, codec), config)
    blobs, of = render(8 * SHOWN, seed + 1000, photos)
    targets = list(range(SHOWN))
    references = [next(j for j in range(SHOWN + 4 * i, 8 * SHOWN) if of[j] != of[i]) for i in targets]
    outs = [
        engine.edit(
            blobs.images[i : i + 1], engine.reference(blobs.images[j : j + 1], mask=blobs.masks[j]), history=True
        )
        for i, j in zip(targets, references, strict=True)
    ]
    target, reference = blobs.images[targets], blobs.images[references]
    rows = {"target": target, "reference": reference}
    rows["Reinhard"] = metrics.match_colors(target, reference, blobs.masks[targets], blobs.masks[references])
    rows |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(config.rounds)}
    shown = [to_pictures(x, SIZE, SIZE) for x in rows.values()]
    path: Path = folder.figure("photos")
    image_grid(path, shown, row_titles=list(rows), cell=0.9)
    return {
        "photos": "Blobs cut out of real photographs (scikit-image's brick, grass, gravel and coffee, scikit-learn's china and"
        " flower): targets, references of another photograph, what matching colors makes of them, results after each round."
    }
