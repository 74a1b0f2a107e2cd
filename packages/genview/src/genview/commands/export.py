"""`genview export`: a pretrained backbone under the names that other libraries load."""

import sys

import torch
from safetensors.torch import save_file

from genview.commands import _files
from genview.config import ExportSettings
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.errors import needs


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write the weights and the card."""
    folder = invocation.folder
    backbone, card = _files.backbone_of(_files.finished(settings.run).path)
    weights = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if settings.names == "torchvision":
        weights = as_torchvision(weights, card["backbone"])
    name = "backbone.safetensors" if settings.format == "safetensors" else "backbone.pth"
    with folder.replacing(name) as temporary:
        if settings.format == "safetensors":
            save_file(weights, temporary, metadata={"format": "pt"})
        else:
            torch.save(weights, temporary)
    folder.write_json("config.json", card)
    sys.stdout.write(
        f"{folder.path / name}: {len(weights)} tensors of {card['backbone']} under {settings.names}'s names\n"
    )


def as_torchvision(weights: dict[str, torch.Tensor], spec: str) -> dict[str, torch.Tensor]:
    """A ResNet's weights under torchvision's names, which are timm's own for the plain ResNets.

    Raises:
        UserError: another architecture, or a ResNet of timm that torchvision does not have.
    """
    needs("torchvision", "torchvision", "genview", why="--names torchvision")
    from torchvision import models

    name = spec.partition(":")[2].partition(".")[0]
    if not name.startswith(("resnet", "resnext", "wide_resnet")) or name not in models.list_models(module=models):
        raise UserError(f"--names torchvision: torchvision has no {name}; take timm's names")
    expected = {n: tuple(t.shape) for n, t in models.get_model(name).state_dict().items() if not n.startswith("fc.")}
    found = {n: tuple(t.shape) for n, t in weights.items()}
    if expected != found:
        raise UserError(f"--names torchvision: {spec} is not torchvision's {name} (other layers)")
    return weights
