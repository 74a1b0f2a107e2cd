"""`mamba-fscil compare`: methods x seeds over a whole protocol, with paired intervals."""

import sys
from functools import partial
from pathlib import Path

from mamba_fscil.commands import _pictures, _protocol
from mamba_fscil.config import CompareSettings, Method
from mamba_fscil.data import load
from tenfold import UserError, executors
from tenfold.claims import Measured, Study, arm_rows
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.figures import arm_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track


def run(settings: CompareSettings, invocation: Invocation) -> int:
    """Train the base session of each seed, then every arm on every seed; decide, draw, report."""
    folder = invocation.folder
    choose_device(settings.device)
    data = load(settings.data, settings.protocol, settings.reading, seed=settings.seeds[0])
    if not data.shots:
        raise UserError(
            f"--data {settings.data} has no sessions: set --protocol.base, --protocol.way and --protocol.shot"
        )
    for seed in settings.seeds:
        own = load(settings.data, settings.protocol, settings.reading, seed=seed)
        _protocol.shared_base(folder, f"seed-{seed}", own, settings.of_seed(seed), settings.arms, invocation.quiet)
    study = Study(folder, data=data.source, seeds=settings.seeds)
    with executors.make(settings.executor) as pool:
        where = str(folder.path.resolve())
        arms: dict[Method, partial[Measured]] = {arm: partial(measure, settings, where, arm) for arm in settings.arms}
        study.over_arms(arms, pool, partial(track, description="arms x seeds", quiet=invocation.quiet))
    reference: Method = "mamba-fscil" if "mamba-fscil" in settings.arms else settings.arms[0]
    for metric in ("harmonic", "base"):
        for arm in settings.arms:
            if arm != reference:
                id = f"{metric}_{reference}_over_{arm}".replace("-", "_")
                text = f"{metric} of {reference} - {metric} of {arm} (percentage points)"
                study.difference(id, text, (reference, metric), (arm, metric), required=">= 0", main=True)
    _pictures.draw_sessions(folder, {arm: _protocol.scores_of(study, arm) for arm in settings.arms})
    arm_chart(
        folder.figure("harmonic"), {arm: study.arms[arm]["harmonic"] for arm in settings.arms},
        xlabel="harmonic mean of base and novel accuracy (%)",
    )  # fmt: skip
    traces = _protocol.traces_of(study, settings.arms)
    captions = {
        "harmonic": "Harmonic mean of base and novel accuracy after the last session.",
        "sessions": "Accuracy over the sessions, mean over the seeds.",
    }
    if traces:
        _pictures.draw_mechanism(folder, traces)
        captions["mechanism"] = "How the scan and the gate tell base rows from novel ones, last session, first seed."
    if data.size:
        _pictures.draw_shots(folder, data)
        captions["shots"] = "Pictures that sessions learn from, first seed."
    summary = study.finish()
    write_report(folder, f"mamba-fscil compare: {settings.data}", captions)
    sys.stdout.write(table(*arm_rows(study, settings.arms, _protocol.METRICS)) + "\n\n")
    if traces:
        sys.stdout.write(table(*arm_rows(study, list(traces), _protocol.MECHANISM)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def measure(settings: CompareSettings, where: str, arm: Method, seed: int) -> Measured:
    """One arm on one seed."""
    data = load(settings.data, settings.protocol, settings.reading, seed=seed)
    path = Path(where) / "bases" / f"seed-{seed}.safetensors"
    beside = any(a in _protocol.STATIC for a in settings.arms)
    own = settings.of_seed(seed)
    return _protocol.measure(path, data, own, arm, settings.session, beside=beside, look_every=20)
