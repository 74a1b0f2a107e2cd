"""The models that a command names, their weights, and teachers that stay as they are."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pckd.zoo import ZOO
from tenfold import UserError, checkpoints, models

METHOD = "pckd.student"
"""What our own files of weights call themselves."""
STUDENT = "student.safetensors"


def build(spec: str, num_classes: int, weights: str | None = None, *, option: str = "--student") -> nn.Module:
    """The model that ``spec`` names, with ``weights`` where given.

    Args:
        spec: cifar:NAME, or a name of ``tenfold.models`` (timm:NAME, tv:NAME, hf:PATH, py:MODULE:FUNCTION, packaged:NAME).
        num_classes: outputs of its classifier.
        weights: a file, the folder of a `pckd train`, or "pretrained".
        option: option that gave the name, for messages; that of the weights is ``{option}_weights``.

    Raises:
        UserError: an unknown name, a library that is not installed, a file that cannot be read or does not fit.
    """
    pretrained = weights == "pretrained"
    model = models.build(spec, num_classes=num_classes, pretrained=pretrained, own={"cifar": ZOO}, option=option)
    if weights is not None and not pretrained:
        path = Path(weights)
        file = path / STUDENT if (path / STUDENT).is_file() else path
        checkpoints.load_foreign_into(model, file, option=f"{option}_weights")
    return model


def read_card(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a trained student: model, classes, size, mean, std.

    Raises:
        UserError: no such file, or not one of a trained student.
    """
    path = Path(folder) / "config.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "classes", "size", "mean", "std"} - set(card)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: expected the folder of a finished `pckd train` ({error})") from error
    if missing:
        raise UserError(f"{path}: no {', '.join(sorted(missing))}; expected the folder of a `pckd train`")
    return dict(card)


def freeze(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A model in evaluation mode for good, without gradients, channels last, batch norms folded where they can be.

    The folded model is taken only where it can be traced and gives the same logits on ``images`` to 1e-4.
    """
    model.eval().requires_grad_(False)
    if images is None:
        return model.to(memory_format=torch.channels_last)
    from torch.fx.experimental.optimization import fuse

    try:
        folded = fuse(model)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        NameError,
    ):  # control flow that cannot be traced
        return model.to(memory_format=torch.channels_last)
    folded.requires_grad_(False)
    with torch.no_grad():
        ours, theirs = folded(images), model(images)
    same = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    return (folded if same else model).eval().to(memory_format=torch.channels_last)
