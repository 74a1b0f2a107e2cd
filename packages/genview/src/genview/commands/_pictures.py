"""Pictures in a run folder: masks, contact sheets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genview.commands import _files
from genview.data import Pictures, squared
from genview.encoders import Encoder
from genview.foreground import ForegroundModel
from tenfold.figures import image_grid
from tenfold.runs import Run

SHOWN = 96
"""Side of a picture on a sheet."""


def masked(pixels: NDArray[np.uint8], model: ForegroundModel, encoder: Encoder) -> NDArray[np.uint8]:
    """A square picture whose background is pale and gray."""
    seen = encoder(_files.as_tensor(pixels)[None])
    mask = model.mask(seen.tokens.cpu())[0].view(*seen.grid).float()
    side = pixels.shape[0]
    big = torch.nn.functional.interpolate(mask[None, None], (side, side), mode="nearest")[0, 0].numpy() > 0.5
    gray = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.where(big[..., None], pixels, 160 + 0.3 * gray).astype(np.uint8)


def masks(run: Run, pictures: Pictures, model: ForegroundModel, encoder: Encoder, index: Sequence[int]) -> None:
    """Draw pictures above, their foregrounds below."""
    shown: list[list[Any]] = []
    good = []
    for i in index:
        _, readable, _ = _files.prepared(encoder, pictures, [i])
        good += readable
    for start in range(0, len(good), 8):
        row = [squared(pictures.read(i), max(SHOWN, encoder.size)) for i in good[start : start + 8]]
        shown += [row, [masked(pixels, model, encoder) for pixels in row]]
    image_grid(run.figure("masks"), shown, cell=1.1)
