"""``localrecon compare``: every arm on every seed, at equal epochs."""

import dataclasses
import sys
import time
from collections.abc import Mapping
from functools import partial

from localrecon import __version__
from localrecon.arms import build_arm, first_batch, peak_bytes
from localrecon.commands._training import on_test_data, train_arm
from localrecon.config import CompareSettings, Method
from localrecon.data import Data, load_data
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation, show_claims, table
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.training import choose_device, seed_everything

MEASURED = ("accuracy", "loss", "bits", "peak MiB", "seconds")


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Measure all arms, decide the claims, and write figures, report and summary."""
    folder = invocation.folder
    arms = arms_of(settings)
    data = load_data(settings, settings)
    study = Study(
        folder,
        package="localrecon",
        version=__version__,
        command="compare",
        level="full",
        data=data.source,
        seeds=settings.seeds,
    )
    study.over_arms(
        {name: partial(measure, method, how, data, invocation.quiet) for name, (method, how) in arms.items()}
    )
    _decide(study, arms)
    study.note(
        "peak MiB is counted in one step on a copy (parameters, heads, gradients, optimizer states, batch, activations); "
        "seconds are those of the training with one process, on whatever else the machine was doing."
    )
    accuracies = {name: study.values((name, "accuracy")).tolist() for name in arms}
    arm_chart(folder.own("figures/accuracy.png"), accuracies, xlabel="test accuracy (%)")
    peaks = {name: study.values((name, "peak MiB")).tolist() for name in arms}
    arm_chart(folder.own("figures/memory.png"), peaks, xlabel="peak of live tensors in a step (MiB)")
    summary = study.finish()
    captions = {"accuracy": "Test accuracy of each arm.", "memory": "Peak bytes of live tensors in a training step."}
    write_report(folder, f"localrecon: {settings.model} on {settings.data}, methods compared", captions)
    found = summary["arms"]
    names = list(next(iter(found.values())))
    cells = [[arm, *(interval(*mean_ci95(values[name])) for name in names)] for arm, values in found.items()]
    sys.stdout.write(table(["arm", *names], cells) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def arms_of(settings: CompareSettings) -> dict[str, tuple[Method, CompareSettings]]:
    """Name of each arm -> its method and settings: local and sgr once for each number of modules."""
    arms: dict[str, tuple[Method, CompareSettings]] = {}
    for method in settings.arms:
        if method not in {"local", "sgr"}:
            arms[method] = (method, settings)
            continue
        for k in settings.ks or [settings.k]:
            arms[f"{method}-k{k}"] = (method, dataclasses.replace(settings, k=k))
    return arms


def measure(method: Method, settings: CompareSettings, data: Data, quiet: bool, seed: int) -> dict[str, float]:
    """Train one arm, and measure it on the test data once, at the end."""
    device = choose_device(settings.device)
    seed_everything(seed, device)
    arm = build_arm(
        settings,
        method,
        data.form,
        data.plain,
        seed,
        accumulate=settings.accumulate,
        feedback=settings.feedback,
    )
    peak = peak_bytes(arm, settings.optimizer, first_batch(data.plain, settings.batch_size), seed)
    start = time.perf_counter()
    train_arm(arm, settings, data, seed, quiet=quiet)
    seconds = time.perf_counter() - start
    found = on_test_data(arm.net, data, settings.batch_size, device)
    found |= {"peak MiB": peak / 2**20, "seconds": seconds}
    return {name: value for name, value in found.items() if name in MEASURED}


def _decide(study: Study, arms: Mapping[str, object]) -> None:
    for name in arms:
        plain = name.replace("sgr", "local")
        if name.startswith("sgr") and plain in arms:
            text = f"accuracy (points) of {name} minus {plain}"
            study.difference(f"{name}_accuracy", text, (name, "accuracy"), (plain, "accuracy"), required=">= 0")
        for whole in ("bp", "ckpt"):
            if name.startswith("sgr") and whole in arms:
                bound = "<= 0.5" if whole == "bp" else "<= 1.1"
                ours, theirs = (float(study.values((arm, "peak MiB")).mean()) for arm in (name, whole))
                study.claim(
                    f"{name}_{whole}_peak",
                    f"peak bytes of {name} / {whole}",
                    "ratio",
                    ours / theirs,
                    None,
                    method="counted, the same on every seed",
                    required=bound,
                )
