"""From files to tensors and back: pictures at the model's size, masks with them, results at the photograph's size."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold import UserError
from tenfold.figures import image_grid
from tenfold.runs import Run
from visctrl.config import EditSettings, VisCtrlConfig
from visctrl.data import Pair, color_profile, in_profile, read_mask, read_picture, write_picture
from visctrl.engine import Reference, VisCtrl
from visctrl.masks import (
    Crop,
    Mask,
    Picture,
    blend,
    crop_subject,
    paste_back,
    resized,
    resized_mask,
    to_images,
    to_pictures,
)
from visctrl.outcome import EditOutput
from visctrl.provenance import color_map

PLACES = "colors: places in the reference, red to the right, green downwards"
"""What a picture of provenance says in its metadata."""
KEY = "colors of\nits places"
"""Heading of the picture of all places in a reference, in the colors that stand for them."""


@dataclass(frozen=True)
class Prepared:
    """A photograph as the model takes it.

    Attributes:
        photo: the photograph.
        mask: its subject, or None.
        shown: the photograph, or its subject on a white square, at the model's size.
        shown_mask: the mask in that.
        image: the same as a tensor (1, 3, H, W) with padded edges.
        image_mask: the mask as a tensor (H, W), or None.
        crop: where the square came from, or None.
    """

    photo: Picture
    mask: Mask | None
    shown: Picture
    shown_mask: Mask | None
    image: Tensor
    image_mask: Tensor | None
    crop: Crop | None


def longest_side(engine: VisCtrl, size: int | None) -> int:
    """Longest side that pictures are brought to."""
    multiple = engine.adapter.multiple
    side = engine.adapter.size if size is None else size
    return max(multiple, side // multiple * multiple)


def prepare(
    engine: VisCtrl,
    path: Path,
    mask: str | None,
    size: int | None,
    crop: bool,
    option: str,
    beside: Path | None = None,
) -> Prepared:
    """Read a picture and its mask, and bring them to the model's size.

    Args:
        engine: the engine.
        path: the picture.
        mask: its mask, as the option.
        size: longest side, as the option.
        crop: cut its subject out.
        option: option of the mask, for messages.
        beside: a picture in whose color profile it is to be.

    Raises:
        UserError: see ``read_picture`` and ``read_mask``.
    """
    photo = read_picture(path)
    if beside is not None:
        photo = in_profile(photo, color_profile(path), color_profile(beside))
    found = None if mask is None else read_mask(mask, path, photo, option)
    if not crop:
        return fitted(engine, photo, found, size, f"{option} {mask}")
    if found is None:
        raise UserError(f"--crop cuts subjects out: {path} has no mask")
    cut = crop_subject(photo, found, longest_side(engine, size))
    return _prepared(engine, photo, found, cut.picture, cut.mask, cut)


def fitted(engine: VisCtrl, photo: Picture, mask: Mask | None, size: int | None, name: str) -> Prepared:
    """A photograph and its mask at the model's size.

    Raises:
        UserError: nothing of the mask is left there; the message begins with ``name``.
    """
    scale = min(1.0, longest_side(engine, size) / max(photo.shape[:2]))
    h, w = (max(1, round(scale * x)) for x in photo.shape[:2])
    small = None if mask is None else resized_mask(mask, h, w)
    if small is not None and not (small >= 0.5).any():
        raise UserError(f"{name}: nothing of the subject is left at {w} x {h} pixels: give a larger --size")
    return _prepared(engine, photo, mask, resized(photo, h, w), small, None)


def _prepared(
    engine: VisCtrl, photo: Picture, mask: Mask | None, shown: Picture, small: Mask | None, crop: Crop | None
) -> Prepared:
    image = to_images([shown], engine.adapter.multiple)
    tensor = None
    if small is not None:
        tensor = torch.zeros(image.shape[-2:])
        tensor[: small.shape[0], : small.shape[1]] = torch.from_numpy(np.asarray(small, np.float32))
    return Prepared(photo, mask, shown, small, image, tensor, crop)


def finished_picture(edited: Tensor, target: Prepared, feather: float, locked: bool) -> Picture:
    """An edited image at the size of the photograph, which stays as it was outside of the mask.

    Shapes: ``edited`` (1, 3, H, W) in [-1, 1].
    """
    small = to_pictures(edited, *target.shown.shape[:2])[0]
    if target.crop is not None:
        assert target.mask is not None
        return paste_back(small, target.crop, target.photo, target.mask, feather=feather)
    whole = resized(small, *target.photo.shape[:2])
    return whole if target.mask is None or not locked else blend(target.photo, whole, target.mask, feather=feather)


def reference_of(engine: VisCtrl, prepared: Prepared, prompt: str) -> Reference:
    """The reference of a prepared picture."""
    return engine.reference(prepared.image, prompt, mask=prepared.image_mask)


def write_edit(
    run: Run,
    folder: str,
    pair: Pair,
    target: Prepared,
    shown_reference: Picture,
    out: EditOutput,
    settings: EditSettings,
    config: VisCtrlConfig,
) -> Picture:
    """Write the picture, the rounds, the grid, the provenance, and last what happened; returns the picture."""
    note = f"edited with visctrl from {pair.reference.name if pair.reference else 'a bank of features'}"
    locked = config.lock or settings.crop
    result = finished_picture(out.images, target, settings.feather, locked)
    rounds = [finished_picture(x, target, settings.feather, locked) for x in out.history or []]
    rows: dict[str, Picture] = {"target": target.photo, "reference": shown_reference}
    rows |= {f"round {number + 1}": picture for number, picture in enumerate(rounds)}
    sources: NDArray[np.uint8] | None = out.provenance[0] if out.provenance else None
    if sources is not None:
        rows |= {"came from": enlarged(sources), KEY: color_map((64, 64))}
    for name, picture in {"edited": result, **{f"history/round_{i + 1}": x for i, x in enumerate(rounds)}}.items():
        with run.replacing(f"{folder}{name}.png") as temporary:
            write_picture(temporary, picture, note, color_profile(pair.target))
    if sources is not None:
        with run.replacing(f"{folder}provenance.png") as temporary:
            write_picture(temporary, rows["came from"], PLACES)
    image_grid(run.own(f"{folder}grid.png"), [list(rows.values())], column_titles=list(rows), cell=1.6)
    about: dict[str, Any] = {
        "target": str(pair.target),
        "reference": None if pair.reference is None else str(pair.reference),
        "target_mask": pair.target_mask,
        "reference_mask": pair.reference_mask,
        "size": list(target.shown.shape[:2]),
        "round": (out.rounds or [0])[0],
        "verdict": (out.verdicts or [""])[0],
        "residuals": [None if x[0] != x[0] else x[0] for x in out.residuals or []],
        "rows": out.rows,
        "seconds": round(out.seconds, 3),
        "unsafe": None if out.unsafe is None else out.unsafe[0],
    }
    run.write_json(f"{folder}edit.json", about)
    return result


def enlarged(picture: Picture) -> Picture:
    """A picture of a few tokens with each of them as a square, about 64 pixels high and wide."""
    h, w = (max(1, 64 // side) for side in picture.shape[:2])
    found: Picture = picture.repeat(h, axis=0).repeat(w, axis=1)
    return found


@contextlib.contextmanager
def named(what: str, help_memory: str = "") -> Iterator[None]:
    """Within the block, pictures that cannot be edited and memory that runs out are one line about ``what``.

    Args:
        what: what the line begins with.
        help_memory: further settings that need less memory.

    Raises:
        UserError: in place of a ``ValueError``, or of the error of a full memory.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    except torch.OutOfMemoryError as error:
        more = f"{help_memory}, " if help_memory else ""
        raise UserError(
            f"{what}: out of memory: give a smaller --size, --dtype fp16, --offload true, {more}or --control.bank stream"
        ) from error


def one_round(config: VisCtrlConfig) -> VisCtrlConfig:
    """The settings of the first round, which are all that a bank is made for."""
    return replace(config, later_steps=None, later_start=None, later_guidance=None)
