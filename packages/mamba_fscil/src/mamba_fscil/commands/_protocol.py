"""Base sessions and arms as `compare` and the demonstration measure them, and what both print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mamba_fscil.config import Method, SessionConfig, TrainSettings
from mamba_fscil.data import SessionData
from mamba_fscil.metrics import SessionScores
from mamba_fscil.training.base import train_base
from mamba_fscil.training.protocol import ArmResult, ProtocolMaps, load_base, protocol_maps, run_arm, save_base
from tenfold.claims import Measured, Study
from tenfold.devices import choose_device
from tenfold.runs import Run

METRICS = ("base", "novel", "harmonic", "average", "drop", "base drop", "calibration error")
MECHANISM = ("cosine", "gate base", "gate novel")
FIELDS = ("all", "base", "novel", "harmonic", "calibration")
STATIC: tuple[Method, ...] = ("mlp", "frozen-mlp")
_MAPS: dict[str, tuple[Any, ProtocolMaps]] = {}


def shared_base(
    run: Run, name: str, data: SessionData, settings: TrainSettings, arms: Sequence[Method], quiet: bool
) -> Path:
    """The file of the base session that all arms of a seed share; trained where it is not there yet."""
    path = run.path / "bases" / f"{name}.safetensors"
    if not path.exists():
        base = train_base(data, settings, run=run, stage=name, beside=any(a in STATIC for a in arms), quiet=quiet)
        save_base(base, run.own(f"bases/{name}.safetensors"))
    return path


def measure(
    path: Path,
    data: SessionData,
    settings: TrainSettings,
    arm: Method,
    session: SessionConfig,
    *,
    beside: bool,
    look_every: int = 0,
    quiet: bool = True,
) -> Measured:
    """One arm on one seed, from the file of its base session."""
    key = str(path)
    if key not in _MAPS:
        _MAPS.clear()
        base = load_base(path, data, settings, beside=beside)
        device = choose_device(settings.device)
        for module in (base.backbone, base.projector, base.beside, base.head):
            if module is not None:
                module.to(device)
        _MAPS[key] = (base, protocol_maps(base, data, device=device))
    base, maps = _MAPS[key]
    found = run_arm(base, maps, data, arm, session, seed=settings.seed, look_every=look_every, quiet=quiet)
    return Measured(found.values(), _arrays(found))


def _arrays(found: ArmResult) -> dict[str, np.ndarray]:
    arrays = {"scores": np.asarray([[getattr(s, name) for name in FIELDS] for s in found.scores])}
    if found.mechanism and found.mechanism[-1].steps:
        arrays |= {key: np.asarray(values) for key, values in vars(found.mechanism[-1]).items()}
    return arrays


def scores_of(study: Study, arm: str) -> list[list[SessionScores]]:
    """Scores over the sessions, one row per seed."""
    return [[SessionScores(*row) for row in study.arrays(arm, seed)["scores"].tolist()] for seed in study.seeds]


def traces_of(study: Study, arms: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Mechanism of the last session of the first seed, of the arms that have one."""
    found = {arm: study.arrays(arm, study.seeds[0]) for arm in arms}
    return {arm: arrays for arm, arrays in found.items() if "cosine" in arrays}
