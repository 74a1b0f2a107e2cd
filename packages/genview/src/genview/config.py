"""Every setting of `genview`, and the one home of each default. Imports no torch."""

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
    Probability,
    Seed,
    Seeds,
    SettingError,
    Settings,
    Share,
    TrainerConfig,
)

Method = Literal["simclr", "mocov2", "mocov3", "simsiam", "byol", "swav"]
METHODS: tuple[str, ...] = get_args(Method)
DATA_KINDS = ("imagefolder", "folder", "list", "csv", "webdataset", "npz", "cifar10", "cifar100")
"""Layouts on disk."""
EMBEDDED_DATA = ("digits",)
"""Data without a file: handwritten digits that scikit-learn ships."""
Policy = Literal["adaptive", "constant", "random"]
GeneratorKind = Literal["unclip", "img2img", "ip-adapter"]
Arm = Literal["plain", "views", "views-qd", "naive"]
Protocol = Literal["knn", "linear", "linear-sweep", "semi"]
NoiseLevel = Annotated[int, Interval(ge=0, le=999)]
Amount = Annotated[list[NonNegative], Length(4, 4)]


@dataclass(frozen=True, kw_only=True)
class ViewSettings(Settings):
    """How the two views of a picture are made.

    Args:
        least_area: least share of the picture that a crop covers (0.2; 0.08 for vision transformers; 1 leaves pictures whole).
        flip: probability of a mirrored crop.
        jitter: strength of brightness, contrast, saturation and hue.
        jitter_share: share of views whose colors are changed.
        gray: share of gray views.
        blur: share of blurred views, of the first slot where second_blur is given.
        second_blur: share of blurred views of the second slot (MoCo v3, BYOL); default: as blur.
        second_solarize: share of solarized views of the second slot (MoCo v3, BYOL).
        generated: probability that one of the two views is of the generated picture (1 in the authors' settings).
    """

    least_area: Annotated[float, Interval(gt=0, le=1)] = 0.2
    flip: Probability = 0.5
    jitter: Amount = field(default_factory=lambda: [0.4, 0.4, 0.4, 0.1])
    jitter_share: Probability = 0.8
    gray: Probability = 0.2
    blur: Probability = 0.5
    second_blur: Probability | None = None
    second_solarize: Probability = 0.0
    generated: Probability = 1.0


@dataclass(frozen=True, kw_only=True)
class FitForegroundSettings(Settings):
    """Learn what is foreground from a sample of the pictures, without labels.

    Args:
        data: pictures, as KIND:PATH.
        encoder: the frozen encoder: generator:DIR (the one of a generator), timm:NAME, packaged:NAME or hf:PATH.
        encoder_weights: file of weights of timm:NAME, or random; default: the published ones.
        images: number of pictures of the sample.
        quantile: share of all tokens that count as background (0.6: 40 percent are foreground).
        sign: side of the direction that is foreground; auto goes by the middle of the pictures.
        component: principal direction that is taken, 0 for the first.
        batch_size: pictures at once.
        seed: seed of the sample.
        device: where to compute; auto takes a GPU when there is one.
    """

    data: str
    encoder: str
    encoder_weights: str | None = None
    images: Count = 10000
    quantile: Share = 0.6
    sign: Literal["auto", "+1", "-1"] = "auto"
    component: Natural = 0
    batch_size: Count = 64
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Settings):
    """Decide for each picture how much noise its view gets, before anything is generated.

    Args:
        data: pictures, as KIND:PATH; of data with a test part, the training part alone.
        foreground: folder or file of a `genview fit-foreground`; needed by the adaptive policy.
        generator: folder of the generator, whose embeddings are then computed in the same pass and kept.
        kind: kind of the generator.
        adapter: file of the adapter, for kind ip-adapter.
        policy: adaptive (more noise where more is foreground), constant or random.
        edges: inner edges of the bins of the foreground ratio, for adaptive.
        levels: noise level of each bin, or levels to draw from, or the one constant level.
        variations: views per picture.
        guidance: guidance scale (10 as the authors).
        prompts: text beside the picture: none, or the data's captions with a guidance scale by their complexity.
        unit: rows per unit of work; all rows of a unit have one level.
        batch_size: pictures at once.
        seed: root of the seeds of all pictures.
        device: where to compute; auto takes a GPU when there is one.
    """

    data: str
    foreground: str | None = None
    generator: str | None = None
    kind: GeneratorKind = "unclip"
    adapter: str | None = None
    policy: Policy = "adaptive"
    edges: list[Share] = field(default_factory=lambda: [0.2, 0.4, 0.6, 0.8])
    levels: Annotated[list[NoiseLevel], Length(1)] = field(default_factory=lambda: [0, 100, 200, 300, 400])
    variations: Count = 1
    guidance: NonNegative = 10.0
    prompts: Literal["none", "captions"] = "none"
    unit: Count = 256
    batch_size: Count = 64
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy == "adaptive":
            if self.foreground is None:
                raise UserError("--policy adaptive needs --foreground, the folder of a `genview fit-foreground`")
            if len(self.levels) != len(self.edges) + 1:
                raise SettingError("levels", f"expected {len(self.edges) + 1}, one per bin, got {len(self.levels)}")
            if sorted(set(self.edges)) != self.edges:
                raise SettingError("edges", f"expected increasing numbers, got {','.join(map(str, self.edges))}")
        if self.policy == "constant" and len(self.levels) != 1:
            raise SettingError("levels", f"expected one for --policy constant, got {len(self.levels)}")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(Settings):
    """Generate the planned views; start it as often and on as many machines as you like.

    Args:
        plan: folder of a `genview plan`.
        views: folder that the pictures go to, shared by all workers; it grows.
        generator: folder of the generator.
        kind: kind of the generator.
        adapter: file of the adapter, for kind ip-adapter.
        shard: this worker's share as I/N, or auto: from torchrun's or Slurm's variables.
        engine: static (this process does its shard) or ray (a cluster does all).
        ray_address: address of the cluster's head node; default: RAY_ADDRESS, else a cluster of this machine.
        ray_workers: actors that hold the pipeline.
        steps: denoising steps.
        size: side of the generated pictures; default: the pipeline's own.
        store: side that pictures are stored at; default: as generated.
        format: format of the files.
        quality: quality of lossy formats.
        batch_size: pictures at once.
        dtype: number format of the generator; auto is fp16 on a GPU and fp32 on a CPU.
        device: where to compute; auto takes a GPU when there is one.
    """

    plan: str
    views: str
    generator: str
    kind: GeneratorKind = "unclip"
    adapter: str | None = None
    shard: str = "0/1"
    engine: Literal["static", "ray"] = "static"
    ray_address: str | None = None
    ray_workers: Count = 1
    steps: Count = 20
    size: Annotated[int, Ge(8)] | None = None
    store: Annotated[int, Ge(8)] | None = None
    format: Literal["png", "jpg", "webp"] = "png"
    quality: Annotated[int, Interval(ge=1, le=100)] = 92
    batch_size: Count = 16
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        first, slash, last = self.shard.partition("/")
        if self.shard != "auto" and not (slash and first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise SettingError("shard", f"expected I/N with I from 0 to N - 1, or auto, got '{self.shard}'")
        if self.engine == "ray" and self.shard != "0/1":
            raise UserError("--engine ray divides the work itself: leave out --shard")


@dataclass(frozen=True, kw_only=True)
class StatusSettings(Settings):
    """Show how far the workers are, how fast, and when they will be done.

    Args:
        plan: folder of a `genview plan`.
        views: folder of the pictures.
        verify: read every file and compare it with its checksum.
    """

    plan: str
    views: str
    verify: bool = False


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """Join the workers' rows into one manifest, score the pairs, and drop the worst.

    Args:
        plan: folder of a `genview plan`.
        views: folder of the pictures.
        quality_encoder: frozen encoder that scores the pairs; default: no scores.
        quality_weights: file of weights of timm:NAME, or random; default: the published ones.
        quality_foreground: folder or file of a `genview fit-foreground` for this encoder.
        drop_worst: share of the scored pairs, the worst ones, that training leaves out.
        tars: write the pictures into WebDataset tars of this many pictures as well; 0 writes none.
        batch_size: pictures at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    plan: str
    views: str
    quality_encoder: str | None = None
    quality_weights: str | None = None
    quality_foreground: str | None = None
    drop_worst: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    tars: Natural = 0
    batch_size: Count = 64
    device: Device = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.quality_encoder is None) != (self.quality_foreground is None):
            raise UserError("--quality_encoder and --quality_foreground go together")
        if self.drop_worst and self.quality_encoder is None:
            raise UserError("--drop_worst needs scores: give --quality_encoder and --quality_foreground")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Draw a contact sheet: source, foreground, view, with level and quality, sorted by quality.

    Args:
        data: pictures, as KIND:PATH.
        views: folder of a `genview merge`; default: only sources and foregrounds.
        foreground: folder or file of a `genview fit-foreground`; default: no masks.
        encoder: its encoder, where it is not the one that the foreground model names.
        encoder_weights: file of weights of timm:NAME, or random; default: the published ones.
        rows: pictures on the sheet, half of them the best and half the worst where there are scores.
        device: where to compute; auto takes a GPU when there is one.
    """

    data: str
    views: str | None = None
    foreground: str | None = None
    encoder: str | None = None
    encoder_weights: str | None = None
    rows: Annotated[int, Interval(ge=1, le=60)] = 16
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class TinyOptimizer(Settings):
    """The optimizer of the tiny generator's denoiser, AdamW.

    Args:
        lr: largest learning rate; it rises over a tenth of the steps and falls along a cosine.
    """

    lr: Positive = 2e-3


@dataclass(frozen=True, kw_only=True)
class TrainTinySettings(Settings):
    """Train a small generator on your own unlabeled pictures, on a CPU, where no checkpoint may be used.

    Args:
        data: pictures, as KIND:PATH; of data with a test part, the training part alone.
        size: side of the pictures in pixels, a multiple of 8.
        embedding: entries of an embedding.
        channels: channels of the denoiser at each resolution, multiples of 8.
        encoder_steps: steps of the image encoder.
        sketch_steps: steps of the sketch that the denoiser starts from.
        steps: steps of the denoiser.
        batch_size: pictures per step.
        seed: seed of weights and order.
        optimizer: settings of the denoiser's optimizer.
    """

    data: str
    size: Annotated[int, Ge(8)] = 16
    embedding: Annotated[int, Ge(4)] = 32
    channels: Annotated[list[Count], Length(1)] = field(default_factory=lambda: [32, 64])
    encoder_steps: Count = 300
    sketch_steps: Count = 1500
    steps: Count = 1500
    batch_size: Count = 32
    seed: Seed = 0
    optimizer: TinyOptimizer = field(default_factory=TinyOptimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 8:
            raise SettingError("size", f"expected a multiple of 8, got {self.size}")
        if any(c % 8 for c in self.channels):
            raise SettingError("channels", f"expected multiples of 8, got {','.join(map(str, self.channels))}")
        if self.embedding % 2:
            raise SettingError("embedding", f"expected an even number, got {self.embedding}")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Take over what the authors' code wrote: ratios, tables of GenView++, trees of generated pictures.

    Args:
        data: the pictures that it was run on, as KIND:PATH.
        ratios: text file of the authors' foreground ratios, "path ratio" per line.
        table: csv of GenView++ with a column image and any of prompt, noise_level, guidance_scale.
        tree: folder of generated pictures that mirrors the data's folder.
        suffix: what the authors' file names have after the source's name, before the file's own suffix.
    """

    data: str
    ratios: str | None = None
    table: str | None = None
    tree: str | None = None
    suffix: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(found is not None for found in (self.ratios, self.table, self.tree)) != 1:
            raise UserError("expected one of --ratios, --table and --tree")


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """The optimizer of a pretraining, with warm-up and a cosine schedule by steps.

    Args:
        name: sgd, adamw or lars.
        lr: learning rate after the warm-up; default: the method's own by the linear rule, see the recipes.
        momentum: momentum of sgd and lars.
        weight_decay: weight decay; none on biases and normalizations.
        warm_up: epochs over which the rate rises.
    """

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    lr: Positive = 0.05
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    warm_up: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class Heads(Settings):
    """Projector and predictor.

    Args:
        hidden: width of the hidden layers.
        out: width of the embedding.
        layers: layers of the projector.
        predictor_hidden: width of the predictor's hidden layer (SimSiam 512, BYOL and MoCo v3 4096).
        temperature: temperature; default: the method's own.
        queue: keys in MoCo v2's queue.
        prototypes: SwAV's prototypes.
        key_momentum: momentum of the key encoder at the start; default: the method's own.
    """

    hidden: Count = 2048
    out: Count = 256
    layers: Annotated[int, Interval(ge=1, le=4)] = 2
    predictor_hidden: Count = 512
    temperature: Positive | None = None
    queue: Count = 65536
    prototypes: Count = 3000
    key_momentum: Annotated[float, Interval(ge=0, le=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class QualitySettings(Settings):
    """How pairs are weighted.

    Args:
        mode: none, online (the frozen encoder sees both views), cached (its map of the whole picture is cut) or static
            (one quality per pair, from `genview merge`).
        gamma: sharpness of the weights (1 in GenView, 2 in GenView++).
        scope: pairs that weights are relative to: of this device, or of all.
        encoder: the frozen encoder, for online and cached.
        weights: file of weights of timm:NAME, or random; default: the published ones.
        foreground: folder or file of a `genview fit-foreground` for this encoder.
    """

    mode: Literal["none", "online", "cached", "static"] = "none"
    gamma: NonNegative = 1.0
    scope: Literal["local", "global"] = "global"
    encoder: str | None = None
    weights: str | None = None
    foreground: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode in {"online", "cached"} and (self.encoder is None or self.foreground is None):
            raise UserError(f"--qd.mode {self.mode} needs --qd.encoder and --qd.foreground")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainerConfig):
    """What every pretraining shares.

    Args:
        data: pictures, as KIND:PATH; of data with a test part, the training part alone.
        backbone: the model to train, timm:NAME, tv:NAME, py:MODULE:FUNCTION or conv:WIDTH (a small net for small pictures).
        size: side of a view in pixels.
        batch_size: pictures per step on one device.
        epochs: passes over the pictures.
        steps: updates of the weights after which a training ends early; default: none.
        external: further pictures that are added to the data without views, as KIND:PATH.
        resident_gb: largest size of the decoded pictures that are kept in memory.
        workers: processes that decode pictures that are not kept in memory.
        view: settings of the views.
        heads: settings of projector and predictor.
        qd: settings of the weights of pairs.
        optimizer: settings of the optimizer.
    """

    data: str
    backbone: str
    size: Annotated[int, Ge(8)] = 224
    batch_size: Annotated[int, Ge(2)] = 256
    epochs: Count = 100
    steps: Count | None = None
    external: str | None = None
    resident_gb: NonNegative = 1.0
    workers: Natural = 2
    view: ViewSettings = field(default_factory=ViewSettings)
    heads: Heads = field(default_factory=Heads)
    qd: QualitySettings = field(default_factory=QualitySettings)
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(PretrainSettings):
    """Pretrain a backbone without labels, on pictures and their generated views.

    Args:
        method: simclr, mocov2, mocov3, simsiam, byol or swav.
        views: folder of a `genview merge`; default: plain augmentation.
        knn_every: epochs between two readings of the accuracy of nearest neighbors on the test part; 0 reads none.
        seed: seed of weights, order and augmentation.
    """

    method: Method = "mocov3"
    views: str | None = None
    knn_every: Natural = 0
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.qd.mode == "static" and self.views is None:
            raise UserError("--qd.mode static needs --views, a `genview merge` with scores")


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(Settings):
    """A linear classifier on a frozen backbone, or the fine-tuning of all of it.

    Args:
        epochs: passes over the labeled pictures.
        batch_size: pictures per step.
        lr: learning rate of linear and semi, times batch_size / 256.
        rates: number of learning rates of linear-sweep, evenly spaced in the logarithm from 0.001 to 30.
        share: shares of the labels that semi fine-tunes on.
        backbone_lr: learning rate of the backbone in semi, as a share of lr.
        least_area: least share of the picture that a crop covers in linear and semi, 1 for whole pictures; default: 0.08 from
            128 pixels on, 0.5 below.
        flip: probability of a mirrored crop in linear and semi; 0 for digits and letters.
    """

    epochs: Count = 90
    batch_size: Count = 256
    lr: Positive = 0.4
    rates: Count = 20
    share: Annotated[list[Share], Length(1), Distinct()] = field(default_factory=lambda: [0.01, 0.1])
    backbone_lr: NonNegative = 0.1
    least_area: Annotated[float, Interval(gt=0, le=1)] | None = None
    flip: Probability = 0.5


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Measure the features of a pretrained backbone on labeled pictures.

    Args:
        run: folder of a `genview train`.
        data: labeled pictures with a test part; default: those that it was trained on.
        protocol: knn, linear (augmented epochs through the frozen backbone), linear-sweep (features computed once, many
            learning rates) or semi (fine-tuning on shares of the labels).
        k: neighbors.
        temperature: temperature of the neighbors' votes.
        probe: settings of linear, linear-sweep and semi.
        batch_size: pictures at once when features are computed.
        seed: seed of classifier, order and subsets.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    data: str | None = None
    protocol: Protocol = "knn"
    k: Count = 20
    temperature: Positive = 0.07
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    batch_size: Count = 256
    seed: Seed = 0
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class CompareSettings(PretrainSettings):
    """Compare plain augmentation, generated views and weighted views over seeds.

    Args:
        method: simclr, mocov2, mocov3, simsiam, byol or swav.
        arms: plain, views, views-qd (weighted), naive (as many external pictures as there are views, added to the data).
        views: folder of a `genview merge`, for the arms that use views.
        seeds: seeds of weights, order and augmentation.
        share: share of the labels of the semi-supervised measure; default: it is left out.
        probe: settings of the measures.
        executor: where arms are measured: processes:N of this machine, or dask:ADDRESS; default: here, one by one.
    """

    method: Method = "mocov3"
    arms: Annotated[list[Arm], Length(1), Distinct()] = field(default_factory=lambda: ["plain", "views", "views-qd"])
    views: str | None = None
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    share: Share | None = None
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    executor: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views is None and any(arm != "plain" for arm in self.arms):
            raise UserError("--views is missing: every arm but plain needs the folder of a `genview merge`")
        if "naive" in self.arms and self.external is None:
            raise UserError("--external is missing: the arm naive adds its pictures")
        if "views-qd" in self.arms and self.qd.mode == "none":
            raise UserError("--qd.mode is none: the arm views-qd needs online, cached or static")

    def of_arm(self, arm: Arm, seed: int) -> TrainSettings:
        """The training of one arm."""
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(PretrainSettings)}
        shared["views"] = self.views if arm.startswith("views") else None
        shared["external"] = self.external if arm == "naive" else None
        shared["qd"] = self.qd if arm == "views-qd" else QualitySettings()
        return TrainSettings(**shared, method=self.method, seed=seed)


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write a pretrained backbone for elsewhere.

    Args:
        run: folder of a `genview train`.
        names: whose names the weights have: timm's, or torchvision's (ResNets), as detection toolboxes load them.
        format: safetensors (weights) or torch (a state dict for torch.load with weights_only).
    """

    run: str
    names: Literal["timm", "torchvision"] = "timm"
    format: Literal["safetensors", "torch"] = "safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Show on digits over rendered backgrounds what generated views and their weights gain.

    Args:
        seeds: seeds of the students; default: 0 at the quick and the default level, 0 to 4 at the full one.
        processes: processes that train students at once.
    """

    processes: Count = 2
