"""Every setting of `corda`, and the one home of each default. Imports no torch."""

import re
from dataclasses import dataclass, field
from typing import Literal

from tenfold import UserError
from tenfold.errors import did_you_mean

MODES = ("kpm", "ipm")
Attach = Literal["residual", "anchor"]
"""Where the adapter's start is taken off: from the base's weight, or beside it."""


@dataclass(frozen=True, kw_only=True)
class CordaInit:
    """How an adapter is initialized.

    Args:
        mode: kpm (knowledge-preserved: adapt the components that the calibration text uses least, so that it is
            forgotten less) or ipm (instruction-previewed: adapt those that it uses most, so that the task is learned
            faster). The paper has no default; kpm is ours, since forgetting is what a plain LoRA cannot mend.
        power: p in W C_d^p: 1 is CorDA, 0.5 minimizes the error of the layer's outputs, 0 ignores the text (PiSSA and
            MiLoRA).
        damping: lambda as a share of the mean of diag C (0.01 in the authors' code).
        scale: what one sample weighs in C: peft (its tokens divided by abs(max), mean over samples, as the authors'
            code and peft do), token_mean (every token the same, C divided by their number) or none (plain sum).
        balance: paper (square roots of sigma on both sides) or balanced (rows of A and columns of B of equal length,
            whatever the scale of C).
        solver: auto, randomized (ipm only), exact, or lapack_svd (all components, then crop; slow).
        precision: of the solve; auto is fp32 where nothing is lost by it (randomized) and fp64 elsewhere.
        accumulate: what is summed up for a layer of n inputs and m outputs: cov (C, n x n, once for all layers of one
            input), cross (W C, m x n, each layer for itself; serves power 1 and nothing but factors), or auto (cross
            where layers of one input have fewer outputs than inputs together and nobody but the solver needs C).
        skip_first: tokens at the start of each row that do not count (0 in the authors' code; the first token's
            activations can be massive).
        skip_null: kpm leaves out directions in which a rank-deficient weight itself is zero: they are its smallest
            components, but A and B would start at zero there and never train. False takes them, as the paper does.
        seed: of the randomized solver (233 in the authors' code).

    Raises:
        UserError: a value outside of its choices.
    """

    mode: Literal["kpm", "ipm"] = "kpm"
    power: float = 1.0
    damping: float = 0.01
    scale: Literal["peft", "token_mean", "none"] = "peft"
    balance: Literal["paper", "balanced"] = "paper"
    solver: Literal["auto", "randomized", "exact", "lapack_svd"] = "auto"
    precision: Literal["auto", "fp32", "fp64"] = "auto"
    accumulate: Literal["auto", "cov", "cross"] = "auto"
    skip_first: int = 0
    skip_null: bool = True
    seed: int = 233

    def __post_init__(self) -> None:
        choices = {
            "mode": MODES,
            "scale": ("peft", "token_mean", "none"),
            "balance": ("paper", "balanced"),
            "solver": ("auto", "randomized", "exact", "lapack_svd"),
            "precision": ("auto", "fp32", "fp64"),
            "accumulate": ("auto", "cov", "cross"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"unknown {name} '{getattr(self, name)}': {did_you_mean(str(getattr(self, name)), known)}"
                )
        if self.power not in (0, 0.5, 1):
            raise UserError(f"power must be 0, 0.5 or 1, got {self.power}")
        if not self.damping > 0:
            raise UserError(f"damping must be above 0, got {self.damping}")
        if self.skip_first < 0:
            raise UserError(f"skip_first must be at least 0, got {self.skip_first}")
        if self.mode == "kpm" and self.solver == "randomized":
            raise UserError("solver randomized finds leading components only; mode kpm takes exact or lapack_svd")
        if self.accumulate == "cross" and self.power != 1:
            raise UserError(f"accumulate cross serves power 1 only, got power {self.power}; take accumulate cov")


EMBEDDED_DATA = ("topics", "code", "names")
"""Calibration text without a file: Python's documentation, its standard library's source, names of Unicode characters."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which text is read, and how it becomes batches.

    Args:
        fields: of a record, joined by newlines; default: what a record holds of input_ids (tokens already), messages,
            conversations, conversation, text, instruction/input/output, query/response, query/answer, question/answer,
            question, prompt/completion.
        chat_template: how turns become text. tokenizer (its own template), plain (joined by newlines), a file with a
            Jinja template, or the template itself. Default: the tokenizer's for messages and conversations, plain for
            pairs such as query/response, which another value makes a user's and an assistant's turn.
        skip_bad: leave out records that cannot be read and say how many; else the first one ends the command.
        pack: tokens of a window cut from all texts joined by blank lines (2048 in the paper and in the authors' code);
            0 gives every text a row of its own, with its padding masked.
        max_length: tokens that a row of its own is cut at (2048 in the authors' code); without effect under pack.
        windows: number of windows or rows (256 in the paper).
        batch_size: rows that go through the model at once.
        seed: chooses windows and rows (233 in the authors' code).
    """

    fields: list[str] | None = None
    chat_template: str | None = None
    skip_bad: bool = False
    pack: int = 2048
    max_length: int = 2048
    windows: int = 256
    batch_size: int = 4
    seed: int = 233

    def __post_init__(self) -> None:
        for name in ("max_length", "windows", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pack < 0:
            raise UserError(f"pack must be a number of tokens, or 0 for one text a row, got {self.pack}")
        if self.fields == []:
            raise UserError("fields must name at least one field; leave it out for the usual names")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model a command works on.

    Args:
        model: folder of a causal language model with its tokenizer, or its name on the hub.
        device: auto (cuda where there is one), cpu, cuda, cuda:1 ...
    """

    model: str
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class AdapterSettings(ModelSettings):
    """What the adapter covers, as peft takes it.

    Args:
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        r: rank of the adapter (128 in the paper; 16 is ours, as small as people train).
        alpha: LoRA's alpha; default r, so that the scaling alpha / r is 1 as in the authors' code.
        rslora: scale by alpha / sqrt(r) instead (rank-stabilized LoRA).
    """

    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    r: int = 16
    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"r must be at least 1, got {self.r}")
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"alpha must be above 0, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class PlusSettings(AdapterSettings):
    """CorDA++ (experimental): which covariance and which rank each layer gets.

    Args:
        select_per: from several statistics, each layer takes its own (layer), or those that share an input take one
            together (group).
        allocation: ranks by layer under one budget. uniform (the same for all), corda++ (experimental: the paper's
            bound; its equations are second-hand) or energy (ours: exact shares of output energy).
        budget: parameters of all adapters together, as a number or as uniform:R, what rank R for all would cost;
            default uniform:r.
    """

    select_per: Literal["layer", "group"] = "layer"
    allocation: Literal["uniform", "energy", "corda++"] = "uniform"
    budget: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and not re.fullmatch(r"(uniform:)?[1-9]\d*", self.budget):
            raise UserError(f"budget must be a number of parameters or uniform:R, got '{self.budget}'")


@dataclass(frozen=True, kw_only=True)
class StatsSettings(ModelSettings):
    """Settings of `corda stats`.

    Args:
        data: text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER (of save_to_disk), or an embedded name
            (topics, code, names).
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        scale: what one sample weighs (peft, token_mean or none); baked into the statistics.
        skip_first: tokens at the start of each row that do not count.
        accumulate: cov (C, which serves every power and command) or cross (W C, for CorDA itself, smaller in layers with
            fewer outputs than inputs).
        candidates: split the windows into so many parts with a file for each, for CorDA++ to choose from; 0 is one file
            of all.
        calibration: how the text is read.
    """

    data: str
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    scale: Literal["peft", "token_mean", "none"] = CordaInit.scale
    skip_first: int = CordaInit.skip_first
    accumulate: Literal["cov", "cross"] = "cov"
    candidates: int = 0
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        _check_candidates(self.candidates, self.calibration)


def _check_candidates(candidates: int, calibration: Calibration) -> None:
    if candidates < 0 or candidates == 1:
        raise UserError(f"candidates must be 0 (none) or at least 2, got {candidates}")
    if candidates > calibration.windows:
        raise UserError(f"{candidates} candidates need as many windows; there are {calibration.windows}")


@dataclass(frozen=True, kw_only=True)
class InitSettings(PlusSettings):
    """Settings of `corda init`.

    Args:
        data: calibration text (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code, names);
            or give stats.
        stats: files or folders of `corda stats` for this model, instead of data; of several, each layer takes one or
            their sum (CorDA++, experimental).
        attach: residual (the base's weights change by what the adapter starts with, as in the paper) or anchor (the base
            stays as it is, quantized or not).
        residual: also write the residual model, which the initial adapter belongs to.
        ranks: a file of `corda allocate`; each layer gets its rank from there.
        candidates: split the windows into so many parts; each layer takes the statistics of one of them or of all
            (CorDA++, experimental; 4 is ours, the paper's number is unknown); 0 takes all.
        stream: one decoder block at a time, so that statistics need little memory; then they are not saved.
        memory_budget: the statistics in memory at once, such as 6GB; implies stream, with several passes where one block
            needs more.
        init: mode, power and the rest of the method.
        calibration: how the text is read.
    """

    data: str | None = None
    stats: list[str] | None = None
    attach: Attach = "residual"
    residual: bool = True
    ranks: str | None = None
    candidates: int = 0
    stream: bool = False
    memory_budget: str | None = None
    init: CordaInit = field(default_factory=CordaInit)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init.power and (self.data is None) == (self.stats is None):
            raise UserError("give either --data or --stats")
        if self.ranks is not None and (self.allocation != "uniform" or self.budget is not None):
            raise UserError("give either --ranks or an --allocation with its --budget")
        if self.data is not None:
            _check_candidates(self.candidates, self.calibration)
        elif self.candidates:
            raise UserError("--candidates splits --data; of --stats, give several")
        if self.stream or self.memory_budget is not None:
            if self.data is None or not self.init.power:
                raise UserError("--stream and --memory_budget collect statistics: give --data")
            if self.candidates or self.allocation != "uniform":
                raise UserError("--stream and --memory_budget do not keep statistics to choose from; use `corda stats`")


@dataclass(frozen=True, kw_only=True)
class AllocateSettings(PlusSettings):
    """Settings of `corda allocate`.

    Args:
        stats: files or folders of `corda stats` for this model; of several, each layer takes one or their sum.
        allocation: ranks by layer under one budget. uniform (the same for all), corda++ (experimental: the paper's
            bound; its equations are second-hand) or energy (ours: exact shares of output energy).
        init: mode, power and damping count.
    """

    stats: list[str]
    allocation: Literal["uniform", "energy", "corda++"] = "corda++"
    init: CordaInit = field(default_factory=CordaInit)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(AdapterSettings):
    """Settings of `corda compare`.

    Args:
        keep: text that the model must not lose (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics,
            code, names); calibrates corda-kpm.
        learn: text that it is to learn, likewise; trains all arms and calibrates corda-ipm.
        arms: starts to compare, of lora, pissa, milora, corda-kpm and corda-ipm.
        learning_rates: tried with every arm, on a seed of their own; the best by validation text is reported.
        seeds: of the report.
        steps: of each training.
        eval_every: steps between two looks at the held-out text.
        init: what is not the arm's own (balance, damping, solver ...); mode and power are each arm's.
        keep_text: how the text to keep is read; half of its windows calibrate, a quarter validates, a quarter is reported.
        learn_text: how the text to learn is read; half of its windows calibrate and train, batch_size at a time, a quarter
            validates, a quarter is reported.
    """

    keep: str
    learn: str
    arms: list[Literal["lora", "pissa", "milora", "corda-kpm", "corda-ipm"]] = field(
        default_factory=lambda: ["lora", "pissa", "milora", "corda-kpm", "corda-ipm"]
    )
    learning_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 200
    eval_every: int = 20
    init: CordaInit = field(default_factory=CordaInit)
    keep_text: Calibration = field(default_factory=lambda: Calibration(pack=512))
    learn_text: Calibration = field(default_factory=lambda: Calibration(pack=512))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("arms", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one, and none twice; got {values}")
        if min(self.learning_rates) <= 0:
            raise UserError(f"learning_rates must be above 0, got {self.learning_rates}")
        if self.steps < 1 or self.eval_every < 1:
            raise UserError(f"steps and eval_every must be at least 1, got {self.steps} and {self.eval_every}")
        if any(seed >= 100 for seed in self.seeds):
            raise UserError(f"seeds from 100 on are for tuning; report others, got {self.seeds}")


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Settings of `corda inspect`.

    Args:
        path: a folder that a command wrote, one of its files, or the folder of a LoRA adapter.
    """

    path: str


@dataclass(frozen=True, kw_only=True)
class VerifySettings(ModelSettings):
    """Settings of `corda verify`.

    Args:
        model: the base model that `corda init` was given.
        initial: folder of that `corda init`.
        data: text that both models read (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code,
            names).
        calibration: how the text is read.
    """

    initial: str
    data: str = "topics"
    calibration: Calibration = field(default_factory=lambda: Calibration(pack=256, windows=4))


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Settings of `corda convert`.

    Args:
        adapter: folder of the trained adapter, as peft saves it.
        initial: folder of the `corda init` that it was started from; an anchored adapter holds its start itself.
        model: the base (or residual) model, checked to be the one that was initialized; default: not checked.
        rank: recompress to this rank; default: twice the trained one, which loses nothing.
        tol: recompress each layer to the smallest rank that loses at most this share of the change.
    """

    adapter: str
    initial: str | None = None
    model: str | None = None
    rank: int | None = None
    tol: float | None = None


@dataclass(frozen=True, kw_only=True)
class TruncateSettings(ModelSettings):
    """Settings of `corda truncate`.

    Args:
        data: calibration text (text:FILE, jsonl:FILE, json:FILE, parquet:FILE, dataset:FOLDER, or topics, code, names);
            or give stats.
        stats: a file or folder of `corda stats` for this model, instead of data.
        drop: share of the components that each layer loses (0.25), or their number (64).
        method: cosvd (context-oriented), asvd, or svd (which needs no text).
        power: of cosvd. 1 is CorDA's; 0.5 is the least error of the layer's outputs.
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        calibration: how the text is read.
    """

    drop: int | float
    data: str | None = None
    stats: str | None = None
    method: Literal["cosvd", "asvd", "svd"] = "cosvd"
    power: float = CordaInit.power
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if (self.data is None) + (self.stats is None) != (2 if self.method == "svd" else 1):
            raise UserError("method svd takes neither --data nor --stats; the others either --data or --stats")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `corda demo`.

    Args:
        level: quick (mechanics only), default (direction of the main claim) or full (five seeds decide every claim).
        seeds: of the small models; default: 0 for quick and default, 0 to 4 for full.
        steps: training steps of a small model; default: 20 for quick, 800 for default, 1200 for full.
        facts: number of facts that it learns; half of them calibrate, the other half are measured.
        rank: of the adapters whose directions are compared, up to 64.
        asvd_alpha: exponent of the ASVD baseline (0.5 in its paper; on seeds 100 and 104, 0.75 was within 1 % of it, 0.25
            and 1 were worse).
    """

    level: Literal["quick", "default", "full"] = "default"
    seeds: list[int] | None = None
    steps: int | None = None
    facts: int = 192
    rank: int = 8
    asvd_alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.facts < 4 or self.rank < 1 or (self.steps is not None and self.steps < 1) or self.seeds == []:
            raise UserError("facts must be at least 4, rank and steps at least 1, and seeds not empty")
        if self.rank > 64:
            raise UserError(f"rank must be at most 64, the width of the smallest layer, got {self.rank}")
