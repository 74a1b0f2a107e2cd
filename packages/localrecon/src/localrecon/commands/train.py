"""``localrecon train``: weights, heads, plan, metrics, figure, report and summary; exactly resumable."""

import sys
import time
from pathlib import Path

from localrecon.arms import build_arm
from localrecon.commands import _files
from localrecon.commands._training import checked_data, on_test_data, training_of
from localrecon.config import TrainSettings
from localrecon.net import LocalNet
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.devices import choose_device, seed_everything
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.runs import read_metrics
from tenfold.terminal import table


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train one arm, measure it on the test data once, at the end, and write its files."""
    start, folder, seed = time.perf_counter(), invocation.folder, settings.seed
    data = checked_data(settings)
    device = choose_device(settings.device)
    seed_everything(seed, device)
    plan = _files.read_plan(folder.path) if folder.resumed else None
    arm = build_arm(
        settings,
        settings.method,
        data.form,
        data.plain,
        seed,
        accumulate=settings.accumulate,
        feedback=settings.feedback,
        plan=plan,
    )
    training = training_of(arm, settings, data, seed, settings)
    if isinstance(arm.net, LocalNet) and plan is None:
        folder.write_text(_files.PLAN, arm.net.plan.to_json() + "\n")
    training.fit(folder, quiet=invocation.quiet)
    found = on_test_data(arm.net, data, settings.batch_size, device)
    if isinstance(arm.net, LocalNet) and arm.net.plan.predicted_peak:
        found["predicted peak MiB"] = arm.net.plan.predicted_peak / 2**20
    _files.save(arm.net, folder, settings, data.form, data.classes)
    study = Study(folder, data=data.source, seeds=[seed])
    study.record(settings.method, found)
    study.finish(time.perf_counter() - start)
    captions = {}
    metrics = folder.path / "metrics.csv"
    if metrics.exists() and (panels := _panels(metrics)):
        line_chart(folder.figure("losses"), panels)
        captions["losses"] = "Local loss of each module, and how far neighbors agree."
    write_report(folder, f"localrecon: {settings.model} on {settings.data}", captions)
    sys.stdout.write(table(["measure", "value"], [[name, f"{value:.4g}"] for name, value in found.items()]) + "\n")


def _panels(metrics: Path) -> list[Panel]:
    """Loss of each module and cosine at each boundary, over the steps."""
    panels = []
    rows = read_metrics(metrics)
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    for title, label, one, prefix, suffix in (
        ("modules", "local loss", "module", "m", "/loss"),
        ("boundaries", "cosine", "boundary", "b", "/cos"),
    ):
        curves = {}
        for name in names:
            if name.startswith(prefix) and name.endswith(suffix):
                points = [(step, values[name]) for step, values in rows if name in values]
                number = name.removeprefix(prefix).removesuffix(suffix)
                curves[f"{one} {number}"] = Curve([x for x, _ in points], [y for _, y in points])
        if curves:
            panels.append(Panel(title, "step", label, curves))
    return panels
