"""Which label ids or colors are drivable, by palette; ids that say which palette a picture is of."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tenfold import UserError

Palette = Literal[
    "auto", "binary", "kitti-road", "orfd", "vkitti2", "synthia", "synthia-rand", "cityscapes", "cityscapes-train",
    "cityscapes-colors", "mapillary", "mapillary-2.0", "carla-0.9.13", "carla-0.9.14",
]  # fmt: skip
IGNORED = 255


@dataclasses.dataclass(frozen=True)
class Ids:
    """A palette of numbers.

    Attributes:
        road: ids that are drivable.
        ignored: ids that count nowhere.
        known: number of ids that the palette has.
    """

    road: tuple[int, ...]
    ignored: tuple[int, ...]
    known: int


IDS: dict[str, Ids] = {
    "binary": Ids((1,), (255,), 2),
    "synthia": Ids((3, 12), (0,), 16),  # sequences: road, lane marking
    "synthia-rand": Ids((3, 22), (0,), 23),  # RAND-CITYSCAPES
    "cityscapes": Ids((7,), (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30), 34),  # labelIds
    "cityscapes-train": Ids((0,), (255,), 19),  # labelTrainIds
    "mapillary": Ids((7, 8, 10, 13, 14, 23, 24), (65,), 66),  # Vistas 1.2: lanes, crossings, parking, road, markings
    "mapillary-2.0": Ids((13, 14, 16, 17, 18, 21, 22, 23, *range(35, 55)), (123,), 124),  # the same, driveway, shoulder
    "carla-0.9.13": Ids((6, 7), (), 23),  # road line, road
    "carla-0.9.14": Ids((1, 24), (), 29),
}  # fmt: skip
ROAD_COLORS = {
    "vkitti2": ((100, 60, 100),),
    "cityscapes-colors": ((128, 64, 128), (157, 234, 50)),
}  # road, CARLA's road line


def listed(ids: Sequence[int], most: int = 20) -> str:
    """Ids in words, the first of many."""
    shown = ", ".join(map(str, ids[:most]))
    return shown if len(ids) <= most else f"{shown} and {len(ids) - most} more"


def by_color(image: NDArray[np.uint8], palette: str, shown: str) -> NDArray[np.uint8]:
    """0, 1 and 255 (ignored) of a picture whose colors are labels.

    Raises:
        UserError: it has no three channels.
    """
    if image.ndim != 3 or image.shape[2] < 3:
        raise UserError(
            f"{shown}: expected a label in colors, found {image.dtype} of {' x '.join(map(str, image.shape))}"
        )
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    if palette == "kitti-road":
        return np.where(red == 0, IGNORED, blue > 0).astype(np.uint8)
    if palette == "orfd":
        return (blue > 200).astype(np.uint8)
    found = np.zeros(red.shape, np.bool_)
    for r, g, b in ROAD_COLORS[palette]:
        found |= (red == r) & (green == g) & (blue == b)
    return found.astype(np.uint8)


def by_id(ids: NDArray[Any], road: Iterable[int], ignored: Iterable[int]) -> NDArray[np.uint8]:
    """0, 1 and 255 (ignored) of a picture of ids."""
    found = np.isin(ids, list(road)).astype(np.uint8)
    found[np.isin(ids, list(ignored))] = IGNORED
    return found


FIRST_CHANNEL = {"carla", "carla-0.9.13", "carla-0.9.14", "synthia", "synthia-rand"}
"""Palettes whose ids stand in the first of three channels, with other things (instances) in the others."""


def one_channel(image: NDArray[Any], palette: str, shown: str) -> NDArray[Any]:
    """The channel of a picture that holds ids.

    Raises:
        UserError: its channels differ, and the palette has ids in all of them.
    """
    if image.ndim == 2:
        return image
    if palette not in FIRST_CHANNEL and image.shape[2] >= 3 and (image[..., :1] != image[..., 1:3]).any():
        colors = np.unique(image[..., :3].reshape(-1, 3), axis=0)[:4].tolist()
        raise UserError(
            f"{shown}: colors where palette {palette} has ids, such as {', '.join(str(tuple(c)) for c in colors)}:"
            " give the picture of ids, or --reading.palette of colors"
        )
    return image[..., 0]


def recognize_carla(pictures: Sequence[NDArray[Any]], shown: str) -> str:
    """The version of CARLA whose ids pictures of one recording have: their lower middle is road in one of them.

    Args:
        pictures: ids of some pictures; a car or a crossing may be before the camera in several.
        shown: name of the first, for messages.

    Raises:
        UserError: it cannot be told; the message lists the ids that were found.
    """
    there = np.concatenate([before_camera(ids) for ids in pictures])
    old, new = (float(np.isin(there, IDS[name].road).mean()) for name in ("carla-0.9.13", "carla-0.9.14"))
    if max(old, new) < 0.3 or abs(old - new) < 0.3:
        found = listed(np.unique(np.concatenate([p.ravel() for p in pictures])).tolist())
        raise UserError(
            f"{shown}: ids {found}: CARLA up to 0.9.13 has road 7 and road line 6, from 0.9.14 on 1 and 24, and neither is"
            " before the camera; give --reading.palette carla-0.9.13 or carla-0.9.14, or --reading.road_ids"
        )
    return "carla-0.9.13" if old > new else "carla-0.9.14"


ROAD = {"cityscapes": 7, "cityscapes-train": 0, "mapillary": 13, "mapillary-2.0": 21}
"""The id of the road itself, in palettes that have a second one of the same pictures."""
MISTAKEN = {"cityscapes": "cityscapes-train", "cityscapes-train": "cityscapes", "mapillary": "mapillary-2.0",
            "mapillary-2.0": "mapillary"}  # fmt: skip
"""The second palette of the same pictures."""


def before_camera(ids: NDArray[Any]) -> NDArray[Any]:
    """Ids of the middle of the lowest third, where a road is mostly."""
    rows, columns = ids.shape
    return ids[rows - max(1, rows // 3) :, columns // 3 : columns - columns // 3].ravel()


def mistaken(ids: NDArray[Any], palette: str) -> str | None:
    """The second palette of the same pictures, where it alone has the road before the camera, and can have all ids."""
    other = MISTAKEN.get(palette)
    if other is None or any(v >= IDS[other].known and v not in IDS[other].ignored for v in np.unique(ids).tolist()):
        return None
    there = before_camera(ids)
    own, its = (float((there == ROAD[name]).mean()) for name in (palette, other))
    return other if own < 0.1 and its > 0.5 else None


def check_ids(ids: NDArray[Any], palette: str, shown: str) -> None:
    """Check that a palette can have the ids of a picture.

    Raises:
        UserError: it has fewer ids than that, or the second palette of the same pictures has the road before the camera and
            this one has not; the message lists the ids that were found.
    """
    known = IDS[palette]
    values = np.unique(ids).astype(np.int64)
    unknown = [v for v in values.tolist() if v >= known.known and v not in known.ignored]
    other = mistaken(ids, palette)
    if other is not None:
        raise UserError(
            f"{shown}: ids {listed(values.tolist())}: by palette {palette} no road is before the camera, by {other} there is:"
            f" give --reading.palette {other}, or --reading.road_ids"
        )
    if unknown:
        lossy = " (JPEG does not keep ids)" if shown.lower().endswith((".jpg", ".jpeg")) else ""
        raise UserError(
            f"{shown}: ids {listed(values.tolist())} were found{lossy}, palette {palette} has 0 to {known.known - 1}:"
            " give --reading.palette or --reading.road_ids"
        )
