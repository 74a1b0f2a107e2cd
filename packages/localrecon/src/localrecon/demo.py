"""The demonstration, in five parts, on data that libraries ship.

D1: ten-layer networks on real digits: does reconciliation make modules agree, and does accuracy follow?
D2: where it fails: weak heads and a large pull, and whether ``diagnose`` says so.
D3: peak memory and time of a step, against back-propagation, checkpointing and accumulation.
D4: the same modules in two processes: bit-equal, and how much faster.
D5: a small GPT on English text: bits a byte.
"""

import copy
import math
import time
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.config import DemoSettings, HeadSpec, SGRConfig
from localrecon.diagnosis import diagnose
from localrecon.memory import MemoryProbe
from localrecon.models import convnet, gpt, mlp, vit
from localrecon.net import LocalNet
from localrecon.pipeline import PipelineTrainer
from localrecon.planning import plan_split
from localrecon.step import StepOptions, local_step
from localrecon.training import best_checkpointing, evaluate
from tenfold import datasets
from tenfold.claims import Study, interval, mean_ci95
from tenfold.cli import track
from tenfold.figures import Curve, Panel, arm_chart, line_chart
from tenfold.report import write_report
from tenfold.runs import Run

DATA = (
    f"real: handwritten digits (shipped by scikit-learn); {datasets.topics()}; memory and pipeline use random images, whose"
    " values do not matter there"
)
TRAINED_ON = 400
"""Of the 1797 digits; the other 1397 test."""
STEPS = {"quick": 10, "default": 200, "full": 200}
CONV_STEPS = {"quick": 4, "default": 100, "full": 150}
TEXT_STEPS = {"quick": 3, "default": 40, "full": 120}
SHIFT = SGRConfig()
MLP_ARMS: dict[str, tuple[int, SGRConfig]] = {
    "bp": (1, SGRConfig(lam=0)),
    "local": (10, SGRConfig(lam=0)),
    "sgr-shift": (10, SHIFT),
    "sgr-exact": (10, SGRConfig(estimator="exact")),
    "sgr-relative": (10, SGRConfig(dist="relative")),
}
CONV_ARMS: dict[str, tuple[int, SGRConfig]] = {
    "conv-bp": (1, SGRConfig(lam=0)),
    "conv-local": (6, SGRConfig(lam=0)),
    "conv-sgr": (6, SHIFT),
    "conv-relative": (6, SGRConfig(dist="relative")),
}
TEXT_ARMS: dict[str, tuple[int, SGRConfig]] = {
    "gpt-bp": (1, SGRConfig(lam=0)),
    "gpt-local-k2": (2, SGRConfig(lam=0)),
    "gpt-sgr-k2": (2, SHIFT),
    "gpt-local-k4": (4, SGRConfig(lam=0)),
    "gpt-sgr-k4": (4, SHIFT),
}
LABELS = {
    "bp": "back-propagation",
    "local": "local, no reconciliation",
    "sgr-shift": "SGR, shift",
    "sgr-exact": "SGR, exact",
    "sgr-relative": "SGR, relative distance",
}
LABELS |= {"conv-bp": LABELS["bp"], "conv-local": LABELS["local"], "conv-sgr": LABELS["sgr-shift"]}
LABELS["conv-relative"] = LABELS["sgr-relative"]
WINDOW = 64
TEXT_GAP = 0.5
"""Bits a byte that local learning of four modules may lie behind back-propagation."""


@cache
def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, 8, 8) in [0, 1], and labels."""
    train, test = datasets.digits(seed, test_share=1 - TRAINED_ON / 1797)
    images = [torch.from_numpy(part.images.copy()).float()[:, None] / 255 for part in (train, test)]
    labels = [torch.from_numpy(part.labels) for part in (train, test)]
    return images[0], labels[0], images[1], labels[1]


def fit(
    net: LocalNet, draw: Any, steps: int, sgr: SGRConfig, seed: int, lr: float = 3e-3, decay: float = 1e-4
) -> list[float]:
    """Train with AdamW and a cosine to 0 on the batches that ``draw`` gives; the losses of the last head."""
    net.train()
    optimizers = [torch.optim.AdamW(net.parameters_of(k), lr=lr, weight_decay=decay) for k in range(net.k)]
    cosine = partial(_cosine, steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, cosine) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        inputs, labels = draw(generator)
        options = StepOptions(step=step, total_steps=steps, seed=seed)
        losses.append(local_step(net, inputs, labels, optimizers, sgr, options).losses[-1])
        for scheduler in schedulers:
            scheduler.step()
    return losses


def _cosine(steps: int, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _digits_arm(model: nn.Module, k: int, sgr: SGRConfig, head: HeadSpec, seed: int, steps: int) -> dict[str, float]:
    """Train one arm on digits; accuracies on the test digits, what the modules want on the training digits."""
    x, y, test_x, test_y = digits(seed)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (64,), generator=generator)
        return x[rows], y[rows]

    plan = plan_split(model, x[:64], k=k, balance="blocks", measure=False)
    torch.manual_seed(seed)
    net = LocalNet(model, plan, head)
    fit(net, draw, steps, sgr, seed)
    found = evaluate(net, [(test_x, test_y)])
    report = diagnose(net, x, y)
    values = {
        "accuracy": found["accuracy"],
        "first head": found["accuracy 1"],
        "alignment with bp": report.bp_alignment,
    }
    if k > 1:
        cosines = [boundary.cosine for boundary in report.boundaries]
        values["boundary cosine"] = sum(cosines) / len(cosines)
        values["flagged"] = float(any("copy" in warning for warning in report.warnings))
        values |= {f"head {i}": found[f"accuracy {i}"] for i in range(1, k + 1)}
    return values


def digits_parts(settings: DemoSettings, seed: int, quiet: bool) -> dict[str, dict[str, float]]:
    """D1 and D2."""
    out = {}
    arms = MLP_ARMS if settings.level == "full" else {n: a for n, a in MLP_ARMS.items() if n != "sgr-relative"}
    for name, (k, sgr) in track(arms.items(), f"seed {seed}: ten-layer networks on digits", quiet=quiet):
        torch.manual_seed(seed)
        model = mlp(64, 10)
        out[name] = _digits_arm(model, k, sgr, HeadSpec(), seed, STEPS[settings.level])
    for name, (k, sgr) in track(CONV_ARMS.items(), f"seed {seed}: convolutions with weak heads", quiet=quiet):
        torch.manual_seed(seed)
        model = convnet(1, 10, width=16, depth=6)
        out[name] = _digits_arm(model, k, sgr, HeadSpec(kind="gap_linear"), seed, CONV_STEPS[settings.level])
    return out


MEMORY_ARMS: dict[str, tuple[str, SGRConfig]] = {
    "bp": ("whole", SGRConfig(lam=0)),
    "ckpt": ("ckpt", SGRConfig(lam=0)),
    "accum": ("accum", SGRConfig(lam=0)),
    "local": ("split", SGRConfig(lam=0)),
    "sgr": ("split", SGRConfig(ramp=0)),
    "sgr, every 4": ("split", SGRConfig(ramp=0, every=4)),
    "sgr, exact": ("split", SGRConfig(ramp=0, estimator="exact", math_attention=True)),
}


def memory_models(small: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """The two networks of D3, and a batch for each."""
    torch.manual_seed(0)
    batch = 8 if small else 64
    images = torch.randn(batch, 3, 24, 24), torch.randn(max(2, batch // 4), 3, 96, 96)
    return {"conv": (convnet(3, 10), images[0]), "vit": (vit(3, 96, 10, depth=2 if small else 8, patch=16), images[1])}


def memory_net(model: nn.Module, x: Tensor, how: str, k: int = 4) -> tuple[LocalNet, int]:
    """The net of an arm, and the parts that it computes a batch in."""
    plan = plan_split(model, x, k=k if how == "split" else 1, measure=False)
    torch.manual_seed(0)
    net = LocalNet(model, plan).train()
    if how == "ckpt":
        net.segments[0].checkpointing = best_checkpointing(len(plan.blocks))
    return net, k if how == "accum" else 1


def memory_part(small: bool, quiet: bool) -> dict[str, dict[str, float]]:
    """D3: peak MiB of live tensors, and seconds a step (median), of every arm."""
    out: dict[str, dict[str, float]] = {}
    for kind, (model, x) in memory_models(small).items():
        labels = torch.zeros(len(x), dtype=torch.int64)
        k = 2 if small else 4
        for name, (how, sgr) in track(MEMORY_ARMS.items(), f"memory of a step, {kind}", quiet=quiet):
            net, parts = memory_net(copy.deepcopy(model), x, how, k)
            optimizers = [torch.optim.AdamW(net.parameters_of(i)) for i in range(net.k)]
            local_step(net, x, labels, optimizers, sgr, StepOptions(accumulate=parts))
            with MemoryProbe(net, optimizers, x, labels) as probe:
                local_step(net, x, labels, optimizers, sgr, StepOptions(accumulate=parts))
            seconds = []
            for step in range(2 if small else 4):
                start = time.perf_counter()
                local_step(net, x, labels, optimizers, sgr, StepOptions(step=step, accumulate=parts))
                seconds.append(time.perf_counter() - start)
            mean = sum(seconds) / len(seconds)  # of whole rounds of every=4
            out[f"{kind}: {name}"] = {"peak MiB": probe.peak_bytes / 2**20, "seconds a step": mean}
    return out


def pipeline_net() -> LocalNet:
    """The net of D4."""
    torch.manual_seed(0)
    model = convnet(3, 10, depth=12)
    plan = plan_split(model, torch.randn(32, 3, 24, 24), k=4, balance="flops", measure=False)
    return LocalNet(model, plan).train()


def pipeline_part(steps: int) -> dict[str, float]:
    """D4: two processes of one thread against one of one; equality, and how many times as fast."""
    generator = torch.Generator().manual_seed(0)
    count = steps + 3
    batches = [(torch.randn(32, 3, 24, 24, generator=generator), torch.randint(10, (32,))) for _ in range(count)]
    sgr, make = SGRConfig(ramp=0), partial(torch.optim.SGD, lr=0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = pipeline_net()
    optimizers = [make(alone.parameters_of(k)) for k in range(4)]
    took = 0.0
    for step, (x, y) in enumerate(batches):
        start = time.perf_counter()
        local_step(alone, x, y, optimizers, sgr, StepOptions(step=step))
        took += time.perf_counter() - start if step >= 3 else 0.0
    net = pipeline_net()
    with PipelineTrainer(net, make, sgr, workers=2) as trainer:
        list(trainer.steps(batches[:3]))  # starting the processes does not count
        start = time.perf_counter()
        list(trainer.steps(batches[3:]))
        piped = time.perf_counter() - start
        trainer.collect()
    torch.set_num_threads(threads)
    pairs = zip(alone.state_dict().values(), net.state_dict().values(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    return {"equal": float(equal), "times as fast": took / piped}


@cache
def text() -> tuple[Tensor, Tensor]:
    """Python's documentation as bytes; the first nine tenths train, the last tenth tests."""
    ids = torch.tensor(list(datasets.topics().text.encode()))
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def text_part(settings: DemoSettings, seed: int, quiet: bool) -> dict[str, dict[str, float]]:
    """D5: bits a byte on text that was not trained on."""
    train, test = text()
    windows = 16 if settings.level == "quick" else 128
    held = test[: windows * WINDOW + 1]
    held_x, held_y = held[:-1].view(windows, WINDOW), held[1:].view(windows, WINDOW)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(train) - WINDOW - 1, (16,), generator=generator)
        rows = train[starts[:, None] + torch.arange(WINDOW + 1)]
        return rows[:, :-1], rows[:, 1:]

    out = {}
    arms = TEXT_ARMS if settings.level == "full" else {n: a for n, a in TEXT_ARMS.items() if "k2" not in n}
    for name, (k, sgr) in track(arms.items(), f"seed {seed}: small GPTs on text", quiet=quiet):
        torch.manual_seed(seed)
        model = gpt(256, WINDOW, width=64, depth=4)
        plan = plan_split(model, held_x[:16], k=k, balance="blocks", measure=False)
        torch.manual_seed(seed)
        net = LocalNet(model, plan)
        before = evaluate(net, [(held_x, held_y)])["bits"]
        fit(net, draw, TEXT_STEPS[settings.level], sgr, seed, decay=0.01)
        out[name] = {"bits before": before, "bits a byte": evaluate(net, [(held_x, held_y)])["bits"]}
    return out


def run(settings: DemoSettings, run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Train, measure, decide; writes results, figures, ``report.html`` and the returned summary."""
    from localrecon import __version__

    counts = {"quick": 1, "default": 2, "full": 5}
    seeds = settings.seeds or list(range(counts[settings.level]))
    small = settings.level == "quick"
    head: dict[str, Any] = {"package": "localrecon", "version": __version__, "command": "demo", "data": DATA}
    study = Study(run, level=settings.level, seeds=seeds, **head)

    def measure(seed: int) -> dict[str, dict[str, float]]:
        return digits_parts(settings, seed, quiet) | text_part(settings, seed, quiet)

    study.over_seeds(measure)
    machine = Study(run, level=settings.level, seeds=seeds[:1], **head)  # the same on every seed: measured once
    machine.over_arms({"machine": lambda seed: _machine(small, quiet)})
    _decide(study, machine)
    _note(study, machine)
    _draw(study, machine, run, settings)
    summary = study.finish()
    captions = {
        "accuracy": "D1: test accuracy of ten-layer networks on 400 training digits, and how far modules agree.",
        "heads": "Accuracy of every head, from the first module to the last. Left D1; right D2, where the relative distance"
        " with weak heads makes later modules copy the first.",
        "memory": "D3: peak bytes of live tensors in a training step, all included, relative to back-propagation.",
    }
    write_report(run, "localrecon: reconciled local learning", captions)
    return summary


def _machine(small: bool, quiet: bool) -> dict[str, float]:
    found = {f"{arm} | {name}": v for arm, values in memory_part(small, quiet).items() for name, v in values.items()}
    return found if small else found | {f"pipeline | {name}": v for name, v in pipeline_part(20).items()}


def _decide(study: Study, machine: Study) -> None:
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
    fell = sum(
        int((study.values((arm, "bits a byte")) < study.values((arm, "bits before"))).sum())
        for arm in TEXT_ARMS
        if _has(study, arm)
    )
    total = len(study.seeds) * sum(_has(study, arm) for arm in TEXT_ARMS)
    text = "D5: small GPTs whose bits a byte on other text fall in training"
    study.count("text", text, fell, total, required=f">= {total}")
    text = "D5: bits a byte, SGR of four modules minus back-propagation"
    study.difference(
        "text_gap", text, ("gpt-sgr-k4", "bits a byte"), ("gpt-bp", "bits a byte"), required=f"<= {TEXT_GAP}"
    )


def _has(study: Study, arm: str) -> bool:
    try:
        study.values((arm, "bits a byte"))
    except KeyError:
        return False
    return True


def _value(machine: Study, name: str) -> float:
    return float(machine.values(("machine", name))[0])


def _note(study: Study, machine: Study) -> None:
    told = []
    for arm in MLP_ARMS:
        try:
            accuracy = study.values((arm, "accuracy"))
        except KeyError:
            continue
        told.append(f"{LABELS[arm]} {interval(*mean_ci95(accuracy.tolist()))}")
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
            f" {_value(machine, f'{kind}: {name} | seconds a step'):.3f} s"
            for name in MEMORY_ARMS
        ]
        study.note(f"D3, {kind}: {'; '.join(told)}.")
    if study.level != "quick":
        study.note(
            f"D4: two processes were {_value(machine, 'pipeline | times as fast'):.2f} times as fast as one of one thread"
            " (it takes two idle cores)."
        )
    told = []
    for arm in TEXT_ARMS:
        if _has(study, arm):
            told.append(f"{arm} {interval(*mean_ci95(study.values((arm, 'bits a byte')).tolist()))}")
    study.note(f"D5, bits a byte on other text: {'; '.join(told)}.")


def _draw(study: Study, machine: Study, run: Run, settings: DemoSettings) -> None:
    arms = [arm for arm in MLP_ARMS if settings.level == "full" or arm != "sgr-relative"]
    accuracies = {LABELS[arm]: study.values((arm, "accuracy")).tolist() for arm in arms}
    arm_chart(run.own("figures/accuracy.png"), accuracies, xlabel="test accuracy (%), digits, ten modules")
    panels = []
    for title, group, k in (
        ("plain network, 10 modules", MLP_ARMS, 10),
        ("convolutions, weak heads, 6 modules", CONV_ARMS, 6),
    ):
        curves = {}
        for arm, (modules, _) in group.items():
            if modules > 1 and arm in {*arms, *CONV_ARMS}:
                points = [mean_ci95(study.values((arm, f"head {i}")).tolist()) for i in range(1, k + 1)]
                low = [ci[0] if ci else mean for mean, ci in points]
                high = [ci[1] if ci else mean for mean, ci in points]
                curves[LABELS[arm]] = Curve(list(range(1, k + 1)), [mean for mean, _ in points], low, high)
        panels.append(Panel(title, "head", "test accuracy (%)", curves))
    line_chart(run.own("figures/heads.png"), panels)
    shares = {}
    for kind in ("conv", "vit"):
        whole = _value(machine, f"{kind}: bp | peak MiB")
        for name in MEMORY_ARMS:
            if name not in {"bp", "sgr, every 4"}:
                shares[f"{kind}: {name}"] = [100 * _value(machine, f"{kind}: {name} | peak MiB") / whole]
    arm_chart(run.own("figures/memory.png"), shares, xlabel="peak bytes, % of back-propagation's")
