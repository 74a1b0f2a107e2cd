"""Every setting of `pckd`, and the one home of each default. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tenfold.config
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
    Seed,
    Seeds,
    SettingError,
    Settings,
    TrainerConfig,
)
from tenfold.reading import Reading

Method = Literal["ce", "kd", "dkd", "fitnet", "ckd", "pckd", "pckd-nokd"]
METHODS: tuple[str, ...] = get_args(Method)
DATA_KINDS = ("cifar10", "cifar100", "imagefolder", "tinyimagenet", "npz")
"""Layouts on disk."""
EMBEDDED_DATA = ("digits", "glyphs")
"""Data without a file: handwritten digits that scikit-learn ships, letters drawn from matplotlib's fonts."""
REFERENCE_EPOCHS = 240
"""Length of the authors' CIFAR-100 runs, which the schedules are given for."""


@dataclass(frozen=True, kw_only=True)
class Preview(Settings):
    """How much a sample counts: 1 while gamma <= t_e, else a small weight; t_e = base^e lets hard ones in with time.

    gamma is a sample's cross-entropy over the mean of its batch.

    Args:
        base: base of the threshold t_e = base^e of epoch e = 1, 2, ...; 1.005 in the authors' code.
        scale_to: the threshold of the last epoch is base^scale_to however long the run is (240 as in the authors' runs;
            a run of 240 epochs is theirs exactly); 0 takes the plain epoch.
        tail: weight beyond the threshold. exp2 is exp(-gamma^2), the authors'; smooth is exp(1 - (gamma / t_e)^2), ours,
            without a jump; none weighs every sample 1, which makes pckd into ckd.
        normalize: divide the weights by their mean, so that preview does not lower the loss's scale (ours).
        detach: no gradient through the weights. false is the authors' code, which lets it through in the term of the logits:
            a sample that is held back then also lowers the loss by becoming harder, since v falls with its cross-entropy.
        targets: terms that are weighted; cc is the category contrast, kd the logits' term. The authors weight both.
    """

    base: Annotated[float, Ge(1)] = 1.005
    scale_to: Natural = REFERENCE_EPOCHS
    tail: Literal["exp2", "smooth", "none"] = "exp2"
    normalize: bool = False
    detach: bool = True
    targets: list[Literal["cc", "kd"]] = field(default_factory=lambda: ["cc", "kd"])

    def threshold(self, epoch: int, epochs: int = REFERENCE_EPOCHS) -> float:
        """t_e for the 1-based ``epoch`` of ``epochs``.

        Raises:
            ValueError: the epoch is below 1.
        """
        if epoch < 1:
            raise ValueError(f"epochs are 1-based, got {epoch}")
        return float(self.base ** (epoch * self.scale_to / epochs if self.scale_to else epoch))


@dataclass(frozen=True, kw_only=True)
class PCKDConfig(Settings):
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
        preview: settings of the preview weights.
    """

    alpha: NonNegative = 1.0
    beta: NonNegative = 0.05
    delta: NonNegative = 1.0
    f: NonNegative = 20.0
    T: Positive = 4.0
    tau: Positive = 4.0
    tau0: Positive = 0.07
    contrast: Literal["relation", "center"] = "relation"
    center_align: Literal["same-dim", "gram"] = "same-dim"
    align_hidden: str = "16x"
    normalize_relations: bool = False
    eps: Positive | None = None
    gram: Literal["auto", "never", "always"] = "auto"
    gather: bool = True
    preview: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        super().__post_init__()
        hidden = str(self.align_hidden)
        if hidden != "auto" and not (hidden.removesuffix("x").isdigit() and int(hidden.removesuffix("x")) > 0):
            raise SettingError("align_hidden", f"expected 16x, auto or a number of units, got '{hidden}'")

    def hidden_width(self, teacher_width: int) -> int:
        """Units of the hidden layer of the feature alignment."""
        if self.align_hidden == "auto":
            return min(16 * teacher_width, 4096)
        number = int(str(self.align_hidden).removesuffix("x"))
        return number * teacher_width if str(self.align_hidden).endswith("x") else number


@dataclass(frozen=True, kw_only=True)
class KDConfig(Settings):
    """ce * CE + kd * T^2 KL(teacher, student).

    Args:
        ce: weight of the cross-entropy (0.1 on CIFAR in RepDistiller and mdistiller; 0.5 on ImageNet).
        kd: weight of the divergence (0.9; 0.5 on ImageNet).
        T: temperature (4; 1 on ImageNet).
    """

    ce: NonNegative = 0.1
    kd: NonNegative = 0.9
    T: Positive = 4.0


@dataclass(frozen=True, kw_only=True)
class DKDConfig(Settings):
    """CE + w(e) (alpha TCKD + beta NCKD), the decoupled divergence (arXiv 2203.08679).

    Args:
        alpha: weight of the target's part (1).
        beta: weight of the other classes' part (8; 2 or 6 for some pairs; 0.5 on ImageNet).
        T: temperature (4; 1 on ImageNet).
        warm_up: epochs over which w rises to 1, of a run of 240 (20); shorter runs have a proportional share.
    """

    alpha: NonNegative = 1.0
    beta: NonNegative = 8.0
    T: Positive = 4.0
    warm_up: NonNegative = 20.0


@dataclass(frozen=True, kw_only=True)
class FitNetConfig(Settings):
    """CE + weight * MSE(regressor(student's map), teacher's map), both of an intermediate stage (arXiv 1412.6550).

    Args:
        weight: weight of the squared error (100 in RepDistiller and mdistiller).
        student: path of the student's module whose output is the map; default: its second stage.
        teacher: path of the teacher's module; default: its second stage.
    """

    weight: NonNegative = 100.0
    student: str | None = None
    teacher: str | None = None


@dataclass(frozen=True, kw_only=True)
class Views(Settings):
    """The views of each training image that the student sees in one step; the first is the upright one.

    They are the same for images in memory and for files that are decoded as needed.

    Args:
        kind: rot90 (turned by 90 degrees each, the authors'; wrong where the orientation tells classes apart, as with
            digits, text and traffic signs), crop (further random crops), flip (every second one mirrored) or none (the image
            as it is, one view).
        number: number of views, 1, 2 or 4 (4 in the authors' code).
        crop: padded (out of black pixels around the image, the authors') or resized (a random part, scaled, as is usual for
            ImageNet; each view its own where the kind is crop, else one for all); auto is resized from 128 pixels on.
        padding: black pixels around the image, of which each padded view takes a crop (4 in the authors' code).
        area: least share of the image's area of a resized crop (0.08, Szegedy et al. 2015).
        mirror: whether to mirror an image, for all of its views, in half of the cases.
        auto_augment: a policy of timm before the views, such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or original; default:
            none.
    """

    kind: Literal["rot90", "crop", "flip", "none"] = "rot90"
    number: Literal[1, 2, 4] = 4
    crop: Literal["auto", "padded", "resized"] = "auto"
    padding: Natural = 4
    area: Annotated[float, Interval(gt=0, le=1)] = 0.08
    mirror: bool = True
    auto_augment: str | None = None

    def resized(self, size: int) -> bool:
        """Whether crops of images of this side are scaled parts."""
        return self.kind != "none" and (self.crop == "resized" or (self.crop == "auto" and size >= 128))

    @property
    def count(self) -> int:
        """Views of an image."""
        return 1 if self.kind == "none" else self.number


@dataclass(frozen=True, kw_only=True)
class DataSettings(Reading):
    """How images are read.

    Args:
        size: side in pixels that images are brought to; default: as they are (CIFAR, npz), 224 for folders.
        channels: channels that images are brought to: 1 (gray), 3, or 4 (npz of four channels only); default: 3 for gray
            images, else as they are.
        resident_gb: memory for the decoded images; where they take more, worker processes decode them again for each
            epoch.
        val_fraction: share of the training images that is held out to choose the best epoch; 0 reports the last one.
        limit: largest number of training images, the same number of each class; 0 takes all.
    """

    size: Annotated[int, Ge(8)] | None = None
    channels: Literal[1, 3, 4] | None = None
    resident_gb: NonNegative = 4.0
    val_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    limit: Natural = 0


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """SGD with momentum, as in the authors' CIFAR-100 runs, or AdamW.

    Args:
        name: sgd or adamw.
        lr: learning rate (0.05; 0.01 for MobileNetV2 and ShuffleNets on CIFAR-100; 1e-3 is a beginning for adamw).
        momentum: momentum of sgd (0.9).
        weight_decay: weight decay (5e-4; 0.05 is usual for adamw).
        no_decay: parts of names of parameters that are not decayed, such as bias, pos_embed or cls_token; 1d stands for all
            of one dimension (biases and norms).
        schedule: course of the learning rate: step (a tenth at each milestone) or cosine (to zero).
        milestones: epochs after which the rate falls to a tenth; default: 5/8, 6/8 and 7/8 of the epochs, which is the
            authors' 150, 180, 210 of 240.
        warm_up: epochs over which the rate rises linearly to lr; the schedule takes the rest.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    no_decay: list[str] = field(default_factory=list)
    schedule: Literal["step", "cosine"] = "step"
    milestones: list[Count] | None = None
    warm_up: Natural = 0

    def drops(self, epochs: int) -> list[int]:
        """Epochs after which the rate falls."""
        return [round(epochs * part / 8) for part in (5, 6, 7)] if self.milestones is None else self.milestones


@dataclass(frozen=True, kw_only=True)
class Mixing(Settings):
    """Mixtures of two images of a batch, for methods whose terms take soft labels: ce, kd and fitnet.

    Args:
        mixup: alpha of Beta(alpha, alpha), the share of the first image (0.2 and 0.8 are usual); 0 mixes none.
        cutmix: likewise for a rectangle of the second image in the first (1 is usual); 0 cuts none.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0

    @property
    def on(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class Losses(Settings):
    """Settings of the methods.

    Args:
        pckd: settings of pckd, ckd and pckd-nokd.
        kd: settings of kd.
        dkd: settings of dkd.
        fitnet: settings of fitnet.
    """

    pckd: PCKDConfig = field(default_factory=PCKDConfig)
    kd: KDConfig = field(default_factory=KDConfig)
    dkd: DKDConfig = field(default_factory=DKDConfig)
    fitnet: FitNetConfig = field(default_factory=FitNetConfig)


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """The model to learn from, or to compare with.

    Args:
        teacher: the teacher, named as --student is.
        teacher_args: further arguments of the teacher, such as '{img_size: 64}'.
        teacher_weights: the teacher's file (safetensors, or a checkpoint of RepDistiller, mdistiller, SSKD, timm or
            Lightning), the folder of a `pckd train`, or pretrained (timm and tv: the library's own, which it downloads).
        teacher_mean: mean of the pixels in [0, 1] per channel that the teacher expects; default: what its folder says, else
            what its configuration in timm or torchvision says, else that of the data.
        teacher_std: their standard deviation, likewise.
        teacher_tap: path of the teacher's classifier layer, where it is not found by itself.
    """

    teacher: str | None = None
    teacher_args: dict[str, Any] = field(default_factory=dict)
    teacher_weights: str | None = None
    teacher_mean: list[float] | None = None
    teacher_std: list[Positive] | None = None
    teacher_tap: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        mean, std = self.teacher_mean, self.teacher_std
        if (mean is None) != (std is None) or (mean is not None and std is not None and len(mean) != len(std)):
            raise UserError("--teacher_mean and --teacher_std go together, one number per channel each")
        if self.teacher is None and self.teacher_weights is not None:
            raise UserError("--teacher_weights is given without --teacher")

    def check_teacher(self, method: str) -> None:
        """Refuse a teacher without weights, and a method without a teacher.

        Raises:
            UserError: either.
        """
        if method != "ce" and self.teacher is None:
            raise UserError(f"--method {method} needs --teacher and --teacher_weights")
        if self.teacher is not None and self.teacher_weights is None and not self.brings_weights:
            raise UserError("--teacher_weights is missing: a teacher with random weights teaches nothing")

    @property
    def brings_weights(self) -> bool:
        """Whether the teacher's name stands for weights as well."""
        return (self.teacher or "").partition(":")[0] in {"hf", "packaged"}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(TeacherSettings):
    """Data, models and losses: what a training and a look at one batch share.

    Args:
        data: images, as KIND:PATH (cifar10, cifar100, imagefolder, tinyimagenet, npz), or digits or glyphs.
        student: the model to train: cifar:NAME (RepDistiller's topologies, such as cifar:resnet8x4), timm:NAME, tv:NAME
            (torchvision), hf:PATH (transformers), packaged:NAME, or py:MODULE:FUNCTION, a function of the number of classes.
        student_args: further arguments of the student, such as '{drop_path_rate: 0.1}'.
        student_weights: file of weights to start from, or pretrained; where they are of other classes, the classifier starts
            anew; default: random weights.
        tap: path of the student's classifier layer (of two, joined by a comma), where it is not found by itself.
        batch_size: images per step on one device; each comes in several views (64).
        reading: settings of the data.
        views: settings of the views.
        losses: settings of the methods.
    """

    data: str
    student: str
    student_args: dict[str, Any] = field(default_factory=dict)
    student_weights: str | None = None
    tap: str | None = None
    batch_size: Count = 64
    reading: DataSettings = field(default_factory=DataSettings)
    views: Views = field(default_factory=Views)
    losses: Losses = field(default_factory=Losses)


@dataclass(frozen=True, kw_only=True)
class RunSettings(ModelSettings, TrainerConfig):
    """What every training shares.

    Args:
        epochs: passes over the training data (240 in the authors' runs); the schedules go by them.
        steps: updates of the weights after which a training ends early; default: none.
        workers: processes that decode or augment images outside of the training process.
        head_epochs: epochs at the beginning in which the student's classifier and the heads of the loss are trained alone.
        balanced: draw as many images of each class, with repetition where there are fewer.
        label_smoothing: share of the labels that is spread over all classes in the cross-entropy.
        ema: decay per step of a moving average of the student's weights, which is then tested and saved; default: none.
        optimizer: settings of the optimizer.
        mixing: settings of mixup and cutmix.
    """

    epochs: Count = REFERENCE_EPOCHS
    workers: Natural = 2
    head_epochs: Natural = 0
    balanced: bool = False
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Interval(gt=0, lt=1)] | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    mixing: Mixing = field(default_factory=Mixing)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """Train a student from a teacher, or a teacher from the labels.

    Args:
        method: ce (labels only; trains teachers), kd, dkd, fitnet, ckd (pckd without preview), pckd, pckd-nokd (without
            the logits' term); default: pckd with a teacher, ce without.
        seed: seed of weights, data order, augmentation and dropout.
        cache: folder of a `pckd cache`, which then takes the teacher's place.
    """

    method: Method | None = None
    seed: Seed = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher(self.chosen_method)
        _check_mixing(self.mixing, [self.chosen_method])
        if self.cache is not None and self.teacher is None:
            raise UserError("--cache needs --teacher and --teacher_weights, which it is checked against")
        if self.cache is not None and (self.mixing.on or self.views.auto_augment):
            raise UserError(
                "--cache holds the teacher's outputs for plain views: no --mixing and no --views.auto_augment"
            )

    @property
    def chosen_method(self) -> str:
        """The method, given or by default."""
        return self.method or ("ce" if self.teacher is None else "pckd")


SOFT = ("ce", "kd", "fitnet")
"""Methods whose terms take soft labels."""


def _check_mixing(mixing: Mixing, methods: list[str]) -> None:
    odd = [method for method in methods if method not in SOFT]
    if mixing.on and odd:
        raise UserError(
            f"--mixing makes soft labels, which {', '.join(odd)} cannot take (a term asks for one class): use"
            f" {', '.join(SOFT)}"
        )


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """Compare methods over seeds on your images, with paired intervals.

    All arms get the same data, views, steps and optimizer.

    Args:
        arms: methods to compare; differences are taken to the first and to kd.
        seeds: seeds of initialization, data order and augmentation.
        epochs: passes over the training data of each student.
        teacher_epochs: passes over the training data of the teacher, which is trained first on the labels alone where
            teacher_weights are not given.
        executor: where arms are measured: processes:N of this machine, or dask:ADDRESS; default: here, one after another,
            each resumed within its training after a kill.
    """

    arms: Annotated[list[Method], Length(1), Distinct()] = field(
        default_factory=lambda: ["ce", "kd", "dkd", "ckd", "pckd"]
    )
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    epochs: Count = 30
    teacher_epochs: Count = 30
    executor: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None:
            raise UserError("--teacher is missing: a comparison needs one")
        _check_mixing(self.mixing, list(self.arms))

    def of_arm(self, method: Method, seed: int, teacher_weights: str | None) -> TrainSettings:
        """The training of one arm, with the weights of its teacher."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(RunSettings)}
        return TrainSettings(**{**shared, "teacher_weights": teacher_weights, "method": method, "seed": seed})

    def of_teacher(self) -> TrainSettings:
        """The training of the teacher: on the labels alone, one view per image, with the optimizer of the students."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(RunSettings)}
        own: dict[str, Any] = {
            "student": self.teacher,
            "student_args": self.teacher_args,
            "student_weights": None,
            "tap": self.teacher_tap,
            "epochs": self.teacher_epochs,
        }
        own |= {"teacher": None, "teacher_args": {}, "teacher_weights": None}
        own |= {"teacher_mean": None, "teacher_std": None, "views": dataclasses.replace(self.views, number=1)}
        return TrainSettings(**{**shared, **own}, method="ce", seed=min(self.seeds))


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(TeacherSettings):
    """Measure a trained student: accuracy, classes, confusions, geometry.

    With a teacher, also its accuracy, the agreement, its Fisher ratio and the correlation of the centers.

    Args:
        run: folder of a `pckd train`.
        data: other data than it was trained on, named as for train.
        batch_size: images at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    data: str | None = None
    batch_size: Count = 256
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher("ce")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(ModelSettings):
    """Show layers, heads and the size of each term on one batch.

    Args:
        method: ce, kd, dkd, fitnet, ckd, pckd or pckd-nokd; default: pckd with a teacher, ce without.
        epochs: passes over the training data that the schedules of the terms are for.
        seed: seed of the student's weights and of the views.
    """

    method: Method | None = None
    epochs: Count = REFERENCE_EPOCHS
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher(self.chosen_method)

    @property
    def chosen_method(self) -> str:
        """The method, given or by default."""
        return self.method or ("ce" if self.teacher is None else "pckd")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(TeacherSettings):
    """Keep the teacher's outputs for some epochs of augmentation, so that training need not run it.

    Args:
        data: images, named as for train.
        teacher: the model to learn from, named as for train.
        epochs: number of different augmentations of an image; training then repeats them in turn.
        seed: seed of the augmentation; train with the same.
        reading: settings of the data; train with the same.
        views: settings of the views; train with the same.
        batch_size: images at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    data: str
    teacher: str = field()
    epochs: Count = 8
    seed: Seed = 0
    reading: DataSettings = field(default_factory=DataSettings)
    views: Views = field(default_factory=Views)
    batch_size: Count = 64
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_teacher("kd")
        if self.views.auto_augment:
            raise UserError(
                "--views.auto_augment: a cache holds plain views, whose images training makes again by themselves"
            )


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write a trained student for elsewhere.

    Args:
        run: folder of a `pckd train`.
        format: safetensors (weights), torch-export (a program that torch.export.load reads) or onnx (pckd[onnx]).
    """

    run: str
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Show on look-alike letters what a small student gains from a teacher, and from which term.

    Args:
        seeds: seeds of everything; default: 0 at the quick level, 0 and 1 at the default one, 0 to 4 at the full one.
        epochs: passes over the training data of each student; default: by level.
    """

    epochs: Count | None = None
