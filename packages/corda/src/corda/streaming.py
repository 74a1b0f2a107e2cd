"""Factors in little memory: one block of a decoder stack at a time, or several passes, each for a few layers.

The adapted model computes the same function as the base, so a block's input does not depend on whether earlier blocks have
been solved, and the original weights serve throughout. The hidden states of all batches wait on the CPU between two
blocks; only the statistics of one block are in memory at a time.

That a stack is a mere chain of blocks is checked: the first batch goes through the model and through the chain.
"""

import contextlib
import functools
import itertools
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from corda.batches import Batch, Data, Stop, batches_of, forward, is_batches, warn_of_sources
from corda.blocks import Pass, Recorder, Stack, hidden_of, stacks_of
from corda.collecting import Collector, collect_context
from corda.config import CordaInit
from corda.context import ContextStats, agreed
from corda.doubts import settle
from corda.factors import FactorSet, Progress, Solved, build_factors, solve_layers
from corda.fingerprints import fingerprint
from corda.streams import Streams, TokenChoice
from corda.targets import Target, linears, resolve_targets, shape_of
from tenfold import UserError
from tenfold.config import parse_bytes
from tenfold.distributed import world_size
from tenfold.modules import evaluating

if TYPE_CHECKING:
    from peft import LoraConfig

ROUNDING = 2
"""Largest difference (in norm) of a stack's streamed output from the model's own, in units of its dtype's precision."""


def stream_factors(
    model: nn.Module,
    data: Data,
    lora_config: "LoraConfig",
    init: CordaInit | None = None,
    *,
    tokens: TokenChoice = "all",
    memory_budget: str | int | None = None,
    energies: bool = False,
    progress: Progress = iter,
) -> FactorSet:
    """Calibrate and solve without ever holding the statistics of the whole model.

    The blocks of a ``ModuleList`` are handled one after another: all batches go through one block, its layers are solved
    and its statistics freed, then comes the next block. In between, the hidden states of all batches wait on the CPU in the
    model's dtype, with the blocks' masks and position embeddings, of which equal ones are kept once. Layers elsewhere, and
    stacks whose blocks turn out not to be a chain (a warning says why), are calibrated by passes through the whole model.
    The outcome is that of ``collect_context`` and ``build_factors``; the statistics are not kept.

    In a process group of several ranks, all of them must call it, each with its own share of the data, which may be empty.

    Args:
        model: the plain base model; as untouched afterwards as by ``collect_context``.
        data: as for ``collect_context``, but iterated over more than once: a list or a ``DataLoader``, not a generator. A
            function that runs the model itself cannot be streamed by block, and is called once per pass.
        lora_config: as for ``build_factors``.
        init: default ``CordaInit()``.
        tokens: as for ``collect_context``.
        memory_budget: the most that statistics may take at once, in bytes or as ``"6GB"``, ``"512MiB"``; layers are then
            calibrated in several passes, through a block or through the model. Default: as many as one pass needs.
        energies: True also finds each layer's share of output energy (``output_energies``), for the report; a product W C
            per layer.
        progress: wraps the names of the blocks, such as ``tqdm``.

    Returns:
        The factors of all targeted layers.

    Raises:
        UserError: a budget that is not a size, or too small for the statistics of one layer (the message says how much it
            needs); data that one pass uses up; or as for ``collect_context`` and ``build_factors``.
    """
    init = init or CordaInit()
    budget = parse_bytes(str(memory_budget), "memory_budget") if memory_budget is not None else None
    if init.power == 0:
        return build_factors(model, None, lora_config, init, progress=progress)
    if isinstance(data, Iterator):
        raise UserError("one pass uses the calibration data up; give a list, a DataLoader or a function instead")
    targets = agreed(lambda: resolve_targets(model, lora_config))
    job = _Job(model, data, targets, init, tokens, budget, energies, progress)
    with evaluating(model):
        solved = job.run()
    return FactorSet(
        {name: solved[name][0] for name in targets},
        targets,
        {name: solved[name][1] for name in targets},
        init,
        job.fingerprint,
    )


class _Job:
    """One call of ``stream_factors``."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        targets: dict[str, Target],
        init: CordaInit,
        tokens: TokenChoice,
        budget: int | None,
        energies: bool,
        progress: Progress,
    ) -> None:
        self.model = model
        self.data = data
        self.targets = targets
        self.init = init
        self.budget = budget
        self.energies = energies
        self.progress = progress
        self.fingerprint = fingerprint(model)
        self.tokens = tokens
        self.layers = linears(model, targets)
        self.streams = Streams(model, targets, tokens=tokens, skip_first=init.skip_first)
        self.dry = Collector(self.layers, init, self.streams, reusable=False, dry=True)
        self.recalls: dict[int, Callable[[], Batch]] = {}

    def run(self) -> Solved:
        stacks = stacks_of(self.model, self.targets) if is_batches(self.data) else []
        reasons, groups = _common(agreed(lambda: self._first_pass(stacks)), self.dry.groups)
        sizes = self._sizes(groups)
        solved: Solved = {}
        for stack in stacks:
            if stack.name in reasons:
                reason = f"{stack.name} is not streamed: {reasons[stack.name]}"
                warnings.warn(f"{reason}; its layers are calibrated by passes through the whole model", stacklevel=3)
            else:
                solved |= self._stream(stack, sizes)
        for share in self._shares([name for name in self.targets if name not in solved], sizes):
            solved |= self._solve(share, lambda share=share: self._collected(share))  # type: ignore[misc]
        settle(self.model, self.layers, self.streams)
        self.streams.warn()
        return solved

    def _first_pass(self, stacks: Sequence[Stack]) -> dict[str, str]:
        """Find out which layers share an input; returns the stacks that cannot be streamed, and why."""
        if callable(self.data) and not is_batches(self.data):
            if self.budget is not None:
                self._first_call(self.data)
            return {}
        batch = next(batches_of(self.data), None)
        if batch is None:
            if world_size() == 1:
                raise UserError("the calibration data holds no batch")
            return {}
        warn_of_sources(self.model, batch)
        with contextlib.ExitStack() as contexts:
            for stack in stacks:
                contexts.enter_context(stack.watched())
            contexts.enter_context(self.dry.attached(self.model))
            forward(self.model, batch)
        found = {stack.name: self._why_not(stack, batch) for stack in stacks}
        return {name: reason for name, reason in found.items() if reason}

    def _first_call(self, data: Callable[[], object]) -> None:
        def stop(*_: object) -> None:
            raise Stop

        hook = self.model.register_forward_hook(stop)
        try:
            with self.dry.attached(), contextlib.suppress(Stop):
                data()
        finally:
            hook.remove()

    def _why_not(self, stack: Stack, batch: Batch) -> str:
        """Why a stack cannot be streamed; empty if the first batch gives the model's own output."""
        if stack.called != list(range(len(stack.blocks))):
            return "its blocks are not called one after another, once each"
        try:
            expected = hidden_of(stack.last)
            found = Recorder(self.model, stack, self.streams).record(batch)
            for index, block in enumerate(stack.blocks):
                found.hidden = found.through(index, block)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError) as error:
            # the model itself has just run without one
            return f"block by block it fails ({type(error).__name__}: {error})"
        finally:
            stack.last = None
        allowed = ROUNDING * torch.finfo(expected.dtype).eps * expected.double().norm()
        if (
            found.hidden.shape != expected.shape
            or not (found.hidden.to(expected) - expected).double().norm() <= allowed
        ):
            return "block by block, the first batch gives another output than the model does"
        return ""

    def _sizes(self, groups: Mapping[str, str]) -> dict[str, tuple[str, int]]:
        """Layer -> its group, as far as it is known, and the bytes of the group's statistics."""
        sizes = {}
        for name in self.targets:
            group = groups.get(name, name)
            m, n = shape_of(self.layers[group], group)
            sizes[name] = group, 8 * n * (m if group in self.dry.cross else n)
        group, least = max(sizes.values(), key=lambda found: found[1])
        if self.budget is not None and self.budget < least:
            raise UserError(f"memory_budget of {self.budget} bytes: the statistics of layer {group} alone take {least}")
        return sizes

    def _shares(self, names: Sequence[str], sizes: Mapping[str, tuple[str, int]]) -> list[list[str]]:
        """The layers in parts whose statistics fit into the budget; layers of one input stay together."""
        shares: list[list[str]] = []
        room = 0.0
        for group, size in dict.fromkeys(sizes[name] for name in names):
            if not shares or size > room:
                shares.append([])
                room = math.inf if self.budget is None else self.budget
            shares[-1] += [name for name in names if sizes[name][0] == group]
            room -= size
        return shares

    def _stream(self, stack: Stack, sizes: Mapping[str, tuple[str, int]]) -> Solved:
        """Send all batches through one block after another, up to the last one that holds a target."""
        passes = agreed(lambda: self._recorded(stack))
        names = [stack.of_block(index, self.targets) for index in range(len(stack.blocks))]
        end = max(index for index, found in enumerate(names) if found)
        solved: Solved = {}
        for index, _ in enumerate(self.progress([f"{stack.name}.{index}" for index in range(end + 1)])):
            shares = self._shares(names[index], sizes) or [[]]
            for share in shares:
                onward = share is shares[-1] and index < end
                through = functools.partial(self._through, passes, index, stack.blocks[index], share, onward=onward)
                solved |= self._solve(share, through)
        return solved

    def _recorded(self, stack: Stack) -> list[Pass]:
        recorder = Recorder(self.model, stack, self.streams)
        found = []
        with self.streams.attached():
            for number, batch in enumerate(batches_of(self.data)):
                self.streams.batch = number
                self.streams.labels = batch.get("labels") if isinstance(batch, Mapping) else None
                found.append(recorder.record(batch))
        return found

    def _through(
        self, passes: Sequence[Pass], index: int, block: nn.Module, names: Sequence[str], *, onward: bool
    ) -> ContextStats:
        """The statistics of some layers of a block; with ``onward``, the batches then hold the block's output."""
        layers = {name: self.layers[name] for name in names}
        collector = Collector(layers, self.init, self.streams, reusable=False, stops=not onward)
        with collector.attached(), self.streams.attached():
            for number, batch in enumerate(passes):
                self.streams.batch = number
                self.streams.recall = self.recalls.setdefault(number, functools.partial(self._batch, number))
                with contextlib.suppress(Stop), self.streams.within(batch.frames):
                    hidden = batch.through(index, block)
                    if onward:
                        batch.hidden = hidden.to("cpu")
                collector.end_of_batch()
        return collector.stats(self.fingerprint, complete=world_size() == 1)

    def _batch(self, number: int) -> Batch:
        return next(itertools.islice(batches_of(self.data), number, None))

    def _collected(self, names: Sequence[str]) -> ContextStats:
        """The statistics of some layers, by a pass through the whole model."""
        alone = world_size() == 1
        how: Any = {"tokens": self.tokens, "reusable": False, "complete": alone}
        return collect_context(self.model, self.data, names, self.init, **how)

    def _solve(self, names: Sequence[str], collect: Callable[[], ContextStats]) -> Solved:
        stats = agreed(collect).reduce()
        targets = {name: self.targets[name] for name in names}
        return solve_layers(self.model, targets, stats, self.init, spend=True, energies=self.energies)


def _common(reasons: dict[str, str], groups: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What all ranks go by: every reason, and the groups of the first rank that has seen any data."""
    if world_size() == 1:
        return reasons, groups
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (reasons, groups))
    return functools.reduce(operator.or_, (part[0] for part in found)), next((part[1] for part in found if part[1]), {})
