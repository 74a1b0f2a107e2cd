"""Parts of a hand: where their control points lie in a crop, on an upright hand, and among the 21 landmarks of others.

Coordinates are (x, y), -1 at the center of the first pixel and +1 at that of the last (``align_corners=True``), y downwards.
The hand is a right one seen from the palm, fingers up, thumb to the left; left hands are mirrored to look like it.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Family = Literal["tps", "affine", "similarity"]
Pairs = tuple[tuple[float, float], ...]
FINGERS = ("thumb", "index", "middle", "ring", "little")
SCALE = 0.42
"""Half widths of a picture in one hand unit, for the hand at which an untrained aligner begins."""
PALM_CENTER, PALM_HALF = (0.0, 0.02), (0.80, 0.90)
"""The palm's crop in hand units."""
BASES: Pairs = ((-0.86, 0.25), (-0.62, -0.92), (-0.20, -1.02), (0.22, -0.98), (0.62, -0.82))
ANGLES = (-52.0, -13.0, -2.0, 8.0, 20.0)
LENGTHS = (0.95, 1.12, 1.20, 1.08, 0.86)
HALF_WIDTHS = (0.25, 0.205, 0.21, 0.20, 0.18)
"""The canonical hand: where each finger begins, its direction in degrees from upwards, length and half width, in hand units."""
TAPER = 0.25
"""Share of its width that a finger has lost at its tip."""
WIDER = 1.15
"""Half widths of a finger in half the width of its crop."""


@dataclasses.dataclass(frozen=True)
class PartSpec:
    """A part: a template of control points in its crop, and the family of maps that carries the crop onto the picture.

    Args:
        name: name of the part.
        points: K template points in the crop's own coordinates.
        out_size: height and width of the crop in pixels.
        family: tps (thin-plate spline through all points), affine or similarity (least squares).
        mirror_perm: which point each one becomes in a mirrored picture; default: itself.
        pose: where the points lie on the canonical hand, in half widths of a picture; default: the template.
        net: network that reads the crop: parts of one network and size are read as one batch.
        extent: half width and half height of the crop in template coordinates; other than 1 where a similarity has to keep
            the shape of a crop that is not square.

    Raises:
        ValueError: too few points for the family, duplicate or collinear ones, a permutation that is no involution.
    """

    name: str
    points: Pairs
    out_size: tuple[int, int]
    family: Family = "tps"
    mirror_perm: tuple[int, ...] | None = None
    pose: Pairs | None = None
    net: Literal["palm", "finger"] = "palm"
    extent: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        points = np.asarray(self.points, np.float64).reshape(-1, 2)
        least = 2 if self.family == "similarity" else 3
        if len(points) < least:
            raise ValueError(f"part {self.name}: {self.family} needs {least} points or more, got {len(points)}")
        gaps = np.abs(points[:, None] - points[None]).max(-1) + 9 * np.eye(len(points))
        if gaps.min() < 1e-6:
            first, second = np.argwhere(gaps < 1e-6)[0]
            raise ValueError(f"part {self.name}: points {first} and {second} are the same")
        if self.family != "similarity" and np.linalg.matrix_rank(points - points.mean(0), tol=1e-6) < 2:
            raise ValueError(f"part {self.name}: its points lie on one line, which fixes no {self.family} map")
        perm = self.mirror_perm
        if perm is not None and [perm[i] for i in perm] != list(range(len(points))):
            raise ValueError(f"part {self.name}: mirror_perm {perm} applied twice is not the identity")

    @property
    def count(self) -> int:
        """Number of control points."""
        return len(self.points)

    @property
    def start(self) -> NDArray[np.float64]:
        """The points on the canonical hand, (K, 2)."""
        return np.asarray(self.points if self.pose is None else self.pose, np.float64)


def finger_frame(finger: int, share: float, across: float) -> tuple[float, float]:
    """The place on the canonical hand at a share of a finger's length and ``across`` of its half widths, in hand units."""
    angle = math.radians(ANGLES[finger])
    along = share * LENGTHS[finger]
    aside = across * HALF_WIDTHS[finger] * (1 - TAPER * share)
    x, y = BASES[finger]
    return (
        x + along * math.sin(angle) + aside * math.cos(angle),
        y - along * math.cos(angle) + aside * math.sin(angle),
    )


def _scaled(pairs: list[tuple[float, float]]) -> Pairs:
    return tuple((SCALE * x, SCALE * (y + 0.45)) for x, y in pairs)


def palm_part(size: int = 112) -> PartSpec:
    """Nine points, three by three, row by row; a thin-plate spline."""
    template = [(x, y) for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)]
    (cx, cy), (hx, hy) = PALM_CENTER, PALM_HALF
    pose = _scaled([(cx + hx * x, cy + hy * y) for x, y in template])
    return PartSpec("palm", tuple(template), (size, size), "tps", (2, 1, 0, 5, 4, 3, 8, 7, 6), pose)


def finger_part(finger: int, size: tuple[int, int] = (96, 32)) -> PartSpec:
    """Six points: left and right of a finger's base, middle and tip; the tip is the top of the crop."""
    template = [(x, y) for y in (1.0, 0.0, -1.0) for x in (-1.0, 1.0)]
    pose = _scaled([finger_frame(finger, (1 - y) / 2, WIDER * x) for x, y in template])
    return PartSpec(FINGERS[finger], tuple(template), size, "tps", (1, 0, 3, 2, 5, 4), pose, "finger")


def whole_part(size: int = 112) -> PartSpec:
    """Four corners: of the whole picture, or of a box of the hand."""
    corners: Pairs = ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
    return PartSpec("hand", corners, (size, size), "affine", (1, 0, 3, 2))


SEGMENTS = (
    *((0, first) for first in (1, 5, 9, 13, 17)),
    *((first + k, first + k + 1) for first in (1, 5, 9, 13, 17) for k in range(3)),
)
"""Landmark segments of the 21-point hand: five from the wrist, three per finger."""


def landmarks_21() -> NDArray[np.float64]:
    """The 21 landmarks (wrist, then four per finger from thumb to little) on the canonical hand, (21, 2)."""
    found = [(0.0, 1.05)]
    for finger in range(5):
        found += [finger_frame(finger, share, 0.0) for share in (-0.12, 0.42, 0.72, 1.0)]
    return np.asarray(_scaled(found))


def _segment_part(number: int, size: tuple[int, int]) -> PartSpec:
    first, second = SEGMENTS[number]
    name = f"{'palm' if first == 0 else FINGERS[(first - 1) // 4]}-{first}-{second}"
    spots = landmarks_21()
    pose = (tuple(spots[first].tolist()), tuple(spots[second].tolist()))
    extent = (size[1] / size[0], 1.0)
    return PartSpec(name, ((0.0, 1.0), (0.0, -1.0)), size, "similarity", None, pose, "finger", extent)


def preset(name: str, palm_size: int = 112, finger_size: tuple[int, int] = (96, 32)) -> tuple[PartSpec, ...]:
    """The parts of a preset: eeprnet (the palm), hand6 (palm and five fingers), hand21 (one part per landmark segment), whole.

    Raises:
        ValueError: there is no such preset.
    """
    if name == "eeprnet":
        return (palm_part(palm_size),)
    if name == "hand6":
        return (palm_part(palm_size), *(finger_part(finger, finger_size) for finger in range(5)))
    if name == "hand21":
        return tuple(_segment_part(number, (finger_size[0], finger_size[1])) for number in range(len(SEGMENTS)))
    if name == "whole":
        return (whole_part(palm_size),)
    raise ValueError(f"preset is one of {', '.join(PRESETS)}, got '{name}'")


PRESETS = ("eeprnet", "hand6", "hand21", "whole")
PALMAR = ("eeprnet", "hand6", "hand21")
"""Presets whose points an aligner predicts."""


def mirror_points(points: NDArray[np.float32], parts: tuple[PartSpec, ...]) -> NDArray[np.float32]:
    """The points of all parts, (..., sum K, 2), in the mirrored picture; twice is the identity."""
    order: list[int] = []
    for part in parts:
        start = len(order)
        order += [start + i for i in (part.mirror_perm or range(part.count))]
    flipped: NDArray[np.float32] = points[..., order, :] * np.asarray([-1, 1], points.dtype)
    return flipped


def from_landmarks(landmarks: NDArray[np.float64], parts: tuple[PartSpec, ...]) -> NDArray[np.float32]:
    """The control points of parts out of 21 landmarks (wrist, then four per finger from thumb to little).

    A finger's strip runs from its first landmark to its tip, as wide as 0.36 of the mean distance of neighboring finger
    bases on either side. The palm is the grid that carries the canonical hand's wrist, thumb, index and little base onto theirs
    (least-squares affine). A segment is its two landmarks.

    Args:
        landmarks: (21, 2), in half widths of the picture.
        parts: the parts of a preset.

    Raises:
        ValueError: not 21 points.
    """
    spots = np.asarray(landmarks, np.float64)
    if spots.shape != (21, 2):
        raise ValueError(f"expected 21 landmarks of (x, y), got {spots.shape}")
    own = landmarks_21()
    anchors = [0, 1, 5, 9, 13, 17]
    design = np.hstack([own[anchors], np.ones((len(anchors), 1))])
    affine = np.linalg.lstsq(design, spots[anchors], rcond=None)[0]
    side = np.sign(np.linalg.det(affine[:2])) or 1.0
    width = 0.36 * float(np.mean([np.linalg.norm(spots[a] - spots[b]) for a, b in ((5, 9), (9, 13), (13, 17))]))
    found: list[NDArray[np.float64]] = []
    for part in parts:
        if part.family == "similarity":
            first, second = (int(word) for word in part.name.rsplit("-", 2)[1:])
            found.append(spots[[first, second]])
        elif part.name in FINGERS:
            found.append(_strip(spots, FINGERS.index(part.name), width, side))
        else:
            found.append(np.hstack([part.start, np.ones((part.count, 1))]) @ affine)
    return np.concatenate(found).astype(np.float32)


def _strip(spots: NDArray[np.float64], finger: int, width: float, side: float) -> NDArray[np.float64]:
    """Left and right of a finger's first landmark, its middle and its tip."""
    first, last = spots[1 + 4 * finger], spots[4 + 4 * finger]
    middle = (spots[2 + 4 * finger] + spots[3 + 4 * finger]) / 2
    along = (last - first) / max(float(np.linalg.norm(last - first)), 1e-9)
    across = side * np.asarray([-along[1], along[0]]) * width
    return np.concatenate([[spot - across, spot + across] for spot in (first, middle, last)])
