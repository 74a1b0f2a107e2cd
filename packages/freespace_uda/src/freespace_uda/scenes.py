"""Scenes as they come from disk or from the renderer: pictures, depth in meters, intrinsics, labels, read when asked for."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freespace_uda import labels as palettes
from freespace_uda.birdseye import level_homography
from freespace_uda.calibration import Calibration, odd, read_calibration
from freespace_uda.depth import DepthCode, complaints, decode, look_at, read_numbers, shift_of
from freespace_uda.labels import by_color
from freespace_uda.pixels import stored_pixels, turned
from tenfold import UserError
from tenfold.readers import read_image


@dataclasses.dataclass(frozen=True)
class Record:
    """Where one scene lies.

    Attributes:
        name: unique within the data.
        rgb: picture; None where there is none.
        depth: depth file; None where there is none.
        label: label; None where there is none.
        calibration: file with the camera; None takes ``intrinsics``.
        intrinsics: K, where it is known without a file.
        code: how the depth file means depth.
        palette: how the label is read.
        part: train, val, test or nothing.
        category: group of the scene, such as KITTI's um, umm and uu.
    """

    name: str
    rgb: Path | None = None
    depth: Path | None = None
    label: Path | None = None
    calibration: Path | None = None
    intrinsics: NDArray[np.float64] | None = None
    code: DepthCode = dataclasses.field(default_factory=DepthCode)
    palette: str = "binary"
    part: str = ""
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Item:
    """What was read of a scene.

    Attributes:
        rgb: (H, W, 3) uint8, or None.
        depth: (H, W) float32 in meters along z, 0 where unknown, or None.
        intrinsics: K, (3, 3); of no meaning without depth.
        label: (H, W) uint8 of 0, 1 and 255, or None.
    """

    rgb: NDArray[np.uint8] | None
    depth: NDArray[np.float32] | None
    intrinsics: NDArray[np.float64]
    label: NDArray[np.uint8] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        found = self.rgb if self.rgb is not None else self.depth
        assert found is not None
        return found.shape[0], found.shape[1]


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A list of scenes.

    Attributes:
        source: what the data is, in words, and whether it is real or rendered.
        records: the scenes.
        road_ids: ids that are drivable, in place of the palettes'.
        path: folder or file that was named; None for rendered data.
    """

    source: str
    records: tuple[Record, ...]
    road_ids: tuple[int, ...] | None = None
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        """Name of a scene."""
        return self.records[index].name

    def has_label(self, index: int) -> bool:
        """Whether a scene has a label, without reading it."""
        return self.records[index].label is not None

    def picked(self, chosen: list[int]) -> "Scenes":
        """Some of the scenes."""
        return dataclasses.replace(self, records=tuple(self.records[i] for i in chosen))

    def item(self, index: int) -> Item:
        """Picture, depth and camera of a scene, without its label.

        Raises:
            UserError: a file cannot be read, or files do not fit each other.
        """
        record = self.records[index]
        rgb = None if record.rgb is None else read_image(record.rgb)
        if record.depth is None:
            if rgb is None:
                raise UserError(f"{record.name}: neither picture nor depth")
            return Item(rgb, None, np.eye(3))
        numbers = read_numbers(record.depth)
        if rgb is not None and numbers.shape[:2] != rgb.shape[:2]:
            raise UserError(
                f"{record.depth}: {numbers.shape[1]} x {numbers.shape[0]} pixels, its picture {record.rgb} has"
                f" {rgb.shape[1]} x {rgb.shape[0]}: register depth to the color camera first"
            )
        k = self.camera(index, (numbers.shape[1], numbers.shape[0])).intrinsics
        return Item(rgb, decode(numbers, record.code, k, str(record.depth)), k)

    def camera(self, index: int, size: tuple[int, int]) -> Calibration:
        """The camera of a scene, checked against the width and height of its pictures.

        Raises:
            UserError: there is none, or it cannot be one of such pictures.
        """
        record = self.records[index]
        if record.intrinsics is not None:
            found = Calibration(record.intrinsics)
            shown = f"intrinsics of {record.name}"
        elif record.calibration is not None:
            found = read_calibration(record.calibration)
            shown = str(record.calibration)
        else:
            raise UserError(
                f"{record.name}: no intrinsics: give --reading.intrinsics fx,fy,cx,cy, or a calibration file"
            )
        for fatal, message in odd(found.intrinsics, size, found.size):
            if fatal:
                raise UserError(f"{shown}: {message}")
        return found

    def label(self, index: int) -> NDArray[np.uint8]:
        """The label of a scene, (H, W) of 0, 1 and 255.

        Raises:
            UserError: it has none, or it cannot be read by its palette.
        """
        record = self.records[index]
        if record.label is None:
            raise UserError(f"{record.name}: no label")
        shown = str(record.label)
        palette = record.palette
        of_colors = palette in {"kitti-road", "orfd", *palettes.ROAD_COLORS} and self.road_ids is None
        image = read_raw(record.label, colors=of_colors)
        if self.road_ids is not None:
            ids = palettes.one_channel(image, record.palette, shown)
            if not np.isin(ids, self.road_ids).any() and ids.ndim == 2 and ids.max(initial=0) > 255:
                raise UserError(f"{shown}: ids {palettes.listed(np.unique(ids).tolist())}")
            ignored = palettes.IDS[record.palette].ignored if record.palette in palettes.IDS else ()
            return palettes.by_id(ids, self.road_ids, [i for i in ignored if i not in self.road_ids])
        if of_colors:
            return by_color(image.astype(np.uint8), palette, shown)
        if (
            palette == "carla"
            and image.ndim == 3
            and by_color(image.astype(np.uint8), "cityscapes-colors", shown).any()
        ):
            raise UserError(
                f"{shown}: colors of Cityscapes in place of ids (CARLA's ColorConverter.CityScapesPalette):"
                " --reading.palette cityscapes-colors"
            )
        if palette == "carla":
            palette = self.told_palette()
        ids = palettes.one_channel(image, palette, shown)
        if palette == "binary" and set(np.unique(ids).tolist()) == {0, 255}:
            return (ids == 255).astype(np.uint8)  # black and white masks
        palettes.check_ids(ids, palette, shown)
        known = palettes.IDS[palette]
        return palettes.by_id(ids, known.road, known.ignored)

    def told_palette(self) -> str:
        """The palette of the labels, of CARLA's the one that a few pictures of the recording tell.

        Raises:
            UserError: they tell none; the message lists the ids that were found.
        """
        paths = [r.label for r in self.records if r.label is not None and r.palette == "carla"]
        if not paths or self.road_ids is not None:
            return self.records[0].palette
        rows = np.linspace(0, len(paths) - 1, min(TOLD, len(paths))).round().astype(int)
        return _told(tuple(paths[i] for i in rows))

    def understood(self, *, labels: bool) -> dict[str, str]:
        """How depth, and labels where they may be read, are understood, in words.

        Raises:
            UserError: labels are of CARLA, and no version can be told.
        """
        units = sorted({r.code.words for r in self.records if r.depth is not None})
        found = {"depth": " and ".join(units)} if units else {}
        if labels and any(r.label is not None for r in self.records):
            own = sorted({r.palette for r in self.records if r.label is not None})
            names = [self.told_palette() if name == "carla" else name for name in own]
            ids = self.road_ids
            found["labels"] = " and ".join(names) if ids is None else f"ids {', '.join(map(str, ids))} are road"
        return found

    def road(self, index: int) -> NDArray[np.float64] | None:
        """Homography from the road plane to pixels, where the calibration has it."""
        calibration = self.records[index].calibration
        return None if calibration is None else read_calibration(calibration).road

    def checked(self, index: int) -> tuple[Item, list[str]]:
        """A scene, and what is odd about its depth and its camera.

        Raises:
            UserError: what is odd makes it useless; the message says what is likely meant.
        """
        item = self.item(index)
        record = self.records[index]
        said: list[str] = []
        if item.depth is not None:
            rows, columns = item.depth.shape
            shown = str(record.depth or record.name)
            found = complaints(look_at(item.depth, item.intrinsics), shown, record.code)
            found += [(fatal, f"{record.name}: {text}") for fatal, text in odd(item.intrinsics, (columns, rows))]
            if fatal := [text for bad, text in found if bad]:
                raise UserError(self._exchanged(index, item) or fatal[0])
            said = [text for _, text in found] + list(self.camera(index, (columns, rows)).doubts)
            if item.rgb is not None and (shift := shift_of(item.rgb, item.depth)) is not None:
                said.append(
                    f"{shown}: edges of depth and picture meet after a shift by {shift} columns: are both registered"
                    " to one camera?"
                )
        if record.rgb is not None and (record.depth is not None or record.label is not None) and turned(record.rgb):
            said.append(
                f"{record.rgb}: turned by the camera's orientation tag, while depth and labels are read as they stand"
            )
        return item, said

    def _exchanged(self, index: int, item: Item) -> str | None:
        """What is wrong with CARLA's depth whose red and blue are exchanged; None where they are not."""
        record = self.records[index]
        if record.depth is None or record.code.unit != "carla" or record.code.scale is not None:
            return None
        turned = decode(read_numbers(record.depth)[..., 2::-1], record.code, item.intrinsics, str(record.depth))
        if any(fatal for fatal, _ in complaints(look_at(turned, item.intrinsics), "")):
            return None
        return f"{record.depth}: red and blue are exchanged (written by OpenCV from RGB?): depth is right the other way round"


TOLD = 16
"""Labels that CARLA's version is told from."""


@functools.lru_cache(maxsize=32)
def _told(paths: tuple[Path, ...]) -> str:
    pictures = [palettes.one_channel(read_raw(path), "carla", str(path)) for path in paths]
    return palettes.recognize_carla(pictures, str(paths[0]))


def read_raw(path: Path, *, colors: bool = False) -> NDArray[Any]:
    """The numbers of a label as they stand.

    Args:
        path: the file.
        colors: take the colors of a picture with a palette (a PNG of indices), not its indices.

    Raises:
        UserError: it cannot be read.
    """
    return read_numbers(path) if path.suffix.lower() in {".npy", ".npz"} else stored_pixels(path, colors=colors)


@dataclasses.dataclass(frozen=True)
class RenderedScenes(Scenes):
    """Scenes that are held in memory.

    Attributes:
        arrays: rgb (N, H, W, 3), depth and label (N, H, W), intrinsics (N, 3, 3), pose (N, 2): height and pitch.
    """

    arrays: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)

    def picked(self, chosen: list[int]) -> "RenderedScenes":
        """Some of the scenes."""
        part = {name: a[chosen] for name, a in self.arrays.items()}
        return dataclasses.replace(self, records=tuple(self.records[i] for i in chosen), arrays=part)

    def has_label(self, index: int) -> bool:
        """All have one."""
        return True

    def item(self, index: int) -> Item:
        """Picture, depth and camera."""
        a = self.arrays
        return Item(a["rgb"][index], a["depth"][index], a["intrinsics"][index])

    def camera(self, index: int, size: tuple[int, int]) -> Calibration:
        """The camera."""
        return Calibration(self.arrays["intrinsics"][index])

    def label(self, index: int) -> NDArray[np.uint8]:
        """The label."""
        found: NDArray[np.uint8] = self.arrays["label"][index]
        return found

    def road(self, index: int) -> NDArray[np.float64]:
        """Homography from the road plane to pixels."""
        height, pitch = self.arrays["pose"][index]
        return level_homography(self.arrays["intrinsics"][index], float(height), float(pitch))


class Unlabeled:
    """Scenes whose labels cannot be read: what a training is given as its target.

    Args:
        scenes: the scenes.
    """

    def __init__(self, scenes: Scenes) -> None:
        self._scenes = scenes
        self.source, self.path = scenes.source, scenes.path

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        """Name of a scene."""
        return self._scenes.name(index)

    def item(self, index: int) -> Item:
        """Picture, depth and camera."""
        return self._scenes.item(index)

    def checked(self, index: int) -> tuple[Item, list[str]]:
        """A scene, and what is odd about it."""
        return self._scenes.checked(index)

    def label(self, index: int) -> NDArray[np.uint8]:
        """Nothing.

        Raises:
            AssertionError: always.
        """
        raise AssertionError("a label of the target was asked for in a training without target labels")
