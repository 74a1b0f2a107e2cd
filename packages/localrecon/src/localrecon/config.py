"""Every setting, with its one default; no torch here."""

from dataclasses import dataclass, field
from typing import Literal

from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.trainer_config import Device

Method = Literal["bp", "ckpt", "accum", "local", "sgr", "bpfree"]
HeadKind = Literal["auto", "linear", "gap_linear", "conv_gap", "mlp_sr", "aug", "token", "token_block", "lm"]
Feedback = Literal["transpose", "fa", "sign"]


@dataclass(frozen=True, kw_only=True)
class SGRConfig:
    """Successive gradient reconciliation: how later modules are made to want what earlier ones do.

    Args:
        lam: weight of the reconciliation; 0 is plain local learning (ours: 1, the paper's was not found in public text).
        dist: distance of the two gradients. sample (per-sample squared error, the same for every batch size), mean
            (squared error of gradients of the mean loss), relative (over the target's square), cosine (direction alone).
        estimator: shift (two first-order passes, ours) or exact (double backward).
        shift_clip: largest shift of a sample, as a share of its norm; null leaves it.
        fraction: share of the samples that are reconciled, in (0, 1]; below 1 only without BatchNorm.
        every: reconcile at every so-manieth step, with lam multiplied by it.
        ramp: share of the training over which lam rises from 0.
        anneal_last: share of the training, at its end, over which lam falls to 0.
        gate: weaken lam by (loss of this module / loss of the one before)^2 where this one is better.
        reg_to_head: let the reconciliation train the local head, too.
        math_attention: with exact, compute attention by a kernel that has second derivatives (quadratic memory).
    """

    lam: float = 1.0
    dist: Literal["sample", "mean", "relative", "cosine"] = "sample"
    estimator: Literal["shift", "exact"] = "shift"
    shift_clip: float | None = 0.5
    fraction: float = 1.0
    every: int = 1
    ramp: float = 0.05
    anneal_last: float = 0.0
    gate: bool = False
    reg_to_head: bool = True
    math_attention: bool = False

    def __post_init__(self) -> None:
        if not self.lam >= 0:
            raise UserError(f"lam must be 0 or more, got {self.lam}")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be in (0, 1], got {self.fraction}")
        if self.every < 1:
            raise UserError(f"every must be 1 or more, got {self.every}")
        if self.shift_clip is not None and not self.shift_clip > 0:
            raise UserError(f"shift_clip must be above 0, or null, got {self.shift_clip}")
        for name in ("ramp", "anneal_last"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def strength(self, step: int, total_steps: int | None) -> float:
        """Weight of the reconciliation at a step (counted from 0); 0 where it is off."""
        if self.lam == 0 or step % self.every:
            return 0.0
        weight = self.lam * self.every
        if total_steps and self.ramp:
            weight *= min(1.0, (step + 1) / (self.ramp * total_steps))
        if total_steps and self.anneal_last:
            weight *= min(1.0, (total_steps - step) / (self.anneal_last * total_steps))
        return weight


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The small classifier of a module.

    Args:
        kind: auto is conv_gap for feature maps, token for tokens, lm for language models, linear for vectors. gap_linear
            (pool, linear), conv_gap (3 x 3 convolution, pool, two layers: InfoPro's), mlp_sr (DGL's), aug (AugLocal's
            layers of the rest of the network), token (LayerNorm, pooled tokens, linear), token_block (a transformer block
            before that), lm (RMSNorm, linear to the vocabulary, of low rank where rank is given).
        hidden: width of the hidden layer of conv_gap.
        channels: most channels of conv_gap's convolution, which has twice the module's (InfoPro's has no limit; in wide
            networks its weights would outweigh what is saved).
        classifier: last layer. trainable, random (fixed) or etf (fixed, simplex equiangular tight frame).
        pool: of token: mean or cls (the first token).
        rank: of lm's factorized output layer; null is full.
        depth: of aug: most layers of a head; falls linearly to 1 at the last module.
        chunk: of lm: tokens whose logits exist at a time.
        label_smoothing: share of the target spread over all classes.
        predsim: weight of the similarity-matching loss (PredSim); the cross-entropy has 1 - predsim. PredSim's paper: 0.99.
    """

    kind: HeadKind = "auto"
    hidden: int = 128
    channels: int = 256
    classifier: Literal["trainable", "random", "etf"] = "trainable"
    pool: Literal["mean", "cls"] = "mean"
    rank: int | None = None
    depth: int = 3
    chunk: int = 2048
    label_smoothing: float = 0.0
    predsim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hidden", "channels", "depth", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")
        for name in ("label_smoothing", "predsim"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """The optimizer of each module.

    Args:
        name: sgd (with Nesterov momentum; one state per weight) or adamw (two).
    """

    name: Literal["sgd", "adamw"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(OptimizerKind):
    """The optimizer of each module, and its schedule over the training.

    Args:
        lr: peak learning rate.
        weight_decay: of all weights.
        momentum: of sgd.
        schedule: cosine (to 0) or constant.
        warmup: share of the training over which the rate rises linearly.
    """

    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup must be in [0, 1), got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and its data.

    Args:
        model: mlp, convnet, resnet20, resnet32, resnet110 (of CIFAR), vit, gpt, timm:NAME, hf:FOLDER_OR_CONFIG.json, or
            py:MODULE:FUNCTION (called without arguments; it runs code of yours).
        data: digits, glyphs, topics, imagefolder:DIR, cifar10:DIR, npz:FILE or text:FILE.
        width: channels or features of the built-in models; default: that of the model.
        depth: blocks of mlp, convnet, vit and gpt; default: that of the model.
        image_size: side of the images of an imagefolder.
        window: tokens (bytes) in a row of text.
        batch_size: samples in a step.
        device: where to compute; auto takes a GPU when there is one.
    """

    model: str
    data: str
    width: int | None = None
    depth: int | None = None
    image_size: int = 224
    window: int = 128
    batch_size: int = 64
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "image_size", "window", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class SplitSettings(ModelSettings):
    """Where the model is cut.

    Args:
        k: number of modules (4 is ours).
        budget: peak bytes of a training step, such as 2GB; the smallest number of modules that fits is taken, not k.
        balance: what the modules are to have equal shares of. memory (of their activations), flops, params or blocks.
        cuts: cut after these blocks, by number from 1 on, in place of k and balance.
        adapter: how the model is taken apart; auto tries all of them.
        head: the local heads.
        sgr: the reconciliation.
        optimizer: optimizer of each module.
    """

    k: int = 4
    budget: str | None = None
    balance: Literal["memory", "flops", "params", "blocks"] = "memory"
    cuts: list[int] | None = None
    adapter: str = "auto"
    head: HeadSpec = field(default_factory=HeadSpec)
    sgr: SGRConfig = field(default_factory=SGRConfig)
    optimizer: OptimizerKind = field(default_factory=OptimizerKind)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"--k is {self.k}, expected 1 or more")
        if self.budget is not None:
            parse_bytes(self.budget)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(SplitSettings):
    """Decide where a model is cut, and predict the peak memory of a step."""


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """How training items are varied.

    Args:
        augment: none, crop (random crop and flip, as usual on CIFAR) or timm (RandAugment, random erasing; needs timm).
        randaugment: policy of timm's RandAugment.
        erasing: probability of timm's random erasing.
    """

    augment: Literal["none", "crop", "timm"] = "none"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(SplitSettings, AugmentSettings):
    """How it is trained.

    Args:
        optimizer: optimizer of each module, and its schedule.
        epochs: passes over the training data.
        mixup: alpha of timm's mixup, 0 is off.
        cutmix: alpha of timm's CutMix, 0 is off.
        accumulate: parts that a batch is computed in, one after another, with the result of the whole.
        clip_norm: largest norm of a module's gradient; null leaves it.
        precision: 32, bf16 or 16 (mixed; 16 with a loss scale of each module); auto is bf16 on a GPU that has it.
        compile: compile each module.
        feedback: feedback of bpfree. transpose, fa (feedback alignment: fixed random weights) or sign.
        workers: processes that read the data.
        devices: number of devices.
        strategy: strategy of several devices; ddp (each module's gradients are averaged as soon as they are there) or auto.
    """

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: int = 10
    mixup: float = 0.0
    cutmix: float = 0.0
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    compile: bool = False
    feedback: Feedback = "transpose"
    workers: int = 0
    devices: int = 1
    strategy: Literal["auto", "ddp"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "accumulate", "devices"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """What a training writes on its way.

    Args:
        validation: share of the training data that is held out and measured.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two rows of metrics.csv.
    """

    validation: float = 0.0
    checkpoint_every: int = 500
    log_every: int = 10


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainingSettings, RecordSettings):
    """Train a model, block by block or by one of the baselines.

    Args:
        method: sgr, local (no reconciliation), bp (ordinary backpropagation), ckpt (with activation checkpointing), accum
            (with gradient accumulation over k parts) or bpfree (closed form, one layer per module; mlp and convnet alone).
        seed: seed of weights, order, augmentation and dropout.
    """

    method: Method = "sgr"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation < 1:
            raise UserError(f"--validation is {self.validation}, expected a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(TrainingSettings):
    """Train by several methods: accuracy, memory and time.

    Args:
        arms: methods to compare, of bp, ckpt, accum, local, sgr and bpfree; all with the same epochs, seeds and optimizer.
        ks: numbers of modules of local and sgr; default: k.
        seeds: seeds of the report.
    """

    arms: list[Method] = field(default_factory=lambda: ["bp", "ckpt", "local", "sgr"])
    ks: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("arms", "ks", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise UserError(f"--{name} must name at least one, and none twice; got {values}")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Which training a command works on.

    Args:
        run: folder of `localrecon train`.
        data: other data than the training's, in the same form.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    data: str | None = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(RunSettings):
    """Settings of `localrecon evaluate`.

    Args:
        threshold: leave at the first exit whose probability is at least so high, and say what that saves; null does not.
    """

    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"--threshold is {self.threshold}, expected a probability in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DiagnoseSettings(RunSettings):
    """Settings of `localrecon diagnose`.

    Args:
        samples: of the training data that are looked at.
    """

    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UserError(f"--samples is {self.samples}, expected 2 or more")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(RunSettings):
    """Settings of `localrecon export`.

    Args:
        heads: also write the local heads, for early exits.
    """

    heads: bool = False


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `localrecon demo`.

    Args:
        level: quick (mechanics only), default (direction of the main claim) or full (five seeds decide every claim).
        seeds: of the trainings; default: 0 for quick, 0 and 1 for default, 0 to 4 for full.
    """

    level: Literal["quick", "default", "full"] = "default"
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        if self.seeds == []:
            raise UserError("--seeds must name at least one")


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of ``"2GB"``, ``"500 MiB"`` or ``"123456"``.

    Raises:
        UserError: no such number or unit.
    """
    number = text.strip().rstrip("BbIiKkMmGg")
    unit = text.strip()[len(number) :].strip().upper() or "B"
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"'{text}' is no number of bytes, expected one like 2GB or 500MiB") from None
    if unit not in _UNITS:
        raise UserError(f"'{text}': unknown unit; {did_you_mean(unit, _UNITS)}")
    if not value > 0:
        raise UserError(f"'{text}': expected more than 0 bytes")
    return int(value * _UNITS[unit])
