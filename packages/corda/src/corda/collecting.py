"""Hooks that sum up the second moments of layers' inputs while calibration data runs through a model.

Layers that receive the very same tensor (q, k and v; gate and up) share one sum. A layer that once receives another input
than the rest, or none, has its own sum from that call on.
"""

import contextlib
import dataclasses
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.algebra import STRIP, matmul_precision, mirror, products_are_full
from corda.config import CordaInit
from corda.context import ContextStats, check_reached, fingerprint
from corda.sums import (
    Call,
    Part,
    Sum,
    at_least_single,
    check_finite,
    chunks,
    is_half,
    samples_of,
    sum_of_products,
    weight_of_sample,
)
from corda.targets import layer_weight, linear, linear_targets, shape_of
from tenfold import UserError
from tenfold.modules import evaluating

Batch = Mapping[str, Any] | Tensor
"""Keyword arguments of a model, or its one argument."""
Data = Iterable[Batch] | Callable[[], object]
"""Batches, or a function that runs the model itself."""


class Stop(Exception):
    """Raised inside a forward pass once the last input that is needed has been seen."""


class Collector:
    """Hooks that sum x x^T of each target's input, once for siblings that receive the very same tensor.

    Args:
        targets: name -> layer.
        init: ``accumulate``, ``scale`` and ``skip_first`` are used.
        share: False gives every target its own sum.
        reusable: False lets ``accumulate="auto"`` choose cross moments.
        stops: whether a forward pass may end, by ``Stop``, with the last input that is needed.
        dry: True finds out only which layers share an input.
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
        """Layers of ``cross`` whose own output can serve as W x."""
        self.sums: dict[str, Sum] = {}
        self.groups: dict[str, str] = {}
        self.mask: Tensor | None = None
        self.batch = -1
        self.may_stop = False
        self._calls: Counter[str] = Counter()  # in this batch
        # parent -> the last input below it: the object itself (an address would be reused), its version, and who got it
        self._latest: dict[str, tuple[weakref.ref[Tensor], int, str]] = {}

    @contextlib.contextmanager
    def attached(self, model: nn.Module | None = None) -> Iterator[None]:
        """Within, the hooks are on the targets.

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
        """A hook that notes number and mask of each forward pass, for a model that the user's function runs."""
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
        """Whether ``name``, which has received the latest input of ``leader``, shares its sum."""
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
        """Give ``name`` its own sum from now on, which starts with what it has shared so far."""
        shared = self.sums[self.groups[name]]
        calls = shared.followers.pop(name)
        own = dataclasses.replace(shared, moment=shared.moment.clone(), calls=calls, followers={})
        if calls < shared.calls:
            own.pending = None
        own.settle()
        self.sums[name] = own
        self.groups[name] = name

    def _part_absent(self, leader: str) -> None:
        """Part the layers that did not receive the latest input of ``leader`` from it."""
        shared = self.sums[leader]
        for name in [name for name, calls in shared.followers.items() if calls < shared.calls]:
            self._part(name)
        shared.settle()

    def end_of_batch(self) -> None:
        """Settle all sums; after the first batch, find out whether passes can stop once all targets have been called."""
        for leader in list(self.sums):
            self._part_absent(leader)
        if self.batch == 0:
            self.may_stop = self.stops and self._calls == Counter(self.targets.keys())
        self._latest.clear()
        self._calls.clear()

    def _add(self, name: str, x: Tensor, output: Tensor | None = None) -> None:
        if name not in self.sums:
            self.sums[name] = Sum(self._zeros(name, x.device))
        else:
            self._part_absent(name)
        found = self.sums[name]
        found.calls += 1
        if self.dry:
            return
        W = layer_weight(self.targets[name], name) if name in self.cross else None
        try:
            samples, count = samples_of(x, self.mask, self.init)
            weighted = [(rows, weight_of_sample(rows, self.init.scale)) for rows in samples]
            parts = [(chunk, factor) for rows, factor in weighted for chunk in chunks([rows])]
            call = Call([], 1.0, sum(map(len, samples)), count)
            if W is not None:
                self._add_cross(found, W, parts, output)
                found.tokens += call.tokens
                found.samples += call.samples
                return
            strips, factor = sum_of_products(parts)
            found.pending = dataclasses.replace(call, strips=list(strips) if found.followers else strips, factor=factor)
            if not found.followers:
                found.settle()
        except UserError as error:
            raise type(error)(f"layer {name}, batch {self.batch}: {error}") from error

    def _zeros(self, name: str, device: torch.device) -> Tensor:
        m, n = shape_of(self.targets[name], name)
        shape = (0, 0) if self.dry else (m, n) if name in self.cross else (n, n)
        return torch.zeros(shape, dtype=torch.float64, device=device)

    def _add_cross(self, found: Sum, W: Tensor, parts: Sequence[Part], output: Tensor | None) -> None:
        """Add factor (W x) x^T and factor |x|^2; W x is the layer's ``output`` if that is given and in full precision."""
        given: Sequence[Tensor | None] = [None] * len(parts)
        if output is not None and output.dtype == W.dtype and products_are_full():
            given = chunks(samples_of(output, self.mask, self.init)[0])
        for (rows, factor), outputs in zip(parts, given, strict=True):
            if outputs is None:
                with matmul_precision(tf32=is_half(rows) and is_half(W)):
                    rows = at_least_single(rows)
                    outputs = rows @ W.to(rows).T
            squares = rows.norm(dim=1).double().square().sum()
            check_finite(squares)
            found.trace += factor * squares.item()
            with matmul_precision(tf32=False):
                for start in range(0, len(W), STRIP):
                    strip = slice(start, start + STRIP)
                    found.moment[strip].add_(outputs[:, strip].T @ rows, alpha=factor)

    def stats(self, fingerprint: str, *, complete: bool = True) -> ContextStats:
        """The statistics so far; their moments are the running sums, not copies.

        Args:
            fingerprint: fingerprint of the model.
            complete: as for ``collect_context``.
        """
        missed = [name for name in self.targets if name not in self.groups]
        if complete:
            check_reached(missed)
            if any(found.tokens == 0 for found in self.sums.values()):
                raise UserError("no token is left after masking (attention_mask, skip_first)")
        for name in missed:
            device = next((p.device for p in self.targets[name].parameters()), torch.device("cpu"))
            self.sums[name], self.groups[name] = Sum(self._zeros(name, device)), name
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

    Which layers share an input is known only after the first batch. For ``auto``, all layers below one parent with the
    same number of inputs count as one group: if these together have fewer outputs than inputs, so has any group among them.
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
    """Whether a layer's own output can be W x, unrounded: at least fp32, on a CPU, without a bias."""
    if type(layer) is not nn.Linear:
        return False
    bias: Any = layer.bias
    return bias is None and layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.float32, torch.float64)


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
    attribute stays on any module. Targets that receive the very same tensor (q, k and v; gate and up) share one sum.

    Args:
        model: any module; called as ``model(**batch)``, or ``model(batch)`` for a tensor.
        data: batches (dicts with ``input_ids`` and, for padded rows, ``attention_mask``; or plain tensors), or a
            function without arguments that runs the model itself; the ``attention_mask`` of each of its passes counts.
        targets: full names of linear layers; default: all of them but the output head.
        init: ``accumulate``, ``scale`` and ``skip_first`` are used; default ``CordaInit()``.
        share: False gives every target its own sum: the same numbers for more time and memory.
        reusable: False if the statistics serve only factors of ``init``, so that ``accumulate="auto"`` may choose cross
            moments, which hold no covariance.
        complete: False gives zeros for targets that no token has reached, instead of an error: for a rank whose share of
            the data may miss some targets, or is empty, before ``ContextStats.reduce``.

    Returns:
        The statistics, as sums.

    Raises:
        UserError: no batch, no token after masking, or a target that is not a linear layer.
        TargetNotReachedError: a target that no batch ran through; the message lists them.
        NonFiniteError: NaN or infinity in a layer's input, with the layer's name and the batch's index.
    """
    init = init or CordaInit()
    names = linear_targets(model) if targets is None else list(targets)
    collector = Collector({name: linear(model, name) for name in names}, init, share=share, reusable=reusable)
    batches = isinstance(data, Iterable)  # a function that runs the model would not survive a Stop
    with evaluating(model), collector.attached(model if batches else None):
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
    """Which tokens of a batch are not padding, (B, T); None where the batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.ndim != 2 else mask.bool()
