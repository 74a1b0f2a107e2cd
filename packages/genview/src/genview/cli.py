"""The command `genview`: foreground, plan, generation, pretraining, evaluation, and the demonstration."""

from genview.config import (
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    FitForegroundSettings,
    GenerateSettings,
    InspectSettings,
    MergeSettings,
    PlanSettings,
    StatusSettings,
    TrainSettings,
    TrainTinySettings,
)
from tenfold.cli import App, Verb

app = App(
    "genview",
    "genview",
    "Better positive pairs for self-supervised learning: generated views of each picture, and losses weighted by quality.",
    (
        Verb("fit-foreground", FitForegroundSettings),
        Verb("plan", PlanSettings),
        Verb("generate", GenerateSettings),
        Verb("status", StatusSettings, out=False),
        Verb("merge", MergeSettings),
        Verb("inspect", InspectSettings),
        Verb("train-tiny", TrainTinySettings),
        Verb("convert", ConvertSettings),
        Verb("train", TrainSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
