"""Which method fits into a budget of memory at the least computation: the cut alone is not the only way to save."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from localrecon.config import HeadSpec, SGRConfig
from localrecon.inputs import Inputs, samples_in
from localrecon.plan import SplitPlan
from localrecon.profiling import in_training, measured, plan_split
from localrecon.stage import has_batchnorm

PARTS = (2, 4, 8, 16)
KS = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Choice:
    """One way to take a step.

    Attributes:
        method: bp, accum, ckpt, sgr, or sgr + ckpt.
        count: parts of accum, modules of sgr; else 1.
        peak: bytes of live tensors at the peak of a step.
        cost: operations of a step, in forward passes through the model; back-propagation takes three.
        plan: the split.
        note: what the method changes besides.
    """

    method: str
    count: int
    peak: int
    cost: float
    plan: SplitPlan
    note: str = ""

    @property
    def options(self) -> str:
        """The options of ``localrecon train`` that take this way."""
        if self.method.startswith("sgr"):
            return f"--method sgr --k {self.count}{' --checkpointing true' if 'ckpt' in self.method else ''}"
        return f"--method {self.method}{f' --accumulate {self.count}' if self.method == 'accum' else ''}"


def choices(
    model: nn.Module,
    sample: Inputs,
    *,
    heads: HeadSpec | None = None,
    sgr: SGRConfig | None = None,
    optimizer_states: int | Callable[[Tensor], int] = 2,
    adapter: str = "auto",
) -> Iterator[Choice]:
    """All ways, those of the least computation first; each is measured when it is asked for.

    Back-propagation, accumulation over 2 to 16 parts, checkpoints in segments of sqrt(N) blocks, SGR of 2 to 16 modules, and
    SGR with checkpoints within its modules. Among equal computation what gives back-propagation's gradient comes first.

    Args:
        model: the model.
        sample: one batch of inputs as in training.
        heads: local heads of SGR.
        sgr: its reconciliation.
        optimizer_states: as for `plan_split`.
        adapter: how the model is taken apart.
    """
    heads, sgr = heads or HeadSpec(), sgr or SGRConfig()
    split = partial(plan_split, model, sample, adapter=adapter, heads=heads, sgr=sgr, measure=False)
    step = partial(measured, model, sample=sample, heads=heads, sgr=sgr, states=optimizer_states)

    def choice(method: str, count: int, cost: float, plan: SplitPlan, note: str, how: dict[str, Any]) -> Choice:
        with in_training(model):
            found = step(plan, **how)
        return Choice(method, count, found.predicted_peak or 0, cost, found, note)

    whole = split(k=1)
    note = "BatchNorm sees the parts" if has_batchnorm(model) else ""
    most = samples_in(sample) // (2 if note else 1)
    ways: list[tuple[str, int, float, SplitPlan, str, dict[str, Any]]] = [("bp", 1, 3.0, whole, "", {})]
    ways += [("accum", parts, 3.0, whole, note, {"accumulate": parts}) for parts in PARTS if parts <= most]
    ways.append(("ckpt", 1, 4.0, whole, "", {"checkpointing": True}))
    plans = [split(k=k) for k in KS if k <= len(whole.blocks)]
    for again in (False, True):
        how, name = {"checkpointing": again}, "sgr + ckpt" if again else "sgr"
        ways += [
            (name, p.k, _cost(p, sgr, again=again), p, "local gradients, not back-propagation's", how) for p in plans
        ]
    for way in sorted(ways, key=lambda way: way[2]):  # stable: exact gradients first
        yield choice(*way)


def _cost(plan: SplitPlan, sgr: SGRConfig, *, again: bool) -> float:
    """Forward passes of a step: 3 of each module, and 2 for a probe behind the first one, in every ``every``-th step."""
    total = max(1, sum(plan.flops))
    first = sum(plan.flops[: plan.ranges[0][1]]) / total
    probed = (1 - first) / sgr.every
    return 3 + 2 * probed + ((1 + probed) if again else 0)


def cheapest(ways: Iterator[Choice], budget: int) -> tuple[Choice | None, list[Choice]]:
    """The first that fits into so many bytes, and all that were measured on the way to it."""
    seen = []
    for way in ways:
        seen.append(way)
        if way.peak <= budget:
            return way, seen
    return None, seen
