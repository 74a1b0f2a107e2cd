"""Intrinsics from the files that people have: KITTI, ROS, OpenCV, COLMAP, RealSense, ORFD, Virtual KITTI, or four numbers."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from freespace_uda.birdseye import road_homography
from tenfold import UserError


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A pinhole camera, in OpenCV's convention (the first pixel's center is (0, 0)).

    Attributes:
        intrinsics: K, (3, 3).
        size: width and height that it is for, where the file says so.
        road: homography from the road plane (x, z) to pixels, where the file has the transform.
        said: what was understood, in words.
    """

    intrinsics: NDArray[np.float64]
    size: tuple[int, int] | None = None
    road: NDArray[np.float64] | None = None
    said: str = ""


def pinhole(fx: float, fy: float, cx: float, cy: float) -> NDArray[np.float64]:
    """K of four numbers."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def of_numbers(values: list[float], shown: str) -> NDArray[np.float64]:
    """K of four numbers (fx fy cx cy) or nine (by rows).

    Raises:
        UserError: another number of them, or no pinhole camera.
    """
    if len(values) == 12:
        raise UserError(
            f"{shown}: twelve numbers are a 3 x 4 projection, expected K: fx fy cx cy, or the nine numbers "
            f"of its first three columns"
        )
    if len(values) not in {4, 9}:
        raise UserError(f"{shown}: expected fx fy cx cy or nine numbers, got {len(values)}")
    k = pinhole(*values) if len(values) == 4 else np.asarray(values, np.float64).reshape(3, 3)
    if (
        not np.isfinite(k).all()
        or k[0, 0] <= 0
        or k[1, 1] <= 0
        or abs(k[2, 2] - 1) > 1e-6
        or k[1, 0]
        or k[2, 0]
        or k[2, 1]
    ):
        raise UserError(f"{shown}: not a camera matrix: {' '.join(f'{v:g}' for v in values)}")
    return k


def read_calibration(path: str | Path) -> Calibration:
    """The camera of a file; its form is recognized by what stands in it.

    Raises:
        UserError: no such file, or a form that is not known.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a calibration ({error})") from error
    if re.search(r"^P2:", text, re.MULTILINE):
        return _kitti(text, path)
    if match := re.search(r"^cam_K:(.*)$", text, re.MULTILINE):
        return Calibration(of_numbers(_numbers(match[1], path), str(path)), said="cam_K of ORFD")
    if path.suffix.lower() in {".yaml", ".yml"} or text.lstrip().startswith("%YAML"):
        return _yaml(text, path)
    if path.suffix.lower() == ".json":
        return _json(text, path)
    if re.search(r"^\s*\d+\s+[A-Z_]{5,}\s+\d+\s+\d+\s", text, re.MULTILINE):
        return _colmap(text, path)
    values = _numbers(" ".join(line for line in text.splitlines() if not line.lstrip().startswith("#")), path)
    return Calibration(of_numbers(values, str(path)), said=f"{len(values)} numbers")


def _numbers(text: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in re.split(r"[\s,;\[\]]+", text.strip()) if word]
    except ValueError:
        raise UserError(
            f"{path}: no calibration of a known form (KITTI, ROS, OpenCV, COLMAP, RealSense JSON, ORFD, or numbers)"
        ) from None


def _kitti(text: str, path: Path) -> Calibration:
    rows = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if colon and rest.strip() and re.fullmatch(r"P[0-3]|R0_rect|Tr_cam_to_road", name.strip()):
            rows[name.strip()] = _numbers(rest, path)
    if len(rows.get("P2", [])) != 12:
        raise UserError(f"{path}: P2 has {len(rows.get('P2', []))} numbers, expected 12")
    p2 = np.asarray(rows["P2"]).reshape(3, 4)
    road = None
    if len(rows.get("Tr_cam_to_road", [])) == 12 and len(rows.get("R0_rect", [])) == 9:
        road = road_homography(
            p2, np.asarray(rows["R0_rect"]).reshape(3, 3), np.asarray(rows["Tr_cam_to_road"]).reshape(3, 4)
        )
    return Calibration(of_numbers(p2[:, :3].ravel().tolist(), f"{path}, P2"), road=road, said="P2 of KITTI")


class _OpenCV(yaml.SafeLoader):
    """YAML with OpenCV's tag of matrices, which are mappings."""


def _matrix(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


_OpenCV.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)
_NAMES = ("camera_matrix", "cameraMatrix", "camera_matrix_left", "K", "k", "M1", "intrinsic_matrix", "CameraMat")


def _yaml(text: str, path: Path) -> Calibration:
    body = re.sub(r"^%YAML.*$", "", text, count=1, flags=re.MULTILINE)
    try:
        found = _OpenCV(body).get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    return _mapping(found, path)


def _json(text: str, path: Path) -> Calibration:
    try:
        return _mapping(json.loads(text), path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


def _mapping(found: Any, path: Path) -> Calibration:
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: expected names and values")
    size = None
    for names in (("image_width", "image_height"), ("width", "height"), ("w", "h")):
        if all(isinstance(found.get(n), int) for n in names):
            size = (int(found[names[0]]), int(found[names[1]]))
            break
    for four in (("fx", "fy", "cx", "cy"), ("fx", "fy", "ppx", "ppy"), ("fl_x", "fl_y", "cx", "cy")):
        if all(isinstance(found.get(n), int | float) for n in four):
            return Calibration(of_numbers([float(found[n]) for n in four], str(path)), size, said=", ".join(four))
    for name in _NAMES:
        value = found.get(name)
        data = value.get("data") if isinstance(value, Mapping) else value
        if data is not None:
            return Calibration(
                of_numbers(np.asarray(data, np.float64).ravel().tolist(), f"{path}, {name}"), size, said=name
            )
    there = ", ".join(map(str, list(found)[:8]))
    raise UserError(f"{path}: no camera matrix under {', '.join(_NAMES)}, and no fx, fy, cx, cy; it has {there}")


_COLMAP = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "SIMPLE_RADIAL": (0, 0, 1, 2),
    "RADIAL": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
    "OPENCV": (0, 1, 2, 3),
}


def _colmap(text: str, path: Path) -> Calibration:
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(rows) > 1:
        raise UserError(f"{path}: {len(rows)} cameras; give a file with the one that took the pictures")
    _, model, width, height, *params = rows[0]
    if model not in _COLMAP:
        raise UserError(f"{path}: COLMAP's camera model {model}: expected one of {', '.join(_COLMAP)}")
    fx, fy, cx, cy = (float(params[i]) for i in _COLMAP[model])
    # COLMAP counts from the corner of the first pixel
    k = pinhole(fx, fy, cx - 0.5, cy - 0.5)
    lens = [float(p) for p in params[max(_COLMAP[model]) + 1 :]]
    said = f"COLMAP {model}, half a pixel taken off cx and cy"
    if any(abs(p) > 1e-3 for p in lens):
        said += "; its lens distortion is not undone: pictures have to be undistorted"
    return Calibration(k, (int(width), int(height)), said=said)


def scaled(intrinsics: NDArray[Any], old: tuple[int, int], new: tuple[int, int]) -> NDArray[np.float64]:
    """K after a picture of width and height ``old`` was resized to ``new``, pixel areas onto pixel areas."""
    k = np.array(intrinsics, np.float64)
    for axis in range(2):
        ratio = new[axis] / old[axis]
        k[axis, axis] *= ratio
        k[axis, 2] = (k[axis, 2] + 0.5) * ratio - 0.5
    return k


def odd(
    intrinsics: NDArray[Any], size: tuple[int, int], stated: tuple[int, int] | None = None
) -> list[tuple[bool, str]]:
    """What is wrong with K for pictures of a width and height; True first where it cannot be used."""
    width, height = size
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    if stated is not None and stated != size:
        return [
            (
                True,
                (
                    f"the calibration is for pictures of {stated[0]} x {stated[1]}, these have {width} x {height}: "
                    f"scale it, or give the pictures that it is for"
                ),
            )
        ]
    inside = 0.25 * width <= cx <= 0.75 * width and 0.05 * height <= cy <= 0.95 * height
    if not inside and 0.25 * width <= cy <= 0.75 * width and 0.05 * height <= cx <= 0.95 * height:
        return [(True, f"cx {cx:g} and cy {cy:g} look exchanged for pictures of {width} x {height}")]
    if not inside:
        return [
            (
                True,
                (
                    f"intrinsics (cx {cx:g}, cy {cy:g}) are for pictures of about {2 * cx:.0f} x {2 * cy:.0f}, these "
                    f"have {width} x {height}: scale K by the same factor"
                ),
            )
        ]
    if abs(fx / fy - 1) > 0.03:
        hint = f"pictures resized from square pixels would have fx/fy {fx / fy:.3f}"
        return [
            (
                False,
                (
                    f"fx {fx:g} and fy {fy:g} differ by {100 * abs(fx / fy - 1):.0f} %: {hint}; if they are "
                    f"exchanged, normals tilt"
                ),
            )
        ]
    return []
