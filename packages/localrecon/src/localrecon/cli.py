"""The command `localrecon`: plan, train, evaluate, compare, diagnose, export, and the demonstration."""

import importlib
from collections.abc import Callable
from typing import Any

from localrecon.config import (
    CompareSettings,
    DemoSettings,
    DiagnoseSettings,
    EvaluateSettings,
    ExportSettings,
    PlanSettings,
    TrainSettings,
)
from tenfold.cli import App, Invocation, Verb


def _command(name: str) -> Callable[[Any, Invocation], int | None]:
    def run(settings: Any, invocation: Invocation) -> int | None:
        return importlib.import_module(f"localrecon.commands.{name}").run(settings, invocation)

    return run


app = App(
    "localrecon",
    "localrecon",
    "Train a network block by block with reconciled local losses: the activation memory of one block, not of all.",
    (
        Verb(
            "plan",
            PlanSettings,
            _command("plan"),
            "Decide where a model is cut, and predict the peak memory of a step.",
        ),
        Verb("train", TrainSettings, _command("train"), "Train a model, block by block or by one of the baselines."),
        Verb("evaluate", EvaluateSettings, _command("evaluate"), "Measure a training on its test data."),
        Verb("compare", CompareSettings, _command("compare"), "Train by several methods.", claims=True),
        Verb(
            "diagnose",
            DiagnoseSettings,
            _command("diagnose"),
            "Show what the modules of a training want of each other.",
        ),
        Verb("export", ExportSettings, _command("export"), "Write a trained model's weights under its own key names."),
        Verb("demo", DemoSettings, _command("demo"), "Show what reconciliation and local training do.", claims=True),
    ),
)
main = app.main
