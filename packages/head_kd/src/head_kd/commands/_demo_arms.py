"""The demonstration's arms: how much is trained at a level, and one training of each."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

import head_kd
from head_kd.checkpoints import student_weights
from head_kd.compose import pair
from head_kd.config import Distillation, TrainSettings
from head_kd.data import write_drawn
from head_kd.export import METHOD
from head_kd.rendered import CLASSES
from head_kd.small import experiment, faster_rcnn, retinanet
from head_kd.training.runner import fit
from tenfold import checkpoints

CLUTTER = False
"""Strong noise, lines and letters would take more steps than the levels have: after 400, such a teacher had AP 20, not 42."""
VALIDATION_FIRST = 100_000
"""Index of the first measured image; no image is trained on and measured."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained at a level.

    Attributes:
        images: training images.
        validation: measured images.
        teacher_steps: of the teacher.
        teacher_batch: its images a step.
        steps: of each student, with 8 images.
        seeds: of the students.
    """

    images: int
    validation: int
    teacher_steps: int
    teacher_batch: int
    steps: int
    seeds: tuple[int, ...]


SIZES = {
    "quick": Size(24, 12, 4, 4, 4, (0,)),
    "default": Size(384, 100, 240, 8, 200, (0, 1)),
    "full": Size(512, 200, 450, 8, 250, (0, 1, 2, 3, 4)),
}
RATE = 6e-3
"""Highest learning rate of all students; not tuned, nor for any arm."""
TEACHER_RATE = 2e-3
PROPOSALS = {"nms_pre": 200, "max_per_image": 100}
"""Of the students: on images of 128 pixels the authors' 2000 and 1000 are nearly every anchor, and NMS most of a step."""
TEACHER_SEED = 1000
_COMMON = {"warmup": 100, "rois_per_image": 32}
ARMS: dict[str, tuple[str, Distillation]] = {
    "plain": ("student alone", Distillation(preset="plain")),
    "assist": ("+ assistant, labels only", Distillation(preset="assist", **_COMMON)),  # type: ignore[arg-type]
    "akd": ("+ assistant + AKD", Distillation(preset="own", akd_weight=1.25, ckd_weight=0.0, **_COMMON)),  # type: ignore[arg-type]
    "akd_ckd": ("+ assistant + AKD + CKD", Distillation(preset="own", akd_weight=1.25, **_COMMON)),  # type: ignore[arg-type]
    "tf_head": ("TF-HEAD, no teacher", Distillation(preset="tf_head", **_COMMON)),  # type: ignore[arg-type]
    "pkd": ("PKD on the neck", Distillation(preset="pkd", neck_weight=0.4, warmup=100)),
    "fitnet": ("FitNet on the neck", Distillation(preset="fitnet", neck_weight=0.08, warmup=100)),
    "direct": ("direct imitation, no assistant", Distillation(preset="direct", **_COMMON)),  # type: ignore[arg-type]
}
LEVEL_ARMS = {
    "quick": ("plain", "assist", "akd"),
    "default": ("plain", "akd"),
    "full": ("plain", "assist", "akd", "pkd", "fitnet"),
}
REPORTED = ("akd_ckd", "tf_head", "direct")
"""Arms of the full level that no claim is decided by; on the first seeds alone, to pay for more steps of the others."""
REPORTED_SEEDS = 2
WITH_TEACHER = ("akd", "akd_ckd", "pkd", "fitnet", "direct")


def train_teacher(folder: str, scratch: str, size: Size) -> float:
    """Train the Faster R-CNN, leave it in ``teacher.safetensors``, return its AP in percent."""
    torch.set_num_threads(1)
    train, val = drawn_splits(scratch, size)
    cfg = experiment(
        faster_rcnn(),
        train,
        val,
        steps=size.teacher_steps,
        batch=size.teacher_batch,
        rate=TEACHER_RATE,
        memory=True,
    )
    settings = TrainSettings(student="demo", distill=Distillation(preset="plain"), seed=TEACHER_SEED, log_every=50)
    done = fit(Config(cfg), settings, None, quiet=True, description="teacher")
    checkpoints.save(
        Path(folder) / "teacher.safetensors",
        done.model.state_dict(),
        method="head_kd.teacher",
        version=head_kd.__version__,
        config={"classes": list(CLASSES)},
    )
    return 100 * max(0.0, float(done.run_hook.last_validation["bbox_mAP"]))


def train_arm(folder: str, scratch: str, arm: str, seed: int, size: Size, keep: bool) -> dict[str, float]:
    """Train one student and measure it; with ``keep`` its weights stay in ``students/``."""
    torch.set_num_threads(1)
    train, val = drawn_splits(scratch, size)
    plain = Config(experiment(retinanet(), train, val, steps=size.steps, batch=8, rate=RATE, memory=True))
    how = ARMS[arm][1]
    teacher = Config({"model": faster_rcnn()})
    checkpoint = Path(folder) / "teacher.safetensors" if how.needs_teacher else None
    cfg = pair(plain, teacher, checkpoint, how, seed=seed, reuse_features=how.needs_teacher)
    cfg.model.proposals = dict(PROPOSALS)
    settings = TrainSettings(student="demo", distill=Distillation(preset="plain"), seed=seed, log_every=50)
    done = fit(cfg, settings, None, quiet=True)
    if keep:
        weights = student_weights(done.model.state_dict())
        checkpoints.save(
            Path(folder) / "students" / f"{arm}.safetensors",
            weights,
            method=METHOD,
            version=head_kd.__version__,
            config={"classes": list(CLASSES)},
        )
    found = done.run_hook.last_validation
    return {"AP": 100 * max(0.0, found["bbox_mAP"]), "AP50": 100 * max(0.0, found["bbox_mAP_50"])}


def drawn_splits(scratch: str, size: Size) -> tuple[Any, Any]:
    data = Path(scratch) / "data"
    return (
        write_drawn(data, "train", 0, size.images, clutter=CLUTTER),
        write_drawn(data, "val", VALIDATION_FIRST, size.validation, clutter=CLUTTER),
    )
