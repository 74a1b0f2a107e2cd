"""What several commands read and write: encoders, foreground models, pictures as tensors, a trained backbone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genview.config import TrainSettings
from genview.data import Pictures
from genview.encoders import Encoder, build_encoder
from genview.foreground import ForegroundModel
from genview.networks import build_backbone
from genview.training import foreground_file
from tenfold import UserError, checkpoints, runs
from tenfold.models import IMAGENET
from tenfold.runs import Run

BACKBONE, METHOD = "backbone.safetensors", "genview.backbone"
SUMMARY = "foreground.json"


def as_tensor(pixels: Any) -> Tensor:
    """A picture (H, W, 3) uint8 as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def prepared(encoder: Encoder, pictures: Pictures, index: Sequence[int]) -> tuple[Tensor, list[int], dict[int, str]]:
    """Pictures as the encoder's squares, those that could be read, and why the others could not."""
    found, good, faults = [], [], {}
    for i in index:
        try:
            x = as_tensor(pictures.read(i))[None]
        except UserError as error:
            faults[i] = str(error)
            continue
        good.append(i)
        found.append(square_of(x, encoder.size))
    return (torch.cat(found) if found else torch.empty(0, 3, encoder.size, encoder.size)), good, faults


def square_of(image: Tensor, size: int) -> Tensor:
    """The middle square of an image in [0, 1]. Shapes: (1, 3, H, W) -> (1, 3, size, size)."""
    short = min(image.shape[-2:])
    if short != size:
        sides = [max(size, round(side * size / short)) for side in image.shape[-2:]]
        image = torch.nn.functional.interpolate(image, sides, mode="bicubic", align_corners=False, antialias=True)
        image = image.clamp(0, 1)
    top, left = ((side - size) // 2 for side in image.shape[-2:])
    return image[..., top : top + size, left : left + size]


def in_batches(number: int, size: int) -> Iterator[list[int]]:
    """Numbers 0 to ``number`` - 1 in batches."""
    for start in range(0, number, size):
        yield list(range(start, min(start + size, number)))


def foreground_of(
    path: str, encoder: str | None, weights: str | None, device: str, *, option: str = "--encoder"
) -> tuple[ForegroundModel, Encoder]:
    """A foreground model and its encoder, built from the name that is given or that its command noted.

    Raises:
        UserError: no such model, or an encoder that is not its own.
    """
    model = ForegroundModel.load(foreground_file(path))
    folder = foreground_file(path).parent
    spec = encoder
    if spec is None:
        spec = model.encoder
        if (folder / SUMMARY).is_file():
            import json

            about = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            spec, weights = str(about["spec"]), weights or about["weights"]
    built = build_encoder(spec, weights=weights, device=device, option=option)
    if built.name != model.encoder:
        raise UserError(f"{foreground_file(path)}: a foreground model of {model.encoder}, not of {built.name}")
    return model, built


def save_backbone(
    run: Run, backbone: nn.Module, settings: TrainSettings, classes: Sequence[str], folder: str = ""
) -> None:
    """Write a backbone and the card that says how to use it."""
    card = {
        "backbone": settings.backbone,
        "method": settings.method,
        "size": settings.size,
        "mean": list(IMAGENET[0]),
        "std": list(IMAGENET[1]),
        "data": settings.data,
        "classes": list(classes),
    }
    checkpoints.save(run.own(f"{folder}{BACKBONE}"), backbone.state_dict(), method=METHOD, config=card)
    run.write_json(f"{folder}config.json", card)


def finished(run: str) -> runs.Finished[TrainSettings]:
    """The finished `genview train` that ``--run`` names."""
    return runs.read(run, TrainSettings, package="genview", verb="train")


def backbone_of(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone of a finished pretraining, with its card."""
    saved = checkpoints.load(folder / BACKBONE, method=METHOD)
    backbone = build_backbone(str(saved.config["backbone"]), option="--run")
    checkpoints.load_into(backbone, folder / BACKBONE, method=METHOD)
    return backbone.eval(), saved.config
