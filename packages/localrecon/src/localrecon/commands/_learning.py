"""Parts D1, D2 and D5 of the demonstration: what small networks learn from digits and from text."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from localrecon.boundary import StepOptions
from localrecon.config import DemoSettings, HeadSpec, OptimizerSettings, SGRConfig
from localrecon.diagnosis import diagnose
from localrecon.evaluation import evaluate
from localrecon.models import convnet, gpt, mlp
from localrecon.net import LocalNet
from localrecon.optimizers import optimizer_of, scheduler_of
from localrecon.profiling import plan_split
from localrecon.trainer import LocalTrainer
from tenfold import datasets
from tenfold.terminal import track

Arms = dict[str, tuple[int, SGRConfig]]
"""Name -> number of modules, reconciliation."""
TRAINED_ON = 400
"""Of the 1797 digits; the other 1397 test."""
STEPS = {"quick": 10, "default": 200, "full": 200}
CONV_STEPS = {"quick": 4, "default": 100, "full": 150}
TEXT_STEPS = {"quick": 3, "default": 40, "full": 120}
SHIFT = SGRConfig()
MLP_ARMS: Arms = {
    "bp": (1, SGRConfig(lam=0)),
    "local": (10, SGRConfig(lam=0)),
    "sgr-shift": (10, SHIFT),
    "sgr-exact": (10, SGRConfig(estimator="exact")),
    "sgr-relative": (10, SGRConfig(dist="relative")),
}
CONV_ARMS: Arms = {
    "conv-bp": (1, SGRConfig(lam=0)),
    "conv-local": (6, SGRConfig(lam=0)),
    "conv-sgr": (6, SHIFT),
    "conv-relative": (6, SGRConfig(dist="relative")),
}
TEXT_ARMS: Arms = {
    "gpt-bp": (1, SGRConfig(lam=0)),
    "gpt-local-k2": (2, SGRConfig(lam=0)),
    "gpt-sgr-k2": (2, SHIFT),
    "gpt-local-k4": (4, SGRConfig(lam=0)),
    "gpt-sgr-k4": (4, SHIFT),
}
WINDOW = 64


@cache
def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 1, 8, 8) in [0, 1], and labels."""
    train, test = datasets.digits(seed, test_share=1 - TRAINED_ON / 1797)
    images = [torch.from_numpy(part.images.copy()).float()[:, None] / 255 for part in (train, test)]
    labels = [torch.from_numpy(part.labels) for part in (train, test)]
    return images[0], labels[0], images[1], labels[1]


def fit(
    net: LocalNet,
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    sgr: SGRConfig,
    seed: int,
    decay: float = 1e-4,
) -> None:
    """Train with AdamW and a cosine to 0 on the batches that ``draw`` gives."""
    optimizer = OptimizerSettings(weight_decay=decay)
    scheduler = partial(scheduler_of, optimizer, steps)
    trainer = LocalTrainer(
        net, sgr, partial(optimizer_of, optimizer), scheduler, StepOptions(seed=seed, total_steps=steps)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        trainer.step(*draw(generator))


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


def mlp_arms(settings: DemoSettings) -> Arms:
    """The arms of D1 at this level."""
    return MLP_ARMS if settings.level == "full" else {n: a for n, a in MLP_ARMS.items() if n != "sgr-relative"}


def text_arms(settings: DemoSettings) -> Arms:
    """The arms of D5 at this level."""
    return TEXT_ARMS if settings.level == "full" else {n: a for n, a in TEXT_ARMS.items() if "k2" not in n}


def digits_parts(settings: DemoSettings, seed: int, quiet: bool) -> dict[str, dict[str, float]]:
    """D1 and D2."""
    out = {}
    for name, (k, sgr) in track(mlp_arms(settings).items(), f"seed {seed}: ten-layer networks on digits", quiet=quiet):
        torch.manual_seed(seed)
        model = mlp(64, 10)
        out[name] = _digits_arm(model, k, sgr, HeadSpec(), seed, STEPS[settings.level])
    for name, (k, sgr) in track(CONV_ARMS.items(), f"seed {seed}: convolutions with weak heads", quiet=quiet):
        torch.manual_seed(seed)
        model = convnet(1, 10, width=16, depth=6)
        out[name] = _digits_arm(model, k, sgr, HeadSpec(kind="gap_linear"), seed, CONV_STEPS[settings.level])
    return out


@cache
def text() -> tuple[Tensor, Tensor]:
    """Python's documentation as bytes; the first nine tenths train, the last tenth tests."""
    ids = torch.tensor(list(datasets.topics().text.encode()))
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


def text_part(settings: DemoSettings, seed: int, quiet: bool) -> dict[str, dict[str, float]]:
    """D5: bits per byte on text that was not trained on."""
    train, test = text()
    windows = 16 if settings.level == "quick" else 128
    held = test[: windows * WINDOW + 1]
    held_x, held_y = held[:-1].view(windows, WINDOW), held[1:].view(windows, WINDOW)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(train) - WINDOW - 1, (16,), generator=generator)
        rows = train[starts[:, None] + torch.arange(WINDOW + 1)]
        return rows[:, :-1], rows[:, 1:]

    out = {}
    for name, (k, sgr) in track(text_arms(settings).items(), f"seed {seed}: small GPTs on text", quiet=quiet):
        torch.manual_seed(seed)
        model = gpt(256, WINDOW, width=64, depth=4)
        plan = plan_split(model, held_x[:16], k=k, balance="blocks", measure=False)
        torch.manual_seed(seed)
        net = LocalNet(model, plan)
        before = evaluate(net, [(held_x, held_y)])["bits"]
        fit(net, draw, TEXT_STEPS[settings.level], sgr, seed, decay=0.01)
        out[name] = {"bits before": before, "bits per byte": evaluate(net, [(held_x, held_y)])["bits"]}
    return out
