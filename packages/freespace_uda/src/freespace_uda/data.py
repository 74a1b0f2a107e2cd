"""Readers of the layouts that people have on disk, and rendered worlds; each checks what it reads."""

import csv
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from freespace_uda.calibration import of_numbers, pinhole
from freespace_uda.config import DATA_KINDS, EMBEDDED_DATA, Palette, SceneReading, Unit
from freespace_uda.depth import DepthCode
from freespace_uda.scenes import Record, RenderedScenes, Scenes
from freespace_uda.world import DOMAINS, RoadWorld
from tenfold import UserError
from tenfold.readers import parse_source

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
DEPTHS = {".png", ".tif", ".tiff", ".npy", ".npz", ".pfm"}
FIRST = {"train": 0, "val": 10_000, "test": 20_000}
"""Number of the first rendered scene of each part."""
RENDERED = "rendered: roads by ray casting, no real pictures"


def load_scenes(
    data: str, reading: SceneReading | None = None, *, usual: str = "train", option: str = "--data"
) -> Scenes:
    """The scenes that a name stands for, without decoding them.

    Args:
        data: KIND:PATH or the name of a rendered world.
        reading: settings.
        usual: part that is taken where the settings name none and the data has parts.
        option: option that gave the name, for messages.

    Raises:
        UserError: no such data, or not in the layout of its kind; the message names the file and what was expected.
    """
    reading = reading or SceneReading()
    kind, path = parse_source(data, kinds=DATA_KINDS, embedded=EMBEDDED_DATA, option=option)
    if path is None:
        return rendered(kind, reading, usual if reading.split in {None, "all"} else str(reading.split))
    found = _READERS[kind](path, reading)
    if not found:
        raise UserError(f"{option} {data}: no pictures in the layout of {kind}")
    wanted = reading.split or usual
    parts = sorted({record.part for record in found})
    if wanted != "all" and parts != [""]:
        chosen = [record for record in found if record.part == wanted]
        if not chosen:
            raise UserError(f"{option} {data}: no part '{wanted}': it has {', '.join(parts)}")
        found = chosen
    if reading.limit is not None and len(found) > reading.limit:
        found = [found[i] for i in np.linspace(0, len(found) - 1, reading.limit).round().astype(int)]
    ids = None if reading.road_ids is None else tuple(reading.road_ids)
    return Scenes(f"the user's copy of {kind} ({path.name}), not shipped", tuple(found), ids, path)


def rendered(domain: str, reading: SceneReading, part: str = "train") -> RenderedScenes:
    """Rendered scenes of a part, held in memory."""
    first = FIRST[part]
    world = RoadWorld(domain, reading.size, reading.world_seed, first + reading.scenes)
    return of_arrays(domain, render_arrays(world, range(first, first + reading.scenes)), part)


def render_arrays(world: RoadWorld, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Arrays of several scenes, as ``RenderedScenes`` holds them."""
    scenes = [world[i] for i in indices]
    return {
        "rgb": np.stack([s.rgb for s in scenes]),
        "depth": np.stack([s.depth for s in scenes]),
        "label": np.stack([s.label for s in scenes]),
        "intrinsics": np.stack([s.camera.intrinsics for s in scenes]),
        "pose": np.array([[s.camera.height, s.camera.pitch] for s in scenes]),
    }


def of_arrays(domain: str, arrays: dict[str, NDArray[Any]], part: str = "train") -> RenderedScenes:
    """Scenes around arrays of ``render_arrays``."""
    records = tuple(Record(f"{domain}/{part}/{i:05d}", part=part) for i in range(len(arrays["rgb"])))
    return RenderedScenes(f"{RENDERED} ({domain})", records, arrays=arrays)


def _listed(folder: Path, kinds: set[str]) -> dict[str, Path]:
    """Files below a folder by their path without suffix; what is hidden is passed over."""
    if not folder.is_dir():
        return {}
    found = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in kinds and not p.name.startswith(".") and p.is_file()
    )
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in found}


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _paired(
    pictures: dict[str, Path], depths: dict[str, Path], labels: dict[str, Path], shown: Path
) -> dict[str, tuple[Path | None, Path | None, Path | None]]:
    """Picture, depth and label by name.

    Raises:
        UserError: most pictures have no depth of their name, or none has.
    """
    names = sorted({*pictures, *depths})
    if pictures and not depths:
        warnings.warn(
            f"{shown}: no depth ({', '.join(sorted(DEPTHS))}) was found: pictures alone are used",
            UserWarning,
            stacklevel=2,
        )
    alone = [n for n in names if n not in depths or n not in pictures]
    if pictures and depths and len(alone) > len(names) / 2:
        raise UserError(
            f"{shown}: {len(alone)} of {len(names)} names have a picture or a depth alone, the first: {', '.join(alone[:3])}"
        )
    if pictures and depths:
        _tell_alone(alone, shown)
    lost = [n for n in labels if n not in pictures and n not in depths]
    if lost:
        warnings.warn(
            f"{shown}: {len(lost)} labels belong to no picture, the first: {', '.join(lost[:3])}",
            UserWarning,
            stacklevel=2,
        )
    return {n: (pictures.get(n), depths.get(n), labels.get(n)) for n in names}


def _tell_alone(names: Sequence[str], shown: Path) -> None:
    """Warn of scenes that lack a modality which others have."""
    if names:
        text = f"{shown}: {len(names)} scenes have one modality alone, the first: {', '.join(names[:3])}"
        warnings.warn(text, UserWarning, stacklevel=3)


def _code(reading: SceneReading, unit: Any, **more: Any) -> DepthCode:
    """The layout's own code, with what the user says instead."""
    ray = bool(more.get("ray", False)) if reading.ray is None else reading.ray
    baseline = reading.baseline if reading.baseline is not None else more.get("baseline")
    scale = reading.depth_scale if reading.depth_scale is not None else more.get("scale")
    return DepthCode(reading.depth_unit or unit, ray, reading.far, baseline, reading.offset, scale)


def _given(reading: SceneReading) -> NDArray[np.float64] | None:
    return None if reading.intrinsics is None else of_numbers(reading.intrinsics, "--reading.intrinsics")


def _palette(reading: SceneReading, own: str) -> str:
    return own if reading.palette == "auto" else reading.palette


def _kitti(root: Path, reading: SceneReading) -> list[Record]:
    """``image_2``, ``gt_image_2``, ``calib`` and ``depth_u16``, in the folder or in its ``training``."""
    root = root / "training" if (root / "training").is_dir() else root
    if not (root / "image_2").is_dir():
        raise UserError(f"{root}: expected the folder image_2 (and depth_u16, calib, gt_image_2)")
    truth = {
        re.sub(r"_road_", "_", name, count=1): path
        for name, path in _listed(root / "gt_image_2", {".png"}).items()
        if "_road_" in name
    }
    pairs = _paired(_listed(root / "image_2", PICTURES), _listed(root / "depth_u16", DEPTHS), truth, root)
    k = _given(reading)
    records = []
    for i, (name, (rgb, depth, label)) in enumerate(pairs.items()):
        file = root / "calib" / f"{name}.txt"
        part = ("test" if i % 5 == 4 or i == 285 else "val" if i % 5 == 3 else "train") if truth else ""
        records.append(
            Record(name, rgb, depth, label, file if file.exists() and k is None else None, k, _code(reading, "mm"),
                   _palette(reading, "kitti-road"), part, name.partition("_")[0])
        )  # fmt: skip
    return records


_PARTS = {"training": "train", "train": "train", "validation": "val", "val": "val", "testing": "test", "test": "test"}


def _orfd(root: Path, reading: SceneReading) -> list[Record]:
    """``{training,validation,testing}/SEQUENCE/{image_data,dense_depth,calib,gt_image}``; or one sequence."""
    k = _given(reading)
    records = []
    for images in sorted(root.rglob("image_data")):
        sequence = images.parent
        where = sequence.relative_to(root).as_posix()
        part = _PARTS.get(where.partition("/")[0], "")
        truth = {
            n.removesuffix("_fillcolor"): p
            for n, p in _listed(sequence / "gt_image", {".png"}).items()
            if n.endswith("_fillcolor")
        }
        for name, (rgb, depth, label) in _paired(
            _listed(images, PICTURES), _listed(sequence / "dense_depth", DEPTHS), truth, sequence
        ).items():
            file = sequence / "calib" / f"{name}.txt"
            records.append(
                Record(f"{where}/{name}", rgb, depth, label, file if file.exists() and k is None else None, k,
                       _code(reading, "m/256"), _palette(reading, "orfd"), part, where)
            )  # fmt: skip
    return records


def _vkitti2(root: Path, reading: SceneReading) -> list[Record]:
    """``SceneNN/VARIANT/frames/{rgb,depth,classSegmentation}/Camera_0`` and ``SceneNN/VARIANT/intrinsic.txt``.

    The archives may also lie side by side, as ``vkitti_2.0.3_rgb/SceneNN``, ``vkitti_2.0.3_depth/SceneNN`` and so on.
    """
    records = []
    for frames in sorted(root.rglob("frames/rgb/Camera_0")):
        variant = frames.parents[2]
        where = variant.relative_to(root).as_posix() if variant != root else variant.name
        places = [variant.resolve()]
        places += [top.resolve() / where.partition("/")[2] for top in sorted(root.glob("vkitti*"))]
        folders = [frames, *(_first_folder(variant, [f"{p}/frames/{kind}/Camera_0" for p in places])
                             for kind in ("depth", "classSegmentation"))]  # fmt: skip
        pictures, depths, truth = (
            {n.rpartition("_")[2]: p for n, p in _listed(folder, kinds).items()} if folder is not None else {}
            for folder, kinds in zip(folders, (PICTURES, {".png"}, {".png"}), strict=True)
        )
        cameras = _frame_intrinsics(next((f for p in places if (f := p / "intrinsic.txt").exists()), None))
        for number, (rgb, depth, label) in _paired(pictures, depths, truth, variant).items():
            k = _given(reading)
            if k is None:
                k = cameras.get(int(number), pinhole(725.0087, 725.0087, 620.5, 187))
            records.append(
                Record(f"{where}/{number}", rgb, depth, label, None, k, _code(reading, "cm"), _palette(reading, "vkitti2"), "",
                       where)
            )  # fmt: skip
    return records


def _frame_intrinsics(file: Path | None) -> dict[int, NDArray[np.float64]]:
    """K of each frame of camera 0, from Virtual KITTI's ``intrinsic.txt``."""
    found = {}
    if file is not None:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[1:], 2):
            words = line.split()
            if len(words) != 6:
                raise UserError(f"{file}, line {number}: expected frame, camera and four numbers, found '{line[:60]}'")
            if words[1] == "0":
                found[int(words[0])] = pinhole(*(float(w) for w in words[2:]))
    return found


def _synthia(root: Path, reading: SceneReading) -> list[Record]:
    """``RGB``, ``Depth`` and ``GT/LABELS`` with equal names below, as RAND-CITYSCAPES and the sequences have them."""
    pictures = _listed(root / "RGB", PICTURES)
    if not pictures:
        raise UserError(f"{root}: expected the folder RGB (and Depth, GT/LABELS)")
    depth = _first_folder(root, ("Depth/Depth", "Depth"))
    truth = _first_folder(root, ("GT/LABELS", "GT"))
    rand = not any("/" in name for name in pictures)
    k = _given(reading)
    file = next((f for f in (root / "CameraParams/intrinsics.txt", root / "intrinsics.txt") if f.exists()), None)
    if k is None and file is not None:
        words = [float(w) for w in file.read_text(encoding="utf-8").split()]
        k = pinhole(words[0], words[0], words[1], words[2]) if len(words) == 3 else of_numbers(words, str(file))
    palette = _palette(reading, "synthia-rand" if rand else "synthia")
    pairs = _paired(pictures, _listed(depth, DEPTHS) if depth else {}, _listed(truth, {".png"}) if truth else {}, root)
    return [
        Record(name, rgb, d, label, None, k, _code(reading, "cm"), palette)
        for name, (rgb, d, label) in pairs.items()
    ]  # fmt: skip


def _carla(root: Path, reading: SceneReading) -> list[Record]:
    """``rgb``, ``depth`` and ``label`` (or ``semantic``...) with equal names, in the folder or in parts of it (R2D)."""
    tops = [root / name for name in _PARTS if (root / name).is_dir()] or [root]
    records = []
    for top in tops:
        rgb = _first_folder(top, ("rgb", "RGB", "image", "images", "image_data"))
        depth = _first_folder(top, ("depth", "Depth", "depth_data"))
        label = _first_folder(top, ("label", "labels", "semantic", "semseg", "seg", "gt_image", "gt"))
        if rgb is None:
            raise UserError(f"{top}: expected the folder rgb (and depth, label)")
        pairs = _paired(
            _listed(rgb, PICTURES),
            _listed(depth, DEPTHS) if depth else {},
            _listed(label, {".png"}) if label else {},
            top,
        )
        k, file = _given(reading), None
        if k is None:
            file = next((f for f in sorted(root.glob("intrinsic*")) + sorted(root.glob("calib*")) if f.is_file()), None)
        part = _PARTS[top.name] if top != root else ""
        for name, (r, d, truth) in pairs.items():
            k_here = k
            if k is None and file is None and reading.fov is not None:
                k_here = _of_view(r or d, reading.fov)
            records.append(
                Record(f"{part}/{name}" if part else name, r, d, truth, file if k_here is None else None, k_here,
                       _code(reading, "carla"), _palette(reading, "carla"), part)
            )  # fmt: skip
    return records


def _of_view(file: Path | None, fov: float) -> NDArray[np.float64]:
    """K of a simulator's camera, from its horizontal field of view."""
    from PIL import Image

    assert file is not None
    try:
        with Image.open(file) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file}: cannot be decoded as an image ({' '.join(str(error).split())})") from error
    focal = width / (2 * np.tan(np.deg2rad(fov) / 2))
    return pinhole(focal, focal, width / 2, height / 2)


UNITS = get_args(Unit)
PALETTES = tuple(name for name in get_args(Palette) if name != "auto")
TRUTH = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
"""What stands in the column ray."""
COLUMNS = (
    "name", "rgb", "depth", "label", "split", "category", "calibration", "fx", "fy", "cx", "cy", "depth_unit", "depth_scale",
    "ray", "baseline", "palette",
)  # fmt: skip


def _manifest(path: Path, reading: SceneReading) -> list[Record]:
    """A CSV with a row per scene; paths are relative to it, and stay below its folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error})") from error
    table = csv.DictReader(lines)
    unknown = sorted(set(table.fieldnames or []) - set(COLUMNS))
    if unknown or not {"rgb", "depth"} & set(table.fieldnames or []):
        what = f"unknown column '{unknown[0]}'" if unknown else "no column rgb or depth"
        raise UserError(f"{path}: {what}, expected some of {', '.join(COLUMNS)}")
    records = []
    for number, row in enumerate(table, 2):
        where = f"{path}, row {number}"
        if None in row or None in row.values():
            raise UserError(f"{where}: expected {len(table.fieldnames or [])} columns")
        files = {
            c: _below(path.parent, row.get(c, ""), f"{where}, {c}") for c in ("rgb", "depth", "label", "calibration")
        }
        if files["rgb"] is None and files["depth"] is None:
            raise UserError(f"{where}: neither rgb nor depth")
        unit = row.get("depth_unit", "").strip() or None
        scale = _number(row.get("depth_scale", ""), f"{where}, depth_scale") or reading.depth_scale
        if files["depth"] is not None and unit is None and scale is None and reading.depth_unit is None:
            raise UserError(f"{where}: no depth_unit: give the column (or depth_scale), or --reading.depth_unit")
        if unit is not None and unit not in UNITS:
            raise UserError(f"{where}: depth_unit '{unit}', expected one of {', '.join(UNITS)}")
        ray = row.get("ray", "").strip().lower()
        if ray not in TRUTH:
            raise UserError(f"{where}: ray '{ray}', expected true or false")
        numbers = [row.get(c, "").strip() for c in ("fx", "fy", "cx", "cy")]
        k = _given(reading)
        if k is None and any(numbers):
            try:
                k = of_numbers([float(n) for n in numbers], where)
            except ValueError as error:
                raise UserError(f"{where}: fx, fy, cx, cy: {error}") from error
        code = _code(
            reading,
            unit or "m",
            ray=TRUTH[ray],
            baseline=_number(row.get("baseline", ""), f"{where}, baseline"),
            scale=scale,
        )
        name = row.get("name", "").strip() or row.get("rgb", "").strip() or row.get("depth", "").strip()
        part = row.get("split", "").strip().lower()
        if part and part not in _PARTS:
            raise UserError(f"{where}: split '{part}', expected train, val or test")
        own = row.get("palette", "").strip() or "binary"
        if own not in PALETTES:
            raise UserError(f"{where}: palette '{own}', expected one of {', '.join(PALETTES)}")
        records.append(
            Record(name, files["rgb"], files["depth"], files["label"], files["calibration"] if k is None else None, k, code,
                   _palette(reading, own), _PARTS.get(part, ""), row.get("category", "").strip())
        )  # fmt: skip
    names = [record.name for record in records]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"{path}: the name '{twice[0]}' stands in several rows")
    alone = [record.name for record in records if record.rgb is None or record.depth is None]
    _tell_alone(alone if len(alone) < len(records) else [], path)
    return records


def _number(text: str, where: str) -> float | None:
    """The number in a cell; None where it is empty."""
    try:
        return float(text) if text.strip() else None
    except ValueError:
        raise UserError(f"{where}: expected a number, got '{text}'") from None


def _below(root: Path, text: str, where: str) -> Path | None:
    """A file that a manifest names.

    Raises:
        UserError: it is not there, or leads out of the manifest's folder.
    """
    if not text.strip():
        return None
    path = root / text.strip()
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{where}: {text.strip()} leads outside of {root}")
    if not path.is_file():
        raise UserError(f"{where}: no such file: {path}")
    return path


_READERS: dict[str, Callable[[Path, SceneReading], list[Record]]] = {
    "kitti-road": _kitti,
    "orfd": _orfd,
    "vkitti2": _vkitti2,
    "synthia": _synthia,
    "carla": _carla,
    "r2d": _carla,
    "manifest": _manifest,
}
assert set(EMBEDDED_DATA) == set(DOMAINS)


def same_place(first: Scenes, second: Scenes) -> bool:
    """Whether two names stand for one folder or file, or share a picture (a folder and its parent, a manifest of it)."""
    if first.path is None or second.path is None:
        return False
    files = [{p.resolve() for r in s.records if (p := r.rgb or r.depth) is not None} for s in (first, second)]
    return first.path.resolve() == second.path.resolve() or not files[0].isdisjoint(files[1])
