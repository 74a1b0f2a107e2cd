"""The command `corda`: calibrate, initialize, allocate, verify, convert, truncate, compare, inspect, demonstrate."""

from corda.config import (
    AllocateSettings,
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    InitSettings,
    InspectSettings,
    StatsSettings,
    TruncateSettings,
    VerifySettings,
)
from tenfold.cli import App, Verb

app = App(
    "corda",
    "corda",
    "Context-oriented LoRA initialization: start an adapter from the weights and a few calibration samples.",
    (
        Verb("stats", StatsSettings),
        Verb("init", InitSettings),
        Verb("allocate", AllocateSettings),
        Verb("verify", VerifySettings, claims=True),
        Verb("convert", ConvertSettings),
        Verb("truncate", TruncateSettings),
        Verb("compare", CompareSettings, claims=True),
        Verb("inspect", InspectSettings, out=False),
        Verb("demo", DemoSettings, claims=True),
    ),
)
main = app.main
