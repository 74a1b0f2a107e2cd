"""``localrecon compare``: every arm on every seed, at equal epochs."""

import dataclasses
import sys
import time
from functools import partial

from localrecon.arms import build_arm, first_batch, peak_bytes
from localrecon.commands._training import checked_data, on_test_data, training_of
from localrecon.config import CompareSettings, Method
from localrecon.data import Data
from tenfold import executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device, seed_everything
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table

MEASURED = ("accuracy", "loss", "bits", "peak MiB", "seconds")


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Measure all arms, decide the claims, and write figures, report and summary."""
    folder = invocation.folder
    arms = arms_of(settings)
    with executors.make(settings.executor) as executor:
        data = checked_data(settings)
        for method, how in arms.values():  # what is wrong with an arm is said before the first one is measured
            build_arm(how, method, data.form, data.plain, settings.seeds[0], feedback=how.feedback)
        study = Study(folder, data=data.source, seeds=settings.seeds)
        kept = None if executor else data  # workers read the data themselves
        quiet = invocation.quiet or executor is not None
        tasks = {name: partial(measure, method, how, kept, quiet) for name, (method, how) in arms.items()}
        study.over_arms(tasks, executor)
    _decide(study)
    study.note(
        "peak MiB is counted in one step on a copy (parameters, heads, gradients, optimizer states, batch, activations); "
        "seconds are those of the training with one process, on whatever else the machine was doing."
    )
    accuracies = {name: study.values((name, "accuracy")).tolist() for name in arms}
    arm_chart(folder.figure("accuracy"), accuracies, xlabel="test accuracy (%)")
    peaks = {name: study.values((name, "peak MiB")).tolist() for name in arms}
    arm_chart(folder.figure("memory"), peaks, xlabel="peak of live tensors in a step (MiB)")
    summary = study.finish()
    captions = {"memory": "Peak bytes of live tensors in a training step.", "accuracy": "Test accuracy of each arm."}
    write_report(folder, f"localrecon: {settings.model} on {settings.data}, methods compared", captions)
    metrics = [name for name in MEASURED if all(name in study.arms[arm] for arm in arms)]
    sys.stdout.write(table(*arm_rows(study, arms, metrics)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def arms_of(settings: CompareSettings) -> dict[str, tuple[Method, CompareSettings]]:
    """Name of each arm -> its method and settings: local and sgr once for each number of modules."""
    arms: dict[str, tuple[Method, CompareSettings]] = {}
    for method in settings.arms:
        if method not in {"local", "sgr"} or settings.budget or settings.cuts:
            arms[method] = (method, settings)
            continue
        for k in settings.ks or [settings.k]:
            arms[f"{method}-k{k}"] = (method, dataclasses.replace(settings, k=k, ks=None))
    return arms


def measure(method: Method, settings: CompareSettings, data: Data | None, quiet: bool, seed: int) -> dict[str, float]:
    """Train one arm, and measure it on the test data once, at the end.

    Args:
        method: method of the arm.
        settings: its settings.
        data: its data; None reads them.
        quiet: no progress on stderr.
        seed: seed of weights, order, augmentation and dropout.
    """
    data = data or checked_data(settings)
    device = choose_device(settings.device)
    seed_everything(seed, device)
    arm = build_arm(
        settings, method, data.form, data.plain, seed, accumulate=settings.accumulate, feedback=settings.feedback
    )
    peak = peak_bytes(arm, settings.optimizer, first_batch(data.plain, settings.batch_size), seed)
    training = training_of(arm, settings, data, seed)
    start = time.perf_counter()
    training.fit(quiet=quiet)
    seconds = time.perf_counter() - start
    found = on_test_data(arm.net, data, settings.batch_size, device)
    found |= {"peak MiB": peak / 2**20, "seconds": seconds}
    return {name: value for name, value in found.items() if name in MEASURED}


def _decide(study: Study) -> None:
    for name in study.arms:
        if not name.startswith("sgr"):
            continue
        if (plain := name.replace("sgr", "local")) in study.arms:
            study.against(plain, [name], "accuracy", text="accuracy (points) of {arm} minus {reference}")
        for whole, bound in (("bp", "<= 0.5"), ("ckpt", "<= 1.1")):
            if whole in study.arms:
                ours, theirs = (float(study.values((arm, "peak MiB")).mean()) for arm in (name, whole))
                study.claim(
                    f"{name}_{whole}_peak".replace("-", "_"),
                    f"peak bytes of {name} / {whole}",
                    "ratio",
                    ours / theirs,
                    None,
                    method="counted, the same on every seed",
                    required=bound,
                )
