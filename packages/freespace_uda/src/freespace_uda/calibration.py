"""Intrinsics from the files that people have: KITTI, ROS, OpenCV, COLMAP, RealSense, Kalibr, ORFD, or a few numbers."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
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
        doubts: what may make K wrong for the pictures, such as lens distortion.
    """

    intrinsics: NDArray[np.float64]
    size: tuple[int, int] | None = None
    road: NDArray[np.float64] | None = None
    said: str = ""
    doubts: tuple[str, ...] = ()


def pinhole(fx: float, fy: float, cx: float, cy: float) -> NDArray[np.float64]:
    """K of four numbers."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def of_numbers(values: list[float], shown: str) -> NDArray[np.float64]:
    """K of four numbers (fx fy cx cy), nine (by rows, or by columns as Open3D and MATLAB have it), or sixteen (4 x 4).

    Raises:
        UserError: another number of them, or no pinhole camera without skew.
    """
    if len(values) == 12:
        raise UserError(
            f"{shown}: twelve numbers are a 3 x 4 projection, expected K: fx fy cx cy, or the nine numbers "
            f"of its first three columns"
        )
    if len(values) not in {4, 9, 16}:
        raise UserError(f"{shown}: expected fx fy cx cy or nine numbers, got {len(values)}")
    if len(values) == 4:
        k = pinhole(*values)
    else:
        side = int(len(values) ** 0.5)
        whole = np.asarray(values, np.float64).reshape(side, side)
        if not whole[:2, 2:].any() and whole[2, :2].all():
            whole = whole.T
        k = whole[:3, :3]
        if side == 4 and (whole[3].tolist() != [0, 0, 0, 1] or whole[:3, 3].any()):
            raise UserError(f"{shown}: a 4 x 4 matrix whose last row and column are not 0 0 0 1 is no camera matrix")
    numbers = " ".join(f"{v:g}" for v in values)
    if (
        not np.isfinite(k).all()
        or k[0, 0] <= 0
        or k[1, 1] <= 0
        or abs(k[2, 2] - 1) > 1e-6
        or k[1, 0]
        or k[2, 0]
        or k[2, 1]
    ):
        raise UserError(f"{shown}: not a camera matrix: {numbers}")
    if abs(k[0, 1]) > 1e-3 * k[0, 0]:
        raise UserError(f"{shown}: a camera with skew {k[0, 1]:g}, expected 0: {numbers}")
    return pinhole(k[0, 0], k[1, 1], k[0, 2], k[1, 2])


def read_calibration(path: str | Path) -> Calibration:
    """The camera of a file; its form is recognized by what stands in it.

    Raises:
        UserError: no such file, or a form that is not known.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            values = np.asarray(np.load(path, allow_pickle=False), np.float64).ravel().tolist()
            return Calibration(of_numbers(values, str(path)), said=f"{len(values)} numbers")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError) as error:
        hint = "; COLMAP's binary files become text by its model_converter" if path.suffix.lower() == ".bin" else ""
        raise UserError(f"{path}: cannot be read as a calibration ({error}){hint}") from error
    if re.search(r"^P2:", text, re.MULTILINE):
        return _kitti(text, path)
    if re.search(r"^P_rect_02:", text, re.MULTILINE):
        return _kitti_raw(text, path)
    if match := re.search(r"^cam_K:(.*)$", text, re.MULTILINE):
        return Calibration(of_numbers(_numbers(match[1], path), str(path)), said="cam_K of ORFD")
    if path.suffix.lower() in {".yaml", ".yml"} or text.lstrip().startswith("%YAML"):
        return _yaml(text, path)
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _json(text, path)
    if text.lstrip().startswith("<"):
        return _xml(text, path)
    if re.search(r"^\s*\d+\s+[A-Z_]{5,}\s+\d+\s+\d+\s", text, re.MULTILINE):
        return _colmap(text, path)
    named = dict(re.findall(r"^\s*([A-Za-z_][\w.]*)\s*[:=]\s*([-+.\deE]+)\s*$", text, re.MULTILINE))
    if len(named) >= 4:  # a name and a number per line, as in INI files
        return _mapping(named, path)
    values = _numbers(" ".join(line for line in text.splitlines() if not line.lstrip().startswith("#")), path)
    return Calibration(of_numbers(values, str(path)), said=f"{len(values)} numbers")


def _numbers(text: str, path: Path) -> list[float]:
    try:
        return [float(word) for word in re.split(r"[\s,;\[\]]+", text.strip()) if word]
    except ValueError:
        raise UserError(
            f"{path}: no calibration of a known form (KITTI, ROS, OpenCV, COLMAP, RealSense, Kalibr, ORFD, or numbers)"
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


def _kitti_raw(text: str, path: Path) -> Calibration:
    """``calib_cam_to_cam.txt`` of KITTI's raw recordings: the rectified left color camera."""
    rows = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in {"P_rect_02", "S_rect_02"}:
            rows[name.strip()] = _numbers(rest, path)
    p2, size = rows["P_rect_02"], rows.get("S_rect_02", [])
    if len(p2) != 12:
        raise UserError(f"{path}: P_rect_02 has {len(p2)} numbers, expected 12")
    k = np.asarray(p2).reshape(3, 4)[:, :3]
    stated = (int(size[0]), int(size[1])) if len(size) == 2 else None
    return Calibration(of_numbers(k.ravel().tolist(), f"{path}, P_rect_02"), stated, said="P_rect_02 of KITTI")


class _OpenCV(yaml.SafeLoader):
    """YAML with OpenCV's tag of matrices, which are mappings."""


def _matrix(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


_OpenCV.add_constructor("tag:yaml.org,2002:opencv-matrix", _matrix)
_FOURS = (
    ("fx", "fy", "cx", "cy"),
    ("fx", "fy", "ppx", "ppy"),
    ("fx", "fy", "u0", "v0"),
    ("fl_x", "fl_y", "cx", "cy"),
)
_NAMES = (
    "camera_matrix", "cameraMatrix", "camera_matrix_left", "K", "k", "M1", "intrinsic_matrix", "intrinsics", "intrinsic", "mtx",
    "CameraMat",
)  # fmt: skip
_LENSES = (
    "distortion_coefficients", "distortion_coeffs", "distCoeffs", "dist_coeffs", "coeffs", "D", "d", "D1", "DistCoeffs",
)  # fmt: skip
_SIZES = (("image_width", "image_height"), ("width", "height"), ("w", "h"))


def _yaml(text: str, path: Path) -> Calibration:
    body = re.sub(r"^%YAML.*$", "", text, count=1, flags=re.MULTILINE)
    try:
        parts = [d for d in yaml.load_all(body, _OpenCV) if d is not None]
    except yaml.YAMLError as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not parts:
        raise UserError(f"{path}: expected names and values")
    found = [_mapping(part, path) for part in parts]  # ROS ends each message with ---
    if any(not np.array_equal(f.intrinsics, found[0].intrinsics) for f in found):
        raise UserError(f"{path}: {len(found)} messages of different cameras; give a file with the one of the pictures")
    return found[0]


def _json(text: str, path: Path) -> Calibration:
    try:
        found = json.loads(text)
        if isinstance(found, list) and (values := _floats(found)) is not None:
            return Calibration(of_numbers(values, str(path)), said=f"{len(values)} numbers")
        return _mapping(found, path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error


def _xml(text: str, path: Path) -> Calibration:
    """OpenCV's FileStorage."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(f"{path}: XML with a document type is not read")
    try:
        root = ET.fromstring(text)  # noqa: S314 - no entities
    except ET.ParseError as error:
        raise UserError(f"{path}: cannot be read as XML ({error})") from error
    return _mapping(_of_element(root), path)


def _of_element(element: ET.Element) -> Any:
    if len(element):
        return {child.tag: _of_element(child) for child in element}
    words = (element.text or "").split()
    return words if element.tag == "data" else " ".join(words)


def _float(value: Any) -> float | None:
    """A number, also one that YAML takes for text (1e-3); None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _floats(value: Any) -> list[float] | None:
    """The numbers of a list, of a list of rows, or of OpenCV's matrix; None where it is none."""
    data = value.get("data") if isinstance(value, Mapping) else value
    if not isinstance(data, list) or not data:
        return None
    try:
        return [float(v) for v in np.asarray(data, np.float64).ravel()]
    except (ValueError, TypeError):
        return None


def _groups(found: Mapping[Any, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The mapping and those inside of it, by their names; ``Camera.fx`` is a name inside of ``Camera``."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[Any, Any]] = {}
    for key, value in found.items():
        first, dot, rest = str(key).partition(".")
        if dot and rest:
            inner.setdefault(first, {})[rest] = value
        elif isinstance(value, Mapping) and "data" not in value:
            inner.setdefault(first, {}).update(value)
        else:
            own[str(key)] = value
    yield name, own
    for key, value in inner.items():
        yield from _groups(value, f"{name}.{key}" if name else key)


def _camera_of(group: Mapping[str, Any], shown: str) -> tuple[NDArray[np.float64], str] | None:
    """K of a mapping and the names that it stood under; None where it has none."""
    for four in _FOURS:
        numbers = [n for n in (_float(group.get(name)) for name in four) if n is not None]
        if len(numbers) == 4:
            return of_numbers(numbers, shown), ", ".join(four)
    for name in _NAMES:
        values = _floats(group.get(name))
        if values is not None:
            return of_numbers(values, f"{shown}, {name}"), name
    return None


def _size_of(group: Mapping[str, Any]) -> tuple[int, int] | None:
    for names in _SIZES:
        numbers = [_float(group.get(n)) for n in names]
        if all(numbers):
            return int(numbers[0] or 0), int(numbers[1] or 0)
    both = _floats(group.get("resolution"))
    return (int(both[0]), int(both[1])) if both is not None and len(both) == 2 else None


def _cropped(
    k: NDArray[np.float64], size: tuple[int, int] | None, group: Mapping[str, Any], roi: Mapping[str, Any]
) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    """K and size of the pictures of a ROS camera that gives a part of its sensor, or one pixel for several."""
    left, top, width, height = (int(_float(roi.get(n)) or 0) for n in ("x_offset", "y_offset", "width", "height"))
    if width and height:
        k, size = k - np.array([[0.0, 0.0, left], [0.0, 0.0, top], [0.0, 0.0, 0.0]]), (width, height)
    bins = [max(1, int(_float(group.get(n)) or 1)) for n in ("binning_x", "binning_y")]
    if size is not None and max(bins) > 1:
        smaller = (size[0] // bins[0], size[1] // bins[1])
        k, size = scaled(k, (smaller[0] * bins[0], smaller[1] * bins[1]), smaller), smaller
    return k, size


def _mapping(found: Any, path: Path) -> Calibration:
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: expected names and values")
    groups = list(_groups(found))
    cameras = []
    for name, group in groups:
        shown = f"{path}, {name}" if name else str(path)
        camera = _camera_of(group, shown)
        if camera is not None:
            size = _size_of(group) or _size_of(groups[0][1])
            doubts = tuple(_doubts(group, camera[0], shown))
            roi = next((g for n, g in groups if n == (f"{name}.roi" if name else "roi")), {})
            k, size = _cropped(camera[0], size, group, roi)
            cameras.append((name, Calibration(k, size, said=camera[1], doubts=doubts)))
    if not cameras:
        there = ", ".join(map(str, list(found)[:8]))
        raise UserError(f"{path}: no camera matrix under {', '.join(_NAMES)}, and no fx, fy, cx, cy; it has {there}")
    if any(not np.array_equal(c.intrinsics, cameras[0][1].intrinsics) for _, c in cameras):
        names = ", ".join(name or "at the top" for name, _ in cameras)
        raise UserError(f"{path}: {len(cameras)} cameras ({names}); give a file with the one that took the pictures")
    return cameras[0][1]


def _doubts(group: Mapping[str, Any], k: NDArray[np.float64], shown: str) -> Iterator[str]:
    """Lens distortion, a projection of rectified pictures that is not K, and a second camera."""
    names = ("k1", "k2", "p1", "p2", "k3")
    lens = next((v for v in (_floats(group.get(name)) for name in _LENSES) if v is not None), None)
    lens = lens if lens is not None else [v for v in (_float(group.get(name)) for name in names) if v is not None]
    if any(abs(v) > LENS for v in lens):
        yield f"{shown}: lens distortion is not undone: K is right for undistorted pictures alone"
    if any(name in group for name in ("M2", "camera_matrix_right")):
        yield f"{shown}: the left one of two cameras is taken"
    for name in ("projection_matrix", "P", "p"):
        values = _floats(group.get(name))
        if values is None or len(values) != 12 or not values[0]:
            continue
        p = np.asarray(values).reshape(3, 4)
        if abs(p[0, 0] / k[0, 0] - 1) > 0.005 or np.abs(p[:2, 2] - k[:2, 2]).max() > 1:
            four = f"{p[0, 0]:g},{p[1, 1]:g},{p[0, 2]:g},{p[1, 2]:g}"
            yield f"{shown}: K is taken; rectified pictures have {name}, which differs: --reading.intrinsics {four}"


LENS = 1e-3
"""Coefficient from which a lens is said to distort."""
_COLMAP = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2),
    "SIMPLE_RADIAL": (0, 0, 1, 2),
    "RADIAL": (0, 0, 1, 2),
    "PINHOLE": (0, 1, 2, 3),
    "OPENCV": (0, 1, 2, 3),
    "FULL_OPENCV": (0, 1, 2, 3),
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
    doubts = (f"{path}: lens distortion is not undone: K is right for undistorted pictures alone",)
    bent = any(abs(p) > LENS for p in lens)
    said = f"COLMAP's {model}, half a pixel taken off cx and cy"
    return Calibration(k, (int(width), int(height)), said=said, doubts=doubts if bent else ())


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
                    f"scale K where they were resized; where they were cropped, take what was cut off at the left and at "
                    f"the top from cx and cy"
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
    view = float(np.rad2deg(2 * np.arctan(width / (2 * fx))))
    if not 5 <= view <= 170:
        return [
            (
                True,
                (
                    f"fx {fx:g} gives pictures of {width} x {height} a field of view of {view:.3g} degrees: focal lengths "
                    f"are in pixels, not in millimeters or shares of the width"
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
