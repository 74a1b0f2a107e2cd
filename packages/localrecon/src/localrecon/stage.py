"""One gradient-isolated module with its head, and what holds parts of it still for a pass."""

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from localrecon.chain import Chain, Context
from localrecon.config import HeadSpec
from localrecon.inputs import Labels
from localrecon.losses import Loss, loss_and_correct


@contextlib.contextmanager
def frozen_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """BatchNorm layers that normalize by the batch, as in training, and leave their running statistics as they are.

    Layers in evaluation mode (frozen ones) normalize by their running statistics, as they do anyway.
    """
    tracked = [norm for norm in norms if norm.track_running_stats and norm.training]
    for norm in tracked:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracked:
            norm.track_running_stats = True


@contextlib.contextmanager
def _recomputing(norms: Sequence[_BatchNorm], buffers: "Buffers", before: list[Any]) -> Iterator[None]:
    """A second forward of the same batch: it begins with the same buffers, and leaves them as the first one has."""
    kept = [(norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    after = buffers.copies()
    buffers.put_back(before)
    try:
        yield
    finally:
        buffers.put_back(after)
        for norm, (momentum, count) in zip(norms, kept, strict=True):
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


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a layer of it normalizes by the batch in training."""
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


class Buffers:
    """What a forward pass changes besides running statistics: vectors of spectral norm, codebooks, counters.

    Args:
        module: the module that they are in.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        own = {id(norm) for norm in norms}
        self.places = [(part, key) for part in module.modules() if id(part) not in own for key in part._buffers]

    def copies(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Each buffer, and its numbers."""
        found = [part._buffers.get(key) for part, key in self.places]
        return [(b, None if b is None else b.detach().clone()) for b in found]

    @torch.no_grad()
    def put_back(self, copies: Sequence[tuple[Tensor | None, Tensor | None]], *, forget: bool = False) -> None:
        """The buffers as they were; with ``forget``, look from now on at those alone that had changed."""
        changed = []
        for (part, key), (buffer, numbers) in zip(self.places, copies, strict=True):
            now = part._buffers.get(key)
            if now is buffer and (buffer is None or numbers is None or torch.equal(buffer, numbers)):
                continue
            changed.append((part, key))
            part._buffers[key] = buffer
            if buffer is not None and numbers is not None:
                buffer.copy_(numbers)
        if forget:
            self.places = changed


class Stage(nn.Module):
    """Module k with its head: (x_{k-1}, context, labels) -> (x_k, mean loss, number of correct answers).

    It borrows the user's submodules, so its own state_dict is not for saving; ``LocalNet`` has the names.

    Args:
        chain: the model as blocks.
        first: number of its first block.
        past: number behind its last block.
        head: its local head; None for the last module, which has the model's own classifier.
        index: its number, from 0 on.
        spec: how its head is trained.
    """

    def __init__(self, chain: Chain, first: int, past: int, head: nn.Module | None, index: int, spec: HeadSpec) -> None:
        super().__init__()
        self.index = index
        self.is_last = head is None
        self.task = "classify"
        self.loss: Loss | None = None
        self.by_token = True
        self.spec = spec
        self.first, self.past = first, past
        self.__dict__["chain"] = chain
        self.blocks = chain.blocks[first:past]
        owners = [*self.blocks, *([chain.tail] if head is None else [])]
        borrowed = list({id(module): module for module in chain.modules_of(*owners)}.values())
        inside = {id(p) for module in borrowed for p in module.parameters()}
        self.borrowed = nn.ModuleList(borrowed)
        loose = {id(p): p for p in chain.parameters_of(*owners).values() if id(p) not in inside}
        self.loose = nn.ParameterList(loose.values())
        self.head = head
        judges = list(head.parameters()) if head is not None else list(chain.parameters_of(chain.tail).values())
        self.__dict__["judges"] = judges  # not registered a second time
        self.norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        self.__dict__["buffers_of_forward"] = None
        self.checkpointing = 0  # blocks in a checkpointed segment; 0: none
        self.clones_input = False
        self.loss_average: float | None = None  # of the gate

    @property
    def chain(self) -> Chain:
        """The model as blocks."""
        return cast("Chain", self.__dict__["chain"])

    def run_blocks(self, x: Any, context: Context) -> Tensor:
        """x_k."""
        if self.clones_input and isinstance(x, Tensor):
            x = x.clone()
        if not self.checkpointing:
            return self.chain.run(self.first, self.past, x, context)
        buffers = Buffers(self)

        def contexts() -> tuple[Any, Any]:  # computed a second time, the statistics are not to be updated again
            return contextlib.nullcontext(), _recomputing(self.norms, buffers, buffers.copies())

        for start in range(self.first, self.past, self.checkpointing):
            past = min(start + self.checkpointing, self.past)
            x = checkpoint(self.chain.run, start, past, x, context, use_reentrant=False, context_fn=contexts)
        return torch.as_tensor(x)

    def checkpointed_blocks(self) -> int:
        """Blocks in a checkpointed segment where memory is least: the square root of their number."""
        return max(1, round(math.sqrt(len(self.blocks))))

    def logits(self, x: Tensor, context: Context) -> Tensor:
        """What the head says of x_k."""
        if self.head is None:
            count = len(self.chain.blocks)
            return self.chain.run(count, count + 1, x, context)
        own = next((p.dtype for p in self.head.parameters() if p.is_floating_point()), x.dtype)
        return torch.as_tensor(self.head(x if torch.is_autocast_enabled(x.device.type) else x.to(own)))

    def judge(self, x: Tensor, context: Context, labels: Labels) -> tuple[Tensor, Tensor]:
        """Mean loss of x_k, and the number of correct answers."""

        def head(x: Tensor) -> Tensor:
            return self.logits(x, context)

        return loss_and_correct(
            head,
            x,
            labels,
            self.spec,
            self.task,
            local=not self.is_last,
            loss=self.loss,
            by_token=self.by_token or not self.is_last,
            name=self.name,
        )

    def forward(
        self, x: Any, context: Context, labels: Labels, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_k, its mean loss and the number of correct answers.

        With ``apart``, the head learns from that output alone, and the blocks from their own.
        """
        out = self.run_blocks(x, context)
        if torch.is_grad_enabled() and isinstance(out, Tensor) and out.is_floating_point() and not out.requires_grad:
            out = out.detach().requires_grad_()  # all its blocks are frozen: its head learns, and says what it wants
        if apart is None:
            loss, correct = self.judge(out, context, labels)
            return out, loss, correct
        with without_parameter_gradients(self.head_parameters()):
            loss, _ = self.judge(out, context, labels)
        own, correct = self.judge(apart, context, labels)
        return out, loss + own, correct

    def head_parameters(self) -> list[nn.Parameter]:
        """Trained parameters of the head; the last module's head is the model's own classifier."""
        return [p for p in cast("list[nn.Parameter]", self.__dict__["judges"]) if p.requires_grad]

    def trained(self) -> list[nn.Parameter]:
        """The parameters that this module's optimizer trains, each once."""
        return [p for p in self.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """A pass that leaves buffers as they were, but for running statistics, which are of this pass."""
        buffers: Buffers | None = self.__dict__["buffers_of_forward"]
        fresh = buffers is None
        if buffers is None:
            buffers = self.__dict__["buffers_of_forward"] = Buffers(self)
        before = buffers.copies()
        try:
            yield
        finally:
            buffers.put_back(before, forget=fresh)

    def call(
        self, x: Any, context: Context, labels: Labels, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``forward`` for the pass that trains: through DDP where the net is distributed."""
        parallel = self.__dict__.get("parallel")
        return cast("tuple[Tensor, Tensor, Tensor]", (parallel or self)(x, context, labels, apart))

    def compile_parts(self, **options: Any) -> None:
        """``torch.compile`` the submodules that it borrows, each on its own, and its head."""
        for part in [*self.borrowed, *([self.head] if self.head is not None else [])]:
            part.compile(**options)

    @property
    def name(self) -> str:
        """Name for messages: the number and the blocks."""
        first, last = self.blocks[0].name, self.blocks[-1].name
        return f"module {self.index + 1} ({first if first == last else f'{first} .. {last}'})"


def warn_of_clone(stage: Stage) -> None:
    """Clone this module's input from now on, and say so: it begins with an in-place operation."""
    stage.clones_input = True
    warnings.warn(
        f"{stage.name} begins with an in-place operation: its input is copied, which costs the memory of one boundary",
        stacklevel=4,
    )
