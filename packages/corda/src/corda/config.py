"""Every setting of `corda`, and the one home of each default. Imports no torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

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
    parse_bytes,
)
from tenfold.config import DemoSettings as SharedDemoSettings

MODES = ("kpm", "ipm")
Attach = Literal["residual", "anchor"]
"""Where the adapter's start is subtracted: from the base's weight, or beside it."""
Allocation = Literal["uniform", "energy", "corda++"]
Arm = Literal["lora", "pissa", "milora", "corda-kpm", "corda-ipm"]
Task = Literal["causal", "seq2seq", "sequence-classification", "token-classification", "image-text"]
Scale = Literal["peft", "token_mean", "none"]
Targets = Annotated[list[str], Length(1)]
EMBEDDED_DATA = ("topics", "code", "names")
"""Calibration text without a file: Python's documentation, its standard library's source, names of Unicode characters."""
POWERS = (0, 0.5, 1)
SEED = 233
"""The seed of the authors' code."""


@dataclass(frozen=True, kw_only=True)
class StartSettings(Settings):
    """What all starts of an adapter share, whatever their mode and power.

    Args:
        damping: lambda as a share of the mean of diag C (0.01 in the authors' code).
        scale: weight of a sample in C. peft (its tokens divided by abs(max), mean over samples, as in the authors' code and
            in peft), token_mean (every token the same, C divided by their number) or none (plain sum).
        balance: paper (square roots of sigma on both sides) or balanced (rows of A and columns of B of equal length,
            whatever the scale of C).
        precision: precision of the solve; auto is fp32 where that loses nothing (randomized) and fp64 elsewhere.
        skip_first: number of tokens at the start of each row that do not count (0 in the authors' code; the first token's
            activations can be massive).
        skip_null: whether kpm leaves out directions in which a rank-deficient weight itself is zero. They are its smallest
            components, but A and B would start at zero there and never train; false takes them, as the paper does.
        seed: seed of the randomized solver (233 in the authors' code).
    """

    damping: Positive = 0.01
    scale: Scale = "peft"
    balance: Literal["paper", "balanced"] = "paper"
    precision: Literal["auto", "fp32", "fp64"] = "auto"
    skip_first: Natural = 0
    skip_null: bool = True
    seed: Seed = SEED


@dataclass(frozen=True, kw_only=True)
class CordaInit(StartSettings):
    """How an adapter is initialized.

    Besides these arguments it has those of ``StartSettings``: damping, scale, balance, precision, skip_first, skip_null and
    seed.

    Args:
        mode: kpm (knowledge-preserved: adapt the components that the calibration text uses least, so that it is
            forgotten less) or ipm (instruction-previewed: adapt those that it uses most, so that the task is learned
            faster). The paper has no default; kpm is ours, since forgetting is what a plain LoRA cannot mend.
        power: p in W C_d^p. 1 is CorDA, 0.5 minimizes the error of the layer's outputs, 0 ignores the text (PiSSA and
            MiLoRA).
        solver: auto, randomized (ipm only), exact, or lapack_svd (all components, then crop; slow).
        accumulate: what is summed up for a layer of n inputs and m outputs. cov (C, n x n, once for all layers of one
            input), cross (W C, m x n, for each layer by itself; serves power 1 and only factors), or auto (cross where
            layers of one input together have fewer outputs than inputs and only the solver needs C).

    Raises:
        SettingError: a value outside of its choices, or one that the mode or the power does not allow.
    """

    mode: Literal["kpm", "ipm"] = "kpm"
    power: float = 1.0
    solver: Literal["auto", "randomized", "exact", "lapack_svd"] = "auto"
    accumulate: Literal["auto", "cov", "cross"] = "auto"

    @classmethod
    def from_peft(cls, config: Any, **options: Any) -> "CordaInit":
        """The settings that a ``CordaConfig`` of peft describes; its files and switches are not the method's.

        Args:
            config: peft's ``CordaConfig``.
            options: further settings.
        """
        return cls(mode=config.corda_method, **options)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_power(self.power)
        if self.mode == "kpm" and self.solver == "randomized":
            raise SettingError(
                "solver", "randomized finds leading components only, expected exact or lapack_svd for kpm"
            )
        if self.accumulate == "cross" and self.power != 1:
            raise SettingError("accumulate", f"cross serves power 1 only, expected cov for power {self.power}")


def _check_power(power: float) -> None:
    if power not in POWERS:
        raise SettingError("power", f"expected one of {', '.join(map(str, POWERS))}, got {power}")


@dataclass(frozen=True, kw_only=True)
class Calibration(Settings):
    """How text is read, and how it becomes batches.

    Args:
        fields: names of a record's fields, joined by newlines; default: what a record holds of input_ids (tokens already),
            messages, conversations, conversation, text, instruction/input/output, query/response, query/answer,
            question/answer, question, prompt/completion.
        chat_template: how turns become text. tokenizer (its own template), plain (joined by newlines), a file with a
            Jinja template, or the template itself. Default: the tokenizer's for messages and conversations, plain for
            pairs such as query/response, which any other value makes a user's and an assistant's turn.
        skip_bad: whether to leave out records that cannot be read and say how many; else the first one ends the command.
        pack: number of tokens of a window that is cut from all texts, joined by blank lines (2048 in the paper and in the
            authors' code); 0 gives each text its own row, with its padding masked.
        max_length: number of tokens at which a row of its own is cut (2048 in the authors' code); for pack 0.
        windows: number of windows or rows (256 in the paper).
        batch_size: number of rows that go through the model at once.
    """

    fields: Annotated[list[str], Length(1)] | None = None
    chat_template: str | None = None
    skip_bad: bool = False
    pack: Natural = 2048
    max_length: Count = 2048
    windows: Count = 256
    batch_size: Count = 4


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model that a command works on.

    Args:
        model: model of transformers. hf:PATH (a folder with its tokenizer, or a name on the hub), packaged:smollm2, or
            py:MODULE:FUNCTION (which has no tokenizer).
        device: device to compute on; auto is a GPU where there is one.
    """

    model: str
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class LayerSettings(ModelSettings):
    """What kind of model it is, and which of its layers are meant, as peft takes them.

    Args:
        task: kind of the model. causal (language model), seq2seq (encoder-decoder, whose records hold what is asked and what
            is answered), sequence-classification, token-classification, or image-text (calibrated by text alone).
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        exclude: names of layers, or of modules with all that lies below them, that are left out (vision_tower).
        layers: numbers of the blocks whose layers are meant; default: all of them.
    """

    task: Task = "causal"
    targets: Targets = field(default_factory=lambda: ["all-linear"])
    exclude: Targets | None = None
    layers: Annotated[list[Natural], Length(1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.targets == ["all-linear"]:
            raise SettingError("layers", "expected --targets by name with it, as peft does, got all-linear")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(LayerSettings):
    """What the adapter covers, as peft takes it.

    Args:
        r: rank of the adapter (128 in the paper; 16 is ours, as small as people train).
        alpha: LoRA's alpha; default r, so that the scaling alpha / r is 1 as in the authors' code.
        rslora: whether to scale by alpha / sqrt(r) instead (rank-stabilized LoRA).
        rank_pattern: ranks of layers of their own, by the end of their names, {"down_proj": 8}.
        alpha_pattern: alphas of layers of their own, likewise.
    """

    r: Count = 16
    alpha: Positive | None = None
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            for layer, value in getattr(self, name).items():
                if value <= 0:
                    raise SettingError(name, f"expected more than 0 for {layer}, got {value}")


@dataclass(frozen=True, kw_only=True)
class PlusSettings(AdapterSettings):
    """CorDA++ (experimental): which covariance and which rank each layer gets.

    Args:
        select_per: how one of several statistics is chosen. layer (each layer takes its own) or group (layers that share
            an input take one together).
        allocation: how ranks are given to layers under one budget. uniform (the same for all), corda++ (experimental: the
            paper's bound; its equations are second-hand) or energy (ours: exact shares of output energy).
        budget: parameters of all adapters together, as a number or as uniform:R, what rank R for all would cost;
            default uniform:r.
    """

    select_per: Literal["layer", "group"] = "layer"
    allocation: Allocation = "uniform"
    budget: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not re.fullmatch(r"(uniform:)?[1-9]\d*", self.budget):
            raise SettingError("budget", f"expected a number of parameters or uniform:R, got '{self.budget}'")


@dataclass(frozen=True, kw_only=True)
class StatsSettings(LayerSettings):
    """Run calibration text through a model and save what its layers see.

    Args:
        data: calibration text. text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER (of save_to_disk), or an
            embedded name (topics, code, names).
        seed: seed of the choice of windows (233 in the authors' code).
        scale: weight of a sample (peft, token_mean or none); part of the statistics.
        skip_first: number of tokens at the start of each row that do not count.
        accumulate: what is summed up. cov (C, which serves every power and command) or cross (W C, for CorDA itself,
            smaller in layers with fewer outputs than inputs).
        candidates: number of parts that the windows are split into, each with its own file, for CorDA++ to choose from;
            0 is one file of all.
        calibration: how the text is read.
    """

    data: str
    seed: Seed = SEED
    scale: Scale = CordaInit.scale
    skip_first: Natural = CordaInit.skip_first
    accumulate: Literal["cov", "cross"] = "cov"
    candidates: Natural = 0
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_candidates(self.candidates, self.calibration)


def _check_candidates(candidates: int, calibration: Calibration) -> None:
    if candidates == 1:
        raise SettingError("candidates", "expected 0 (none) or 2 or more, got 1")
    if candidates > calibration.windows:
        raise SettingError("candidates", f"expected at most the {calibration.windows} windows, got {candidates}")


@dataclass(frozen=True, kw_only=True)
class InitSettings(PlusSettings):
    """Make the initial adapter and the residual model that it belongs to.

    Args:
        data: calibration text (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code, names),
            unless stats are given.
        stats: files or folders of `corda stats` for this model, instead of data; of several, each layer takes one or
            their sum (CorDA++, experimental).
        seed: seed of the choice of windows (233 in the authors' code).
        attach: residual (the base's weights change by what the adapter starts with, as in the paper) or anchor (the base
            stays as it is, quantized or not).
        residual: whether to write the residual model too, to which the initial adapter belongs.
        ranks: file of `corda allocate`, from which each layer gets its rank.
        candidates: number of parts that the windows are split into; each layer takes the statistics of one of them or of
            all (CorDA++, experimental; 4 is ours, the paper's number is unknown); 0 takes all.
        stream: whether to go one decoder block at a time, so that statistics need little memory; they are then not saved.
        memory_budget: memory for statistics at once, such as 6GB; implies stream, with several passes where one block
            needs more.
        init: mode, power and the rest of the method.
        calibration: how the text is read.
    """

    data: str | None = None
    stats: Annotated[list[str], Length(1)] | None = None
    seed: Seed = SEED
    attach: Attach = "residual"
    residual: bool = True
    ranks: str | None = None
    candidates: Natural = 0
    stream: bool = False
    memory_budget: str | None = None
    init: CordaInit = field(default_factory=CordaInit)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init.power and (self.data is None) == (self.stats is None):
            raise UserError("give either --data or --stats")
        if self.rank_pattern and (self.ranks is not None or self.allocation != "uniform" or self.budget is not None):
            raise UserError("--ranks, --allocation and --budget give every layer its rank: leave --rank_pattern out")
        if self.ranks is not None and (self.allocation != "uniform" or self.budget is not None):
            raise UserError("give either --ranks or an --allocation with its --budget")
        if self.data is not None:
            _check_candidates(self.candidates, self.calibration)
        elif self.candidates:
            raise UserError("--candidates splits --data; of --stats, give several")
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget, "--memory_budget")
        if self.stream or self.memory_budget is not None:
            if self.data is None or not self.init.power:
                raise UserError("--stream and --memory_budget collect statistics: give --data")
            if self.candidates or self.allocation != "uniform":
                raise UserError("--stream and --memory_budget keep no statistics to choose from; use `corda stats`")


@dataclass(frozen=True, kw_only=True)
class Spectrum(Settings):
    """The singular values that ranks are allocated by.

    Args:
        mode: kpm (adapts the smallest components of each layer) or ipm (the largest).
        power: p in W C_d^p (1, 0.5 or 0).
        damping: lambda as a share of the mean of diag C.
    """

    mode: Literal["kpm", "ipm"] = CordaInit.mode
    power: float = CordaInit.power
    damping: Positive = CordaInit.damping

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_power(self.power)


@dataclass(frozen=True, kw_only=True)
class AllocateSettings(PlusSettings):
    """Give each layer its rank under one budget (experimental).

    Args:
        stats: files or folders of `corda stats` for this model; of several, each layer takes one or their sum.
        allocation: how ranks are given to layers under one budget. uniform (the same for all), corda++ (experimental: the
            paper's bound; its equations are second-hand) or energy (ours: exact shares of output energy).
        init: singular values that the ranks follow.
    """

    stats: Annotated[list[str], Length(1)]
    allocation: Allocation = "corda++"
    init: Spectrum = field(default_factory=Spectrum)


@dataclass(frozen=True, kw_only=True)
class ArmSettings(StartSettings):
    """What is not an arm's own: mode and power are.

    Args:
        solver: auto, exact, or lapack_svd (all components, then crop; slow).
    """

    solver: Literal["auto", "exact", "lapack_svd"] = "auto"


@dataclass(frozen=True, kw_only=True)
class CompareSettings(AdapterSettings):
    """Fine-tune from several starts on your own texts and compare what they learn and lose.

    Args:
        keep: text that the model must not lose (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics,
            code, names); calibrates corda-kpm.
        learn: text that the model is to learn, from the same kinds of source; trains all arms and calibrates corda-ipm.
        arms: starts to compare, of lora, pissa, milora, corda-kpm and corda-ipm.
        learning_rates: learning rates that are tried with every arm, on a seed of their own; the best by validation text
            is reported.
        seeds: seeds of the report.
        steps: number of steps of each training.
        validate_every: steps between two measurements of the held-out text.
        executor: where arms are measured. processes:N on this machine, or dask:ADDRESS; default: here, one after another.
        init: what the arms share (damping, balance, solver ...).
        keep_text: how the text to keep is read; half of its windows calibrate, a quarter validates, a quarter is reported.
        learn_text: how the text to learn is read; half of its windows calibrate and train, batch_size at a time, a quarter
            validates, a quarter is reported.
    """

    keep: str
    learn: str
    arms: Annotated[list[Arm], Length(1), Distinct()] = field(
        default_factory=lambda: ["lora", "pissa", "milora", "corda-kpm", "corda-ipm"]
    )
    learning_rates: Annotated[list[Positive], Length(1), Distinct()] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    steps: Count = 200
    validate_every: Count = 20
    executor: str | None = None
    init: ArmSettings = field(default_factory=ArmSettings)
    keep_text: Calibration = field(default_factory=lambda: Calibration(pack=512))
    learn_text: Calibration = field(default_factory=lambda: Calibration(pack=512))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task != "causal":
            raise SettingError("task", f"expected causal, whose loss of the next token is compared, got {self.task}")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show what a command wrote, or any LoRA, layer by layer.

    Args:
        run: folder that a command wrote, one of its files, or the folder of a LoRA adapter.
    """

    run: str


@dataclass(frozen=True, kw_only=True)
class VerifySettings(ModelSettings):
    """Check that an initialization starts at the base model.

    Args:
        model: base model that `corda init` was given (hf:PATH, packaged:smollm2 or py:MODULE:FUNCTION).
        run: folder of that `corda init`.
        data: text that both models read (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code,
            names).
        seed: seed of the choice of windows.
        calibration: how the text is read.
    """

    run: str
    data: str = "topics"
    seed: Seed = SEED
    calibration: Calibration = field(default_factory=lambda: Calibration(pack=256, windows=4))


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Turn a trained adapter into a plain LoRA of the untouched base.

    Args:
        adapter: folder of the trained adapter, as peft saves it.
        run: folder of the `corda init` that it was started from, the initial adapter alone, or the corda_start.safetensors
            of a trainer's callback; an anchored adapter holds its start itself.
        model: base (or residual) model, which is then checked to be the one that was initialized; default: not checked.
        rank: rank to recompress to; default: twice the trained one, which loses nothing.
        tol: share of each layer's change that may be lost, to recompress to the smallest rank that loses no more.
    """

    adapter: str
    run: str | None = None
    model: str | None = None
    rank: Count | None = None
    tol: Annotated[float, Interval(ge=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.tol is not None:
            raise UserError("give either --rank or --tol")


@dataclass(frozen=True, kw_only=True)
class TruncateSettings(LayerSettings):
    """Drop components of every layer and write the truncated model.

    Args:
        data: calibration text (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code, names),
            unless stats are given.
        stats: file or folder of `corda stats` for this model, instead of data.
        seed: seed of the choice of windows (233 in the authors' code).
        drop: share of the components that each layer loses (0.25) or, from 1 on, their number (64).
        method: cosvd (context-oriented), asvd, or svd (which needs no text).
        power: power of cosvd. 1 is CorDA's; 0.5 is the least error of the layer's outputs.
        calibration: how the text is read.
    """

    drop: NonNegative
    data: str | None = None
    stats: str | None = None
    seed: Seed = SEED
    method: Literal["cosvd", "asvd", "svd"] = "cosvd"
    power: float = CordaInit.power
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_power(self.power)
        if self.drop >= 1 and self.drop != int(self.drop):
            raise SettingError("drop", f"expected a share below 1 or a whole number of components, got {self.drop}")
        if (self.data is None) + (self.stats is None) != (2 if self.method == "svd" else 1):
            raise UserError("--method svd takes neither --data nor --stats; the others take one of them")


@dataclass(frozen=True, kw_only=True)
class DemoSettings(SharedDemoSettings):
    """Train a small Llama, or take a real one, and show what the method does to it.

    Args:
        world: llama (trained on the spot; facts, directions and fine-tuning too), or smollm2 (truncation of SmolLM2-135M, which
            is installed as a package; takes minutes at every level but quick).
        steps: number of training steps of a small model; default: 20 for quick, 800 for default, 1200 for full.
        facts: number of facts that it learns; half of them calibrate, the other half are measured.
        rank: rank of the adapters whose directions are compared; at most 64, the width of the smallest layer.
        asvd_alpha: exponent of the ASVD baseline (0.5 in its paper; on seeds 100 and 104, 0.75 was within 1 % of it, 0.25
            and 1 were worse).
    """

    world: Literal["llama", "smollm2"] = "llama"
    steps: Count | None = None
    facts: Annotated[int, Ge(4)] = 192
    rank: Annotated[int, Interval(ge=1, le=64)] = 8
    asvd_alpha: NonNegative = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.world != "llama" and self.steps is not None:
            raise SettingError("steps", f"expected none, since world {self.world} trains nothing, got {self.steps}")
