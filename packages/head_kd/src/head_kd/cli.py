"""The command `head-kd`: train, evaluate, compare, export, inspect, cache, and the demonstration."""

from head_kd.config import (
    CacheSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "head-kd",
    "head_kd",
    "Distill a detector into one of another kind through assistant heads (HEAD, TF-HEAD), in mmdet 3.x.",
    (
        Verb("train", TrainSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("export", ExportSettings),
        Verb("inspect", InspectSettings, out=False),
        Verb("cache", CacheSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
