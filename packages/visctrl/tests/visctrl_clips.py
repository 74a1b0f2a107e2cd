"""Videos made with PyAV: a square that moves over a gradient, with sound, tags and odd sizes where asked for."""

import contextlib
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(number, size=(24, 32)):
    """Frame of a video (H, W, 3): its square is further to the right in each."""
    h, w = size
    x = np.zeros((h, w, 3), np.uint8)
    x[..., 1] = np.linspace(40, 200, w).astype(np.uint8)
    x[..., 2] = np.linspace(40, 200, h).astype(np.uint8)[:, None]
    left = 2 + number * (w - 12) // 40
    x[6:14, left : left + 8] = (220, 60, 40)
    return x


def write(
    path,
    count=40,
    size=(24, 32),
    *,
    sound=None,
    times=None,
    container=None,
    codec="libx264",
    transfer=1,
    space=1,
    x264="",
    **options,
):
    """A video; the times are in thousandths of a second."""
    h, w = size
    odd = bool(h % 2 or w % 2)
    with av.open(str(path), "w", format=container, options=options) as out:
        stream = out.add_stream(
            codec, rate=25, options={"crf": "12", "x264-params": x264} if codec == "libx264" else {}
        )
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv444p" if odd else "yuv420p"
        c = stream.codec_context
        c.time_base = Fraction(1, 1000)
        c.colorspace, c.color_primaries, c.color_range = space, 1, 1
        c.color_trc = transfer
        voice = None if sound is None else out.add_stream(sound, rate=8000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, size), "rgb24")
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace="ITU709", dst_color_range=1)
            frame.pts, frame.time_base = (times or range(0, 40 * count, 40))[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        if voice is not None:
            _tone(out, voice, count / 25)
    return Path(path)


def _tone(out, voice, seconds):
    wave = (8000 * np.sin(2 * np.pi * 440 * np.arange(int(8000 * seconds)) / 8000)).astype(np.int16)
    resampler = av.AudioResampler(format=voice.codec_context.format or "fltp", layout="mono", rate=8000)
    for at in range(0, len(wave), 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, at : at + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, at, Fraction(1, 8000)
        for part in resampler.resample(frame):
            out.mux(voice.encode(part))
    out.mux(voice.encode(None))


def joined(path, *parts):
    """The streams of several files in one."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(av.open(str(path), "w"))
        sources = [stack.enter_context(av.open(str(part))) for part in parts]
        streams = [out.add_stream_from_template(source.streams[0]) for source in sources]
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux():
                if packet.size and packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)


def turn(path):
    """Set the matrix of an mp4's track to a quarter turn clockwise, as phones do that are held upright."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))


def read(path):
    """Frames and their times in seconds."""
    with av.open(str(path)) as file:
        frames = [
            (frame.to_ndarray(format="rgb24"), float(frame.pts * frame.time_base)) for frame in file.decode(video=0)
        ]
    return [x for x, _ in frames], [t for _, t in frames]


def sound(path):
    """Bytes of the packets of sound, or None."""
    with av.open(str(path)) as file:
        return [bytes(p) for p in file.demux(audio=0) if p.size] if file.streams.audio else None
