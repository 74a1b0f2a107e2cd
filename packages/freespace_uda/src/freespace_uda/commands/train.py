"""`freespace-uda train`: one method on a labeled source and an unlabeled target."""

import sys
import time

from freespace_uda.commands import _pictures
from freespace_uda.commands._files import domains, save
from freespace_uda.config import TrainSettings
from freespace_uda.evaluation import predictions
from freespace_uda.models import build_net
from freespace_uda.normal_cache import NormalCache
from freespace_uda.predictor import Predictor
from freespace_uda.scenes import Unlabeled
from freespace_uda.selection import ailing
from freespace_uda.training import road_share, train
from tenfold.cli import Invocation
from tenfold.report import write_report
from tenfold.runs import read_metrics


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train, and write the chosen model, its course and a few target pictures."""
    start = time.perf_counter()
    folder = invocation.folder
    oracle = settings.method == "oracle"
    source, target = domains(settings, oracle=oracle)
    caches = tuple(None if c is None else NormalCache.open(c) for c in (settings.normal_cache, settings.target_cache))
    for cache, scenes in zip(caches, (source, target), strict=True):
        if cache is not None:
            cache.read(scenes.name(0))
    road_share(target if oracle else source, 8)
    build_net(settings, settings.method, settings.seed)  # names of encoders, before any work
    trained = train(
        source,
        target if oracle else Unlabeled(target),
        settings,
        settings.method,
        settings.seed,
        folder,
        caches=(caches[0], caches[1]),
        quiet=invocation.quiet,
    )
    save(folder, trained, settings, source, target)
    captions = {}
    shown = target.picked(sorted({round(i * (len(target) - 1) / 3) for i in range(min(4, len(target)))}))
    rows = []
    for _, item, found in predictions(Predictor(trained.net, settings), shown):
        rgb = _pictures.shown_rgb(item)
        rows.append(
            [
                rgb,
                _pictures.shown_depth(item.depth, item.size),
                _pictures.shown_normals(found.normals, item.size),
                _pictures.overlay(rgb, found.mask()),
            ]
        )
    _pictures.draw_strip(folder, "target", rows, ["picture", "depth", "normals", "road"])
    captions["target"] = (
        "Target pictures (their labels were not read), depth with its holes, normals, and the road that was found."
    )
    if _pictures.draw_course(folder):
        captions["course"] = (
            "By step: losses; health of the alignment; what the choice of the checkpoint sees without labels."
        )
    write_report(folder, f"freespace-uda train: {settings.method}", captions)
    s = trained.signals
    sys.stdout.write(
        f"{settings.method}: {len(source)} scenes of {source.source}, {len(target)} of {target.source},"
        f" {time.perf_counter() - start:.0f} s; chosen by {settings.select_by}: step {trained.step} (agreement"
        f" {s.agreement:.3f}, entropy {s.entropy:.3f}, road {s.road:.3f}, source {trained.prior:.3f}); model in {folder.path}\n"
    )
    if not trained.plausible:
        sys.stdout.write(
            f"warning: no checkpoint calls between half and twice the source's share of road ({trained.prior:.3f}):"
            " look at the pictures before you trust this model\n"
        )
    path = folder.path / "metrics.csv"
    for text in ailing(read_metrics(path) if path.exists() else []):
        sys.stdout.write(f"warning: {text}\n")
