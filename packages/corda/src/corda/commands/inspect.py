"""`corda inspect`: what a command wrote, or any LoRA, layer by layer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corda.adapters import CONFIG, WEIGHTS
from corda.commands._files import (
    CANDIDATES,
    CONVERSION,
    RANKS,
    REPORT,
    STATS,
    SUMMARY,
    TRUNCATION,
    VERIFICATION,
    read_json,
    stats_files,
)
from corda.commands._reports import (
    adapter_text,
    conversion_text,
    factors_text,
    init_text,
    ranks_text,
    stats_text,
    truncation_text,
    verification_text,
)
from corda.config import InspectSettings
from corda.context import ContextStats
from corda.factors import METHOD, FactorSet
from corda.start import START
from tenfold import UserError, checkpoints
from tenfold.cli import Invocation
from tenfold.terminal import claims_table

TEXTS: dict[str, tuple[Callable[[dict[str, Any]], str], set[str]]] = {
    REPORT: (init_text, {"init", "layers", "attach"}),
    VERIFICATION: (verification_text, {"holds", "max_difference"}),
    RANKS: (ranks_text, {"ranks", "shapes", "budget"}),
    CONVERSION: (conversion_text, {"discarded", "layers"}),
    TRUNCATION: (truncation_text, {"method", "layers"}),
    SUMMARY: (claims_table, {"arms", "claims"}),
}
"""File of a command -> function that shows it, and the fields that tell it from the others."""


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Print what is there."""
    sys.stdout.write(describe(Path(settings.run)))


def describe(path: Path) -> str:
    """What a folder or file of ours, or a LoRA adapter's folder, holds.

    Raises:
        UserError: nothing there that is ours.
    """
    if path.is_dir():
        known = (*TEXTS, STATS, CONFIG, START)
        found = next((path / name for name in known if (path / name).is_file()), None)
        if found is None and list(path.glob(CANDIDATES)):
            return "\n".join(f"{file.name}\n{stats_text(ContextStats.load(file))}" for file in stats_files(path))
        if found is None:
            raise UserError(f"--run {path}: none of {', '.join(known)} in it")
        path = found
    if path.name in (CONFIG, WEIGHTS):
        return adapter_text(path.parent)
    if path.suffix == ".json":
        report = read_json(path)
        for text, fields in TEXTS.values():
            if fields <= set(report):
                return text(report)
        raise UserError(f"--run {path}: not a file of ours; its fields are {', '.join(report)}")
    return factors_text(FactorSet.load(path)) if _method(path) == METHOD else stats_text(ContextStats.load(path))


def _method(path: Path) -> str:
    """What a file of ours holds; empty for any other file."""
    header = checkpoints.metadata(path).get("tenfold") if path.is_file() else None
    return str(json.loads(header)["method"]) if header else ""
