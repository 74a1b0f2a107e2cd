"""`mamba-fscil extract`: the backbone's maps of all pictures, once."""

import sys
from typing import Any

import numpy as np
import torch

from mamba_fscil.backbones import build_backbone
from mamba_fscil.commands._files import learner_of
from mamba_fscil.config import ExtractSettings
from mamba_fscil.data import Part, load, normalized
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.models import expected_statistics
from tenfold.terminal import track


def run(settings: ExtractSettings, invocation: Invocation) -> None:
    """Write ``maps.npz`` with the base classes' maps, the few-shot ones, and those for testing."""
    device = choose_device(settings.device)
    learner = None if settings.learner is None else learner_of(settings.learner, settings.device)
    data = load(settings.data, settings.protocol, settings.reading, seed=settings.seed)
    if data.size == 0:
        raise UserError(f"--data {settings.data}: these are maps already")
    if learner is not None:
        if learner.backbone is None or learner.size != data.size:
            raise UserError(
                f"--data {settings.data}: images are {data.size} pixels wide, the learner's {learner.size or 'maps'}"
            )
        backbone, statistics = learner.backbone, learner.statistics
    else:
        assert settings.backbone is not None
        backbone = build_backbone(settings.backbone, settings.backbone_weights, data.size).freeze().to(device)
        statistics = expected_statistics(backbone.model) or (data.mean, data.std)
        if settings.backbone_weights is None and settings.backbone.startswith(("timm:", "tv:", "fscil:")):
            raise UserError("--backbone_weights is missing: maps of random weights would tell nothing")
    found: dict[str, list[Any]] = {"train_maps": [], "train_labels": [], "test_maps": [], "test_labels": []}

    def add(part: Part, name: str) -> None:
        assert part.split is not None
        for index in track(torch.split(torch.arange(len(part)), settings.batch_size), name, quiet=invocation.quiet):
            images = normalized(part.split.pixels(index).to(device), *statistics)
            with torch.no_grad():
                found[f"{name}_maps"].append(backbone(images).cpu().numpy())
            found[f"{name}_labels"].append(part.labels[index].numpy())

    for part in (data.base, *data.shots):
        add(part, "train")
    add(data.test, "test")
    arrays: dict[str, Any] = {name: np.concatenate(rows) for name, rows in found.items()}
    arrays["classes"] = np.asarray(data.classes)
    folder = invocation.folder
    with folder.replacing("maps.npz") as path, path.open("wb") as file:
        np.savez(file, **arrays)
    sessions = f" --protocol.base {data.base_classes}" + (
        f" --protocol.way {(len(data.classes) - data.base_classes) // len(data.shots)}" if data.shots else ""
    )
    shape = "x".join(map(str, arrays["train_maps"].shape))
    sys.stdout.write(f"{folder.path / 'maps.npz'}: {shape}; train --data npz:{folder.path / 'maps.npz'}{sessions}\n")
