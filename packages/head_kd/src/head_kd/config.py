"""Every setting of `head_kd`, and the one home of each default. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from tenfold import UserError
from tenfold.errors import did_you_mean

T = TypeVar("T")
Preset = Literal["own", "paper", "assist", "tf_head", "direct", "pkd", "fitnet", "plain"]
PRESETS: tuple[Preset, ...] = ("own", "paper", "assist", "tf_head", "direct", "pkd", "fitnet", "plain")


def _at_least(owner: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum:g}, got {value}")


def from_mapping(kind: type[T], values: Mapping[str, Any] | T | None, what: str) -> T:
    """A settings dataclass out of a config's dict.

    Raises:
        UserError: an unknown name (with the nearest) or a bad value.
    """
    if isinstance(values, kind):
        return values
    assert values is None or isinstance(values, Mapping)
    given = dict(values or {})
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise UserError(f"{what}: unknown setting '{name}': {did_you_mean(name, known)}")
    return kind(**{name: tuple(v) if isinstance(v, list) and name in {"akd"} else v for name, v in given.items()})


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The factor w(i) = clamp((i - start) / warmup, 0, 1), 0 from ``stop`` on, that all distillation terms carry.

    Args:
        warmup: iterations (2000 in the authors' code).
        start: iteration at which it begins to rise.
        stop: iteration from which the terms are 0; TF-HEAD stops at the first drop of the learning rate.
    """

    warmup: int = 2000
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 0, "warmup", "start", "stop")


@dataclass(frozen=True, kw_only=True)
class ProposalSettings:
    """How a one-stage student proposes regions (defaults: the authors' code).

    Args:
        nms_pre: boxes of each level and image that are decoded.
        iou_threshold: of the NMS within a level.
        max_per_image: boxes that stay.
        min_size: in pixels; boxes must be larger.
    """

    nms_pre: int = 2000
    iou_threshold: float = 0.7
    max_per_image: int = 1000
    min_size: float = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "nms_pre", "max_per_image")
        _at_least(self, 0, "min_size")
        if not 0 < self.iou_threshold <= 1:
            raise UserError(f"iou_threshold must be in (0, 1], got {self.iou_threshold}")


@dataclass(frozen=True, kw_only=True)
class AssistantSettings:
    """An assistant head on the student's neck, and what is distilled through it.

    Args:
        kind: roi (an R-CNN or cascade head) or dense (a RetinaNet, FCOS, ATSS, GFL ... head).
        head: its mmdet config; default: the teacher's head.
        train_cfg: assigner and sampler, as that head takes them; default: the teacher's.
        akd: signals of the assistant that imitate the teacher's (fc1, fc2 ...; cls_tower, reg_tower); default: all.
        akd_weight: of each of them (2.0 in the authors' code); 0 switches the terms off.
        ckd_weight: of the student head's imitation (2.0 in the authors' code); 0 switches it off.
        ckd_student: signal of the student's head; default: cls_tower, or the last fc of a two-stage student.
        ckd_target: signal of the teacher's head that it imitates; default: the last.
        ckd_on: all regions that have a cell (the authors' code), or positive ones.
        match: provenance (the cell that predicted the box) or center (a cell from the box's size and place; ours).
        per_anchor: one adapter for each anchor instead of one for all (the authors' development code).
        normalize: divide by the variance of the target (ours), so that weights mean the same for every teacher.
        detection_weight: of the assistant's own detection losses.
        ramp_detection: these follow the warm-up too (TF-HEAD).
        bridge: auto (a 1x1 convolution where the student's neck has other channels than the head wants) or off.
        transfer: copy the teacher's head into the assistant at the start.
        align_strides: pool regions at the teacher's strides although the student's finest map is coarser (ours).
        rois_per_image: regions that the sampler takes; default: as its config says.
    """

    kind: Literal["roi", "dense"] = "roi"
    head: Mapping[str, Any] | None = None
    train_cfg: Any = None
    akd: tuple[str, ...] | None = None
    akd_weight: float = 2.0
    ckd_weight: float = 2.0
    ckd_student: str | None = None
    ckd_target: str | None = None
    ckd_on: Literal["all", "positive"] = "all"
    match: Literal["provenance", "center"] = "provenance"
    per_anchor: bool = False
    normalize: bool = False
    detection_weight: float = 1.0
    ramp_detection: bool = False
    bridge: Literal["auto", "off"] = "auto"
    transfer: bool = True
    align_strides: bool = False
    rois_per_image: int | None = None

    def __post_init__(self) -> None:
        _at_least(self, 0, "akd_weight", "ckd_weight", "detection_weight")
        _at_least(self, 1, "rois_per_image")
        for name, known in {
            "kind": ("roi", "dense"),
            "ckd_on": ("all", "positive"),
            "match": ("provenance", "center"),
            "bridge": ("auto", "off"),
        }.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"assistant: {name} '{getattr(self, name)}': {did_you_mean(str(getattr(self, name)), known)}"
                )
        if self.akd_weight == self.ckd_weight == self.detection_weight == 0:
            raise UserError("an assistant whose weights are all 0 does nothing: leave it out")


@dataclass(frozen=True, kw_only=True)
class NeckMimic:
    """Imitation of the teacher's neck by the student's: the plain alternatives to assistants.

    Args:
        kind: pkd (correlation of each channel) or fitnet (MSE).
        weight: of each level (PKD's authors take 6 to 10 for two-stage detectors).
        normalize: fitnet only, divide by the target's variance.
    """

    kind: Literal["pkd", "fitnet"] = "pkd"
    weight: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 0, "weight")
        if self.kind not in ("pkd", "fitnet"):
            raise UserError(f"neck_mimic: kind '{self.kind}': {did_you_mean(str(self.kind), ('pkd', 'fitnet'))}")


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Choose the distillation weights from gradients: ||grad of a term|| = ratio * ||grad of the detection loss||.

    Both are taken at the student's feature maps and averaged over the first iterations; then the factors are frozen.

    Args:
        ratio: of all terms together, shared equally.
        iterations: that are measured.
    """

    ratio: float = 0.5
    iterations: int = 100

    def __post_init__(self) -> None:
        _at_least(self, 1, "iterations")
        if not self.ratio > 0:
            raise UserError(f"balance: ratio must be above 0, got {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What `head-kd train` puts around two configs.

    Args:
        preset: own (normalized losses, for your data), paper (the authors' numbers), assist (assistant on labels only),
            tf_head (no teacher), direct (student head imitates, no assistant), pkd, fitnet (neck imitation), plain.
        akd_weight: of each assistant signal; default: the preset's.
        ckd_weight: of the student head's imitation; default: the preset's.
        ckd_on: all or positive regions; default: the preset's.
        neck_weight: of each level for pkd and fitnet; default: the preset's.
        warmup: iterations until the terms have their whole weight.
        stop: iteration from which they are 0; default: never, tf_head: the first drop of the learning rate.
        balance: measure gradients first and set the weights from them (ratio to the detection loss); 0 is off.
        rois_per_image: regions that the assistant's sampler takes; default: as the teacher's config says.
        rois: student (its proposals) or teacher (those of the teacher's RPN).
        align_strides: pool regions at the teacher's strides.
        other_classes: the teacher knows other classes than the data has; its inner features are distilled all the same.
    """

    preset: Preset = "own"
    akd_weight: float | None = None
    ckd_weight: float | None = None
    ckd_on: Literal["all", "positive"] | None = None
    neck_weight: float | None = None
    warmup: int = Schedule.warmup
    stop: int | None = None
    balance: float = 0.0
    rois_per_image: int | None = None
    rois: Literal["student", "teacher"] = "student"
    align_strides: bool = False
    other_classes: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"unknown preset '{self.preset}': {did_you_mean(self.preset, PRESETS)}")
        _at_least(self, 0, "akd_weight", "ckd_weight", "neck_weight", "warmup", "stop", "balance")
        _at_least(self, 1, "rois_per_image")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself runs."""
        return self.reads_regions or self.preset in ("pkd", "fitnet")

    @property
    def reads_regions(self) -> bool:
        """Whether the teacher is read at regions, so that a cache can take its place."""
        return self.preset in ("own", "paper", "direct")


Launcher = Literal["none", "pytorch", "slurm", "mpi"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `head-kd train`.

    Args:
        student: mmdet config of the plain student: a file, or mmdet::folder/name.py for one that mmdet ships.
        teacher: mmdet config of the teacher; not for presets plain and tf_head.
        teacher_checkpoint: its weights, .pth or .safetensors.
        data: coco:DIR or voc:DIR, with splits train and val; default: the data of the student's config.
        cache: folder of `head-kd cache`; the teacher itself is then not loaded.
        guard: validation images that the teacher is measured on before the first step; 0 checks classes, normalization
            and gradients only, and -1 checks nothing.
        min_teacher_ap: the training does not start when the teacher's AP (in percent) on these images is lower.
        max_epochs: passes over the data; default: the config's.
        max_steps: iterations; the one that is reached first ends the training.
        batch_size: images of a step; default: the config's.
        lr: learning rate; default: the config's.
        val_every: iterations between two validations; 0 is as the config says.
        checkpoint_every: iterations between two checkpoints.
        log_every: iterations between two rows of metrics.csv.
        workers: processes that load data; default: the config's.
        seed: of weights, data order, augmentation and sampling.
        device: auto (cuda where there is one) or cpu.
        precision: 32, bf16 or 16; mixed precision as in mmengine, with regions, losses and boxes in 32 bits.
        launcher: none, or what started several processes (pytorch for torchrun, slurm, mpi).
        distill: what is distilled.
    """

    student: str
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    data: str | None = None
    cache: str | None = None
    guard: int = 32
    min_teacher_ap: float = 0.0
    max_epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    val_every: int = 0
    checkpoint_every: int = 500
    log_every: int = 10
    workers: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"
    launcher: Launcher = "none"
    distill: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_epochs", "max_steps", "batch_size", "checkpoint_every", "log_every")
        _at_least(self, 0, "val_every", "workers", "seed", "min_teacher_ap")
        if self.guard < -1:
            raise UserError(f"guard must be a number of images, 0 or -1, got {self.guard}")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        if self.distill.needs_teacher and (self.teacher is None or self.teacher_checkpoint is None):
            raise UserError(
                f"preset {self.distill.preset} needs --teacher CONFIG and --teacher_checkpoint FILE; without a teacher,"
                " --distill.preset tf_head"
            )


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Settings of `head-kd inspect`.

    Args:
        student: mmdet config of the plain student.
        teacher: mmdet config of the teacher.
        teacher_checkpoint: its weights; without them, signals, shapes and cost only.
        data: coco:DIR or voc:DIR; default: the data of the student's config.
        images: training images that gradients and the semantic gap are measured on; 0 measures nothing.
        validation: validation images that the teacher is measured on; 0 leaves it out.
        size: height and width of the image that cost is counted for.
        distill: what is distilled.
    """

    student: str
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    data: str | None = None
    images: int = 16
    validation: int = 0
    size: tuple[int, int] = (512, 512)
    distill: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        _at_least(self, 0, "images", "validation")


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """Settings of `head-kd cache`.

    Args:
        student: mmdet config whose training data and normalization are used.
        teacher: mmdet config of the teacher.
        teacher_checkpoint: its weights.
        data: coco:DIR or voc:DIR; default: the data of the student's config.
        boxes: of each image; fewer than 64 keep less of the gain.
        precision: fp16, fp32, or int8 with one scale for each box.
        batch_size: images at once.
        seed: of the random boxes.
    """

    student: str
    teacher: str
    teacher_checkpoint: str
    data: str | None = None
    boxes: int = 64
    precision: Literal["fp16", "fp32", "int8"] = "fp16"
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 4, "boxes")
        _at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Settings of `head-kd evaluate`.

    Args:
        student: mmdet config of the plain student.
        checkpoint: its weights, exported or of a run.
        data: coco:DIR or voc:DIR, split val; default: the test data of the config.
    """

    student: str
    checkpoint: str
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of `head-kd export`.

    Args:
        student: mmdet config of the plain student.
        checkpoint: of a run, checkpoints/last.ckpt for one.
        verify: load what was written and compare its outputs bit for bit.
    """

    student: str
    checkpoint: str
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class CompareSettings(TrainSettings):
    """Settings of `head-kd compare`; those of `head-kd train`, with all arms on the same data and steps.

    Args:
        arms: presets that are compared, the baseline first.
        seeds: of the runs.
    """

    arms: list[Preset] = field(default_factory=lambda: ["plain", "assist", "own"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.arms) < 2 or len(set(self.arms)) < len(self.arms):
            raise UserError("arms must be two or more different presets")
        for arm in self.arms:
            if arm not in PRESETS:
                raise UserError(f"unknown arm '{arm}': {did_you_mean(arm, PRESETS)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds must be different, at least one")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `head-kd demo`.

    Args:
        level: quick (mechanics, seconds), default (two minutes: direction of the main claim) or full (every claim).
        seeds: of the arms; default: one, two and five.
        processes: arms that train side by side, one thread each.
    """

    level: Literal["quick", "default", "full"] = "default"
    seeds: list[int] | None = None
    processes: int = 2

    def __post_init__(self) -> None:
        _at_least(self, 1, "processes")
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise UserError("seeds must be different, at least one")
