"""Data on disk: COCO JSON and PASCAL VOC, checked before anything trains on them."""

import collections
import dataclasses
import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from head_kd import rendered
from head_kd.configs import innermost
from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.files import replacing
from tenfold.readers import parse_source


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a data set in COCO's format.

    Attributes:
        annotations: the JSON file.
        images: folder that its file names are relative to.
        classes: names in the order of the category ids.
        count: number of images.
    """

    annotations: Path
    images: Path
    classes: tuple[str, ...]
    count: int


def check_coco(annotations: str | Path, images: str | Path, *, classes: Sequence[str] | None = None) -> Split:
    """Read a COCO file, and check it for what training would stumble over.

    Args:
        annotations: the JSON file.
        images: the folder of its images.
        classes: names of the wanted categories; default: all, by id.

    Raises:
        UserError: the file cannot be read or is empty; it names a missing image, an unknown category or image, a box
            outside its image or without area, or an id twice. The message names file, annotation and field.
    """
    path, folder = Path(annotations), Path(images)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or any(
        not isinstance(content.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise UserError(f"{path}: expected COCO's lists images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not content[key]:
            raise UserError(f"{path}: {key} is empty")
        twice = [i for i, n in collections.Counter(entry.get("id") for entry in content[key]).items() if n > 1]
        if twice:
            raise UserError(
                f"{path}: {key}: id {twice[0]} stands {'more than once' if twice[0] is not None else 'nowhere'}"
            )
    categories = {c["id"]: str(c.get("name", c["id"])) for c in content["categories"]}
    if classes is not None:
        for name in classes:
            if name not in categories.values():
                raise UserError(f"{path}: no category '{name}': {did_you_mean(name, categories.values())}")
    sizes = {}
    for entry in content["images"]:
        for field in ("file_name", "width", "height"):
            if field not in entry:
                raise UserError(f"{path}: image {entry['id']} has no {field}")
        if not (folder / entry["file_name"]).is_file():
            raise UserError(f"{path}: image {entry['id']}: no file {folder / entry['file_name']}")
        sizes[entry["id"]] = (entry["width"], entry["height"])
    for entry in content["annotations"]:
        where = f"{path}: annotation {entry['id']}"
        if entry.get("image_id") not in sizes:
            raise UserError(f"{where}: image_id {entry.get('image_id')} is no image of the file")
        if entry.get("category_id") not in categories:
            known = ", ".join(map(str, sorted(categories)))
            raise UserError(f"{where}: category_id {entry.get('category_id')} is unknown, expected one of {known}")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise UserError(f"{where}: bbox {box} is not x, y, width, height")
        x, y, w, h = box
        if not (w > 0 and h > 0):
            raise UserError(f"{where}: bbox {box} has no area")
        width, height = sizes[entry["image_id"]]
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            raise UserError(f"{where}: bbox {box} leaves its image of {width} x {height}")
    order = tuple(name for _, name in sorted(categories.items()))
    return Split(path, folder, tuple(classes) if classes is not None else order, len(content["images"]))


def read_splits(source: str, folder: str | Path, *, names: tuple[str, str] = ("train", "val")) -> tuple[Split, Split]:
    """The splits of a ``--data`` source, checked.

    Args:
        source: ``coco:DIR`` or ``voc:DIR``.
        folder: where the COCO files of a VOC folder are written, as ``SPLIT.json``.
        names: the splits that are trained on and measured.

    Raises:
        UserError: a fault of the data, or splits with different classes.
    """
    kind, path = parse_source(source, kinds=("coco", "voc"))
    assert path is not None
    if kind == "coco":
        train, val = (coco_folder(path, name) for name in names)
    else:
        train, val = (voc_folder(path, name, Path(folder) / f"{name}.json") for name in names)
    if train.classes != val.classes:
        differ = ", ".join(sorted(set(train.classes) ^ set(val.classes))[:5]) or "their order"
        raise UserError(f"--data {source}: classes of {names[0]} and {names[1]} differ: {differ}")
    return train, val


def annotation_file(dataset: Any) -> Path:
    """The file that a data set's config reads its annotations from."""
    return Path(dataset.get("data_root") or "") / dataset["ann_file"]


def annotation_digest(cfg: Any) -> str:
    """SHA-256 of an mmdet config's training annotations."""
    return hashlib.sha256(annotation_file(innermost(cfg.train_dataloader.dataset)).read_bytes()).hexdigest()


def check_config_data(cfg: Any) -> None:
    """Check the COCO files that an mmdet config trains and tests on.

    Raises:
        UserError: what ``check_coco`` finds.
    """
    for name in ("train", "test"):
        dataset = innermost((cfg.get(f"{name}_dataloader") or {}).get("dataset"))
        if dataset is not None and dataset.get("type") == "CocoDataset":
            images = Path(dataset.get("data_root") or "") / (dataset.get("data_prefix") or {}).get("img", "")
            check_coco(annotation_file(dataset), images, classes=(dataset.get("metainfo") or {}).get("classes"))


_LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}.json", "{split}"),
    ("{split}/_annotations.coco.json", "{split}"),
)


def coco_folder(root: str | Path, split: str) -> Split:
    """A split of a COCO folder: ``annotations/instances_train2017.json`` with ``train2017/``, or the like.

    Raises:
        UserError: no layout fits, or ``check_coco`` finds a fault.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"coco:{root}: no such folder")
    for annotations, images in _LAYOUTS:
        file = root / annotations.format(split=split)
        if file.is_file():
            folder = next(
                (
                    f
                    for f in (root / images.format(split=split), root / "images" / split, root / "images")
                    if f.is_dir()
                ),
                root,
            )
            return check_coco(file, folder)
    expected = " or ".join(a.format(split=split) for a, _ in _LAYOUTS)
    raise UserError(f"coco:{root}: no annotations of the split '{split}': expected {expected}")


def voc_folder(root: str | Path, split: str, out: str | Path) -> Split:
    """A split of a PASCAL VOC folder (``Annotations``, ``JPEGImages``, ``ImageSets/Main/SPLIT.txt``) as a COCO file.

    Boxes lose VOC's offset of 1; difficult objects become ``iscrowd``, which mmdet ignores in training.

    Args:
        root: the folder, ``VOC2007`` for one.
        split: train, val, trainval or test.
        out: where the COCO file is written.

    Raises:
        UserError: a file is missing or damaged; the message names file and object.
    """
    root, out = Path(root), Path(out)
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        names = [line.split()[0] for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"voc:{root}: {listing}: {error.strerror}") from error
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        file = root / "Annotations" / f"{name}.xml"
        try:
            tree = ET.parse(file).getroot()  # noqa: S314  # entities are not expanded by this parser
        except (OSError, ET.ParseError) as error:
            raise UserError(f"{file}: {error}") from error

        def number_in(node: ET.Element, tag: str, file: Path = file) -> float:
            text = node.findtext(tag)
            try:
                return float(text or "")
            except ValueError:
                raise UserError(f"{file}: {tag} is '{text}', expected a number") from None

        size = tree.find("size")
        if size is None:
            raise UserError(f"{file}: no size")
        picture = tree.findtext("filename") or f"{name}.jpg"
        images.append(
            {
                "id": number,
                "file_name": picture,
                "width": int(number_in(size, "width")),
                "height": int(number_in(size, "height")),
            }
        )
        for item in tree.iter("object"):
            box = item.find("bndbox")
            if box is None:
                raise UserError(f"{file}: object {item.findtext('name')} has no bndbox")
            x1, y1, x2, y2 = (
                number_in(box, tag) - (tag in ("xmin", "ymin")) for tag in ("xmin", "ymin", "xmax", "ymax")
            )
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": number,
                    "category": item.findtext("name") or "",
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(item.findtext("difficult") or 0),
                }
            )
    classes = sorted({entry["category"] for entry in objects})
    for entry in objects:
        entry["category_id"] = classes.index(entry.pop("category")) + 1
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": i + 1, "name": c} for i, c in enumerate(classes)],
    }
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
    return check_coco(out, root / "JPEGImages")


def write_drawn(folder: str | Path, name: str, first: int, count: int, *, clutter: bool = True) -> Split:
    """Draw images ``first`` .. ``first + count - 1`` as PNG files; the COCO file ``NAME.json`` is written last, and stays."""
    from PIL import Image

    folder = Path(folder)
    file = folder / f"{name}.json"
    if not file.exists():
        (folder / name).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(count):
            picture, objects = rendered.draw(first + number, clutter=clutter)
            Image.fromarray(picture).save(folder / name / f"{number:05d}.png", compress_level=1)
            images.append(
                {"id": number + 1, "file_name": f"{number:05d}.png", "width": rendered.SIZE, "height": rendered.SIZE}
            )
            for label, box in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": label + 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(rendered.CLASSES)]
        with replacing(file) as temporary:
            temporary.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return check_coco(file, folder / name)
