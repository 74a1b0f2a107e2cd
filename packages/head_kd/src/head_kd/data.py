"""Data on disk: COCO JSON and PASCAL VOC, checked before anything trains on them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from head_kd import rendered
from head_kd.coco import Split, check_coco, read_coco
from head_kd.configs import innermost, stated_classes
from head_kd.voc import voc_folder
from tenfold import UserError
from tenfold.files import replacing
from tenfold.readers import parse_source


def read_splits(
    source: str,
    folder: str | Path,
    *,
    names: Sequence[str] = ("train", "val"),
    skip_bad: bool = False,
    order: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Split, Split]:
    """The splits of a ``--data`` source, checked; the second one's classes come in the order of the first one's.

    Args:
        source: ``coco:DIR`` or ``voc:DIR``.
        folder: where mended copies, and the COCO files of a VOC folder, are written, as ``SPLIT.json``.
        names: the split that is trained on and the one that is measured; one name stands for both.
        skip_bad: whether bad images and boxes are left out instead of refused.
        order: classes in the order that they must have; default: that of the first split's file.
        classes: names of the wanted classes; default: all. Boxes of others are left out, and counted.

    Raises:
        UserError: faults of the data, a wanted class that they lack, or a split that has boxes of classes that the other
            does not know.
    """
    kind, path = parse_source(source, kinds=("coco", "voc"))
    assert path is not None
    read = coco_folder if kind == "coco" else voc_folder
    train = read(path, names[0], Path(folder) / f"{names[0]}.json", skip_bad=skip_bad, order=order, classes=classes)
    if names[0] == names[-1]:
        return train, train
    out = Path(folder) / f"{names[1]}.json"
    return train, read(path, names[1], out, skip_bad=skip_bad, order=train.classes, classes=classes)


def annotation_file(dataset: Any) -> Path:
    """The file that a data set's config reads its annotations from."""
    return Path(dataset.get("data_root") or "") / dataset["ann_file"]


def annotation_digest(cfg: Any) -> str:
    """SHA-256 of an mmdet config's training annotations."""
    return hashlib.sha256(annotation_file(innermost(cfg.train_dataloader.dataset)).read_bytes()).hexdigest()


def check_config_data(cfg: Any, folder: str | Path, *, skip_bad: bool = False) -> list[str]:
    """Check the COCO files that an mmdet config trains and tests on; a mended copy takes a file's place.

    Args:
        cfg: the student's config; it is changed where a file had to be mended.
        folder: where mended copies are written.
        skip_bad: whether bad images and boxes are left out instead of refused.

    Returns:
        what was left out and filled in, a line each.

    Raises:
        UserError: what ``check_coco`` finds.
    """
    notes: list[str] = []
    checked: dict[Path, Split] = {}
    train: Split | None = None
    for name in ("train", "val", "test"):
        dataset = innermost((cfg.get(f"{name}_dataloader") or {}).get("dataset"))
        if dataset is None or dataset.get("type") != "CocoDataset" or not dataset.get("ann_file"):
            continue
        file = annotation_file(dataset)
        if file not in checked:
            checked[file] = check_coco(
                file,
                Path(dataset.get("data_root") or "") / (dataset.get("data_prefix") or {}).get("img", ""),
                classes=stated_classes(dataset),
                order=None if train is None else train.classes,
                mended=Path(folder) / f"{name}.json",
                skip_bad=skip_bad,
                turned=turns_images(dataset),
            )
            notes += checked[file].notes
        found = checked[file]
        train = train or found
        stated = stated_classes(dataset)
        if stated is not None and stated != found.classes:
            dataset.metainfo = {**(dataset.get("metainfo") or {}), "classes": found.classes}
            notes.append(
                f"{file.name}: the config lists its classes in another order; mmdet numbers them as the file does:"
                f" label 0 is '{found.classes[0]}'"
            )
        if found.annotations != file:
            dataset.ann_file = str(found.annotations.resolve())
            evaluator = cfg.get(f"{name}_evaluator")
            if name != "train" and evaluator is not None and evaluator.get("ann_file"):
                evaluator.ann_file = dataset.ann_file
    return notes


def turns_images(dataset: Any) -> bool:
    """Whether a data set's pipeline reads images turned by their camera's tag, as mmcv does unless told otherwise."""
    loads = [t for t in dataset.get("pipeline") or () if str(t.get("type")) == "LoadImageFromFile"]
    return not any(str(t.get("color_type", "color")).endswith(("ignore_orientation", "unchanged")) for t in loads)


_ALIASES = {"val": ("val", "valid", "validation"), "train": ("train", "training")}
_LAYOUTS = (
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}.json", "{split}"),
    ("{split}/_annotations.coco.json", "{split}"),
    ("{split}/{split}.json", "{split}"),
    ("{split}/result.json", "{split}"),
    ("{split}/annotations/instances_default.json", "{split}/images"),
)
"""COCO's own, mmdet's usual ones, Roboflow's, Label Studio's and CVAT's (``default`` and ``result`` are their only split)."""


def coco_folder(
    root: str | Path,
    split: str,
    out: str | Path | None = None,
    *,
    skip_bad: bool = False,
    order: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Split:
    """A split of a COCO folder: ``annotations/instances_train2017.json`` with ``train2017/``, or the like.

    Args:
        root: the folder.
        split: name of the split; ``val`` stands for ``valid`` and ``validation`` as well.
        out: where a mended copy is written, should one be needed.
        skip_bad: whether bad images and boxes are left out instead of refused.
        order: classes of another split, whose order this one takes.
        classes: names of the wanted classes; default: all.

    Raises:
        UserError: no layout fits or several do, or ``check_coco`` finds faults.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"coco:{root}: no such folder")
    found = {
        file: name
        for name in _ALIASES.get(split, (split,))
        for layout, _ in _LAYOUTS
        if (file := root / layout.format(split=name)).is_file()
    }
    if not found:
        there = _splits_in(root)
        expected = " or ".join(a.format(split=split) for a, _ in _LAYOUTS)
        hint = (
            f"; it has {', '.join(there)}: name two with --split TRAIN,MEASURED" if there else f": expected {expected}"
        )
        raise UserError(f"coco:{root}: no annotations of the split '{split}'{hint}")
    if len(found) > 1:
        listed = " and ".join(str(file.relative_to(root)) for file in found)
        raise UserError(f"coco:{root}: {listed} may both be the split '{split}': leave one there")
    (file, name), *_ = found.items()
    images = _image_folder(root, file, name)
    return check_coco(file, images, classes=classes, order=order, mended=out, skip_bad=skip_bad)


def _splits_in(root: Path) -> list[str]:
    """Names that ``--split`` would take of a folder."""
    names: dict[Path, str] = {}
    for layout, _ in _LAYOUTS:
        head, tail = layout.split("{split}", 1)
        for file in root.glob(layout.replace("{split}", "*")) if "{split}" not in tail else ():
            names.setdefault(file, file.relative_to(root).as_posix().removeprefix(head).removesuffix(tail))
    return sorted(set(names.values()))


def _image_folder(root: Path, file: Path, split: str) -> Path:
    """The folder in which a COCO file's first images are."""
    named = [layout[1].format(split=split) for layout in _LAYOUTS]
    tried = [root / n for n in (*named, f"images/{split}", f"images/{split}2017", "images")]
    tried = [folder for folder in dict.fromkeys((*tried, file.parent, root)) if folder.is_dir()]
    names = [str(entry.get("file_name") or "").replace("\\", "/") for entry in read_coco(file)["images"][:20]]
    hits = [sum((folder / name).is_file() for name in names if name) for folder in tried]
    return tried[max(range(len(tried)), key=lambda i: hits[i])]


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
