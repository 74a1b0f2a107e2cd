"""A user's model as gradient-isolated modules with local heads."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from localrecon.chain import Block, Chain, Context, Inputs, build_chain
from localrecon.config import HeadSpec
from localrecon.heads import build_head, loss_and_correct
from localrecon.plan import SplitPlan
from tenfold import UserError


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
    """Module k with its head: (x_{k-1}, context, labels) -> (x_k, mean loss, number of right answers).

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
        """Mean loss of x_k, and the number of right answers."""

        def head(x: Tensor) -> Tensor:
            return self.logits(x, context)

        return loss_and_correct(head, x, labels, self.spec, self.task, local=not self.is_last)

    def forward(
        self, x: Any, context: Context, labels: Tensor, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With ``apart``, the head learns from that output alone, and the blocks from their own."""
        out = self.run_blocks(x, context)
        if apart is None:
            loss, correct = self.judge(out, context, labels)
            return out, loss, correct
        with without_parameter_gradients(self.head_parameters()):
            loss, _ = self.judge(out, context, labels)
        own, correct = self.judge(apart, context, labels)
        return out, loss + own, correct

    def head_parameters(self) -> list[nn.Parameter]:
        """Of the head; of the last module's, which is the model's own classifier."""
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
        """For messages: the number and the blocks."""
        first, last = self.blocks[0].name, self.blocks[-1].name
        return f"module {self.index + 1} ({first if first == last else f'{first} .. {last}'})"


def _run(blocks: Sequence[Block], x: Any, context: Context) -> Tensor:
    for block in blocks:
        x = block.run(x, context)
    return torch.as_tensor(x)


class LocalNet(nn.Module):
    """A model split into K modules, each with its own head, that share no gradient.

    The model stays the user's: same objects, same key names. ``net(x)`` is ``model(x)``.

    Args:
        model: the model.
        plan: where it is cut, from ``plan_split``.
        heads: "auto", a ``HeadSpec`` for all local heads, or a list of K - 1, each a ``HeadSpec`` or a module of yours that
            maps a module's output to logits. The last module's head is the model's own classifier.

    Attributes:
        model: the model.
        heads: the K - 1 local heads.
        segments: the K modules with their heads.

    Raises:
        PlanMismatchError: the plan is for another model.
        UserError: a head does not fit, or there are not K - 1 of them.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SplitPlan,
        heads: str | HeadSpec | Sequence[HeadSpec | nn.Module] = "auto",
    ) -> None:
        super().__init__()
        chain = build_chain(model, plan.adapter)
        plan.check([block.name for block in chain.blocks])
        self.plan = plan
        self.model = model
        specs = _specs(heads, plan.k)
        own = next(model.parameters())
        built: list[nn.Module] = []
        for k, given in enumerate(specs):
            head = given
            if isinstance(given, HeadSpec):
                last = plan.ranges[k][1] - 1
                head = build_head(given, plan.shapes, last, (k, plan.k), plan.classes, plan.task)
            built.append(cast("nn.Module", head).to(device=own.device, dtype=own.dtype))
        self.heads = nn.ModuleList(built)
        stages = []
        for k, (a, b) in enumerate(plan.ranges):
            given = specs[k] if k < len(specs) else HeadSpec()
            spec = given if isinstance(given, HeadSpec) else HeadSpec()
            stage = Stage(chain, chain.blocks[a:b], self.heads[k] if k < len(specs) else None, k, spec)
            stage.task = plan.task
            stages.append(stage)
        self.__dict__["chain"] = chain  # not registered: the model and the heads are, once
        self.__dict__["segments"] = stages

    chain: Chain
    segments: list[Stage]

    @property
    def k(self) -> int:
        """Number of modules."""
        return self.plan.k

    def forward(self, x: Inputs) -> Any:
        """See the class."""
        return self.model(**x) if isinstance(x, dict) else self.model(x)

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``copy.deepcopy`` and for other processes: the model, the heads and the plan; the rest is made anew."""
        specs = [stage.spec for stage in self.segments]
        averages = [stage.loss_average for stage in self.segments]
        return _rebuild, (self.model, self.plan, list(self.heads), specs, averages, self.training)

    def train(self, mode: bool = True) -> "LocalNet":
        """Training or evaluation mode, of the model and the heads alike."""
        super().train(mode)
        for stage in self.segments:
            stage.training = mode
        return self

    @torch.no_grad()
    def forward_exits(self, x: Inputs) -> list[Tensor]:
        """Logits of every head, in order; the last ones are the model's own."""
        context = self.chain.context(x)
        exits = []
        for stage in self.segments:
            x = stage.run_blocks(x, context)
            exits.append(stage.logits(x, context))
        return exits

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """What module k (from 0 on) trains, its head's parameters included."""
        return self.segments[k].trained()

    def to_backbone(self) -> nn.Module:
        """The user's model: the same object."""
        return self.model

    def distribute(self) -> None:
        """Average each module's gradients over the ranks as soon as its backward has run (DDP, one a module)."""
        from torch.nn.parallel import DistributedDataParallel

        for stage in self.segments:
            stage.__dict__["parallel"] = DistributedDataParallel(stage)

    def compile_segments(self, **options: Any) -> None:
        """``torch.compile`` each module; the options are torch's."""
        for stage in self.segments:
            stage.compile(**options)


def _rebuild(
    model: nn.Module,
    plan: SplitPlan,
    heads: list[nn.Module],
    specs: list[HeadSpec],
    averages: list[float | None],
    training: bool,
) -> LocalNet:
    net = LocalNet(model, plan, heads)
    for stage, spec, average in zip(net.segments, specs, averages, strict=True):
        stage.spec, stage.loss_average = spec, average
    return net.train(training)


def _specs(heads: str | HeadSpec | Sequence[HeadSpec | nn.Module], k: int) -> list[HeadSpec | nn.Module]:
    if isinstance(heads, str):
        if heads != "auto":
            raise UserError(f"heads must be 'auto', a HeadSpec or a list of {k - 1}, got '{heads}'")
        return [HeadSpec()] * (k - 1)
    if isinstance(heads, HeadSpec):
        return [heads] * (k - 1)
    if len(heads) != k - 1:
        raise UserError(f"{k} modules need {k - 1} local heads (the last module has the model's own), got {len(heads)}")
    return list(heads)


def warn_of_clone(stage: Stage) -> None:
    """Once a module: it begins with an in-place operation."""
    stage.clones_input = True
    warnings.warn(
        f"{stage.name} begins with an in-place operation: its input is copied, which costs the memory of one boundary",
        stacklevel=4,
    )


class EarlyExit(nn.Module):
    """Classify with the first head that is sure enough.

    Args:
        net: a trained net.
        threshold: leave at the first exit whose largest probability is at least so high. In (0, 1].

    Shapes: inputs (B, ...) -> logits (B, C) and the number of the exit (from 0 on) that each sample took (B,). Samples that
    have left are not computed further.
    """

    def __init__(self, net: LocalNet, threshold: float) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must be in (0, 1], got {threshold}")
        if net.plan.task != "classify" or net.chain.adapter == "transformers":
            raise UserError("early exits are for classifiers of plain tensors")
        self.net = net
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        context = self.net.chain.context(x)
        left = torch.arange(x.shape[0], device=x.device)
        exits = torch.zeros_like(left)
        logits = None
        for stage in self.net.segments:
            x = stage.run_blocks(x, context)
            found = stage.logits(x, context)
            if logits is None:
                logits = found.clone()
            logits[left], exits[left] = found, stage.index
            stay = found.softmax(dim=1).amax(dim=1) < self.threshold
            x, left = x[stay], left[stay]
            if not len(left):
                break
        assert logits is not None
        return logits, exits
