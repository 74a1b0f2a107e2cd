"""``localrecon plan``: where a model is cut, and what a step of it needs."""

import sys

import torch

from localrecon.arms import first_batch, split_of
from localrecon.config import PlanSettings
from localrecon.data import load_data
from localrecon.models import build_model
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: PlanSettings, invocation: Invocation) -> None:
    """Write ``plan.json``, and print the modules and the predicted peak."""
    data = load_data(settings)
    torch.manual_seed(0)  # weights change neither bytes nor operations
    model = build_model(settings, data.form)
    sample, _ = first_batch(data.plain, settings.batch_size)
    plan = split_of(settings, model, sample, settings.sgr)
    invocation.folder.write_text("plan.json", plan.to_json() + "\n")
    peak = (plan.predicted_peak or 0) / 2**20
    sys.stdout.write(f"{table(*plan.rows())}\n\npredicted peak of a step of {settings.batch_size}: {peak:.1f} MiB\n")
