"""What the calibration text looks like to each layer: the second moment of its inputs, kept once per shared input.

C = sum_t w_t x_t x_t^T over the tokens t that count; it is called a covariance although no mean is subtracted. The sums are
kept undamped and undivided, so they can be added over shards, tasks and ranks and serve every rank, mode, power and
damping. Where they serve only the factors of CorDA itself and a layer is wide, the cross moment
W C = sum_t w_t (W x_t) x_t^T takes the place of C: m x n numbers instead of n x n. ``collecting`` computes them.
"""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from corda.fingerprints import check_same
from corda.moments import CrossMoment
from tenfold import UserError, checkpoints
from tenfold.distributed import all_reduce_sums, world_size

METHOD = "corda.context"
T = TypeVar("T")


class TargetNotReachedError(UserError, RuntimeError):
    """A layer was targeted that the calibration never ran through."""


@dataclasses.dataclass(frozen=True)
class ContextStats:
    """Second moments of the inputs of a model's layers, by group of layers that share an input.

    Attributes:
        moments: group -> C (n, n), or W C (m, n) for a group of one layer; fp64, undamped and not divided by any count.
        tokens: group -> number of tokens that counted.
        samples: group -> number of samples (rows) that held at least one of them.
        groups: target -> group.
        scale: weight of a sample, as in ``CordaInit.scale``; part of the moments where it is ``peft``.
        fingerprint: fingerprint of the model that was calibrated.
        traces: group -> tr C, undivided, for the groups that hold W C.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> stats = collect_context(model, [torch.randn(3, 100, 4)], targets=["0", "2"])
        >>> sorted(stats.groups), stats.covariance("0").shape
        (['0', '2'], torch.Size([4, 4]))
    """

    moments: dict[str, Tensor]
    tokens: dict[str, int]
    samples: dict[str, int]
    groups: dict[str, str]
    scale: str
    fingerprint: str
    traces: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Names of the layers that these statistics cover."""
        return list(self.groups)

    def moment(self, target: str) -> Tensor | CrossMoment:
        """C of a layer, or its cross moment, whichever was summed up: what ``factorize`` takes.

        Raises:
            UserError: the layer was not calibrated.
            TargetNotReachedError: no token has reached it.
        """
        group = self.group(target)
        count = self._count(group)
        if count == 0:
            raise TargetNotReachedError(f"no token has reached layer {target}")
        moment = self.moments[group] if count == 1 else self.moments[group] / count
        return CrossMoment(moment, self.traces[group] / count) if group in self.traces else moment

    def covariance(self, target: str) -> Tensor:
        """C of a layer, (n, n) fp64: the mean over samples (``peft``), over tokens (``token_mean``), or the plain sum.

        It must not be changed: where there is nothing to divide by, it is the sum itself.

        Raises:
            UserError: the layer was not calibrated, or only its cross moment was summed up.
            TargetNotReachedError: no token has reached it.
        """
        found = self.moment(target)
        if isinstance(found, CrossMoment):
            raise UserError(f"layer {target} has a cross moment, no covariance; collect with accumulate='cov'")
        return found

    def group(self, target: str) -> str:
        """The layer under whose name the statistics of ``target`` are kept; layers of one input share one.

        Raises:
            UserError: the layer was not calibrated.
        """
        if target not in self.groups:
            raise UserError(f"no statistics of layer {target}; there are {len(self.groups)}, the first {self._first()}")
        return self.groups[target]

    def _first(self) -> str:
        return next(iter(self.groups), "none")

    def __add__(self, other: "ContextStats") -> "ContextStats":
        """Statistics of both data together. Layers share a sum there if they share one in both.

        Raises:
            UserError: the two are of different models, layers or scales, or only one of them holds cross moments.
        """
        heads = [self._head(), other._head()]
        return _united(heads, lambda name: self.moments[self.groups[name]] + other.moments[other.groups[name]])

    def reduce(self) -> "ContextStats":
        """The statistics of all ranks together, on every rank; every rank must call it, with its own share of the data.

        Sums are added, not means, so shares may differ in size. A rank whose share may miss some targets, or is empty,
        collects with ``complete=False``. Without a process group, these statistics themselves.

        Raises:
            UserError: ranks differ in model, layers, scale or kind of moments; raised on every rank.
            TargetNotReachedError: no rank has reached a target; raised on every rank.
        """
        if world_size() == 1:
            return self
        heads: list[Any] = [None] * world_size()
        dist.all_gather_object(heads, self._head())
        total = _united(heads, lambda name: all_reduce_sums({name: self.moments[self.groups[name]]})[name])
        return with_experts(
            total, [name for name in self.groups if all(head.groups[name] in head.empty for head in heads)]
        )

    def as_means(self) -> "ContextStats":
        """Each moment divided by its count, in its own memory; these statistics are used up, and hold no moments afterwards."""
        counts = {group: max(1, self._count(group)) for group in self.moments}
        moments = {group: self.moments.pop(group).div_(count) for group, count in counts.items()}
        traces = {group: trace / counts[group] for group, trace in self.traces.items() if group in counts}
        return dataclasses.replace(self, moments=moments, traces=traces, scale="none")

    def _count(self, group: str) -> int:
        return {"peft": self.samples[group], "token_mean": self.tokens[group], "none": 1}[self.scale]

    def _head(self) -> "_Head":
        empty = {name for name, moment in self.moments.items() if not self.tokens[name] and not moment.any()}
        return _Head(self.tokens, self.samples, self.groups, self.scale, self.fingerprint, self.traces, empty)

    def check_model(self, model: nn.Module) -> None:
        """Raise ``UserError`` unless these statistics were collected on this model's weights."""
        check_same("the statistics were collected", self.fingerprint, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "moments")
        header = {name: getattr(self, name) for name in names}
        checkpoints.save(path, self.moments, method=METHOD, config=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContextStats":
        """Read what ``save`` wrote.

        Raises:
            UserError: no such file, or a file that is something else.
        """
        checkpoint = checkpoints.load(path, method=METHOD)
        return cls(moments=checkpoint.tensors, **checkpoint.config)


@dataclasses.dataclass(frozen=True)
class _Head:
    """``ContextStats`` without the moments, and the groups that no token has reached."""

    tokens: dict[str, int]
    samples: dict[str, int]
    groups: dict[str, str]
    scale: str
    fingerprint: str
    traces: dict[str, float]
    empty: set[str]

    @property
    def accumulate(self) -> list[bool]:
        return [group in self.traces for group in self.groups.values()]

    @property
    def targets(self) -> list[str]:
        return list(self.groups)


def _united(heads: Sequence[_Head], moment: Callable[[str], Tensor]) -> ContextStats:
    """The sum of several statistics, where ``moment(name)`` is the summed moment of the layer ``name``.

    Layers share a sum in it if they share one in all of them; where no token has reached a layer, its zeros fit any sum.
    """
    first = heads[0]
    for name in ("fingerprint", "scale", "targets", "accumulate"):
        if any(getattr(head, name) != getattr(first, name) for head in heads):
            raise UserError(f"statistics of another {name.removesuffix('s')} cannot be added")
    leaders: dict[tuple[str | None, ...], str] = {}
    groups = {}
    for name in first.groups:
        key = tuple(None if head.groups[name] in head.empty else head.groups[name] for head in heads)
        groups[name] = leaders.setdefault((name,) if all(part is None for part in key) else key, name)

    def total(counts: str, name: str) -> Any:
        return sum(getattr(head, counts)[head.groups[name]] for head in heads)

    return ContextStats(
        moments={name: moment(name) for name in leaders.values()},
        tokens={name: total("tokens", name) for name in leaders.values()},
        samples={name: total("samples", name) for name in leaders.values()},
        groups=groups,
        scale=first.scale,
        fingerprint=first.fingerprint,
        traces={name: total("traces", name) for name in leaders.values() if first.groups[name] in first.traces},
    )


EXPERT = re.compile(r"(?<=experts\.)(?:expert_?)?\d+(?=\.)")
"""The number of an expert in a layer's name: ``experts.3``, ``experts.expert_3``."""


def with_experts(stats: ContextStats, missed: Sequence[str]) -> ContextStats:
    """Statistics where an expert that no token was routed to has the sums of its block's other experts, with a warning.

    Args:
        stats: zero for the layers that no token has reached.
        missed: names of these layers.

    Raises:
        TargetNotReachedError: one of them is no expert, or no expert of its block was reached either.
    """
    moments, tokens, samples = dict(stats.moments), dict(stats.tokens), dict(stats.samples)
    traces = dict(stats.traces)
    lost = set(missed)
    for name in missed:
        number = EXPERT.search(name)
        pattern = None if number is None else (name[: number.start()], name[number.end() :])
        others = [
            other
            for other in stats.groups
            if pattern
            and other not in lost
            and (found := EXPERT.search(other)) is not None
            and (other[: found.start()], other[found.end() :]) == pattern
        ]
        leaders = [stats.groups[other] for other in others]
        if not leaders or name in traces:  # W C is of one layer's own weight
            continue
        moments[name] = torch.stack([stats.moments[leader] for leader in leaders]).sum(dim=0)
        tokens[name] = sum(stats.tokens[leader] for leader in leaders)
        samples[name] = sum(stats.samples[leader] for leader in leaders)
    check_reached([name for name in missed if not tokens[name]])
    if missed:
        warnings.warn(
            f"no token was routed to {', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''} ({len(missed)} layers): each "
            "takes the sums of the other experts of its block",
            stacklevel=5,
        )
    return dataclasses.replace(stats, moments=moments, tokens=tokens, samples=samples, traces=traces)


def check_reached(missed: Sequence[str]) -> None:
    """Raise ``TargetNotReachedError`` if there is a layer that no token has reached."""
    if missed:
        raise TargetNotReachedError(
            f"never reached by the calibration data: {', '.join(missed)}; leave them out of target_modules or put them into "
            "exclude_modules, or calibrate on data that runs through them"
        )


def agreed(work: Callable[[], T]) -> T:
    """The outcome of work that every rank does for itself; an error on one of them is raised on all, so that none waits.

    Raises:
        UserError: another rank raised one.
        RuntimeError: another rank raised another error.
    """
    if world_size() == 1:
        return work()
    failures: list[Any] = [None] * world_size()
    try:
        outcome = work()
    except BaseException as error:
        dist.all_gather_object(failures, (isinstance(error, UserError), f"{type(error).__name__}: {error}"))
        raise
    dist.all_gather_object(failures, None)
    for rank, failure in enumerate(failures):
        if failure is not None:
            mendable, message = failure
            raise (UserError if mendable else RuntimeError)(f"rank {rank}: {message}")
    return outcome
