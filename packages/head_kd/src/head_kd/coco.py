"""A COCO file, checked for what training would stumble over, and mended where there is one right way to.

Faults are collected, so that one message has them all. Three kinds are told apart: what mmdet itself leaves out (boxes
without area or outside of their image) is counted and listed; what has one right reading (a missing ``area``, ids that
are strings) is filled in, in a copy; all else is refused, or left out with ``skip_bad``.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.files import replacing

_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}
"""First bytes of JPEG and PNG, and how a whole file ends."""
_TAIL = 4096
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set in COCO's format.

    Attributes:
        annotations: the JSON file that trains: the given one, or a mended copy of it.
        images: folder that its file names are relative to.
        classes: names in the order of the file's categories, which is the order of mmdet's labels.
        count: number of images.
        notes: what was left out or filled in, a line each.
    """

    annotations: Path
    images: Path
    classes: tuple[str, ...]
    count: int
    notes: tuple[str, ...] = ()


class Faults:
    """Faults of a file by kind, each with the places where it was found."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: str) -> None:
        """Note one."""
        self.found.setdefault(kind, []).append(where)

    def __bool__(self) -> bool:
        return bool(self.found)

    def lines(self) -> list[str]:
        """Each kind with its count and its first three places."""
        return [
            f"{len(places)} x {kind} ({'; '.join(places[:3])}{', ...' if len(places) > 3 else ''})"
            for kind, places in self.found.items()
        ]


def read_coco(path: Path) -> dict[str, Any]:
    """The content of a COCO file, its three lists there and not empty.

    Raises:
        UserError: the file cannot be read, or is no COCO file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or any(not isinstance(content.get(k), list) for k in lists):
        raise UserError(f"{path}: expected COCO's lists images, annotations and categories")
    for key in lists:
        if not content[key]:
            raise UserError(f"{path}: {key} is empty")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path}: {key} holds something that is not an object")
    return content


def check_coco(
    annotations: str | Path,
    images: str | Path,
    *,
    classes: Sequence[str] | None = None,
    order: Sequence[str] | None = None,
    mended: str | Path | None = None,
    skip_bad: bool = False,
    turned: bool = True,
) -> Split:
    """Read a COCO file, and check it for what training would stumble over.

    Args:
        annotations: the JSON file.
        images: the folder of its images.
        classes: names of the wanted categories; default: all.
        order: categories in the order that another split has; this one's are put into it, and may lack some.
        mended: where a copy is written if something has to be filled in, left out or put in order.
        skip_bad: whether bad images and boxes are left out instead of refused.
        turned: whether the pipeline turns images by their camera's tag, as mmdet's does.

    Raises:
        UserError: the file cannot be read or is empty, or it has faults: all of them are named with their counts.
    """
    path, folder = Path(annotations), Path(images)
    content = read_coco(path)
    faults, changes = Faults(), Faults()
    _categories(content, path, classes if order is None else None, changes)
    _number(content, changes)
    sizes = _images(content, folder, faults, changes, turned=turned)
    dropped = _boxes(content, sizes, faults, changes, scaled=_scaled(content))
    if faults and not skip_bad:
        raise UserError(f"{path}: {'; '.join(faults.lines())}; --skip_bad true leaves them out")
    if faults:
        content["images"] = [entry for entry in content["images"] if entry["id"] in sizes]
        content["annotations"] = [entry for entry in content["annotations"] if not entry.pop("_bad", False)]
        if not content["images"] or not content["annotations"]:
            raise UserError(f"{path}: nothing is left to train on: {'; '.join(faults.lines())}")
    if order is not None:
        _reorder(content, order, classes, path, changes)
    found = tuple(str(c["name"]) for c in content["categories"] if classes is None or str(c["name"]) in classes)
    notes = [f"left out: {line}" for line in (*faults.lines(), *_unwanted(content, found).lines())]
    notes += [f"filled in: {line}" for line in changes.lines()]
    notes += [f"mmdet leaves out: {line}" for line in dropped.lines()]
    notes += _unused(content) if order is None and classes is None else []
    if faults or changes:
        if mended is None:
            raise UserError(f"{path}: needs a mended copy: {'; '.join((*faults.lines(), *changes.lines()))}")
        path = Path(mended)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return Split(path, folder, found, len(content["images"]), tuple(f"{Path(annotations).name}: {n}" for n in notes))


def _unwanted(content: dict[str, Any], classes: Sequence[str]) -> Faults:
    """Boxes of categories that the config does not name, by their category."""
    names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
    found = Faults()
    for entry in content["annotations"]:
        if names[entry["category_id"]] not in classes:
            found.add("box of a class that the config does not name", names[entry["category_id"]])
    return found


def _unused(content: dict[str, Any]) -> list[str]:
    """What to say of classes without a box; Roboflow's exports begin with one that only names the group."""
    used = {entry["category_id"] for entry in content["annotations"]}
    empty = [str(entry["name"]) for entry in content["categories"] if entry["id"] not in used]
    if not empty:
        return []
    shown = f"{', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''}"
    how = "a config whose training data have metainfo = dict(classes=...) trains on the classes named there"
    return [f"{len(empty)} x class without a box ({shown}): {how}"]


def _categories(content: dict[str, Any], path: Path, classes: Sequence[str] | None, changes: Faults) -> None:
    """Check ids and names of images and categories."""
    for key in ("images", "categories"):
        ids = collections.Counter(entry.get("id") for entry in content[key])
        twice = next((i for i, n in ids.items() if n > 1 and i is not None), None)
        if twice is not None:
            raise UserError(f"{path}: {key}: id {twice} stands more than once")
        if None in ids:
            raise UserError(f"{path}: {key}: {ids[None]} without id")
    for entry in content["categories"]:
        if "name" not in entry:
            entry["name"] = str(entry["id"])
            changes.add("category without name", str(entry["id"]))
    names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
    shared = next((n for n, count in collections.Counter(names.values()).items() if count > 1), None)
    if shared is not None:
        alike = ", ".join(str(i) for i, name in names.items() if name == shared)
        raise UserError(f"{path}: categories {alike} are all named '{shared}'")
    for name in classes or ():
        if name not in names.values():
            raise UserError(f"{path}: no category '{name}': {did_you_mean(name, names.values())}")


def _number(content: dict[str, Any], changes: Faults) -> None:
    """Whole numbers for ids that are none; mmdet and pycocotools sort and compare them."""
    for key, field in (("images", "image_id"), ("categories", "category_id")):
        ids = [entry["id"] for entry in content[key]]
        if all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            known = {str(i): i for i in ids}
            for entry in content["annotations"]:
                if isinstance(entry.get(field), str) and entry[field] in known:
                    entry[field] = known[entry[field]]
                    changes.add(f"{field} that is a string", str(entry.get("id")))
            continue
        new = {str(old): number for number, old in enumerate(ids, 1)}
        for entry in content[key]:
            changes.add(f"id in {key} that is not a whole number", repr(entry["id"]))
            entry["id"] = new[str(entry["id"])]
        for entry in content["annotations"]:
            entry[field] = new.get(str(entry.get(field)), entry.get(field))
    ids = [entry.get("id") for entry in content["annotations"]]
    if len(set(map(str, ids))) < len(ids) or not all(isinstance(i, int) for i in ids):
        seen: set[Any] = set()
        for number, entry in enumerate(content["annotations"], 1):
            old = entry.get("id")
            if not isinstance(old, int) or old in seen:
                changes.add("annotation id that is missing, no whole number or not its own", str(old))
            seen.add(old)
            entry["id"] = number


def _images(
    content: dict[str, Any], folder: Path, faults: Faults, changes: Faults, *, turned: bool
) -> dict[Any, tuple[int, int]]:
    """Image id -> (width, height), of those whose file is there, whole and of the stated size."""
    sizes = {}
    for entry in content["images"]:
        where = f"image {entry['id']}"
        if not entry.get("file_name"):
            faults.add("image without file_name", where)
            continue
        file = folder / str(entry["file_name"])
        if not file.is_file() and "\\" in str(entry["file_name"]):
            entry["file_name"] = str(entry["file_name"]).replace("\\", "/")
            file = folder / entry["file_name"]
            if file.is_file():
                changes.add("file name with backslashes", where)
        if not file.is_file():
            faults.add("image without file", f"{where}: no file {file}")
            continue
        try:
            real = image_size(file, turned=turned)
        except (OSError, SyntaxError, ValueError) as error:
            faults.add("image that cannot be read to its end", f"{where}: {file}: {error}")
            continue
        stated = (entry.get("width"), entry.get("height"))
        if any(not isinstance(v, int | float) or v <= 0 for v in stated):
            entry["width"], entry["height"] = real
            changes.add("image without width and height", f"{where}: {real[0]} x {real[1]}")
        elif tuple(map(int, stated)) != real:
            how = ", which its camera's tag turns" if image_size(file, turned=not turned) != real else ""
            faults.add(
                "image of another size than stated",
                f"{where}: {file.name} is {real[0]} x {real[1]}{how}, the annotations say {stated[0]} x {stated[1]}",
            )
            continue
        sizes[entry["id"]] = real
    return sizes


def image_size(file: Path, *, turned: bool) -> tuple[int, int]:
    """Width and height of an image file as it is read; only one whose end is missing is decoded to find out.

    Args:
        file: the file.
        turned: whether it is read turned by its camera's tag.

    Raises:
        OSError: it is no image, or is cut off.
    """
    with file.open("rb") as stream:
        start = stream.read(2)
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - _TAIL))
        whole = _ENDS.get(start, b"") in stream.read()
    with Image.open(file) as image:
        width, height = image.size
        sideways = turned and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        if not whole:
            ImageOps.grayscale(image).load()
    return (height, width) if sideways else (width, height)


def _scaled(content: dict[str, Any]) -> bool:
    """Whether all boxes lie between 0 and 1, as those that are shares of the image do."""
    boxes = [entry.get("bbox") for entry in content["annotations"]]
    numbers = [v for box in boxes if isinstance(box, list) for v in box if isinstance(v, int | float)]
    return bool(numbers) and max(numbers) <= 1 and any(0 < v < 1 for v in numbers)


def _boxes(
    content: dict[str, Any],
    sizes: dict[Any, tuple[int, int]],
    faults: Faults,
    changes: Faults,
    *,
    scaled: bool,
) -> Faults:
    """Check each annotation; a bad one gets the key ``_bad``. Returns what mmdet leaves out."""
    known = {entry["id"] for entry in content["images"]}
    categories = {entry["id"] for entry in content["categories"]}
    dropped = Faults()
    for entry in content["annotations"]:
        fault = _fault(entry, known, categories, scaled=scaled)
        if fault is not None:
            faults.add(fault[0], f"annotation {entry['id']}{fault[1]}")
            entry["_bad"] = True
            continue
        if entry["image_id"] not in sizes:  # its image is a fault already
            entry["_bad"] = True
            continue
        x, y, w, h = entry["bbox"]
        if not isinstance(entry.get("area"), int | float):
            entry["area"] = w * h
            changes.add("annotation without area", f"annotation {entry['id']}")
        if entry.get("iscrowd") not in (0, 1):
            changes.add("annotation without iscrowd", f"annotation {entry['id']}")
            entry["iscrowd"] = 0
        width, height = sizes[entry["image_id"]]
        inside = max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0))
        if w < 1 or h < 1 or entry["area"] <= 0:
            dropped.add("box without area", f"annotation {entry['id']}: {entry['bbox']}")
        elif inside == 0:
            dropped.add("box outside of its image", f"annotation {entry['id']}: {entry['bbox']}")
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            what = f"annotation {entry['id']}: bbox {entry['bbox']} leaves its image of {width} x {height}"
            faults.add("box that leaves its image", what)
            entry["_bad"] = True
    return dropped


def _fault(entry: dict[str, Any], images: set[Any], categories: set[Any], *, scaled: bool) -> tuple[str, str] | None:
    """Kind of an annotation's fault, and what is to be said of this one; None where there is none."""
    if entry.get("image_id") not in images:
        return "annotation of no image", f": image_id {entry.get('image_id')} is no image of the file"
    if entry.get("category_id") not in categories:
        listed = ", ".join(map(str, sorted(categories)))
        return "unknown category", f": category_id {entry.get('category_id')} is unknown, expected one of {listed}"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return "box that is not x, y, width, height", f": bbox {box} is not x, y, width, height"
    if not all(math.isfinite(v) for v in box):
        return "box that is not finite", f": {box}"
    if scaled:
        return "box between 0 and 1 (COCO's are in pixels: multiply by the image's width and height)", f": {box}"
    return None


def _reorder(
    content: dict[str, Any], order: Sequence[str], classes: Sequence[str] | None, path: Path, changes: Faults
) -> None:
    """Put categories into another split's order, with those that this one lacks.

    Raises:
        UserError: this split has a category that the other does not know.
    """
    by_name = {str(entry["name"]): entry for entry in content["categories"]}
    wanted = [name for name in by_name if classes is None or name in classes]
    used = {entry["category_id"] for entry in content["annotations"]}
    extra = [name for name in wanted if name not in order]
    if any(by_name[name]["id"] in used for name in extra):
        shown = ", ".join(name for name in extra if by_name[name]["id"] in used)
        raise UserError(f"{path}: has boxes of classes that the training data do not know: {shown}")
    if wanted == list(order):
        return
    lacking = [name for name in order if name not in by_name]
    first = max(entry["id"] for entry in content["categories"]) + 1
    by_name |= {name: {"id": first + number, "name": name} for number, name in enumerate(lacking)}
    unwanted = [entry for name, entry in by_name.items() if name not in order and name not in wanted]
    content["categories"] = [by_name[name] for name in order] + unwanted
    for name in lacking:
        changes.add("class of the training data that this split lacks", name)
    for name in extra:
        changes.add("category without a box that the training data do not know, left out", name)
    if not lacking and not extra:
        changes.add("categories put into the order of the training data", ", ".join(order))
