"""The command `radiogat`: learn an area, map it, judge the methods, say where to measure next."""

from radiogat.config import (
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    EvaluateSettings,
    PlotSettings,
    PredictSettings,
    ReproduceSettings,
    SimulateSettings,
    SuggestSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "radiogat",
    "radiogat",
    "Whole-area, multi-band radio maps with error bars from a few measurements.",
    (
        Verb("train", TrainSettings),
        Verb("predict", PredictSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("simulate", SimulateSettings),
        Verb("plot", PlotSettings),
        Verb("suggest", SuggestSettings),
        Verb("convert", ConvertSettings),
        Verb("reproduce", ReproduceSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
