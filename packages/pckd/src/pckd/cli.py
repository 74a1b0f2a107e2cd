"""The command `pckd`: train, evaluate, compare, inspect, cache, export, and the demonstration."""

from pckd.config import (
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
    "pckd",
    "pckd",
    "Distill a big image classifier into a small one: category contrast with preview weights, and a measure of the gain.",
    (
        Verb("train", TrainSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("inspect", InspectSettings, out=False),
        Verb("cache", CacheSettings),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
