"""Frames of a clip and their masks, at the model's size, one at a time; and the results at the clip's size."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tenfold import UserError
from visctrl.clips import Clip, FolderClip, VideoClip, open_clip, span_of
from visctrl.commands import _work
from visctrl.data import read_mask, read_mask_file, read_picture
from visctrl.engine import VisCtrl
from visctrl.masks import Mask, Picture
from visctrl.video import Frame

NOTHING = "no pixel of the subject"


class MaskedFrames:
    """A clip with the mask of each frame, as an engine takes them; it can be gone through any number of times.

    Args:
        clip: the frames.
        spec: masks, as the option.
        frames: which of the frames, as the option.

    Raises:
        UserError: masks of another number than the frames, without a name that a frame has, or alpha of a video.
    """

    def __init__(self, clip: Clip, spec: str | None, frames: str) -> None:
        self.clip, self.spec = clip, spec
        self.fixed: Mask | None = None
        self.masks: Clip | None = None
        if spec == "alpha" and isinstance(clip, VideoClip):
            raise UserError(
                "--target_mask alpha: a video has no transparency: give a folder or a video of masks, or white"
            )
        if spec is None or spec in {"alpha", "white"}:
            return
        path = Path(spec)
        if path.is_file() and not _is_clip(path):
            self.fixed = read_mask(spec, path, next(iter(clip)), "--target_mask")
            return
        if isinstance(clip, FolderClip) and path.is_dir():
            self.masks = FolderClip(path, option="--target_mask")
            there = {file.stem: file for file in self.masks.files}
            for name in clip.names:
                if name not in there:
                    raise UserError(f"--target_mask {spec}: no mask of frame {name}")
            self.masks.files = [there[name] for name in clip.names]
        else:
            self.masks = open_clip(path, span_of(frames), "--target_mask")
        if len(self.masks) != len(clip) or self.masks.size != clip.size:
            (h, w), (ch, cw) = self.masks.size, clip.size
            raise UserError(
                f"--target_mask {spec}: {len(self.masks)} masks of {w} x {h} pixels, expected {len(clip)} of {cw} x {ch}"
            )

    def __len__(self) -> int:
        return len(self.clip)

    def __iter__(self) -> Iterator[tuple[Picture, Mask | None]]:
        """Pictures with their masks.

        Raises:
            UserError: an empty mask; the message names the frame.
        """
        masks = None if self.masks is None else self._masks()
        for number, picture in enumerate(self.clip):
            name = f"--target_mask {self.spec}, frame {self.clip.names[number]}"
            if masks is not None:
                mask = next(masks)
                if not (mask >= 0.5).any():
                    raise UserError(f"{name}: {NOTHING} is in it: leave such frames out with --frames")
                yield picture, mask
            elif self.fixed is not None or self.spec is None:
                yield picture, self.fixed
            else:
                path = self.clip.files[number] if isinstance(self.clip, FolderClip) else self.clip.path
                yield picture, read_mask(self.spec, path, picture, f"{name}:")

    def _masks(self) -> Iterator[Mask]:
        """Masks of their own files, or of a video."""
        if isinstance(self.masks, FolderClip):
            yield from (read_mask_file(file, f"--target_mask {file}") for file in self.masks.files)
            return
        for picture in self.masks or []:
            yield picture.mean(axis=-1).astype(np.float32) / 255


class ModelFrames:
    """The same at the model's size, as tensors.

    Args:
        engine: the engine.
        frames: the frames.
        size: longest side, as the option.
        keep: how many of the latest frames are kept as they were.

    Attributes:
        latest: the latest frames by number.
    """

    def __init__(self, engine: VisCtrl, frames: MaskedFrames, size: int | None, keep: int) -> None:
        self.engine, self.frames, self.size, self.keep = engine, frames, size, keep
        self.latest: dict[int, _work.Prepared] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Frame]:
        self.latest.clear()
        for number, (picture, mask) in enumerate(self.frames):
            made = _work.fitted(self.engine, picture, mask, self.size, f"--target_mask {self.frames.spec}")
            self.latest[number] = made
            self.latest.pop(number - self.keep, None)
            yield Frame(made.image, made.image_mask)


def check_references(paths: list[str], mask: str | None) -> None:
    """Read references and their masks once, before anything long begins."""
    for path in paths:
        picture = read_picture(path)
        if mask is not None:
            read_mask(mask, Path(path), picture, "--reference_mask")


def _is_clip(path: Path) -> bool:
    return path.suffix.lower() in {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
