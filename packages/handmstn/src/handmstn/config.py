"""Every setting of `handmstn`, and the one home of each default. Imports no torch."""

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
from tenfold.reading import Reading

DATA_KINDS = ("imagefolder", "pictures", "csv", "list", "ntu-pi", "hands11k", "hd", "palm-roi")
"""Layouts on disk."""
EMBEDDED_DATA = ("hands",)
"""Data without a file: rendered hands."""
LANDMARK_KINDS = ("csv", "mat", "json")
Preset = Literal["eeprnet", "hand6", "hand21", "whole"]
Arm = Literal["whole", "box", "palm", "fingers-ce", "all", "oracle"]
Side = Literal["left", "right", "unknown", "auto"]


@dataclass(frozen=True, kw_only=True)
class HandReading(Reading):
    """How pictures of hands are read.

    Args:
        size: side in pixels that pictures are brought to; the longer side is fitted, the rest is black.
        side: hand of the pictures whose data does not say which: right, left, unknown (taken as they are, and marked as
            such), or auto (guessed by the model, and marked as guessed).
        mirrored: whether the camera has mirrored the pictures, as front cameras do; left and right are then exchanged.
        points: unit of the landmarks in a CSV file: pixels of the upright picture, or unit (-1 to 1 from edge to edge).
        identity: what one class is: hand (left and right of a person are two) or person.
        people: number of people of the embedded data `hands`.
        views: pictures of each of them.
        domain: rendered world of `hands`: a or b (other skin, light, background and camera).
    """

    size: Annotated[int, Ge(16)] = 224
    side: Side = "unknown"
    mirrored: bool = False
    points: Literal["pixels", "unit"] = "pixels"
    identity: Literal["hand", "person"] = "hand"
    people: Annotated[int, Ge(2)] = 20
    views: Annotated[int, Ge(2)] = 6
    domain: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True)
class AlignerSettings(Settings):
    """The aligner and its training (stage A).

    Args:
        backbone: network of both levels: hand:loc (small, from scratch), timm:NAME or packaged:NAME.
        levels: 2 (the hand's similarity first, then the points in its frame) or 1.
        loc_size: side in pixels of the coarse picture that is searched.
        passes: how often level 1 looks once it is trained, each further time in the frame of the points that it found.
        votes: quarter turns of a picture that level 0 looks at once it is trained, 1 or 4; 4 needs hands at any angle in
            training, which turns gives.
        steps: updates in stage A; 0 leaves the aligner as it begins.
        batch_size: pictures per step.
        lr: learning rate of stage A (1e-3 in the predecessor's).
        point: weight of the error of the points.
        distance: squared (mean squared error, as in the predecessor), or plain (mean distance, which a few covered hands do
            not govern).
        head: dense (the predecessor's two layers on the flattened map), or places (the same, and for each point a map of
            where it is expected, whose mean is added).
        bending: weight of the splines' bending energy.
        visibility: weight of the visibility's cross-entropy.
        scrambled: share of the pictures whose blocks are shuffled, so that it learns what no hand is.
        turns: any turns, scales and shifts every training picture at random, its points alike; quarter gives each one of its
            four quarter turns, which blurs nothing; none leaves it.
        warps: learn from self-made warps of upright hands, where there are no points: auto does where the data has none.
    """

    backbone: str = "timm:resnet18"
    levels: Literal[1, 2] = 2
    loc_size: Annotated[int, Ge(16)] = 112
    passes: Count = 2
    votes: Literal[1, 4] = 4
    steps: Natural = 1000
    batch_size: Count = 64
    lr: Positive = 1e-3
    point: NonNegative = 1.0
    distance: Literal["squared", "plain"] = "squared"
    head: Literal["dense", "places"] = "dense"
    bending: NonNegative = 1e-2
    visibility: NonNegative = 0.1
    scrambled: Annotated[float, Interval(ge=0, lt=1)] = 0.125
    turns: Literal["any", "quarter", "none"] = "any"
    warps: Literal["auto", "always", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RecognizerSettings(Settings):
    """The networks that read the crops.

    Args:
        palm: network of the palm: timm:NAME, packaged:NAME, hand:cnn4 (small) or py:MODULE:FUNCTION that gives features.
        finger: network of all fingers, named likewise.
        pretrained: start from the weights that timm publishes, which it downloads; packaged: has its weights always.
        dim: size of the descriptor of a part (512 in the predecessor's).
        palm_size: side of the palm's crop in pixels.
        finger_size: height and width of a finger's crop in pixels.
        places: 0 takes the mean of a network's map as its feature; N keeps what lies where: the deepest map of N places or more
            a side, in 16 channels a place (the predecessor's descriptor sees every place of a 14 x 14 map).
        jitter: how far the points of each part are shifted together, turned and scaled in training: the deviation, as a share
            of their distance from the part's middle.
    """

    palm: str = "timm:resnet50"
    finger: str = "timm:resnet50"
    pretrained: bool = False
    dim: Count = 512
    palm_size: Annotated[int, Ge(8)] = 112
    finger_size: tuple[Annotated[int, Ge(4)], Annotated[int, Ge(4)]] = (96, 32)
    places: Natural = 0
    jitter: NonNegative = 0.05


@dataclass(frozen=True, kw_only=True)
class LossSettings(Settings):
    """Weights and variants of the losses of stage B; a term of weight 0 is not computed.

    Args:
        identity: weight of the classification by the fused embedding.
        part: weight of the classification by each part, for parts that are seen.
        triplet: weight of the batch-hard triplets.
        center: weight of the distances to the class centers.
        kind: softmax (cross-entropy) or arcface.
        smoothing: label smoothing of the cross-entropy.
        scale: scale of ArcFace.
        margin: margin of ArcFace in radians.
        triplet_margin: margin of the triplets; 0 is their soft form.
        center_rate: rate at which centers move.
    """

    identity: NonNegative = 1.0
    part: NonNegative = 0.5
    triplet: NonNegative = 1.0
    center: NonNegative = 5e-4
    kind: Literal["softmax", "arcface"] = "softmax"
    smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.1
    scale: Positive = 30.0
    margin: Annotated[float, Interval(ge=0, lt=1.5)] = 0.5
    triplet_margin: NonNegative = 0.3
    center_rate: Positive = 0.5

    def weights(self) -> dict[str, float]:
        """Weight of each term."""
        return {"identity": self.identity, "part": self.part, "triplet": self.triplet, "center": self.center}


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """Adam with a warm-up and a cosine, in stage B.

    Args:
        lr: learning rate (3.5e-4, as is usual for re-identification).
        weight_decay: weight decay.
        backbone: factor of the rate of pretrained networks.
        aligner: factor of the aligner's rate while it moves along (0.1 in the predecessor's).
        warm_up: share of the steps over which the rate rises.
    """

    lr: Positive = 3.5e-4
    weight_decay: NonNegative = 5e-4
    backbone: Positive = 1.0
    aligner: Positive = 0.1
    warm_up: Annotated[float, Interval(ge=0, lt=1)] = 0.1


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Data, parts and networks.

    Args:
        data: hands, as KIND:PATH (imagefolder, csv, list, ntu-pi, hands11k, hd, palm-roi), or hands (rendered).
        preset: parts: eeprnet (the palm), hand6 (palm and five fingers), hand21 (a strip per landmark segment), whole (the
            picture as it is, for crops that others have made).
        given_points: take the points of the data in place of an aligner's, in training and wherever the model is used.
        people: number of identities in a batch of stage B.
        views: pictures of each of them.
        reading: settings of the pictures.
        aligner: settings of the aligner.
        recognizer: settings of the networks.
        losses: settings of the losses.
    """

    data: str
    preset: Preset = "hand6"
    given_points: bool = False
    people: Annotated[int, Ge(2)] = 16
    views: Annotated[int, Ge(2)] = 4
    reading: HandReading = field(default_factory=HandReading)
    aligner: AlignerSettings = field(default_factory=AlignerSettings)
    recognizer: RecognizerSettings = field(default_factory=RecognizerSettings)
    losses: LossSettings = field(default_factory=LossSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses.kind == "arcface" and not self.losses.identity:
            raise UserError("--losses.kind arcface with --losses.identity 0 trains no classifier")


@dataclass(frozen=True, kw_only=True)
class RunSettings(ModelSettings, TrainerConfig):
    """What every training shares.

    Args:
        steps: updates of stage B, in which the networks learn identities while the aligner rests.
        joint_steps: further updates in which the aligner moves along at a tenth of the rate.
        workers: processes that read ahead.
        optimizer: settings of the optimizer of stage B.
    """

    steps: Count | None = 5000
    joint_steps: Natural = 0
    clip_norm: Positive | None = 5.0
    workers: Natural = 0
    optimizer: Optimizer = field(default_factory=Optimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joint_steps and (self.given_points or self.preset == "whole"):
            raise UserError("--joint_steps: there is no aligner to move along with --given_points or --preset whole")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RunSettings):
    """Train an aligner, and networks that tell hands apart.

    Args:
        seed: seed of weights, order and augmentation.
        teacher_weights: folder of an earlier `handmstn train` whose aligner is taken over, so that stage A is left out.
    """

    seed: Seed = 0
    teacher_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """Compare ways to look at a hand over seeds on your pictures, with paired intervals.

    All arms get the same people, pictures, steps and optimizer; half of the people are for testing alone.

    Args:
        arms: whole (the picture), box (a box around the points), palm (palm alone), fingers-ce (palm and fingers, cross-entropy
            alone), all (with all losses), oracle (the data's points); box and oracle need points.
        seeds: seeds of initialization, order, augmentation and of who is tested.
        executor: where seeds are measured: processes:N of this machine, or dask:ADDRESS; default: here, one after another.
    """

    arms: Annotated[list[Arm], Length(1), Distinct()] = field(default_factory=lambda: ["whole", "palm", "all"])
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    executor: str | None = None


@dataclass(frozen=True, kw_only=True)
class WithModel(Settings):
    """A trained model and pictures.

    Args:
        run: folder of a `handmstn train`.
        data: hands, named as for train.
        reading: settings of the pictures; their size is the model's.
        unlike: what becomes of a picture unlike those trained on: refuse (not assessable), or keep, which says so.
        batch_size: pictures at once.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    data: str
    reading: HandReading = field(default_factory=HandReading)
    unlike: Literal["refuse", "keep"] = "refuse"
    batch_size: Count = 32
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class SimulateSettings(Settings):
    """Write rendered hands with their points to a folder.

    Args:
        people: number of people.
        views: pictures of each.
        size: side in pixels; a finger is too thin to tell anything below 160.
        seed: seed of everything.
        domain: a, or b: other skin, light, background and camera.
        upright: whether hands are upright and uncovered.
        gallery_each: pictures of each person that the list marks as the gallery, the others as probes; 0: all are for training.
    """

    people: Count = 10
    views: Count = 6
    size: Annotated[int, Ge(16)] = 224
    seed: Seed = 0
    domain: Literal["a", "b"] = "a"
    upright: bool = False
    gallery_each: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gallery_each >= self.views:
            raise SettingError("gallery_each", f"expected fewer than --views {self.views}, got {self.gallery_each}")


@dataclass(frozen=True, kw_only=True)
class EnrollSettings(WithModel):
    """Add hands to a gallery.

    Args:
        gallery: folder of the gallery; it is made with the first hands.
        purpose: why these people are enrolled, in words; kept in the gallery's log.
        images_each: pictures that every identity needs at least; a single one enrolls, two allow a check of the identity.
        split: part of the data that is enrolled; default: gallery where the data has one, else all.
    """

    gallery: str
    purpose: str
    images_each: Count = 1
    split: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.purpose.strip():
            raise SettingError("purpose", "expected a reason in words, got none: it is kept in the gallery's log")


Index = Literal["auto", "exact", "faiss-flat", "faiss-hnsw"]


@dataclass(frozen=True, kw_only=True)
class SearchSettings(WithModel):
    """Rank the people of a gallery for each picture, and say when it is none of them.

    Args:
        gallery: folder of the gallery.
        top: number of candidates.
        fpir: share of strangers that may be taken for somebody; sets the threshold from the gallery itself.
        threshold: score from which a candidate is named, -1 to 1; default: by fpir.
        calibration: folder of a `handmstn calibrate`; candidates then have likelihood ratios.
        index: how the gallery is searched: exact, faiss-flat or faiss-hnsw (handmstn[faiss]); auto is exact up to a million.
        itself: whether a picture may find itself in the gallery (the same pixels).
        sheets: number of evidence sheets (PNG and HTML), for the first pictures.
        split: part of the data that is searched for; default: probe where the data has one, else all.
    """

    gallery: str
    top: Count = 5
    fpir: Share = 0.01
    threshold: Annotated[float, Interval(ge=-1, le=1)] | None = None
    calibration: str | None = None
    index: Index = "auto"
    itself: bool = False
    sheets: Natural = 5
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class RemoveSettings(Settings):
    """Delete a person's vectors from a gallery.

    Args:
        gallery: folder of the gallery.
        person: id of the person.
        purpose: why, in words; kept in the gallery's log.
    """

    gallery: str
    person: str
    purpose: str


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(WithModel):
    """Measure a model by a protocol: closed set, open set, verification, or another data set.

    Args:
        protocol: closed (CMC, mAP), open (DIR at FPIR as well), verify (EER, TAR at FAR), or cross (all, on people of another
            data set; shared identities are refused).
        train_data: the data that the model was trained on, for cross; default: the one of the run.
        matcher: cosine (parts that both sides show) or pls (one-vs-all partial least squares).
        components: components of pls.
        ties: rank of equal scores: optimistic, mean or pessimistic.
        unit: what is ranked: class or image.
        gallery_each: pictures of each identity in the gallery, where the data has no parts of its own.
        draws: random galleries of one picture each (10 for 11k and HD, whose protocol this is); 0: the data's own parts.
        open_share: share of the identities that are kept out of the gallery, for open and cross.
        fpir: false-positive identification rate of the open set.
        seed: seed of the galleries, of who is left out, and of the bootstrap.
        distances: whether to write distances.npz in torchreid's form.
        calibration: folder of a `handmstn calibrate`, whose likelihood ratios are checked.
    """

    protocol: Literal["closed", "open", "verify", "cross"] = "closed"
    train_data: str | None = None
    matcher: Literal["cosine", "pls"] = "cosine"
    components: Count = 50
    ties: Literal["optimistic", "mean", "pessimistic"] = "optimistic"
    unit: Literal["class", "image"] = "class"
    gallery_each: Count = 2
    draws: Natural | None = None
    open_share: Share = 0.3
    fpir: Share = 0.01
    seed: Seed = 0
    distances: bool = False
    calibration: str | None = None


@dataclass(frozen=True, kw_only=True)
class PredictSettings(WithModel):
    """Write embeddings, points and aligned crops of pictures.

    Args:
        pictures: number of overlays and crops that are drawn.
    """

    pictures: Natural = 12


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(WithModel):
    """Learn likelihood ratios from the scores of people who are in no other part of the work.

    Args:
        edges: borders of the bins of common visibility.
        seed: seed of the halves that check the calibration.
    """

    edges: list[Probability] = field(default_factory=lambda: [0.6, 0.9])
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Write a list with landmarks that the other commands take, from other people's files.

    Args:
        data: pictures, named as for train.
        landmarks: their landmarks: csv:FILE (path, then x1, y1, ...), mat:DIR (the predecessor's 18 numbers) or json:DIR
            (21 points of mediapipe, OpenPose or CMU); default: those of the data.
        preset: parts whose control points are written.
        unit: unit of the landmarks: pixels of the upright picture, unit (-1 to 1 from edge to edge), or share (0 to 1 of width
            and height, JSON only); default: pixels in a CSV, and in JSON what its form says.
        reading: settings of the pictures.
    """

    data: str
    landmarks: str | None = None
    preset: Preset = "hand6"
    unit: Literal["pixels", "unit", "share"] | None = None
    reading: HandReading = field(default_factory=HandReading)


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show a model, a gallery or data before anything is computed.

    Args:
        run: folder of a `handmstn train`.
        gallery: folder of a gallery.
        data: hands, named as for train.
        reading: settings of the pictures.
    """

    run: str | None = None
    gallery: str | None = None
    data: str | None = None
    reading: HandReading = field(default_factory=HandReading)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is None and self.gallery is None and self.data is None:
            raise UserError("expected one of --run, --gallery and --data")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write a trained model for elsewhere: pictures in, crops, embedding and visibility out.

    Args:
        run: folder of a `handmstn train`.
        format: safetensors (weights), torch-export (a program that torch.export.load reads) or onnx (handmstn[onnx]).
    """

    run: str
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"


@dataclass(frozen=True, kw_only=True)
class Sizes(Settings):
    """How much of everything the demonstration has; what is not given is the level's.

    Args:
        pixels: side of a rendered picture.
        train: people that are trained on, and pictures of each.
        test: people that are enrolled and searched for, and pictures of each, of which two are enrolled.
        strangers: people who are searched for and not enrolled, and pictures of each.
        develop: people that the calibration learns from, and pictures of each.
        batch: people in a batch of stage B, and pictures of each.
        align: steps of stage A.
        align_batch: pictures in a batch of stage A.
    """

    pixels: Annotated[int, Ge(16)] | None = None
    train: tuple[Annotated[int, Ge(2)], Annotated[int, Ge(2)]] | None = None
    test: tuple[Annotated[int, Ge(5)], Annotated[int, Ge(3)]] | None = None
    strangers: tuple[Count, Count] | None = None
    develop: tuple[Annotated[int, Ge(4)], Annotated[int, Ge(2)]] | None = None
    batch: tuple[Annotated[int, Ge(2)], Annotated[int, Ge(2)]] | None = None
    align: Count | None = None
    align_batch: Count | None = None


_QUICK = Sizes(
    pixels=96, train=(8, 4), test=(6, 4), strangers=(3, 2), develop=(6, 3), batch=(4, 2), align=6, align_batch=32
)
_DEFAULT = Sizes(
    pixels=160,
    train=(50, 12),
    test=(40, 6),
    strangers=(20, 3),
    develop=(15, 4),
    batch=(8, 4),
    align=600,
    align_batch=32,
)
_FULL = Sizes(
    pixels=160,
    train=(60, 14),
    test=(60, 6),
    strangers=(40, 3),
    develop=(25, 4),
    batch=(8, 4),
    align=1800,
    align_batch=32,
)
LEVELS: dict[str, tuple[Sizes, int]] = {"quick": (_QUICK, 6), "default": (_DEFAULT, 200), "full": (_FULL, 300)}
"""Sizes, and steps of stage B, of each level of the demonstration."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Show on rendered hands what alignment, fingers and losses bring.

    Args:
        seeds: seeds of everything; default: 0 at the quick and the default level, 0 to 2 at the full one.
        steps: updates of stage B of each arm; default: 6 for quick, 200 for default, 300 for full.
        sizes: sizes of everything else; default: by level. The `config.yaml` of a run has them all.
        processes: processes that measure at once, one thread each.
    """

    steps: Count | None = None
    sizes: Sizes = field(default_factory=Sizes)
    processes: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        own, steps = LEVELS[self.level]
        given = {f.name: getattr(self.sizes, f.name) for f in dataclasses.fields(Sizes)}
        sizes = dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "steps", self.steps or steps)
        assert sizes.batch is not None
        assert sizes.train is not None
        if sizes.batch[0] > sizes.train[0] or sizes.batch[1] > sizes.train[1]:
            raise SettingError("sizes.batch", f"expected no more than --sizes.train {sizes.train}, got {sizes.batch}")


def of_arm(settings: RunSettings, arm: Arm) -> RunSettings:
    """The settings of one arm: what it looks at, and which losses it has."""
    plain = dataclasses.replace(settings.losses, kind="softmax", part=0.0, triplet=0.0, center=0.0)
    changes: dict[Arm, dict[str, object]] = {
        "whole": {"preset": "whole", "losses": plain, "joint_steps": 0},
        "box": {"preset": "whole", "losses": plain, "given_points": True, "joint_steps": 0},
        "palm": {"preset": "eeprnet", "losses": plain},
        "fingers-ce": {"losses": plain},
        "all": {},
        "oracle": {"given_points": True, "joint_steps": 0},
    }
    found: RunSettings = dataclasses.replace(settings, **changes[arm])  # type: ignore[arg-type]
    return found
