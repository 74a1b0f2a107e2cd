"""Every setting of `corda`, and the one home of each default. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from tenfold import UserError
from tenfold.errors import did_you_mean

MODES = ("kpm", "ipm")


@dataclass(frozen=True, kw_only=True)
class CordaInit:
    """How an adapter is initialised.

    Args:
        mode: kpm (knowledge-preserved: adapt the components that the calibration text uses least, so that it is
            forgotten less) or ipm (instruction-previewed: adapt those that it uses most, so that the task is learned
            faster). The paper has no default; kpm is ours, since forgetting is what a plain LoRA cannot mend.
        power: p in W C_d^p: 1 is CorDA, 0.5 minimises the error of the layer's outputs, 0 ignores the text (PiSSA and
            MiLoRA).
        damping: lambda as a share of the mean of diag C (0.01 in the authors' code).
        scale: what one sample weighs in C: peft (its tokens divided by abs(max), mean over samples, as the authors'
            code and peft do), token_mean (every token the same, C divided by their number) or none (plain sum).
        balance: paper (square roots of sigma on both sides) or balanced (rows of A and columns of B of equal length,
            whatever the scale of C).
        solver: auto, randomized (ipm only), exact, or lapack_svd (all components, then crop; slow).
        precision: of the solve; auto is fp32 where nothing is lost by it (randomized) and fp64 elsewhere.
        skip_first: tokens at the start of each row that do not count (0 in the authors' code; the first token's
            activations can be massive).
        skip_null: kpm leaves out directions in which a rank-deficient weight itself is zero: they are its smallest
            components, but A and B would start at zero there and never train. False takes them, as the paper does.
        seed: of the randomised solver (233 in the authors' code).

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


EMBEDDED_DATA = ("topics", "code", "names")
"""Calibration text without a file: Python's documentation, its standard library's source, names of Unicode characters."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which text is read, and how it becomes batches.

    Args:
        fields: for JSON, the fields joined by newlines; default: text, or instruction/input/output, query/response,
            query/answer, question/answer, question, prompt/completion, messages, whichever a record holds.
        pack: tokens of a window cut from all texts joined by blank lines (2048 in the paper and in the authors' code);
            0 gives every text a row of its own, with its padding masked.
        max_length: tokens that a row of its own is cut at (2048 in the authors' code); without effect under pack.
        windows: number of windows or rows (256 in the paper).
        batch_size: rows that go through the model at once.
        seed: chooses windows and rows (233 in the authors' code).
    """

    fields: list[str] | None = None
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


@dataclass(frozen=True, kw_only=True)
class StatsSettings:
    """Settings of `corda stats`.

    Args:
        model: folder of a causal language model with its tokenizer, or its name on the hub.
        data: text:FILE, jsonl:FILE, json:FILE, or an embedded name (topics, code, names).
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        scale: what one sample weighs (peft, token_mean or none); baked into the statistics.
        skip_first: tokens at the start of each row that do not count.
        device: auto, cpu, cuda ...
        calibration: how the text is read.
    """

    model: str
    data: str
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    scale: Literal["peft", "token_mean", "none"] = CordaInit.scale
    skip_first: int = CordaInit.skip_first
    device: str = "auto"
    calibration: Calibration = field(default_factory=Calibration)


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """Settings of `corda init`.

    Args:
        model: folder of a causal language model with its tokenizer, or its name on the hub.
        data: calibration text (text:FILE, jsonl:FILE, json:FILE, topics, code, names); or give stats.
        stats: a file that `corda stats` wrote for this model, instead of data.
        r: rank of the adapter (128 in the paper; 16 is ours, as small as people train).
        alpha: LoRA's alpha; default r, so that the scaling is 1 as in the authors' code.
        targets: names of linear layers as peft takes them (q_proj,v_proj); all-linear is every one but the output head.
        residual: also write the residual model, which the initial adapter belongs to.
        device: auto, cpu, cuda ...
        init: mode, power and the rest of the method.
        calibration: how the text is read.
    """

    model: str
    data: str | None = None
    stats: str | None = None
    r: int = 16
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    residual: bool = True
    device: str = "auto"
    init: CordaInit = field(default_factory=CordaInit)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if self.init.power and (self.data is None) == (self.stats is None):
            raise UserError("give either --data or --stats")
        if self.r < 1:
            raise UserError(f"r must be at least 1, got {self.r}")


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Settings of `corda inspect`.

    Args:
        path: a file of `corda stats`, or the folder or report of `corda init`.
    """

    path: str


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
