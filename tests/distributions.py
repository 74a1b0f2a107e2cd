"""Every distribution found under shared/ and packages/; a new package is covered by being there.

Where their dependencies collide, the environment variable ``TENFOLD_DISTRIBUTIONS`` names those that are tested (with
commas); the sessions of nox set it, and together they cover all.
"""

import ast
import dataclasses
import importlib
import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Literal

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
        """Submodules of the package itself, as one names them after a dot."""
        return sorted(
            {
                self.name_of(path).split(".")[1]
                for path in self.files
                if path.parent != self.source or path.stem != "__init__"
            }
        )

    @property
    def files(self) -> list[Path]:
        """Every module; recipes are settings, also where their ecosystem writes them as Python."""
        return sorted(
            path for path in self.source.rglob("*.py") if "recipes" not in path.relative_to(self.source).parts
        )

    def name_of(self, path: Path) -> str:
        """Dotted name of a module's file."""
        parts = [self.import_name, *path.relative_to(self.source).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def owns(self, dotted: str) -> str | None:
        """The module of this distribution that an imported name is, or is in; None for others' names."""
        known = {self.name_of(path) for path in self.files}
        while dotted.partition(".")[0] == self.import_name:
            if dotted in known:
                return dotted
            dotted = dotted.rpartition(".")[0]
            if not dotted:
                break
        return None

    def requirements(self, *, bench: bool = True) -> set[str]:
        """Normalized names of what the distribution declares, in its core and its extras."""
        lines = list(self.project["dependencies"])
        for extra, group in self.project.get("optional-dependencies", {}).items():
            lines += group if (bench or extra != "bench") and extra not in self.alternatives else []
        return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in lines}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    when: Literal["import", "call", "typing"]
    """When the module is imported, when a function is called, or for type checkers alone."""
    plain: bool = False
    """``import a.b``, which asks for no name of a's."""

    @property
    def at_import_time(self) -> bool:
        return self.when == "import"


def imports_of(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, when: Literal["import", "call", "typing"]) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, when, plain=True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(Import(node.module, when))
            found.extend(Import(f"{node.module}.{alias.name}", when) for alias in node.names)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                visit(child, "typing")
            for child in node.orelse:
                visit(child, when)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and when == "import":
            when = "call"
        for child in ast.iter_child_nodes(node):
            visit(child, when)

    visit(ast.parse(path.read_text(encoding="utf-8")), "import")
    return found


ALL = [
    Distribution(path.parent)
    for path in [ROOT / "shared/pyproject.toml", *sorted(ROOT.glob("packages/*/pyproject.toml"))]
]
_NAMED = [name for name in os.environ.get("TENFOLD_DISTRIBUTIONS", "").split(",") if name]
DISTRIBUTIONS = [each for each in ALL if not _NAMED or each.name in _NAMED]
PACKAGES = [distribution for distribution in DISTRIBUTIONS if distribution.is_package]


def standard_library(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names
