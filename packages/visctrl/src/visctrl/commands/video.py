"""`visctrl video`: the subject of reference pictures in every frame of a video or of a folder of frames.

Each frame appears as a picture, whole or not at all, as soon as it is done, so that a killed run goes on with the next one; the
video is put together from them at the end.
"""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tenfold import UserError, checkpoints
from tenfold.cli import Invocation
from tenfold.errors import needs
from tenfold.figures import image_grid
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import table, track
from visctrl import metrics
from visctrl.clips import Clip, VideoClip, open_clip, span_of, write_video
from visctrl.commands import _frames, _work
from visctrl.config import VideoSettings
from visctrl.data import load_model, read_picture, write_picture
from visctrl.engine import VisCtrl
from visctrl.masks import Picture, to_images
from visctrl.provenance import color_name
from visctrl.video import SharedPool, edit_video, key_positions, shared_pool

POOL, SHOWN = "keyframes.safetensors", 8
METHOD = "visctrl.keyframes"
NOTE = "edited with visctrl from {}"


def run(settings: VideoSettings, invocation: Invocation) -> None:
    """Edit the keyframes, then every frame; put the video together; measure flicker."""
    clip = _opened(settings)
    frames = _frames.MaskedFrames(clip, settings.target_mask, settings.frames)
    _frames.check_references(settings.reference, settings.reference_mask)
    folder, config = invocation.folder, settings.chosen
    engine = VisCtrl(load_model(settings), config)
    small = _frames.ModelFrames(engine, frames, settings.size, settings.batch)
    pool = _pool(engine, frames, small, settings, folder)
    _edit(engine, small, pool, settings, invocation)
    about = {"rounds": pool.config.rounds} | _finish(frames, settings, folder, config.max_residual)
    folder.write_json("video.json", about | {"verdict": pool.verdict})
    captions = {"frames": "Frames of the input, and what became of them."}
    write_report(folder, "visctrl video", captions)
    sys.stdout.write(table(["video", "value"], [[name.replace("_", " "), x] for name, x in about.items()]) + "\n")
    if pool.verdict:
        sys.stdout.write(f"all frames make {pool.config.rounds} of {config.rounds} rounds: {pool.verdict}\n")
    sys.stdout.write(f"{folder.path / 'grid.png'}\n")


def _opened(settings: VideoSettings) -> Clip:
    """The clip, after what can be refused before a model is loaded was refused."""
    if settings.rate is not None:
        needs("av", "video", "visctrl")
    clip = open_clip(settings.target, span_of(settings.frames))
    if isinstance(clip, VideoClip):
        if settings.rate is not None:
            raise UserError(f"--rate is for folders of frames: {settings.target} has times of its own")
        if settings.sound:
            clip.check_sound()
    return clip


def _note(settings: VideoSettings) -> str:
    return NOTE.format(", ".join(Path(path).name for path in settings.reference))


def _pool(
    engine: VisCtrl, frames: _frames.MaskedFrames, small: _frames.ModelFrames, settings: VideoSettings, folder: Run
) -> SharedPool:
    """What all frames attend to; keyframes that an interrupted run has made are taken as they are."""
    references = []
    for path in settings.reference:
        shown = _work.prepare(
            engine, Path(path), settings.reference_mask, settings.size, crop=False, option="--reference_mask"
        )
        references.append(_work.reference_of(engine, shown, settings.reference_prompt))
    told = engine.conditions(settings.target_prompt, settings.negative_prompt)
    given: dict[str, Any] = {"keyframes": settings.keyframes, "alpha": settings.alpha, "conditions": told}
    if folder.resumed and (folder.path / POOL).is_file():
        found = checkpoints.load(folder.path / POOL, method=METHOD)
        latents = found.tensors["latents"].to(engine.adapter.device)
        pool = shared_pool(engine, small, references, latents=latents, rounds=int(found.config["rounds"]), **given)
        return SharedPool(pool.references, pool.config, pool.latents, str(found.config["verdict"]))
    with _work.named(f"--target {settings.target}", "fewer --keyframes"):
        pool = shared_pool(engine, small, references, **given)
    _write_keyframes(engine, frames, pool, settings, folder)
    about = {"rounds": pool.config.rounds, "verdict": pool.verdict}
    checkpoints.save(folder.own(POOL), {"latents": pool.latents.cpu()}, method=METHOD, config=about)
    return pool


def _write_keyframes(
    engine: VisCtrl, frames: _frames.MaskedFrames, pool: SharedPool, settings: VideoSettings, folder: Run
) -> None:
    """Write each keyframe after each of its rounds, and where its parts came from."""
    edits = dict(zip(key_positions(len(frames), settings.keyframes), pool.edits, strict=True))
    for number, (picture, mask) in enumerate(frames):
        if number not in edits:
            continue
        out, name = edits[number], frames.clip.names[number]
        made = _work.fitted(engine, picture, mask, settings.size, "--target_mask")
        rounds = {f"{name}-round_{i + 1}": x for i, x in enumerate(out.history or [])}
        for title, images in rounds.items():
            done = _work.finished_picture(images, made, settings.feather, settings.chosen.lock)
            with folder.replacing(f"history/{title}.png") as temporary:
                write_picture(temporary, done, _note(settings))
        names = [f"{j + 1} {color_name(j)} ({Path(x).name})" for j, x in enumerate(settings.reference)]
        shown = {"provenance": (out.provenance, _work.PLACES)}
        shown["references"] = (out.read_from, f"colors: references, {', '.join(names)}")
        for title, (pictures, note) in shown.items():
            for picture in pictures or []:
                with folder.replacing(f"history/{name}-{title}.png") as temporary:
                    write_picture(temporary, _work.enlarged(picture), note)


def _edit(
    engine: VisCtrl, small: _frames.ModelFrames, pool: SharedPool, settings: VideoSettings, invocation: Invocation
) -> None:
    """Edit and write all frames that are not there yet."""
    folder, names = invocation.folder, small.frames.clip.names
    told = engine.conditions(settings.target_prompt, settings.negative_prompt)
    done = {i for i, name in enumerate(names) if folder.resumed and (folder.path / f"frames/{name}.png").is_file()}
    results = edit_video(engine, small, [], conditions=told, batch=settings.batch, pool=pool, done=done.__contains__)
    locked = settings.chosen.lock
    with _work.named(f"--target {settings.target}", "a smaller --batch, fewer --keyframes"):
        for found in track(results, "frames", total=len(names) - len(done), quiet=invocation.quiet):
            target = small.latest[found.number]
            picture = _work.finished_picture(found.image, target, settings.feather, locked)
            with folder.replacing(f"frames/{names[found.number]}.png") as temporary:
                write_picture(temporary, picture, _note(settings), Residual=f"{found.residual:.6g}")


def _finish(frames: _frames.MaskedFrames, settings: VideoSettings, folder: Run, limit: float) -> dict[str, Any]:
    """Put the video together, draw a few frames, and measure, in one pass over input and results."""
    clip, shown = frames.clip, key_positions(len(frames), SHOWN)
    kept: list[list[Picture]] = []
    residuals: list[float] = []
    beyond: list[float] = []
    own: list[float] = []

    def results() -> Iterator[Picture]:
        before: tuple[torch.Tensor, torch.Tensor] | None = None
        for number, picture in enumerate(clip):
            path = folder.path / f"frames/{clip.names[number]}.png"
            with Image.open(path) as file:
                residuals.append(float(file.text["Residual"]))  # type: ignore[attr-defined]  # a PNG of ours
            edited = read_picture(path)
            now = to_images([picture]), to_images([edited])
            if before is not None:
                beyond.append(float(metrics.flicker(torch.cat([before[1], now[1]]), torch.cat([before[0], now[0]]))))
                own.append(float((now[0] - before[0]).abs().mean()))
            before = now
            if number in shown:
                kept.append([picture, edited])
            yield edited

    if isinstance(clip, VideoClip) or settings.rate is not None:
        rate = None if settings.rate is None else Fraction(settings.rate).limit_denominator(100_000)
        with folder.replacing("video.mp4") as temporary:
            write_video(temporary, results(), clip, rate=rate, sound=settings.sound, note=_note(settings))
    else:
        for _ in results():
            pass
    columns = [clip.names[number] for number in shown]
    for place in (folder.own("grid.png"), folder.figure("frames")):
        image_grid(
            place, [list(row) for row in zip(*kept, strict=True)], column_titles=columns, row_titles=["input", "edited"]
        )
    return {
        "frames": len(clip),
        "flicker": float(np.mean(beyond)) if beyond else 0.0,
        "change_of_the_input": float(np.mean(own)) if own else 0.0,
        "residual": max(residuals),
        "frames_whose_inversion_did_not_converge": sum(x > limit for x in residuals),
    }
