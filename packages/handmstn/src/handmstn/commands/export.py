"""`handmstn export`: pictures -> crops, embedding and visibility, as a file for elsewhere."""

import sys

import torch
from torch import Tensor, nn

from handmstn.commands._files import trained
from handmstn.config import ExportSettings
from handmstn.recognizer import HandMSTN
from handmstn.rendering import SyntheticHands
from tenfold import UserError, export
from tenfold.cli import Invocation


class _Exported(nn.Module):
    """Pictures -> the crops of all parts, the fused embedding, the visibility, the descriptors."""

    def __init__(self, model: HandMSTN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Crops of each part, then fused, visibility, parts, and how unlike the training's pictures it is (1: the bound)."""
        found = self.model(images)
        crops = self.model.grid.crops(images, self.model.grid(found.points))
        unlike = () if self.model.familiar is None else (self.model.unlike(found),)
        return (*crops, found.fused, found.visibility, found.parts, *unlike)


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write ``model.*`` and the card, ``config.json``."""
    model, card, _ = trained(settings.run)
    if model.aligner is None and settings.format != "safetensors" and card["settings"]["given_points"]:
        raise UserError(f"--run {settings.run}: this model takes given points; --format safetensors has its weights")
    size = card["size"]
    # hands, not noise: in white noise a trained aligner finds other points after the last bit of a pixel changed
    example = torch.from_numpy(SyntheticHands(2, 1, size).rendered.images).float() / 255
    names = [f"crop_{part.name}" for part in model.parts]
    outputs = (*names, "embedding", "visibility", "parts")
    if model.familiar is not None:
        outputs = (*outputs, "unlike")
    module: nn.Module = _Whole(model) if model.aligner is None else _Exported(model)
    if settings.format == "safetensors":
        module = model
    done = export.save(module, example, invocation.folder, "model", settings.format, outputs=outputs)
    invocation.folder.write_json("config.json", card)
    sys.stdout.write(
        f"{done.path}: images (N, 3, {size}, {size}) in [0, 1], left hands mirrored -> {', '.join(outputs)}; largest difference"
        f" {done.difference:.1e}\n"
    )


class _Whole(nn.Module):
    """A model that reads the whole picture; else as ``_Exported``."""

    points: Tensor

    def __init__(self, model: HandMSTN) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("points", torch.tensor(model.parts[0].points)[None])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The crop, then fused, visibility and parts."""
        found = self.model(images, self.points.expand(images.shape[0], -1, -1))
        crops = self.model.grid.crops(images, self.model.grid(found.points))
        return (*crops, found.fused, found.visibility, found.parts)
