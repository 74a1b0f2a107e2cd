"""Weights of detectors from files, with the classes that they were trained on; nothing is unpickled."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tenfold.checkpoints import Inert, StandIn, read_foreign

EXTRAS = "head_kd."
"""Prefix of what only training needs: assistants, adapters, the step counter."""


def _nothing(*args: Any) -> None:
    """Stands in for ``getattr``, which the pickles of mmengine's log buffers call on themselves."""


_STAND_INS: tuple[StandIn, ...] = (
    (Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_nothing, "builtins.getattr"),
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Attributes:
        state_dict: its tensors by name, without the prefixes of wrappers.
        classes: classes of the data set that it was trained on, where it says so.
    """

    state_dict: dict[str, Tensor]
    classes: tuple[str, ...] | None


def read_weights(path: str | Path, *, option: str = "") -> Weights:
    """Read a ``.safetensors`` file or an mmengine checkpoint; mmengine's own log buffers are read over.

    Args:
        path: the file.
        option: option that gave it, for messages.

    Raises:
        UserError: no such file, not a checkpoint, or one that holds other objects.
    """
    found = read_foreign(path, option=option, stand_ins=_STAND_INS)
    stated: Any = None
    if "tenfold" in found.meta:
        stated = json.loads(found.meta["tenfold"]).get("config", {}).get("classes")
    elif isinstance(found.meta.get("meta"), dict):
        meta = found.meta["meta"]
        about = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else meta  # mmdet 3.x, 2.x
        stated = about.get("classes") or about.get("CLASSES")
    classes = tuple(map(str, stated)) if isinstance(stated, list | tuple) and stated else None
    return Weights(found.tensors, classes)


def student_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the plain student, of a checkpoint of ``HEADDetector``."""
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(EXTRAS)}
