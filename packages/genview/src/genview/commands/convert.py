"""`genview convert`: ratios and generated pictures of the authors' code, as ours."""

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
    """Write a csv of levels (ratios) or a manifest (tree)."""
    keys = load(settings.data).train.keys
    if settings.ratios is not None:
        ratios(settings.ratios, keys, invocation)
    else:
        assert settings.tree is not None
        tree(Path(settings.tree).expanduser(), settings.suffix, keys, invocation)


def ratios(path: str, keys: tuple[str, ...], invocation: Invocation) -> None:
    """`path ratio` per line; a path may hold spaces, since the ratio is what stands after the last one."""
    by_name = {tail: key for key in keys for tail in tails(key)}
    policy, lines, unknown = AdaptivePolicy(), ["image,noise_level"], 0
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ratios {path}: cannot be read ({error})") from error
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        name, _, value = line.rstrip().rpartition(" ")
        try:
            level = policy(float(value))
        except ValueError as error:
            raise UserError(
                f"--ratios {path}, line {number}: expected 'path ratio' with a ratio in 0..1 ({error})"
            ) from error
        key = next((by_name[tail] for tail in tails(name) if tail in by_name), None)
        if key is None:
            unknown += 1
            continue
        quoted = '"' + key.replace('"', '""') + '"' if any(c in key for c in ',"\n') else key
        lines.append(f"{quoted},{level}")
    if len(lines) == 1:
        raise UserError(f"--ratios {path}: none of its paths is one of the data")
    invocation.folder.write_text("levels.csv", "\n".join(lines) + "\n")
    sys.stdout.write(
        f"{len(lines) - 1} levels in {invocation.folder.path / 'levels.csv'}, {unknown} paths are not of the data; put it"
        " beside the pictures and plan --data csv:levels.csv\n"
    )


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
