"""Every setting of `pckd`, and the one home of each default. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.trainer_config import TrainerConfig

Method = Literal["ce", "kd", "dkd", "fitnet", "ckd", "pckd", "pckd-nokd"]
METHODS: tuple[str, ...] = get_args(Method)
DATA_KINDS = ("cifar10", "cifar100", "imagefolder", "tinyimagenet", "npz")
"""Layouts on disk."""
EMBEDDED_DATA = ("digits", "glyphs")
"""Data without a file: handwritten digits that scikit-learn ships, letters drawn from matplotlib's fonts."""
REFERENCE_EPOCHS = 240
"""Length of the authors' CIFAR-100 runs, which the schedules are given for."""


def _positive(settings: object, *names: str) -> None:
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"{name} must be above 0, got {getattr(settings, name)}")


def _not_negative(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise UserError(f"{name} must be at least 0, got {getattr(settings, name)}")


@dataclass(frozen=True, kw_only=True)
class Preview:
    """How much a sample counts: 1 while gamma <= t_e, else a small weight; t_e = base^e lets hard ones in with time.

    gamma is a sample's cross-entropy over the mean of its batch.

    Args:
        base: of the threshold t_e = base^e of epoch e = 1, 2, ...; 1.005 in the authors' code.
        scale_to: the threshold of the last epoch is base^scale_to however long the run is (240 as in the authors' runs;
            a run of 240 epochs is theirs exactly); 0 takes the plain epoch.
        tail: weight beyond the threshold. exp2 is exp(-gamma^2), the authors'; smooth is exp(1 - (gamma / t_e)^2), ours,
            without a jump; none weighs every sample 1, which makes pckd into ckd.
        normalize: divide the weights by their mean, so that preview does not lower the loss's scale (ours).
        detach: no gradient through the weights; the authors' code lets it through in the term of the logits.
        targets: terms that are weighted; cc is the category contrast, kd that of the logits. The authors weigh both.
    """

    base: float = 1.005
    scale_to: int = REFERENCE_EPOCHS
    tail: Literal["exp2", "smooth", "none"] = "exp2"
    normalize: bool = False
    detach: bool = True
    targets: list[Literal["cc", "kd"]] = field(default_factory=lambda: ["cc", "kd"])

    def __post_init__(self) -> None:
        if not self.base >= 1:
            raise UserError(f"base must be at least 1, got {self.base}")
        _not_negative(self, "scale_to")
        if self.tail not in ("exp2", "smooth", "none"):
            raise UserError(f"unknown tail '{self.tail}': {did_you_mean(str(self.tail), ('exp2', 'smooth', 'none'))}")

    def threshold(self, epoch: int, epochs: int = REFERENCE_EPOCHS) -> float:
        """t_e for the 1-based ``epoch`` of ``epochs``.

        Raises:
            ValueError: the epoch is below 1.
        """
        if epoch < 1:
            raise ValueError(f"epochs are 1-based, got {epoch}")
        return float(self.base ** (epoch * self.scale_to / epochs if self.scale_to else epoch))


@dataclass(frozen=True, kw_only=True)
class PCKDConfig:
    """Weights and variants of the method: L_CE + delta L_KD + beta L_CC + alpha L_CA + f L_FA.

    Args:
        alpha: weight of the alignment of the category centers (1 in the authors' command).
        beta: weight of the category contrast (0.05 in the authors' command).
        delta: weight of the logits' term. 1 here; the authors' command leaves it out, which trains their "without L_KD".
        f: weight of the alignment of the features (20 in the authors' command).
        T: temperature of the logits' term (4).
        tau: temperature of the contrast (4).
        tau0: base temperature of the contrast (0.07); tau / tau0 = 57 multiplies beta.
        contrast: relation (rows of relation vectors against each other, the authors' code) or center (a feature against
            the category centers, the paper's figure).
        center_align: same-dim (only where both features are equally wide, as the authors; else 0 with a warning) or gram
            (cosines between the centers, any width; ours).
        align_hidden: width of the hidden layer that maps the student's feature to the teacher's: 16x (of the teacher's
            width, the authors'), auto (the same, at most 4096), or a number.
        normalize_relations: unit relation vectors, for heads of large norm or many classes (ours; take a tau near 0.1).
        eps: null is the exact log-sum-exp; 1e-7 is the authors' formula, whose repulsion vanishes at large norms.
        gram: contrast through the centers' Gram matrix; auto where there are more classes than feature dimensions.
        gather: contrast and difficulty over the batches of all devices.
        preview: settings of the weights.
    """

    alpha: float = 1.0
    beta: float = 0.05
    delta: float = 1.0
    f: float = 20.0
    T: float = 4.0
    tau: float = 4.0
    tau0: float = 0.07
    contrast: Literal["relation", "center"] = "relation"
    center_align: Literal["same-dim", "gram"] = "same-dim"
    align_hidden: str = "16x"
    normalize_relations: bool = False
    eps: float | None = None
    gram: Literal["auto", "never", "always"] = "auto"
    gather: bool = True
    preview: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        _not_negative(self, "alpha", "beta", "delta", "f")
        _positive(self, "T", "tau", "tau0")
        if self.eps is not None:
            _positive(self, "eps")
        hidden = str(self.align_hidden)
        if hidden != "auto" and not (hidden.removesuffix("x").isdigit() and int(hidden.removesuffix("x")) > 0):
            raise UserError(f"align_hidden must be 16x, auto or a number of units, got '{hidden}'")

    def hidden_width(self, teacher_width: int) -> int:
        """Units of the hidden layer of the feature alignment."""
        if self.align_hidden == "auto":
            return min(16 * teacher_width, 4096)
        number = int(str(self.align_hidden).removesuffix("x"))
        return number * teacher_width if str(self.align_hidden).endswith("x") else number


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """ce * CE + kd * T^2 KL(teacher, student).

    Args:
        ce: weight of the cross-entropy (0.1 on CIFAR in RepDistiller and mdistiller; 0.5 on ImageNet).
        kd: weight of the divergence (0.9; 0.5 on ImageNet).
        T: temperature (4; 1 on ImageNet).
    """

    ce: float = 0.1
    kd: float = 0.9
    T: float = 4.0

    def __post_init__(self) -> None:
        _not_negative(self, "ce", "kd")
        _positive(self, "T")


@dataclass(frozen=True, kw_only=True)
class DKDConfig:
    """CE + w(e) (alpha TCKD + beta NCKD), the decoupled divergence (arXiv 2203.08679).

    Args:
        alpha: weight of the target's part (1).
        beta: weight of the other classes' part (8; 2 or 6 for some pairs; 0.5 on ImageNet).
        T: temperature (4; 1 on ImageNet).
        warm_up: epochs over which w rises to 1, of a run of 240 (20); shorter runs have a proportional share.
    """

    alpha: float = 1.0
    beta: float = 8.0
    T: float = 4.0
    warm_up: float = 20.0

    def __post_init__(self) -> None:
        _not_negative(self, "alpha", "beta", "warm_up")
        _positive(self, "T")


@dataclass(frozen=True, kw_only=True)
class FitNetConfig:
    """CE + weight * MSE(regressor(student's map), teacher's map), both of an intermediate stage (arXiv 1412.6550).

    Args:
        weight: 100 in RepDistiller and mdistiller.
        student: path of the student's module whose output is the map; default: its second stage.
        teacher: path of the teacher's module; default: its second stage.
    """

    weight: float = 100.0
    student: str | None = None
    teacher: str | None = None

    def __post_init__(self) -> None:
        _not_negative(self, "weight")


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of each training image that the student sees in one step; the first is the upright one.

    Args:
        kind: rot90 (turned by 90 degrees each, the authors'; wrong where the orientation tells classes apart, as with
            digits, text and traffic signs), crop (further random crops), flip (every second one mirrored) or none (the image
            as it is, one view).
        number: 1, 2 or 4 (4 in the authors' code).
        padding: black pixels around the image, of which each view takes a crop (4 in the authors' code).
        mirror: mirror an image, for all of its views, in half of the cases.
    """

    kind: Literal["rot90", "crop", "flip", "none"] = "rot90"
    number: int = 4
    padding: int = 4
    mirror: bool = True

    def __post_init__(self) -> None:
        if self.number not in (1, 2, 4):
            raise UserError(f"views: number must be 1, 2 or 4, got {self.number}")
        _not_negative(self, "padding")

    @property
    def count(self) -> int:
        """Views of an image."""
        return 1 if self.kind == "none" else self.number


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How images are read.

    Args:
        size: side in pixels that images are brought to; default: as they are (CIFAR, npz), 224 for folders.
        resident_gb: keep the decoded images in memory when they take no more than this; else they are decoded anew by
            worker processes, with random resized crops as is usual for ImageNet.
        val_fraction: share of the training images that is held out to choose the best epoch; 0 reports the last one.
        workers: processes that decode images which are not kept in memory.
        limit: take no more training images than this, the same number of each class; 0 takes all.
    """

    size: int | None = None
    resident_gb: float = 4.0
    val_fraction: float = 0.0
    workers: int = 2
    limit: int = 0

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 8:
            raise UserError(f"size must be at least 8 pixels, got {self.size}")
        _not_negative(self, "resident_gb", "workers", "limit")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be in [0, 1), got {self.val_fraction}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """SGD with momentum, as in the authors' CIFAR-100 runs.

    Args:
        lr: learning rate (0.05; 0.01 for MobileNetV2 and ShuffleNets on CIFAR-100).
        momentum: 0.9.
        weight_decay: 5e-4.
        schedule: step (a tenth at each milestone) or cosine (to zero).
        milestones: epochs after which the rate falls to a tenth; default: 5/8, 6/8 and 7/8 of the epochs, which is the
            authors' 150, 180, 210 of 240.
    """

    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    milestones: list[int] | None = None

    def __post_init__(self) -> None:
        _positive(self, "lr")
        _not_negative(self, "momentum", "weight_decay")

    def drops(self, epochs: int) -> list[int]:
        """Epochs after which the rate falls."""
        return [round(epochs * part / 8) for part in (5, 6, 7)] if self.milestones is None else self.milestones


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of the methods.

    Args:
        pckd: of pckd, ckd and pckd-nokd.
        kd: of kd.
        dkd: of dkd.
        fitnet: of fitnet.
    """

    pckd: PCKDConfig = field(default_factory=PCKDConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    dkd: DKDConfig = field(default_factory=DKDConfig)
    fitnet: FitNetConfig = field(default_factory=FitNetConfig)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training command shares.

    Args:
        data: KIND:PATH (cifar10, cifar100, imagefolder, tinyimagenet, npz), or digits, glyphs.
        student: cifar:NAME (RepDistiller's topologies, such as cifar:resnet8x4), timm:NAME, tv:NAME (torchvision) or
            package.module:function, a function of the number of classes.
        student_weights: file to start from; default: random weights.
        teacher: likewise.
        teacher_weights: the teacher's file (safetensors, or a checkpoint of RepDistiller, mdistiller, SSKD, timm or
            Lightning), the folder of a `pckd train`, or pretrained (timm and tv: the library's own, which it downloads).
        tap: path of the student's classifier layer, where it is not found by itself.
        teacher_tap: path of the teacher's.
        batch_size: images a step on one device; each comes in several views (64).
        reading: settings of the data.
        views: settings of the views.
        optimizer: settings of the optimizer.
        losses: settings of the methods.
    """

    data: str
    student: str
    student_weights: str | None = None
    teacher: str | None = None
    teacher_weights: str | None = None
    tap: str | None = None
    teacher_tap: str | None = None
    batch_size: int = 64
    reading: DataSettings = field(default_factory=DataSettings)
    views: Views = field(default_factory=Views)
    optimizer: Optimizer = field(default_factory=Optimizer)
    losses: Losses = field(default_factory=Losses)

    def __post_init__(self) -> None:
        _positive(self, "batch_size")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings, TrainerConfig):
    """One model, from a teacher or from the labels alone.

    Args:
        method: ce (labels only; trains teachers), kd, dkd, fitnet, ckd (pckd without preview), pckd, pckd-nokd (without
            the logits' term); default: pckd with a teacher, ce without.
        max_epochs: passes over the training data (240 in the authors' runs).
        cache: folder of a `pckd cache`, which then takes the teacher's place.
    """

    method: Method | None = None
    max_epochs: int | None = REFERENCE_EPOCHS
    cache: str | None = None

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        TrainerConfig.__post_init__(self)
        if self.method not in (None, *METHODS):
            raise UserError(f"unknown method '{self.method}': {did_you_mean(str(self.method), METHODS)}")
        if self.max_epochs is None:
            raise UserError("--max_epochs is needed: the schedules go by epochs")
        if self.chosen_method != "ce" and self.teacher is None:
            raise UserError(f"--method {self.chosen_method} needs --teacher and --teacher_weights")
        if self.teacher is not None and self.teacher_weights is None:
            raise UserError("--teacher_weights is missing: a teacher with random weights teaches nothing")

    @property
    def chosen_method(self) -> str:
        """The method, given or by default."""
        return self.method or ("ce" if self.teacher is None else "pckd")

    @property
    def epochs(self) -> int:
        """Passes over the training data."""
        assert self.max_epochs is not None
        return self.max_epochs


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings, TrainerConfig):
    """Several methods on several seeds: the same data, views, steps and optimizer for each.

    Args:
        methods: which ones; differences are taken to the first and to kd.
        seeds: of initialization, data order and augmentation.
        max_epochs: passes over the training data of each student.
        teacher_epochs: without teacher_weights, train the teacher first, on the labels alone, for so many epochs.
    """

    methods: list[Method] = field(default_factory=lambda: ["ce", "kd", "dkd", "ckd", "pckd"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_epochs: int | None = 30
    teacher_epochs: int = 30

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        TrainerConfig.__post_init__(self)
        if self.teacher is None:
            raise UserError("--teacher is missing: a comparison needs one")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError("--methods must name at least one method, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("--seeds must name at least one seed, each once")
        if self.max_epochs is None:
            raise UserError("--max_epochs is needed: the schedules go by epochs")
        _positive(self, "teacher_epochs")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """A trained student on test images.

    Args:
        run: folder of a `pckd train`.
        data: other data than it was trained on, as for train.
        teacher: also measure agreement with this model, the Fisher ratio and the correlation of the centers.
        teacher_weights: its file.
        batch_size: images at once.
        device: auto, cpu, cuda or mps.
    """

    run: str
    data: str | None = None
    teacher: str | None = None
    teacher_weights: str | None = None
    batch_size: int = 256
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The teacher's outputs for k epochs of augmentation, computed once.

    Args:
        data: as for train.
        teacher: as for train.
        teacher_weights: as for train.
        teacher_tap: as for train.
        epochs: k, the number of different augmentations of an image; training then repeats them in turn.
        seed: of the augmentation; train with the same.
        reading: settings of the data; train with the same.
        views: settings of the views; train with the same.
        batch_size: images at once.
        device: auto, cpu, cuda or mps.
    """

    data: str
    teacher: str
    teacher_weights: str
    teacher_tap: str | None = None
    epochs: int = 8
    seed: int = 0
    reading: DataSettings = field(default_factory=DataSettings)
    views: Views = field(default_factory=Views)
    batch_size: int = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def __post_init__(self) -> None:
        _positive(self, "epochs", "batch_size")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """A trained student as a file for elsewhere.

    Args:
        run: folder of a `pckd train`.
        format: safetensors (weights), torch-export (a program that torch.export.load reads) or onnx (pckd[onnx]).
    """

    run: str
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Look-alike letters, test faces held out: what does a small student gain from a teacher, and from which term?

    Args:
        level: quick (mechanics only), default (two minutes) or full (every claim).
        seeds: of everything; default: 0 to 4 at the full level, 0 and 1 at the default one, 0 at the quick one.
        max_epochs: of each student; default by level.
    """

    level: Literal["quick", "default", "full"] = "default"
    seeds: list[int] | None = None
    max_epochs: int | None = None
