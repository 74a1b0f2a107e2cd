"""`visctrl evaluate`: fidelity, structure, background and cost of finished edits."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tenfold import runs
from tenfold.cli import Invocation
from tenfold.errors import UserError
from tenfold.terminal import table
from visctrl import metrics
from visctrl.commands._encoder import NO_ENCODER, Features, encoder_of, subject
from visctrl.config import EditSettings, EvaluateSettings
from visctrl.data import read_mask, read_picture
from visctrl.masks import to_images


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure every edit of a run, and print the rows and their mean."""
    found = runs.read(settings.run, EditSettings, package="visctrl", verb="edit")
    files = sorted(found.path.rglob("edit.json"))
    features = encoder_of(settings.encoder, settings.encoder_weights, settings.device)
    rows, everything = [], {}
    for file in files:
        about = json.loads(file.read_text(encoding="utf-8"))
        values = _measure(about, file.parent, features)
        name = "edit" if file.parent == found.path else file.parent.name
        everything[name] = values
        rows.append([name, *(_shown(x) for x in values.values())])
    heads = list(next(iter(everything.values())))
    if len(rows) > 1:
        numbers = {h: [x for v in everything.values() if (x := v[h]) is not None] for h in heads}
        means = [_shown(float(np.mean(x)) if x else None) for x in numbers.values()]
        rows.append(["mean", *means])
    invocation.folder.write_json("evaluation.json", everything)
    sys.stdout.write(table(["edit", *heads], rows) + "\n")
    if features is None:
        sys.stdout.write(NO_ENCODER)


def _measure(about: dict[str, Any], folder: Path, features: Features | None) -> dict[str, float | None]:
    paths = {name: Path(about[name]) for name in ("target", "reference") if about[name]}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"{folder / 'edit.json'}: its {name} {path} is not there any more")
    target, edited = read_picture(paths["target"]), read_picture(folder / "edited.png")
    masks = {
        name: read_mask(about[f"{name}_mask"], path, read_picture(path), f"{name}_mask")
        for name, path in paths.items()
        if about[f"{name}_mask"]
    }
    values: dict[str, float | None] = {"fidelity": None, "before": None, "structure": None}
    if features is not None:
        if "reference" in paths:
            reference = subject(read_picture(paths["reference"]), masks.get("reference"))
            values["fidelity"] = features.fidelity(subject(edited, masks.get("target")), reference)
            values["before"] = features.fidelity(subject(target, masks.get("target")), reference)
        values["structure"] = features.structure(target, edited)
    values |= {"background PSNR": None, "background SSIM": None}
    if "target" in masks:
        outside = torch.from_numpy(1 - (masks["target"] > 0).astype(np.float32))[None]
        a, b = to_images([edited]), to_images([target])
        psnr = float(metrics.psnr(a, b, outside))
        values["background PSNR"] = min(psnr, 100.0)
        inside = 1 - outside[:, None]  # the target's there too, so that no window sees what was meant to change
        values["background SSIM"] = float(metrics.ssim(inside * b + (1 - inside) * a, b, outside))
    return values | {"round": about["round"], "rows": about["rows"], "seconds": about["seconds"]}


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
