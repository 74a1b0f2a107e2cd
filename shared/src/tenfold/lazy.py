"""Public names of a package that load on first use: ``import pckd`` costs nothing until a name is asked for.

A package lists its names once, in the block that type checkers read::

    if TYPE_CHECKING:
        from pckd.losses import PCKDLoss as PCKDLoss

    __all__, __getattr__, __dir__ = attach(__name__, needs={"training": "lightning"})
"""

import ast
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tenfold.errors import installed


def attach(
    package: str, needs: Mapping[str, str] | None = None
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package, from the ``if TYPE_CHECKING:`` block of its ``__init__``.

    Args:
        package: its ``__name__``.
        needs: submodule -> top-level module that an extra brings. Where that is not installed, the submodule's names are
            left out of ``__all__`` and ``__dir__``, so that ``from package import *`` and ``help(package)`` work; asking
            for one by its name raises what importing the submodule raises.

    Raises:
        ImportError: the package's source is not there to be read.
    """
    homes = _listed(package)
    missing = {submodule for submodule, module in (needs or {}).items() if not installed(module)}
    shown = [*sorted(name for name, home in homes.items() if home not in missing), "__version__"]

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return shown, load, lambda: list(shown)


def _listed(package: str) -> dict[str, str]:
    """Public name -> submodule, of the imports under ``if TYPE_CHECKING:`` that are re-exports (``X as X``)."""
    spec = sys.modules[package].__spec__
    source = spec.loader.get_source(package) if spec and hasattr(spec.loader, "get_source") else None  # type: ignore[union-attr]
    if source is None:
        raise ImportError(f"{package}: the source of its __init__ is needed and not there")
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {
        alias.name: str(statement.module).removeprefix(f"{package}.")
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith(f"{package}.")
        for alias in statement.names
        if alias.asname == alias.name
    }
