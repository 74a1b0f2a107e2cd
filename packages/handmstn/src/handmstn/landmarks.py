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
    return Landmarks(from_columns(_finite(values.astype(np.float64).ravel(), path)), "half")


def from_columns(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """x1..x9, y1..y9, column by column -> nine points (x, y), row by row."""
    by_column = values.reshape(2, 3, 3)  # (axis, column, row)
    points: NDArray[np.float64] = by_column.transpose(2, 1, 0).reshape(9, 2)
    return points


def _finite(values: NDArray[np.float64], path: Path) -> NDArray[np.float64]:
    if not np.isfinite(values).all():
        raise UserError(f"{path}: landmark {int(np.argwhere(~np.isfinite(values)).ravel()[0]) + 1} is not finite")
    return values


def read_json(path: str | Path, hand: int | None = None) -> Landmarks:
    """21 points as mediapipe, OpenPose or CMU's hand data set write them.

    - mediapipe: a list of 21 ``{"x", "y"}`` in shares of the picture; or ``landmarks``, ``hand_landmarks`` or
      ``multi_hand_landmarks`` holding one such list or several, with ``handedness`` beside it.
    - OpenPose: ``people`` with ``hand_right_keypoints_2d`` or ``hand_left_keypoints_2d``, in pixels.
    - CMU: ``hand_pts`` in pixels, with ``is_left``.

    mediapipe names the hand as a mirrored (selfie) camera sees it, so its "Left" is a right hand in an ordinary picture; since
    a file does not say which it was, the side is left unknown.

    Args:
        path: the file.
        hand: which of several hands, from 1.

    Raises:
        UserError: not such a file, several hands and none chosen, or another number of points.
    """
    path = Path(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    found = _hands_in(content)
    if not found:
        raise UserError(
            f"{path}: expected 21 landmarks of mediapipe (x, y), 'hand_pts' of CMU or 'people' of OpenPose, found none"
        )
    if len(found) > 1 and hand is None:
        raise UserError(f"{path} holds {len(found)} hands: cut the picture so that one is left")
    number = 0 if hand is None else hand - 1
    if number >= len(found):
        raise UserError(f"{path} holds {len(found)} hands, there is no number {hand}")
    points, unit, side = found[number]
    if points.shape != (21, 2):
        raise UserError(f"{path}: expected 21 landmarks, found {len(points)}")
    return Landmarks(_finite(points, path), unit, side)


_Found = list[tuple[NDArray[np.float64], str, str]]


def _hands_in(content: Any) -> _Found:
    if isinstance(content, dict) and "hand_pts" in content:
        side = {True: "left", False: "right"}[bool(content["is_left"])] if "is_left" in content else "unknown"
        return [(_pairs(content["hand_pts"]), "pixels", side)]
    if isinstance(content, dict) and "people" in content:
        found: _Found = []
        for person in content["people"]:
            for side in ("left", "right"):
                flat = np.asarray(person.get(f"hand_{side}_keypoints_2d") or [], np.float64)
                if flat.size and flat.size % 3 == 0 and flat.reshape(-1, 3)[:, 2].any():
                    found.append((flat.reshape(-1, 3)[:, :2], "pixels", side))
        return found
    if isinstance(content, dict):
        for key in ("hand_landmarks", "multi_hand_landmarks", "landmarks", "handLandmarks", "landmark"):
            if key in content:
                return _hands_in(content[key])
        return []
    if not isinstance(content, list) or not content:
        return []
    first = content[0]
    if isinstance(first, dict) and "x" in first:
        return [(_pairs([(p.get("x"), p.get("y")) for p in content]), "share", "unknown")]
    if isinstance(first, dict | list) and not _is_pair(first):
        return [hand for inner in content for hand in _hands_in(inner)]
    return [(_pairs(content), "share", "unknown")] if _is_pair(first) else []


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) in {2, 3} and all(isinstance(v, int | float) for v in value)


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
