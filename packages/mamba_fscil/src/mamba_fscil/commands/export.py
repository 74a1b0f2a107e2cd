"""`mamba-fscil export`: the classifier over the classes seen so far, for elsewhere."""

import sys

import torch
from torch import Tensor, nn

from mamba_fscil.commands._files import learner_of
from mamba_fscil.config import ExportSettings
from mamba_fscil.training.learner import IncrementalLearner
from tenfold import export
from tenfold.cli import Invocation


class Classifier(nn.Module):
    """From normalized images (or maps) to logits over the classes seen: the scale of the confidence times cosines."""

    vectors: Tensor

    def __init__(self, learner: IncrementalLearner) -> None:
        super().__init__()
        self.backbone = learner.backbone
        free = learner.method in {"ncm", "teen"}
        self.projector = None if free else learner.projector
        vectors = learner.prototypes().t() if free else learner.head.W[:, : len(learner.classes)]
        self.register_buffer("vectors", nn.functional.normalize(vectors, dim=0).clone())
        self.scale = learner.scale

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W), or maps (N, c, H, W) -> (N, K)."""
        maps = x if self.backbone is None else self.backbone(x)
        features = maps.mean(dim=(2, 3)) if self.projector is None else self.projector(maps).mu
        return self.scale * nn.functional.normalize(features, dim=1) @ self.vectors


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write the classifier in the format, and the card that says how to use it."""
    learner = learner_of(settings.learner)
    folder = invocation.folder
    shape = (3, learner.size, learner.size) if learner.size else (learner.projector.channels, *learner.projector.size)
    done = export.save(Classifier(learner).eval(), torch.zeros(2, *shape), folder, "classifier", settings.format)
    mean, std = (list(x) for x in learner.statistics)
    card = {"classes": learner.classes, "input": list(shape), "mean": mean, "std": std, "scale": learner.scale}
    folder.write_json("config.json", card)
    how = f"images as (x / 255 - mean) / std with mean {mean}, std {std}" if learner.size else "maps"
    sys.stdout.write(
        f"{done.path}: (N, {', '.join(map(str, shape))}), {how} -> logits of {len(learner.classes)} classes\n"
    )
