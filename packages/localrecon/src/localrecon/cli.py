"""The command `localrecon`: plan, train, evaluate, compare, diagnose, export, and the demonstration."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrecon.config import (
    CompareSettings,
    DemoSettings,
    DiagnoseSettings,
    EvaluateSettings,
    ExportSettings,
    PlanSettings,
    TrainingSettings,
    TrainSettings,
)
from tenfold.cli import App, Invocation, Verb, show_claims, table

if TYPE_CHECKING:
    from tenfold.runs import Run


def _plan(settings: PlanSettings, invocation: Invocation) -> None:
    import dataclasses

    import torch

    from localrecon.data import load_data
    from localrecon.models import build_model
    from localrecon.training import make_plan

    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    data = load_data(TrainingSettings(**fields))
    torch.manual_seed(settings.seed)
    model = build_model(settings, data.form)
    plan = make_plan(settings, model, data)
    invocation.folder.write_text("plan.json", plan.to_json() + "\n")
    peak = (plan.predicted_peak or 0) / 2**20
    sys.stdout.write(f"{plan.table()}\n\npredicted peak of a step of {settings.batch_size}: {peak:.1f} MiB\n")


def _train(settings: TrainSettings, invocation: Invocation) -> None:
    from localrecon.training import train

    found = train(settings, invocation.folder, quiet=invocation.quiet)
    sys.stdout.write(_numbers(found))


def _numbers(found: dict[str, float]) -> str:
    return table(["measure", "value"], [[name, f"{value:.4g}"] for name, value in found.items()]) + "\n"


def _evaluate(settings: EvaluateSettings, invocation: Invocation) -> None:
    from torch.utils.data import DataLoader

    from localrecon.net import LocalNet
    from localrecon.training import early_exit, load_run, test
    from tenfold import UserError
    from tenfold.training import choose_device

    net, training, data, method = load_run(Path(settings.run), settings.data, settings.device)
    found = test(net, training, data)
    if settings.threshold is not None:
        if not isinstance(net, LocalNet):
            raise UserError("early exits need a run of another method than bpfree")
        loader = DataLoader(data.test, batch_size=128)
        found |= early_exit(net, settings.threshold, loader, choose_device(settings.device))
    _summary(invocation.folder, "evaluate", data.source, method, training.seed, found)
    sys.stdout.write(_numbers(found))


def _summary(run: "Run", command: str, data: str, arm: str, seed: int, found: dict[str, float]) -> None:
    from localrecon import __version__
    from tenfold.claims import Study

    head: dict[str, Any] = {"package": "localrecon", "version": __version__, "command": command, "data": data}
    study = Study(run, level="default", seeds=[seed], **head)
    study.over_arms({arm: lambda seed: found})
    study.finish()


def _compare(settings: CompareSettings, invocation: Invocation) -> int:
    from localrecon.training import compare, rows

    summary = compare(settings, invocation.folder, quiet=invocation.quiet)
    sys.stdout.write(table(*rows(summary)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def _diagnose(settings: DiagnoseSettings, invocation: Invocation) -> None:
    from dataclasses import asdict

    from torch.utils.data import DataLoader

    from localrecon.diagnosis import diagnose
    from localrecon.net import LocalNet
    from localrecon.training import load_run
    from tenfold import UserError
    from tenfold.training import choose_device

    net, training, data, _ = load_run(Path(settings.run), settings.data, settings.device)
    if not isinstance(net, LocalNet):
        raise UserError("diagnose needs a run of another method than bpfree")
    device = choose_device(settings.device)
    inputs, labels = next(iter(DataLoader(data.plain, batch_size=settings.samples)))
    report = diagnose(net.to(device), inputs.to(device), labels.to(device), training.seed)
    invocation.folder.write_text("report.md", report.to_markdown())
    invocation.folder.write_json("diagnosis.json", asdict(report))
    sys.stdout.write(table(*report.rows()) + "\n\n" + report.to_markdown().partition("\n\n")[2])


def _export(settings: ExportSettings, invocation: Invocation) -> None:
    from safetensors.torch import save_file

    from localrecon.net import LocalNet
    from localrecon.training import load_run

    net, training, data, method = load_run(Path(settings.run), settings.data, settings.device)
    run = invocation.folder
    backbone = net.model if isinstance(net, LocalNet) else net
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.state_dict().items()}
    with run.replacing("model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    form = data.form
    about = {
        "model": training.model,
        "method": method,
        "task": form.task,
        "input": list(form.shape),
        "classes": form.classes,
    }
    run.write_json(
        "config.json", {**about, "width": training.width, "depth": training.depth, "names": list(data.classes)}
    )
    if settings.heads and isinstance(net, LocalNet):
        heads = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.heads.state_dict().items()}
        with run.replacing("heads.safetensors") as temporary:
            save_file(heads, temporary, metadata={"format": "pt"})
        run.write_text("plan.json", net.plan.to_json() + "\n")
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    sys.stdout.write(
        f"{run.path / 'model.safetensors'}: {len(tensors)} tensors, {size:.1f} MiB, under the model's own names\n"
    )


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    from localrecon import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "localrecon",
    "localrecon",
    "Train a network block by block with reconciled local losses: the activation memory of one block, not of all.",
    (
        Verb("plan", PlanSettings, _plan, "Decide where a model is cut, and predict the peak memory of a step."),
        Verb("train", TrainSettings, _train, "Train a model, block by block or by one of the baselines."),
        Verb(
            "evaluate", EvaluateSettings, _evaluate, "Measure a training on its test data, with early exits if wanted."
        ),
        Verb("compare", CompareSettings, _compare, "Train by several methods: accuracy, memory and time.", claims=True),
        Verb("diagnose", DiagnoseSettings, _diagnose, "Show what the modules of a training want of each other."),
        Verb("export", ExportSettings, _export, "Write a trained model's weights under its own key names."),
        Verb("demo", DemoSettings, _demo, "Show what reconciliation and local training do, on two cores.", claims=True),
    ),
)
main = app.main
