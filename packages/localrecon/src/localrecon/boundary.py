"""What a training step is given, and what crosses from one module to the next in it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localrecon.chain import Context
from localrecon.inputs import Inputs, Labels, check_inputs, parts_of, samples_in, tensors_of
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
        together: whether gradients are kept until all modules have run, so that all are updated or, where one is not finite,
            none. That costs the memory of all gradients; else a module is updated as soon as it has run.

    Raises:
        UserError: a length below 1, or a part or step that cannot be.
    """

    step: int = 0
    total_steps: int | None = None
    seed: int = 0
    accumulate: int = 1
    clip_norm: float | None = None
    dtype: torch.dtype | None = None
    together: bool = False

    def __post_init__(self) -> None:
        for name, least in (("total_steps", 1), ("accumulate", 1), ("step", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: expected {least} or more, got {value}")


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
    labels: list[Labels]
    loss_average: float | None = None


def first_boundary(net: LocalNet, inputs: Inputs, labels: Labels, accumulate: int = 1) -> Boundary:
    """What the first module starts from.

    Raises:
        UserError: labels that do not go with the model, or fewer samples than parts.
        TypeError: the input is no tensor, and no tuple or mapping of tensors.
    """
    check_inputs(inputs)
    if net.chain.adapter in {"list", "sequential"} and not isinstance(inputs, Tensor):
        raise TypeError(f"expected a tensor as input of a sequence of layers; got {type(inputs).__name__}")
    labels = checked_labels(net, labels)
    if samples_in(labels) != samples_in(inputs):
        raise UserError(f"{samples_in(labels)} labels for {samples_in(inputs)} samples: expected one for each")
    parts = [inputs] if accumulate == 1 else parts_of(inputs, accumulate)
    rows = [labels] if accumulate == 1 else parts_of(labels, accumulate)
    return Boundary(parts, [None] * len(parts), [net.chain.context(part) for part in parts], rows)


def checked_labels(net: LocalNet, labels: Labels) -> Labels:
    """The labels, class numbers as int64.

    Raises:
        UserError: they are of another shape or kind than the loss takes, or a head has no output for one.
    """
    task, classes = net.plan.task, net.plan.classes
    if task == "custom":
        if not tensors_of(labels):
            raise UserError(f"labels are {type(labels).__name__}: expected a tensor, or several in a tuple or mapping")
        return labels
    wanted = (
        "(B, T) int64, -100 where a token does not count" if task == "lm" else f"(B,) int64, or (B, {classes}) float"
    )
    given = f"{tuple(labels.shape)} {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
    soft = isinstance(labels, Tensor) and labels.is_floating_point()
    fits = isinstance(labels, Tensor) and labels.dtype != torch.bool and not labels.is_complex()
    if fits and soft:
        fits = task == "classify" and labels.ndim == 2 and labels.shape[1] == classes
    elif fits:
        fits = labels.ndim == (2 if task == "lm" else 1)
    if not fits:
        raise UserError(
            f"labels are {given.replace('torch.', '')}: expected {wanted}; for other ones give LocalNet a loss of yours"
        )
    if soft:
        return labels
    labels = labels.long()
    if labels.device.type != "cpu" or not labels.numel():
        return labels
    low, high = int(labels[labels != IGNORED].amin()) if (labels != IGNORED).any() else 0, int(labels.amax())
    if low < 0 or high >= classes:
        raise UserError(
            f"label {low if low < 0 else high} is out of range: the heads of modules 1 to {net.plan.k} have outputs 0 to"
            f" {classes - 1}"
        )
    return labels
