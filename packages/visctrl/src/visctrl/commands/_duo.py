"""The demonstration's second world: two materials a picture, where matching colors as a whole cannot win."""

import dataclasses

import torch
from torch import Tensor

from tenfold.claims import Study
from tenfold.figures import image_grid
from visctrl import metrics
from visctrl.commands._models import model_of
from visctrl.config import VisCtrlConfig
from visctrl.duos import DuoPairs, render_duo_pairs, render_duos
from visctrl.engine import VisCtrl
from visctrl.masks import to_pictures
from visctrl.outcome import EditOutput
from visctrl.toy import Training, toy_adapter

LENGTHS = {"quick": (64, 5, 1), "full": (4096, 1200, 48)}
"""Structures to train on, training steps, and pairs; other levels leave this world out."""
ROUNDS = 3
CONFIG = VisCtrlConfig(steps=10, start=0.7, layers="0:", rounds=ROUNDS, refine=3, guard=False, max_bank="64MB")
NAME = "two materials"


def file_of(seed: int) -> str:
    """Name of a seed's model in the run's folder."""
    return f"models/seed-{seed}-two"


def engine_of(work: str, level: str, seed: int, quiet: bool) -> VisCtrl:
    """The engine with a seed's model."""
    structures, steps, _ = LENGTHS[level]
    training = Training(steps=steps, batch=32, warm_up=min(100, steps), middle=-0.2)
    model, codec = model_of(work, file_of(seed), lambda: render_duos(structures, seed), training, seed, quiet)
    return VisCtrl(toy_adapter(model, codec), CONFIG)


def edits(engine: VisCtrl, pairs: DuoPairs, references: Tensor, config: VisCtrlConfig) -> list[EditOutput]:
    """One edit per pair."""
    engine.config = config
    targets = pairs.target.images
    return [
        engine.edit(targets[i : i + 1], engine.reference(references[i : i + 1]), history=True)
        for i in range(len(targets))
    ]


def results(outs: list[EditOutput]) -> Tensor:
    """The results as one batch."""
    return torch.cat([out.images for out in outs])


def values(images: Tensor, pairs: DuoPairs) -> dict[str, float]:
    """Median over pairs of each kind's transfer, their mean, and the mean distance to the ideal."""
    x, target = images.float().clamp(-1, 1), pairs.target
    discs, squares = (
        float(metrics.transfer(x, target.images, pairs.ideal, target.masks[:, kind]).median()) for kind in (0, 1)
    )
    return {
        "transfer": (discs + squares) / 2,
        "transfer of discs": discs,
        "transfer of squares": squares,
        "rmse to ideal": float(metrics.rmse(x, pairs.ideal).mean()),
    }


def matched(pairs: DuoPairs) -> Tensor:
    """The targets after Reinhard's matching of all subject colors."""
    target, reference = pairs.target, pairs.reference
    return metrics.match_colors(target.images, reference.images, target.subject, reference.subject)


def measure(work: str, level: str, seed: int, quiet: bool) -> dict[str, dict[str, float]]:
    """Train one model, and measure all arms on its pairs; nothing at the levels that leave this world out."""
    if level not in LENGTHS:
        return {}
    engine, pairs = engine_of(work, level, seed, quiet), render_duo_pairs(LENGTHS[level][2], seed)
    found = {"untouched": pairs.target.images, "Reinhard": matched(pairs)}
    outs = edits(engine, pairs, pairs.reference.images, CONFIG)
    found |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(ROUNDS)}
    guarded, once = dataclasses.replace(CONFIG, guard=True), dataclasses.replace(CONFIG, rounds=1)
    found["guard"] = results(edits(engine, pairs, pairs.reference.images, guarded))
    found["wrong reference"] = results(edits(engine, pairs, pairs.wrong.images, once))
    return {f"{NAME}, {arm}": values(images, pairs) for arm, images in found.items()}


def decide(study: Study, level: str) -> None:
    """The claims about this world, at the levels that have it."""
    if level not in LENGTHS:
        study.note("The world of two materials is measured by --full alone.")
        return
    study.difference(
        "two_materials_right_reference",
        "two materials: transfer after one round, right - wrong reference",
        (f"{NAME}, round 1", "transfer"),
        (f"{NAME}, wrong reference", "transfer"),
        required=">= 0.1",
    )
    study.ratio(
        "two_materials",
        "two materials: RMSE to the ideal at the guard's round / after Reinhard's matching of colors",
        (f"{NAME}, guard", "rmse to ideal"),
        (f"{NAME}, Reinhard", "rmse to ideal"),
        required="<= 1",
    )


def draw(study: Study, work: str, level: str) -> dict[str, str]:
    """Draw edits of the first seed; returns the caption by the figure's name."""
    if level not in LENGTHS:
        return {}
    seed = study.seeds[0]
    engine, pairs = engine_of(work, level, seed, quiet=True), render_duo_pairs(min(8, LENGTHS[level][2]), seed)
    outs = edits(engine, pairs, pairs.reference.images, CONFIG)
    rows = {"target": pairs.target.images, "reference": pairs.reference.images, "Reinhard": matched(pairs)}
    rows |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(ROUNDS)}
    rows["ideal"] = pairs.ideal
    shown = [to_pictures(images, *images.shape[-2:]) for images in rows.values()]
    image_grid(study.run.figure("two-materials"), shown, row_titles=list(rows), cell=0.9)
    return {
        "two-materials": "Two materials: targets, references, what matching all colors at once makes of them, results after"
        " each round, the ideal: discs in the color of the reference's discs, squares in that of its squares."
    }
