"""Every setting of `head_kd`, and the one home of each default. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import tenfold.config as shared
from tenfold import UserError
from tenfold.config import (
    Count,
    Device,
    Distinct,
    Ge,
    Interval,
    Length,
    Natural,
    NonNegative,
    Positive,
    Precision,
    Seed,
    Seeds,
    SettingError,
    Settings,
)
from tenfold.errors import did_you_mean

S = TypeVar("S", bound=Settings)
Method = Literal["own", "paper", "assist", "tf_head", "direct", "pkd", "fitnet", "plain"]
METHODS: tuple[Method, ...] = get_args(Method)
READ_AT_REGIONS: tuple[Method, ...] = ("own", "paper", "direct")
"""Methods whose teacher is read at regions, so that a cache can take its place."""
WITH_TEACHER: tuple[Method, ...] = (*READ_AT_REGIONS, "pkd", "fitnet")
"""Methods whose teacher itself runs; ``assist`` takes its config alone."""
Launcher = Literal["none", "pytorch", "slurm", "mpi"]
Storage = Literal["fp32", "fp16", "int8"]
Splits = Annotated[list[str], Length(2, 2)]


def from_mapping(kind: type[S], values: Mapping[str, Any] | S | None, what: str) -> S:
    """A settings dataclass out of a config's dict.

    Args:
        kind: the dataclass.
        values: its fields by name, an instance, or None for the defaults.
        what: where the dict stands, for messages.

    Raises:
        UserError: an unknown name (with the nearest) or a bad value.
    """
    if isinstance(values, kind):
        return values
    assert values is None or isinstance(values, Mapping)
    given = dict(values or {})
    known = [f.name for f in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            raise UserError(f"{what}: unknown setting '{name}': {did_you_mean(name, known)}")
    try:
        return kind(**{name: tuple(v) if isinstance(v, list) and name == "akd" else v for name, v in given.items()})
    except SettingError as error:
        raise error.under(what) from None


@dataclass(frozen=True, kw_only=True)
class Schedule(Settings):
    """The factor w(i) = clamp((i - start) / warmup, 0, 1), 0 from ``stop`` on, that all distillation terms carry.

    Args:
        warmup: iterations until w is 1 (2000 in the authors' code).
        start: iteration at which w begins to rise.
        stop: iteration from which the terms are 0; TF-HEAD stops at the first drop of the learning rate.
    """

    warmup: Natural = 2000
    start: Natural = 0
    stop: Natural | None = None


@dataclass(frozen=True, kw_only=True)
class ProposalSettings(Settings):
    """How a one-stage student proposes regions (defaults: the authors' code).

    Args:
        nms_pre: boxes per level and image that are decoded.
        iou_threshold: overlap above which a box goes, within a level.
        max_per_image: largest number of boxes per image.
        min_size: side in pixels that a box must exceed.
    """

    nms_pre: Count = 2000
    iou_threshold: Annotated[float, Interval(gt=0, le=1)] = 0.7
    max_per_image: Count = 1000
    min_size: NonNegative = 0


@dataclass(frozen=True, kw_only=True)
class AssistantSettings(Settings):
    """An assistant head on the student's neck, and what is distilled through it.

    Args:
        kind: roi (an R-CNN or cascade head) or dense (a RetinaNet, FCOS, ATSS, GFL ... head).
        head: mmdet config of the head; default: the teacher's head.
        train_cfg: assigner and sampler, as that head takes them; default: the teacher's.
        akd: signals of the assistant that imitate the teacher's (fc1, fc2 ...; cls_tower, reg_tower); default: all.
        akd_weight: weight of each of them (2.0 in the authors' code); 0 switches the terms off.
        ckd_weight: weight of the student head's imitation (2.0 in the authors' code); 0 switches it off.
        ckd_student: signal of the student's head; default: cls_tower, or the last fc of a two-stage student.
        ckd_target: signal of the teacher's head that it imitates; default: the last.
        ckd_on: all regions that have a cell (the authors' code), or positive ones.
        match: provenance (the cell that predicted the box) or center (a cell from the box's size and place; ours).
        per_anchor: whether each anchor has an adapter of its own (the authors' development code).
        normalize: whether to divide by the variance of the target (ours), so that weights mean the same for every teacher.
        detection_weight: weight of the assistant's own detection losses.
        ramp_detection: whether these follow the warm-up too (TF-HEAD).
        bridge: auto (a 1x1 convolution where the student's neck has other channels than the head wants) or off.
        transfer: whether to copy the teacher's head into the assistant at the start.
        align_strides: whether to pool regions at the teacher's strides although the student's finest map is coarser (ours).
        rois_per_image: regions that the sampler takes; default: as its config says.
    """

    kind: Literal["roi", "dense"] = "roi"
    head: Mapping[str, Any] | None = None
    train_cfg: Any = None
    akd: tuple[str, ...] | None = None
    akd_weight: NonNegative = 2.0
    ckd_weight: NonNegative = 2.0
    ckd_student: str | None = None
    ckd_target: str | None = None
    ckd_on: Literal["all", "positive"] = "all"
    match: Literal["provenance", "center"] = "provenance"
    per_anchor: bool = False
    normalize: bool = False
    detection_weight: NonNegative = 1.0
    ramp_detection: bool = False
    bridge: Literal["auto", "off"] = "auto"
    transfer: bool = True
    align_strides: bool = False
    rois_per_image: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.akd_weight == self.ckd_weight == self.detection_weight == 0:
            raise UserError("an assistant whose weights are all 0 does nothing: leave it out")


@dataclass(frozen=True, kw_only=True)
class NeckMimic(Settings):
    """Imitation of the teacher's neck by the student's: the plain alternatives to assistants.

    Args:
        kind: pkd (correlation of each channel) or fitnet (MSE).
        weight: weight of each level (PKD's authors take 6 to 10 for two-stage detectors).
        normalize: whether fitnet divides by the target's variance.
    """

    kind: Literal["pkd", "fitnet"] = "pkd"
    weight: NonNegative = 1.0
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class Balance(Settings):
    """Choose the distillation weights from gradients: ||grad of a term|| = ratio * ||grad of the detection loss||.

    Both are taken at the student's feature maps and averaged over the first iterations; then the factors are frozen.

    Args:
        ratio: ratio of all terms together, shared equally.
        iterations: iterations that are measured.
    """

    ratio: Positive = 0.5
    iterations: Count = 100


@dataclass(frozen=True, kw_only=True)
class Terms(Settings):
    """What is distilled and how strongly; what is not given is the method's.

    Args:
        akd_weight: weight of each assistant signal.
        ckd_weight: weight of the student head's imitation.
        ckd_on: regions of the student head's imitation, all or positive.
        neck_weight: weight of each level for pkd and fitnet.
        rois_per_image: regions that the assistant's sampler takes; default: as the teacher's config says.
        rois: student (its proposals) or teacher (those of the teacher's RPN).
        align_strides: whether to pool regions at the teacher's strides.
    """

    akd_weight: NonNegative | None = None
    ckd_weight: NonNegative | None = None
    ckd_on: Literal["all", "positive"] | None = None
    neck_weight: NonNegative | None = None
    rois_per_image: Count | None = None
    rois: Literal["student", "teacher"] = "student"
    align_strides: bool = False


@dataclass(frozen=True, kw_only=True)
class Distillation(Terms):
    """What is distilled, how strongly, and when.

    Args:
        warmup: iterations until the terms have their whole weight.
        stop: iteration from which they are 0; default: never, tf_head: the first drop of the learning rate.
        balance: ratio of the terms' gradients to the detection loss's that weights are chosen for, from the first
            iterations; 0 keeps the weights as given.
    """

    warmup: Natural = Schedule.warmup
    stop: Natural | None = None
    balance: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings):
    """A student, its teacher, their data.

    Args:
        student: mmdet config of the plain student: a file, or mmdet::folder/name.py for one that mmdet ships.
        teacher: mmdet config of the teacher; not for the methods plain and tf_head.
        teacher_weights: weights of the teacher, .pth or .safetensors; for all methods but plain, tf_head and assist.
        data: coco:DIR or voc:DIR, with splits train and val; default: the data of the student's config.
        split: the splits of --data that are trained on and measured; val stands for valid and validation too.
        skip_bad: whether bad images and boxes of the data are left out, counted and listed, instead of refused.
    """

    student: str
    teacher: str | None = None
    teacher_weights: str | None = None
    data: str | None = None
    split: Splits = field(default_factory=lambda: ["train", "val"])
    skip_bad: bool = False

    def check_teacher(self, *methods: Method, option: str = "--method") -> None:
        """Raise ``UserError`` where a method needs more of a teacher than there is."""
        for method in methods:
            if method in WITH_TEACHER and (self.teacher is None or self.teacher_weights is None):
                raise UserError(
                    f"{option} {method} needs --teacher CONFIG and --teacher_weights FILE; without a teacher,"
                    f" {option} tf_head"
                )
            if method == "assist" and self.teacher is None:
                raise UserError(f"{option} assist copies the teacher's head: it needs --teacher CONFIG")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """The optimizer of the student's config.

    Args:
        lr: learning rate; default: the config's.
    """

    lr: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Settings):
    """How long to train, and on what; whatever is not given is the config's.

    Args:
        epochs: passes over the data; default: the config's.
        steps: iterations; where both are given, the one that is reached first ends the training.
        batch_size: images per step; default: the config's.
        workers: processes that load data; default: the config's.
        device: where to compute; auto takes CUDA where there is one, else the CPU (mps is refused: mmdet's models hold
            64-bit numbers).
        precision: number format of the mixed precision, with regions, losses and boxes in 32 bits; auto is bf16 on a CUDA
            device that has it, 32 bits elsewhere.
        optimizer: settings of the optimizer.
    """

    epochs: Count | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    workers: Natural | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)


@dataclass(frozen=True, kw_only=True)
class RunnerSettings(ComputeSettings):
    """What ``head_kd.training.runner.fit`` is told besides a config.

    Args:
        validate_every: iterations between two validations; 0 is as the config says.
        checkpoint_every: iterations between two checkpoints.
        log_every: iterations between two rows of metrics.csv.
        seed: seed of weights, data order, augmentation and sampling.
        launcher: none, or what started several processes (pytorch for torchrun, slurm, mpi).
    """

    validate_every: Natural = 0
    checkpoint_every: Count = 500
    log_every: Count = 10
    seed: Seed = 0
    launcher: Launcher = "none"


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunnerSettings, PairSettings):
    """Train a student with a teacher's or its own assistants' help.

    Args:
        method: own (normalized losses, for your data), paper (the authors' numbers), assist (assistant on labels only),
            tf_head (no teacher), direct (the student's head imitates, no assistant), pkd, fitnet (neck imitation), plain.
        cache: folder of `head-kd cache`; the teacher itself is then not loaded.
        guard: validation images that the teacher is measured on before the first step; 0 checks classes, normalization
            and gradients only, and -1 checks nothing.
        min_teacher_ap: AP of the teacher on these images, in percent, below which the training does not start.
        other_classes: whether the teacher may know other classes than the data has; its inner features are distilled all
            the same.
        distill: what is distilled, how strongly, and when.
    """

    method: Method = "own"
    cache: str | None = None
    guard: Annotated[int, Ge(-1)] = 32
    min_teacher_ap: NonNegative = 0.0
    other_classes: bool = False
    distill: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher(self.method)
        if self.cache is not None and self.method not in READ_AT_REGIONS:
            raise UserError(
                f"--cache: --method {self.method} reads no teacher at regions, so a cache has no part in it"
            )


@dataclass(frozen=True, kw_only=True)
class InspectSettings(PairSettings):
    """Show what a pair can match, what it costs, and how far it is apart.

    Args:
        method: method whose terms are shown, as for train.
        teacher_weights: weights of the teacher; without them, signals, shapes and cost only.
        images: training images that gradients and the semantic gap are measured on; 0 measures nothing.
        validation: validation images that the teacher is measured on; 0 leaves it out.
        other_classes: whether the teacher may know other classes than the data has.
        size: height and width of the image that cost is counted for.
        seed: seed of the student's weights, augmentation and sampling.
        distill: what is distilled and how strongly.
    """

    method: Method = "own"
    images: Natural = 16
    validation: Natural = 0
    other_classes: bool = False
    size: Annotated[list[Count], Length(2, 2)] = field(default_factory=lambda: [512, 512])
    seed: Seed = 0
    distill: Terms = field(default_factory=Terms)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None and (self.method in WITH_TEACHER or self.method == "assist"):
            raise UserError(f"--method {self.method} needs --teacher CONFIG")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Settings):
    """Run the teacher once and save what training asks of it.

    Args:
        student: mmdet config whose training data and normalization are used.
        teacher: mmdet config of the teacher.
        teacher_weights: weights of the teacher, .pth or .safetensors.
        data: coco:DIR or voc:DIR; default: the data of the student's config.
        split: the splits of --data, as for train.
        skip_bad: whether bad images and boxes of the data are left out, as for train.
        boxes: boxes per image; fewer than 64 keep less of the gain.
        storage: number format on disk, fp32, fp16, or int8 with one scale per box.
        batch_size: images at once.
        seed: seed of the random boxes.
        device: where to compute; auto takes CUDA where there is one, else the CPU.
    """

    student: str
    teacher: str
    teacher_weights: str
    data: str | None = None
    split: Splits = field(default_factory=lambda: ["train", "val"])
    skip_bad: bool = False
    boxes: Annotated[int, Ge(4)] = 64
    storage: Storage = "fp16"
    batch_size: Count = 8
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Measure a plain student's COCO AP.

    Args:
        run: folder of a `head-kd train`, or a file of a student's weights, in a run or from elsewhere.
        student: mmdet config of the plain student; default: the run's.
        data: coco:DIR or voc:DIR; default: the test data of the config.
        split: the split of --data that is measured; val stands for valid and validation too.
        skip_bad: whether bad images and boxes of the data are left out, as for train.
        device: where to compute; auto takes CUDA where there is one, else the CPU.
    """

    run: str
    student: str | None = None
    data: str | None = None
    split: str = "val"
    skip_bad: bool = False
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write the plain student of a checkpoint, checked bit for bit.

    Args:
        run: folder of a `head-kd train`, or a checkpoint of ``HEADDetector``, in a run or from elsewhere.
        student: mmdet config of the plain student; default: the run's.
        verify: whether to load what was written and compare its outputs bit for bit.
    """

    run: str
    student: str | None = None
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class CompareSettings(ComputeSettings, PairSettings):
    """Compare methods over seeds on your data, with paired intervals.

    All arms get the same data and steps, and are measured at the end.

    Args:
        arms: methods to compare, the baseline first.
        seeds: seeds of weights, data order, augmentation and sampling.
        cache: folder of `head-kd cache`, for the arms whose teacher is read at regions.
        executor: where arms are measured: processes:N of this machine, or dask:ADDRESS; default: here, one after another.
        distill: what is distilled, how strongly, and when; for the arms that have such terms.
    """

    arms: Annotated[list[Method], Length(2), Distinct()] = field(default_factory=lambda: ["plain", "assist", "own"])
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    cache: str | None = None
    executor: str | None = None
    distill: Distillation = field(default_factory=Distillation)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher(*self.arms, option="--arms")
        if self.cache is not None and not set(self.arms) & set(READ_AT_REGIONS):
            raise UserError(f"--cache: none of --arms {','.join(self.arms)} reads a teacher at regions")


@dataclass(frozen=True, kw_only=True)
class DemoSettings(shared.DemoSettings):
    """Teach a small RetinaNet by a Faster R-CNN on drawn images.

    Args:
        processes: arms that are trained side by side, one thread each; default: two, at the level quick one.
    """

    processes: Count | None = None
