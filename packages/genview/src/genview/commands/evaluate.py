"""`genview evaluate`: what a pretrained backbone's features are worth."""

import sys

from genview.commands import _files, _measures
from genview.config import EvaluateSettings
from genview.data import load
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure, write ``evaluation.json``, print."""
    device = choose_device(settings.device)
    trained = _files.finished(settings.run)
    backbone, card = _files.backbone_of(trained.path)
    found = _measures.read(load(settings.data or trained.settings.data), card["size"])
    values, subsets = _measures.measure(
        backbone,
        found,
        settings.protocol,
        settings.probe,
        (tuple(card["mean"]), tuple(card["std"])),
        size=card["size"],
        k=settings.k,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
        device=device,
    )
    invocation.folder.write_json(
        "evaluation.json", {"protocol": settings.protocol, "metrics": values, "subsets": subsets}
    )
    sys.stdout.write(table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in values.items()]) + "\n")
