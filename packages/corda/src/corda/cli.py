"""The command `corda`: calibrate, initialize, allocate, verify, convert, truncate, inspect, and the demonstration."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

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
from tenfold.cli import App, Invocation, Verb


def _call(name: str) -> Callable[[Any, Invocation], int | None]:
    return lambda settings, invocation: import_module(f"corda.commands.{name}").run(settings, invocation)


app = App(
    "corda",
    "corda",
    "Context-oriented LoRA initialization: start an adapter from the weights and a few calibration samples.",
    (
        Verb(
            "stats", StatsSettings, _call("stats"), "Run calibration text through a model and save what its layers see."
        ),
        Verb(
            "init", InitSettings, _call("init"), "Make the initial adapter and the residual model that it belongs to."
        ),
        Verb(
            "allocate", AllocateSettings, _call("allocate"), "Give each layer its rank under one budget (experimental)."
        ),
        Verb(
            "verify",
            VerifySettings,
            _call("verify"),
            "Check that an initialization starts at the base model.",
            claims=True,
        ),
        Verb(
            "convert",
            ConvertSettings,
            _call("convert"),
            "Turn a trained adapter into a plain LoRA of the untouched base.",
        ),
        Verb(
            "truncate",
            TruncateSettings,
            _call("truncate"),
            "Drop components of every layer and write the smaller model.",
        ),
        Verb("compare", CompareSettings, _call("compare"), "Fine-tune from several starts on your texts.", claims=True),
        Verb(
            "inspect",
            InspectSettings,
            _call("inspect"),
            "Show what a command wrote, or any LoRA, layer by layer.",
            out=False,
        ),
        Verb(
            "demo", DemoSettings, _call("demo"), "Train a small Llama and show what the method does to it.", claims=True
        ),
    ),
)
main = app.main
