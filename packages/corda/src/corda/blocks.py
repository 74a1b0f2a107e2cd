"""Decoder blocks as a chain: what each of them is called with, and how to run one of them on its own.

A model's ``ModuleList`` is only supposed to be such a chain; ``streaming`` runs the first batch both ways and compares.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corda.batches import Batch, Stop, forward
from corda.streams import Frame, Streams
from tenfold import UserError


@dataclass
class Stack:
    """The blocks of one ``ModuleList``, and what an ordinary pass of the first batch has shown about them."""

    name: str
    blocks: list[nn.Module]
    called: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    """Block -> length of the tuple that it returns; 0 for a tensor."""
    last: object = None
    """What the last block returned."""

    def holds(self, target: str) -> bool:
        """Whether a layer or module of this name lies below the list."""
        return target.startswith(f"{self.name}.")

    def of_block(self, index: int, names: Iterable[str]) -> list[str]:
        """Those of the names that belong to one block."""
        prefix = f"{self.name}.{index}"
        return [name for name in names if name == prefix or name.startswith(f"{prefix}.")]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within, note what the blocks return."""

        def after(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(block: nn.Module, given: Any, returned: Any) -> None:
                self.called.append(index)
                self.lengths[index] = len(returned) if isinstance(returned, tuple | list) else 0
                self.last = returned

            return hook

        hooks = [block.register_forward_hook(after(index)) for index, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def stacks_of(model: nn.Module, targets: Iterable[str]) -> list[Stack]:
    """The outermost module lists that have at least two blocks and hold targets."""
    found: list[Stack] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not any(stack.holds(name) for stack in found):
            stack = Stack(name, list(module))
            if any(stack.holds(target) for target in targets):
                found.append(stack)
    return found


@dataclass
class Pass:
    """One batch on its way through a stack: its hidden states, the streams around it, and the other arguments of each block."""

    hidden: Tensor
    frames: list[Frame]
    calls: list["Arguments"]

    def through(self, index: int, block: nn.Module) -> Tensor:
        """The hidden states after a block; those in front of it stay unchanged."""
        device = next((p.device for p in block.parameters()), self.hidden.device)
        if device.type == "meta":  # offloaded: whoever brings the weights brings the inputs too
            device = self.hidden.device
        args, keywords = self.calls[index].around(self.hidden.to(device, copy=True), device)
        return hidden_of(block(*args, **keywords))


@dataclass(frozen=True)
class Arguments:
    """What a block was called with, except the hidden states, whose place is ``place``."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    place: str | None
    """A keyword, or None for the first argument."""

    def around(self, hidden: Tensor, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All positional and keyword arguments of a call with these hidden states, on the device."""
        args = _mapped(self.args, lambda tensor: tensor.to(device))
        keywords = _mapped(self.keywords, lambda tensor: tensor.to(device))
        return (args, {self.place: hidden, **keywords}) if self.place is not None else ((hidden, *args), keywords)


def hidden_of(returned: Any) -> Tensor:
    """The hidden states in what a block returns: the value itself, or the first of a tuple.

    Raises:
        TypeError: the block returns something else.
    """
    first = returned[0] if isinstance(returned, tuple | list) else returned
    if not isinstance(first, Tensor):
        raise TypeError(f"a block returns {type(returned).__name__}, not hidden states")
    return first


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed, also inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        parts = [_mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return value


class Recorder:
    """Records what each block of a stack is called with, without running any of them.

    For that, each block is the identity for a moment. Tensors go to the CPU; those that are equal in two successive batches
    are kept once (such as position embeddings and masks of windows of one length).
    """

    def __init__(self, model: nn.Module, stack: Stack, streams: Streams) -> None:
        self.model = model
        self.stack = stack
        self.streams = streams
        self._latest: dict[int, list[Tensor]] = {}  # block -> its tensors in the previous batch

    def record(self, batch: Batch) -> Pass:
        """What the blocks would be called with for this batch.

        Raises:
            UserError: the batch does not reach every block once.
        """
        hidden: list[Tensor] = []
        frames: list[Frame] = []
        calls: list[Arguments] = []
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def identity(index: int) -> Callable[..., Any]:
            def called(*args: Any, **keywords: Any) -> Any:
                place = None if args else _place(self.stack.blocks[index], keywords)
                given = args[0] if place is None else keywords[place]
                rest = args[1:], {key: value for key, value in keywords.items() if key != place}
                before, latest = iter(self._latest.get(index, [])), []

                def keep(tensor: Tensor) -> Tensor:
                    previous = next(before, None)
                    if id(tensor) not in seen:
                        seen[id(tensor)] = tensor, _kept(tensor, previous)
                    latest.append(seen[id(tensor)][1])
                    return latest[-1]

                others, named = _mapped(rest, keep)
                calls.append(Arguments(others, named, place))
                self._latest[index] = latest
                if index == 0:
                    hidden.append(given.detach().to("cpu", copy=True))
                    frames.extend(self.streams.around(self.stack.blocks[0]))
                if index == len(self.stack.blocks) - 1:
                    raise Stop
                length = self.stack.lengths.get(index, 0)
                return (given, *[None] * (length - 1)) if length else given

            return called

        with _replaced_forwards(self.stack.blocks, identity):
            forward(self.model, batch)
        if len(calls) != len(self.stack.blocks):
            raise UserError(f"a batch takes another path through {self.stack.name} than the first one")
        return Pass(hidden[0], frames, calls)


def _place(block: nn.Module, keywords: Mapping[str, Any]) -> str:
    """The keyword that holds the hidden states: the first parameter of the block's ``forward`` that was given."""
    return next(name for name in inspect.signature(type(block).forward).parameters if name in keywords)


def _kept(tensor: Tensor, previous: Tensor | None) -> Tensor:
    moved = tensor.detach().to("cpu")
    if previous is not None and previous.dtype == moved.dtype and torch.equal(previous, moved):
        return previous
    return moved.clone() if tensor.device.type == "cpu" else moved


@contextlib.contextmanager
def _replaced_forwards(blocks: Sequence[Any], replacement: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    own = [vars(block).get("forward") for block in blocks]  # accelerate puts one on the object
    try:
        for index, block in enumerate(blocks):
            block.forward = replacement(index)
        yield
    finally:
        for block, found in zip(blocks, own, strict=True):
            if found is None:
                del block.forward
            else:
                block.forward = found
