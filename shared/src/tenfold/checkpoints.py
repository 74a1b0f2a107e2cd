"""Tensors with a small JSON header in one safetensors file; loading says what differs, and never unpickles."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.errors import UserError, did_you_mean
from tenfold.files import replacing
from tenfold.runs import plain

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds: tensors by name, and the header that they were saved with."""

    tensors: "dict[str, Tensor]"
    method: str
    version: str
    config: dict[str, Any]


def save(
    path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", *, method: str, version: str, config: Any
) -> None:
    """Save tensors and header, whole or not at all.

    Args:
        path: a ``.safetensors`` file.
        tensors: by name; copied to contiguous CPU memory, so shared storage is saved once a name.
        method: what the tensors are, for example ``"corda.context"``; checked on loading.
        version: of the package that saves.
        config: dataclass or mapping that JSON can hold.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    header = {"method": method, "version": version, "config": plain(config)}
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, metadata={"tenfold": json.dumps(header, allow_nan=False)})


def load(path: str | os.PathLike[str], *, method: str) -> Checkpoint:
    """Load a file that ``save`` wrote for the same ``method``.

    Raises:
        UserError: no such file, not a whole safetensors file, without our header, or of another method.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    if "tenfold" not in metadata:
        raise UserError(f"{path} has no header of ours: expected a file of {method}")
    header = json.loads(metadata["tenfold"])
    if header["method"] != method:
        raise UserError(f"{path} holds {header['method']}, expected {method}")
    return Checkpoint(tensors, header["method"], header["version"], header["config"])


def load_into(module: "nn.Module", path: str | os.PathLike[str], *, method: str) -> Checkpoint:
    """Load a file into a module whose names and shapes are those of the file.

    Raises:
        UserError: names or shapes differ; the message says which. The module is then unchanged.
    """
    checkpoint = load(path, method=method)
    check_shapes(path, {name: tensor.shape for name, tensor in module.state_dict().items()}, checkpoint.tensors)
    module.load_state_dict(checkpoint.tensors)
    return checkpoint


def check_shapes(
    path: str | os.PathLike[str], expected: "Mapping[str, tuple[int, ...]]", found: "Mapping[str, Tensor]"
) -> None:
    """Raise ``UserError`` naming the file and the first few names or shapes that differ."""
    faults = [f"no {name} in the file" for name in expected if name not in found]
    faults += [f"unknown {name}: {did_you_mean(name, expected)}" for name in found if name not in expected]
    faults += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path}: {'; '.join(faults[:3])}{more}")
