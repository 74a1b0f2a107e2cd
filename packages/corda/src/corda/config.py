"""Every setting of `corda`, and the one home of each default. Imports no torch."""

from dataclasses import dataclass
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
