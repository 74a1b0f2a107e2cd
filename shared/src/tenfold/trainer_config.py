"""The common settings of a training, and what they mean on this machine; read by command lines, so without torch."""

import os
import random
from dataclasses import dataclass
from typing import Literal

from tenfold.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "32", "bf16", "16"]


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of ``tenfold.training.fit``; a package nests or inherits this and gives its own defaults.

    At least one of ``max_epochs`` and ``max_steps`` must be given; the one that is reached first ends the training.
    A step is one update of the weights, also when several batches are accumulated into it.

    Args:
        max_epochs: passes over the training data.
        max_steps: updates of the weights.
        accumulate: batches whose gradients are averaged into one step.
        clip_norm: largest norm of the gradient, all parameters together; null leaves it.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two rows of metrics.csv.
        validate_every: steps (of ``accumulate`` batches) between two validations; 0 validates at each epoch's end.
        seed: of data order, augmentation, dropout.
        device: where to compute; auto takes a GPU when there is one.
        devices: how many of them.
        precision: auto is bf16 mixed precision on a CUDA device that has it, 32 bits elsewhere.
        strategy: of Lightning, such as ddp or fsdp.

    Raises:
        UserError: a value is out of its range.
    """

    max_epochs: int | None = None
    max_steps: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    checkpoint_every: int = 500
    log_every: int = 10
    validate_every: int = 0
    seed: int = 0
    device: Device = "auto"
    devices: int = 1
    precision: Precision = "auto"
    strategy: str = "auto"

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None:
            raise UserError("neither --max_epochs nor --max_steps is given: the training would not end")
        for name in ("max_epochs", "max_steps", "accumulate", "checkpoint_every", "log_every", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}, expected 1 or more")
        for name in ("validate_every", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 0 or more")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"--clip_norm is {self.clip_norm}, expected more than 0")


def choose_device(device: Device = "auto") -> str:
    """``"cpu"``, ``"cuda"`` or ``"mps"``; auto takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: this machine, or this build of torch, has no such device.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in available.items() if there)
    if not available.get(device, False):
        there = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here, expected one of {there}")
    return device


def choose_precision(
    precision: Precision = "auto", device: str = "cpu"
) -> Literal["32-true", "bf16-mixed", "16-mixed"]:
    """The precision by Lightning's name, for a device of ``choose_device``.

    Raises:
        UserError: 16 on a CPU, where half precision has no gradient scaling.
    """
    import torch

    if precision == "auto":
        precision = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    if precision == "16" and device == "cpu":
        raise UserError("--precision 16 needs a GPU: take bf16 or 32 on a CPU")
    return "32-true" if precision == "32" else "bf16-mixed" if precision == "bf16" else "16-mixed"


def seed_everything(seed: int, device: str = "cpu") -> None:
    """Seed Python, NumPy and torch, and turn on torch's deterministic algorithms, for the whole process.

    On a CPU an operator without a deterministic algorithm raises; elsewhere it warns, since some have none there.
    Call it before the model is built, so that a run that starts again starts from the same weights.
    """
    import numpy as np
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this alone
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the global state is what other libraries draw from
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
