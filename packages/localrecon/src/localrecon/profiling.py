"""Choosing where to cut: profile every block once, partition exactly, measure the step that results."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from localrecon.adapters import build_chain
from localrecon.boundary import StepOptions, first_boundary
from localrecon.chain import Chain, Task
from localrecon.config import HeadSpec, SGRConfig
from localrecon.equality import check_same, tail_is_by_token
from localrecon.heads import build_head
from localrecon.inputs import Inputs, Labels, check_inputs, samples_in, tensors_of
from localrecon.losses import Loss
from localrecon.net import LocalNet
from localrecon.plan import Balance, SplitPlan, partition
from localrecon.segments import SegmentChain
from localrecon.stage import Stage, frozen_statistics
from localrecon.step import train_stage
from tenfold import UserError
from tenfold.config import parse_bytes
from tenfold.memory import MemoryProbe
from tenfold.randomness import keyed


def plan_split(
    model: nn.Module,
    sample: Inputs,
    *,
    k: int = 4,
    budget: str | int | None = None,
    balance: Balance = "memory",
    cuts: Sequence[int] | None = None,
    adapter: str = "auto",
    heads: HeadSpec | None = None,
    sgr: SGRConfig | None = None,
    optimizer_states: int | Callable[[Tensor], int] = 2,
    measure: bool = True,
    loss: Loss | None = None,
    labels: Labels | None = None,
) -> SplitPlan:
    """The split of a model: which blocks form which module.

    Every block is run once on the sample; then the contiguous partition whose largest module is smallest is found exactly.
    The peak of a training step is measured by a step without an update, on copies of nothing: gradients are dropped, and
    BatchNorm's statistics and random states are put back.

    Args:
        model: any model; where it is in evaluation mode, it is put into training mode and back. In training mode its
            submodules keep the modes that they have (a frozen BatchNorm).
        sample: one batch of inputs as in training; its size decides the bytes.
        k: number of modules.
        budget: maximum bytes of live tensors in a training step ("2GB"); the smallest number of modules that fits is taken,
            and ``k`` is ignored.
        balance: quantity whose largest sum over a module is made smallest: memory (saved activations, boundaries and
            head), flops, params or blocks.
        cuts: numbers of blocks before the end of each module but the last, in place of k, budget and balance.
        adapter: how the model is taken apart.
        heads: local heads that will be used.
        sgr: reconciliation that will be used.
        optimizer_states: tensors of a parameter's size that the optimizer keeps (2 for Adam, 1 for SGD with momentum), or a
            function of a parameter that returns their bytes.
        measure: whether the peak of a step is predicted, which needs a backward pass.
        loss: loss of yours, (output, labels) -> mean over the batch, in place of cross-entropy.
        labels: labels of the sample, which a loss of yours needs where the peak is measured.

    Raises:
        UnsplittableModelError: the model cannot be cut, or its parts give another result than itself.
        UserError: an output that cross-entropy has no meaning for, k beyond the number of blocks, cuts that do not rise, or
            a budget below the least that is possible, which the message gives.
    """
    heads, sgr = heads or HeadSpec(), sgr or SGRConfig()
    check_inputs(sample)
    if loss is not None and measure and labels is None:
        raise UserError(
            "plan_split measures a step: give it the labels of the sample beside your loss, or measure=False"
        )
    with in_training(model):
        chain = build_chain(model, adapter, sample)
        base = _profile(chain, sample, loss)
        finish = partial(measured, model, sample=sample, heads=heads, sgr=sgr, states=optimizer_states)
        finish = partial(finish, loss=loss, labels=labels)
        if cuts is not None:
            edges = [0, *cuts, len(base.blocks)]
            if sorted(set(edges)) != edges:
                raise UserError(f"cuts must rise from 1 to {len(base.blocks) - 1}, got {list(cuts)}")
            plan = dataclasses.replace(base, cuts=tuple(cuts))
            return finish(plan) if measure else plan
        cost = _costs(base, sample, balance, heads)
        if budget is None:
            plan = dataclasses.replace(base, cuts=partition(len(base.blocks), k, partial(cost, k)))
            return finish(plan) if measure else plan
        limit = parse_bytes(budget) if isinstance(budget, str) else budget
        floor = None
        for count in range(1, len(base.blocks) + 1):
            cuts_of_count = partition(len(base.blocks), count, partial(cost, count))
            plan = finish(dataclasses.replace(base, cuts=cuts_of_count))
            assert plan.predicted_peak is not None
            if plan.predicted_peak <= limit:
                return plan
            floor = min(floor or plan.predicted_peak, plan.predicted_peak)
        raise UserError(
            f"budget {limit / 2**20:.1f} MiB is below what this model needs on this batch: the least is"
            f" {(floor or 0) / 2**20:.1f} MiB; take a smaller batch or accumulate"
        )


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Within the block, training mode where the whole model is in evaluation mode; then each submodule as before."""
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _profile(chain: Chain, sample: Inputs, loss: Loss | None) -> SplitPlan:
    """What each block saves, computes and gives; as a plan of one module."""
    model = chain.model
    probe = Stage(chain, 0, len(chain.blocks), None, 0, HeadSpec())
    device = next(model.parameters()).device
    known = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    saved, flops, shapes, numbers = [], [], [], []
    with keyed(0, device=device), frozen_statistics(probe.norms), probe.probing():
        context = chain.context(sample)
        x: Any = sample
        for number, block in enumerate(chain.blocks):
            if isinstance(x, Tensor) and x.is_floating_point():
                x = x.detach().requires_grad_().clone()  # no leaf, since blocks may begin in place
            kept: dict[int, Tensor] = {}

            def pack(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FlopCounterMode(display=False) as counter:
                out = chain.run(number, number + 1, x, context)
            if not isinstance(out, Tensor) or not out.is_floating_point():
                kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
                raise TypeError(f"block {block.name} gives {kind}: expected one tensor of real numbers")
            kept[out.untyped_storage()._cdata] = out
            skip = known | ({x.untyped_storage()._cdata} if isinstance(x, Tensor) else set())
            saved.append(sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in skip))
            flops.append(int(counter.get_total_flops()))
            shapes.append(tuple(out.shape[1:]))
            numbers.append(sum(p.numel() for p in chain.parameters_of(block).values()))
            x = out
            del out, kept
        logits = chain.run(len(chain.blocks), len(chain.blocks) + 1, x.detach(), context)
    task = _task_of(logits, loss)
    check_same(chain, sample)
    return SplitPlan(
        adapter=chain.adapter,
        blocks=tuple(block.name for block in chain.blocks),
        cuts=(),
        task=task,
        classes=logits.shape[-1] if task != "custom" or logits.ndim in (2, 3) else int(logits.shape[1:2].numel()),
        output=tuple(logits.shape[1:]),
        shapes=tuple(shapes),
        saved_bytes=tuple(saved),
        flops=tuple(flops),
        parameters=tuple(numbers),
        route=chain.route if isinstance(chain, SegmentChain) else None,
        by_token=task != "lm" or tail_is_by_token(chain, sample),
        channels_last=tuple(_channels_last(chain, place, shape) for place, shape in enumerate(shapes)),
    )


def _channels_last(chain: Chain, place: int, shape: Sequence[int]) -> bool | None:
    """Whether the output of a block is a map (H, W, C): by the last layer before it whose width is a side of it.

    Where both ends have that size (64 channels of 64 x 64), by where such a layer has its channels.
    """
    if len(shape) != 3:
        return None
    layers = dict(chain.model.named_modules())
    for block in reversed(chain.blocks[: place + 1]):
        inner = [m for name in block.owns if name in layers for m in layers[name].modules()]
        for layer in reversed(inner):
            width = _width_of(layer)
            if width in (shape[0], shape[2]):
                return width == shape[2] if shape[0] != shape[2] else _works_on_the_last(layer)
    if (shape[0] == shape[1]) != (shape[1] == shape[2]):
        return shape[0] == shape[1]
    return None


def _works_on_the_last(layer: nn.Module) -> bool:
    """Whether a layer's channels are the last dimension; of LayerNorm's subclasses that permute, they are not."""
    return isinstance(layer, nn.Linear) or type(layer).forward is nn.LayerNorm.forward


def _width_of(layer: nn.Module) -> int | None:
    """Channels that a layer gives; None where it keeps those that it gets and has no weights for them."""
    for name in ("out_channels", "out_features", "num_features", "num_channels"):
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    shape = getattr(layer, "normalized_shape", None)
    return int(shape[-1]) if isinstance(shape, tuple) and len(shape) == 1 else None


def _task_of(logits: Tensor, loss: Loss | None) -> Task:
    """What the loss is computed from.

    Raises:
        UserError: cross-entropy has no meaning for such an output.
    """
    if loss is not None:
        return "custom"
    shape = ", ".join(map(str, logits.shape[1:]))
    ours = "give plan_split and LocalNet a loss of yours (loss=...)"
    if logits.ndim not in (2, 3):
        raise UserError(
            f"the model gives (B, {shape}): cross-entropy expects (B, classes) or (B, T, vocabulary); {ours}"
        )
    if logits.shape[-1] == 1:
        raise UserError(f"the model gives one number each, (B, {shape}), of which cross-entropy is always 0; {ours}")
    return "classify" if logits.ndim == 2 else "lm"


def _costs(base: SplitPlan, sample: Inputs, balance: Balance, heads: HeadSpec) -> Any:
    """(modules, first, past) -> cost of a module; for memory: its saved bytes, boundaries and head."""
    if balance != "memory":
        values = {"flops": base.flops, "params": base.parameters, "blocks": (1,) * len(base.blocks)}[balance]
        return lambda count, a, b: sum(values[a:b])
    batch, sums = samples_in(sample), [0]
    for value in base.saved_bytes:
        sums.append(sums[-1] + value)
    sizes = [4 * batch * int(torch.Size(shape).numel()) for shape in base.shapes]
    known: dict[tuple[int | None, ...], int] = {}

    def head(place: int, count: int) -> int:
        if place == len(sizes) - 1:
            return 0
        key = *base.shapes[place], *base.channels_last[place : place + 1]
        if key not in known:
            with keyed(0):
                module = build_head(heads, dataclasses.replace(base, cuts=tuple(range(1, count))), 0, place)
            x = torch.zeros(max(2, batch), *base.shapes[place], requires_grad=True)
            if base.task == "lm":
                x = x[:, : max(1, heads.chunk // x.shape[0])]
            own = {p.untyped_storage()._cdata for p in module.parameters()} | {x.untyped_storage()._cdata}
            kept: dict[int, Tensor] = {}

            def pack(tensor: Tensor) -> Tensor:
                kept[tensor.untyped_storage()._cdata] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                out = module(x)
            known[key] = sum(t.untyped_storage().nbytes() for c, t in kept.items() if c not in own)
            del out
        return known[key]

    def cost(count: int, a: int, b: int) -> int:
        before = 2 * sizes[a - 1] if a else 0  # x and its target
        after = sizes[b - 1] if b < len(sizes) else 0  # the target; x itself counts among the saved
        return sums[b] - sums[a] + before + after + head(b - 1, count)

    return cost


def measured(
    model: nn.Module,
    plan: SplitPlan,
    *,
    sample: Inputs,
    heads: HeadSpec,
    sgr: SGRConfig,
    states: int | Callable[[Tensor], int],
    loss: Loss | None = None,
    labels: Labels | None = None,
    checkpointing: bool = False,
    accumulate: int = 1,
) -> SplitPlan:
    """The plan with the peak of a step, module by module.

    Args:
        model: the model, in training mode.
        plan: the plan.
        sample: one batch.
        heads: local heads.
        sgr: reconciliation.
        states: as ``optimizer_states`` of `plan_split`.
        loss: loss of the user's.
        labels: labels of the sample; default: zeros.
        checkpointing: whether activations within modules are computed again.
        accumulate: parts that the batch is computed in.
    """
    device = next(model.parameters()).device
    net = LocalNet(model, plan, heads, loss=loss, seed=0)
    if labels is None:
        first = tensors_of(sample)[0]
        shape = (first.shape[0], *plan.output[:-1]) if plan.task == "lm" else (first.shape[0],)
        labels = torch.zeros(shape, dtype=torch.int64, device=first.device)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    trained = [p for p in net.parameters() if p.requires_grad]
    kept = sum(states(p) if callable(states) else states * p.numel() * p.element_size() for p in trained)
    sgr = dataclasses.replace(sgr, ramp=0.0, every=1)
    peaks = []
    with keyed(0, device=device):
        boundary = first_boundary(net, sample, labels, accumulate)
        for stage in net.segments:
            stage.checkpointing = stage.checkpointed_blocks() if checkpointing else 0
            with MemoryProbe(model, net.heads, sample, labels, vars(copy.copy(boundary))) as probe:
                train_stage(stage, boundary, None, sgr, StepOptions())
            peaks.append(probe.peak_bytes + kept)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return dataclasses.replace(plan, predicted_peak=max(peaks), module_peaks=tuple(peaks))
