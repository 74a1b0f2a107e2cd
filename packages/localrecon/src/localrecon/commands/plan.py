"""``localrecon plan``: where a model is cut, and what a step of it needs."""

import sys

import torch

from localrecon.arms import split_of
from localrecon.config import PlanSettings
from localrecon.data import load_data
from localrecon.models import build_model
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table


def run(settings: PlanSettings, invocation: Invocation) -> None:
    """Write ``plan.json``, and print the modules and the predicted peak."""
    choose_device(settings.device)
    data = load_data(settings)
    torch.manual_seed(0)  # weights change neither bytes nor operations
    plan = split_of(settings, build_model(settings, data.form), data.plain, settings.sgr)
    invocation.folder.write_text("plan.json", plan.to_json() + "\n")
    peak = (plan.predicted_peak or 0) / 2**20
    sys.stdout.write(f"{table(*plan.rows())}\n\npredicted peak of a step of {settings.batch_size}: {peak:.1f} MiB\n")
