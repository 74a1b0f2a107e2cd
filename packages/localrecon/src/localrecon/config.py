"""Every setting, with its one default; no torch here."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tenfold import config as base
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
    Probability,
    Seed,
    Seeds,
    Settings,
    parse_bytes,
)
from tenfold.errors import UserError
from tenfold.reading import Reading

Method = Literal["bp", "ckpt", "accum", "local", "sgr", "bpfree"]
Feedback = Literal["transpose", "fa", "sign"]
HeadKind = Literal["auto", "linear", "gap_linear", "conv_gap", "mlp_sr", "aug", "token", "token_block", "lm", "dense"]
Part = Annotated[float, Interval(ge=0, lt=1)]
"""A part of a whole that may be nothing, and not all of it."""


@dataclass(frozen=True, kw_only=True)
class SGRConfig(Settings):
    """Successive gradient reconciliation: how later modules are made to want what earlier ones do.

    Args:
        lam: weight of the reconciliation; 0 is plain local learning (ours: 1, the paper's was not found in public text).
        dist: distance of the two gradients. sample (per-sample squared error, the same for every batch size), mean
            (squared error of gradients of the mean loss), relative (over the target's square), cosine (direction alone).
        estimator: shift (two first-order passes, ours) or exact (double backward).
        shift_clip: largest shift of a sample, as a share of its norm; null leaves it.
        fraction: share of the samples that are reconciled, in (0, 1]; below 1 only without BatchNorm.
        every: steps between two reconciliations; lam is multiplied by it.
        ramp: share of the training over which lam rises from 0.
        anneal_last: share of the training, at its end, over which lam falls to 0.
        gate: whether lam is weakened by (loss of this module / loss of the one before)^2 where this one is better.
        reg_to_head: whether the reconciliation trains the local head, too.
        math_attention: whether attention is computed by a kernel that has second derivatives (quadratic memory), for exact.
    """

    lam: NonNegative = 1.0
    dist: Literal["sample", "mean", "relative", "cosine"] = "sample"
    estimator: Literal["shift", "exact"] = "shift"
    shift_clip: Positive | None = 0.5
    fraction: Annotated[float, Interval(gt=0, le=1)] = 1.0
    every: Count = 1
    ramp: Probability = 0.05
    anneal_last: Probability = 0.0
    gate: bool = False
    reg_to_head: bool = True
    math_attention: bool = False

    @property
    def needs_length(self) -> bool:
        """Whether the weight depends on the length of the training."""
        return bool(self.lam and (self.ramp or self.anneal_last))

    def strength(self, step: int, total_steps: int | None) -> float:
        """Weight of the reconciliation at a step (counted from 0); 0 where it is off."""
        if self.lam == 0 or step % self.every:
            return 0.0
        weight = self.lam * self.every
        if total_steps and self.ramp:
            weight *= min(1.0, (step + 1) / (self.ramp * total_steps))
        if total_steps and self.anneal_last:
            weight *= max(0.0, min(1.0, (total_steps - step) / (self.anneal_last * total_steps)))
        return weight


@dataclass(frozen=True, kw_only=True)
class HeadSpec(Settings):
    """The small classifier of a module.

    Args:
        kind: kind of head. auto is conv_gap for feature maps, token for tokens, lm for language models, linear for vectors.
            gap_linear (pool, linear), conv_gap (3 x 3 convolution, pool, two layers: InfoPro's), mlp_sr (DGL's), aug
            (AugLocal's layers of the rest of the network), token (LayerNorm, pooled tokens, linear), token_block (a
            transformer block before that), lm (RMSNorm, linear to the vocabulary, of low rank where rank is given), dense
            (convolutions and resizing, for a loss of the user's per position).
        layout: order of the dimensions of a module's map. auto goes by the width of the layers that make it, then by which of
            its sides are equal, and asks where neither tells.
        hidden: width of the hidden layer of conv_gap.
        channels: maximum number of channels of conv_gap's convolution, which has twice the module's (InfoPro's has no
            limit; in wide networks its weights would outweigh what is saved).
        classifier: last layer. trainable, random (fixed) or etf (fixed, simplex equiangular tight frame).
        pool: pooling of token: mean or cls (the first token).
        rank: rank of lm's factorized output layer; null is full.
        depth: maximum number of layers of an aug head; falls linearly to 1 at the last module.
        chunk: tokens of lm whose logits exist at a time.
        label_smoothing: share of the target spread over all classes.
        predsim: weight of the similarity-matching loss (PredSim); the cross-entropy has 1 - predsim. PredSim's paper: 0.99.
    """

    kind: HeadKind = "auto"
    layout: Literal["auto", "channels_first", "channels_last"] = "auto"
    hidden: Count = 128
    channels: Count = 256
    classifier: Literal["trainable", "random", "etf"] = "trainable"
    pool: Literal["mean", "cls"] = "mean"
    rank: Count | None = None
    depth: Count = 3
    chunk: Count = 2048
    label_smoothing: Part = 0.0
    predsim: Part = 0.0


@dataclass(frozen=True, kw_only=True)
class OptimizerKind(Settings):
    """The optimizer of each module.

    Args:
        name: sgd (with Nesterov momentum; one state per weight), adamw (two), or adamw8bit (two of 8 bits, by bitsandbytes).
    """

    name: Literal["sgd", "adamw", "adamw8bit"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(OptimizerKind):
    """The optimizer of each module, and its schedule over the training.

    Args:
        lr: peak learning rate.
        weight_decay: decay of all weights.
        momentum: momentum of sgd.
        schedule: cosine (to 0) or constant.
        warmup: share of the training over which the rate rises linearly.
    """

    lr: Positive = 3e-3
    weight_decay: NonNegative = 1e-4
    momentum: Part = 0.9
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Part = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model and its data.

    Args:
        model: mlp, convnet, resnet20, resnet32, resnet110 (of CIFAR), vit, gpt, timm:NAME, tv:NAME, hf:FOLDER_OR_CONFIG.json,
            packaged:NAME or py:MODULE:FUNCTION (which runs code of yours).
        data: digits, glyphs, topics, imagefolder:DIR, cifar10:DIR, npz:FILE or text:FILE.
        width: channels or features of the built-in models; default: that of the model.
        depth: blocks of mlp, convnet, vit and gpt; default: that of the model.
        weights: file of pretrained weights that the model starts from (safetensors, or a state dict of torch; nothing is
            unpickled); a classifier for other classes stays fresh.
        reading: how image files are read.
        image_size: side of the images of an imagefolder.
        window: tokens (bytes) in a row of text.
        batch_size: samples in a step.
    """

    model: str
    data: str
    width: Count | None = None
    depth: Count | None = None
    weights: str | None = None
    reading: Reading = field(default_factory=Reading)
    image_size: Count = 224
    window: Count = 128
    batch_size: Count = 64


@dataclass(frozen=True, kw_only=True)
class SplitSettings(ModelSettings):
    """Where the model is cut.

    Args:
        k: number of modules (4 is ours).
        budget: peak bytes of a training step, such as 2GB, in place of k; train takes the smallest number of modules that
            fits, plan finds the method of the least computation that does.
        balance: what the modules have equal shares of. memory (of their activations), flops, params or blocks.
        checkpointing: whether local and sgr compute the activations within a module a second time, in place of keeping them.
        cuts: numbers of the blocks, from 1 on, after which to cut, in place of k and balance.
        adapter: how the model is taken apart; auto tries all of them.
        head: the local heads.
        sgr: the reconciliation.
        optimizer: optimizer of each module.
    """

    k: Count = 4
    budget: str | None = None
    balance: Literal["memory", "flops", "params", "blocks"] = "memory"
    checkpointing: bool = False
    cuts: Annotated[list[Count], Length(1), Distinct()] | None = None
    adapter: str = "auto"
    head: HeadSpec = field(default_factory=HeadSpec)
    sgr: SGRConfig = field(default_factory=SGRConfig)
    optimizer: OptimizerKind = field(default_factory=OptimizerKind)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            parse_bytes(self.budget, "--budget")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(SplitSettings):
    """Decide where a model is cut, and predict the peak memory of a step; with a budget, which method to train by."""


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Settings):
    """How training items are varied.

    Args:
        augment: none, crop (random crop and flip, as usual on CIFAR) or timm (RandAugment, random erasing; needs timm).
        randaugment: policy of timm's RandAugment.
        erasing: probability of timm's random erasing.
    """

    augment: Literal["none", "crop", "timm"] = "none"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    erasing: Probability = 0.25


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(SplitSettings, AugmentSettings):
    """How a model is trained.

    Args:
        optimizer: optimizer of each module, and its schedule.
        epochs: passes over the training data.
        mixup: alpha of timm's mixup; 0 is off.
        cutmix: alpha of timm's CutMix; 0 is off.
        accumulate: parts that a batch is computed in, one after another, with the result of the whole.
        clip_norm: largest norm of a module's gradient; null leaves it.
        device: where to compute; auto takes a GPU when there is one.
        precision: 32, bf16 or 16 (mixed; 16 with a loss scale for each module); auto is bf16 on a GPU that has it.
        compile: whether each module is compiled.
        feedback: feedback of bpfree. transpose, fa (feedback alignment: fixed random weights) or sign.
        workers: processes that read the data.
        devices: number of devices.
        strategy: strategy of several devices: ddp (each module's gradients are averaged as soon as they are there) or auto.
    """

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    epochs: Count = 10
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    accumulate: Count = 1
    clip_norm: Positive | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool = False
    feedback: Feedback = "transpose"
    workers: Natural = 0
    devices: Count = 1
    strategy: Literal["auto", "ddp"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RecordSettings(Settings):
    """What a training measures and writes on its way.

    Args:
        validation: share of the training data that is held out and measured.
        validate_every: steps between two validations; 0 validates at the end of each epoch.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two rows of metrics.csv.
    """

    validation: Part = 0.0
    validate_every: Natural = 0
    checkpoint_every: Count = 500
    log_every: Count = 10


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainingSettings, RecordSettings):
    """Train a model, block by block or by one of the baselines.

    Args:
        method: sgr, local (no reconciliation), bp (ordinary back-propagation), ckpt (with activation checkpointing), accum
            (with gradient accumulation over k parts) or bpfree (closed form, one layer per module; mlp and convnet alone).
        seed: seed of weights, order, augmentation and dropout.
    """

    method: Method = "sgr"
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validate_every and not self.validation:
            raise UserError("--validate_every needs --validation, the share of the data that is held out")
        if self.checkpointing and self.method not in {"local", "sgr"}:
            raise UserError(
                f"--checkpointing is for local and sgr; --method {self.method} decides what is kept by itself"
            )


@dataclass(frozen=True, kw_only=True)
class CompareSettings(TrainingSettings):
    """Train by several methods over several seeds: accuracy, memory and time.

    Args:
        arms: methods to compare, of bp, ckpt, accum, local, sgr and bpfree; all with the same epochs, seeds and optimizer.
        ks: numbers of modules of local and sgr; default: k.
        seeds: seeds of weights, order, augmentation and dropout.
        executor: where arms are measured: processes:N on this machine, or dask:ADDRESS; default: here, one after another.
    """

    arms: Annotated[list[Method], Length(1), Distinct()] = field(default_factory=lambda: ["bp", "ckpt", "local", "sgr"])
    ks: Annotated[list[Count], Length(1), Distinct()] | None = None
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    executor: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ks is not None and (self.budget or self.cuts):
            raise UserError("--ks does not go with --budget or --cuts, which decide how many modules there are")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Which training a command works on.

    Args:
        run: folder of a finished `localrecon train`, or a file in it.
        data: data in the same form as the training's; default: the training's own.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    data: str | None = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(RunSettings):
    """Measure a training on its test data, with early exits if wanted.

    Args:
        threshold: probability from which on the first exit that has it is taken, and what that saves is measured; null
            takes the last exit.
    """

    threshold: Annotated[float, Interval(gt=0, le=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class DiagnoseSettings(RunSettings):
    """Show what the modules of a training want of each other.

    Args:
        samples: number of training samples to look at.
    """

    samples: Annotated[int, Ge(2)] = 256


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Write a trained model's weights under its own key names, or its graph.

    Args:
        run: folder of a finished `localrecon train`, or a file in it.
        format: safetensors (weights), torch-export or onnx (graph with weights).
        heads: whether the local heads are written, too, for early exits.
    """

    run: str
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    heads: bool = False


@dataclass(frozen=True, kw_only=True)
class DemoSettings(base.DemoSettings):
    """Show what reconciliation and local training do, on two cores."""
