"""Scenes of nerfstudio, instant-ngp and the Blender data sets: pictures that ``transforms.json`` names, with their cameras.

The file is JSON and is written back as it was read, byte for byte, unless a picture was left out or a path had to be mended.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from tenfold import UserError
from visctrl.viewset import Missing, View, ViewSet, below, copy_below, settle

FILES = ("transforms.json", "transforms_train.json", "transforms_val.json", "transforms_test.json")
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
SPLITS = ("train_filenames", "val_filenames", "test_filenames")
INTRINSICS = (
    "camera_model",
    "w",
    "h",
    "fl_x",
    "fl_y",
    "cx",
    "cy",
    "k1",
    "k2",
    "k3",
    "k4",
    "p1",
    "p2",
    "camera_angle_x",
)


@dataclass(frozen=True)
class NerfstudioScene(ViewSet):
    """Pictures with the files that hold their cameras.

    Attributes:
        documents: each file's name below the scene, with its content where that had to change.
        carried: further files that the scene names: masks, depth, points.
    """

    documents: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    kind = "nerfstudio"

    @override
    def write_rest(self, folder: Path) -> None:
        copy_below(self.root, self.carried, folder)
        for name, content in self.documents.items():
            if content is None:
                copy_below(self.root, [name], folder)
            else:
                (folder / name).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def read_nerfstudio(root: Path, missing: Missing = "refuse") -> NerfstudioScene:
    """The scene of a folder with ``transforms.json``, or with one file for each of train, val and test.

    Args:
        root: the folder, or the file in it.
        missing: what to do about frames whose picture or pose is not there.

    Raises:
        UserError: no such file, one that is not JSON or has no frames, a path out of the folder, or missing frames.
    """
    names = [root.name] if root.is_file() else [name for name in FILES if (root / name).is_file()]
    root = root.parent if root.is_file() else root
    if "transforms.json" in names:
        names = ["transforms.json"]
    if not names:
        raise UserError(f"--data nerfstudio:{root}: no transforms.json in it, nor transforms_train.json")
    found = _Found(root, {}, {}, [], [])
    documents = {name: _document(found, name) for name in names}
    settle(str(root / names[0]), found.broken, len(found.views), missing)
    return NerfstudioScene(
        root, list(found.views.values()), found.broken, found.remarks, documents, tuple(dict.fromkeys(found.carried))
    )


@dataclass(frozen=True)
class _Found:
    root: Path
    views: dict[str, View]
    broken: dict[str, str]
    carried: list[str]
    remarks: list[str]


def _document(found: _Found, name: str) -> dict[str, Any] | None:
    """Read one file; returns what has to be written in its place, None for the same bytes."""
    path = found.root / name
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a file of JSON ({' '.join(str(error).split())})") from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise UserError(f"{path}: expected a list 'frames' with at least one frame")
    new = copy.deepcopy(content)
    new["frames"], gone, moved = [], set(), {}
    for number, frame in enumerate(frames):
        given = frame.get("file_path") if isinstance(frame, dict) else None
        if not isinstance(given, str) or not given:
            raise UserError(f"{path}, frame {number}: expected a 'file_path'")
        try:
            place = below(found.root, given)
        except UserError as error:
            raise UserError(f"{path}, frame {number}: {error}") from error
        there = next((place + end for end in SUFFIXES if (found.root / (place + end)).is_file()), None)
        why = _why_broken(frame, number, there)
        if why or there is None:
            found.broken[given] = why
            gone.add(given)
            continue
        kept = copy.deepcopy(frame)
        if "\\" in given or Path(given).is_absolute():
            kept["file_path"] = moved[given] = there
        for key, value in _paths(frame):
            kept[key] = _carry(found, f"{path}, frame {number}: {key}", value)
        new["frames"].append(kept)
        if there not in found.views:
            found.views[there] = _view(found.root, there, kept, content)
    for key, value in _paths(content):
        new[key] = _carry(found, f"{path}: {key}", value)
    for key in SPLITS:
        if isinstance(new.get(key), list):
            new[key] = [moved.get(x, x) for x in new[key] if x not in gone]
    return None if new == content else new


def _why_broken(frame: Mapping[str, Any], number: int, there: str | None) -> str:
    if there is None:
        return f"the picture of frame {number} is not there"
    matrix = frame.get("transform_matrix")
    rows = matrix if isinstance(matrix, list) else []
    good = len(rows) in {3, 4} and all(
        isinstance(row, list)
        and len(row) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in row)
        for row in rows
    )
    return "" if good else f"frame {number} has no pose (transform_matrix, 4 x 4 finite numbers)"


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Entries that name further files: masks, depth, points."""
    for key, value in values.items():
        if key.endswith("path") and key != "file_path" and isinstance(value, str) and value:
            yield key, value


def _carry(found: _Found, where: str, given: str) -> str:
    """Take a further file along; returns the path to be written."""
    try:
        place = below(found.root, given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if (found.root / place).is_file():
        found.carried.append(place)
    else:
        found.remarks.append(f"{where}: {given} is not there")
    return place if "\\" in given or Path(given).is_absolute() else given


def _view(root: Path, name: str, frame: Mapping[str, Any], content: Mapping[str, Any]) -> View:
    values = {key: frame.get(key, content.get(key)) for key in INTRINSICS}
    w, h = (x if isinstance(x, int | float) and math.isfinite(x) else 0 for x in (values["w"], values["h"]))
    mask = frame.get("mask_path")
    path = root / below(root, mask) if isinstance(mask, str) and mask else None
    return View(name, root / name, json.dumps(values), (round(w), round(h)) if w > 0 and h > 0 else None, path)
