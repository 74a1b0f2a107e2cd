"""The command `freespace-uda`: inspect, normals, simulate, train, evaluate, compare, predict, export, demonstrate."""

from freespace_uda.config import (
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    InspectSettings,
    NormalsSettings,
    PredictSettings,
    SimulateSettings,
    TrainSettings,
)
from tenfold.cli import App, Verb

app = App(
    "freespace-uda",
    "freespace_uda",
    (
        "Drivable area on real roads, trained with labels from a simulator only: RGB and surface "
        "normals, adapted where it matters."
    ),
    (
        Verb("inspect", InspectSettings),
        Verb("normals", NormalsSettings),
        Verb("simulate", SimulateSettings),
        Verb("train", TrainSettings),
        Verb("evaluate", EvaluateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("predict", PredictSettings),
        Verb("export", ExportSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
