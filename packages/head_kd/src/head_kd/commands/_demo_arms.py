"""The demonstration's arms: how much is trained at a level, and one training of each."""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from head_kd.checkpoints import student_weights
from head_kd.coco import Split
from head_kd.compose import pair
from head_kd.config import WITH_TEACHER, Distillation, Method, RunnerSettings
from head_kd.data import write_drawn
from head_kd.export import METHOD
from head_kd.per_image import contributions
from head_kd.rendered import CLASSES
from head_kd.small import experiment, faster_rcnn, retinanet
from head_kd.training.runner import fit
from tenfold import checkpoints
from tenfold.claims import Measured

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
        teacher_steps: training steps of the teacher.
        teacher_batch: its images per step.
        steps: training steps of each student, with 8 images.
        finest: stride of the teacher's finest map.
        channels: channels of the teacher's neck.
        warmup: steps over which the distillation terms come in.
    """

    images: int
    validation: int
    teacher_steps: int
    teacher_batch: int
    steps: int
    finest: Literal[4, 8] = 4
    channels: int = 64
    warmup: int = 100

    def teacher(self) -> dict[str, Any]:
        """The teacher's model."""
        return faster_rcnn(channels=self.channels, finest=self.finest)


SIZES = {
    "quick": Size(24, 12, 4, 4, 4),
    "default": Size(384, 100, 330, 8, 200, finest=8, channels=48, warmup=40),
    "full": Size(512, 200, 450, 8, 250),
}
SEEDS = {"quick": 1, "default": 2, "full": 5}
RATE = 6e-3
"""Highest learning rate of all students; not tuned, nor for any arm."""
TEACHER_RATE = 2e-3
TEACHER_BETAS = (0.9, 0.95)
PROPOSALS = {"nms_pre": 200, "max_per_image": 100}
"""Of the students: on images of 128 pixels the authors' 2000 and 1000 are nearly every anchor, and NMS most of a step."""
TEACHER_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train the student.

    Attributes:
        label: what pictures and tables call it.
        method: what is distilled.
        distill: with which weights.
    """

    label: str
    method: Method
    distill: Distillation

    @property
    def taught(self) -> bool:
        """Whether the teacher has to be trained first."""
        return self.method in WITH_TEACHER


def _terms(**weights: float) -> Distillation:
    return Distillation(rois_per_image=32, **weights)  # type: ignore[arg-type]


ARMS = {
    "plain": Arm("student alone", "plain", Distillation()),
    "assist": Arm("+ assistant, labels only", "assist", _terms()),
    "akd": Arm("+ assistant + AKD", "own", _terms(akd_weight=1.25, ckd_weight=0.0)),
    "akd_ckd": Arm("+ assistant + AKD + CKD", "own", _terms(akd_weight=1.25)),
    "tf_head": Arm("TF-HEAD, no teacher", "tf_head", _terms()),
    "pkd": Arm("PKD on the neck", "pkd", Distillation(neck_weight=0.4)),
    "fitnet": Arm("FitNet on the neck", "fitnet", Distillation(neck_weight=0.08)),
    "direct": Arm("direct imitation, no assistant", "direct", _terms()),
}
LEVEL_ARMS = {
    "quick": ("plain", "assist", "akd"),
    "default": ("plain", "akd"),
    "full": ("plain", "assist", "akd", "pkd", "fitnet"),
}
REPORTED = ("akd_ckd", "tf_head", "direct")
"""Arms of the full level that no claim is decided by; on the first seeds alone, to pay for more steps of the others."""
REPORTED_SEEDS = 2


class _ChannelsLast(Hook):  # type: ignore[misc]
    """Weights and maps with their channels last in memory: a step of these small networks takes a tenth less time."""

    def before_train(self, runner: Any) -> None:
        runner.model.to(memory_format=torch.channels_last)


def ready() -> None:
    """Nothing: a process that runs it has imported what the other functions need."""


def train_teacher(folder: str, scratch: str, size: Size) -> dict[str, float]:
    """Train the Faster R-CNN and leave it in ``teacher.safetensors``; returns its AP in percent, and seconds.

    Args:
        folder: the demonstration's folder.
        scratch: folder with the drawn images.
        size: how much is trained.
    """
    begun = time.perf_counter()
    torch.set_num_threads(1)
    steps, batch = size.teacher_steps, size.teacher_batch
    train, val = drawn_splits(scratch, size)
    cfg = experiment(size.teacher(), train, val, steps=steps, batch=batch, rate=TEACHER_RATE, memory=True)
    cfg["optim_wrapper"]["optimizer"]["betas"] = TEACHER_BETAS
    done = fit(Config(cfg), RunnerSettings(seed=TEACHER_SEED, log_every=50), None, quiet=True, hooks=[_ChannelsLast()])
    file = Path(folder) / "teacher.safetensors"
    _save(file, done.model.state_dict(), "head_kd.teacher")
    ap = 100 * max(0.0, float(done.run_hook.last_validation["bbox_mAP"]))
    return {"AP": ap, "seconds": time.perf_counter() - begun}


def train_arm(folder: str, scratch: str, size: Size, kept_seed: int, name: str, seed: int) -> Measured:
    """Train one student and measure it: AP and AP50 in percent, and what each image contributes to them.

    Args:
        folder: the demonstration's folder, with the teacher.
        scratch: folder with the drawn images.
        size: how much is trained.
        kept_seed: seed whose students stay in ``students/``.
        name: name of the arm.
        seed: seed of the training.
    """
    torch.set_num_threads(1)
    arm = ARMS[name]
    train, val = drawn_splits(scratch, size)
    plain = Config(experiment(retinanet(), train, val, steps=size.steps, batch=8, rate=RATE, memory=True))
    teacher = Config({"model": size.teacher()})
    weights = Path(folder) / "teacher.safetensors" if arm.taught else None
    distill = dataclasses.replace(arm.distill, warmup=size.warmup)
    cfg = pair(plain, teacher, weights, arm.method, distill, seed=seed, reuse_features=arm.taught)
    cfg.model.proposals = dict(PROPOSALS)
    with tempfile.TemporaryDirectory(prefix="head-kd-found-") as place:
        cfg.val_evaluator.outfile_prefix = f"{place}/found"
        done = fit(cfg, RunnerSettings(seed=seed, log_every=50), None, quiet=True, hooks=[_ChannelsLast()])
        detections = json.loads(Path(place, "found.bbox.json").read_text(encoding="utf-8"))
    if seed == kept_seed:
        file = Path(folder) / "students" / f"{name}.safetensors"
        _save(file, student_weights(done.model.state_dict()), METHOD)
    found = done.run_hook.last_validation
    values = {"AP": 100 * max(0.0, found["bbox_mAP"]), "AP50": 100 * max(0.0, found["bbox_mAP_50"])}
    return Measured(values, contributions(json.loads(val.annotations.read_text(encoding="utf-8")), detections))


def _save(file: Path, state: dict[str, Any], method: str) -> None:
    checkpoints.save(file, state, method=method, config={"classes": list(CLASSES)})


def drawn_splits(scratch: str, size: Size) -> tuple[Split, Split]:
    """Training and measured images, drawn where they are not there yet."""
    data = Path(scratch) / "data"
    return (
        write_drawn(data, "train", 0, size.images, clutter=CLUTTER),
        write_drawn(data, "val", VALIDATION_FIRST, size.validation, clutter=CLUTTER),
    )
