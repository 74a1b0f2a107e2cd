"""The files of a training: what ``train`` writes, and the net that other verbs read from them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localrecon.arms import build_arm
from localrecon.config import HeadSpec, OptimizerSettings, RunSettings, SGRConfig, TrainSettings
from localrecon.data import Data, load_data
from localrecon.net import LocalNet
from localrecon.optimizers import Net
from localrecon.plan import SplitPlan
from tenfold import UserError, checkpoints
from tenfold.runs import Run

BACKBONE = "backbone.safetensors"
HEADS = "heads.safetensors"
PLAN = "plan.json"


def backbone_of(net: Net) -> Any:
    """The user's model within a net; a BP-free net is its own."""
    return net.model if isinstance(net, LocalNet) else net


def read_plan(folder: Path) -> SplitPlan | None:
    """The plan that a training wrote; None where it made none."""
    path = folder / PLAN
    return SplitPlan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def save(net: Net, run: Run, settings: TrainSettings, version: str) -> None:
    """Write the model's weights under its own key names, and the local heads beside them."""
    header: dict[str, Any] = {
        "version": version,
        "config": {"model": settings.model, "method": settings.method},
    }
    checkpoints.save(run.own(BACKBONE), backbone_of(net).state_dict(), method="localrecon.backbone", **header)
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.save(run.own(HEADS), net.heads.state_dict(), method="localrecon.heads", **header)


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        net: its net, in evaluation mode.
        settings: its settings.
        data: its data, or others of the same form.
    """

    net: Net
    settings: TrainSettings
    data: Data


def load(asked: RunSettings) -> Trained:
    """The net of a finished training.

    Raises:
        UserError: the folder is no finished run of ``localrecon train``, or the data have another form.
    """
    folder = Path(asked.run)
    settings = _read_settings(folder)
    if asked.data is not None:
        settings = dataclasses.replace(settings, data=asked.data)
    data = load_data(settings)
    plan = read_plan(folder)
    arm = build_arm(
        settings, settings.method, data.form, data.plain, settings.seed, feedback=settings.feedback, plan=plan
    )
    net = arm.net
    checkpoints.load_into(backbone_of(net), folder / BACKBONE, method="localrecon.backbone")
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.load_into(net.heads, folder / HEADS, method="localrecon.heads")
    return Trained(net.eval(), settings, data)


def _read_settings(folder: Path) -> TrainSettings:
    if not (folder / BACKBONE).is_file():
        raise UserError(f"{folder}: expected the folder of a finished `localrecon train`, found no {BACKBONE}")
    try:
        values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        nested = {"head": HeadSpec, "sgr": SGRConfig, "optimizer": OptimizerSettings}
        parts: dict[str, Any] = {name: kind(**values.pop(name)) for name, kind in nested.items()}
        return TrainSettings(**values, **parts)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not the settings of `localrecon train` ({error})") from error
