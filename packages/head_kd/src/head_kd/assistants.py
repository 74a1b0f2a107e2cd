"""Assistant heads on the student's neck: copies of the teacher's head that labels and the teacher train together.

What all of them share; ``roi_assistant`` and ``dense_assistant`` are the two kinds.

Letters: M regions of a batch, D features of an activation, C channels of a neck, N images, H and W cells of a level.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from head_kd.config import AssistantSettings
from head_kd.proposals import Proposals
from head_kd.regions import Regions
from head_kd.signals import head_signals
from head_kd.teacher import TeacherView
from tenfold import UserError

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with the name of a pair of signals, what imitates and what is imitated: rows (M, D), both before the adapter."""
Terms = tuple[dict[str, Any], dict[str, Tensor]]
"""Detection losses by name, and distillation terms by name, the latter without schedule and balance."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step has computed before its assistants run.

    Attributes:
        features: the student's maps, (N, C, H, W) for each level.
        samples: mmdet's data sample of each image.
        signals: activations of the student's head by name, one for each level or call.
        proposals: candidate regions of each image; empty where no assistant takes regions.
        located: whether proposals know the cell that predicted them.
        regions: the regions that a two-stage student sampled for itself; None where assistants sample their own.
        targets: cached activations of the teacher, signal -> (K, D), for the proposals of each image; None without a
            cache.
        teacher: the teacher that runs, if one does.
        maps: the teacher's maps of this batch; None where it was not asked.
        strides: strides of the student's maps.
        ramp: w of the schedule.
        active: False once the schedule has stopped: terms are then 0 and need no targets.
        key: seed, step and rank, which random draws depend on.
        observe: takes each pair of signals.
    """

    features: list[Tensor]
    samples: list[Any]
    signals: Mapping[str, list[Tensor]]
    proposals: list[Proposals]
    located: bool
    regions: Regions | None
    targets: list[dict[str, Tensor]] | None
    teacher: TeacherView | None
    maps: list[Tensor] | None
    strides: list[int]
    ramp: float
    active: bool
    key: tuple[int, ...]
    observe: Observer


def touch(*modules: nn.Module | None) -> Tensor:
    """0 that depends on every parameter, so that one that a batch does not use still has a (zero) gradient."""
    parameters = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    return sum((p.sum() * 0 for p in parameters), torch.zeros(()))


def as_rows(feature_map: Tensor) -> Tensor:
    """(N, D, H, W) as one row per cell, (N*H*W, D)."""
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2)


def fit(target: Tensor, own: Tensor) -> Tensor:
    """A map resized where the teacher's has another size than ``own`` (odd image sizes, other paddings)."""
    if target.shape[2:] == own.shape[2:]:
        return target
    return nn.functional.interpolate(target, own.shape[2:], mode="bilinear")


def width_of(consumer: nn.Module, owner: str) -> tuple[int, bool]:
    """Features D that a consumer takes, and whether it takes maps (N, D, H, W) instead of rows (M, D).

    Raises:
        UserError: the module does not say how many channels it takes.
    """
    first = consumer[0] if isinstance(consumer, nn.ModuleList) else consumer
    module = getattr(first, "conv", first)
    if isinstance(module, nn.Linear):
        return module.in_features, False
    channels = getattr(module, "in_channels", None)
    if channels is None:
        raise UserError(
            f"{owner}: {type(consumer).__name__} does not say how many channels it takes; name another signal"
        )
    return int(channels), True


def adapter(source: tuple[int, bool], target: tuple[int, bool], *, bias: bool = True) -> nn.Module:
    """The trainable map phi between two signals: linear for rows, a 1x1 convolution for maps."""
    (d_in, maps), (d_out, _) = source, target
    return nn.Conv2d(d_in, d_out, 1, bias=bias) if maps else nn.Linear(d_in, d_out, bias=bias)


class Assistant(nn.Module):
    """A head on the student's neck, with the adapters of its distillation terms; dropped after training.

    Args:
        settings: what it is and what is distilled.
        channels: C of the student's neck.
        wanted: C that the head takes.
    """

    akd_names: tuple[str, ...]

    def __init__(self, settings: AssistantSettings, channels: int, wanted: int) -> None:
        super().__init__()
        self.settings = settings
        if channels != wanted and settings.bridge == "off":
            wanted = channels
        self.in_channels = wanted
        self.bridge = nn.Conv2d(channels, wanted, 1) if channels != wanted else None
        self.akd = nn.ModuleDict()
        self.ckd: nn.Module | None = None
        self.ckd_names: tuple[str, str] = ("", "")
        self.head: Any = None

    def maps(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps in fp32 (mmdet would cast regions to the maps' precision) and with the head's channels."""
        out = [m.float() for m in features]
        if self.bridge is not None:
            out = [self.bridge(m).float() for m in out]
        return out

    def transfer_from(self, teacher_head: nn.Module) -> list[str]:
        """Copy what fits of the teacher's head; returns the names of the tensors that did not."""
        own = self.head.state_dict()
        theirs = teacher_head.state_dict()
        fitting = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
        self.head.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]

    def names(self, head: nn.Module) -> tuple[str, ...]:
        """The signals of its AKD terms.

        Raises:
            UserError: the head has no signal of a known name, and the settings name none.
        """
        known = tuple(head_signals(head))
        names = known if self.settings.akd is None else self.settings.akd
        if not names and (self.settings.akd_weight or self.settings.ckd_weight):
            raise UserError(
                f"the assistant's {type(head).__name__} has no signal of a known name: name module paths in akd"
            )
        return names

    @property
    def imitates(self) -> bool:
        """Whether it has distillation terms."""
        return len(self.akd) > 0 or self.ckd is not None

    @property
    def captured(self) -> list[str]:
        """The signals of its own head that a term needs."""
        return sorted({*self.akd_names, self.ckd_names[1]} - {""}) if self.imitates else []

    @property
    def imitated(self) -> list[str]:
        """The signals of the teacher's head that a term needs."""
        return sorted({*(self.akd_names if len(self.akd) else ()), self.ckd_names[1]} - {""})

    def terms(self, step: Step, number: int) -> Terms:
        """Its detection losses and distillation terms.

        Args:
            step: what the step has computed so far.
            number: its place among the assistants, which the names of its losses hold.
        """
        raise NotImplementedError

    def detection(self, found: Mapping[str, Any], step: Step, number: int) -> dict[str, Any]:
        """Detection losses, weighted and renamed, with a zero for what a batch did not use."""
        factor = self.settings.detection_weight * (step.ramp if self.settings.ramp_detection else 1.0)
        losses: dict[str, Any] = {}
        for key, value in found.items():
            if "loss" not in key:
                losses[f"assist{number}.{key}"] = value
            else:
                many = isinstance(value, list | tuple)
                losses[f"assist{number}.{key}"] = [v * factor for v in value] if many else value * factor
        losses[f"assist{number}.loss_unused"] = touch(self.head, self.bridge)
        return losses
