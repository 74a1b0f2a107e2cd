"""`corda demo --world smollm2`: what dropping components costs a real pretrained model, SmolLM2-135M.

Of every linear layer but the head a share of the components is dropped by plain SVD, ASVD, SVD with whitening (power 1/2) and
CorDA, calibrated on Python's documentation or on source code of its standard library. Measured are other windows of both.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from corda.collecting import collect_context
from corda.commands._models import load_model, load_tokenizer
from corda.commands._small_llama import texts
from corda.config import DemoSettings
from corda.context import ContextStats
from corda.targets import linear_targets, weight_of
from corda.truncation import truncations
from tenfold.claims import Study, mean_ci95
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track

MODEL = "packaged:smollm2"
DATA = "Python's documentation and source of its standard library (real, shipped with Python)"
KINDS = {"text": "documentation", "code": "code"}
LENGTH = 512
"""Tokens of a window that calibrates."""
MEASURED_LENGTH = 256
"""Tokens of a window that is measured."""
CALIBRATION = {"quick": 1, "default": 8, "full": 8}
MEASURED = {"quick": 1, "default": 3, "full": 8}
"""Windows of each kind."""
DROPS = {"quick": (25,), "default": (25,), "full": (10, 25, 40)}
"""Percentages of the components of each layer."""
SEEDS = {"quick": 1, "default": 1, "full": 1}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "half": {"power": 0.5},
    "corda": {"power": 1.0},
}
LABELS = {"svd": "plain SVD", "asvd": "ASVD", "half": "whitened SVD (power 1/2)", "corda": "CorDA (power 1)"}
CAPTION = """What dropping components of every linear layer adds to SmolLM2-135M's loss, calibrated on 8 windows of 512 tokens
of the kind that is measured. Mean over windows of 256 tokens that calibrated nothing, with its 95 % interval."""


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Calibrate, truncate, measure, decide, draw; 1 with ``--strict`` if a claim fails."""
    sys.stdout.write(f"data: {DATA}; model: {MODEL}\n")
    sys.stdout.flush()
    out, level = invocation.folder, settings.level
    study = Study(out, data=DATA, seeds=settings.seeds_of(SEEDS), level=level)
    world = World(settings, quiet=invocation.quiet)
    cases = [("svd", "text")] + [(method, kind) for method in METHODS if method != "svd" for kind in KINDS]
    ways = {method if method == "svd" else f"{method}-{kind}": (method, kind) for method, kind in cases}
    arms: dict[str, Callable[[int], dict[str, float]]] = {"whole": world.whole}
    arms |= {arm: partial(world.cut, method, kind) for arm, (method, kind) in ways.items()}
    study.over_arms(arms, show=partial(track, description="truncating and measuring", quiet=invocation.quiet))
    _decide(study, level)
    _draw(study, level)
    summary = study.finish()
    write_report(out, "corda: what is left of SmolLM2-135M", {"truncation": CAPTION})
    sys.stdout.write(f"Perplexity of windows that calibrated nothing\n\n{table(*perplexities(study, level))}\n\n")
    return show_claims(summary, strict=invocation.strict)


class World:
    """The model, its windows and its statistics, made when they are first needed.

    Args:
        settings: settings of the demonstration.
        quiet: whether to show no progress.
    """

    def __init__(self, settings: DemoSettings, *, quiet: bool) -> None:
        self.settings = settings
        self.quiet = quiet
        self._stats: dict[tuple[str, int], ContextStats] = {}

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any]:
        """The model and its tokenizer."""
        return load()

    def unseen(self, kind: str, seed: int) -> Tensor:
        """Windows of a kind that are measured."""
        return windows(self.loaded[1], kind, "measured", MEASURED[self.settings.level], seed)[:, :MEASURED_LENGTH]

    def stats(self, kind: str, seed: int) -> ContextStats:
        """Statistics of other windows of that kind."""
        if (kind, seed) not in self._stats:
            model, tokenizer = self.loaded
            rows = windows(tokenizer, kind, "calibration", CALIBRATION[self.settings.level], seed)
            shown = track(list(rows[:, None]), f"calibrating on {KINDS[kind]}", quiet=self.quiet)
            self._stats[kind, seed] = collect_context(model, shown)
        return self._stats[kind, seed]

    def whole(self, seed: int) -> dict[str, float]:
        """Loss of the whole model on each window."""
        return {
            f"{kind} loss {i}": loss
            for kind in KINDS
            for i, loss in enumerate(losses(self.loaded[0], self.unseen(kind, seed)))
        }

    def cut(self, method: str, kind: str, seed: int) -> dict[str, float]:
        """Loss of the model on each window after each truncation in one way, calibrated on one kind."""
        drops = DROPS[self.settings.level]
        how = METHODS[method] | ({"alpha": self.settings.asvd_alpha} if method == "asvd" else {})
        found: dict[str, float] = {}
        for drop, cut in zip(drops, truncated(self.loaded[0], self.stats(kind, seed), drops, how), strict=True):
            for measured in KINDS:
                values = losses(cut, self.unseen(measured, seed))
                found |= {f"{measured} loss {drop} {i}": loss for i, loss in enumerate(values)}
        return found


def load() -> tuple[nn.Module, Any]:
    """The model and its tokenizer."""
    model: nn.Module = load_model(MODEL, "cpu")
    return model.float(), load_tokenizer(MODEL)


def windows(tokenizer: Any, kind: str, part: str, count: int, seed: int) -> Tensor:
    """Windows (count, LENGTH) of tokens at random places of one part of a text."""
    text, generator = texts(kind)[part], torch.Generator().manual_seed(seed)
    piece = min(len(text) // 2, 8 * LENGTH)  # characters, more than enough
    starts = torch.randint(len(text) - piece, (count,), generator=generator).tolist()
    rows = [torch.tensor(tokenizer(text[start : start + piece])["input_ids"][:LENGTH]) for start in starts]
    length = min(map(len, rows))
    return torch.stack([row[:length] for row in rows])


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor) -> list[float]:
    """Loss (nats per token) of each window."""
    found = []
    for row in rows:
        output: Any = model(input_ids=row[None], use_cache=False)
        found.append(F.cross_entropy(output.logits[0, :-1].float(), row[1:]).item())
    return found


def truncated(model: nn.Module, stats: ContextStats, drops: Sequence[int], how: Mapping[str, Any]) -> Any:
    """The model without each of these shares (%) of the components; one copy, changed from one to the next."""
    cut = copy.deepcopy(model)
    weights = {}
    for name in linear_targets(model):
        W = weight_of(model, name)
        numbers = [int(drop * min(W.shape) / 100) for drop in drops]
        weights[name] = truncations(W, stats.covariance(name), numbers, **how)
    for index in range(len(drops)):
        with torch.no_grad():
            for name, found in weights.items():
                weight_of(cut, name).copy_(found[index])
        yield cut


def _added(study: Study, arm: str, kind: str, drop: int, count: int) -> NDArray[np.float64]:
    """What truncation adds to the loss of each measured window, of all seeds."""
    cut, whole = (
        np.concatenate([study.values((name, f"{kind} loss {place}{i}")) for i in range(count)])
        for name, place in ((arm, f"{drop} "), ("whole", ""))
    )
    return cut - whole


def _decide(study: Study, level: str) -> None:
    drop, count = 25, MEASURED[level]
    for kind, shown in KINDS.items():
        corda = _added(study, f"corda-{kind}", kind, drop, count)
        for id, arm, label in (
            (f"svd_{kind}", "svd", "plain SVD"),
            (f"asvd_{kind}", f"asvd-{kind}", "ASVD"),
            (f"mismatch_{kind}", f"corda-{'code' if kind == 'text' else 'text'}", "CorDA calibrated on the other kind"),
        ):
            estimate, ci95 = mean_ci95((_added(study, arm, kind, drop, count) - corda).tolist())
            study.claim(
                id,
                f"{drop} % of the components dropped: loss increase on {shown}, {label} minus CorDA (nats per token)",
                "difference",
                estimate,
                ci95,
                method=f"paired t over {len(corda)} windows",
                required=">= 0",
                main=id.startswith("svd"),
            )
        half = _added(study, f"half-{kind}", kind, drop, count)
        study.note(
            f"{drop} % dropped, {shown}: power 1/2 adds {half.mean():.3f} nats per token, power 1 {corda.mean():.3f}; "
            "reported, not required."
        )
        losses_ = np.concatenate([study.values(("whole", f"{kind} loss {i}")) for i in range(count)])
        study.note(f"Nothing dropped: perplexity of {shown} {np.exp(losses_.mean()):.2f}.")


def perplexities(study: Study, level: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table: perplexity of both kinds of text for each truncation, and without any."""
    drops, count = DROPS[level], MEASURED[level]

    def cell(arm: str, kind: str, place: str) -> str:
        found = np.concatenate([study.values((arm, f"{kind} loss {place}{i}")) for i in range(count)])
        return f"{np.exp(found.mean()):.4g}"

    headers = ["truncation", "calibrated on", *(f"{shown}, {drop} %" for shown in KINDS.values() for drop in drops)]
    rows = [["none", "-", *(cell("whole", kind, "") for kind in KINDS for _ in drops)]]
    for method, label in LABELS.items():
        for calibrated in ["-"] if method == "svd" else KINDS:
            arm = method if method == "svd" else f"{method}-{calibrated}"
            cells = [cell(arm, kind, f"{drop} ") for kind in KINDS for drop in drops]
            rows.append([label, KINDS.get(calibrated, calibrated), *cells])
    return headers, rows


def _draw(study: Study, level: str) -> None:
    drops, count, panels = DROPS[level], MEASURED[level], []
    for kind, shown in KINDS.items():
        curves = {}
        for method, label in LABELS.items():
            arm = method if method == "svd" else f"{method}-{kind}"
            points = [mean_ci95(_added(study, arm, kind, drop, count).tolist()) for drop in drops]
            lines = [(mean, *(ci95 or (mean, mean))) for mean, ci95 in points]
            mean, low, high = (list(part) for part in zip(*lines, strict=True))
            curves[label] = Curve(drops, mean, low, high)
        labels = ("components dropped in every layer (%)", "loss increase (nats per token)")
        panels.append(Panel(f"{shown}, calibrated on other {shown}", *labels, curves))
    line_chart(study.run.figure("truncation"), panels)
