"""Depth as cameras and simulators write it, in meters along z, 0 where unknown; and what it looks like when it is wrong."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from freespace_uda.pixels import stored_pixels
from tenfold import UserError
from tenfold.readers import BROKEN_ARRAYS

Unit = Literal["m", "cm", "mm", "m/256", "carla", "disparity", "disparity/16", "disparity/256"]
SCALES: dict[str, float] = {"m": 1.0, "cm": 0.01, "mm": 0.001, "m/256": 1 / 256}
DISPARITIES: dict[str, float] = {"disparity": 1.0, "disparity/16": 1 / 16, "disparity/256": 1 / 256}
HEIGHTS = (0.15, 4.0)
"""Meters above the road in which a camera is believed to be."""
FORMS = "PNG, TIFF, PFM, NPY or NPZ"
SPARSE = 0.3
"""Share of the lower half with depth below which differences between neighbors do not exist often enough."""


@dataclasses.dataclass(frozen=True)
class DepthCode:
    """How numbers in a file mean depth.

    Args:
        unit: m, cm, mm, m/256 (KITTI, ORFD), carla (24 bits in red, green and blue), or disparity in pixels, in
            sixteenths (OpenCV) or in
            256ths (KITTI).
        ray: the numbers are distances along the ray, not along z.
        far: meters from which there is nothing (the sky of a simulator).
        baseline: meters between the cameras of a disparity.
        scale: meters per number, in place of a unit, such as 0.0001 of a RealSense SR300.
        offset: pixels by which the principal points of the two cameras differ (cx_left - cx_right): Z = f B / (d - offset).
    """

    unit: Unit = "m"
    ray: bool = False
    far: float = 200.0
    baseline: float | None = None
    offset: float = 0.0
    scale: float | None = None

    @property
    def words(self) -> str:
        """The code as it is said to the user."""
        unit = self.unit if self.scale is None else f"{self.scale:g} m per number"
        return f"{unit} along {'the ray' if self.ray else 'z'}"


def read_numbers(path: str | Path) -> NDArray[Any]:
    """The numbers of a file as they stand: 8 or 16-bit PNG, TIFF (also of floats), PFM, NPY, NPZ with one array.

    Raises:
        UserError: no such file, or none that can be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            found: NDArray[Any] = np.load(path, allow_pickle=False)
        elif suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                if len(file.files) != 1:
                    raise UserError(f"{path}: expected one array, found {', '.join(file.files)}")
                found = file[file.files[0]]
        elif suffix == ".pfm":
            found = _pfm(path)
        else:
            found = stored_pixels(path, f"depth, expected {FORMS}")
    except UserError:
        raise
    except (*BROKEN_ARRAYS, SyntaxError) as error:
        raise UserError(
            f"{path}: cannot be read as depth, expected {FORMS} ({' '.join(str(error).split())})"
        ) from error
    if found.dtype.kind not in "iuf" or not found.size:
        raise UserError(f"{path}: expected numbers, found {_form(found)}")
    if found.ndim == 3 and found.shape[2] == 1:
        found = found[..., 0]
    if found.ndim == 3 and found.shape[0] == 1:
        found = found[0]
    return found


def _pfm(path: Path) -> NDArray[np.float32]:
    with path.open("rb") as file:
        kind = file.readline().strip()
        if kind != b"Pf":
            raise UserError(f"{path}: expected a PFM of one channel (Pf), found {kind[:4]!r}")
        width, height = (int(v) for v in file.readline().split())
        order = "<" if float(file.readline()) < 0 else ">"
        values = np.frombuffer(file.read(), f"{order}f4")
    return values.reshape(height, width)[::-1].astype(np.float32)


def ray_lengths(shape: tuple[int, int], intrinsics: NDArray[Any]) -> NDArray[np.float64]:
    """Length of the ray through each pixel that reaches z = 1."""
    k = np.asarray(intrinsics, np.float64)
    u = (np.arange(shape[1]) - k[0, 2]) / k[0, 0]
    v = (np.arange(shape[0]) - k[1, 2]) / k[1, 1]
    found: NDArray[np.float64] = np.sqrt(1 + u[None] ** 2 + v[:, None] ** 2)
    return found


def decode(
    numbers: NDArray[Any], code: DepthCode, intrinsics: NDArray[Any], shown: str = "depth"
) -> NDArray[np.float32]:
    """Meters along z, (H, W); 0 where nothing is known.

    Raises:
        UserError: the array does not have the form of this code, a disparity has no baseline, or all lies beyond ``far``.
    """
    if code.unit == "carla" and code.scale is None:
        if numbers.ndim != 3 or numbers.shape[2] < 3 or numbers.dtype != np.uint8:
            raise UserError(
                f"{shown}: expected CARLA's depth in red, green and blue of 8 bits, found {_form(numbers)}: what else it is"
                " in is said by --reading.depth_unit, such as m or mm"
            )
        if (numbers[..., 0] == numbers[..., 1]).all() and (numbers[..., 1] == numbers[..., 2]).all():
            raise UserError(
                f"{shown}: all three channels are equal: a gray preview of CARLA's depth (ColorConverter.Depth or"
                " LogarithmicDepth), whose meters are lost; save it raw"
            )
        r, g, b = (numbers[..., i].astype(np.float64) for i in range(3))
        meters = 1000 * (r + 256 * g + 65536 * b) / (256**3 - 1)
    else:
        if numbers.ndim == 3 and (numbers[..., :1] == numbers[..., 1:3]).all():
            numbers = numbers[..., 0]  # SYNTHIA writes each number three times, OpenCV a gray picture in color
        if numbers.ndim != 2:
            hint = "; CARLA's 24 bits are --reading.depth_unit carla" if numbers.ndim == 3 else ""
            raise UserError(f"{shown}: expected one channel, found {_form(numbers)}{hint}")
        if numbers.dtype == np.uint8 and (code.unit not in DISPARITIES or code.scale is not None):
            raise UserError(f"{shown}: 8 bits are too few for depth (a preview for the eye?)")
        values = numbers.astype(np.float64)
        if np.issubdtype(numbers.dtype, np.integer):  # the largest number of a file is no distance: nothing, or too far
            values[(numbers == np.iinfo(numbers.dtype).max) | (numbers.astype(np.int64) == np.iinfo(np.uint16).max)] = 0
        if code.unit in DISPARITIES and code.scale is None:
            if code.baseline is None:
                raise UserError(f"{shown}: a disparity needs --reading.baseline (meters between the cameras)")
            pixels = values * DISPARITIES[code.unit]
            shifted = pixels - code.offset
            there = np.isfinite(values) & (pixels > 0) & (shifted > 0)
            meters = np.where(there, intrinsics[0, 0] * code.baseline / np.where(there, shifted, 1.0), 0.0)
        else:
            meters = values * (SCALES[code.unit] if code.scale is None else code.scale)
    meters = np.where(np.isfinite(meters) & (meters > 0), meters, 0.0)
    if code.ray:
        meters = meters / ray_lengths((meters.shape[0], meters.shape[1]), intrinsics)
    near = meters < code.far
    if not (near & (meters > 0)).any() and (meters > 0).any():
        raise UserError(
            f"{shown}: all depth is farther than --reading.far {code.far:g} m (median {np.median(meters[meters > 0]):.4g} m):"
            " another unit is likely, such as --reading.depth_unit mm or cm"
        )
    return np.where(near, meters, 0.0).astype(np.float32)


def _form(numbers: NDArray[Any]) -> str:
    return f"{numbers.dtype} of {' x '.join(map(str, numbers.shape))}"


@dataclasses.dataclass(frozen=True)
class DepthLook:
    """What a depth map looks like.

    Attributes:
        low: smallest depth in meters.
        high: largest depth.
        density: share of the lower half that has depth.
        height: meters of the camera above what lies before it, from the lowest fifth of the picture; NaN without depth there.
        rising: whether what is lower in the picture is farther away, as in a disparity taken for a depth.
        ray: whether a flat road fits better when the numbers are taken as distances along the ray.
        marker: the smallest or largest depth where far more pixels have it than any distance can; NaN where there is none.
    """

    low: float
    high: float
    density: float
    height: float
    rising: bool
    ray: bool
    marker: float = float("nan")


MARKED = 0.05
"""Share of the pixels with depth that one number, the smallest or the largest, has to have to be taken for a marker."""


def look_at(depth: NDArray[np.float32], intrinsics: NDArray[Any]) -> DepthLook:
    """Measure what tells a wrong unit, a disparity, a distance along the ray, or a sparse scan."""
    rows, columns = depth.shape
    there = depth > 0
    if not there.any():
        return DepthLook(0.0, 0.0, 0.0, float("nan"), False, False)
    lower = there[rows // 2 :]
    middle = slice(columns // 4, columns - columns // 4)
    low = rows - max(1, rows // 5)
    v = (np.arange(rows)[:, None] - intrinsics[1, 2]) / intrinsics[1, 1]
    heights = (depth * v)[low:, middle][there[low:, middle]]
    # the bands of rows must see the same ground: halves of what lies below the middle
    near, far = depth[low:, middle], depth[rows // 2 : rows // 2 + max(1, rows // 5), middle]
    rising = False
    if (near > 0).sum() > 8 and (far > 0).sum() > 8:
        rising = bool(np.median(near[near > 0]) > 1.3 * np.median(far[far > 0]))
    found = depth[there]
    height = float(np.median(heights)) if len(heights) else float("nan")
    low_high = float(found.min()), float(found.max())
    return DepthLook(*low_high, float(lower.mean()), height, rising, _along_rays(depth, intrinsics), _marker(depth))


def _marker(depth: NDArray[np.float32]) -> float:
    """The smallest or largest depth where it is common, in many rows, and apart from all others; NaN where there is none."""
    values, counts = np.unique(depth[depth > 0], return_counts=True)
    if len(values) < 3:
        return float("nan")
    for end, beside in ((0, 1), (-1, -2)):
        own, other = float(values[end]), float(values[beside])
        rows = int((depth == values[end]).any(1).sum())  # a flat road has a depth of its own in each row
        if counts[end] >= MARKED * counts.sum() and abs(own - other) > 0.05 * max(own, other) and rows >= 4:
            return own
    return float("nan")


def _along_rays(depth: NDArray[np.float32], intrinsics: NDArray[Any]) -> bool:
    """Inverse depth of a flat road is affine in the pixel: which reading of the numbers fits that better, by far?"""
    rows, columns = depth.shape
    part = depth[rows - rows // 4 :, columns // 5 : columns - columns // 5].astype(np.float64)
    there = part > 0
    if there.sum() < 50:
        return False
    v, u = np.nonzero(there)
    lengths = ray_lengths(depth.shape, intrinsics)[rows - rows // 4 :, columns // 5 : columns - columns // 5][there]
    design = np.stack([u / columns, v / rows, np.ones(len(u))], 1)
    errors = []
    for inverse in (1 / part[there], lengths / part[there]):
        kept: NDArray[np.bool_] = np.ones(len(u), np.bool_)
        for _ in range(3):  # what stands on the road is no part of it
            solution = np.linalg.lstsq(design[kept], inverse[kept], rcond=None)[0]
            residual = np.abs(design @ solution - inverse)
            kept = residual <= np.quantile(residual, 0.7)
        errors.append(np.sqrt(np.mean(residual[kept] ** 2)) / np.mean(inverse[kept]))
    return bool(errors[0] > 2 * errors[1] and errors[0] > 2e-3)


SURE = 4.5
"""Standard errors by which a shift has to be better than none."""


def shift_of(rgb: NDArray[np.uint8], depth: NDArray[np.float32], reach: int = 12) -> int | None:
    """Columns by which jumps of depth have to move to meet edges of the picture; None where they meet, or are too few to tell.

    Jumps between neighbors in a row are looked at, which a road does not have. The mean gradient of the picture under them is
    compared over shifts; a shift counts from three pixels on, where it is half as good again as none, and by more than what
    noise of depth brings about.
    """
    rows, columns = depth.shape
    if columns < 8 * reach:
        return None
    edges = np.abs(np.gradient(rgb.astype(np.float64).mean(2), axis=1))
    there = depth > 0
    logs = np.log(np.where(there, depth, 1.0))
    jump = there[:, 1:] & there[:, :-1] & (np.abs(np.diff(logs, axis=1)) > 0.35)
    jump[:, :reach] = jump[:, columns - 1 - reach :] = False
    v, u = np.nonzero(jump)
    if len(v) < max(30, rows // 4):
        return None
    seen = {d: edges[v, u + d] + edges[v, u + 1 + d] for d in range(-reach, reach + 1)}
    best = max(seen, key=lambda d: float(seen[d].mean()))
    gain = seen[best] - seen[0]
    clear = gain.mean() > SURE * gain.std() / np.sqrt(len(gain))
    return best if abs(best) >= 3 and clear and seen[best].mean() > 1.5 * max(seen[0].mean(), 1e-9) else None


CARS = (1.0, 2.5)
"""Meters above the road in which a car has its camera."""


def other_unit(height: float, unit: str) -> tuple[str, float] | None:
    """A unit of the same kind of file that would bring a camera, low or high for a car, to where cars have theirs.

    Units a factor of 2.56 or 3.9 apart (256 numbers per meter against centimeters or millimeters) both give heights that can
    be, of a robot or of a truck; larger factors do not.
    """
    if CARS[0] <= height <= CARS[1]:
        return None
    near = {"mm": ("m/256",), "cm": ("m/256",), "m/256": ("cm", "mm")}.get(unit, ())
    heights = ((other, height * SCALES[other] / SCALES[unit]) for other in near)
    return next(((other, found) for other, found in heights if CARS[0] <= found <= CARS[1]), None)


def complaints(look: DepthLook, shown: str, code: DepthCode | None = None) -> list[tuple[bool, str]]:
    """What is wrong with a depth map and how it is likely mended; True first where it cannot be used at all."""
    if look.high == 0:
        return [(True, f"{shown}: no pixel has valid depth")]
    found: list[tuple[bool, str]] = []
    if look.rising:
        found.append(
            (
                True,
                (
                    f"{shown}: what is lower in the picture is farther away: this looks like a disparity, whose unit "
                    f"is --reading.depth_unit disparity with --reading.baseline"
                ),
            )
        )
    elif np.isfinite(look.height) and not HEIGHTS[0] <= look.height <= HEIGHTS[1]:
        found.append(
            (
                True,
                (
                    f"{shown}: the camera would be {look.height:.3g} m above what is before it (depth {look.low:.3g} "
                    f"to {look.high:.3g} m), expected {HEIGHTS[0]} to {HEIGHTS[1]} m: {_likely(look.height)}"
                ),
            )
        )
    elif code is not None and code.scale is None and (other := other_unit(look.height, code.unit)) is not None:
        text = f"{shown}: by {code.unit} the camera is {look.height:.2g} m above the road"
        found.append(
            (False, f"{text}, by {other[0]} {other[1]:.2g} m: on a car, the unit is --reading.depth_unit {other[0]}")
        )
    if np.isfinite(look.marker):
        fix = f"--reading.far {look.marker:.4g}" if look.marker == look.high else "write 0 there"
        text = f"{shown}: one number, {look.marker:.4g} m, stands apart and fills a twentieth or more: a marker of"
        found.append((False, f"{text} 'no depth'? {fix} makes holes of it"))
    if look.density < SPARSE:
        found.append(
            (
                False,
                (
                    f"{shown}: {100 * look.density:.0f} % of the lower half have depth, under {100 * SPARSE:.0f} %: "
                    f"normals need dense or completed depth"
                ),
            )
        )
    if look.ray:
        found.append((False, f"{shown}: a flat road fits better when depth is taken along the ray: --reading.ray true"))
    return found


def _likely(height: float) -> str:
    """The unit that would put the camera where cameras are."""
    options = [
        (f"--reading.depth_unit {unit}", f"numbers taken for {taken}")
        for taken, scale in SCALES.items()
        for unit, other in SCALES.items()
        if unit != taken and HEIGHTS[0] <= height * other / scale <= HEIGHTS[1]
    ]
    if not options:
        return "the unit or the intrinsics are wrong"
    fitting = list(dict.fromkeys(f"{fix} ({why})" for fix, why in options))
    return "another unit is likely, such as " + " or ".join(fitting[:3])
