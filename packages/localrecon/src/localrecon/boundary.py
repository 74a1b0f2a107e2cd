"""What a training step is given, and what crosses from one module to the next in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localrecon.chain import Context, Inputs
from localrecon.losses import IGNORED
from localrecon.net import LocalNet
from tenfold import UserError


@dataclass(frozen=True)
class StepOptions:
    """What a step knows besides model, batch and reconciliation.

    Args:
        step: number of the step, from 0 on.
        total_steps: length of the training, for the ramps; None is no ramp.
        seed: seed of dropout: random states depend on (seed, module, step, part), not on who computes when.
        accumulate: parts that the batch is computed in, with the result of the whole (but for BatchNorm).
        clip_norm: largest norm of a module's gradient. Each module is clipped on its own.
        dtype: number format of mixed precision; None computes in the weights' own.
    """

    step: int = 0
    total_steps: int | None = None
    seed: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    dtype: torch.dtype | None = None


@dataclass
class Boundary:
    """What crosses from one module to the next, one entry per part of the batch.

    Attributes:
        x: outputs of the module before.
        target: gradient that it used on each, per sample (N times that of the mean loss); None before the first module.
        context: see ``Chain.context``.
        labels: labels of each part.
        loss_average: running mean of the loss of the module before, for the gate.
    """

    x: list[Any]
    target: list[Tensor | None]
    context: list[Context]
    labels: list[Tensor]
    loss_average: float | None = None


def first_boundary(net: LocalNet, inputs: Inputs, labels: Tensor, accumulate: int = 1) -> Boundary:
    """What the first module starts from.

    Raises:
        UserError: labels out of range, or fewer samples than parts.
        TypeError: the input of the net is no tensor and no dict of tensors.
    """
    if not isinstance(inputs, Tensor | Mapping):
        raise TypeError(f"expected a tensor, or a dict of tensors, as input; got {type(inputs).__name__}")
    check_labels(net, labels)
    parts = [inputs] if accumulate == 1 else parts_of(inputs, accumulate)
    rows = [labels] if accumulate == 1 else parts_of(labels, accumulate)
    return Boundary(parts, [None] * len(parts), [net.chain.context(part) for part in parts], rows)


def parts_of(value: Any, count: int) -> list[Any]:
    """A batch (a tensor, or a dict of tensors) cut into ``count`` parts along its first dimension."""
    if isinstance(value, Mapping):
        columns = {key: parts_of(item, count) for key, item in value.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(count)]
    if value.shape[0] < count:
        raise UserError(f"accumulate is {count}, but the batch has {value.shape[0]} samples")
    return list(torch.tensor_split(value, count))


def check_labels(net: LocalNet, labels: Tensor) -> None:
    """Refuse labels that a head has no output for.

    Raises:
        UserError: a label is negative, and not the one that does not count, or too large.
    """
    if labels.device.type != "cpu" or labels.is_floating_point() or not labels.numel():
        return
    low, high = int(labels[labels != IGNORED].amin()) if (labels != IGNORED).any() else 0, int(labels.amax())
    if low < 0 or high >= net.plan.classes:
        raise UserError(
            f"label {low if low < 0 else high} is out of range: the heads of modules 1 to {net.plan.k} have outputs 0 to"
            f" {net.plan.classes - 1}"
        )
