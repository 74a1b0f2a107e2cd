"""`mamba-fscil inspect`: what a learner is."""

import sys

import torch

from mamba_fscil.commands._files import learner_of
from mamba_fscil.config import InspectSettings
from mamba_fscil.training.store import opened
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Print files, shape, classes, and how the gate tells base classes from novel ones on their means."""
    learner = learner_of(settings.learner)
    stored = learner.stored
    assert stored is not None
    card = stored.card
    c, h, w = learner.projector.channels, *learner.projector.size
    inc = learner.projector.inc
    facts = [
        ["method", learner.method],
        [
            "classes",
            f"{len(learner.classes)} ({learner.base_classes} base), room for {learner.capacity - len(learner.classes)}",
        ],
        ["backbone", f"{learner.backbone_spec or 'none (maps)'}, digest {card['backbone_digest'] or '-'}"],
        [
            "images",
            f"{learner.size} x {learner.size}, mean {card['mean']}, std {card['std']}" if learner.size else "maps",
        ],
        ["map", f"{c} x {h} x {w}"],
        ["base side", f"{_count(learner.projector) - _count(inc):,} parameters"],
        ["incremental branch", f"{_count(inc):,} parameters"],
        ["confidence", f"softmax of {learner.scale:g} x cosine"],
    ]
    sys.stdout.write(table(["", ""], facts) + "\n\n")
    rows = []
    for entry in opened(stored.folder).entries[: stored.number]:
        names = entry.about.get("new", entry.about["classes"])
        shown = ", ".join(names[:6]) + (f"... ({len(names)})" if len(names) > 6 else "")
        rows.append([entry.path.name, f"{entry.path.stat().st_size / 1e6:.2f}", shown or "(refitted)"])
    sys.stdout.write(table(["file", "MB", "classes"], rows) + "\n")
    numbers = torch.arange(len(learner.classes))
    seen = learner.look(learner.memory.means(numbers.tolist()), numbers)
    if seen is not None:
        cosine, base, novel = seen
        sys.stdout.write(
            f"\non class means: |cos| of delta, B and C between base and novel classes {cosine:.3f};"
            f" gate (rms) {base:.3g} on base, {novel:.3g} on novel classes\n"
        )


def _count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())
