"""Trained models, and data as commands read them."""

import importlib.metadata
import sys
import warnings
from typing import Any

from freespace_uda.config import NetSettings, RunSettings, SceneReading, TrainSettings
from freespace_uda.data import load_scenes, same_place
from freespace_uda.models import WEIGHTS, card_of, load_model, save_model
from freespace_uda.predictor import Predictor
from freespace_uda.scenes import Scenes
from freespace_uda.training import Trained
from tenfold import UserError, runs
from tenfold.devices import choose_device
from tenfold.runs import Run

CHECKED = 3
"""Scenes that a command looks at before it begins."""


def save(run: Run, trained: Trained, settings: TrainSettings, source: Scenes, target: Scenes) -> None:
    """Write weights and card into a run."""
    card = card_of(
        settings,
        settings.method,
        version=importlib.metadata.version("freespace-uda"),
        source=source.source,
        target=target.source,
        chosen={
            "step": trained.step,
            **trained.signals._asdict(),
            "prior": trained.prior,
            "plausible": trained.plausible,
        },
    )
    save_model(run.own(WEIGHTS), trained.net, card)
    run.write_json("config.json", card)


def predictor_of(run: str, device: Any = "auto") -> tuple[Predictor, NetSettings, dict[str, Any]]:
    """The model of the finished `freespace-uda train` that ``--run`` names."""
    finished = runs.read(run, TrainSettings, package="freespace-uda", verb="train")
    net, settings, card = load_model(finished.path)
    return Predictor(net, settings, choose_device(device)), settings, card


def look(scenes: Scenes, option: str, *, labels: bool) -> None:
    """Read a few scenes as the command will, so that what is wrong is said before it begins.

    Raises:
        UserError: a scene cannot be used; the message says why, and what is likely meant.
    """
    if not len(scenes):
        raise UserError(f"{option}: no scenes")
    count = min(CHECKED, len(scenes))
    for index in sorted({round(i * (len(scenes) - 1) / max(1, count - 1)) for i in range(count)}):
        item, said = scenes.checked(index)
        for text in said:
            warnings.warn(text, UserWarning, stacklevel=2)
        if labels:
            label = scenes.label(index)
            if label.shape != item.size:
                raise UserError(
                    f"{scenes.name(index)}: label of {label.shape[1]} x {label.shape[0]} pixels, picture of"
                    f" {item.size[1]} x {item.size[0]}"
                )
    if scenes.path is not None and (understood := scenes.understood(labels=labels)):
        words = "; ".join(f"{what}: {how}" for what, how in understood.items())
        sys.stdout.write(f"{option}: {len(scenes)} scenes; {words}\n")


def labeled(scenes: Scenes, option: str) -> Scenes:
    """The scenes that have a label.

    Raises:
        UserError: none has one.
    """
    chosen = [i for i in range(len(scenes)) if scenes.has_label(i)]
    if not chosen:
        raise UserError(f"{option}: no scene has a label")
    if len(chosen) < len(scenes):
        without = next(scenes.name(i) for i in range(len(scenes)) if not scenes.has_label(i))
        warnings.warn(
            f"{option}: {len(scenes) - len(chosen)} scenes without a label are left out, the first: {without}",
            UserWarning,
            stacklevel=2,
        )
        return scenes.picked(chosen)
    return scenes


def domains(settings: RunSettings, *, oracle: bool) -> tuple[Scenes, Scenes]:
    """Source and target of a training, looked at.

    Raises:
        UserError: they are one folder, or one cannot be used.
    """
    source = labeled(load_scenes(settings.data, settings.reading), f"--data {settings.data}")
    target = load_scenes(settings.target, settings.target_reading, option="--target")
    if settings.data == settings.target or same_place(source, target):
        raise UserError(f"--data and --target are both {settings.target}: source and target have to be different data")
    look(source, f"--data {settings.data}", labels=True)
    if oracle:
        target = labeled(target, f"--target {settings.target}")
    look(target, f"--target {settings.target}", labels=oracle)
    return source, target


def read(data: str, reading: SceneReading, *, usual: str, option: str = "--data") -> Scenes:
    """The scenes of a command; all of them, with a note, where the data has no parts."""
    found = load_scenes(data, reading, usual=usual, option=option)
    if found.path is not None and {r.part for r in found.records} == {""} and reading.split not in {None, "all"}:
        sys.stdout.write(f"note: {data} has no parts; all {len(found)} scenes are taken as '{reading.split}'\n")
    return found
