"""One subject in all frames of a video: keyframes first, then every frame from one bank that all of them share.

A frame that is edited by itself, or with a reference of its own, differs from its neighbors in what it took: it flickers. Here
all frames attend to the same features, those of the references and of a few keyframes that were edited with them, and go
through equally many rounds. Frames are taken as they come: what is kept are the references, the keyframes and one batch.

Shapes: frames (1, 3, H, W) in [-1, 1].
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from visctrl.config import VisCtrlConfig
from visctrl.engine import Reference, VisCtrl
from visctrl.families import Conditions
from visctrl.outcome import EditOutput


@dataclass(frozen=True)
class Frame:
    """A frame to edit.

    Attributes:
        image: (1, 3, H, W) in [-1, 1].
        mask: where its subject is, (H, W), or None.
    """

    image: Tensor
    mask: Tensor | None = None


@runtime_checkable
class Frames(Protocol):
    """Frames that can be counted and gone through several times, such as a list, or a reader that decodes as it goes."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Frame | Tensor]: ...


@dataclass(frozen=True)
class SharedPool:
    """What all frames attend to.

    Attributes:
        references: the references and the edited keyframes, with their weights.
        config: settings of every frame: as many rounds as all keyframes came through, and no guard of its own.
        latents: latents of the edited keyframes, (K, C, h, w).
        verdict: why the keyframes made fewer rounds than were asked for, or empty.
        edits: the edits of the keyframes, with rounds and provenance; empty where they were there already.
    """

    references: Sequence[Reference]
    config: VisCtrlConfig
    latents: Tensor
    verdict: str = ""
    edits: Sequence[EditOutput] = ()


@dataclass(frozen=True)
class EditedFrame:
    """One result.

    Attributes:
        number: number of the frame.
        image: the edited frame.
        residual: the largest residual of the inversions that its rounds began with.
        rows: pictures that went through the network for it.
    """

    number: int
    image: Tensor
    residual: float
    rows: int


def key_positions(count: int, keyframes: int) -> list[int]:
    """Numbers of the keyframes: the middles of equal parts of the video, each once.

    Raises:
        ValueError: no frames, or no keyframes.
    """
    if count < 1 or keyframes < 1:
        raise ValueError(f"a video has one frame or more and as many keyframes, got {count} and {keyframes}")
    parts = min(count, keyframes)
    return [(2 * k + 1) * count // (2 * parts) for k in range(parts)]


def shared_pool(
    engine: VisCtrl,
    frames: Frames,
    references: Reference | Sequence[Reference],
    *,
    keyframes: int = 3,
    alpha: float = 0.5,
    conditions: Conditions | None = None,
    latents: Tensor | None = None,
    rounds: int | None = None,
) -> SharedPool:
    """Edit the keyframes with the references alone, and put both into one pool.

    Args:
        engine: the engine, whose settings hold.
        frames: all frames; only the keyframes are kept.
        references: the references.
        keyframes: number of keyframes.
        alpha: share of the references' keys before attention weighs them; the rest is the keyframes'. With 1 the keyframes
            only say how many rounds all frames make.
        conditions: what the network is told, from ``VisCtrl.conditions``; default: no prompt.
        latents: the edited keyframes, where they are there already.
        rounds: the rounds that these came through.

    Raises:
        ValueError: no references, frames that can be gone through only once, or an alpha outside of (0, 1].
        UserError: see ``VisCtrl.edit``.
    """
    own = [references] if isinstance(references, Reference) else list(references)
    if not own:
        raise ValueError("a video needs at least one reference")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if not isinstance(frames, Frames) or isinstance(frames, Tensor):
        raise ValueError("frames must have a length and be gone through twice: give a list, or a reader such as a clip")
    told = conditions or engine.conditions()
    positions = key_positions(len(frames), keyframes)
    chosen = [_frame(x) for number, x in enumerate(frames) if number in positions]
    verdict, outs = "", []
    if latents is None or rounds is None:
        outs = [engine.edit(x.image, own, mask=x.mask, conditions=told, history=True, provenance=True) for x in chosen]
        rounds = max(1, min(out.rounds[0] for out in outs if out.rounds))
        verdict = next((v for out in outs if (v := (out.verdicts or [""])[0])), "")
        latents = torch.cat([_clean(engine, out, x) for out, x in zip(outs, chosen, strict=True)])
    size = (chosen[0].image.shape[-2], chosen[0].image.shape[-1])
    keys = [Reference(z[None], told, x.mask, size) for z, x in zip(latents, chosen, strict=True)]
    pool = own
    if alpha < 1:
        shares = [(own, alpha), (keys, 1 - alpha)]
        pool = [dataclasses.replace(r, log_weight=math.log(a / len(part))) for part, a in shares for r in part]
    return SharedPool(pool, dataclasses.replace(engine.config, rounds=rounds, guard=False), latents, verdict, outs)


def edit_video(
    engine: VisCtrl,
    frames: Frames,
    references: Reference | Sequence[Reference],
    *,
    keyframes: int = 3,
    alpha: float = 0.5,
    prompt: str = "",
    negative_prompt: str = "",
    conditions: Conditions | None = None,
    batch: int = 1,
    pool: SharedPool | None = None,
    done: Callable[[int], bool] | None = None,
) -> Iterator[EditedFrame]:
    """Edit all frames of a video, as they come.

    Args:
        engine: the engine, whose settings hold.
        frames: all frames, of one size.
        references: the references; not looked at where there is a pool.
        keyframes: as for ``shared_pool``.
        alpha: as for ``shared_pool``.
        prompt: what the result shows.
        negative_prompt: what it does not.
        conditions: in place of the prompts.
        batch: frames that go through the network at once.
        pool: what ``shared_pool`` made.
        done: which frames are there already; a batch whose frames all are is left out.

    Yields:
        The frames in their order.

    Raises:
        ValueError: see ``shared_pool``; a batch of less than one.
        UserError: see ``VisCtrl.edit``.

    Source: Li et al., arXiv 2406.06258, name video as a use; how frames share features is our choice.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    told = conditions or engine.conditions(prompt, negative_prompt)
    pool = pool or shared_pool(engine, frames, references, keyframes=keyframes, alpha=alpha, conditions=told)
    for first, some in _batches(frames, batch):
        numbers = range(first, first + len(some))
        if done is not None and all(map(done, numbers)):
            continue
        image = torch.cat([x.image for x in some])
        masks = [x.mask for x in some if x.mask is not None]
        with _under(engine, pool.config):
            out = engine.edit(image, pool.references, mask=torch.stack(masks) if masks else None, conditions=told)
        residuals = torch.tensor(out.residuals or [[0.0] * len(some)]).nan_to_num().amax(dim=0)
        for n, number in enumerate(numbers):
            yield EditedFrame(number, out.images[n : n + 1], float(residuals[n]), out.rows // len(some))
        del some, image, out


@contextlib.contextmanager
def _under(engine: VisCtrl, config: VisCtrlConfig) -> Iterator[None]:
    """Within the block, the engine has other settings."""
    before, engine.config = engine.config, config
    try:
        yield
    finally:
        engine.config = before


def _frame(x: Frame | Tensor) -> Frame:
    return x if isinstance(x, Frame) else Frame(x if x.ndim == 4 else x[None])


def _batches(frames: Iterable[Frame | Tensor], size: int) -> Iterator[tuple[int, list[Frame]]]:
    """Frames in lists of ``size``, each with the number of its first."""
    some: list[Frame] = []
    number = 0
    for x in frames:
        some.append(_frame(x))
        del x
        number += 1
        if len(some) == size:
            yield number - size, some
            some = []
    if some:
        yield number - len(some), some


def _clean(engine: VisCtrl, out: EditOutput, frame: Frame) -> Tensor:
    """Latents of an edited keyframe.

    Where the pipeline's safety checker has blanked it, the original takes its place: a black picture is no reference.
    """
    return engine.encode(frame.image).float() if out.unsafe and out.unsafe[0] else out.latents
