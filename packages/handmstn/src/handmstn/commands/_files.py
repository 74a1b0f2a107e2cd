"""Trained models, and pictures as they were trained on."""

import dataclasses
import importlib.metadata
import sys
from typing import Any

import numpy as np

from handmstn.config import HandReading, ModelSettings, RunSettings, TrainSettings, WithModel
from handmstn.data import boxed, load, wanted_parts
from handmstn.familiar import FEWEST
from handmstn.models import WEIGHTS, Embedded, embed, load_model, save_model
from handmstn.naming import numbered
from handmstn.recognizer import HandMSTN
from handmstn.records import Hands
from tenfold import UserError, runs
from tenfold.devices import choose_device
from tenfold.runs import Run


def card_of(settings: RunSettings, model: HandMSTN, hands: Hands) -> dict[str, Any]:
    """What has to be known to use a model."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(ModelSettings)}
    return {
        "settings": runs.plain(ModelSettings(**fields)),
        "size": settings.reading.size,
        "aligner": model.aligner is not None,
        "people": len(set(hands.persons.tolist())),
        "pictures": len(hands),
        "source": hands.source,
        "version": importlib.metadata.version("handmstn"),
    }


def save(run: Run, model: HandMSTN, card: dict[str, Any], folder: str = "") -> None:
    """Write weights and card of a model into a run."""
    save_model(run.own(f"{folder}{WEIGHTS}"), model, card)
    run.write_json(f"{folder}config.json", card)


def trained(run: str) -> tuple[HandMSTN, dict[str, Any], runs.Finished[TrainSettings]]:
    """The model of the finished `handmstn train` that ``--run`` names, its card and its settings."""
    finished = runs.read(run, TrainSettings, package="handmstn", verb="train")
    model, card = load_model(finished.path)
    return model, card, finished


ENROLLED, DEVELOPMENT = 5000, 8000
"""Numbers of the first rendered person that is searched for, and of the first that a calibration learns from: other people
than those trained on."""


def read(settings: WithModel, card: dict[str, Any], model: HandMSTN, *, seed: int = 0, first: int = ENROLLED) -> Hands:
    """The pictures of a command, at the model's size, with points where the model takes given ones."""
    reading = dataclasses.replace(settings.reading, size=card["size"])
    told = bool(card["settings"]["given_points"])
    parts = wanted_parts(model.parts, told) if model.aligner is None else ()
    return boxed(load(settings.data, reading, parts, seed=seed, first=first), model.parts, told)


def embedded(settings: WithModel, model: HandMSTN, hands: Hands) -> Embedded:
    """Vectors of the pictures of a command, and which are not assessable; what cannot be told is warned of."""
    device = choose_device(settings.device)
    if model.aligner is not None and model.familiar is None:
        sys.stdout.write(  # no warning: an error that follows has to be the one line on stderr
            "note: this model does not know which pictures show no hand (an earlier version made it, or fewer than"
            f" {FEWEST} pictures did): one of a wall may be taken for a hand\n"
        )
    found = embed(
        model,
        hands,
        batch_size=settings.batch_size,
        device=device,
        guess_side=settings.reading.side == "auto",
        refuse=settings.unlike == "refuse",
    )
    kept = found.shown & (found.unlike > 1)
    if kept.any():
        sys.stdout.write(
            "note: unlike the hands that the model was trained on, and taken for hands by --unlike keep:"
            f" {numbered(int(kept.sum()))}, the first: {found.hands.names[kept][0]}\n"
        )
    return found


def left_out(found: Embedded) -> list[dict[str, str]]:
    """The pictures that are not assessable, and why."""
    hidden = ~found.shown
    pairs = zip(found.hands.names[hidden].tolist(), found.reasons[hidden].tolist(), strict=True)
    return [{"picture": name, "why": why} for name, why in pairs]


def first_of(hidden: list[dict[str, str]]) -> str:
    """``3 pictures, the first, a.png: why``."""
    return f"{numbered(len(hidden))}, the first, {hidden[0]['picture']}: {hidden[0]['why']}"


def nothing_left(data: str, found: Embedded) -> UserError:
    """What to raise where no picture is assessable."""
    reasons, counts = np.unique(found.reasons, return_counts=True)
    most = str(reasons[int(counts.argmax())])
    hint = "; --unlike keep takes such pictures for hands" if most.startswith("it ") else ""
    return UserError(
        f"--data {data}: none of {numbered(len(found.hands))} is assessable; of {counts.max()}: {most}{hint}"
    )


def wanted(reading: HandReading, hands: Hands, split: str | None, usual: str) -> Hands:
    """The part of the data that a command is about."""
    if split is not None:
        return hands.split(split)
    return hands.split(usual) if (hands.splits == usual).any() else hands
