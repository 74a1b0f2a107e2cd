"""The demonstration's rendered people and their aligner, made once per seed and shared by processes through the run folder."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from handmstn.aligner import MultiSpatialTransformer
from handmstn.config import (
    AlignerSettings,
    CompareSettings,
    DemoSettings,
    HandReading,
    LossSettings,
    Optimizer,
    RecognizerSettings,
)
from handmstn.models import build_aligner
from handmstn.records import Hands, hands_of
from handmstn.rendering import Domain, SyntheticHands
from handmstn.training import train_aligner
from tenfold import checkpoints
from tenfold.files import made_once, replacing

METHOD = "handmstn.aligner"
DATA = "rendered: invented people's hands, turned by any angle, partly covered; no picture is of a person"


def settings_of(demo: DemoSettings, network: str = "hand:cnn4") -> CompareSettings:
    """The settings of every arm; only what it looks at and its losses differ."""
    sizes = demo.sizes
    people, views = pair(sizes.batch)
    return CompareSettings(
        data="hands",
        people=people,
        views=views,
        steps=demo.steps,
        device="cpu",
        log_every=100,
        checkpoint_every=10**6,
        reading=HandReading(size=whole(sizes.pixels)),
        aligner=AlignerSettings(
            backbone="hand:loc6",
            loc_size=64,
            steps=whole(sizes.align),
            batch_size=whole(sizes.align_batch),
            lr=2e-3,
            turns="quarter",
            distance="plain",
            head="places",
        ),
        recognizer=RecognizerSettings(
            palm=network, finger=network, dim=64, palm_size=48, finger_size=(48, 16), places=6, jitter=0.06
        ),
        losses=LossSettings(),
        optimizer=Optimizer(lr=3e-3 if network.startswith("hand:") else 1e-3, weight_decay=1e-4, warm_up=0.05),
    )


def whole(size: int | None) -> int:
    """A size, which ``DemoSettings`` has filled in."""
    assert size is not None
    return size


def pair(size: tuple[int, int] | None) -> tuple[int, int]:
    """People, and pictures of each, which ``DemoSettings`` has filled in."""
    assert size is not None
    return size


WHOLE_SIZE = 64
"""Side of what the arms without an aligner see."""
PARTS = ("train", "test", "strangers", "develop", "other")


@dataclasses.dataclass(frozen=True)
class World:
    """The people of one seed; no part shares a person with another, but ``other``, which is the test people in domain b."""

    train: Hands
    test: Hands
    strangers: Hands
    develop: Hands
    other: Hands


def _rendered(people: int, views: int, pixels: int, seed: int, first: int, domain: Domain = "a") -> dict[str, Any]:
    made = SyntheticHands(people, views, pixels, seed, first, domain)
    r = made.rendered
    return {"images": r.images, "points": r.points, "visibility": r.visibility, "labels": made.labels}


def world(folder: Path, demo: DemoSettings, seed: int) -> World:
    """The people of a seed, rendered once and kept in the folder."""
    sizes = demo.sizes
    path = folder / f"worlds/seed-{seed}.npz"

    def make() -> None:
        arrays: dict[str, Any] = {}
        first = 0
        for name in PARTS:
            people, views = pair(getattr(sizes, "test" if name == "other" else name))
            start = pair(sizes.train)[0] if name == "other" else first
            domain: Domain = "b" if name == "other" else "a"
            made = _rendered(people, views, whole(sizes.pixels), seed, start, domain)
            first += people if name != "other" else 0
            arrays.update({f"{name}_{key}": value for key, value in made.items()})
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    made_once(path, make)
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return World(**{name: _hands(name, arrays) for name in PARTS})


def _hands(name: str, arrays: dict[str, Any]) -> Hands:
    labels = arrays[f"{name}_labels"]
    number = np.concatenate([np.arange(c) for c in np.unique(labels, return_counts=True)[1]])
    return hands_of(
        [f"{name}/{label:04d}/{view:02d}" for label, view in zip(labels, number, strict=True)],
        [f"{label:04d}" for label in labels],
        DATA,
        sides=["right"] * len(labels),
        splits=["gallery" if view < 2 else "probe" for view in number],
        points=arrays[f"{name}_points"],
        visibility=arrays[f"{name}_visibility"],
        images=torch.from_numpy(arrays[f"{name}_images"]),
    )


def aligner(folder: Path, demo: DemoSettings, seed: int, people: Hands) -> MultiSpatialTransformer:
    """The aligner of a seed, trained once and kept in the folder; every arm that aligns has this one."""
    settings = settings_of(demo)
    path = folder / f"worlds/aligner-{seed}.safetensors"

    def make() -> None:
        trained = train_aligner(people, settings, seed, quiet=True)
        assert trained is not None
        checkpoints.save(path, trained.state_dict(), method=METHOD, config={})

    made_once(path, make)
    fresh = build_aligner(settings, seed)
    assert fresh is not None
    checkpoints.load_into(fresh, path, method=METHOD)
    return fresh.eval()


def prepared(folder: str, demo: DemoSettings, seed: int) -> None:
    """Make the people and the aligner of a seed, for arms that come later; a fault is raised again where they are needed."""
    aligner(Path(folder), demo, seed, world(Path(folder), demo, seed).train)
