"""The optimizer of a training and the course of its learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pckd.config import Optimizer


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> list[dict[str, Any]]:
    """What is trained, apart by whether it is decayed: one group, or two.

    Args:
        named: parameters with their names; those without gradients are left out.
        optimizer: its ``no_decay`` holds parts of names, and ``1d`` for all of one dimension.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        exempt = any(part in name for part in optimizer.no_decay if part != "1d")
        exempt = exempt or ("1d" in optimizer.no_decay and parameter.ndim <= 1)
        (spared if exempt else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    return [*groups, {"params": spared, "weight_decay": 0.0}] if spared else groups


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: Optimizer) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW."""
    groups = parameter_groups(named, settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, settings: Optimizer, epochs: int) -> Any:
    """The learning rate by epochs: a linear rise where asked for, then steps or a cosine."""
    warm = min(settings.warm_up, epochs - 1)
    course: Any
    if settings.schedule == "cosine":
        course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs - warm)
    else:
        drops = [max(drop - warm, 0) for drop in settings.drops(epochs)]
        course = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
    if not warm:
        return course
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warm + 1), 1.0, warm)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, course], [warm])
