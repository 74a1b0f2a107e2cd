"""Frames of a video or of a folder, decoded as they come, and frames back into a video with its sound and its times.

A clip can be gone through any number of times and holds one frame at once. Pictures are arrays (H, W, 3) uint8.
"""

import io
import re
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tenfold import UserError
from tenfold.errors import needs
from tenfold.readers import read_image
from visctrl.masks import Picture

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
UNTOLD = 2
"""Color space of frames that do not name theirs."""
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions that 8-bit colors cannot hold."""


def span_of(text: str, option: str = "--frames") -> slice:
    """The frames that ``A:B``, ``A:`` or ``:B`` names, counted from 0.

    Raises:
        UserError: another form, or no frame.
    """
    match = re.fullmatch(r"(\d*):(\d*)", text.strip())
    if match is None:
        raise UserError(f"{option}: expected FIRST:END such as 0:40, got '{text}'")
    first, end = (int(x) if x else None for x in match.groups())
    if end is not None and end <= (first or 0):
        raise UserError(f"{option}: no frame in '{text}'")
    return slice(first or 0, end)


class FolderClip:
    """The pictures of a folder, in the order of the numbers in their names.

    Args:
        path: the folder.
        span: which of the frames.
        option: option, for messages.

    Raises:
        UserError: no pictures, pictures of different sizes or with the same name, or HEIC among them.
    """

    rate: Fraction | None = None

    def __init__(self, path: Path, span: slice = slice(None), option: str = "--target") -> None:
        files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        for p in files:
            if p.suffix.lower() in {".heic", ".heif"}:
                raise UserError(f"{option} {p}: HEIC pictures of phones are not read here: convert them first")
        found = sorted((p for p in files if p.suffix.lower() in PICTURES), key=lambda p: _by_number(p.name))
        self.files = found[span]
        if not self.files:
            raise UserError(f"{option} {path}: no pictures in it" if not found else f"{option} {path}: no such frames")
        if len({p.stem for p in self.files}) != len(self.files):
            raise UserError(f"{option} {path}: two pictures have the same name but for its ending")
        self.path, self.option = path, option
        self.size = read_image(self.files[0]).shape[:2]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Picture]:
        for file in self.files:
            picture = read_image(file)
            if picture.shape[:2] != self.size:
                (h, w), (first_h, first_w) = picture.shape[:2], self.size
                raise UserError(
                    f"{self.option} {file}: {w} x {h} pixels, the first frame has {first_w} x {first_h}: all frames have"
                    " one size"
                )
            yield picture

    @property
    def names(self) -> list[str]:
        """Names of the frames, without their endings."""
        return [file.stem for file in self.files]


class VideoClip:
    """The frames of a video file, upright by its rotation tag.

    The file is decoded once to count its frames and to note their times.

    Args:
        path: the file.
        span: which of the frames.
        option: option, for messages.

    Attributes:
        times: time of each frame, in units of ``time_base`` seconds.
        rate: average number of frames per second.
        aspect: width of a pixel over its height.

    Raises:
        UserError: no video, one that ends early or changes its size, a tilted or an interlaced one, or one in HDR.
    """

    def __init__(self, path: Path, span: slice = slice(None), option: str = "--target") -> None:
        needs("av", "video", "visctrl")
        self.path, self.span, self.option = path, span, option
        times: list[int] = []
        timed, combed = True, False
        sizes: set[tuple[int, int]] = set()
        why, self.rotation = "", 0
        with self.opened() as container:
            stream = _picture_stream(container, f"{option} {path}")
            self.time_base = Fraction(stream.time_base)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self.aspect = Fraction(stream.codec_context.sample_aspect_ratio or 1)
            declared = int(stream.frames) if "mp4" in container.format.name else 0  # others write what they expected
            try:
                for frame in container.decode(stream):
                    self.rotation = round(frame.rotation)
                    combed = combed or bool(frame.interlaced_frame)
                    sizes.add((frame.height, frame.width))
                    timed = timed and frame.pts is not None
                    times.append(int(frame.pts or 0))
            except _errors() as error:
                why = f" ({_reason(error)})"
            transfer = int(stream.codec_context.color_trc)
            titles = len(container.streams.subtitles)
        if not times:
            raise UserError(f"{option} {path}: no frame can be decoded{why}")
        if not timed:
            times, self.time_base = list(range(len(times))), 1 / self.rate
        early = bool(why) or (declared > len(times) and self._packets() < declared)
        if early and (span.stop is None or span.stop > len(times)):
            of = f" of {declared}" if declared > len(times) else ""
            raise UserError(
                f"{option} {path} ends early: {len(times)}{of} frames can be decoded{why}: give --frames :{len(times)} to"
                " edit these"
            )
        if len(sizes) > 1:
            raise UserError(f"{option} {path}: frames of different sizes: {sorted((w, h) for h, w in sizes)}")
        if self.rotation % 90:
            raise UserError(f"{option} {path}: turned by {self.rotation} degrees: expected a multiple of 90")
        if combed:
            raise UserError(
                f"{option} {path}: its frames are interlaced, two moments in each: deinterlace it first (ffmpeg -vf yadif)"
            )
        if titles:
            warnings.warn(f"{path}: {titles} tracks of subtitles are not written", stacklevel=3)
        if transfer in HDR:
            raise UserError(
                f"{option} {path}: its colors are HDR ({HDR[transfer]}), which 8 bits cannot hold: convert it to SDR first"
            )
        if any(b <= a for a, b in pairwise(times)):
            raise UserError(
                f"{option} {path}: the times of its frames do not increase: write it anew with ffmpeg first"
            )
        self.times, self.whole = times[span], len(times[span]) == len(times)
        self.end = None if span.stop is None or span.stop >= len(times) else times[span.stop]
        if not self.times:
            raise UserError(f"{option} {path}: it has {len(times)} frames, none of them in --frames")
        h, w = sizes.pop()
        self.turned = bool(self.rotation // 90 % 2)
        self.size = (w, h) if self.turned else (h, w)

    def opened(self, **options: str) -> Any:
        """The file as an open container of PyAV.

        Raises:
            UserError: it is no video.
        """
        import av

        try:
            return av.open(str(self.path), options=options)
        except _errors() as error:
            raise UserError(f"{self.option} {self.path}: not a video that can be opened ({_reason(error)})") from error

    def _packets(self) -> int:
        """Packets that are there, also those which an edit list leaves out."""
        with self.opened(advanced_editlist="0") as container:
            return sum(bool(packet.size) for packet in container.demux(_picture_stream(container, str(self.path))))

    def __len__(self) -> int:
        return len(self.times)

    def __iter__(self) -> Iterator[Picture]:
        first = self.span.start or 0
        with self.opened() as container:
            frames = container.decode(_picture_stream(container, str(self.path)))
            for frame in islice(frames, first, first + len(self.times)):
                # without a tag players take BT.709 for what is larger than a television of old
                large = frame.colorspace == UNTOLD and (frame.width >= 1280 or frame.height > 576)
                spaces = {"src_colorspace": "ITU709"} if frame.colorspace == 1 or large else {}
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", **spaces), self.rotation // 90))

    @property
    def names(self) -> list[str]:
        """Numbers of the frames."""
        first = self.span.start or 0
        return [f"{number:06}" for number in range(first, first + len(self.times))]

    def sound(self, container: Any) -> list[Any]:
        """The streams of sound of the opened file, that an mp4 can hold as they are.

        Raises:
            UserError: it cannot hold one of them; the message names its format.
        """
        import av

        found = list(container.streams.audio)
        for stream in found:
            try:
                with av.open(io.BytesIO(), "w", format="mp4") as trial:
                    trial.add_stream_from_template(stream)
                    trial.start_encoding()
            except _errors(ValueError) as error:
                raise UserError(
                    f"{self.option} {self.path}: its sound ({stream.codec_context.name}) cannot be copied into an mp4:"
                    " give --sound false"
                ) from error
        return found

    def check_sound(self) -> None:
        """Make sure that the sound can be copied, before long work.

        Raises:
            UserError: see ``sound``.
        """
        with self.opened() as container:
            self.sound(container)


Clip = FolderClip | VideoClip


def open_clip(path: str | Path, span: slice = slice(None), option: str = "--target") -> Clip:
    """The frames of a folder or of a video file.

    Raises:
        UserError: no such path, or see ``FolderClip`` and ``VideoClip``.
    """
    path = Path(path)
    if path.is_dir():
        return FolderClip(path, span, option)
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file or folder")
    if path.suffix.lower() in PICTURES:
        raise UserError(
            f"{option} {path} is one picture: expected a video or a folder of frames (or use `visctrl edit`)"
        )
    return VideoClip(path, span, option)


def write_video(
    path: Path,
    frames: Iterable[Picture],
    clip: Clip,
    *,
    rate: Fraction | None = None,
    sound: bool = True,
    note: str = "",
) -> None:
    """Write frames as an mp4 (H.264), each at the time of its original, with the original's sound as it is.

    Sides of an odd number of pixels are kept, with full chroma (4:4:4) in place of halved.

    Args:
        path: the file.
        frames: as many as the clip has, of its size.
        clip: where they came from.
        rate: frames per second, for a folder.
        sound: copy the sound.
        note: put into the file's comment.
    """
    import av

    video = clip if isinstance(clip, VideoClip) else None
    steps = rate or clip.rate or Fraction(25)
    base = video.time_base if video else 1 / steps
    times = video.times if video else range(len(clip))
    start = times[0] if video is not None and not video.whole else 0
    h, w = clip.size
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        out.metadata["comment"] = note
        stream: Any = out.add_stream("libx264", rate=steps, options={"crf": "16"})
        stream.width, stream.height = w, h
        stream.pix_fmt = "yuv444p" if h % 2 or w % 2 else "yuv420p"
        context = stream.codec_context
        context.time_base = base
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1  # BT.709, limited
        if video is not None and video.aspect != 1:
            context.sample_aspect_ratio = 1 / video.aspect if video.turned else video.aspect
        source = video.opened() if video is not None and sound else None
        packets = _Sound(out, source, video, start * base) if source is not None and video is not None else None
        try:
            for picture, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range=1)
                frame.pts, frame.time_base = time - start, base
                out.mux(stream.encode(frame))
                if packets is not None:
                    packets.until((time - start) * base)
            out.mux(stream.encode())
            if packets is not None:
                packets.until(None)
        finally:
            if source is not None:
                source.close()


class _Sound:
    """Copies packets of sound in step with the pictures."""

    def __init__(self, out: Any, source: Any, clip: VideoClip, start: Fraction) -> None:
        self.out, self.start = out, start
        self.end = None if clip.end is None else clip.end * clip.time_base - start
        streams = clip.sound(source)
        self.streams = {stream.index: out.add_stream_from_template(stream) for stream in streams}
        self.packets = source.demux(streams) if streams else iter(())
        self.waiting: Any = None

    def until(self, time: Fraction | None) -> None:
        """Copy all packets up to a time; None: the rest."""
        while True:
            packet = self.waiting if self.waiting is not None else next(self.packets, None)
            if packet is None:
                return
            self.waiting = None
            if packet.dts is None or packet.pts is None:
                continue
            base = Fraction(packet.time_base)
            now = packet.pts * base - self.start
            if (self.start and now < 0) or (self.end is not None and now >= self.end):
                continue
            if time is not None and now > time:
                self.waiting = packet
                return
            shift = round(self.start / base)
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self.streams[packet.stream.index]
            self.out.mux(packet)


def _picture_stream(container: Any, shown: str) -> Any:
    streams = [s for s in container.streams.video if "attached_pic" not in str(s.disposition).lower()]
    if not streams:
        raise UserError(f"{shown}: no pictures in it, only {', '.join(s.type for s in container.streams) or 'nothing'}")
    return streams[0]


def _errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError, OSError, *more)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _by_number(name: str) -> list[tuple[int, int | str]]:
    """A key that puts frame_2 before frame_10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part]
