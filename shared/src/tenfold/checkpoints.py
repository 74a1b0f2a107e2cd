"""Tensors with a small JSON header in one safetensors file, and other people's weights; nothing is unpickled.

``save``, ``load`` and ``load_into`` are for our own files; ``read_foreign`` and ``load_foreign_into`` take what people
have: safetensors in one file or in shards, checkpoints of torch, Lightning, timm, mmengine and of research code.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
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


def save(path: str | os.PathLike[str], tensors: "Mapping[str, Tensor]", *, method: str, config: Any) -> None:
    """Save tensors and header, whole or not at all.

    The header also holds the version of the package that the first part of ``method`` names, from its metadata; "0" where
    no such distribution is installed.

    Args:
        path: a ``.safetensors`` file.
        tensors: tensors by name; each is copied to contiguous CPU memory, so shared storage is saved once per name.
        method: what the tensors are, for example ``"corda.context"``; checked on loading.
        config: dataclass or mapping that JSON can hold.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    header = {"method": method, "version": _version(method.partition(".")[0]), "config": plain(config)}
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(own, temporary, metadata={"tenfold": json.dumps(header, allow_nan=False)})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


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
    """Load a file that ``save`` wrote into a module whose names and shapes are those of the file.

    Raises:
        UserError: as for ``load``, or names or shapes differ; the message says which. The module is then unchanged.
    """
    checkpoint = load(path, method=method)
    check_shapes(path, {name: tensor.shape for name, tensor in module.state_dict().items()}, checkpoint.tensors)
    module.load_state_dict(checkpoint.tensors)
    return checkpoint


def check_shapes(
    path: str | os.PathLike[str], expected: "Mapping[str, tuple[int, ...]]", found: "Mapping[str, Tensor]"
) -> None:
    """Check that the tensors of a file have the expected names and shapes.

    Raises:
        UserError: some differ; the message names the file and the first few of them.
    """
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


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The header of a safetensors file, without its tensors.

    Raises:
        UserError: it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class Foreign:
    """What a file of other people's weights holds.

    Attributes:
        tensors: tensors by name, without the prefixes of wrappers.
        meta: metadata of a safetensors file; of a checkpoint, all entries besides the weights.
    """

    tensors: "dict[str, Tensor]"
    meta: dict[str, Any]


class Inert:
    """Stands in for an object of a checkpoint that is read over: it can be made and given a state, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


StandIn = tuple[Any, str]
"""What stands in for a name of a pickle: ``(Inert, "some.module.Name")``."""
_STAND_INS: tuple[StandIn, ...] = (
    # numbers of NumPy and paths beside the weights, as "best_acc" or "out" in the options of a script
    *((Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *((Inert, f"numpy.{name}") for name in ("ndarray", "dtype")),
    *((Inert, f"numpy.dtypes.{kind}DType") for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool")),
    *(
        (Inert, f"{module}.{kind}Path")
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "PurePosix", "Windows")
    ),
)
_WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "weights", "teacher", "student"),
    *("params", "params_ema", "ema", "model_ema", "state_dict_ema", "ema_state_dict"),
)
"""Entries that hold the weights, in this order of preference: the trained weights come before their moving average."""
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "_forward_module.",
    "student.model.",
    "student.",
    "model.",
    "net.",
    "network.",
    "backbone.",
    "encoder.",
)
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def read_foreign(
    path: str | os.PathLike[str], *, option: str = "", names: Collection[str] = (), stand_ins: Sequence[StandIn] = ()
) -> Foreign:
    """Read other people's weights without running what is in their file.

    Weights may lie under an entry such as ``state_dict``, ``model`` or ``net``, and their names may begin with the
    prefixes of DistributedDataParallel, torch.compile, Lightning and the like, in any order: a prefix is cut where all names
    have it, again and again.

    Args:
        path: a ``.safetensors`` file; a checkpoint that ``torch.load(weights_only=True)`` reads; the ``.index.json`` of a
            model in several files, as transformers writes it; or a folder that holds one of these.
        option: option that gave the path, for messages.
        names: names of the module that the weights are for. Prefixes are then cut only as far as it helps, since a module's
            own names may all begin with ``model.`` or ``backbone.``.
        stand_ins: pairs ``(class, "module.name")`` of further objects that are read over (``Inert`` does nothing). NumPy's
            numbers, paths and ``argparse.Namespace`` always are.

    Raises:
        UserError: no such file, no weights, several files in a folder, or a file that could only be read by running what is
            in it; one line that names the file and what to do.
    """
    shown = f"{option} {path}".strip()
    file = _weights_file(Path(path), shown)
    if file.name.endswith(".index.json"):
        tensors, meta = _read_shards(file, shown, stand_ins)
    else:
        tensors, meta = _read_one(file, shown, stand_ins)
    return Foreign(_without_prefixes(tensors, names), meta)


def load_foreign_into(
    module: "nn.Module",
    path: str | os.PathLike[str],
    *,
    option: str = "",
    stand_ins: Sequence[StandIn] = (),
    new_head: bool = False,
) -> Foreign:
    """Load other people's weights into a module whose names and shapes are theirs; see ``read_foreign``.

    Counters of batch norms (``num_batches_tracked``), which torch before 0.4.1 did not save, may be missing.

    Args:
        module: the module.
        path: as for ``read_foreign``.
        option: option that gave the path, for messages.
        stand_ins: as for ``read_foreign``.
        new_head: where the file has another number of classes, leave the module's classifier as it is, with a warning that
            names its tensors; else it is refused.

    Raises:
        UserError: as for ``read_foreign``, or names or shapes differ; the message says which, and says so plainly where the
            classifier alone differs. The module is then unchanged.
    """
    own = module.state_dict()
    found = read_foreign(path, option=option, names=own.keys(), stand_ins=stand_ins)
    state = found.tensors
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name in expected.keys() - state.keys():
        if name.endswith("num_batches_tracked"):
            state[name] = own[name]
    shown = f"{option} {path}".strip()
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        differ = [n for n, t in state.items() if n in expected and t.ndim > 1 and tuple(t.shape) != expected[n]]
        heads = [name for name in differ if state[name].shape[1:] == expected[name][1:]]
        if heads and len(heads) == len(differ):
            theirs, ours = state[heads[-1]].shape[0], expected[heads[-1]][0]
            if not new_head:
                raise UserError(f"{shown} has {theirs} classes, the data {ours}")
            fresh = [n for n, t in state.items() if n in expected and tuple(t.shape) != expected[n]]
            warnings.warn(f"{shown} has {theirs} classes, the data {ours}: {', '.join(fresh)} start anew", stacklevel=2)
            state |= {name: own[name] for name in fresh}
        check_shapes(shown, expected, state)
    module.load_state_dict(state)
    return found


def _weights_file(path: Path, shown: str) -> Path:
    """The file itself, or the one that a folder holds: an index of shards, else safetensors, else a checkpoint."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{shown}: no such file or folder of weights")
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    kinds = (".safetensors.index.json", ".safetensors", ".index.json", _WEIGHTS[1:])
    for kind in kinds:
        found = [file for file in files if file.name.endswith(kind)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{shown}: {len(found)} files of weights, give one: {', '.join(file.name for file in found)}"
            )
    raise UserError(f"{shown}: no file of weights in this folder ({', '.join(_WEIGHTS)})")


def _read_shards(index: Path, shown: str, stand_ins: Sequence[StandIn]) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """The tensors of all files that an index names; the files lie beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{shown}: {index.name} is not an index of weights: expected a 'weight_map'") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or name in {"", ".", ".."}:
            raise UserError(f"{shown}: {index.name} names '{name}', expected files beside it")
        if not (index.parent / name).is_file():
            raise UserError(f"{shown}: {index.name} names {name}, which is not there")
        tensors |= _read_one(index.parent / name, f"{shown}: {name}", stand_ins)[0]
    if missing := [name for name in where if name not in tensors]:
        raise UserError(
            f"{shown}: {len(missing)} tensors of {index.name} are in none of its files: {', '.join(missing[:3])}"
        )
    return {name: tensors[name] for name in where}, dict(content.get("metadata") or {})


def _read_one(path: Path, shown: str, stand_ins: Sequence[StandIn]) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{shown} is not a whole safetensors file: {_line(error)}") from error
    content = _load_weights_only(path, shown, stand_ins)
    meta: dict[str, Any] = {}
    while (key := _wrapper(content)) is not None:
        meta |= {str(name): value for name, value in content.items() if name != key}
        content = content[key]
    named = (
        {str(name): value for name, value in content.items() if _is_tensor(value)}
        if isinstance(content, Mapping)
        else {}
    )
    if not named:
        keys = f" (it has {', '.join(map(str, list(content)[:5]))})" if isinstance(content, Mapping) and content else ""
        raise UserError(f"{shown}: expected weights by name, alone or under 'state_dict' or 'model', found none{keys}")
    return named, meta


def _load_weights_only(path: Path, shown: str, stand_ins: Sequence[StandIn]) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS, *stand_ins]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL (\S+)", str(error))
        if kind is None:  # torch's own words are of a setting that nobody should change
            raise UserError(f"{shown} is not a whole file of weights") from error
        raise UserError(
            f"{shown} cannot be read without running what is in it ({kind[1]}): where you trust it, save its weights alone by"
            " torch.save(model.state_dict(), FILE) and give that, or allow the name by"
            " torch.serialization.add_safe_globals in your own script"
        ) from error
    except (
        AssertionError,
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # no pickle at all
        raise UserError(f"{shown} is not a whole file of weights: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_tensors(content: Any) -> bool:
    return any(_holds_tensors(v) for v in content.values()) if isinstance(content, Mapping) else _is_tensor(content)


def _wrapper(content: Any) -> Any:
    """The entry that holds the weights: one that is known for it, or the only one that holds tensors by name."""
    if not isinstance(content, Mapping):
        return None
    if known := [key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and _holds_tensors(content[key])]:
        return known[0]
    if any(_is_tensor(value) for value in content.values()):
        return None
    held = [key for key, value in content.items() if isinstance(value, Mapping) and value]
    held = [key for key in held if all(_is_tensor(value) for value in content[key].values())]
    return held[0] if len(held) == 1 else None


def _without_prefixes(tensors: "dict[str, Tensor]", names: Collection[str]) -> "dict[str, Tensor]":
    """The tensors with common prefixes cut: all of them, or, for a module of ``names``, as many as fit it best."""
    forms = [tensors]
    while True:
        last = forms[-1]
        prefix = next((p for p in _PREFIXES if last and all(name.startswith(p) and name != p for name in last)), None)
        if prefix is None:
            break
        forms.append({name.removeprefix(prefix): tensor for name, tensor in last.items()})
    if not names:
        return forms[-1]
    known = set(names)
    return max(forms, key=lambda form: len(known & form.keys()))


def digest(tensors: "Mapping[str, Tensor] | Iterable[Tensor]") -> str:
    """16 hex digits that depend on names (else numbers), shapes, dtypes, values and order of tensors."""
    import hashlib

    import torch

    found = hashlib.sha256()
    items = tensors.items() if isinstance(tensors, Mapping) else enumerate(tensors)
    for name, tensor in items:
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
