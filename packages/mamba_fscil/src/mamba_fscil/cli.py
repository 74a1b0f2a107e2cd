"""The command `mamba-fscil`: train, extract, add-class, predict, evaluate, compare, inspect, convert, export, and the demo."""

from mamba_fscil.config import (
    AddClassSettings,
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    ExtractSettings,
    InspectSettings,
    PredictSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "mamba-fscil",
    "mamba_fscil",
    "Teach an image classifier new classes from a few pictures each, session after session, and keep the old ones.",
    (
        Verb("train", TrainSettings),
        Verb("extract", ExtractSettings),
        Verb("add-class", AddClassSettings),
        Verb("predict", PredictSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("inspect", InspectSettings, out=False),
        Verb("convert", ConvertSettings),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
