"""The mm stack as this package uses it: with operators for its models, quiet, mmdet's classes registered."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.device import utils as device_utils
from mmengine.logging import MMLogger

from tenfold import UserError
from tenfold.config import Device
from tenfold.devices import choose_device


def start() -> None:
    """Register mmdet's classes as its own scripts do, and quiet the stack: our progress and results stand alone."""
    quiet_stack()
    register_all_modules(init_default_scope=True)


def use_device(device: Device) -> str:
    """Let mmengine compute on ``device``; left alone, it takes a GPU (or MPS) wherever torch sees one.

    Returns:
        ``"cpu"`` or ``"cuda"``; auto takes CUDA where there is one.

    Raises:
        UserError: this machine has no such device, or it is MPS, which lacks the 64-bit numbers of mmdet's models.
    """
    if device == "mps":
        raise UserError("--device mps: it has no 64-bit floating point, which the models need: take cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_utils.DEVICE = choose_device(device)
    return str(device_utils.DEVICE)


def quiet_stack() -> None:
    """Errors only: mmengine would print one line per parameter and a table per validation."""
    for name in ("mmengine", "mmdet", "mmcv", "head_kd"):
        logging.getLogger(name).setLevel(logging.ERROR)
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"mm(engine|det|cv)")
    warnings.filterwarnings("ignore", message=r".*(torch\.meshgrid|lr_scheduler\.step).*")


@contextlib.contextmanager
def said_nothing() -> Iterator[None]:
    """pycocotools and mmengine print to stdout, which belongs to results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def build(model: Any) -> Any:
    """A detector out of its config, which stays as it is."""
    return MODELS.build(ConfigDict(copy.deepcopy(dict(model))))
