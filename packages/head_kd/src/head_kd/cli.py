"""The table of commands. Each parses its settings before it imports torch or mmdet."""

import importlib
from collections.abc import Callable
from typing import Any

from head_kd.config import (
    CacheSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    TrainSettings,
)
from tenfold.cli import App, Invocation, Verb


def _command(verb: str) -> Callable[[Any, Invocation], int | None]:
    def run(settings: Any, invocation: Invocation) -> int | None:
        code: int | None = importlib.import_module(f"head_kd.commands.{verb}").run(settings, invocation)
        return code

    return run


app = App(
    "head-kd",
    "head_kd",
    "Distill a detector into one of another kind through assistant heads (HEAD, TF-HEAD), in mmdet 3.x.",
    (
        Verb(
            "train", TrainSettings, _command("train"), "Train a student with a teacher's or its own assistants' help."
        ),
        Verb("evaluate", EvaluateSettings, _command("evaluate"), "Measure a plain student's COCO AP."),
        Verb(
            "compare",
            CompareSettings,
            _command("compare"),
            "Train several arms over several seeds, with statistics.",
            claims=True,
        ),
        Verb(
            "export",
            ExportSettings,
            _command("export"),
            "Write the plain student of a checkpoint, checked bit for bit.",
        ),
        Verb(
            "inspect",
            InspectSettings,
            _command("inspect"),
            "Show what a pair can match, what it costs, and how far it is apart.",
            out=False,
        ),
        Verb("cache", CacheSettings, _command("cache"), "Run the teacher once and save what training asks of it."),
        Verb(
            "demo",
            DemoSettings,
            _command("demo"),
            "Teach a small RetinaNet by a Faster R-CNN on drawn images.",
            claims=True,
        ),
    ),
)
main = app.main
