"""Device, precision and seeds of a training, and what they mean on this machine."""

import os
import random
from typing import Literal

from tenfold.config import Device, Precision
from tenfold.errors import UserError


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
    # else torch fills each new tensor with NaN, an aid in debugging that costs up to a tenth of a step of small models
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
