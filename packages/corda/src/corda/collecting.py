"""Hooks that sum up the second moments of layers' inputs while calibration data runs through a model.

Layers that receive the very same tensor (q, k and v; gate and up) share one sum. A layer that once receives another input
than the rest, or none, has its own sum from that call on.
"""

import contextlib
import dataclasses
import functools
import statistics
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.algebra import STRIP, matmul_precision, mirror, products_are_full
from corda.batches import Batch, Data, Stop, batches_of, forward, is_batches, warn_of_sources
from corda.config import CordaInit
from corda.context import EXPERT, ContextStats, with_experts
from corda.doubts import settle
from corda.fingerprints import fingerprint
from corda.streams import Streams, TokenChoice
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
from corda.targets import layer_weight, linear_targets, linears, shape_of
from tenfold import UserError
from tenfold.modules import evaluating

OUTWEIGHS = 1000
"""A sample with this many times the usual weight is named in a warning."""


class Collector:
    """Hooks that sum x x^T of each target's input, once for siblings that receive the very same tensor.

    Args:
        targets: name -> layer.
        init: ``accumulate`` and ``scale`` are used.
        streams: says which tokens of an input count.
        share: False gives every target its own sum.
        reusable: False lets ``accumulate="auto"`` choose cross moments.
        stops: whether a forward pass may end, by ``Stop``, with the last input that is needed.
        dry: True finds out only which layers share an input.
    """

    def __init__(
        self,
        targets: Mapping[str, nn.Module],
        init: CordaInit,
        streams: Streams,
        *,
        share: bool = True,
        reusable: bool = True,
        stops: bool = True,
        dry: bool = False,
    ) -> None:
        self.targets = targets
        self.init = init
        self.streams = streams
        self.share = share
        self.stops = stops
        self.dry = dry
        self.cross = _cross_targets(targets, init, reusable)
        self.outputs = {name for name in self.cross if _gives_products(targets[name])}
        """Layers of ``cross`` whose own output can serve as W x."""
        self.sums: dict[str, Sum] = {}
        self.groups: dict[str, str] = {}
        self.weights: list[tuple[float, int, int, str]] = []
        """Of each sample, by peft's rule: weight, batch, row and layer."""
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

    @property
    def batch(self) -> int:
        """Number of the present batch."""
        return self.streams.batch

    def _observe(self, name: str, x: Tensor, output: Tensor | None = None) -> None:
        self._calls[name] += 1
        if name in self.cross:
            self.groups[name] = name
            self._add(name, x, output)
            return
        parent = name.rpartition(".")[0]
        same, version, leader = self._latest.get(parent, (lambda: None, -1, ""))
        if self.share and not x.is_inference() and same() is x and version == x._version and self._joins(name, leader):
            return
        if self.groups.setdefault(name, name) != name:
            self._part(name)
        self._latest[parent] = (weakref.ref(x), -1 if x.is_inference() else x._version, name)
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
        with torch.inference_mode(False):
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
            tokens = self.streams.of(name, x)
            samples, count = samples_of(x, tokens, self.init.scale)
            weighted = [(rows, weight_of_sample(rows, self.init.scale)) for rows in samples]
            if self.init.scale == "peft":
                self.weights += [(weight, self.batch, row, name) for row, (_, weight) in enumerate(weighted)]
            parts = [(chunk, factor) for rows, factor in weighted for chunk in chunks([rows])]
            call = Call([], 1.0, sum(map(len, samples)), count)
            if W is not None:
                outputs = None if output is None else samples_of(output, tokens, self.init.scale)[0]
                self._add_cross(found, W, parts, outputs)
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
        with torch.inference_mode(False):  # sums outlive the user's inference mode
            return torch.zeros(shape, dtype=torch.float64, device=device)

    def _add_cross(self, found: Sum, W: Tensor, parts: Sequence[Part], products: Sequence[Tensor] | None) -> None:
        """Add factor (W x) x^T and factor |x|^2; W x are the layer's outputs if they are given and in full precision."""
        given: Sequence[Tensor | None] = [None] * len(parts)
        if products and products[0].dtype == W.dtype and products_are_full():
            given = chunks(products)
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
        self._warn_of_weights()
        missed = [name for name in self.targets if name not in self.groups]
        for name in missed:
            device = next((p.device for p in self.targets[name].parameters()), torch.device("cpu"))
            self.sums[name], self.groups[name] = Sum(self._zeros(name, device)), name
        for name, found in self.sums.items():
            if name not in self.cross:
                mirror(found.moment)
        stats = ContextStats(
            moments={name: found.moment for name, found in self.sums.items()},
            tokens={name: found.tokens for name, found in self.sums.items()},
            samples={name: found.samples for name, found in self.sums.items()},
            groups={name: self.groups[name] for name in self.targets},
            scale=self.init.scale,
            fingerprint=fingerprint,
            traces={name: found.trace for name, found in self.sums.items() if name in self.cross},
        )
        if not complete:
            return stats
        stats = with_experts(stats, missed)
        if stats.tokens and not any(stats.tokens.values()):
            raise UserError("no token is left after masking (attention_mask, labels, skip_first)")
        empty = [name for name in self.targets if stats.tokens[stats.groups[name]] == 0]
        if empty:
            raise UserError(f"no token of layer {empty[0]} is left after masking (attention_mask, labels, skip_first)")
        return stats

    def _warn_of_weights(self) -> None:
        """Name a sample that outweighs the others: by peft's rule, one without any large positive input does."""
        if len(self.weights) < 3 or self.streams.outweighed:
            return
        usual: dict[str, list[float]] = {}
        for weight, _, _, name in self.weights:
            usual.setdefault(name, []).append(weight)
        medians = {name: statistics.median(weights) for name, weights in usual.items()}
        worst = max(self.weights, key=lambda found: found[0] / medians[found[3]])
        share = worst[0] / medians[worst[3]]
        if share > OUTWEIGHS and len(usual[worst[3]]) > 2:
            self.streams.outweighed = True
            warnings.warn(
                f"sample {worst[2]} of batch {worst[1]} has {share:.0f} times the usual weight in layer {worst[3]}: its largest"
                " input is that small, and scale peft divides by it; scale token_mean does not",
                stacklevel=4,
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
    few = {name for name, (parent, _, n) in shapes.items() if outputs[parent, n] < n}
    return {name for name in few if not EXPERT.search(name)}  # others of its block may have to stand in for an expert


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
    tokens: TokenChoice = "all",
    share: bool = True,
    reusable: bool = True,
    complete: bool = True,
    rows_are_tokens: bool = False,
) -> ContextStats:
    """Run the calibration data through the model and sum up the second moment of each target's input.

    The model is left as it was: hooks are removed and training flags restored, also when a forward pass raises; no
    attribute stays on any module. Targets that receive the very same tensor (q, k and v; gate and up) share one sum.

    Each stream of tokens has its own mask (see ``streams``): ``attention_mask`` for text or sound and what an encoder makes
    of it; ``decoder_attention_mask``, else the tokens that have a label, for a decoder, which is given the labels as in
    training; every token of a picture. An expert that no token is routed to takes the sums of its block's other
    experts, with a warning. Where it cannot be told which tokens count, a warning names the layer. Where rows are only supposed
    to be one per sample, say, one batch goes through the model twice more, with its samples in other places (see ``doubts``).

    Args:
        model: any module; called as ``model(**batch)``, or ``model(batch)`` for a tensor.
        data: batches (dicts of the model's arguments, or plain tensors), one batch, or a function without arguments that
            runs the model itself or parts of it.
        targets: full names of linear layers; default: all of them but the output head.
        init: ``accumulate``, ``scale`` and ``skip_first`` are used; default ``CordaInit()``.
        tokens: all (that are not padding), labels (those with a label other than -100), or a function that makes a mask
            (batch, tokens) of a batch; of an encoder-decoder, the decoder's.
        share: False gives every target its own sum: the same numbers for more time and memory.
        reusable: False if the statistics serve only factors of ``init``, so that ``accumulate="auto"`` may choose cross
            moments, which hold no covariance.
        complete: False gives zeros for targets that no token has reached, instead of an error: for a rank whose share of
            the data may miss some targets, or is empty, before ``ContextStats.reduce``.
        rows_are_tokens: whether an input of the model in two dimensions is one sample of many tokens, as peft takes it,
            instead of many samples.

    Returns:
        The statistics, as sums.

    Raises:
        UserError: no batch, one that is no batch, no token after masking, or a target that is not a linear layer.
        TargetNotReachedError: a target that no batch ran through; the message lists them.
        NonFiniteError: NaN or infinity in a layer's input, with the layer's name and the batch's index.
    """
    init = init or CordaInit()
    layers = linears(model, linear_targets(model) if targets is None else targets)
    streams = Streams(model, layers, tokens=tokens, skip_first=init.skip_first, rows_are_tokens=rows_are_tokens)
    collector = Collector(layers, init, streams, share=share, reusable=reusable)
    batches = is_batches(data)  # a function that runs the model would not survive a Stop
    with evaluating(model):
        with collector.attached(model if batches else None):
            run(model, data, collector)
        settle(model, layers, streams)
    streams.warn()
    if complete and batches and streams.batch < 0:
        raise UserError("the calibration data holds no batch")
    return collector.stats(fingerprint(model), complete=complete)


def _given(batch: Batch) -> Batch:
    return batch


def run(model: nn.Module, data: Data, collector: Collector) -> None:
    """All forward passes over the data, under a collector's hooks."""
    streams = collector.streams
    if callable(data) and not is_batches(data):
        with streams.attached(counts=True):
            data()
        collector.end_of_batch()
        return
    with streams.attached():
        for batch in batches_of(data):
            streams.batch += 1
            streams.labels = batch.get("labels") if isinstance(batch, Mapping) else None
            streams.recall = functools.partial(_given, batch)
            if streams.batch == 0:
                warn_of_sources(model, batch)
            forward(model, batch)
            collector.end_of_batch()
