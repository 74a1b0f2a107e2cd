"""Every distribution found under shared/ and packages/; a new package is covered by being there."""

import ast
import dataclasses
import importlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Distribution:
    folder: Path

    @cached_property
    def project(self) -> dict:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    @cached_property
    def alternatives(self) -> list[str]:
        """Extras that stand in place of another: their distributions give the same import names, never both at once."""
        settings = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))
        return settings.get("tool", {}).get("tenfold", {}).get("alternatives", [])

    @property
    def name(self) -> str:
        return self.project["name"]

    @property
    def is_package(self) -> bool:
        """One of the packages, not the thin library under them."""
        return self.folder.parent.name == "packages"

    @property
    def import_name(self) -> str:
        return self.folder.name if self.is_package else self.name

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.import_name

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.import_name)

    @property
    def app(self):
        return importlib.import_module(f"{self.import_name}.cli").app

    def main(self, argv: Sequence[str]) -> int:
        return importlib.import_module(f"{self.import_name}.cli").main(argv)

    @property
    def modules(self) -> list[str]:
        return sorted(path.stem for path in self.source.glob("*.py") if path.stem != "__init__")

    def requirements(self, *, bench: bool = True) -> set[str]:
        """Normalized names of what the distribution declares, in its core and its extras."""
        lines = list(self.project["dependencies"])
        for extra, group in self.project.get("optional-dependencies", {}).items():
            lines += group if (bench or extra != "bench") and extra not in self.alternatives else []
        return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in lines}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    at_import_time: bool
    """False inside a function or under TYPE_CHECKING."""


def imports_of(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, eager: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(Import(node.module, eager))
            found.extend(Import(f"{node.module}.{alias.name}", eager) for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        for child in ast.iter_child_nodes(node):
            visit(child, eager and not lazy)

    visit(ast.parse(path.read_text(encoding="utf-8")), eager=True)
    return found


DISTRIBUTIONS = [
    Distribution(path.parent)
    for path in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
]
PACKAGES = [distribution for distribution in DISTRIBUTIONS if distribution.is_package]


def standard_library(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names
