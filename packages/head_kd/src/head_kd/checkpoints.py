"""Weights from files, without unpickling what they were sent with."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import UserError

EXTRAS = "head_kd."
"""Prefix of what only training needs: assistants, adapters, the step counter."""


class _Inert:
    """Stands in for objects of mmengine's message hub: they are read over, not run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _nothing(*args: Any) -> None:
    """Stands in for ``getattr``, which HistoryBuffer's pickles call on itself."""


_OVERLOOKED: list[Any] = [
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_nothing, "builtins.getattr"),
    (_Inert, "numpy.core.multiarray._reconstruct"),
    (_Inert, "numpy._core.multiarray._reconstruct"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.ndarray"),
    (_Inert, "numpy.dtype"),
    *((_Inert, f"numpy.dtypes.{kind}DType") for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
]


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Attributes:
        state_dict: its tensors by name, a leading ``module.`` removed.
        classes: of the data set that it was trained on, where it says so.
    """

    state_dict: dict[str, Tensor]
    classes: tuple[str, ...] | None


def read_weights(path: str | Path) -> Weights:
    """Read a ``.safetensors`` file or an mmengine checkpoint without unpickling what it was sent with.

    Of a ``.pth`` file only tensors and plain containers are built (``torch.load(weights_only=True)``); mmengine's own
    log buffers are read over.

    Raises:
        UserError: no such file, not a checkpoint, or one that holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        import json

        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
        classes = json.loads(header.get("tenfold", "{}")).get("config", {}).get("classes")
        return Weights(tensors, tuple(classes) if classes else None)
    try:
        with torch.serialization.safe_globals(_OVERLOOKED):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).partition("GLOBAL ")[2].split(" ")[0] or "objects beside tensors"
        raise UserError(
            f"{path} holds {what}, which is not read; if you trust the file, allow it by"
            " torch.serialization.add_safe_globals in a module of custom_imports"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # no pickle at all
        what = (str(error).splitlines() or ["it is empty"])[0]
        raise UserError(f"{path} is not a checkpoint: {what}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, expected a checkpoint")
    meta = content.get("meta")
    dataset = meta.get("dataset_meta") if isinstance(meta, dict) else None
    classes = (dataset or {}).get("classes") or (dataset or {}).get("CLASSES") if isinstance(dataset, dict) else None
    tensors = content.get("state_dict", content)
    named = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    if not named:
        raise UserError(f"{path} holds no tensors by name, expected a state_dict")
    return Weights(named, tuple(map(str, classes)) if isinstance(classes, list | tuple) else None)


def student_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to the plain student, of a checkpoint of ``HEADDetector``."""
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(EXTRAS)}
