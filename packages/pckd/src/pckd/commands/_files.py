"""A trained student as files, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pckd.config import TrainSettings
from pckd.models import METHOD, STUDENT, build, read_card
from pckd.training import Trained
from tenfold import checkpoints, runs
from tenfold.images import ImageData
from tenfold.runs import Run


def save_student(
    run: Run, trained: Trained, spec: str, data: ImageData, folder: str = "", *, args: Mapping[str, Any] | None = None
) -> None:
    """Write the weights of a student and the card that says how to use them."""
    card = {
        "model": spec,
        "args": dict(args or {}),
        "classes": list(data.classes),
        "size": data.size,
        "mean": list(trained.statistics[0]),
        "std": list(trained.statistics[1]),
        "tap": trained.tap,
        "epoch": trained.epoch,
        "top1": trained.top1,
    }
    checkpoints.save(run.own(f"{folder}{STUDENT}"), trained.model.state_dict(), method=METHOD, config=card)
    run.write_json(f"{folder}config.json", card)


def finished(run: str) -> runs.Finished[TrainSettings]:
    """The finished `pckd train` that ``--run`` names."""
    return runs.read(run, TrainSettings, package="pckd", verb="train")


def student_of(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The student of a finished training, with its card."""
    card = read_card(folder)
    model = build(
        card["model"],
        len(card["classes"]),
        str(folder / STUDENT),
        option="--run",
        args=card.get("args"),
        in_chans=len(card["mean"]),
        size=card["size"],
        whole=True,
    )
    return model, card
