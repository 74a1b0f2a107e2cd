"""PASCAL VOC's XML files as a COCO file."""

import dataclasses
import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from head_kd.coco import Faults, Split, check_coco, image_size
from tenfold import UserError
from tenfold.files import replacing

_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".JPG", ".JPEG", ".PNG")
_DIFFICULT = {"0": 0, "1": 1, "": 0, "unspecified": 0, "false": 0, "true": 1}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the annotations and pictures of a split lie, and the names of both."""

    annotations: Path
    images: Path
    names: list[str]


def voc_folder(
    root: str | Path,
    split: str,
    out: str | Path,
    *,
    skip_bad: bool = False,
    order: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """A split of a PASCAL VOC folder (``Annotations``, ``JPEGImages``, ``ImageSets/Main/SPLIT.txt``) as a COCO file.

    Boxes lose VOC's offset of 1; difficult objects become ``iscrowd``, which mmdet ignores in training. A folder SPLIT with
    pictures and XML files side by side, as Roboflow writes it, is read too.

    Args:
        root: the folder, ``VOC2007`` for one.
        split: train, val, trainval or test; ``val`` stands for ``valid`` as well.
        out: where the COCO file is written.
        skip_bad: whether bad images and boxes are left out instead of refused.
        order: classes of another split, whose order this one takes; default: that of ``classes``, or by name.
        classes: names of the wanted classes; default: all. Objects of others are left out, and counted.

    Raises:
        UserError: a file is missing or damaged, with the others that are; the message names file and object.
    """
    root, out = Path(root), Path(out)
    layout = _layout(root, split)
    faults, filled = Faults(), Faults()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for name in layout.names:
        file = layout.annotations / f"{name}.xml"
        try:
            tree = ET.parse(file).getroot()  # noqa: S314  # entities are not expanded by this parser
        except (OSError, ET.ParseError) as error:
            faults.add("annotation file that cannot be read", f"{file}: {error}")
            continue
        picture = _picture(layout.images, name, tree.findtext("filename"))
        size = tree.find("size")
        width, height = (_number(size, tag) if size is not None else math.nan for tag in ("width", "height"))
        if not (width > 0 and height > 0):
            try:
                width, height = image_size(layout.images / picture, turned=True)
            except (OSError, ValueError, SyntaxError) as error:
                faults.add("annotation without size", f"{file}: {error}")
                continue
            filled.add("annotation without size", f"{file.name}: {width} x {height}")
        number = len(images) + 1
        images.append({"id": number, "file_name": picture, "width": int(width), "height": int(height)})
        for item in tree.iter("object"):
            found = _object(item, file, faults)
            if found is not None:
                objects.append({"id": len(objects) + 1, "image_id": number, **found})
    if faults and not skip_bad:
        raise UserError(f"voc:{root}: {'; '.join(faults.lines())}; --skip_bad true leaves them out")
    unwanted = Faults()
    if classes is not None:
        for entry in objects:
            if entry["category"] not in classes:
                unwanted.add("object of a class that the config does not name", entry["category"])
        objects = [entry for entry in objects if entry["category"] in classes]
        order = order or classes
    if not objects:
        others = ", ".join(sorted(set(next(iter(unwanted.found.values()), []))))
        of = f" of the classes that the config names; it has {others}" if others else ""
        raise UserError(f"voc:{root}: no objects in the split '{split}'{of}")
    known = sorted({entry["category"] for entry in objects} | set(order or ()))
    extra = sorted(set(known) - set(order)) if order is not None else []
    if extra:
        raise UserError(
            f"voc:{root}: '{split}' has objects of classes that the training data do not know: {', '.join(extra)}"
        )
    known = list(order) if order is not None else known
    for number, entry in enumerate(objects, 1):
        entry["id"], entry["category_id"] = number, known.index(entry.pop("category")) + 1
    categories = [{"id": i + 1, "name": c} for i, c in enumerate(known)]
    content = {"images": images, "annotations": objects, "categories": categories}
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    split_found = check_coco(out, layout.images, mended=out, skip_bad=skip_bad)
    notes = [f"left out: {line}" for line in (*faults.lines(), *unwanted.lines())] + [
        f"filled in: {line}" for line in filled.lines()
    ]
    return dataclasses.replace(split_found, notes=(*(f"{split}: {n}" for n in notes), *split_found.notes))


def _layout(root: Path, split: str) -> _Layout:
    """The folders of a split and the names of its annotations.

    Raises:
        UserError: none of the known layouts fits.
    """
    aliases = {"val": ("val", "valid", "validation")}.get(split, (split,))
    pictures = next((root / n for n in ("JPEGImages", "images") if (root / n).is_dir()), root)
    for name in aliases:
        listing = root / "ImageSets" / "Main" / f"{name}.txt"
        if listing.is_file():
            lines = listing.read_text(encoding="utf-8").splitlines()
            return _Layout(root / "Annotations", pictures, [line.split()[0] for line in lines if line.strip()])
        beside = root / name
        if beside.is_dir() and (names := sorted(file.stem for file in beside.glob("*.xml"))):
            return _Layout(beside, beside, names)
    listing = root / "ImageSets" / "Main"
    there = sorted(file.stem for file in listing.glob("*.txt")) or sorted(
        folder.name for folder in root.glob("*/") if any(folder.glob("*.xml"))
    )
    hint = f"; it has {', '.join(there)}: name two with --split TRAIN,MEASURED" if there else ""
    raise UserError(f"voc:{root}: {listing / f'{split}.txt'}: No such file{hint}")


def _picture(folder: Path, name: str, stated: str | None) -> str:
    """File name of a picture: as stated where it is there, else that of the annotation."""
    plain = (stated or "").replace("\\", "/").strip()
    for candidate in (plain, plain.rpartition("/")[2], *(f"{name}{suffix}" for suffix in _PICTURES)):
        if candidate and (folder / candidate).is_file():
            return candidate
    return plain or f"{name}.jpg"


def _number(node: ET.Element, tag: str) -> float:
    """The number in a tag; NaN where it is none."""
    try:
        return float(node.findtext(tag) or "")
    except ValueError:
        return math.nan


def _object(item: ET.Element, file: Path, faults: Faults) -> dict[str, Any] | None:
    """Class, box and flags of an object; None where it is at fault."""
    name = (item.findtext("name") or "").strip()
    if not name:
        faults.add("object without name", str(file))
        return None
    box = item.find("bndbox")
    if box is None:
        faults.add("object without bndbox", f"{file}: object {name} has no bndbox")
        return None
    corners = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        value = _number(box, tag)
        if not math.isfinite(value):
            faults.add("corner that is not a number", f"{file}: {tag} is '{box.findtext(tag)}', expected a number")
            return None
        corners.append(value - (tag in ("xmin", "ymin")))
    stated = (item.findtext("difficult") or "").strip()
    difficult = _DIFFICULT.get(stated.lower())
    if difficult is None:
        faults.add("difficult that is neither 0 nor 1", f"{file}: difficult is '{stated}'")
        return None
    x1, y1, x2, y2 = corners
    area = (x2 - x1) * (y2 - y1)
    return {"category": name, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": difficult}
