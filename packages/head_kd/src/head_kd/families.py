"""Which family of the mm stack is installed: upstream (mmdet, mmengine, mmcv) or the onedl forks, which share its names."""

import importlib.metadata
from collections.abc import Iterable

from tenfold import UserError

UPSTREAM = ("mmdet", "mmengine", "mmcv", "mmcv-lite", "mmcv-full")
ONEDL = ("onedl-mmdetection", "onedl-mmengine", "onedl-mmcv")


def installed(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> version, for those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def family() -> str:
    """``"mmdet"`` or ``"onedl"``, whichever is installed whole.

    Raises:
        UserError: none is installed, a part is missing, or parts of both are (they overwrite each other's files).
    """
    upstream, onedl = installed(UPSTREAM), installed(ONEDL)
    if upstream and onedl:
        raise UserError(
            f"two families of the mm stack are mixed, {_listed(upstream)} and {_listed(onedl)}: they share their import"
            f' names, so keep one in a fresh environment, pip install "head-kd[mmdet]" or "head-kd[onedl]"'
        )
    for name, found, needed in (
        ("mmdet", upstream, ("mmdet", "mmengine", "mmcv or mmcv-lite")),
        ("onedl", onedl, ONEDL),
    ):
        if found:
            missing = [part for part in needed if not any(option in found for option in part.split(" or "))]
            if missing:
                raise UserError(f'{", ".join(missing)} is not installed: pip install "head-kd[{name}]"')
            return name
    raise UserError(
        'no mmdet is installed: pip install "head-kd[mmdet]" (upstream) or "head-kd[onedl]" (maintained forks)'
    )


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())
