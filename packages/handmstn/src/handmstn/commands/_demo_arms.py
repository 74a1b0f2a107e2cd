"""One measurement of the demonstration: an arm on a seed, with what each probe gave, for intervals by person."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from handmstn.calibration import Calibration, cllr
from handmstn.commands._arms import look, measured, numbers, train_arm
from handmstn.commands._world import WHOLE_SIZE, World, aligner, settings_of, world
from handmstn.config import Arm, CompareSettings, DemoSettings
from handmstn.evaluation import Scorer
from handmstn.models import Embedded
from handmstn.recognizer import HandMSTN
from handmstn.records import Hands
from handmstn.training import Points, found_points
from tenfold.claims import Measured

FPIR = 0.01
COVERED = 0.85
"""Visibility of the palm below which a probe counts as covered."""


def joined(first: Hands, second: Hands) -> Hands:
    """Two sets of pictures as one."""
    import torch

    assert first.images is not None
    assert second.images is not None
    names = ("names", "persons", "sides", "views", "splits", "points", "visibility", "guessed", "rows")
    own: dict[str, Any] = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    return dataclasses.replace(first, **own, images=torch.cat([first.images, second.images]))


def half_width(points: Any) -> Any:
    """Half the width of each palm, in half widths of the picture."""
    return np.linalg.norm(points[:, 5] - points[:, 3], axis=-1) / 2


def measure_aligner(folder: str, demo: DemoSettings, seed: int) -> Measured:
    """Error of the points on test people, beside that of the mean of the training points."""
    people = world(Path(folder), demo, seed)
    found = aligner(Path(folder), demo, seed, people.train)
    model = Points(found)
    points, visible = found_points(model, people.test)
    truth = people.test.points
    unit = half_width(truth)
    mean = people.train.points.mean(0)[None]
    error = np.linalg.norm(points.numpy() - truth, axis=-1).mean(1) / unit
    naive = np.linalg.norm(mean - truth, axis=-1).mean(1) / unit
    gap = np.abs(visible.numpy() - people.test.visibility)
    values = {
        "error": float(np.median(error)),
        "mean pose": float(np.median(naive)),
        "ratio": float(np.median(error) / np.median(naive)),
        "visibility error": float(gap.mean()),
    }
    return Measured(values, {"points": points.numpy(), "error": error, "naive": naive})


def of_network(demo: DemoSettings, network: str, arm: str) -> CompareSettings:
    """Settings of an arm; those without an aligner see more pixels in their one crop."""
    settings = settings_of(demo, network)
    if arm in {"whole", "box"}:
        return dataclasses.replace(settings, recognizer=dataclasses.replace(settings.recognizer, palm_size=WHOLE_SIZE))
    return settings


def measure_arm(folder: str, demo: DemoSettings, arm: Arm, network: str, seed: int) -> Measured:
    """Train an arm, and count on people that nobody trained on."""
    people = world(Path(folder), demo, seed)
    settings = of_network(demo, network, arm)
    shared = aligner(Path(folder), demo, seed, people.train) if arm in {"palm", "fingers-ce", "all"} else None
    model = train_arm(people.train, settings, arm, seed, shared)
    both = joined(people.test, people.strangers)
    mated = np.arange(len(both)) < len(people.test)
    seen = look(model, both, settings, arm)
    counts, rows = measured(model, seen, both.splits, mated)
    values = dict(numbers(counts, FPIR))
    rank, _, _ = counts.identification.per_probe()
    found, _ = counts.open_set.per_probe(FPIR)
    covered = both.visibility[rows, 0] < COVERED
    arrays: dict[str, Any] = {
        "rank": rank,
        "found": found,
        "persons": both.persons[rows].astype(np.int64) + 10000 * seed,
        "covered": covered,
        "rows": rows,
        "points": seen.points[:12],
    }
    hit = rank <= 1
    values["rank-1, covered"] = 100 * float(hit[covered].mean()) if covered.any() else 0.0
    if arm in {"whole", "all"}:
        other = look(model, people.other, settings, arm)
        elsewhere, _ = measured(model, other, people.other.splits, np.ones(len(people.other), np.bool_))
        arrays["rank, other domain"] = elsewhere.identification.per_probe()[0]
        values["rank-1, other domain"] = 100 * float((arrays["rank, other domain"] <= 1).mean())
    if arm == "all":
        blind, _ = measured(model, seen, both.splits, mated, visible=False)
        arrays["rank, all visible"] = blind.identification.per_probe()[0]
        values["rank-1, all visible"] = 100 * float((arrays["rank, all visible"] <= 1).mean())
        values |= _calibrated(model, people, settings, seen.part(mated))
        values["palm weight"] = float(model.weights[0].detach())
        arrays["best"] = _neighbors(model, seen, rows)
    return Measured(values, arrays)


def _calibrated(model: HandMSTN, people: World, settings: CompareSettings, test: Embedded) -> dict[str, float]:
    """Cllr on the test people of a calibration that was learned on other people."""
    develop = look(model, people.develop, settings, "all")
    sets = [_pairs(model, develop), _pairs(model, test)]
    fitted = Calibration.fit(*sets[0], edges=(0.6, 0.9))
    scores, same, common = sets[1]
    llr = fitted.llr(scores, common)
    return {"Cllr": cllr(llr[same], llr[~same])}


def _pairs(model: HandMSTN, found: Embedded) -> tuple[Any, Any, Any]:
    """Scores of all pairs i < j, whether they are genuine, their common visibility."""
    e, weights = found.enrolled, model.weights.detach().numpy()
    scores = Scorer(e, e.persons, weights).scores(e)
    common = np.einsum("ap,bp,p->ab", e.visibility, e.visibility, weights)
    upper = np.triu(np.ones_like(scores, dtype=np.bool_), 1)
    same = e.persons[:, None] == e.persons[None]
    return scores[upper], same[upper], common[upper]


def _neighbors(model: HandMSTN, seen: Embedded, rows: Any) -> Any:
    """For each probe the row of the best gallery picture."""
    splits = seen.hands.splits
    gallery = np.flatnonzero((splits == "gallery") & np.isin(seen.hands.persons, seen.hands.persons[rows]))
    scorer = Scorer(seen.enrolled.part(gallery), seen.hands.classes[gallery], model.weights.detach().numpy())
    return gallery[scorer.scores(seen.enrolled.part(rows)).argmax(1)]
