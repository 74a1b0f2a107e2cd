"""A whole protocol for one method, on maps that are computed once for all methods of a seed."""

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mamba_fscil import metrics
from mamba_fscil.config import TRAINING_FREE, Method, SessionConfig, TrainSettings
from mamba_fscil.data import SessionData
from mamba_fscil.memory import FeatureBank, FeatureMemory
from mamba_fscil.session import Mechanism
from mamba_fscil.training.base import Base, maps_of, prepare
from mamba_fscil.training.learner import IncrementalLearner
from tenfold import checkpoints
from tenfold.terminal import track

METHOD = "mamba_fscil.shared_base"
SAMPLE = 2000
"""Base pictures whose maps are kept, to fit the scale of the confidence."""


@dataclasses.dataclass(frozen=True)
class ProtocolMaps:
    """The maps of a protocol.

    Attributes:
        memory: mean map of each base class, over all its pictures.
        sample: some of the base pictures' maps.
        shots: maps of each session's pictures.
        test: maps of all test pictures.
    """

    memory: FeatureMemory
    sample: FeatureBank
    shots: tuple[FeatureBank, ...]
    test: FeatureBank


def protocol_maps(base: Base, data: SessionData, *, device: str = "cpu") -> ProtocolMaps:
    """All maps of a protocol; of base pictures only means and a sample are kept."""
    memory, kept = FeatureMemory(), []
    for maps, labels in maps_of(base, data.base, device=device):
        memory.update(maps.cpu(), labels)
        kept.append((maps.cpu(), labels))
        if len(kept) * 64 > 2 * SAMPLE:  # every second batch, so that all classes stay in it
            kept = kept[::2]
    shots = tuple(FeatureBank.of(maps_of(base, part, device=device)) for part in data.shots)
    return ProtocolMaps(memory, FeatureBank.of(kept), shots, FeatureBank.of(maps_of(base, data.test, device=device)))


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What one method did over a protocol.

    Attributes:
        scores: after the base session and after each further one.
        mechanism: of each further session; empty for MLPs and class means.
    """

    scores: list[metrics.SessionScores]
    mechanism: list[Mechanism]

    def values(self) -> dict[str, float]:
        """The numbers of a table: those of ``metrics.summary``, and the mechanism at the end."""
        found = metrics.summary(self.scores)
        if self.mechanism and self.mechanism[-1].cosine:
            last = self.mechanism[-1]
            found |= {"cosine": last.cosine[-1], "gate base": last.gate_base[-1], "gate novel": last.gate_novel[-1]}
        return found


def run_arm(
    base: Base,
    maps: ProtocolMaps,
    data: SessionData,
    arm: Method,
    session: SessionConfig,
    *,
    seed: int,
    look_every: int = 0,
    quiet: bool = True,
) -> ArmResult:
    """All sessions of one method, from a copy of the base session."""
    static = base.beside if arm in {"mlp", "frozen-mlp"} else None
    own = dataclasses.replace(base, projector=copy.deepcopy(base.projector if static is None else static))
    learner = IncrementalLearner(arm, session, seed)
    learner.memory = copy.deepcopy(maps.memory)
    device = base.head.W.device
    learner.begin(own, data, None, maps.sample.maps.to(device), maps.sample.labels)
    found: list[Mechanism] = []
    frozen = None
    if learner.projector.inc is not None and not session.base_lr:  # the base side gives the same in all sessions
        parts = torch.split(maps.test.maps.to(device), 256)
        frozen = torch.cat([learner.projector.frozen_output(part) for part in parts])
    scores = [_scored(learner, maps.test, frozen)]
    for number, bank in enumerate(maps.shots, 1):
        show = partial(track, description=f"{arm}, session {number}", quiet=quiet)
        names = [data.classes[k] for k in bank.labels.tolist()]
        learner.learn_session(bank.maps.to(device), names, look_every=look_every, show=show)
        if arm not in TRAINING_FREE:
            found.append(learner.mechanism)
        scores.append(_scored(learner, maps.test, frozen))
    return ArmResult(scores, found)


def _scored(learner: IncrementalLearner, test: FeatureBank, frozen: Tensor | None) -> metrics.SessionScores:
    here = test.labels < len(learner.classes)
    kept = None if frozen is None else frozen[here.to(frozen.device)]
    logits = learner.logits(test.maps[here].to(learner.device), kept).cpu()
    return metrics.score(torch.softmax(learner.scale * logits, dim=1), test.labels[here], learner.base_classes)


def save_base(base: Base, path: Path) -> None:
    """Write a base session that several methods share."""
    parts: dict[str, Tensor] = {}
    for name, module in _modules(base):
        parts |= {f"{name}.{key}": x for key, x in module.state_dict().items()}
    checkpoints.save(path, parts, method=METHOD, config={"statistics": base.statistics})


def load_base(path: Path, data: SessionData, settings: TrainSettings, *, beside: bool) -> Base:
    """A base session that ``save_base`` wrote, for the same data and settings."""
    base = prepare(data, settings, beside=beside)
    found = checkpoints.load(path, method=METHOD).tensors
    for name, module in _modules(base):
        own = {key.removeprefix(f"{name}."): x for key, x in found.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own)
        module.eval().requires_grad_(False)
    if base.backbone is not None:
        base.backbone.freeze()
    return base


def _modules(base: Base) -> Sequence[tuple[str, torch.nn.Module]]:
    named: list[tuple[str, torch.nn.Module | None]] = [
        ("projector", base.projector),
        ("beside", base.beside),
        ("head", base.head),
    ]
    named += [("backbone", None if base.backbone is None else base.backbone.model)]
    return [(name, module) for name, module in named if module is not None]
