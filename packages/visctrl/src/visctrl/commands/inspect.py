"""`visctrl inspect`: what a model is made of, and what an edit with it will need."""

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import torch

from tenfold.cli import Invocation
from tenfold.terminal import table
from visctrl.commands import _work
from visctrl.config import InspectSettings
from visctrl.data import load_model
from visctrl.engine import VisCtrl
from visctrl.layers import select_layers, watching


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Call the network once on gray, and print what was seen."""
    config = settings.control
    engine = VisCtrl(load_model(settings), config)
    adapter = engine.adapter
    side = _work.longest_side(engine, settings.size)
    z = engine.encode(torch.zeros(1, 3, side, side))
    stepper = adapter.stepper(config.steps, z)
    with torch.inference_mode(), watching(adapter.model) as seen:
        adapter.network(z, adapter.model_time(stepper.timesteps[0]), _rows(engine))
    chosen = set(select_layers(config.layers, sorted(seen, key=lambda layer: layer.index)))
    rows = [
        [x.index, x.place, x.tokens, x.width, x.heads, x.kind, "yes" if x.index in chosen else "", x.name] for x in seen
    ]
    heads = ["layer", "place", "tokens", "width", "heads", "kind", "chosen", "module"]
    sys.stdout.write(table(heads, rows) + "\n\n")
    level = stepper.injected(config.start)
    numbers = sum((x.tokens or 0) * x.width for x in seen if x.index in chosen)
    branches = 2 if config.guidance_rows == "match" and engine.guidance(config) > 1 else 1
    size = torch.empty((), dtype=adapter.dtype).element_size()
    bank = numbers * size * branches * level
    fits = bank <= config.bank_bytes
    model = Path(settings.model)
    kinds = sorted({type(adapter.model.get_submodule(x.name).processor).__name__ for x in seen})
    about = [
        ["family", f"{adapter.family} ({type(adapter.model).__name__})"],
        ["scheduler", f"{type(adapter.scheduler).__name__}, {len(stepper)} of {config.steps} steps, {level} injected"],
        [
            "pictures",
            f"{side} pixels on the longest side, multiples of {adapter.multiple}; latents {list(z.shape[1:])}",
        ],
        ["number format, device", f"{str(adapter.dtype).removeprefix('torch.')}, {adapter.device}"],
        ["attention", f"{', '.join(kinds)}; backend {os.environ.get('DIFFUSERS_ATTN_BACKEND', 'native')}"],
        [
            "bank of one reference",
            f"{bank / 1e6:.2f} MB ({'kept' if fits else 'not kept'} under max_bank {config.max_bank})",
        ],
        ["license", _license(model)],
        ["versions", ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("visctrl", "diffusers", "torch"))],
    ]
    sys.stdout.write(table(["what", "value"], about) + "\n")


def _rows(engine: VisCtrl) -> dict[str, torch.Tensor]:
    told = engine.conditions("")
    return dict(engine.adapter.branches(told, 1.0)[0])


def _license(folder: Path) -> str:
    """What the model's card says."""
    card = folder / "README.md"
    if card.is_file():
        found = re.search(
            r"^license(?:_name)?:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        if found:
            return found[1]
    return "not stated beside the weights: look at where they came from"
