"""The demonstration's video: blobs that move, three references of one object, frames edited together and each by itself."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tenfold.claims import Study
from tenfold.figures import image_grid
from tenfold.randomness import generator
from visctrl import metrics
from visctrl.blobs import Film, render_film
from visctrl.config import VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.masks import to_pictures
from visctrl.video import edit_video

FRAMES, REFERENCES, FILMS = 8, 3, 4
CONFIG = VisCtrlConfig(steps=10, start=0.8, layers="0:", rounds=2, refine=3, guard=False, max_bank="64MB")
SHARED, ALONE = "video, one pool", "video, a random reference per frame"
ARMS = (SHARED, "video, the references without keyframes", ALONE)


def films(seed: int) -> list[Film]:
    """The videos of a seed."""
    return [render_film(FRAMES, REFERENCES, 1000 * seed + number) for number in range(FILMS)]


def edited(engine: VisCtrl, film: Film, arm: str, key: Sequence[int]) -> Tensor:
    """The frames of a video under one arm, as they would be shown. Shapes: -> (FRAMES, 3, 32, 32)."""
    engine.config = CONFIG
    frames = [x[None] for x in film.frames.images]
    references = [engine.reference(x[None]) for x in film.references.images]
    if arm == ALONE:
        drawn = torch.randint(REFERENCES, (FRAMES,), generator=generator(*key)).tolist()
        found = [engine.edit(x, references[j]).images for x, j in zip(frames, drawn, strict=True)]
    else:
        alpha = 0.5 if arm == SHARED else 1.0
        found = [x.image for x in edit_video(engine, frames, references, keyframes=2, alpha=alpha)]
    return torch.cat(found).float().clamp(-1, 1)


def measure(engine: VisCtrl, seed: int) -> dict[str, dict[str, float]]:
    """Flicker, transfer and distance to the ideal of each arm, means over the videos."""
    own, found = engine.config, {}
    for arm in ARMS:
        rows = []
        for number, film in enumerate(films(seed)):
            x = edited(engine, film, arm, (seed, 4, number))
            target = film.frames
            rows.append(
                [
                    float(metrics.flicker(x, target.images).mean()),
                    float(metrics.transfer(x, target.images, film.ideal, target.masks).median()),
                    float(metrics.rmse(x, film.ideal).mean()),
                    float(metrics.overlap(x, target.masks).mean()),
                ]
            )
        names = ("flicker", "transfer", "rmse to ideal", "overlap")
        found[arm] = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    engine.config = own
    return found


def decide(study: Study) -> None:
    """Claim that frames from one pool flicker no more than frames with a reference of their own."""
    study.ratio(
        "video_flicker",
        "video: flicker, frames from one pool / a random reference per frame",
        (SHARED, "flicker"),
        (ALONE, "flicker"),
        required="<= 1",
    )


def draw(study: Study, engine: VisCtrl) -> None:
    """Draw the first video of the first seed under two arms."""
    seed = study.seeds[0]
    film = films(seed)[0]
    rows = {
        "input": film.frames.images,
        "one pool": edited(engine, film, SHARED, (seed, 4, 0)),
        "a random\nreference": edited(engine, film, ALONE, (seed, 4, 0)),
        "ideal": film.ideal,
        "references": film.references.images,
    }
    image_grid(
        study.run.figure("video"), [to_pictures(x, 32, 32) for x in rows.values()], row_titles=list(rows), cell=0.9
    )
