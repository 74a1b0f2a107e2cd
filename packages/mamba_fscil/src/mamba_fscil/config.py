"""Every setting of `mamba-fscil`, and the one home of each default. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tenfold.config
from tenfold import UserError
from tenfold.config import (
    Count,
    Device,
    Distinct,
    Ge,
    Length,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Seed,
    Seeds,
    Settings,
    Share,
    TrainerConfig,
)
from tenfold.reading import Reading

Method = Literal["ncm", "teen", "mlp", "frozen-mlp", "ssm", "dual", "mamba-fscil"]
METHODS: tuple[Method, ...] = get_args(Method)
TRAINING_FREE: tuple[Method, ...] = ("ncm", "teen")
"""Arms that learn nothing after the base session but class means."""
Norm = Literal["rms", "fro_over_numel", "mean_square"]
Version = Literal["ssm", "ss2d", "mlp"]
DATA_KINDS = ("cifar10", "cifar100", "imagefolder", "cub200", "miniimagenet", "npz")
"""Layouts on disk."""
EMBEDDED_DATA = ("digits", "glyphs")
"""Data without a file: handwritten digits that scikit-learn ships, letters drawn from matplotlib's fonts."""


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Settings):
    """Shape of the part that learns after the base session.

    Args:
        version: ssm (one Mamba block with shared weights along four paths; CIFAR-100 and miniImageNet), ss2d (a scan with
            parameters of its own for each path; CUB-200) or mlp (the static projector of NC-FSCIL).
        width: width d of an embedding, at least the capacity; default: the channels of the maps.
        states: states N per channel; 256 in the authors' code.
        rank: rank R of the step size; default: width / 16. 256 in the authors' code.
        expand: inner width over width.
        layers: convolutions of the base branch's MLP, 2 or 3.
        inc_layers: convolutions of the incremental branch's MLP, 2 or 3.
    """

    version: Version = "ssm"
    width: Annotated[int, Ge(2)] | None = None
    states: Count = 16
    rank: Count | None = None
    expand: Count = 1
    layers: Literal[2, 3] = 2
    inc_layers: Literal[2, 3] = 2


@dataclass(frozen=True, kw_only=True)
class SessionConfig(Settings):
    """One incremental session: a few steps on the new pictures' maps and the class means of all earlier classes.

    Args:
        steps: number of steps.
        more_steps: further steps per session after the first (10 on miniImageNet and CUB-200 in the authors' code).
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: weight decay; the decays of the scan are exempt unless ``decay_all``.
        decay_all: apply weight decay to everything, as the authors' code does.
        clip_norm: largest norm of the gradient; null leaves it, as the authors' code does.
        batch_size: rows per step.
        copies: times that the mean of an earlier novel class is in an epoch.
        base_copies: times that the mean of a base class is in an epoch; one number, or one per session.
        mix: probability of mixing the embeddings of a step in pairs, half and half.
        balanced: let each class count the same in the classification loss.
        suppression_base: weight of the loss that silences the gate on base rows.
        suppression_novel: weight of the loss that opens it on novel rows.
        separation: weight of the loss that makes the scan's parameters differ between base and novel rows.
        norm: rms (the same for any number of rows), fro_over_numel (the authors' code) or mean_square (the paper's figure).
        virtual_ranks: groups of rows that the two losses are computed over; 8 is what the authors' 8 GPUs give.
        base_lr: learning rate of the base branch over that of the incremental one; 0 freezes it. 0.2 on CUB-200.
        cache: compute the frozen part of each row once per session.
    """

    steps: Count = 200
    more_steps: Natural = 0
    lr: Positive = 0.1
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    decay_all: bool = False
    clip_norm: Positive | None = 1.0
    batch_size: Count = 64
    copies: Count = 1
    base_copies: Annotated[list[Count], Length(1)] = field(default_factory=lambda: [1])
    mix: Probability = 0.5
    balanced: bool = True
    suppression_base: NonNegative = 1.0
    suppression_novel: NonNegative = 0.0
    separation: NonNegative = 0.1
    norm: Norm = "rms"
    virtual_ranks: Count = 1
    base_lr: NonNegative = 0.0
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.virtual_ranks:
            raise UserError(
                f"--session.batch_size {self.batch_size} does not make {self.virtual_ranks} equal groups"
                " (--session.virtual_ranks)"
            )


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Settings):
    """The base session: SGD over backbone and projector.

    Args:
        lr: learning rate.
        backbone_lr: learning rate of the backbone over that of the projector (0.1 on CUB-200).
        momentum: momentum.
        weight_decay: weight decay.
        schedule: course of the learning rate: cosine (to a hundredth), or step (a quarter at each milestone).
        warm_up: share of the steps over which the rate rises.
        milestones: shares of the training after which the rate falls, for the schedule step.
        padding: black pixels around an image in memory, of which each step takes a crop.
        mirror: mirror images in half of the cases; wrong for letters and digits.
        mixup: probability that a batch is mixed in pairs of images.
        cutmix: probability that patches of a batch's images are exchanged.
        extra_term: add the plain loss of the first labels to a mixed batch's, as the authors' code does on CIFAR-100.
        balanced: let each class count the same.
    """

    lr: Positive = 0.1
    backbone_lr: Positive = 1.0
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4
    schedule: Literal["cosine", "step"] = "cosine"
    warm_up: Probability = 0.05
    milestones: list[Share] = field(default_factory=lambda: [0.4, 0.6, 0.7, 0.8, 0.9])
    padding: Natural = 2
    mirror: bool = True
    mixup: Probability = 0.0
    cutmix: Probability = 0.0
    extra_term: bool = False
    balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixup + self.cutmix > 1:
            raise UserError(f"--base.mixup {self.mixup} and --base.cutmix {self.cutmix} are more than 1 together")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig(Settings):
    """How the classes of a data set come: base classes first, then sessions of a few classes with a few pictures each.

    Args:
        base: number of base classes; default: that of the data set's own protocol (60 of CIFAR-100 and miniImageNet, 100 of
            CUB-200, 6 of ten classes), or what a folder holds.
        way: new classes per session.
        shot: pictures of a new class; of a folder, default: all that it holds.
        sessions: number of sessions.
        index_list: folder of lists of few-shot pictures in the layout of CEC (``session_2.txt``...); null draws them by the
            seed.
    """

    base: Annotated[int, Ge(2)] | None = None
    way: Count | None = None
    shot: Count | None = None
    sessions: Count | None = None
    index_list: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSettings(Reading):
    """How images are read.

    Args:
        size: side in pixels that images are brought to; default: 224 for folders and CUB-200, 84 for miniImageNet, and as
            they are for images of arrays.
        limit: largest number of training images per base class; 0 takes all.
    """

    size: Annotated[int, Ge(8)] | None = None
    limit: Natural = 0


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainerConfig):
    """What a training and a comparison share: data, backbone, shape of what learns, and both kinds of sessions.

    Args:
        data: images, as KIND:PATH (cifar10, cifar100, imagefolder, cub200, miniimagenet, npz), or digits or glyphs. An npz
            file may hold maps that were extracted elsewhere.
        backbone: fscil:NAME (resnet12, resnet12-half, resnet18, conv), timm:NAME, tv:NAME, hf:PATH, py:MODULE:FUNCTION or
            packaged:NAME; null for data that are maps.
        backbone_weights: file of the backbone's weights, or "pretrained" for those that timm or torchvision publish.
        freeze: leave the backbone as it is and train the projector alone, on maps that are computed once.
        capacity: number of classes that there can ever be, at most the width; default: twice the base classes, or all that
            the protocol has.
        epochs: passes of the base session over its images.
        batch_size: images per step of the base session.
        workers: processes that decode files.
        protocol: how the classes come.
        projector: shape of what learns.
        base: settings of the base session.
        session: settings of an incremental session.
        reading: settings of the data.
    """

    data: str
    backbone: str | None = None
    backbone_weights: str | None = None
    freeze: bool = False
    capacity: Annotated[int, Ge(2)] | None = None
    epochs: Count | None = 30
    batch_size: Annotated[int, Ge(2)] = 64
    workers: Natural = 2
    clip_norm: Positive | None = 5.0
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    reading: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone_weights is not None and self.backbone is None:
            raise UserError("--backbone_weights needs --backbone")
        if self.validate_every:
            raise UserError("--validate_every: nothing is validated within a base session; evaluate tests a learner")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """Train the base session, and make a learner that can be taught further classes.

    Args:
        learner: folder of the learner, made here; give one that is not there yet.
        method: what learns after the base session: mamba-fscil, dual (without the class-sensitive losses), ssm (one branch,
            fine-tuned), mlp, frozen-mlp, or ncm or teen, which keep class means alone.
        sessions: go on through the sessions of the data.
        base_weights: file of a `mamba-fscil convert`, in place of a training.
        seed: seed of weights, order, augmentation and few-shot pictures.
    """

    learner: str
    method: Method = "mamba-fscil"
    sessions: bool = False
    base_weights: str | None = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """Compare methods over all sessions of the data, on several seeds.

    All methods of a seed share one backbone; the static projector is trained beside the selective one, on detached maps.

    Args:
        arms: the methods to compare.
        seeds: seeds of weights, order, augmentation and few-shot pictures.
        executor: where arms are measured after the base sessions: processes:N of this machine, or dask:ADDRESS; default:
            here, one after another.
    """

    arms: Annotated[list[Method], Length(1), Distinct()] = field(default_factory=lambda: list(METHODS))
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    executor: str | None = None

    def of_seed(self, seed: int) -> TrainSettings:
        """The base session of one seed."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(RunSettings)}
        return TrainSettings(**shared, learner="", seed=seed)


@dataclass(frozen=True, kw_only=True)
class ExtractSettings(Settings):
    """Compute the backbone's maps of all images once, for `npz:OUT/maps.npz`.

    Args:
        data: images, named as for train.
        learner: learner whose backbone computes them.
        backbone: backbone by name, named as for train; in place of a learner.
        backbone_weights: file of its weights, or "pretrained".
        protocol: how the classes come.
        reading: settings of the data.
        seed: seed of the few-shot pictures.
        batch_size: images at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    data: str
    learner: str | None = None
    backbone: str | None = None
    backbone_weights: str | None = None
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    reading: DataSettings = field(default_factory=DataSettings)
    seed: Seed = 0
    batch_size: Count = 64
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.learner is None) == (self.backbone is None):
            raise UserError("expected one of --learner and --backbone")


@dataclass(frozen=True, kw_only=True)
class AddClassSettings(Settings):
    """Teach a learner a new class from a folder of pictures.

    Args:
        learner: folder of the learner, or an older file of it together with --save_as.
        images: folder of the class's pictures; or of one folder per class, for several at once; or an npz file of maps.
        name: name of the class; null takes the names of the folders.
        save_as: folder of a new learner; the old one stays as it is.
        update: learn a class that there is already once more, from these pictures.
        shots: number of pictures per class that is expected; default: as many as there are.
        steps: steps of the session; default: as the learner was made.
        seed: seed of order and mixing.
        data: test pictures, imagefolder:DIR of one folder per class, that the table is measured on; default: the mean
            map of each old class, and the new pictures themselves.
        device: where to compute; auto takes a GPU when there is one.
        skip_bad: leave out pictures that cannot be decoded.
    """

    learner: str
    images: str
    name: str | None = None
    save_as: str | None = None
    update: bool = False
    shots: Count | None = None
    steps: Count | None = None
    seed: Seed = 0
    data: str | None = None
    device: Device = "auto"
    skip_bad: bool = False


@dataclass(frozen=True, kw_only=True)
class PredictSettings(Settings):
    """Name the classes of pictures.

    Args:
        learner: folder of the learner, or an older file of it.
        images: a picture, a folder of pictures, or an npz file of maps.
        top: number of classes that are named for each.
        batch_size: images at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    learner: str
    images: str
    top: Count = 3
    batch_size: Count = 64
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Measure a learner on test pictures: base and novel classes, calibration, confusions.

    Args:
        learner: folder of the learner, or an older file of it.
        data: test pictures, named as for train; the test part is taken. Classes are matched by name.
        protocol: how the classes come, as for train.
        reading: settings of the data; the size is the learner's, and all test pictures are taken.
        batch_size: images at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    learner: str
    data: str
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    reading: DataSettings = field(default_factory=DataSettings)
    batch_size: Count = 64
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading.limit:
            raise UserError("--reading.limit: it limits training images; evaluate takes all test pictures")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show a learner: classes, room for more, files, and how its gate tells base classes from novel ones.

    Args:
        learner: folder of the learner, or an older file of it.
    """

    learner: str


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Bring a checkpoint of the authors' code to our names, for `train --base_weights`.

    Args:
        weights: the authors' checkpoint.
    """

    weights: str


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write a learner's classifier for elsewhere.

    Args:
        learner: folder of the learner, or an older file of it.
        format: safetensors (weights), torch-export (a program that torch.export.load reads) or onnx (mamba-fscil[onnx]).
    """

    learner: str
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Show on letters of unseen typefaces, and on handwritten digits, what each method keeps and what it learns.

    Args:
        seeds: seeds of everything; default: 0 at the quick level, 0 and 1 at the default one, 0 to 4 at the full one.
        processes: processes that train and measure at once, one thread each.
    """

    processes: Count = 2
