"""The files that commands write and read again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda.context import ContextStats
from corda.fingerprints import differences, listed
from tenfold import UserError

STATS = "context.safetensors"
CANDIDATES = "context-*.safetensors"
INITIAL = "corda_init"
RESIDUAL = "residual"
REPORT = "corda_report.json"
RANKS = "ranks.json"
VERIFICATION = "verification.json"
CONVERSION = "conversion.json"
TRUNCATION = "truncation.json"
SUMMARY = "summary.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with named fields, found {type(content).__name__}")
    return content


def stats_files(path: Path) -> list[Path]:
    """The files of statistics at a path: the file itself, or those in the folder of a command.

    Raises:
        UserError: a folder without any.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(CANDIDATES), key=lambda file: (len(file.name), file.name))
    found = [path / STATS] if (path / STATS).is_file() else found
    if not found:
        raise UserError(f"{path}: no {STATS} in it; expected a folder of `corda stats`")
    return found


def load_stats(paths: Sequence[str] | None) -> list[ContextStats]:
    """The statistics in files and folders, in their order.

    Raises:
        UserError: a folder without any, or a file that is something else.
    """
    return [ContextStats.load(file) for path in paths or () for file in stats_files(Path(path))]


def check_stats(paths: Sequence[str] | None, candidates: Sequence[ContextStats], model: str, fingerprint: str) -> None:
    """Raise ``UserError`` unless the statistics were collected on the model of this fingerprint."""
    for stats in candidates:
        differing = differences(stats.fingerprint, fingerprint)
        if differing:
            shown = ",".join(paths or ())
            raise UserError(f"--stats {shown}: collected on another model than {model} ({listed(differing)} differ)")


def check_base(model: str, found: str, recorded: dict[str, Any], initial: Path) -> None:
    """Raise ``UserError`` unless a fingerprint is the one that was recorded with an initialization."""
    expected = str(recorded.get("fingerprint"))
    differing = differences(expected, found)
    if differing:
        made = f", which was made for {recorded['model']}" if "model" in recorded else ""
        raise UserError(
            f"--model {model} is not the base model of {initial}{made}"
            f" ({listed(differing)} differ; fingerprint {found[:12]}, expected {expected[:12]})"
        )
