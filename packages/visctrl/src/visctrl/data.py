"""What people have on disk: pictures, masks, tables of pairs, and pretrained models. Everything is checked as it is read."""

import csv
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from transformers.utils import logging as transformers_logging

from tenfold import UserError
from tenfold.devices import choose_device
from tenfold.errors import did_you_mean
from tenfold.readers import read_image
from visctrl.config import ModelSettings
from visctrl.masks import Mask, Picture, check_mask
from visctrl.viewset import is_heic

NEARLY_WHITE = 250
COLUMNS = ("target", "reference", "target_mask", "reference_mask", "target_prompt", "reference_prompt")


@dataclass(frozen=True)
class Pair:
    """One row of work.

    Attributes:
        name: name of its results' folder.
        target: the picture to edit.
        reference: the picture whose subject enters; None where a bank stands for it.
        target_mask: as the option.
        reference_mask: as the option.
        target_prompt: what the result shows.
        reference_prompt: what the reference shows.
    """

    name: str
    target: Path
    reference: Path | None
    target_mask: str | None = None
    reference_mask: str | None = None
    target_prompt: str = ""
    reference_prompt: str = ""


def read_picture(path: str | Path) -> Picture:
    """A picture (H, W, 3) uint8, upright by the camera's tag; 16 bits and gray become 8-bit color, transparency white.

    Raises:
        UserError: it cannot be read; the message names it, and HEIC by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if is_heic(path):
        raise UserError(f"{path}: HEIC pictures of phones are not read here: convert it to JPEG or PNG first")
    return read_image(path)


def read_mask_file(path: str | Path, shown: str) -> Mask:
    """A mask of its own file, white on black, (H, W) in [0, 1].

    Args:
        path: the file.
        shown: what messages begin with.

    Raises:
        UserError: it cannot be read, is transparent somewhere, or nearly black where it is not black.
    """
    picture = read_picture(path)
    with Image.open(path) as image:
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise UserError(
                f"{shown}: a mask is white on black, and this file is transparent in places: put it on black"
            )
    found = picture.mean(axis=-1).astype(np.float32) / 255
    if 0 < found.max() < 0.5:
        raise UserError(
            f"{shown}: a mask is white (255) on black, and the largest value of this file is {round(255 * found.max())}"
        )
    return found


def read_mask(spec: str, path: Path, picture: Picture, option: str) -> Mask:
    """The mask that an option names, of the picture's size, in [0, 1].

    Args:
        spec: a file, ``alpha`` or ``white``.
        path: file of the picture.
        picture: the picture.
        option: option, for messages.

    Raises:
        UserError: no such file, another size, an empty mask, or a picture without transparency.
    """
    if spec == "alpha":
        with Image.open(path) as image:
            if not image.has_transparency_data:
                raise UserError(f"{option} alpha: {path} has no transparency (mode {image.mode})")
            upright = ImageOps.exif_transpose(image).convert("RGBA")
            found: Mask = np.asarray(upright.getchannel("A"), np.float32) / 255
    elif spec == "white":
        found = (picture.min(axis=-1) < NEARLY_WHITE).astype(np.float32)
    else:
        found = read_mask_file(spec, f"{option} {spec}")
    try:
        check_mask(found, picture, f"{option} {spec}")
    except ValueError as error:
        raise UserError(str(error)) from error
    return found


def read_pairs(path: str | Path) -> list[Pair]:
    """The rows of a CSV file of pairs.

    Raises:
        UserError: no such file, an unknown column, a missing picture, or no rows; the message names file and line.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [(name or "").strip() for name in reader.fieldnames or []]
            rows = [
                [(value or "").strip() for value in (row.get(f) for f in reader.fieldnames or [])] for row in reader
            ]
    except OSError as error:
        raise UserError(f"--pairs {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"--pairs {path}: not a table of text ({error})") from error
    for name in names:
        if name not in COLUMNS:
            raise UserError(f"--pairs {path}: unknown column '{name}': {did_you_mean(name, COLUMNS)}")
    for name in COLUMNS[:2]:
        if name not in names:
            raise UserError(f"--pairs {path}: no column '{name}'; its columns are {', '.join(names) or 'none'}")
    if not rows:
        raise UserError(f"--pairs {path}: no rows")
    found = []
    for number, values in enumerate(rows):
        row = dict(zip(names, values, strict=True))
        files = {}
        for name in COLUMNS[:4]:
            value = row.get(name, "")
            if name in COLUMNS[:2] or (value and value not in {"alpha", "white"}):
                files[name] = path.parent / value
                if not files[name].is_file():
                    raise UserError(f"--pairs {path}, line {number + 2}: {name} {files[name]}: no such file")
        masks = {n: str(files[n]) if n in files else row.get(n) or None for n in COLUMNS[2:4]}
        found.append(
            Pair(
                f"{number:04}-{files['target'].stem}",
                files["target"],
                files["reference"],
                **masks,
                target_prompt=row.get("target_prompt", ""),
                reference_prompt=row.get("reference_prompt", ""),
            )
        )
    return found


def color_profile(path: str | Path) -> bytes | None:
    """The color profile of a picture that is stored in RGB, such as a phone's Display P3; None where there is none."""
    with Image.open(path) as image:
        profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    except (OSError, TypeError, ImageCms.PyCMSError):
        return None
    return profile if space.strip() == "RGB" else None


def in_profile(picture: Picture, own: bytes | None, wanted: bytes | None) -> Picture:
    """A picture of one color profile in the numbers of another; None is sRGB."""
    if own == wanted:
        return picture
    source, target = (
        ImageCms.createProfile("sRGB") if x is None else ImageCms.ImageCmsProfile(io.BytesIO(x)) for x in (own, wanted)
    )
    found = ImageCms.profileToProfile(Image.fromarray(picture), source, target, outputMode="RGB")
    assert found is not None
    return np.asarray(found)


def write_picture(path: Path, picture: Picture, note: str, profile: bytes | None = None, **more: str) -> None:
    """Write a PNG whose metadata says that it was edited, and how.

    Args:
        path: the file.
        picture: the picture.
        note: how it was edited.
        profile: its color profile.
        more: further entries of its metadata.
    """
    about = PngImagePlugin.PngInfo()
    for name, text in {"Software": "visctrl", "Comment": note, **more}.items():
        about.add_text(name, text)
    Image.fromarray(picture).save(path, format="PNG", pnginfo=about, icc_profile=profile)


def load_model(settings: ModelSettings) -> Any:
    """The pipeline that a command's options name, on its device.

    Raises:
        UserError: no such folder or file, or one that is no pipeline of diffusers.
    """
    device = choose_device(settings.device)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = kind.get(settings.dtype, torch.float16 if device == "cuda" else torch.float32)
    shown, path = f"--model {settings.model}", Path(settings.model)
    if not path.exists() and (settings.model.count("/") != 1 or ":" in settings.model or path.suffix):
        raise UserError(f"{shown}: no such folder or file, and no name on the model hub (OWNER/NAME)")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{shown}: no model_index.json in it: expected the folder of a pipeline of diffusers")
    if settings.model_config is not None and not path.is_file():
        raise UserError(f"--model_config is for a .safetensors file: {shown} has configurations of its own")
    if settings.model_config is not None and not (Path(settings.model_config) / "model_index.json").is_file():
        raise UserError(f"--model_config {settings.model_config}: no model_index.json in it")
    with _quiet():
        try:
            if path.is_file():
                pipe = _from_file(path, dtype, settings.model_config)
            else:
                pipe = DiffusionPipeline.from_pretrained(settings.model, torch_dtype=dtype, variant=settings.variant)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
            raise UserError(f"{shown}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    if settings.offload:
        if device == "cpu":
            raise UserError("--offload moves parts of the model off a GPU: there is none")
        pipe.enable_model_cpu_offload(device=f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device)
    else:
        pipe.to(device)
    return pipe


def _from_file(path: Path, dtype: torch.dtype, config: str | None) -> Any:
    """A pipeline out of one file; XL where its text encoders are two."""
    if path.suffix != ".safetensors":
        raise UserError(f"--model {path}: expected a .safetensors file or a folder (other files would be unpickled)")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        xl = any(name.startswith("conditioner.embedders.1.") for name in file.keys())  # noqa: SIM118
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    return kind.from_single_file(str(path), config=config, torch_dtype=dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress and remarks of the libraries about their own loading away from the user."""
    kinds = (diffusers_logging, transformers_logging)
    before = [x.get_verbosity() for x in kinds]
    for x in kinds:
        x.set_verbosity_error()
        x.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(kinds, before, strict=True):
            x.set_verbosity(level)
            x.enable_progress_bar()
