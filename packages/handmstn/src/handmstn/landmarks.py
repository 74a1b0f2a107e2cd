"""Landmark files of other tools: the predecessor's .mat, mediapipe's, OpenPose's and CMU's JSON; nothing is unpickled."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold import UserError


@dataclasses.dataclass(frozen=True)
class Landmarks:
    """Points of one hand in one picture.

    Attributes:
        points: 9 points of the palm, row by row, in half widths of the picture; or 21 landmarks (wrist, then four per finger).
        unit: pixels, share (0 to 1 of width and height) or half (-1 to 1 of width and height).
        side: left, right or unknown, as the file says.
    """

    points: NDArray[np.float64]
    unit: str
    side: str = "unknown"


def read_mat(path: str | Path) -> Landmarks:
    """The predecessor's file: ``thetaTps``, x of nine points and then y, column by column, in half widths.

    Raises:
        UserError: no such variable, another number of values, values that are not finite, or MATLAB's format 7.3.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    path = Path(path)
    try:
        content = loadmat(path)
    except NotImplementedError as error:
        raise UserError(f"{path} is of MATLAB's format 7.3: save it with -v7") from error
    except (OSError, ValueError, TypeError, MatReadError, IndexError) as error:
        raise UserError(
            f"{path} is not a MATLAB file ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    names = [name for name in content if not name.startswith("__")]
    name = "thetaTps" if "thetaTps" in names else next((n for n in names if np.size(content[n]) == 18), None)
    if name is None:
        raise UserError(f"{path}: expected 'thetaTps' with 18 numbers, found {', '.join(names) or 'nothing'}")
    values = np.asarray(content[name])
    if values.size != 18 or values.dtype.kind not in "fiu":
        raise UserError(f"{path}: '{name}' has {values.size} values of {values.dtype}, expected 18 numbers")
    numbers = _finite(values.astype(np.float64).ravel(order="F" if values.shape == (9, 2) else "C"), path)
    if np.abs(numbers).max() > 3:
        raise UserError(f"{path}: '{name}' holds {numbers[np.abs(numbers).argmax()]:g}, expected about -1 to 1")
    return Landmarks(from_columns(numbers), "half")


def from_columns(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """x1..x9, y1..y9, column by column -> nine points (x, y), row by row."""
    by_column = values.reshape(2, 3, 3)  # (axis, column, row)
    points: NDArray[np.float64] = by_column.transpose(2, 1, 0).reshape(9, 2)
    return points


def _finite(values: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise UserError(f"{path}: landmark {int(np.argwhere(~np.isfinite(values)).ravel()[0]) + 1} is not finite")
    return values


def read_json(path: str | Path, hand: int | None = None, unit: str | None = None) -> Landmarks:
    """21 points as mediapipe, OpenPose, MMPose or CMU's hand data set write them.

    - mediapipe: a list of 21 ``{"x", "y"}`` in shares of the picture; or ``landmarks``, ``hand_landmarks``,
      ``multi_hand_landmarks`` or ``multiHandLandmarks`` holding one such list or several, with ``handedness`` beside it.
    - TensorFlow.js and MMPose: ``keypoints``, in pixels, of one hand or in a list of hands.
    - OpenPose: ``people`` with ``hand_right_keypoints_2d`` or ``hand_left_keypoints_2d``, in pixels.
    - CMU: ``hand_pts`` in pixels, with ``is_left``.

    mediapipe names the hand as a mirrored (selfie) camera sees it, so its "Left" is a right hand in an ordinary picture; since
    a file does not say which it was, the side is left unknown.

    Args:
        path: the file.
        hand: which of several hands, from 1.
        unit: pixels, share or unit (-1 to 1), where it is not the form's own.

    Raises:
        UserError: not such a file, several hands and none chosen, another number of points, or values that are no shares.
    """
    path = Path(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    found = _hands_in(content)
    if not found:
        world = isinstance(content, dict) and any("world" in str(key).lower() for key in content)
        more = ": world landmarks are in meters, the picture's are wanted" if world else ""
        raise UserError(
            f"{path}: expected 21 landmarks of mediapipe (x, y), 'keypoints' of MMPose, 'hand_pts' of CMU or 'people' of"
            f" OpenPose, found none{more}"
        )
    if len(found) > 1 and hand is None:
        raise UserError(f"{path} holds {len(found)} hands: cut the picture so that one is left")
    number = 0 if hand is None else hand - 1
    if number >= len(found):
        raise UserError(f"{path} holds {len(found)} hands, there is no number {hand}")
    points, own, side = found[number]
    if points.shape != (21, 2):
        raise UserError(f"{path}: expected 21 landmarks, found {len(points)}")
    _finite(points, path)
    own = own if unit is None else {"unit": "half"}.get(unit, unit)
    if own == "share" and (points.min() < -1 or points.max() > 2):
        bad = int(np.argwhere((points < -1) | (points > 2))[0, 0])
        raise UserError(
            f"{path}: landmark {bad + 1} is {points[bad].tolist()}, expected shares of the picture, 0 to 1;"
            " --unit pixels is for pixels"
        )
    return Landmarks(points, own, side)


_Found = list[tuple[NDArray[np.float64], str, str]]
_SHARES = frozenset(
    {"handlandmarks", "multihandlandmarks", "landmarks", "landmark", "normlandmarks", "normalizedlandmarks"}
)
_PIXELS = frozenset({"keypoints", "keypoints2d"})
_DEEPER = ("instances", "predictions", "hands", "results")
"""Keys, in lower case and without underscores, below which hands lie."""


def _hands_in(content: Any, unit: str = "share") -> _Found:
    if isinstance(content, dict):
        return _hands_below(content)
    if not isinstance(content, list) or not content:
        return []
    first = content[0]
    if isinstance(first, dict) and ("x" in first or "y" in first):
        # the JSON form of a protocol buffer leaves out zeros
        return [(_pairs([(p.get("x", 0.0), p.get("y", 0.0)) for p in content if isinstance(p, dict)]), unit, "unknown")]
    if isinstance(first, dict | list) and not _is_pair(first):
        return [hand for inner in content for hand in _hands_in(inner, unit)]
    return [(_pairs(content), unit, "unknown")] if _is_pair(first) else []


def _hands_below(content: dict[str, Any]) -> _Found:
    if "hand_pts" in content:
        side = {True: "left", False: "right"}[bool(content["is_left"])] if "is_left" in content else "unknown"
        return [(_pairs(content["hand_pts"]), "pixels", side)]
    if "people" in content:
        found: _Found = []
        for person in content["people"]:
            for side in ("left", "right"):
                flat = np.asarray(person.get(f"hand_{side}_keypoints_2d") or [], np.float64)
                if flat.size and flat.size % 3 == 0 and flat.reshape(-1, 3)[:, 2].any():
                    found.append((flat.reshape(-1, 3)[:, :2], "pixels", side))
        return found
    plain = {str(key).lower().replace("_", ""): value for key, value in content.items()}
    for names, unit in ((_SHARES, "share"), (_PIXELS, "pixels")):
        for key in sorted(names & plain.keys()):
            return _hands_in(plain[key], unit)
    return next((_hands_in(plain[key]) for key in _DEEPER if key in plain), [])


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) in {2, 3, 4} and all(isinstance(v, int | float) for v in value)


def _pairs(rows: Any) -> NDArray[np.float64]:
    try:
        return np.asarray([[row[0], row[1]] for row in rows], np.float64)
    except (TypeError, ValueError, IndexError, KeyError):
        return np.zeros((0, 2))


def in_pixels(landmarks: Landmarks, width: int, height: int) -> NDArray[np.float64]:
    """The points in pixels of a picture of this size."""
    points = landmarks.points
    if landmarks.unit == "pixels":
        return points
    size = np.asarray([width, height], np.float64)
    if landmarks.unit == "share":
        return points * size - 0.5
    return (points + 1) / 2 * (size - 1)
