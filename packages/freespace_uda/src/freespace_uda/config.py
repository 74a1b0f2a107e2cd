"""Every setting of `freespace-uda`, and the one home of each default. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

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
    Probability,
    Seed,
    Seeds,
    SettingError,
    Settings,
    Share,
    TrainerConfig,
)

DATA_KINDS = ("kitti-road", "orfd", "r2d", "vkitti2", "synthia", "carla", "manifest")
"""Layouts on disk."""
EMBEDDED_DATA = ("roads-flat", "roads-noisy", "roads-city", "roads-real")
"""Rendered worlds."""
Unit = Literal["m", "cm", "mm", "m/256", "carla", "disparity", "disparity/16", "disparity/256"]
Palette = Literal[
    "auto", "binary", "kitti-road", "orfd", "vkitti2", "synthia", "synthia-rand", "cityscapes", "cityscapes-train",
    "cityscapes-colors", "mapillary", "mapillary-2.0", "carla-0.9.13", "carla-0.9.14",
]  # fmt: skip
NormalMethod = Literal["plane", "sne", "3f2n", "d2nt"]
Method = Literal[
    "source-only", "adabn", "minent", "advent", "adaptsegnet", "fada", "self-training", "ccg", "ccg-sfa", "ccg-sfa-ema",
    "oracle",
]  # fmt: skip
Arm = Literal[
    "rgb", "normals", "both", "adabn", "minent", "advent", "adaptsegnet", "fada", "self-training", "ccg", "ccg-sfa",
    "ccg-sfa-class", "ccg-sfa-all", "ccg-sfa-ema", "oracle",
]  # fmt: skip
GUIDED = ("ccg", "ccg-sfa", "ccg-sfa-ema", "oracle")
"""Methods with cross guidance."""
ALIGNED = ("ccg-sfa", "ccg-sfa-ema")
"""Methods that align the foreground."""
Pixels = Annotated[int, Ge(32)]


@dataclass(frozen=True, kw_only=True)
class SceneReading(Settings):
    """How pictures, depth and labels are read.

    Args:
        depth_unit: unit of the depth files; null takes the layout's own (manifest: its column depth_unit).
        depth_scale: meters per number in the depth files, in place of a unit, such as 0.0001.
        ray: whether depth is the distance along the ray, not along z; null takes the layout's own (no).
        far: meters from which there is nothing, such as the sky of a simulator.
        baseline: meters between the cameras of a disparity.
        offset: pixels by which the principal points of a stereo pair differ (cx_left - cx_right), for a disparity.
        intrinsics: fx, fy, cx, cy of all pictures, where no file has them.
        fov: horizontal field of view in degrees, for recordings of CARLA.
        palette: colors or ids of the labels; auto takes the layout's own, or tells CARLA's version from the pictures.
        road_ids: label ids that are drivable, in place of the palette's.
        split: part of the data: train, val or test; null takes train for training and test for evaluation, or all where
            there are no
            parts.
        scenes: number of rendered scenes, for embedded data.
        size: width and height of rendered scenes.
        world_seed: seed of the rendered world.
        limit: largest number of pictures, evenly spaced; null takes all.
    """

    depth_unit: Unit | None = None
    depth_scale: Positive | None = None
    ray: bool | None = None
    far: Positive = 200.0
    baseline: Positive | None = None
    offset: float = 0.0
    intrinsics: Annotated[list[float], Length(4, 4)] | None = None
    fov: Annotated[float, Interval(gt=0, lt=180)] | None = None
    palette: Palette = "auto"
    road_ids: Annotated[list[Natural], Length(1), Distinct()] | None = None
    split: Literal["train", "val", "test", "all"] | None = None
    scenes: Count = 60
    size: tuple[Pixels, Pixels] = (160, 64)
    world_seed: Seed = 0
    limit: Count | None = None


@dataclass(frozen=True, kw_only=True)
class NormalSettings(Settings):
    """How depth becomes normals.

    Args:
        method: plane (closed form), sne, 3f2n or d2nt.
        edges: weight differences at jumps of depth.
        fill: fill holes from their surroundings, at validity 0.5.
    """

    method: NormalMethod = "plane"
    edges: bool = False
    fill: bool = False


@dataclass(frozen=True, kw_only=True)
class Alignment(Settings):
    """Selective alignment of the methods `ccg-sfa` and `ccg-sfa-ema`.

    Args:
        mask_mode: which pixels are aligned: cross (where the other modality is sure of road), class (where all heads are),
            agreement, intersection, or all.
        tau: confidence from which a pixel counts as road.
        min_pixels: pixels that a mask needs at least.
        weight: weight of the adversarial loss; that of FADA, AdvEnt and AdaptSegNet's main output, the paper's is not known.
        hidden: width of the discriminators' bottleneck; 0 takes the full 3 x 3 convolutions of FADA.
        start: share of the steps after which alignment begins.
        ramp: share of the steps over which it grows.
    """

    mask_mode: Literal["cross", "class", "agreement", "intersection", "all"] = "cross"
    tau: Annotated[float, Interval(ge=0, lt=1)] = 0.8
    min_pixels: Count = 64
    weight: NonNegative = 1e-3
    hidden: Natural = 128
    start: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    ramp: Annotated[float, Interval(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class General(Settings):
    """Weights and constants of the general adaptation methods.

    Args:
        minent: weight of the entropy, as published for MinEnt.
        advent: weight of AdvEnt's adversarial loss, as published.
        adaptsegnet: weight of AdaptSegNet's adversarial loss, as published for its main output.
        fada: weight of FADA's adversarial loss, as published.
        self_training: weight of the pseudo-labels of `self-training` and `ccg-sfa-ema`, as in DACS.
        threshold: probability from which a teacher counts as sure.
        temperature: temperature of FADA's soft labels.
        clip: largest soft label of FADA.
        width: channels of the first layer of the discriminators of AdvEnt and AdaptSegNet.
    """

    minent: NonNegative = 1e-3
    advent: NonNegative = 1e-3
    adaptsegnet: NonNegative = 1e-3
    fada: NonNegative = 1e-3
    self_training: NonNegative = 1.0
    threshold: Annotated[float, Interval(gt=0.5, lt=1)] = 0.968
    temperature: Positive = 1.8
    clip: Annotated[float, Interval(gt=0.5, le=1)] = 0.9
    width: Count = 64


@dataclass(frozen=True, kw_only=True)
class Augment(Settings):
    """Augmentation, the same for every method; depth faults are drawn on the source alone, whose depth is too good.

    Args:
        color: strength of brightness, contrast and saturation.
        hue: strength of the change of hue, in turns.
        gray: share of the pictures that lose their color.
        gamma: largest change of the gamma, as a factor.
        blur: share of the pictures that are blurred.
        flip: share of the pictures that are mirrored.
        depth_noise: relative deviation of depth.
        depth_square: deviation of depth per squared meter.
        dropout: share of the pixels that lose their depth.
        holes: largest number of rectangles without depth.
        no_depth: share of the pictures that lose all depth.
        no_rgb: share of the pictures that lose RGB (a gray picture remains).
    """

    color: NonNegative = 0.5
    hue: Annotated[float, Interval(ge=0, le=0.5)] = 0.2
    gray: Probability = 0.2
    gamma: Annotated[float, Ge(1)] = 1.25
    blur: Probability = 0.2
    flip: Probability = 0.5
    depth_noise: NonNegative = 0.004
    depth_square: NonNegative = 0.0012
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.04
    holes: Natural = 5
    no_depth: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    no_rgb: Annotated[float, Interval(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """Two optimizers, one of the network and one of the discriminators, both with a polynomial decay.

    Args:
        kind: sgd (momentum 0.9) or adam, for the network.
        lr: learning rate of the network.
        head: factor of the rate of what is not an encoder.
        weight_decay: weight decay of the network.
        discriminator: learning rate of the discriminators (Adam, betas 0.9 and 0.99).
        power: exponent of the decay.
        warm_up: share of the steps over which the rates rise.
        clip_norm: largest norm of the network's gradient; null leaves it.
        ema: decay of the averaged weights, which are those that are evaluated and exported.
    """

    kind: Literal["sgd", "adam"] = "sgd"
    lr: Positive = 2.5e-4
    head: Positive = 10.0
    weight_decay: NonNegative = 5e-4
    discriminator: Positive = 1e-4
    power: NonNegative = 0.9
    warm_up: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    clip_norm: Positive | None = 10.0
    ema: Annotated[float, Interval(ge=0, lt=1)] = 0.999


@dataclass(frozen=True, kw_only=True)
class NetSettings(Settings):
    """The network, as it is built and built again.

    Args:
        rgb_encoder: encoder of RGB: timm:NAME, packaged:lite0, or freespace:tiny, freespace:small, freespace:medium.
        normal_encoder: encoder of the normals; default: the same (a small one of ours for packaged encoders).
        pretrained: whether timm's published weights are asked for (a download where they are not cached).
        streams: both, or rgb or normals alone.
        guidance: form of the cross guidance: tokens or channel.
        tokens: tokens of each stream.
        fusion: concat or sum.
        width: channels of the decoder.
        norm: group (batch normalization is replaced), frozen (its statistics rest), or auto: frozen for pretrained weights.
        size: width and height at which the network looks, multiples of 32; results are at the pictures' own size.
        normals: settings of the normals.
    """

    rgb_encoder: str = "timm:resnet50"
    normal_encoder: str | None = None
    pretrained: bool = False
    streams: Literal["both", "rgb", "normals"] = "both"
    guidance: Literal["tokens", "channel"] = "tokens"
    tokens: Annotated[int, Ge(1)] = 2
    fusion: Literal["concat", "sum"] = "concat"
    width: Count = 128
    norm: Literal["auto", "group", "frozen"] = "auto"
    size: tuple[Pixels, Pixels] = (1248, 384)
    normals: NormalSettings = field(default_factory=NormalSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % 32 for side in self.size):
            raise SettingError("size", f"expected multiples of 32, got {self.size[0]},{self.size[1]}")


@dataclass(frozen=True, kw_only=True)
class RunSettings(NetSettings, TrainerConfig):
    """What every training shares.

    Args:
        data: labeled source, as KIND:DIR (kitti-road, orfd, r2d, vkitti2, synthia, carla), manifest:FILE.csv, or a
            rendered world
            (roads-flat, roads-noisy, roads-city, roads-real).
        target: unlabeled target, named likewise; its labels are read by the method oracle alone.
        steps: updates of the network; with --epochs, passes over the source, what is reached first ends the training.
        batch_size: pictures of each domain per step.
        select_by: how the checkpoint is chosen without labels: agreement (of both modalities, and sureness), entropy, or last.
        validate_every: steps between two candidates for the choice; 0 takes a tenth of the steps.
        watched: unlabeled target pictures that the choice looks at.
        workers: processes that read ahead.
        aux: weight of the losses of the single-modality heads.
        token: weight of the loss that ties token 0 to road and token 1 to the rest.
        reading: how the source is read.
        target_reading: how the target is read.
        align: settings of the alignment.
        general: settings of the general methods.
        augment: settings of the augmentation.
        optimizer: settings of the optimizers.
    """

    data: str
    target: str = "roads-real"
    steps: Count | None = 40000
    batch_size: Count = 4
    select_by: Literal["agreement", "entropy", "last"] = "agreement"
    validate_every: Natural = 0
    watched: Count = 32
    workers: Natural = 0
    aux: NonNegative = 0.4
    token: NonNegative = 0.1
    reading: SceneReading = field(default_factory=SceneReading)
    target_reading: SceneReading = field(default_factory=SceneReading)
    align: Alignment = field(default_factory=Alignment)
    general: General = field(default_factory=General)
    augment: Augment = field(default_factory=Augment)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate != 1:
            raise SettingError("accumulate", "expected 1: two optimizers take turns here")
        if self.clip_norm is not None:
            raise SettingError("clip_norm", "expected null: --optimizer.clip_norm bounds the network's gradient")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """Train on labeled simulator scenes and unlabeled real ones.

    Args:
        method: source-only, adabn, minent, advent, adaptsegnet, fada, self-training, ccg, ccg-sfa (the method), ccg-sfa-ema, or
            oracle (target labels).
        seed: seed of weights, order and augmentation.
        normal_cache: folder of a `freespace-uda normals` of the source, read in place of computing.
        target_cache: folder of a `freespace-uda normals` of the target.
    """

    method: Method = "ccg-sfa"
    seed: Seed = 0
    normal_cache: str | None = None
    target_cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.method, self)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """Compare methods over seeds on a target that has test labels, with paired intervals.

    Args:
        arms: rgb, normals, both (source only), adabn, minent, advent, adaptsegnet, fada, self-training, ccg, ccg-sfa,
            ccg-sfa-class,
            ccg-sfa-all (other masks), ccg-sfa-ema, oracle; the first is what the others are compared with.
        seeds: seeds of weights, order and augmentation.
        executor: where seeds are measured: processes:N of this machine, or dask:ADDRESS; default: here, one after another.
        test_reading: how the labeled test part of the target is read.
    """

    arms: Annotated[list[Arm], Length(1), Distinct()] = field(default_factory=lambda: ["both", "ccg", "ccg-sfa"])
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    executor: str | None = None
    test_reading: SceneReading = field(default_factory=lambda: SceneReading(split="test"))


@dataclass(frozen=True, kw_only=True)
class WithModel(Settings):
    """A trained model.

    Args:
        run: folder of a `freespace-uda train`.
        batch_size: pictures at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    batch_size: Count = 4
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(WithModel):
    """Measure a model on labeled pictures: F1, MaxF, AP, IoU, by distance, and from above.

    Args:
        data: labeled pictures, named as for train.
        reading: how they are read.
        bev: also count in the bird's-eye view; needs calibration files with the road transform, or rendered scenes.
        missing: leave out a modality: depth or rgb; default: none.
        seed: seed of the bootstrap over scenes.
    """

    data: str
    reading: SceneReading = field(default_factory=lambda: SceneReading(split="test"))
    bev: bool = False
    missing: Literal["depth", "rgb"] | None = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class PredictSettings(WithModel):
    """Write mask, overlay, confidence and normals of one picture or of a data set.

    Args:
        rgb: picture; or give --data.
        depth: its depth file.
        calibration: its camera: a file of KITTI, ROS, OpenCV, COLMAP, RealSense, or of numbers; or give --reading.intrinsics.
        data: pictures, named as for train; labels are not read.
        reading: how they are read.
        threshold: probability from which a pixel is road.
    """

    rgb: str | None = None
    depth: str | None = None
    calibration: str | None = None
    data: str | None = None
    reading: SceneReading = field(default_factory=SceneReading)
    threshold: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None and self.rgb is None and self.depth is None:
            raise UserError("expected --data, or --rgb and --depth (one of them is enough)")
        if self.data is not None and (self.rgb is not None or self.depth is not None):
            raise UserError("--data and --rgb or --depth exclude each other")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WithModel):
    """Write a model for elsewhere, or the files that KITTI's benchmark takes.

    Args:
        format: safetensors (weights), torch-export or onnx ((rgb, depth, K) -> probability, normals inside), or kitti (a PNG of
            probabilities per picture).
        data: pictures for --format kitti, named as for train.
        reading: how they are read.
    """

    format: Literal["safetensors", "torch-export", "onnx", "kitti"] = "safetensors"
    data: str | None = None
    reading: SceneReading = field(default_factory=lambda: SceneReading(split="test"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.format == "kitti") != (self.data is not None):
            raise UserError("--data is for --format kitti, which needs it")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show what data hold before anything is computed: counts, ids, depth, intrinsics, orphans, an overview.

    Args:
        data: pictures, named as for train.
        reading: how they are read.
        target: further data that shall be the target of the first; the same folder is refused.
        shown: pictures that are looked at and drawn.
    """

    data: str
    reading: SceneReading = field(default_factory=SceneReading)
    target: str | None = None
    shown: Count = 4


@dataclass(frozen=True, kw_only=True)
class NormalsSettings(Settings):
    """Compute the normals of a data set once, as a file that training maps into memory.

    Args:
        data: pictures, named as for train.
        reading: how they are read.
        normals: settings of the normals.
        encoding: int8 (three numbers, within half a degree) or oct16 (two numbers, within a hundredth).
        size: width and height that they are brought to, that of the training; null keeps the pictures' own.
    """

    data: str
    reading: SceneReading = field(default_factory=SceneReading)
    normals: NormalSettings = field(default_factory=NormalSettings)
    encoding: Literal["int8", "oct16"] = "int8"
    size: tuple[Pixels, Pixels] | None = None


@dataclass(frozen=True, kw_only=True)
class SimulateSettings(Settings):
    """Write rendered road scenes with depth, labels and intrinsics in the manifest layout.

    Args:
        domain: rendered world: roads-flat, roads-noisy, roads-city or roads-real.
        scenes: number of scenes for training.
        test: number of further scenes for testing.
        size: width and height in pixels.
        seed: seed of everything.
    """

    domain: Literal["roads-flat", "roads-noisy", "roads-city", "roads-real"] = "roads-flat"
    scenes: Count = 60
    test: Natural = 0
    size: tuple[Pixels, Pixels] = (160, 64)
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Show on rendered roads what guidance and alignment bring where colors swap their roles.

    Args:
        seeds: seeds of everything; default: 0 at the quick and the default level, 0 to 2 at the full one.
        processes: processes that measure at once, one thread each.
    """

    processes: Count = 2


def check_method(method: Method, settings: RunSettings) -> None:
    """Check that a method can look through the streams that it is given.

    Raises:
        UserError: a method with guidance and a single modality.
    """
    if settings.streams != "both" and method not in {
        "source-only",
        "adabn",
        "minent",
        "advent",
        "adaptsegnet",
        "fada",
        "self-training",
    }:
        raise UserError(f"--method {method} needs --streams both: it lets one modality guide the other")


def of_arm(settings: RunSettings, arm: Arm) -> tuple[Method, RunSettings]:
    """Method and settings of an arm of `compare` and of the demonstration."""
    if arm in {"rgb", "normals", "both"}:
        return "source-only", dataclasses.replace(settings, streams=arm)
    if arm in {"ccg-sfa-class", "ccg-sfa-all"}:
        mode = arm.rpartition("-")[2]
        return "ccg-sfa", dataclasses.replace(settings, align=dataclasses.replace(settings.align, mask_mode=mode))  # type: ignore[arg-type]
    return arm, settings  # type: ignore[return-value]
