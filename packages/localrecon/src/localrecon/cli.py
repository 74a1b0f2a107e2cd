"""The command `localrecon`: plan, train, evaluate, compare, diagnose, export, and the demonstration."""

from localrecon.config import (
    CompareSettings,
    DemoSettings,
    DiagnoseSettings,
    EvaluateSettings,
    ExportSettings,
    PlanSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "localrecon",
    "localrecon",
    "Train a network block by block with reconciled local losses: the activation memory of one block, not of all.",
    (
        Verb("plan", PlanSettings),
        Verb("train", TrainSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("diagnose", DiagnoseSettings),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
