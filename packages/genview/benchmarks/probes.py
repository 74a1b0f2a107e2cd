"""Passes of a backbone: 20 learning rates on features computed once, against one probe of 90 epochs of the same head.

The probe gets what the sweep found: its rate, its standardized features, and the same pictures without crops and mirrors, which
digits do not bear. What is left between the two is what keeping the features could do to the accuracy.
"""

import math
import sys

import numpy as np
import timm
import torch
from genview import scenes
from genview.config import Heads, Optimizer, ProbeSettings, TrainSettings, ViewSettings
from genview.data import PictureData, Pictures
from genview.probes import linear_sweep
from genview.training import extract, prepare, pretrain, top1, train_classifier

from tenfold.bench import Comparison, counted, main
from tenfold.models import IMAGENET

STEPS, EPOCHS, RATES = 150, 90, 20


class Counted(torch.nn.Module):
    """A backbone that counts the pictures it is given."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body, self.pictures = body, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the body gives."""
        self.pictures += len(x)
        return self.body(x)


class Standardized(torch.nn.Module):
    """A backbone whose features lose the mean and deviation of the training features, as the sweep's do."""

    def __init__(self, body: torch.nn.Module, features: torch.Tensor) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", features.mean(dim=0))
        self.register_buffer("spread", features.std(dim=0).clamp_min(1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: (N, 3, S, S) -> (N, D)."""
        return (self.body(x) - self.mean) / self.spread


def part(name: str, each: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of the demonstration's scenes."""
    found = scenes.render(name, each, 100)
    return torch.from_numpy(found.images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(found.labels)


def measure() -> list[Comparison]:
    """Pretrain once, probe twice."""
    train, test = part("train", 2), part("test", 4)
    pixels = train[0].permute(0, 2, 3, 1).numpy()
    pictures = Pictures(tuple(map(str, range(len(pixels)))), train[1], lambda i: np.asarray(pixels[i]), side=16)
    settings = TrainSettings(
        data="the demonstration's scenes",
        backbone="conv:32",
        method="simclr",
        size=16,
        batch_size=128,
        epochs=1000,
        steps=STEPS,
        view=ViewSettings(least_area=0.3, flip=0.0, blur=0.0),
        heads=Heads(hidden=128, out=64),
        optimizer=Optimizer(name="adamw", lr=3e-3),
        device="cpu",
        log_every=1000,
    )
    data = PictureData(pictures, None, tuple("0123456789"), "scenes")
    backbone = pretrain(settings, prepare(settings, data), quiet=True)
    swept = Counted(backbone).eval()
    features = [extract(swept, images, IMAGENET) for images, _ in (train, test)]
    ours = linear_sweep(features[0], train[1], features[1], test[1], rates=RATES, epochs=EPOCHS)
    probed = Counted(backbone).eval()
    body = Standardized(probed, features[0])
    rate = ours.rate / math.sqrt(
        features[0].shape[1]
    )  # the sweep takes its rates over the mean square of a feature's length
    probe = ProbeSettings(epochs=EPOCHS, batch_size=256, lr=rate, least_area=1.0, flip=0.0)
    model = train_classifier(body, *train, 10, probe, IMAGENET, size=16)
    theirs = top1(model, *test, IMAGENET)
    rows = []
    for id, required, ratio in (
        ("probe_passes", ">= 10", probed.pictures / swept.pictures),
        ("probe_accuracy", "<= 1", abs(ours.top1 - theirs)),
    ):
        passes = id == "probe_passes"
        rows.append(
            counted(
                id,
                float(swept.pictures) if passes else ours.top1,
                float(probed.pictures) if passes else theirs,
                shape=f"{len(pixels)} training and {len(test[0])} test scenes, conv:32 after {STEPS} steps of SimCLR",
                unit="pictures through the backbone" if passes else "% top-1",
                required=required,
                equal=f"{RATES} rates on features computed once {ours.top1:.1f} %, one rate in {EPOCHS} epochs {theirs:.1f} %",
                statistic="counted" if passes else "difference of top-1: the same rate, head, pictures and epochs",
                ratio=ratio,
            )
        )
    return rows


if __name__ == "__main__":
    sys.exit(main("genview", {"timm": timm.__version__}, measure))
