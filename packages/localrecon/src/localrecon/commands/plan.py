"""``localrecon plan``: where a model is cut, and what a step of it needs."""

import sys
from functools import partial

import torch
from torch import nn

from localrecon.arms import first_batch, split_of
from localrecon.choosing import cheapest, choices
from localrecon.config import PlanSettings
from localrecon.data import load_data
from localrecon.inputs import Inputs
from localrecon.models import build_model
from localrecon.optimizers import state_bytes
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.config import parse_bytes
from tenfold.terminal import table


def run(settings: PlanSettings, invocation: Invocation) -> None:
    """Write ``plan.json``, and print modules and predicted peak; with a budget, the method that fits into it."""
    data = load_data(settings)
    torch.manual_seed(0)  # weights change neither bytes nor operations
    model = build_model(settings, data.form)
    sample, _ = first_batch(data.plain, settings.batch_size)
    if settings.budget is not None:
        _within(settings, model, sample, invocation)
        return
    plan = split_of(settings, model, sample, settings.sgr)
    invocation.folder.write_text("plan.json", plan.to_json() + "\n")
    peak = (plan.predicted_peak or 0) / 2**20
    sys.stdout.write(f"{table(*plan.rows())}\n\npredicted peak of a step of {settings.batch_size}: {peak:.1f} MiB\n")


def _within(settings: PlanSettings, model: nn.Module, sample: Inputs, invocation: Invocation) -> None:
    """The way of the least computation that fits into the budget.

    Raises:
        UserError: none does; the message says what the least is.
    """
    assert settings.budget is not None
    limit = parse_bytes(settings.budget, "--budget")
    states = partial(state_bytes, settings.optimizer.name)
    ways = choices(
        model, sample, heads=settings.head, sgr=settings.sgr, optimizer_states=states, adapter=settings.adapter
    )
    best, seen = cheapest(ways, limit)
    if best is None:
        least = min(seen, key=lambda way: way.peak)
        raise UserError(
            f"--budget {settings.budget} is below what this model needs on this batch by any method: the least is"
            f" {least.peak / 2**20:.1f} MiB ({least.options}); take a smaller batch"
        )
    invocation.folder.write_text("plan.json", best.plan.to_json() + "\n")
    rows = [[w.method, w.count, f"{w.peak / 2**20:.1f}", f"{w.cost:.1f}", w.peak <= limit, w.note] for w in seen]
    invocation.folder.write_json(
        "choice.json", {"options": best.options, "peak": best.peak, "cost": best.cost, "note": best.note}
    )
    headers = ["method", "parts or modules", "peak MiB", "forward passes", "fits", "note"]
    sys.stdout.write(
        f"{table(headers, rows)}\n\n{table(*best.plan.rows())}\n\nthe least computation within {settings.budget}:"
        f" {best.options} (predicted peak {best.peak / 2**20:.1f} MiB)\n"
    )
