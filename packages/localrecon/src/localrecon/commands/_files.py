"""The files of a training: what ``train`` writes, and the net that other verbs read from them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from localrecon.arms import build_arm
from localrecon.config import TrainSettings
from localrecon.models import DataForm
from localrecon.net import LocalNet
from localrecon.optimizers import Net
from localrecon.plan import SplitPlan
from tenfold import UserError, checkpoints, runs
from tenfold.runs import Run

BACKBONE = "backbone.safetensors"
HEADS = "heads.safetensors"
PLAN = "plan.json"
CARD = "config.json"


def backbone_of(net: Net) -> nn.Module:
    """The user's model within a net; a BP-free net is its own."""
    return net.model if isinstance(net, LocalNet) else net


def card(settings: TrainSettings, form: DataForm, names: tuple[str, ...]) -> dict[str, Any]:
    """What somebody has to know of the weights: model, method, form of the data and names of the classes."""
    model = {"model": settings.model, "width": settings.width, "depth": settings.depth, "method": settings.method}
    return {**model, **asdict(form), "names": list(names)}


def read_plan(folder: Path) -> SplitPlan | None:
    """The plan that a training wrote; None where it made none."""
    path = folder / PLAN
    return SplitPlan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def save(net: Net, run: Run, settings: TrainSettings, form: DataForm, names: tuple[str, ...]) -> None:
    """Write the model's weights under its own key names, the local heads beside them, and what they are."""
    config = {"model": settings.model, "method": settings.method}
    checkpoints.save(run.own(BACKBONE), backbone_of(net).state_dict(), method="localrecon.backbone", config=config)
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.save(run.own(HEADS), net.heads.state_dict(), method="localrecon.heads", config=config)
    run.write_json(CARD, card(settings, form, names))


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        net: its net, in evaluation mode.
        settings: its settings.
        form: form of its data.
        names: names of its classes.
    """

    net: Net
    settings: TrainSettings
    form: DataForm
    names: tuple[str, ...]

    def check(self, form: DataForm, source: str) -> None:
        """Refuse data of another form.

        Raises:
            UserError: with both forms.
        """
        if form != self.form:
            raise UserError(f"--data {source}: the data are {form}, those of the training were {self.form}")


def load(folder: str) -> Trained:
    """The net of a finished training.

    Raises:
        UserError: the folder is no finished run of ``localrecon train``, or a file of it is not whole.
    """
    found = runs.read(folder, TrainSettings, package="localrecon", verb="train")
    settings, path = found.settings, found.path
    try:
        about = json.loads((path / CARD).read_text(encoding="utf-8"))
        form = DataForm(about["task"], tuple(about["shape"]), about["classes"])
        names = tuple(about["names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / CARD}: not written by `localrecon train` ({error})") from error
    plan = read_plan(path)
    net = build_arm(settings, settings.method, form, None, settings.seed, feedback=settings.feedback, plan=plan).net
    checkpoints.load_into(backbone_of(net), path / BACKBONE, method="localrecon.backbone")
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.load_into(net.heads, path / HEADS, method="localrecon.heads")
    return Trained(net.eval(), settings, form, names)
