"""One gradient-isolated module with its head, and what holds parts of it still for a pass."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from localrecon.chain import Block, Chain, Context
from localrecon.config import HeadSpec
from localrecon.losses import loss_and_correct


@contextlib.contextmanager
def frozen_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorm layers that normalize by the batch, as in training, and leave their running statistics as they are."""
    tracked = [norm for norm in norms if norm.track_running_stats]
    for norm in tracked:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracked:
            norm.track_running_stats = True


@contextlib.contextmanager
def _recomputing(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """A second forward of the same batch: it saves the same tensors, and leaves running statistics as they are."""
    before = [(norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


@contextlib.contextmanager
def without_parameter_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """No gradient for these: kernels for weights are left out, and linear layers save no input."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Stage(nn.Module):
    """Module k with its head: (x_{k-1}, context, labels) -> (x_k, mean loss, number of correct answers).

    It borrows the user's submodules, so its own state_dict is not for saving; ``LocalNet`` has the names.
    """

    def __init__(
        self, chain: Chain, blocks: Sequence[Block], head: nn.Module | None, index: int, spec: HeadSpec
    ) -> None:
        super().__init__()
        self.index = index
        self.is_last = head is None
        self.task = "classify"
        self.spec = spec
        self.blocks = tuple(blocks)
        self.tail = chain.tail
        owners = [*self.blocks, *([chain.tail] if head is None else [])]
        borrowed = chain.modules_of(*owners)
        inside = {id(p) for module in borrowed for p in module.parameters()}
        self.borrowed = nn.ModuleList(borrowed)
        loose = [p for p in chain.parameters_of(*owners).values() if id(p) not in inside]
        self.loose = nn.ParameterList(loose)
        self.head = head
        judges = [head] if head is not None else chain.modules_of(chain.tail)
        self.__dict__["judges"] = judges  # not registered a second time
        self.norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        self.checkpointing = 0  # blocks in a checkpointed segment; 0: none
        self.clones_input = False
        self.loss_average: float | None = None  # of the gate

    def run_blocks(self, x: Any, context: Context) -> Tensor:
        """x_k."""
        if self.clones_input:
            x = x.clone()
        if not self.checkpointing:
            for block in self.blocks:
                x = block.run(x, context)
            return torch.as_tensor(x)

        def contexts() -> tuple[Any, Any]:  # computed a second time, the statistics are not to be updated again
            return contextlib.nullcontext(), _recomputing(self.norms)

        for start in range(0, len(self.blocks), self.checkpointing):
            segment = self.blocks[start : start + self.checkpointing]
            x = checkpoint(_run, segment, x, context, use_reentrant=False, context_fn=contexts)
        return torch.as_tensor(x)

    def logits(self, x: Tensor, context: Context) -> Tensor:
        """What the head says of x_k."""
        return torch.as_tensor(self.tail.run(x, context) if self.head is None else self.head(x))

    def judge(self, x: Tensor, context: Context, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of x_k, and the number of correct answers."""

        def head(x: Tensor) -> Tensor:
            return self.logits(x, context)

        return loss_and_correct(head, x, labels, self.spec, self.task, local=not self.is_last)

    def forward(
        self, x: Any, context: Context, labels: Tensor, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_k, its mean loss and the number of correct answers.

        With ``apart``, the head learns from that output alone, and the blocks from their own.
        """
        out = self.run_blocks(x, context)
        if apart is None:
            loss, correct = self.judge(out, context, labels)
            return out, loss, correct
        with without_parameter_gradients(self.head_parameters()):
            loss, _ = self.judge(out, context, labels)
        own, correct = self.judge(apart, context, labels)
        return out, loss + own, correct

    def head_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the head; the last module's head is the model's own classifier."""
        judges: list[nn.Module] = self.__dict__["judges"]
        return [p for judge in judges for p in judge.parameters() if p.requires_grad]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that this module's optimizer trains, each once."""
        return [p for p in self.parameters() if p.requires_grad]

    def call(
        self, x: Any, context: Context, labels: Tensor, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` for the pass that trains: through DDP where the net is distributed."""
        parallel = self.__dict__.get("parallel")
        return cast("tuple[Tensor, Tensor, Tensor]", (parallel or self)(x, context, labels, apart))

    @property
    def name(self) -> str:
        """Name for messages: the number and the blocks."""
        first, last = self.blocks[0].name, self.blocks[-1].name
        return f"module {self.index + 1} ({first if first == last else f'{first} .. {last}'})"


def _run(blocks: Sequence[Block], x: Any, context: Context) -> Tensor:
    for block in blocks:
        x = block.run(x, context)
    return torch.as_tensor(x)


def warn_of_clone(stage: Stage) -> None:
    """Clone this module's input from now on, and say so: it begins with an in-place operation."""
    stage.clones_input = True
    warnings.warn(
        f"{stage.name} begins with an in-place operation: its input is copied, which costs the memory of one boundary",
        stacklevel=4,
    )
