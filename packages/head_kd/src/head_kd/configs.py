"""mmengine configs from files, mmdet's own and this package's recipes among them.

A config is code, and mmengine runs it: take configs only from those whose code you would run.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mmdet
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict

from head_kd.families import family
from tenfold import UserError
from tenfold.errors import did_you_mean


def resolve_config(config: Any) -> Any:
    """An mmengine ``Config``: itself, from a file, or ``mmdet::folder/name.py`` of those that mmdet ships.

    A config is code, and mmengine runs it: take configs only from those whose code you would run.

    Raises:
        UserError: no such file, or it does not define a model.
    """
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
        path = Path(str(mmdet.__file__)).parent / ".mim" / "configs" / name.removeprefix("mmdet::")
    elif name.startswith("recipe:"):
        path = Path(__file__).parent / "recipes" / name.removeprefix("recipe:")
    else:
        path = Path(name).expanduser()
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(
            f"{name}: no such config file"
            + (f" in {path.parent.name}; {did_you_mean(path.name, near)}" if near else "")
        )
    return path


def innermost(dataset: Any) -> Any:
    """The data set's config inside of wrappers, such as mmdet's RepeatDataset."""
    while dataset is not None and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset


def config_classes(cfg: Any) -> tuple[str, ...] | None:
    """The classes that a config states for its training data, directly or through the data set's own list."""
    dataset = innermost((cfg.get("train_dataloader") or {}).get("dataset") or {})
    return stated_classes({**dataset, "metainfo": dataset.get("metainfo") or cfg.get("metainfo")})


def named_classes(cfg: Any) -> tuple[str, ...] | None:
    """The classes that a config itself names for its training data; None where it takes those of the data set's kind."""
    dataset = innermost((cfg.get("train_dataloader") or {}).get("dataset") or {})
    named = (dataset.get("metainfo") or cfg.get("metainfo") or {}).get("classes")
    return None if named is None else (named,) if isinstance(named, str) else tuple(named)


def stated_classes(dataset: Any) -> tuple[str, ...] | None:
    """The classes that a data set's config states, directly or through the data set's own list."""
    stated = (dataset.get("metainfo") or {}).get("classes")
    if stated is None and dataset.get("type") is not None:
        kind = DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]
        stated = getattr(kind, "METAINFO", {}).get("classes")
    if isinstance(stated, str):
        return (stated,)
    return tuple(stated) if stated else None


def transforms(node: Any) -> Iterator[Any]:
    """Configs of all transforms of a data set's config, those inside of wrappers and choices too."""
    if isinstance(node, dict):
        for key in ("pipeline", "transforms"):
            for step in node.get(key) or ():
                yield from ([step] if isinstance(step, dict) else [])
        for value in node.values():
            yield from transforms(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from transforms(value)
