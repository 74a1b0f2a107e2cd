"""`freespace-uda inspect`: what data hold, before anything is computed."""

import sys
from typing import Any

import numpy as np

from freespace_uda.commands import _pictures
from freespace_uda.commands._files import read
from freespace_uda.config import InspectSettings, NormalSettings
from freespace_uda.data import load_scenes, same_place
from freespace_uda.depth import look_at
from freespace_uda.items import normals_of
from freespace_uda.scenes import Scenes, read_raw
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.report import write_report
from tenfold.terminal import table


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Print a table and what looks wrong; write ``inspection.json`` and the picture ``figures/overview.png``."""
    scenes = read(settings.data, settings.reading, usual="all")
    if settings.target is not None:
        other = load_scenes(settings.target, option="--target")
        if settings.target == settings.data or same_place(scenes, other):
            raise UserError(f"--data and --target are both {settings.target}")
    records = scenes.records
    parts = sorted({r.part for r in records})
    counts: dict[str, Any] = {
        "scenes": len(scenes),
        "parts": ", ".join(f"{p or 'none'} {sum(r.part == p for r in records)}" for p in parts),
        "with a picture": sum(scenes.records[i].rgb is not None or scenes.path is None for i in range(len(scenes))),
        "with depth": sum(scenes.records[i].depth is not None or scenes.path is None for i in range(len(scenes))),
        "with a label": sum(scenes.has_label(i) for i in range(len(scenes))),
    }
    shown = sorted({round(i * (len(scenes) - 1) / max(1, settings.shown - 1)) for i in range(settings.shown)})
    said: list[str] = []
    rows: list[list[str]] = []
    ids: set[int] = set()
    strip: list[Any] = []
    for i in shown:
        item = scenes.item(i)
        if item.depth is not None:
            looks = look_at(item.depth, item.intrinsics)
            try:
                said += scenes.checked(i)[1]
            except UserError as error:
                said.append(str(error))
            k = item.intrinsics
            cells = [f"{item.size[1]} x {item.size[0]}", f"{looks.low:.2f} to {looks.high:.1f}"]
            cells += [f"{100 * looks.density:.0f} %", f"{looks.height:.2f}"]
            camera = ", ".join(f"{value:.1f}" for value in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))
            rows.append([records[i].name, *cells, camera])
        label, text = _label(scenes, i, ids)
        said += [text] if text else []
        normals = None
        if item.depth is not None:
            normals = normals_of(item.depth, item.intrinsics, NormalSettings())[0][0].numpy()
        rgb = _pictures.shown_rgb(item)
        truth = rgb if label is None else _pictures.overlay(rgb, label == 1)
        seen = [_pictures.shown_depth(item.depth, item.size), _pictures.shown_normals(normals, item.size)]
        strip.append([rgb, *seen, truth])
    try:
        counts |= {f"{what} read as": how for what, how in scenes.understood(labels=True).items()}
    except UserError as error:
        said.append(str(error))
    if ids:
        counts["label ids found"] = ", ".join(map(str, sorted(ids)[:40]))
    folder = invocation.folder
    found = {"data": scenes.source, **counts, "said": said, "scenes shown": [r[0] for r in rows]}
    folder.write_json("inspection.json", found)
    _pictures.draw_strip(folder, "overview", strip, ["picture", "depth", "normals", "label"])
    captions = {"overview": "Pictures, depth (black: none), normals, labels."}
    write_report(folder, f"freespace-uda inspect: {scenes.source}", captions)
    sys.stdout.write(table([scenes.source, ""], list(counts.items())) + "\n")
    if rows:
        headers = ["scene", "size", "depth (m)", "lower half", "camera height (m)", "fx, fy, cx, cy"]
        sys.stdout.write("\n" + table(headers, rows) + "\n")
    for text in dict.fromkeys(said):
        sys.stdout.write(f"look: {text}\n")
    sys.stdout.write(f"overview in {folder.path / 'figures/overview.png'}\n")


def _label(scenes: Scenes, index: int, ids: set[int]) -> tuple[Any, str]:
    """The label of a scene, and what is wrong with it."""
    if not scenes.has_label(index):
        return None, ""
    path = scenes.records[index].label
    if path is not None:
        raw = read_raw(path)
        ids |= set(np.unique(raw if raw.ndim == 2 else raw[..., 0]).tolist())
    try:
        label = scenes.label(index)
    except UserError as error:
        return None, str(error)
    return label, "" if (label == 1).any() else f"{scenes.name(index)}: no pixel of road"
