"""The command `handmstn`: render, train, enroll, search, remove, evaluate, compare, calibrate, convert, export, demonstrate."""

from handmstn.config import (
    CalibrateSettings,
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    EnrollSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    PredictSettings,
    RemoveSettings,
    SearchSettings,
    SimulateSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "handmstn",
    "handmstn",
    "Whose hand is this? Align palm and fingers of uncontrolled photographs, search a gallery, and say how sure the answer is.",
    (
        Verb("simulate", SimulateSettings),
        Verb("train", TrainSettings),
        Verb("enroll", EnrollSettings),
        Verb("search", SearchSettings),
        Verb("remove", RemoveSettings, out=False),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("predict", PredictSettings),
        Verb("calibrate", CalibrateSettings),
        Verb("convert", ConvertSettings),
        Verb("inspect", InspectSettings, out=False),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
