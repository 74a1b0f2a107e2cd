"""The command `visctrl`: edit, invert, bank, views, inspect, evaluate, and the demonstration."""

from tenfold.cli import App, Verb
from visctrl.config import (
    BankSettings,
    CompareSettings,
    DemoSettings,
    EditSettings,
    EvaluateSettings,
    InspectSettings,
    InvertSettings,
    VideoSettings,
    ViewsSettings,
)

app = App(
    "visctrl",
    "visctrl",
    "One reference picture into another picture, with no training: iterative self-attention injection on diffusers.",
    (
        Verb("edit", EditSettings),
        Verb("invert", InvertSettings),
        Verb("bank", BankSettings),
        Verb("views", ViewsSettings),
        Verb("video", VideoSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("inspect", InspectSettings, out=False),
        Verb("evaluate", EvaluateSettings),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
