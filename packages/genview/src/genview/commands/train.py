"""`genview train`: one backbone, pretrained without labels."""

import sys

from genview.commands import _files
from genview.config import TrainSettings
from genview.training import prepare, pretrain
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.report import write_report


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Pretrain; write the backbone and its card."""
    folder = invocation.folder
    choose_device(settings.device)
    prepared = prepare(settings)
    backbone = pretrain(settings, prepared, run=folder, quiet=invocation.quiet)
    _files.save_backbone(folder, backbone, settings, prepared.data.classes)
    views = int(prepared.dataset.with_view.sum())
    folder.write_json(
        "summary.json", {"pictures": len(prepared.dataset), "with_view": views, "method": settings.method}
    )
    write_report(folder, f"genview train: {settings.backbone} by {settings.method}")
    sys.stdout.write(
        f"{settings.method}: {settings.backbone} on {len(prepared.dataset)} pictures, {views} with a generated view;"
        f" backbone in {folder.path / _files.BACKBONE}\n"
    )
