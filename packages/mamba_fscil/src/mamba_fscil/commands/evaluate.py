"""`mamba-fscil evaluate`: a learner on test pictures."""

import dataclasses
import sys

import torch

from mamba_fscil import metrics
from mamba_fscil.commands._files import learner_of, test_part
from mamba_fscil.config import EvaluateSettings
from mamba_fscil.data import load_tests
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Write ``evaluation.json``; print scores, the worst classes, the commonest confusions."""
    learner = learner_of(settings.learner, settings.device)
    reading = settings.reading
    if reading.size is None and settings.data.partition(":")[0] != "npz":  # which may hold maps
        reading = dataclasses.replace(reading, size=learner.size or None)
    data = load_tests(settings.data, settings.protocol, reading)
    part, missing = test_part(learner, data, settings.data)
    found = [(learner.logits(maps).cpu(), labels) for maps, labels in learner.maps_of(part, settings.batch_size)]
    logits, labels = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
    scores = metrics.score(torch.softmax(learner.scale * logits, dim=1), labels, learner.base_classes)
    guess = logits.argmax(dim=1)
    each = {
        name: metrics.accuracy(guess[labels == k], labels[labels == k])
        for k, name in enumerate(learner.classes)
        if name not in missing
    }
    pairs, counts = torch.unique(torch.stack([labels, guess])[:, labels != guess], dim=1, return_counts=True)
    order = counts.argsort(descending=True)[:5]
    confused = [[learner.classes[int(pairs[0, i])], learner.classes[int(pairs[1, i])], int(counts[i])] for i in order]
    plain = {key: (value if value == value else None) for key, value in vars(scores).items()}
    body = {**plain, "classes": each, "confusions": confused, "without test pictures": missing}
    invocation.folder.write_json("evaluation.json", body)
    rows = [[key, "-" if value is None else f"{value:.2f}"] for key, value in plain.items()]
    sys.stdout.write(table(["metric (%)", "value"], rows) + "\n\n")
    worst = sorted(each.items(), key=lambda item: item[1])[:5]
    sys.stdout.write(table(["worst classes", "right (%)"], [[k, f"{v:.1f}"] for k, v in worst]) + "\n")
    if confused:
        sys.stdout.write("\n" + table(["class", "answer", "pictures"], confused) + "\n")
    if missing:
        sys.stdout.write(f"\n{len(missing)} classes have no test picture: {', '.join(missing[:5])}\n")
