"""One optimizer per module: factories and schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.bpfree import BPFreeNet
from localrecon.config import OptimizerSettings
from localrecon.net import LocalNet
from tenfold import UserError
from tenfold.errors import needs

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

Net = LocalNet | BPFreeNet
"""Both kinds have ``k``, ``parameters_of`` and ``forward_exits``."""


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at a learning rate of 1e-3: the default of the trainers."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def make_optimizers(net: Net, factory: OptimizerFactory) -> list[torch.optim.Optimizer]:
    """One optimizer per module.

    Raises:
        UserError: a factory that does not give each module's optimizer exactly that module's parameters.
    """
    made = [factory(trained) if (trained := net.parameters_of(k)) else _nothing() for k in range(net.k)]
    for k, optimizer in enumerate(made):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {id(p) for p in net.parameters_of(k)}
        if (own and held != own) or any(optimizer is other for other in made[:k]):
            others = [j + 1 for j in range(net.k) if j != k and held & {id(p) for p in net.parameters_of(j)}]
            shared = f" and parameters of module {others[0]}" if others else ""
            raise UserError(
                f"the optimizer of module {k + 1} holds {len(held & own)} of its {len(own)} parameters{shared}: the factory"
                " has to make a new optimizer of exactly the parameters that it is given"
            )
    return made


def state_bytes(name: str, parameter: Tensor) -> int:
    """Bytes that the optimizer of that name keeps of a parameter.

    bitsandbytes has a byte per weight and state, and a number of 32 bits for each 256 of them; it leaves tensors of fewer than
    4096 weights in 32 bits.
    """
    count = parameter.numel()
    if name == "adamw8bit":
        return 2 * (count + 4 * math.ceil(count / 256) if count >= 4096 else 4 * count)
    return {"sgd": 1, "adamw": 2}[name] * count * parameter.element_size()


def _nothing() -> torch.optim.Optimizer:
    """For a module in which nothing is trained."""
    return torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.0)


def optimizer_of(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name; with ``partial``, a factory that processes can be sent."""
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.name == "adamw8bit":
        needs("bitsandbytes", "bitsandbytes", "localrecon", why="AdamW with states of 8 bits")
        import bitsandbytes.optim

        library: Any = bitsandbytes.optim  # without types
        optimizer: torch.optim.Optimizer = library.AdamW8bit(
            parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )
        return optimizer
    momentum = settings.momentum
    decay = settings.weight_decay
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


def scheduler_of(
    settings: OptimizerSettings, total_steps: int, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then cosine to 0 or constant; of the global step, the same for all modules."""

    def factor(step: int) -> float:
        warm = settings.warmup * total_steps
        if step < warm:
            return (step + 1) / warm
        if settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total_steps - warm))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
