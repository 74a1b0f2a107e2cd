"""`mamba-fscil predict`: the classes of pictures."""

import sys

import torch
from torch import Tensor

from mamba_fscil.commands._files import inputs_of, learner_of
from mamba_fscil.config import PredictSettings
from tenfold.cli import Invocation
from tenfold.terminal import table, track


def run(settings: PredictSettings, invocation: Invocation) -> None:
    """Write ``predictions.json`` and print the first answers."""
    learner = learner_of(settings.learner, settings.device)
    inputs, names = inputs_of(learner, settings.images)
    top = min(settings.top, len(learner.classes))
    rows = []
    parts = torch.split(torch.arange(len(names)), settings.batch_size)
    for index in track(parts, "pictures", quiet=invocation.quiet):
        batch = inputs[index] if isinstance(inputs, Tensor) else inputs.pixels(index)
        found = learner.predict_proba(batch).topk(top, dim=1)
        for i, values, classes in zip(index.tolist(), found.values.tolist(), found.indices.tolist(), strict=True):
            answers = [[learner.classes[k], round(p, 4)] for k, p in zip(classes, values, strict=True)]
            rows.append({"picture": names[i], "answers": answers})
    invocation.folder.write_json("predictions.json", rows)
    shown = [[row["picture"], ", ".join(f"{name} {100 * p:.0f} %" for name, p in row["answers"])] for row in rows[:50]]
    sys.stdout.write(table(["picture", "classes"], shown) + "\n")
    if len(rows) > len(shown):
        sys.stdout.write(f"... all {len(rows)} in {invocation.folder.path / 'predictions.json'}\n")
