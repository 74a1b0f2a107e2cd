"""Every setting of `visctrl`, and the one home of each default. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tenfold.config import (
    Count,
    NonNegative,
    Positive,
    Probability,
    SettingError,
    Settings,
    Share,
    parse_bytes,
)

Mode = Literal["replace", "union", "subject"]
BankKind = Literal["auto", "memory", "pinned", "stream"]
Preset = Literal["none", "paper", "masactrl", "fast"]
Arm = str


@dataclass(frozen=True, kw_only=True)
class VisCtrlConfig(Settings):
    """How a reference enters a target.

    Args:
        steps: denoising steps of a round.
        start: share of the steps that pass before injection begins; later keeps more of the target's structure.
        layers: self-attention layers, in the order of execution: 1: (from 1 on), 44:64, 0,3,-1, up, a module's name.
        rounds: how often the edited picture becomes the next target.
        guidance: guidance scale of the sampling (default: 4 where the model takes prompts, else 1, which is none).
        inversion_guidance: guidance scale of the inversion (null: that of the sampling, as the released code does).
        guidance_rows: reference branch that the target's branches read: cond for both, or each its own (match).
        refine: network evaluations per level of the inversion; 1 is plain inversion.
        mode: what a target attends to: replace (the reference), union (both), subject (own background, their subject).
        strength: share of the injected attention output.
        bias: added to the logits of the reference's keys, in modes union and subject.
        partial: invert the target only to the level at which injection begins; exact where both guidances agree.
        later_steps: steps of the rounds after the first (default: as the first).
        later_start: start of the rounds after the first (default: as the first).
        later_guidance: guidance of the rounds after the first (default: as the first).
        bank: where the reference's features are kept: memory, pinned (CPU), stream (not at all: its rows ride in the
            batch), or auto (memory up to max_bank, else stream).
        max_bank: largest size of the features for bank auto, such as 4GB or 500MiB.
        lock: hold everything outside of the target's mask to the target, where there is a mask.
        guard: stop before a round that would drift, and return the round before it.
        max_residual: relative change in the last evaluation of an inversion beyond which a round is not begun.
        max_clipped: growth of the share of clipped pixels, against the target, beyond which a round is not kept.
    """

    steps: Count = 10
    start: Probability = 0.4
    layers: str = "1:"
    rounds: Count = 3
    guidance: NonNegative | None = None
    inversion_guidance: NonNegative | None = 1.0
    guidance_rows: Literal["cond", "match"] = "cond"
    refine: Count = 3
    mode: Mode = "replace"
    strength: Probability = 1.0
    bias: float = 0.0
    partial: bool = True
    later_steps: Count | None = None
    later_start: Probability | None = None
    later_guidance: NonNegative | None = None
    bank: BankKind = "auto"
    max_bank: str = "4GB"
    lock: bool = True
    guard: bool = True
    max_residual: Positive = 0.25
    max_clipped: Share = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias and self.mode == "replace":
            raise SettingError("bias", "expected 0 in mode replace, where every key is the reference's")
        parse_bytes(self.max_bank, "max_bank")

    @property
    def bank_bytes(self) -> int:
        """``max_bank`` in bytes."""
        return parse_bytes(self.max_bank)

    def of_round(self, number: int) -> "VisCtrlConfig":
        """The settings of a round, counted from 0."""
        if number == 0:
            return self
        later = {"steps": self.later_steps, "start": self.later_start, "guidance": self.later_guidance}
        return dataclasses.replace(self, **{name: value for name, value in later.items() if value is not None})

    @classmethod
    def paper(cls, rounds: int = 5, **changes: Any) -> "VisCtrlConfig":
        """The settings of the authors' released code: guided plain inversion, 10 steps, then 5; no guard."""
        own: dict[str, Any] = {
            "steps": 10,
            "start": 0.2,
            "layers": "1:",
            "rounds": rounds,
            "guidance": 6.0,
            "inversion_guidance": None,
            "guidance_rows": "match",
            "refine": 1,
            "partial": False,
            "later_steps": 5,
            "later_start": 0.2,
            "later_guidance": 4.0,
            "lock": False,
            "guard": False,
        }
        return cls(**(own | changes))

    @classmethod
    def masactrl(cls, **changes: Any) -> "VisCtrlConfig":
        """One round in the manner of MasaCtrl: 50 steps, from step 4 and layer 10 on, plain inversion."""
        own: dict[str, Any] = {
            "steps": 50,
            "start": 0.08,
            "layers": "10:",
            "rounds": 1,
            "guidance": 7.5,
            "guidance_rows": "match",
            "refine": 1,
            "partial": False,
            "lock": False,
            "guard": False,
        }
        return cls(**(own | changes))

    @classmethod
    def fast(cls, **changes: Any) -> "VisCtrlConfig":
        """Fewer steps, rounds and evaluations."""
        return cls(**({"steps": 6, "start": 0.34, "rounds": 2, "refine": 2} | changes))


def of_preset(name: Preset) -> VisCtrlConfig | None:
    """The settings that a preset stands for."""
    made = {"paper": VisCtrlConfig.paper, "masactrl": VisCtrlConfig.masactrl, "fast": VisCtrlConfig.fast}
    return made[name]() if name in made else None
