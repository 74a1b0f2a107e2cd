"""`freespace-uda evaluate`: how good a model is on labeled pictures."""

import dataclasses
import sys
from typing import Any

from freespace_uda.commands import _pictures
from freespace_uda.commands._files import labeled, look, predictor_of, read
from freespace_uda.config import EvaluateSettings
from freespace_uda.evaluation import evaluate, predictions
from freespace_uda.metrics import Freespace, FreespaceMeter, bootstrap
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.report import write_report
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Write ``evaluation.json``, figures and ``report.html``, and print the table."""
    predictor, own, card = predictor_of(settings.run, settings.device)
    if settings.missing is not None and own.streams == {"depth": "normals", "rgb": "rgb"}[settings.missing]:
        raise UserError(f"--missing {settings.missing}: this model looks at {own.streams} alone")
    scenes = labeled(read(settings.data, settings.reading, usual="test"), f"--data {settings.data}")
    look(scenes, f"--data {settings.data}", labels=True)
    if settings.bev and scenes.road(0) is None:
        raise UserError(f"--bev: {scenes.name(0)} has no road transform (Tr_cam_to_road of KITTI's calib)")
    found = evaluate(predictor, scenes, batch_size=settings.batch_size, missing=settings.missing, above=settings.bev)
    folder = invocation.folder
    whole = found.perspective
    _, ci95 = bootstrap([whole.scenes[None]], lambda f1: f1, seed=settings.seed)
    result: dict[str, Any] = {
        "data": scenes.source,
        "scenes": len(scenes),
        "method": card["method"],
        "perspective": dataclasses.asdict(whole.compute()),
        "f1 95 % over scenes": ci95,
        "by distance": {name: dataclasses.asdict(r) for name, r in whole.by_distance().items()},
        "by category": {name: dataclasses.asdict(m.compute()) for name, m in found.categories.items()},
    }
    rows = [_row("all", whole.compute())]
    rows += [_row(name, ring) for name, ring in whole.by_distance().items()]
    rows += [_row(name, meter.compute()) for name, meter in found.categories.items()]
    if found.above is not None:
        result["bird's-eye view"] = dataclasses.asdict(found.above.compute())
        rows.append(_row("from above", found.above.compute()))
    folder.write_json("evaluation.json", result)
    shown = [round(i * (len(scenes) - 1) / 3) for i in range(4)]
    strip = []
    for i, item, p in predictions(predictor, scenes.picked(sorted(set(shown))), 4, settings.missing):
        label = scenes.picked(sorted(set(shown))).label(i)
        strip.append(
            [
                _pictures.shown_rgb(item),
                _pictures.shown_depth(item.depth, item.size),
                _pictures.outline(_pictures.shown_rgb(item), p.mask(), label),
            ]
        )
    _pictures.draw_strip(folder, "scenes", strip, ["picture", "depth", "result"])
    meters: dict[str, FreespaceMeter] = {card["method"]: whole}
    _pictures.draw_distance(folder, meters)
    captions = {
        "scenes": "Hits green, false alarms red, misses blue.",
        "distance": "F1 at threshold 1/2 by distance from the camera.",
    }
    write_report(folder, f"freespace-uda evaluate: {scenes.source}", captions)
    headers = ["", "F1", "MaxF", "AP", "precision", "recall", "IoU", "at", "labeled pixels"]
    low, high = (f"{100 * value:.1f}" for value in ci95)
    sys.stdout.write(table(headers, rows) + "\n")
    sys.stdout.write(f"F1 {low} to {high} (95 %, over {len(scenes)} scenes)\n")


def _row(name: str, r: Freespace) -> list[str]:
    shares = [f"{100 * v:.2f}" for v in (r.f1, r.max_f, r.ap, r.precision, r.recall, r.iou)]
    return [name, *shares, f"{r.threshold:.2f}", str(r.pixels)]
