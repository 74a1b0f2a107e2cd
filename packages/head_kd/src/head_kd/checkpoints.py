"""Weights and configs from files: nothing of a foreign file is executed but what is an mmengine config by design."""

import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from head_kd.families import family
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


def resolve_config(config: Any) -> Any:
    """An mmengine ``Config``: itself, from a file, or ``mmdet::folder/name.py`` of those that mmdet ships.

    A config is code, and mmengine runs it: take configs only from those whose code you would run.

    Raises:
        UserError: no such file, or it does not define a model.
    """
    from mmengine.config import Config, ConfigDict

    if isinstance(config, Config):
        found = config
    elif isinstance(config, dict | ConfigDict):
        found = Config(dict(config) if "model" in config else {"model": dict(config)})
    else:
        family()
        path = config_path(str(config))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that pkg_resources is deprecated is mmengine's business
                found = Config.fromfile(path)
        except ModuleNotFoundError as error:
            try:
                import pkg_resources  # noqa: F401  # upstream mmengine looks "mmdet::" up by it; setuptools has dropped it
            except ModuleNotFoundError:
                raise UserError(
                    f'{path}: mmengine needs pkg_resources for "mmdet::": pip install "setuptools<81"'
                ) from error
            raise
        except (OSError, SyntaxError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a config that mmengine reads: {error}") from error
    if "model" not in found:
        raise UserError(f"{config} defines no model")
    return found


def config_path(name: str) -> Path:
    """The file of a config's name; ``mmdet::`` stands for mmdet's own configs, ``recipe:`` for this package's."""
    if name.startswith("mmdet::"):
        import mmdet

        path = Path(str(mmdet.__file__)).parent / ".mim" / "configs" / name.removeprefix("mmdet::")
    elif name.startswith("recipe:"):
        path = Path(__file__).parent / "recipes" / name.removeprefix("recipe:")
    else:
        path = Path(name).expanduser()
    if not path.is_file():
        from tenfold.errors import did_you_mean

        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(
            f"{name}: no such config file"
            + (f" in {path.parent.name}; {did_you_mean(path.name, near)}" if near else "")
        )
    return path
