"""`handmstn inspect`: what a model, a gallery or data hold, before anything is computed."""

import sys

import numpy as np

from handmstn.commands._files import trained
from handmstn.config import InspectSettings
from handmstn.data import listed
from handmstn.gallery import Gallery
from handmstn.models import head_of
from handmstn.naming import numbered
from handmstn.parts import preset
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Print a table for each thing that was named."""
    if settings.run is not None:
        _model(settings.run)
    if settings.gallery is not None:
        _gallery(settings.gallery)
    if settings.data is not None:
        _data(settings)


def _model(run: str) -> None:
    model, card, _ = trained(run)
    rows = [
        [p.name, p.family, p.count, f"{p.out_size[0]} x {p.out_size[1]}", p.net, f"{w:.3f}"]
        for p, w in zip(model.parts, model.weights.tolist(), strict=True)
    ]
    sys.stdout.write(table(["part", "family", "points", "crop", "network", "weight"], rows) + "\n")
    own = {"aligner": model.aligner, "networks": model.nets, "descriptors": model.bottlenecks}
    sizes = [
        [name, "-" if part is None else f"{sum(p.numel() for p in part.parameters()):,}"] for name, part in own.items()
    ]
    sys.stdout.write("\n" + table(["", "parameters"], sizes) + "\n")
    sys.stdout.write(
        f"model {head_of(model, card)['model']}, trained on {card['pictures']} pictures of {card['people']} people"
        f" ({card['source']}), pictures of {card['size']} pixels, embedding of {model.dim * len(model.parts)} numbers\n"
    )
    known = "knows" if model.familiar is not None else "does not know"
    sys.stdout.write(f"it {known} which pictures are unlike the hands that it was trained on\n\n")


def _gallery(path: str) -> None:
    gallery = Gallery.open(path)
    names, counts = np.unique(gallery.enrolled.classes, return_counts=True)
    rows = [[name, int(count)] for name, count in zip(names[:20].tolist(), counts[:20].tolist(), strict=True)]
    sys.stdout.write(table(["hand", "pictures"], rows) + "\n")
    sys.stdout.write(
        f"{numbered(len(gallery))} of {numbered(len(names), 'hand')}; model {gallery.head['model']}, preset"
        f" {gallery.head['preset']}\n"
    )
    lines = gallery.log()
    last = [[line["when"], line["what"], line["purpose"] or "-", line.get("count", "")] for line in lines[-10:]]
    if last:
        sys.stdout.write("\n" + table(["when", "what", "purpose", "pictures"], last) + "\n\n")


def _data(settings: InspectSettings) -> None:
    assert settings.data is not None
    hands = listed(settings.data, settings.reading, preset("hand6"))
    names, counts = np.unique(hands.classes, return_counts=True)
    sides = {side: int((hands.sides == side).sum()) for side in ("left", "right", "unknown")}
    rows: list[list[object]] = [
        ["pictures", len(hands)],
        ["hands", len(names)],
        ["people", len(set(hands.persons.tolist()))],
        ["pictures per hand", f"{counts.min()} to {counts.max()} ('{names[int(counts.argmin())]}' has the fewest)"],
        *([side, count] for side, count in sides.items()),
        ["parts of the data", ", ".join(sorted(set(hands.splits.tolist()) - {""})) or "-"],
        ["with points", int(np.isfinite(hands.points).any((1, 2)).sum()) if hands.points.shape[1] else 0],
        ["left out", len(hands.skipped)],
    ]
    sys.stdout.write(table([hands.source, ""], rows) + "\n")
    if len(hands.skipped):
        sys.stdout.write(f"left out, the first: {hands.skipped[0]}\n")
    if (hands.guessed != "").any():
        sys.stdout.write(f"guessed: {hands.guessed[hands.guessed != ''][0]}\n")
