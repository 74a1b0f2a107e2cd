"""`genview convert`: ratios and generated pictures of the authors' code, as ours."""

import csv
import io
import json
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from genview.config import ConvertSettings
from genview.data import load
from genview.levels import AdaptivePolicy
from genview.plans import line_of
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.readers import IMAGE_SUFFIXES


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Write a csv of levels (ratios, table) or a manifest (tree)."""
    keys = load(settings.data).train.keys
    if settings.ratios is not None:
        _write(levels(settings.ratios), keys, f"--ratios {settings.ratios}", invocation)
    elif settings.table is not None:
        _write(columns(settings.table), keys, f"--table {settings.table}", invocation)
    else:
        assert settings.tree is not None
        tree(Path(settings.tree).expanduser(), settings.suffix, keys, invocation)


def _text(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error})") from error


def levels(path: str) -> list[dict[str, str]]:
    """Rows of image and noise level, of `path ratio` per line; a path may hold spaces, the ratio stands after the last one.

    Raises:
        UserError: a line that is none, a ratio outside of 0..1.
    """
    policy, rows = AdaptivePolicy(), []
    for number, line in enumerate(_text(path, "--ratios").splitlines(), 1):
        if not line.strip():
            continue
        name, _, value = line.rstrip().rpartition(" ")
        try:
            rows.append({"image": name, "noise_level": str(policy(float(value)))})
        except ValueError as error:
            raise UserError(
                f"--ratios {path}, line {number}: expected 'path ratio' with a ratio in 0..1 ({error})"
            ) from error
    return rows


def columns(path: str) -> list[dict[str, str]]:
    """Rows of a csv of GenView++: image and those of prompt, noise_level and guidance_scale that it has.

    Raises:
        UserError: it has no column image, or none of the others.
    """
    reader = csv.DictReader(io.StringIO(_text(path, "--table")))
    known = ("image", *(name for name in COLUMNS if name in (reader.fieldnames or ())))
    if reader.fieldnames is None or "image" not in reader.fieldnames or len(known) == 1:
        raise UserError(f"--table {path}: expected a header with image and any of {', '.join(COLUMNS)}")
    return [{name: row[name] or "" for name in known} for row in reader]


def _write(rows: list[dict[str, str]], keys: tuple[str, ...], what: str, invocation: Invocation) -> None:
    """Write the rows whose pictures are of the data, under the names that the data has for them."""
    by_name = {tail: key for key in keys for tail in tails(key)}
    found = []
    for row in rows:
        key = next((by_name[tail] for tail in tails(row["image"]) if tail in by_name), None)
        if key is not None:
            found.append({**row, "image": key})
    if not found:
        raise UserError(f"{what}: none of its paths is one of the data, such as {keys[0]}")
    out = io.StringIO()
    writer = csv.DictWriter(out, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    invocation.folder.write_text("levels.csv", out.getvalue())
    sys.stdout.write(
        f"{len(found)} rows in {invocation.folder.path / 'levels.csv'}, {len(rows) - len(found)} paths are not of the data; put"
        " it beside the pictures and plan --data csv:levels.csv\n"
    )


COLUMNS = ("prompt", "noise_level", "guidance_scale")
"""What GenView++'s tables say of a picture."""


def tails(name: str) -> list[str]:
    """A path and its last two parts: enough to tell pictures of different folders apart, whatever stands before."""
    parts = PurePosixPath(name).parts
    return ["/".join(parts[-n:]) for n in range(len(parts), 1, -1)] or [name]


def tree(root: Path, suffix: str, keys: tuple[str, ...], invocation: Invocation) -> None:
    """Pictures that mirror the data's folders, under the source's path without its own ending."""
    if not root.is_dir():
        raise UserError(f"--tree {root}: no such folder")
    rows: list[dict[str, Any]] = []
    for key in keys:
        stem = root / PurePosixPath(key).with_suffix("")
        found = [stem.with_name(f"{stem.name}{suffix}{end}") for end in sorted(IMAGE_SUFFIXES)]
        there = next((path for path in found if path.is_file()), None)
        if there is not None:
            path = there.relative_to(root).as_posix()
            rows.append({"key": key, "variation": 0, "path": path, "status": "ok", "bytes": there.stat().st_size})
    if not rows:
        raise UserError(f"--tree {root}: no picture there has the path of one of the data, such as {keys[0]}")
    folder = invocation.folder
    head = {"views": os.path.relpath(root.resolve(), folder.path.resolve()), "kind": "genview.views"}
    folder.write_text("manifest.jsonl", json.dumps(head) + "\n" + "".join(line_of(row) for row in rows))
    sys.stdout.write(f"{len(rows)} of {len(keys)} pictures have a view; train --views {folder.path}\n")
