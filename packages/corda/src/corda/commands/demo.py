"""`corda demo`: a small Llama learns facts and English on the spot; then, what does the decomposition keep?

Truncation. A share of the components of every linear layer is dropped by plain SVD, by ASVD (which scales each input
channel by its strength) and by the context-oriented decomposition, the latter two calibrated on facts or on English. The
text that is measured was never trained on. The facts that are measured were trained on, since a fact cannot be guessed,
but they are not the ones that calibrate: this shows that a context stands for what resembles it.

Directions, on text that did not calibrate: how strongly an adapter's input side responds to it (KPM against a random LoRA
A), and how much of a layer's output energy lies along the adapted directions (IPM against PiSSA, KPM against MiLoRA).

Fine-tuning. Adapters of each start learn Python code until the loss of other code has come down to the same target: how
many of the facts are still known then, and how many steps did it take?
"""

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from corda.collecting import collect_context
from corda.commands import _pretrained
from corda.commands._finetune import ARMS, FinetuneSettings, Trajectory, attach_arm, finetune
from corda.commands._small_llama import (
    DATA,
    MEASURED_WINDOWS,
    fact_windows,
    halves,
    held_out_loss,
    losses,
    text_windows,
    texts,
    tokenizer,
    train,
)
from corda.config import CordaInit, DemoSettings
from corda.context import ContextStats
from corda.factors import output_energy
from corda.solvers import factorize
from corda.targets import linear_targets, weight_of
from corda.truncation import truncate_model
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import Invocation
from tenfold.config import Level
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import show_claims, track

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CALIBRATION_WINDOWS = {"quick": 64, "default": 128, "full": 256}
"""Windows that calibrate; 256 as in the paper."""
DROPS = {"quick": (50,), "default": (25, 50, 75), "full": (10, 25, 50, 75)}
"""Percentages of the components of each layer."""
SEEDS = {"quick": 1, "default": 1, "full": 5}
"""Number of seeds."""
STEPS = {"quick": 20, "default": 800, "full": 1200}
TASK_STEPS = {"quick": 4, "default": 300, "full": 300}
"""Steps after which fine-tuning ends if the target is not reached; on tuning seeds, all starts needed fewer than 90."""
TASK_ROWS = 4
"""Windows of code in a batch of the fine-tuning."""
TASK_WINDOWS = 32
"""Windows of held-out code, and of held-out text, that are measured along the fine-tuning."""
EVAL_EVERY = {"quick": 10, "default": 20, "full": 10}
"""Steps between measurements."""
TARGET = {"quick": 1.9, "default": 1.9, "full": 1.8}
"""Loss of held-out code (nats per character) that all starts are trained to; higher where the model is trained less."""
TASK_INIT = CordaInit(scale="token_mean")
"""Every token counts the same; on tuning seeds, IPM learned far more slowly with peft's scale, and KPM kept less."""
STARTS = {name: (arm.label, name, TASK_INIT) for name, arm in ARMS.items()} | {
    "ipm-balanced": ("CorDA-IPM, balanced", "corda-ipm", dataclasses.replace(TASK_INIT, balance="balanced"))
}
"""Name -> label, arm and settings."""
RATES = {
    "lora": 1e-2,
    "pissa": 3e-3,
    "milora": 1e-2,
    "corda-kpm": 3e-3,
    "corda-ipm": 3e-3,
    "ipm-balanced": 3e-3,
}
"""Of 1e-3, 3e-3 and 1e-2 (and 3e-2 where 1e-2 was best), the one with the fewest steps to the full level's target:
geometric mean over seeds 100 to 102."""
COMMON_RATE = 3e-3
"""The best rate over all starts together."""
RATE_NAMES = {"tuned": "each with its best learning rate", "common": f"both with the best common rate, {COMMON_RATE:g}"}
RATE_KINDS = {"quick": ("tuned", "common"), "default": ("common",), "full": ("tuned", "common")}
METHODS: dict[str, dict[str, Any]] = {"asvd": {"method": "asvd"}, "half": {"power": 0.5}, "corda": {"power": 1.0}}
CAPTION = """What dropping components adds to the loss, calibrated on text of the kind that is measured, but not on the same
text. Mean over seeds (of logarithms where the axis is logarithmic), with its 95 % interval from three seeds on."""
TASK_CAPTION = """Adapters learn Python code (at the full level each start with the learning rate that is best for it); the
curves end at the loss that all are trained to. Left: facts still known when the loss of other code has come down so far
(higher is better). Right: steps until then (lower is better). Means over seeds, with their 95 % intervals from three
seeds on; those at the end are in the table too."""
LABELS = {"svd": "plain SVD", "asvd": "ASVD", "half": "CO-SVD, power 1/2", "corda": "CO-SVD, power 1 (CorDA)"}
COMPARISONS = {
    "gain KPM / random": (True, "unseen text drives KPM's A less than a random LoRA A"),
    "energy IPM / PiSSA": (False, "IPM's directions carry more of unseen text's output energy than PiSSA's"),
    "energy KPM / MiLoRA": (True, "KPM's directions carry less of unseen text's output energy than MiLoRA's"),
}
"""Ratio -> whether the method promises it below 1 (else above), in words."""


def contexts(
    model: nn.Module,
    facts: dict[str, list[str]],
    part: str,
    windows: int,
    init: CordaInit,
    seed: int,
    other: Literal["text", "code"] = "text",
) -> dict[str, ContextStats]:
    """Statistics of one part of the facts and of the text or code."""
    generator = torch.Generator().manual_seed(seed)
    read = {"facts": fact_windows(facts[part], windows, generator)}
    read[other] = text_windows(other, part, windows, generator)
    return {
        kind: collect_context(model, [{"input_ids": ids} for ids in torch.split(rows, 16)], init=init)
        for kind, rows in read.items()
    }


def truncation(
    model: nn.Module,
    facts: Sequence[str],
    stats: dict[str, ContextStats],
    drops: Sequence[int],
    alpha: float,
    *,
    quiet: bool = False,
) -> dict[str, dict[str, float]]:
    """Losses of the whole model, and what dropping shares of the components adds to them in each arm."""
    whole = losses(model, facts)
    arms: dict[str, dict[str, float]] = {"whole": whole}
    calibrated = [(f"{name}-{kind}", stats[kind], method) for name, method in METHODS.items() for kind in stats]
    cases: list[tuple[str, ContextStats, dict[str, Any]]] = [("svd", stats["facts"], {"method": "svd"}), *calibrated]
    for arm, calibration, method in track(cases, "truncating it in all ways", quiet=quiet):
        arms[arm] = {}
        for drop in drops:
            cut = copy.deepcopy(model)
            truncate_model(cut, calibration, drop / 100, alpha=alpha, **method)
            found = losses(cut, facts)
            for kind in stats:
                arms[arm][f"{kind} +loss {drop}"] = found[f"{kind} loss"] - whole[f"{kind} loss"]
            arms[arm][f"facts known {drop}"] = found["facts known"]
    return arms


def directions(
    model: nn.Module, calibrated: ContextStats, measured: ContextStats, rank: int, seed: int
) -> dict[str, float]:
    """How the adapted directions of each layer respond to X that did not calibrate, against plain ones.

    Gain g(A) = |A X| / (|A| |X|); output energy e(U) = |U^T W X|^2 / |W X|^2. For each comparison, the geometric mean of
    the ratio over the layers, and the number of layers where it is on the side that the method promises.
    """
    generator = torch.Generator().manual_seed(seed)
    logs: dict[str, list[float]] = {name: [] for name in COMPARISONS}
    for name in linear_targets(model):
        W, C, XX = weight_of(model, name), calibrated.covariance(name), measured.covariance(name)
        ipm, pissa, kpm, milora = (
            factorize(W, C, rank, CordaInit(mode=mode, power=power)) for mode in ("ipm", "kpm") for power in (1.0, 0.0)
        )
        random = torch.empty(rank, W.shape[1])
        nn.init.kaiming_uniform_(random, a=math.sqrt(5), generator=generator)  # as peft initializes A
        values = [(gain(kpm.A, XX), gain(random, XX))]
        values += [
            (output_energy(W, XX, ours.left), output_energy(W, XX, plain.left))
            for ours, plain in ((ipm, pissa), (kpm, milora))
        ]
        for found, (ours, plain) in zip(logs.values(), values, strict=True):
            found.append(math.log(ours / plain))
    ratios = {name: math.exp(sum(found) / len(found)) for name, found in logs.items()}
    promised = {name: -1 if below else 1 for name, (below, _) in COMPARISONS.items()}
    counts = {f"layers, {name}": sum(promised[name] * log > 0 for log in found) for name, found in logs.items()}
    return ratios | counts | {"layers": len(linear_targets(model))}


def gain(A: Tensor, XX: Tensor) -> float:
    """|A X| / (|A| |X|) in Frobenius norms, from X X^T."""
    A = A.double()
    return math.sqrt(((A @ XX) * A).sum().item() / (A.square().sum() * XX.trace()).item())


def fine_tuning(
    model: nn.Module,
    facts: Sequence[str],
    stats: dict[str, ContextStats],
    settings: DemoSettings,
    seed: int,
    *,
    quiet: bool = False,
) -> dict[str, dict[str, float]]:
    """Adapters of all starts learn code; for each, what it costs to bring the loss of other code down to the target.

    The facts' statistics stand for what is to be kept, those of the training part of the code for what is to be learned.
    Arms with the learning rate that is best for each are named ``tuned-NAME``, those with one for all ``common-NAME``,
    which is all that the default level has time for.
    """
    from peft import LoraConfig

    level = settings.level
    rows = text_windows("code", "calibration", TASK_STEPS[level] * TASK_ROWS, torch.Generator().manual_seed(seed))
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.split(rows, TASK_ROWS)]
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear", task_type="CAUSAL_LM")

    def evaluate(adapted: nn.Module) -> dict[str, float]:
        return {"loss": held_out_loss(adapted, "code", TASK_WINDOWS), **losses(adapted, facts, TASK_WINDOWS)}

    found: dict[tuple[str, float], dict[str, float]] = {}
    runs = list(dict.fromkeys(fine_tuned(level).values()))
    for name, rate in track(runs, "fine-tuning on code from all starts", quiet=quiet):
        _, arm, init = STARTS[name]
        torch.manual_seed(seed)
        adapted = attach_arm(arm, copy.deepcopy(model), lora, keep=stats["facts"], learn=stats["code"], init=init)
        how = FinetuneSettings(
            learning_rate=rate, steps=TASK_STEPS[level], validate_every=EVAL_EVERY[level], target_loss=TARGET[level]
        )
        found[name, rate] = price(finetune(adapted, batches, evaluate, how), TARGET[level])
    return {arm: found[case] for arm, case in fine_tuned(level).items()}


def fine_tuned(level: str) -> dict[str, tuple[str, float]]:
    """Arm of the fine-tuning -> its start and learning rate; two arms with both the same are one training."""
    rates = {"tuned": RATES, "common": dict.fromkeys(STARTS, COMMON_RATE)}
    return {f"{kind}-{name}": (name, rates[kind][name]) for kind in RATE_KINDS[level] for name in STARTS}


def levels(target: float) -> list[float]:
    """Losses on the way to the target at which facts and steps are counted, from the highest to the target itself."""
    return [target + tenths / 20 for tenths in range(6, -1, -1)]


def price(trajectory: Trajectory, target: float) -> dict[str, float]:
    """Steps, facts and text at the target, how many facts are lost by then, and facts and steps on the way there.

    Where a loss was not reached the last evaluation stands for it; if that is the target, ``reached`` is 0.
    """
    last = {"step": float(trajectory.steps[-1]), **{name: values[-1] for name, values in trajectory.metrics.items()}}
    end = trajectory.at(target) or last
    found = {
        "reached": float(trajectory.at(target) is not None),
        "steps": end["step"],
        "code loss": end["loss"],
        **{name: end[name] for name in ("facts known", "facts loss", "text loss")},
        "facts lost": trajectory.metrics["facts known"][0] - end["facts known"],
    }
    for level in levels(target):
        there = trajectory.at(level) or last
        found |= {f"facts known at {level:.2f}": there["facts known"], f"steps to {level:.2f}": there["step"]}
    return found


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, measure, decide, draw; 1 with ``--strict`` if a claim fails."""
    if settings.world == "smollm2":
        return _pretrained.run(settings, invocation)
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    out, level = invocation.folder, settings.level
    study = Study(out, data=DATA, seeds=settings.seeds_of(SEEDS), level=level)
    study.over_seeds(partial(measure, settings, out, invocation.quiet))
    _decide(study, level)
    _note(study, level)
    _draw(study, level)
    _draw_fine_tuning(study, level)
    summary = study.finish()
    captions = {"truncation": CAPTION, "fine-tuning": TASK_CAPTION}
    write_report(out, "corda: what the decomposition keeps, and what its adapters do", captions)
    return show_claims(summary, strict=invocation.strict)


def measure(settings: DemoSettings, out: Run, quiet: bool, seed: int) -> dict[str, dict[str, float]]:
    """Train the small Llama of a seed and measure all arms on it; the first seed's model is saved."""
    level = settings.level
    facts = halves(settings.facts, seed)
    model = train(facts, seed, settings.steps or STEPS[level], quiet=quiet)
    if seed == settings.seeds_of(SEEDS)[0]:
        _save_model(model, facts["calibration"], out)
    windows = CALIBRATION_WINDOWS[level]
    stats = contexts(model, facts, "calibration", windows, CordaInit(), seed)
    arms = truncation(model, facts["measured"], stats, DROPS[level], settings.asvd_alpha, quiet=quiet)
    unscaled = CordaInit(scale="none")
    for kind, unseen in contexts(model, facts, "measured", MEASURED_WINDOWS, unscaled, seed).items():
        arms[f"directions-{kind}"] = directions(model, stats[kind], unseen, settings.rank, seed)
    stats = contexts(model, facts, "calibration", windows, TASK_INIT, seed, "code")
    return arms | fine_tuning(model, facts["measured"], stats, settings, seed, quiet=quiet)


def _decide(study: Study, level: Level) -> None:
    known = study.values(("whole", "facts known"))
    text = "seeds whose model knows at least 90 % of the measured facts before anything is dropped"
    study.count("learned", text, int((known >= 90).sum()), len(known), required=f">= {len(known)}")
    for kind in ("facts", "text"):
        loss, other = f"{kind} +loss 50", "text" if kind == "facts" else "facts"
        arm = f"corda-{kind}"
        half = f"half of the components dropped: loss increase on {kind},"
        text = f"{half} CorDA calibrated on {kind} / plain SVD"
        study.ratio(f"svd_{kind}", text, (arm, loss), ("svd", loss), required="<= 1/3", main=True)
        text = f"{half} CorDA / ASVD, both calibrated on {kind}"
        study.ratio(f"asvd_{kind}", text, (arm, loss), (f"asvd-{kind}", loss), required="<= 1")
        text = f"{half} CorDA calibrated on {kind} / on {other}"
        study.ratio(f"matched_{kind}", text, (arm, loss), (f"corda-{other}", loss), required="<= 1")
    found = [f"directions-{kind}" for kind in ("facts", "text")]
    total = sum(int(study.values((arm, "layers")).sum()) for arm in found)
    for id, (name, (_, text)) in zip(("gain_kpm", "energy_ipm", "energy_kpm"), COMPARISONS.items(), strict=True):
        count = sum(int(study.values((arm, f"layers, {name}")).sum()) for arm in found)
        study.count(id, f"layers (both contexts, all seeds) where {text}", count, total, required=f">= {total}")
    _decide_fine_tuning(study, level)


def _decide_fine_tuning(study: Study, level: Level) -> None:
    target, seeds = TARGET[level], len(study.seeds)
    runs = {case: arm for arm, case in fine_tuned(level).items()}.values()
    reached, total = sum(int(study.values((arm, "reached")).sum()) for arm in runs), len(runs) * seeds
    text = f"fine-tunings on code (all starts, rates and seeds) that reach a loss of {target} nats per character"
    study.count("target", text, reached, total, required=f">= {total}")
    for kind in RATE_KINDS[level]:
        lora, kpm = (study.values((f"{kind}-{name}", "facts lost")) for name in ("lora", "corda-kpm"))
        lost = "0.8 times the facts (%) that LoRA loses until then, minus those that CorDA-KPM loses"
        estimate, ci95 = mean_ci95((0.8 * lora - kpm).tolist())
        method = f"paired t over {seeds} seeds" if ci95 else f"mean over {seeds} seeds"
        study.claim(
            f"kept_{kind}",
            f"{lost}, {RATE_NAMES[kind]}",
            "difference",
            estimate,
            ci95,
            method=method,
            required=">= 0",
            main=True,
        )
    for name in ("corda-ipm", "ipm-balanced"):
        text = f"steps until then, {STARTS[name][0]} / LoRA, {RATE_NAMES['common']}"
        id = f"steps_{name.replace('-', '_')}"
        study.ratio(id, text, (f"common-{name}", "steps"), ("common-lora", "steps"), required="<= 0.8")


def _note(study: Study, level: Level) -> None:
    known, facts, text = (study.values(("whole", name)).mean() for name in ("facts known", "facts loss", "text loss"))
    study.note(
        f"Nothing dropped: {known:.0f} % of the measured facts are known (loss {facts:.3f} nats per character); held-out text "
        f"has {text:.2f} nats per character (perplexity {math.exp(text):.2f}). Means over seeds."
    )
    arms = _arms("facts")
    kept = (f"{label} {study.values((arm, 'facts known 50')).mean():.0f} %" for label, arm in arms.items())
    study.note(f"Facts still known with half of the components dropped, calibrated on other facts: {', '.join(kept)}.")
    for kind in ("facts", "text"):
        loss = f"{kind} +loss 50"
        half, corda = study.values((f"half-{kind}", loss)), study.values((f"corda-{kind}", loss))
        estimate = interval(*mean_ci95((half - corda).tolist()))
        study.note(
            "At half of the components dropped, power 1/2 (which minimizes the error of the outputs) minus power 1: "
            f"{estimate} nats per character on {kind}, calibrated on {kind}; reported, not required."
        )
    rates = {"tuned": "their best learning rates", "common": f"a learning rate of {COMMON_RATE:g}"}
    for kind in RATE_KINDS[level]:
        told = []
        for name, (label, _, _) in STARTS.items():
            arm = f"{kind}-{name}"
            lost, took, text = (study.values((arm, metric)).mean() for metric in ("facts lost", "steps", "text loss"))
            told.append(f"{label} {lost:.0f} ({took:.0f} steps, text {text:.2f})")
        study.note(
            f"Percentage points of facts lost until code has a loss of {TARGET[level]}, all starts with {rates[kind]}: "
            f"{'; '.join(told)}. Means over seeds."
        )


def _arms(kind: str) -> dict[str, str]:
    """Label -> arm that is calibrated on that kind."""
    return {label: name if name == "svd" else f"{name}-{kind}" for name, label in LABELS.items()}


def _draw(study: Study, level: Level) -> None:
    drops, panels = DROPS[level], []
    for kind in ("facts", "text"):
        arms = _arms(kind)
        added = {label: [study.values((arm, f"{kind} +loss {drop}")) for drop in drops] for label, arm in arms.items()}
        log = all((values > 0).all() for rows in added.values() for values in rows)
        curves = {label: _curve(drops, rows, log) for label, rows in added.items()}
        labels = ("components dropped in every layer (%)", "loss increase (nats per character)")
        panels.append(Panel(f"{kind}, calibrated on other {kind}", *labels, curves, yscale="log" if log else "linear"))
    line_chart(study.run.figure("truncation"), panels)


def _draw_fine_tuning(study: Study, level: Level) -> None:
    losses, kind, panels = levels(TARGET[level]), RATE_KINDS[level][0], []
    for title, metric, unit in (("what is kept", "facts known at", "%"), ("how soon", "steps to", "training steps")):
        curves = {}
        for name, (label, _, _) in STARTS.items():
            rows = [study.values((f"{kind}-{name}", f"{metric} {loss:.2f}")) for loss in losses]
            curves[label] = _curve(losses, rows, log=False, within=(0, 100) if unit == "%" else (0, np.inf))
        ylabel = "facts still known (%)" if unit == "%" else unit
        panels.append(Panel(title, "loss of other code (nats per character)", ylabel, curves))
    line_chart(study.run.figure("fine-tuning"), panels)


def _curve(
    places: Sequence[float],
    rows: Sequence[NDArray[np.float64]],
    log: bool,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Curve:
    """Mean and interval over seeds at each place, cut at what can be; of the logarithms, as in the ratios, where ``log``."""
    points = [mean_ci95(np.log(values) if log else values) for values in rows]  # type: ignore[arg-type]
    lines = np.array([(mean, *(ci95 or (mean, mean))) for mean, ci95 in points]).T
    mean, low, high = (np.exp(lines) if log else lines).clip(*within).tolist()
    return Curve(places, mean, low, high)


def _save_model(model: "LlamaForCausalLM", facts: Sequence[str], run: Run) -> None:
    """A model with its tokenizer, and its calibration text, to go on with `corda stats` and `corda init`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it is one file
    with run.replacing_folder("model") as folder:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    run.write_text("facts.jsonl", "".join(json.dumps({"text": fact}) + "\n" for fact in facts))
    run.write_text("text.txt", texts("text")["calibration"])
