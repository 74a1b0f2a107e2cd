"""The demonstration's worlds and settings: scenes are rendered once and kept in the run folder, for all processes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from freespace_uda.commands._arms import measure
from freespace_uda.config import Alignment, Arm, General, Optimizer, RunSettings, SceneReading
from freespace_uda.data import FIRST, of_arrays, render_arrays
from freespace_uda.scenes import RenderedScenes
from freespace_uda.world import RoadWorld
from tenfold.claims import Measured
from tenfold.files import made_once, replacing

DATA = (
    "rendered: roads by ray casting with exact depth and labels, no real pictures; asphalt and "
    "sidewalk swap colors on the target"
)
TARGET = "roads-real"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much a level has: scenes for training (of each domain) and for testing, steps, and width and height."""

    train: int
    test: int
    steps: int
    pixels: tuple[int, int] = (160, 64)


SIZES = {"quick": Size(8, 4, 4, (96, 32)), "default": Size(60, 40, 200), "full": Size(60, 40, 200)}


def settings_of(level: str, source: str = "roads-flat", world_seed: int = 0) -> RunSettings:
    """Settings of every arm at a level; weights as studies/tuning.py found them on world seeds 100 and 101."""
    size = SIZES[level]
    reading = SceneReading(scenes=size.train, size=size.pixels, world_seed=world_seed)
    return RunSettings(
        data=source,
        target=TARGET,
        rgb_encoder="freespace:small",
        width=32,
        size=size.pixels,
        steps=size.steps,
        batch_size=6,
        watched=18,
        log_every=25,
        device="cpu",
        reading=reading,
        target_reading=reading,
        align=Alignment(weight=1e-2, tau=0.8, min_pixels=16, hidden=32),
        general=General(width=16, minent=1e-2, advent=1e-1, adaptsegnet=1e-1, fada=1.0, self_training=3.0),
        optimizer=Optimizer(kind="adam", lr=2e-3, head=1.0, weight_decay=1e-4, discriminator=1e-3, ema=0.98),
    )


ALL_WEIGHT = 1.0
"""Weight of the adversarial loss where everything is aligned, found like those of `settings_of` by studies/tuning.py."""


def tuned(settings: RunSettings, arm: Arm) -> RunSettings:
    """Settings with the weight of an arm whose mask asks for another one."""
    if arm != "ccg-sfa-all":
        return settings
    return dataclasses.replace(settings, align=dataclasses.replace(settings.align, weight=ALL_WEIGHT))


def world_file(folder: Path, domain: str, part: str, seed: int) -> Path:
    """Where the scenes of a domain and part lie."""
    return folder / f"worlds/{domain}-{part}-{seed}.npz"


def scenes_of(folder: Path, level: str, domain: str, part: str, seed: int) -> RenderedScenes:
    """Scenes of a domain and part, rendered by the first process that needs them."""
    size = SIZES[level]
    path = world_file(folder, domain, part, seed)
    count = size.train if part == "train" else size.test

    def make() -> None:
        first = FIRST[part]
        arrays = render_arrays(RoadWorld(domain, size.pixels, seed, first + count), range(first, first + count))
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    made_once(path, make)
    with np.load(path, allow_pickle=False) as file:
        arrays: dict[str, Any] = dict(file)
    return of_arrays(domain, arrays, part)


def measure_arm(folder: str, level: str, source: str, arm: Arm, seed: int) -> Measured:
    """One arm on one seed of the world."""
    where = Path(folder)
    parts = [
        scenes_of(where, level, domain, part, seed)
        for domain, part in ((source, "train"), (TARGET, "train"), (TARGET, "test"))
    ]
    settings = tuned(settings_of(level, source, seed), arm)
    return measure(settings, arm, seed, *parts, course=arm == "ccg-sfa")
