"""Two materials a picture: a world that matching colors as a whole cannot solve.

    python packages/visctrl/studies/two_materials.py --seeds 0,1,2 --out two-materials

Discs in one color, squares in another (``visctrl.duos``); the denoiser, codec, adapter and engine of `visctrl demo`. Per
seed one model is trained (3,000 steps of 32 pictures: about 4 minutes on one core) and 48 pairs are edited. The settings were
found on seeds 100 and 101. Intervals are over the pairs of all seeds (10,000 bootstrap samples, paired), since a model takes
minutes; ``study.json`` has every pair. A study that was interrupted goes on with the next seed.
"""

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from visctrl import metrics
from visctrl.config import VisCtrlConfig
from visctrl.duos import DuoPairs, render_duo_pairs, render_duos
from visctrl.engine import VisCtrl
from visctrl.masks import to_pictures
from visctrl.outcome import EditOutput
from visctrl.toy import Training, toy_adapter, train_toy

from tenfold.claims import Bound, interval
from tenfold.figures import image_grid
from tenfold.files import replacing
from tenfold.terminal import table, track

ROUNDS = 3
CONFIG = VisCtrlConfig(steps=10, start=0.7, layers="0:", rounds=ROUNDS, refine=3, guard=False, max_bank="64MB")
TRAINING = Training(steps=3000, batch=32, warm_up=100, middle=-0.2)
STRUCTURES, PAIRS = 4096, 48
CLAIMS = {
    "transfer after one round, right - wrong reference": ">= 0.1",
    "RMSE to the ideal at the guard's round / after Reinhard's matching of colors": "<= 1",
}


def engine_of(seed: int, training: Training, structures: int, *, quiet: bool = False) -> VisCtrl:
    """The engine with a model of this seed."""
    show = partial(track, description=f"training of seed {seed}", quiet=quiet)
    return VisCtrl(toy_adapter(*train_toy(render_duos(structures, seed), training, seed, show)), CONFIG)


def edits(engine: VisCtrl, pairs: DuoPairs, references: Tensor, config: VisCtrlConfig) -> list[EditOutput]:
    """One edit per pair."""
    engine.config = config
    targets = pairs.target.images
    one = range(len(targets))
    return [engine.edit(targets[i : i + 1], engine.reference(references[i : i + 1]), history=True) for i in one]


def results(outs: list[EditOutput]) -> Tensor:
    """The results as one batch."""
    return torch.cat([out.images for out in outs])


def matched(pairs: DuoPairs) -> Tensor:
    """The targets after Reinhard's matching of all subject colors."""
    target, reference = pairs.target, pairs.reference
    return metrics.match_colors(target.images, reference.images, target.subject, reference.subject)


def values(images: Tensor, pairs: DuoPairs) -> dict[str, list[float]]:
    """Each pair's transfer of discs, of squares, their mean, and distance to the ideal."""
    x, target = images.float().clamp(-1, 1), pairs.target
    discs, squares = (
        metrics.transfer(x, target.images, pairs.ideal, target.masks[:, kind]).double() for kind in (0, 1)
    )
    found = {"transfer": (discs + squares) / 2, "discs": discs, "squares": squares}
    return {name: v.tolist() for name, v in (found | {"rmse": metrics.rmse(x, pairs.ideal)}).items()}


def measure(engine: VisCtrl, pairs: DuoPairs) -> dict[str, dict[str, list[float]]]:
    """All arms on all pairs."""
    found = {"untouched": pairs.target.images, "Reinhard": matched(pairs)}
    outs = edits(engine, pairs, pairs.reference.images, CONFIG)
    found |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(ROUNDS)}
    found["guard"] = results(edits(engine, pairs, pairs.reference.images, dataclasses.replace(CONFIG, guard=True)))
    found["wrong reference"] = results(edits(engine, pairs, pairs.wrong.images, dataclasses.replace(CONFIG, rounds=1)))
    return {arm: values(images, pairs) for arm, images in found.items()}


def claims(arms: dict[str, dict[str, NDArray[np.float64]]]) -> list[dict[str, object]]:
    """Both claims over all pairs, with bootstrap intervals over the pairs."""
    drawn = np.random.default_rng(0).integers(len(arms["guard"]["rmse"]), size=(10_000, len(arms["guard"]["rmse"])))
    right, wrong = arms["round 1"]["transfer"], arms["wrong reference"]["transfer"]
    ours, reinhard = arms["guard"]["rmse"], arms["Reinhard"]["rmse"]
    shown = []
    for (text, required), estimate, samples in zip(
        CLAIMS.items(),
        (float((right - wrong).mean()), float(ours.mean() / reinhard.mean())),
        ((right - wrong)[drawn].mean(axis=1), ours[drawn].mean(axis=1) / reinhard[drawn].mean(axis=1)),
        strict=True,
    ):
        low, high = (float(x) for x in np.quantile(samples, [0.025, 0.975]))
        holds = Bound.parse(required).decide(estimate, (low, high))
        shown.append({"text": text, "estimate": estimate, "ci95": [low, high], "required": required, "holds": holds})
    return shown


def draw(engine: VisCtrl, pairs: DuoPairs, path: Path) -> None:
    """Draw eight edits."""
    outs = edits(engine, pairs, pairs.reference.images, CONFIG)
    rows = {"target": pairs.target.images, "reference": pairs.reference.images, "Reinhard": matched(pairs)}
    rows |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(ROUNDS)}
    rows["ideal"] = pairs.ideal
    shown = [to_pictures(images, *images.shape[-2:]) for images in rows.values()]
    image_grid(path, shown, row_titles=list(rows), cell=0.9)


def report(out: Path, seeds: list[int]) -> None:
    """Print both tables over the seeds that are there, and write ``study.json``."""
    found = {seed: json.loads((out / f"seed-{seed}.json").read_text(encoding="utf-8")) for seed in seeds}
    names = found[seeds[0]]["arms"]
    arms = {
        arm: {m: np.concatenate([np.asarray(x["arms"][arm][m]) for x in found.values()]) for m in names[arm]}
        for arm in names
    }
    rows = [
        [arm, *(f"{np.median(v[m]):.2f}" for m in ("discs", "squares")), f"{v['rmse'].mean():.3f}"]
        for arm, v in arms.items()
    ]
    sys.stdout.write(table(["arm", "transfer of discs", "transfer of squares", "RMSE to the ideal"], rows) + "\n\n")
    decided = claims(arms)
    lines = [[c["text"], interval(c["estimate"], c["ci95"]), c["required"], c["holds"]] for c in decided]  # type: ignore[arg-type]
    sys.stdout.write(table(["claim", "estimate [95 % CI]", "required", "holds"], lines) + "\n")
    summary = {"seeds": seeds, "pairs": PAIRS, "claims": decided, "by_seed": found}
    with replacing(out / "study.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Train, edit, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    out, seeds = Path(given.out), [int(seed) for seed in given.seeds.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        if (out / f"seed-{seed}.json").is_file():
            continue
        began = time.process_time()
        engine = engine_of(seed, TRAINING, STRUCTURES)
        about = {"arms": measure(engine, render_duo_pairs(PAIRS, seed)), "seconds": time.process_time() - began}
        if not (out / "two-materials.png").is_file():
            draw(engine, render_duo_pairs(8, seed), out / "two-materials.png")
        with replacing(out / f"seed-{seed}.json") as temporary:
            temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")
    report(out, seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
