"""The demonstration, in five parts, on data that libraries ship.

D1: ten-layer networks on real digits: does reconciliation make modules agree, and does accuracy follow?
D2: where it fails: weak heads and a large pull, and whether ``diagnose`` says so.
D3: peak memory and time of a step, against back-propagation, checkpointing and accumulation.
D4: the same modules in two processes: bit-equal, and how much faster.
D5: a small GPT on English text: bits per byte.
"""

import sys

from localrecon.commands import _learning, _machine
from localrecon.commands._learning import CONV_ARMS
from localrecon.commands._machine import MEMORY_ARMS
from localrecon.config import DemoSettings
from tenfold import datasets
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, arm_chart, line_chart
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims

DATA = (
    f"real: handwritten digits (shipped by scikit-learn); {datasets.topics()}; memory and pipeline use random images, whose"
    " values do not matter there"
)
LABELS = {
    "bp": "back-propagation",
    "local": "local, no reconciliation",
    "sgr-shift": "SGR, shift",
    "sgr-exact": "SGR, exact",
    "sgr-relative": "SGR, relative distance",
}
LABELS |= {"conv-bp": LABELS["bp"], "conv-local": LABELS["local"], "conv-sgr": LABELS["sgr-shift"]}
LABELS["conv-relative"] = LABELS["sgr-relative"]
TEXT_GAP = 0.5
"""Bits per byte that local learning of four modules may lie behind back-propagation."""


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure and decide; write results, figures, report and summary."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, quiet = invocation.folder, invocation.quiet
    seeds = settings.seeds_of({"quick": 1, "default": 2, "full": 5})
    small = settings.level == "quick"

    def measure(seed: int) -> dict[str, dict[str, float]]:
        return _learning.digits_parts(settings, seed, quiet) | _learning.text_part(settings, seed, quiet)

    study = Study(folder, data=DATA, seeds=seeds, level=settings.level)
    study.over_seeds(measure)
    # the same on every seed: measured once
    machine = Study(folder, data=DATA, seeds=seeds[:1], level=settings.level)
    machine.over_arms({"machine": lambda seed: _measure_machine(small, quiet)})
    _decide(study, machine, settings)
    _note(study, machine, settings)
    _draw(study, machine, folder, settings)
    summary = study.finish()
    captions = {
        "memory": "D3: peak bytes of live tensors in a training step, all included, relative to back-propagation.",
        "accuracy": "D1: test accuracy of ten-layer networks on 400 training digits, and how far modules agree.",
        "heads": "Accuracy of every head, from the first module to the last. Left D1; right D2, where the relative distance"
        " with weak heads makes later modules copy the first.",
    }
    write_report(folder, "localrecon: reconciled local learning", captions)
    return show_claims(summary, strict=invocation.strict)


def _measure_machine(small: bool, quiet: bool) -> dict[str, float]:
    memory = _machine.memory_part(small, quiet)
    found = {f"{arm} | {name}": v for arm, values in memory.items() for name, v in values.items()}
    return found if small else found | {f"pipeline | {name}": v for name, v in _machine.pipeline_part(20).items()}


def _decide(study: Study, machine: Study, settings: DemoSettings) -> None:
    shift, local, exact = "sgr-shift", "local", "sgr-exact"
    text = "D1: mean cosine at the boundaries, SGR (shift) minus local"
    study.difference(
        "cosine", text, (shift, "boundary cosine"), (local, "boundary cosine"), required=">= 0.15", main=True
    )
    text = "D1: cosine of all gradients with back-propagation's, SGR (shift) minus local"
    study.difference("alignment", text, (shift, "alignment with bp"), (local, "alignment with bp"), required=">= 0.08")
    text = "D1: test accuracy (points) of the last head, SGR (shift) minus local"
    study.difference("accuracy", text, (shift, "accuracy"), (local, "accuracy"), required=">= 0")
    text = "D1: test accuracy (points), shift minus exact"
    study.difference("estimators", text, (shift, "accuracy"), (exact, "accuracy"), required=">= -1")
    text = "D2, expected to fail: weak heads, relative distance of weight 1: accuracy (points) minus local"
    study.difference("collapse", text, ("conv-relative", "accuracy"), ("conv-local", "accuracy"), required="<= -5")
    flagged = int(study.values(("conv-relative", "flagged")).sum())
    text = "D2: collapsed networks that diagnose flags"
    study.count("flagged", text, flagged, len(study.seeds), required=f">= {len(study.seeds)}")
    false = int(study.values(("conv-sgr", "flagged")).sum() + study.values((shift, "flagged")).sum())
    text = "D1 and D2: networks of the default distance that diagnose flags"
    study.count("not_flagged", text, false, 2 * len(study.seeds), required="<= 0")
    for kind, bound in (("conv", "<= 0.45"), ("vit", "<= 0.5")):
        peak = {name: _value(machine, f"{kind}: {name} | peak MiB") for name in ("bp", "ckpt", "sgr")}
        for whole, required in (("bp", bound), ("ckpt", "<= 1.1")):
            text = f"D3: peak bytes of a step, {kind}: SGR (shift, 4 modules) / {whole}"
            study.claim(
                f"{kind}_{whole}",
                text,
                "ratio",
                peak["sgr"] / peak[whole],
                None,
                method="counted, the same in every run",
                required=required,
                main=True,
            )
    if study.level != "quick":  # starting processes alone takes longer than that level may
        text = "D4: weights of two processes equal those of one, bit for bit"
        study.count("pipeline", text, int(_value(machine, "pipeline | equal")), 1, required=">= 1", main=True)
    texts = _learning.text_arms(settings)
    fell = sum(int((study.values((arm, "bits per byte")) < study.values((arm, "bits before"))).sum()) for arm in texts)
    total = len(study.seeds) * len(texts)
    text = "D5: small GPTs whose bits per byte on other text fall in training"
    study.count("text", text, fell, total, required=f">= {total}")
    text = "D5: bits per byte, SGR of four modules minus back-propagation"
    study.difference(
        "text_gap", text, ("gpt-sgr-k4", "bits per byte"), ("gpt-bp", "bits per byte"), required=f"<= {TEXT_GAP}"
    )


def _value(machine: Study, name: str) -> float:
    return float(machine.values(("machine", name))[0])


def _note(study: Study, machine: Study, settings: DemoSettings) -> None:
    told = [
        f"{LABELS[arm]} {interval(*mean_ci95(study.values((arm, 'accuracy')).tolist()))}"
        for arm in _learning.mlp_arms(settings)
    ]
    study.note(f"D1, test accuracy (%): {'; '.join(told)}.")
    first = [float(study.values((arm, "first head")).mean()) for arm in ("local", "sgr-shift")]
    last = [float(study.values((arm, "accuracy")).mean()) for arm in ("local", "sgr-shift")]
    study.note(
        f"What reconciliation gains in D1: from first to last head, accuracy changes by {last[0] - first[0]:+.1f} points"
        f" without it and by {last[1] - first[1]:+.1f} with it; the first module is the same in both."
    )
    told = [f"{arm} {interval(*mean_ci95(study.values((arm, 'accuracy')).tolist()))}" for arm in CONV_ARMS]
    study.note(f"D2, test accuracy (%): {'; '.join(told)}.")
    for kind in ("conv", "vit"):
        told = [
            f"{name} {_value(machine, f'{kind}: {name} | peak MiB'):.1f} MiB"
            f" {_value(machine, f'{kind}: {name} | seconds per step'):.3f} s"
            for name in MEMORY_ARMS
        ]
        study.note(f"D3, {kind}: {'; '.join(told)}.")
    if study.level != "quick":
        study.note(
            f"D4: two processes were {_value(machine, 'pipeline | times as fast'):.2f} times as fast as one of one thread"
            " (it takes two idle cores)."
        )
    told = [
        f"{arm} {interval(*mean_ci95(study.values((arm, 'bits per byte')).tolist()))}"
        for arm in _learning.text_arms(settings)
    ]
    study.note(f"D5, bits per byte on other text: {'; '.join(told)}.")


def _draw(study: Study, machine: Study, run: Run, settings: DemoSettings) -> None:
    arms = _learning.mlp_arms(settings)
    accuracies = {LABELS[arm]: study.values((arm, "accuracy")).tolist() for arm in arms}
    arm_chart(run.figure("accuracy"), accuracies, xlabel="test accuracy (%), digits, ten modules")
    panels = []
    for title, group, k in (
        ("plain network, 10 modules", arms, 10),
        ("convolutions, weak heads, 6 modules", CONV_ARMS, 6),
    ):
        curves = {}
        for arm, (modules, _) in group.items():
            if modules > 1:
                points = [mean_ci95(study.values((arm, f"head {i}")).tolist()) for i in range(1, k + 1)]
                low = [ci[0] if ci else mean for mean, ci in points]
                high = [ci[1] if ci else mean for mean, ci in points]
                curves[LABELS[arm]] = Curve(list(range(1, k + 1)), [mean for mean, _ in points], low, high)
        panels.append(Panel(title, "head", "test accuracy (%)", curves))
    line_chart(run.figure("heads"), panels)
    shares = {}
    for kind in ("conv", "vit"):
        whole = _value(machine, f"{kind}: bp | peak MiB")
        for name in MEMORY_ARMS:
            if name not in {"bp", "sgr, every 4"}:
                shares[f"{kind}: {name}"] = [100 * _value(machine, f"{kind}: {name} | peak MiB") / whole]
    arm_chart(run.figure("memory"), shares, xlabel="peak bytes, % of back-propagation's")
