"""What the calibration text looks like to each layer: the second moment of its inputs, summed once per shared input.

C = sum_t w_t x_t x_t^T over the tokens t that count, "covariance" by custom although no mean is subtracted. The sums are
kept undamped and undivided, so they can be added over shards, tasks and ranks and serve every rank, mode, power and
damping. Where nothing but the factors of CorDA itself is made of them and a layer is wide, the cross moment
W C = sum_t w_t (W x_t) x_t^T takes the place of C: m x n numbers instead of n x n.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from corda.config import CordaInit
from corda.solvers import STRIP, CrossMoment, matmul_precision, mirror, products_are_full
from corda.targets import dequantises, layer_weight, linear, linear_targets, shape_of
from tenfold import NonFiniteError, UserError, checkpoints
from tenfold.distributed import all_reduce_sums, world_size

CHUNK = 8192
"""Tokens of one fp32 product, before it is added to the fp64 sum."""
METHOD = "corda.context"

Batch = Mapping[str, Any] | Tensor
Data = Iterable[Batch] | Callable[[], object]
_Part = tuple[Tensor, float]
"""Tokens (T, n), and what their products are multiplied by."""
T = TypeVar("T")


class TargetNotReachedError(UserError, RuntimeError):
    """A layer was targeted that the calibration never ran through."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call of a layer adds to its sums: ``factor`` times the matrix of these ``_lower_strips``."""

    strips: Iterable[Tensor]
    factor: float
    tokens: int
    samples: int


@dataclasses.dataclass
class _Sum:
    """The running sums of one input: C (n, n), of which the lower triangle counts, or W C (m, n) with tr C; in fp64."""

    moment: Tensor
    trace: float = 0.0
    tokens: int = 0
    samples: int = 0
    calls: int = 0
    pending: _Call | None = None
    """The latest call, until all layers that share the sum have got its input."""
    followers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Layers that share the sum -> how many calls they share."""

    def settle(self) -> None:
        """Add what is pending."""
        if self.pending is not None:
            start = 0
            for strip in self.pending.strips:
                end = strip.shape[1]
                self.moment[start:end, :end].add_(strip, alpha=self.pending.factor)
                start = end
            self.tokens += self.pending.tokens
            self.samples += self.pending.samples
            self.pending = None


@dataclasses.dataclass(frozen=True)
class ContextStats:
    """Second moments of the inputs of a model's layers, by group of layers that share an input.

    Attributes:
        moments: group -> C (n, n), or W C (m, n) of a group that is one layer; fp64, undamped and not divided by any count.
        tokens: group -> number of tokens that counted.
        samples: group -> number of samples (rows) that held at least one of them.
        groups: target -> group.
        scale: what a sample weighs, as in ``CordaInit.scale``; baked into the moments where it is ``peft``.
        fingerprint: of the model that was calibrated.
        traces: group -> tr C, undivided, of the groups that hold W C.
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
        """What ``factorize`` takes of a layer: C, or its cross moment, whichever was summed up; as for ``covariance``."""
        group = self.group(target)
        count = self._count(group)
        if count == 0:
            raise TargetNotReachedError(f"no token has reached layer {target}")
        moment = self.moments[group] if count == 1 else self.moments[group] / count
        return CrossMoment(moment, self.traces[group] / count) if group in self.traces else moment

    def covariance(self, target: str) -> Tensor:
        """C of a layer, (n, n) fp64: the mean over samples (``peft``), over tokens (``token_mean``), or the plain sum.

        Not to be written into: where there is nothing to divide by, it is the sum itself.

        Raises:
            UserError: the layer was not calibrated, or only its cross moment was summed up.
            TargetNotReachedError: no token has reached it.
        """
        found = self.moment(target)
        if isinstance(found, CrossMoment):
            raise UserError(f"layer {target} has a cross moment, no covariance; collect with accumulate='cov'")
        return found

    def group(self, target: str) -> str:
        """The layer under whose name the statistics of ``target`` are kept, which all layers of one input share.

        Raises:
            UserError: the layer was not calibrated.
        """
        if target not in self.groups:
            raise UserError(f"no statistics of layer {target}; there are {len(self.groups)}, the first {self._first()}")
        return self.groups[target]

    def _first(self) -> str:
        return next(iter(self.groups), "none")

    def __add__(self, other: "ContextStats") -> "ContextStats":
        """Statistics of both data together. Layers share a sum in them that share one in both.

        Raises:
            UserError: of another model, other layers or another scale, or one holds cross moments and the other does not.
        """
        heads = [self._head(), other._head()]
        return _united(heads, lambda name: self.moments[self.groups[name]] + other.moments[other.groups[name]])

    def reduce(self) -> "ContextStats":
        """The statistics of all ranks together, on every rank; every rank must call it, with its own share of the data.

        Sums are added, not means, so shares may differ in size. A rank whose share may miss some targets, or hold nothing
        at all, collects with ``complete=False``. Without a process group, these statistics themselves.

        Raises:
            UserError: ranks differ in model, layers, scale or kind of moments; on every rank alike.
            TargetNotReachedError: a target that no rank has reached, likewise.
        """
        if world_size() == 1:
            return self
        heads: list[Any] = [None] * world_size()
        dist.all_gather_object(heads, self._head())
        total = _united(heads, lambda name: all_reduce_sums({name: self.moments[self.groups[name]]})[name])
        _check_reached([name for name in self.groups if all(head.groups[name] in head.empty for head in heads)])
        return total

    def as_means(self) -> "ContextStats":
        """Each moment divided by its count, in its own memory: these statistics are used up, and hold none afterwards."""
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
        if fingerprint(model) != self.fingerprint:
            raise UserError("the statistics were collected on another model (names, shapes or weights differ)")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with everything in it, whole or not at all."""
        from corda import __version__

        names = (field.name for field in dataclasses.fields(self) if field.name != "moments")
        header = {name: getattr(self, name) for name in names}
        checkpoints.save(path, self.moments, method=METHOD, version=__version__, config=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContextStats":
        """Read what ``save`` wrote; a ``UserError`` names a file that is something else."""
        checkpoint = checkpoints.load(path, method=METHOD)
        return cls(moments=checkpoint.tensors, **checkpoint.config)


@dataclasses.dataclass(frozen=True)
class _Head:
    """``ContextStats`` but for the moments, with the groups whose moments no token has reached."""

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
    """The sum of several statistics; ``moment(name)`` is that of the layer ``name``.

    Layers share a sum in it that share one in all of them; where no token has reached a layer, its zeros fit any sum.
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


def _check_reached(missed: Sequence[str]) -> None:
    if missed:
        raise TargetNotReachedError(f"never reached by the calibration data: {', '.join(missed)}")


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and a strided sample of the values of a model's weights.

    Adapter weights do not count, and peft's wrapping of names neither, so a model keeps its fingerprint when an adapter
    that leaves its weights alone is attached.
    """
    digest = hashlib.sha256()
    for name, value in sorted((_plain_name(name), value) for name, value in model.state_dict().items()):
        if ".lora_" in name or not isinstance(value, Tensor):
            continue
        flat = (value.dequantize() if dequantises(value) else value).detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.float32)
        digest.update(json.dumps([name, list(value.shape), sample.tolist()]).encode())
    return digest.hexdigest()


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def agreed(work: Callable[[], T]) -> T:
    """The outcome of what every rank does for itself; an error on one of them is raised on all, so that none waits."""
    if world_size() == 1:
        return work()
    failures: list[Any] = [None] * world_size()
    try:
        outcome = work()
    except Exception as error:
        dist.all_gather_object(failures, (isinstance(error, UserError), f"{type(error).__name__}: {error}"))
        raise
    dist.all_gather_object(failures, None)
    for rank, failure in enumerate(failures):
        if failure is not None:
            mendable, message = failure
            raise (UserError if mendable else RuntimeError)(f"rank {rank}: {message}")
    return outcome


class Stop(Exception):
    """Raised inside a forward pass once the last input that is needed has been seen."""


class Collector:
    """Forward pre-hooks that sum x x^T of each target's input, once for siblings that get the very same tensor.

    Args:
        targets: name -> layer.
        init: ``accumulate``, ``scale`` and ``skip_first`` are used.
        share: False sums up every target on its own.
        reusable: False lets ``accumulate="auto"`` take cross moments.
        stops: whether a forward pass may end, by ``Stop``, with the last input that is needed.
        dry: only finds out which layers share an input.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        init: CordaInit,
        *,
        share: bool = True,
        reusable: bool = True,
        stops: bool = True,
        dry: bool = False,
    ) -> None:
        self.targets = targets
        self.init = init
        self.share = share
        self.stops = stops
        self.dry = dry
        self.cross = _cross_targets(targets, init, reusable)
        self.outputs = {name for name in self.cross if _gives_products(targets[name])}
        """Layers of ``cross`` whose own output may serve as W x."""
        self.sums: dict[str, _Sum] = {}
        self.groups: dict[str, str] = {}
        self.mask: Tensor | None = None
        self.batch = -1
        self.may_stop = False
        self._calls: Counter[str] = Counter()  # in this batch
        # parent -> the last input below it: the object itself (an address would be reused), its version, and who got it
        self._latest: dict[str, tuple[weakref.ref[Tensor], int, str]] = {}

    @contextlib.contextmanager
    def attached(self, model: nn.Module | None = None) -> Iterator[None]:
        """The hooks are on the targets inside, and gone afterwards.

        With ``model``, its passes also stop in front of the output head if all targets have been called by then.
        """
        hooks = []
        for name, layer in self.targets.items():
            if name in self.outputs:  # ahead of the user's own hooks, which may change the output
                hooks.append(layer.register_forward_hook(self._output_hook(name), with_kwargs=True, prepend=True))
            else:
                hooks.append(layer.register_forward_pre_hook(self._input_hook(name), with_kwargs=True))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module) and head not in self.targets.values():
            hooks.append(head.register_forward_pre_hook(self._before_head))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before_head(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(self._calls) == len(self.targets):
            raise Stop

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._observe(name, arguments[0] if arguments else keywords["input"])
            self._stop_if_due()

        return before

    def _output_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
            self._observe(name, arguments[0] if arguments else keywords["input"], output)
            self._stop_if_due()

        return after

    def _stop_if_due(self) -> None:
        if self.may_stop and len(self._calls) == len(self.targets):
            raise Stop

    def watch(self, model: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A hook that takes number and mask of each forward pass of a model that somebody else runs."""
        parameters = list(inspect.signature(model.forward).parameters)
        number = itertools.count()

        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = dict(zip(parameters, arguments, strict=False)) | keywords
            mask = given.get("attention_mask")
            tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
            self.batch = next(number)
            self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            if self.mask is not None and tokens is not None:  # with a cache of keys, the mask covers earlier tokens too
                self.mask = self.mask[:, -tokens.shape[1] :]

        return before

    def _observe(self, name: str, x: Tensor, output: Tensor | None = None) -> None:
        self._calls[name] += 1
        if name in self.cross:
            self.groups[name] = name
            self._add(name, x, output)
            return
        parent = name.rpartition(".")[0]
        same, version, leader = self._latest.get(parent, (lambda: None, -1, ""))
        if self.share and same() is x and version == x._version and self._joins(name, leader):
            return
        if self.groups.setdefault(name, name) != name:
            self._part(name)
        self._latest[parent] = (weakref.ref(x), x._version, name)
        self._add(name, x)

    def _joins(self, name: str, leader: str) -> bool:
        """Whether the sum of ``leader``, whose latest input this one is, is that of ``name`` too."""
        shared = self.sums[leader]
        if name not in self.groups and shared.calls == 1:
            self.groups[name] = leader
            shared.followers[name] = 0
        if name == leader or self.groups.get(name) != leader or shared.followers[name] != shared.calls - 1:
            return False
        shared.followers[name] += 1
        if all(calls == shared.calls for calls in shared.followers.values()):
            shared.settle()
        return True

    def _part(self, name: str) -> None:
        """From now on ``name`` has a sum of its own, which starts with what it has shared so far."""
        shared = self.sums[self.groups[name]]
        calls = shared.followers.pop(name)
        own = dataclasses.replace(shared, moment=shared.moment.clone(), calls=calls, followers={})
        if calls < shared.calls:
            own.pending = None
        own.settle()
        self.sums[name] = own
        self.groups[name] = name

    def _part_absent(self, leader: str) -> None:
        """Part from ``leader`` the layers that did not get its latest input."""
        shared = self.sums[leader]
        for name in [name for name, calls in shared.followers.items() if calls < shared.calls]:
            self._part(name)
        shared.settle()

    def end_of_batch(self) -> None:
        """Once each target is known to be called once a pass, a pass can stop when all have been."""
        for leader in list(self.sums):
            self._part_absent(leader)
        if self.batch == 0:
            self.may_stop = self.stops and self._calls == Counter(self.targets.keys())
        self._latest.clear()
        self._calls.clear()

    def _add(self, name: str, x: Tensor, output: Tensor | None = None) -> None:
        if name not in self.sums:
            self.sums[name] = _Sum(self._zeros(name, x.device))
        else:
            self._part_absent(name)
        found = self.sums[name]
        found.calls += 1
        if self.dry:
            return
        parts, tokens, samples = self._parts(name, x)
        if name in self.cross:
            self._add_cross(name, parts, output)
            found.tokens += tokens
            found.samples += samples
        else:
            strips, factor = self._product(name, parts)
            found.pending = _Call(list(strips) if found.followers else strips, factor, tokens, samples)
            if not found.followers:
                found.settle()

    def _zeros(self, name: str, device: torch.device) -> Tensor:
        m, n = shape_of(self.targets[name], name)
        shape = (0, 0) if self.dry else (m, n) if name in self.cross else (n, n)
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def _product(self, name: str, parts: Sequence[_Part]) -> tuple[Iterable[Tensor], float]:
        """The sum of factor x x^T as ``_lower_strips``, and a factor of it; one part's products come as they are needed."""
        if len(parts) == 1:
            rows, factor = parts[0]
            return self._finite_strips(name, rows), factor
        total: list[Tensor] = []
        for rows, factor in parts:
            strips = self._finite_strips(name, rows)
            if not total:
                total = [strip.double().mul_(factor) for strip in strips]
                continue
            for part, strip in zip(total, strips, strict=True):
                part.add_(strip, alpha=factor)
        return total, 1.0

    def _finite_strips(self, name: str, rows: Tensor) -> Iterator[Tensor]:
        squares = torch.zeros((), dtype=torch.float64, device=rows.device)
        for strip in _lower_strips(rows):
            squares += strip.diagonal(strip.shape[1] - strip.shape[0]).sum()
            yield strip
        self._check_finite(name, squares)

    def _add_cross(self, name: str, parts: Sequence[_Part], output: Tensor | None) -> None:
        """Add factor (W x) x^T and factor |x|^2; W x is the layer's ``output`` if that is given and in full precision."""
        found, W = self.sums[name], layer_weight(self.targets[name], name)
        given: Sequence[Tensor | None] = [None] * len(parts)
        if output is not None and output.dtype == W.dtype and products_are_full():
            given = _chunks(self._samples(name, output)[0])
        for (rows, factor), outputs in zip(parts, given, strict=True):
            if outputs is None:
                with matmul_precision(tf32=_is_half(rows) and _is_half(W)):
                    rows = _at_least_single(rows)
                    outputs = rows @ W.to(rows).T
            squares = rows.norm(dim=1).double().square().sum()
            self._check_finite(name, squares)
            found.trace += factor * squares.item()
            with matmul_precision(tf32=False):
                for start in range(0, len(W), STRIP):
                    strip = slice(start, start + STRIP)
                    found.moment[strip].add_(outputs[:, strip].T @ rows, alpha=factor)

    def _check_finite(self, name: str, squares: Tensor) -> None:
        if not torch.isfinite(squares):
            raise NonFiniteError(f"layer {name}, batch {self.batch}: NaN or infinity in its input")

    def _parts(self, name: str, x: Tensor) -> tuple[list[_Part], int, int]:
        """The tokens of x that count, in chunks of one factor, their number, and that of the samples.

        A sample's scale multiplies its products, not its values: those of bf16 and fp16 stay as they are, and then fp32
        holds their products exactly.
        """
        samples, count = self._samples(name, x)
        weighted = [(rows, self._factor(name, rows)) for rows in samples]
        parts = [(chunk, factor) for rows, factor in weighted for chunk in _chunks([rows])]
        return parts, sum(map(len, samples)), count

    def _factor(self, name: str, rows: Tensor) -> float:
        if self.init.scale != "peft":
            return 1.0
        top = rows.max().abs().double().item()
        if top == 0:
            raise UserError(
                f"layer {name}, batch {self.batch}: a sample whose largest input is 0; use scale token_mean"
            )
        return 1 / top**2

    def _samples(self, name: str, x: Tensor) -> tuple[list[Tensor], int]:
        """The tokens of x that count, (T, n), by sample where these have scales of their own; the number of samples."""
        x = x.detach()
        if x.ndim == 2:  # tokens of all rows in one dimension, as some models flatten them
            fits = self.mask is not None and self.mask.numel() == len(x)
            x = x.reshape(*self.mask.shape, -1) if fits and self.mask is not None else x[None]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.mask is not None:
            if self.mask.shape != keep.shape:
                raise UserError(f"layer {name}: input of {tuple(keep.shape)} tokens, mask of {tuple(self.mask.shape)}")
            keep &= self.mask.to(x.device)
        if self.init.skip_first:  # per row, counted from its first token that is not padding
            keep &= keep.cumsum(dim=1) > self.init.skip_first
        whole = bool(keep.all())
        if self.init.scale == "peft":
            samples = list(x) if whole else [row[kept] for row, kept in zip(x, keep, strict=True)]
        else:
            samples = [x.flatten(0, 1) if whole else x[keep]]
        return [rows for rows in samples if len(rows)], int(keep.any(dim=1).sum())

    def stats(self, fingerprint: str, *, complete: bool = True) -> ContextStats:
        """What has been summed up; the sums themselves, not copies. For ``complete``, see ``collect_context``."""
        missed = [name for name in self.targets if name not in self.groups]
        if complete:
            _check_reached(missed)
            if any(found.tokens == 0 for found in self.sums.values()):
                raise UserError("no token is left after masking (attention_mask, skip_first)")
        for name in missed:
            device = next((p.device for p in self.targets[name].parameters()), torch.device("cpu"))
            self.sums[name], self.groups[name] = _Sum(self._zeros(name, device)), name
        for name, found in self.sums.items():
            if name not in self.cross:
                mirror(found.moment)
        return ContextStats(
            moments={name: found.moment for name, found in self.sums.items()},
            tokens={name: found.tokens for name, found in self.sums.items()},
            samples={name: found.samples for name, found in self.sums.items()},
            groups={name: self.groups[name] for name in self.targets},
            scale=self.init.scale,
            fingerprint=fingerprint,
            traces={name: found.trace for name, found in self.sums.items() if name in self.cross},
        )


def _cross_targets(targets: Mapping[str, nn.Module], init: CordaInit, reusable: bool) -> set[str]:
    """The layers whose cross moment is summed up.

    Who shares an input shows with the first batch only. For ``auto``, all layers below one parent that have as many inputs
    count as one group: if even these have fewer outputs together, so has whichever group is among them.
    """
    if init.accumulate == "cross":
        return set(targets)
    if init.accumulate == "cov" or reusable or init.power != 1:
        return set()
    shapes = {name: (name.rpartition(".")[0], *shape_of(layer, name)) for name, layer in targets.items()}
    outputs: Counter[tuple[str, int]] = Counter()
    for parent, m, n in shapes.values():
        outputs[parent, n] += m
    return {name for name, (parent, _, n) in shapes.items() if outputs[parent, n] < n}


def _gives_products(layer: nn.Module) -> bool:
    """Whether a layer's own output may be W x, unrounded: in at least fp32, on a CPU, with no bias in it."""
    if type(layer) is not nn.Linear:
        return False
    bias: Any = layer.bias
    return bias is None and layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.float32, torch.float64)


def _chunks(samples: Iterable[Tensor]) -> list[Tensor]:
    return [rows[i : i + CHUNK] for rows in samples for i in range(0, len(rows), CHUNK)]


def _lower_strips(rows: Tensor) -> Iterator[Tensor]:
    """``rows``^T ``rows`` in at least fp32: strips of its rows, each from the first column to the end of its diagonal block.

    They hold the lower triangle, for little more than half of the work; torch has no product that is known to be symmetric.
    """
    half, rows = _is_half(rows), _at_least_single(rows)
    for start in range(0, rows.shape[1], STRIP):
        end = start + STRIP
        with matmul_precision(tf32=half):
            strip = rows[:, start:end].T @ rows[:, :end]
        yield strip


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextlib.contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; each module's own training flag afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # inference mode would hide the versions of tensors
            yield
    finally:
        for module in training:
            module.training = True


def collect_context(
    model: nn.Module,
    data: Data,
    targets: Sequence[str] | None = None,
    init: CordaInit | None = None,
    *,
    share: bool = True,
    reusable: bool = True,
    complete: bool = True,
) -> ContextStats:
    """Run the calibration data through the model and sum up the second moment of each target's input.

    The model is left as it was: hooks are removed and training flags restored, also when a forward pass raises; no
    attribute stays on any module. Targets that get the very same tensor (q, k and v; gate and up) share one sum.

    Args:
        model: any module; called as ``model(**batch)``, or ``model(batch)`` for a tensor.
        data: batches (dicts with ``input_ids`` and, for padded rows, ``attention_mask``; or plain tensors), or a
            function without arguments that runs the model itself; the ``attention_mask`` of each of its passes counts.
        targets: full names of linear layers; default: all of them but the output head.
        init: ``accumulate``, ``scale`` and ``skip_first`` are used; default ``CordaInit()``.
        share: False sums up every target on its own; the same numbers, more time and memory.
        reusable: False if nothing but factors of ``init`` will be made of them, so that ``accumulate="auto"`` may take
            cross moments, from which no covariance can be had.
        complete: False gives zeros for targets that no token has reached, instead of an error: for a rank whose share of
            the data may miss some, or is empty, before ``ContextStats.reduce``.

    Returns:
        ``ContextStats``.

    Raises:
        UserError: no batch, no token after masking, or a target that is not a linear layer.
        TargetNotReachedError: a target that no batch ran through; the message lists them.
        NonFiniteError: NaN or infinity in a layer's input, with the layer's name and the batch's index.
    """
    init = init or CordaInit()
    names = linear_targets(model) if targets is None else list(targets)
    collector = Collector({name: linear(model, name) for name in names}, init, share=share, reusable=reusable)
    batches = isinstance(data, Iterable)  # a function that runs the model would not survive a Stop
    with quiet_model(model), collector.attached(model if batches else None):
        run(model, data, collector)
    if complete and collector.batch < 0:
        raise UserError("the calibration data holds no batch")
    return collector.stats(fingerprint(model), complete=complete)


def run(model: nn.Module, data: Data, collector: Collector) -> None:
    """All forward passes over the data, under a collector's hooks."""
    if isinstance(data, Iterable):
        for batch in data:
            collector.batch += 1
            collector.mask = mask_of(batch)
            forward(model, batch)
            collector.end_of_batch()
    else:
        collector.batch = 0
        hook = model.register_forward_pre_hook(collector.watch(model), with_kwargs=True)
        try:
            data()
        finally:
            hook.remove()
        collector.end_of_batch()


def forward(model: nn.Module, batch: Batch) -> None:
    """One forward pass, as far as the last input that is needed."""
    with contextlib.suppress(Stop):
        if isinstance(batch, Mapping):
            keywords = {key: value for key, value in batch.items() if key != "labels"}
            if hasattr(getattr(model, "config", None), "use_cache"):
                keywords["use_cache"] = False
            model(**keywords)
        else:
            model(batch)


def mask_of(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are no padding, (B, T); None where the batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.ndim != 2 else mask.bool()
