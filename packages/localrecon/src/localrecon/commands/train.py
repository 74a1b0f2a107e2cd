"""``localrecon train``: weights, heads, plan, metrics, figure, report and summary; exactly resumable."""

import csv
import sys

from localrecon import __version__
from localrecon.arms import build_arm
from localrecon.commands import _files
from localrecon.commands._training import on_test_data, train_arm
from localrecon.config import TrainSettings
from localrecon.data import load_data
from localrecon.net import LocalNet
from tenfold.claims import Study
from tenfold.cli import Invocation, table
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.training import choose_device, seed_everything


def run(settings: TrainSettings, invocation: Invocation) -> None:
    """Train one arm, measure it on the test data once, at the end, and write its files."""
    folder = invocation.folder
    device = choose_device(settings.device)
    seed_everything(settings.seed, device)
    data = load_data(settings, settings)
    plan = _files.read_plan(folder.path) if folder.resumed else None
    arm = build_arm(
        settings,
        settings.method,
        data.form,
        data.plain,
        settings.seed,
        accumulate=settings.accumulate,
        feedback=settings.feedback,
        plan=plan,
    )
    net = arm.net
    if isinstance(net, LocalNet) and plan is None:
        folder.write_text(_files.PLAN, net.plan.to_json() + "\n")
    train_arm(arm, settings, data, settings.seed, folder, settings, quiet=invocation.quiet)
    found = on_test_data(net, data, settings.batch_size, device)
    if isinstance(net, LocalNet) and net.plan.predicted_peak:
        found["predicted peak MiB"] = net.plan.predicted_peak / 2**20
    _files.save(net, folder, settings, __version__)
    folder.write_json(
        "config.json", {"model": settings.model, "method": settings.method, "classes": list(data.classes)}
    )
    study = Study(
        folder,
        package="localrecon",
        version=__version__,
        command="train",
        level="full",
        data=data.source,
        seeds=[settings.seed],
    )
    study.over_arms({settings.method: lambda seed: found})
    study.finish()
    captions = {"losses": "Local loss of each module, and how far neighbors agree."} if _draw(folder) else {}
    write_report(folder, f"localrecon: {settings.model} on {settings.data}", captions)
    rows = [[name, f"{value:.4g}"] for name, value in found.items()]
    sys.stdout.write(table(["measure", "value"], rows) + "\n")


def _draw(run: Run) -> bool:
    """Loss of each module and cosine at each boundary, over the steps; False where nothing was logged."""
    path = run.path / "metrics.csv"
    if not path.exists():
        return False
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    panels = []
    for title, label, prefix, suffix in (
        ("modules", "local loss", "m", "/loss"),
        ("boundaries", "cosine", "b", "/cos"),
    ):
        curves = {}
        for name in rows[0] if rows else ():
            if name.startswith(prefix) and name.endswith(suffix):
                points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
                curves[f"{'module' if prefix == 'm' else 'boundary'} {name[1:].partition('/')[0]}"] = Curve(
                    [x for x, _ in points], [y for _, y in points]
                )
        if curves:
            panels.append(Panel(title, "step", label, curves))
    if panels:
        line_chart(run.own("figures/losses.png"), panels)
    return bool(panels)
