"""`genview train`: one backbone, pretrained without labels."""

import sys
import time

from genview.commands import _files
from genview.config import TrainSettings
from genview.training import prepare, pretrain
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.report import write_report


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Pretrain; write the backbone and its card."""
    start, folder = time.perf_counter(), invocation.folder
    choose_device(settings.device)
    prepared = prepare(settings)
    backbone = pretrain(settings, prepared, run=folder, quiet=invocation.quiet)
    _files.save_backbone(folder, backbone, settings, prepared.data.classes)
    views = int(prepared.dataset.with_view.sum())
    study = Study(folder, data=prepared.data.source, seeds=[settings.seed])
    study.record(settings.method, {"pictures": len(prepared.dataset), "with a view": views})
    study.finish(time.perf_counter() - start)
    write_report(folder, f"genview train: {settings.backbone} by {settings.method}")
    sys.stdout.write(
        f"{settings.method}: {settings.backbone} on {len(prepared.dataset)} pictures, {views} with a generated view;"
        f" backbone in {folder.path / _files.BACKBONE}\n"
    )
