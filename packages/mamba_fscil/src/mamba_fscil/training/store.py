"""A learner's folder: the base session and each later one in a file that never changes, and an index that is renamed last."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mamba_fscil.backbones import OWN, MapBackbone
from mamba_fscil.config import ProjectorConfig, SessionConfig
from mamba_fscil.head import ETFHead
from mamba_fscil.memory import FeatureMemory
from mamba_fscil.projector import DualSSMProjector, MLPProjector, Projector
from tenfold import UserError, checkpoints, models
from tenfold.growing import Entry, Growing
from tenfold.runs import from_plain, plain

if TYPE_CHECKING:
    from mamba_fscil.training.learner import IncrementalLearner

KIND = "mamba-fscil.learner"
BASE, SESSION = "mamba_fscil.base", "mamba_fscil.session"
"""What the files call themselves."""
FORMAT = 1
"""Version of the files; a newer one is refused."""


def file_name(number: int) -> str:
    """Name of a file by its number: base, session-01, session-02..."""
    return "base" if number == 1 else f"session-{number - 1:02d}"


def opened(path: str | os.PathLike[str], *, writing: bool = False, option: str = "") -> Growing:
    """The folder, for reading or for one command that adds to it."""
    return Growing.open(path, kind=KIND, writing=writing, naming=file_name, option=option)


def _card(learner: "IncrementalLearner") -> dict[str, Any]:
    """Whatever the learner knows besides its tensors."""
    projector = learner.projector
    digest = "" if learner.backbone is None else _digest(learner.backbone.model.state_dict())
    hf = learner.backbone_spec is not None and learner.backbone_spec.startswith("hf:")
    config = learner.backbone.model.config.to_dict() if hf and learner.backbone is not None else None  # type: ignore[union-attr, operator]
    return {
        "format": FORMAT,
        "method": learner.method,
        "classes": learner.classes,
        "base_classes": learner.base_classes,
        "sessions": learner.sessions,
        "capacity": learner.capacity,
        "size": learner.size,
        "mean": list(learner.statistics[0]),
        "std": list(learner.statistics[1]),
        "scale": learner.scale,
        "seed": learner.seed,
        "backbone": learner.backbone_spec,
        "backbone_digest": digest,
        "backbone_config": None if config is None else json.loads(json.dumps(config, default=str)),
        "channels": projector.channels,
        "map": list(projector.size),
        "static": isinstance(projector, MLPProjector),
        "projector": plain(projector.config),
        "session": plain(learner.session),
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    """A digest that does not depend on the order of names."""
    return checkpoints.digest(dict(sorted(tensors.items())))


def _base_tensors(learner: "IncrementalLearner") -> dict[str, Tensor]:
    found = {f"projector.{name}": x for name, x in learner.projector.state_dict().items()}
    found["head.W"] = learner.head.W
    if learner.backbone is not None:
        found |= {f"backbone.{name}": x for name, x in learner.backbone.model.state_dict().items()}
    return found


def write_base(learner: "IncrementalLearner", folder: str | os.PathLike[str], *, option: str = "") -> Path:
    """Write the first file of a new learner: all that it is now, also where it has learned sessions already.

    Raises:
        UserError: the folder holds a learner already, or another command is adding to it.
    """
    with opened(folder, writing=True, option=option) as growing:
        if growing.entries:
            raise UserError(f"{option} {folder}: a learner is there already; give another folder".strip())
        card = _card(learner)
        tensors = {**_base_tensors(learner), **learner.memory.tensors(list(range(len(learner.classes))))}
        about = {"classes": card["classes"], "method": card["method"], "digest": checkpoints.digest(tensors)}
        with growing.adding(".safetensors", about) as path:
            checkpoints.save(path, tensors, method=BASE, config=card)
        learner.files = 1
        return growing.entries[-1].path


def changes(learner: "IncrementalLearner") -> dict[str, Tensor]:
    """The tensors that sessions change: the incremental branch, the whole projector where it is fine-tuned, and means."""
    projector = learner.projector
    frozen = projector.inc is not None and not learner.session.base_lr
    own = {} if projector.inc is None and learner.method in {"ncm", "teen"} else projector.state_dict()
    found = {f"projector.{name}": x for name, x in own.items() if name.startswith("inc.") or not frozen}
    return found | learner.memory.tensors(list(range(learner.base_classes, len(learner.classes))))


def write_session(learner: "IncrementalLearner", folder: str | os.PathLike[str], *, option: str = "") -> Path:
    """Write the learner's last session as the folder's next file.

    Raises:
        UserError: the folder is not as it was before this session, or another command is adding to it.
    """
    with opened(folder, writing=True, option=option) as growing:
        return append(growing, learner, option=option)


def append(growing: Growing, learner: "IncrementalLearner", *, option: str = "") -> Path:
    """Write the learner's last session into an opened folder."""
    card = _card(learner)
    if len(growing.entries) != learner.files:
        raise UserError(
            f"{option} {growing.path}: {len(growing.entries)} files are there, expected {learner.files}: another command has"
            " changed it meanwhile".strip()
        )
    tensors = changes(learner)
    before = set(growing.entries[-1].about["classes"])
    about = {"classes": card["classes"], "method": card["method"], "digest": checkpoints.digest(tensors)}
    new = [name for name in card["classes"] if name not in before]
    with growing.adding(".safetensors", {**about, "new": new}) as path:
        checkpoints.save(path, tensors, method=SESSION, config=card)
    learner.files += 1
    return growing.entries[-1].path


def missing_in(source: Path, target: Growing, until: int) -> list[Entry]:
    """Which of the first ``until`` files of a learner a folder does not hold yet, as a killed copy may have left it.

    Raises:
        UserError: the folder holds another learner.
    """
    old, there = opened(source).entries[:until], target.entries
    if [entry.about for entry in there] != [entry.about for entry in old[: len(there)]] or len(there) > until:
        raise UserError(f"--save_as {target.path}: another learner is there already; give another folder")
    return old[len(there) :]


def copy(source: Path, target: str | os.PathLike[str], until: int) -> None:
    """Copy the first ``until`` files of a learner into a new folder; goes on where a killed command has left off.

    Raises:
        UserError: the folder holds something else.
    """
    with opened(target, writing=True, option="--save_as") as growing:
        for entry in missing_in(source, growing, until):
            with growing.adding(".safetensors", entry.about) as path:
                path.write_bytes(entry.path.read_bytes())


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a folder, or a folder up to one of its files, holds.

    Attributes:
        folder: the folder.
        number: number of files up to the state that was read.
        latest: whether there is none after it.
        card: what the last file knows.
        tensors: of the base session, replaced by what the last file changes.
    """

    folder: Path
    number: int
    latest: bool
    card: dict[str, Any]
    tensors: dict[str, Tensor]
    memory: FeatureMemory

    @property
    def session(self) -> SessionConfig:
        """Settings of a session."""
        return from_plain(SessionConfig, self.card["session"])

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def modules(self) -> tuple[MapBackbone | None, Projector, ETFHead]:
        """Backbone, projector and class vectors.

        Raises:
            UserError: the backbone's weights are not those that the learner was made with.
        """
        card = self.card
        config = from_plain(ProjectorConfig, card["projector"])
        kind = MLPProjector if card["static"] else DualSSMProjector
        projector = kind(card["channels"], (card["map"][0], card["map"][1]), config)
        own = self._part("projector.")
        if any(name.startswith("inc.") for name in own):
            projector.add_incremental_branch()
        shapes = {name: tuple(x.shape) for name, x in projector.state_dict().items()}
        checkpoints.check_shapes(self.folder, shapes, own)
        projector.load_state_dict(own)
        head = ETFHead(config.width or card["channels"], card["capacity"])
        head.load_state_dict(self._part("head."))
        backbone = self._backbone()
        return backbone, projector.eval().requires_grad_(False), head

    def _backbone(self) -> MapBackbone | None:
        card, weights = self.card, self._part("backbone.")
        if card["backbone"] is None:
            return None
        found = _digest(weights)
        if found != card["backbone_digest"]:
            raise UserError(
                f"{self.folder}: the backbone has digest {found}, the learner was made with {card['backbone_digest']}:"
                " its files belong to different learners"
            )
        with tempfile.TemporaryDirectory() as scratch:
            spec = card["backbone"]
            if card.get("backbone_config") is not None:  # its folder may be on another machine
                path = Path(scratch) / "config.json"
                path.write_text(json.dumps(card["backbone_config"]), encoding="utf-8")
                spec = f"hf:{path}"
            model: nn.Module = models.build(spec, own={"fscil": OWN}, option="the learner's backbone")
        if spec.startswith(("packaged:", "timm:", "tv:")) and set(model.state_dict()) != set(weights):
            shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
            checkpoints.check_shapes(self.folder, shapes, weights)
        model.load_state_dict(weights)
        return MapBackbone(model, torch.zeros(2, 3, card["size"], card["size"])).freeze()


def read(path: Path, *, option: str = "learner") -> Stored:
    """The newest state of a folder, or the state at one of its files.

    Raises:
        UserError: no learner there, of a newer version, or files that do not belong together.
    """
    path = path.expanduser()
    if not path.exists() and not (path.parent / "index.json").exists():
        raise UserError(f"{option} {path}: no such file or folder")
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    growing = opened(folder, option=option)
    names = [entry.path.name for entry in growing.entries]
    if file is not None and file not in names:
        raise UserError(f"{option} {path}: no file of this learner ({', '.join(names)})")
    number = len(names) if file is None else names.index(file) + 1
    if not number:
        raise UserError(f"{option} {folder}: the learner has no base session")
    base = _checked(growing.entries[0].path, BASE)
    memory = FeatureMemory()
    memory.take({name: x for name, x in base.tensors.items() if name.startswith("memory.")})
    tensors, card = dict(base.tensors), base.config
    if number > 1:
        last = _checked(growing.entries[number - 1].path, SESSION)
        card = last.config
        if card["backbone_digest"] != base.config["backbone_digest"]:
            raise UserError(
                f"{growing.entries[number - 1].path} was learned on another backbone (digest {card['backbone_digest']},"
                f" here {base.config['backbone_digest']})"
            )
        memory.take({name: x for name, x in last.tensors.items() if name.startswith("memory.")})
        tensors |= last.tensors
    return Stored(folder, number, number == len(names), card, tensors, memory)


def _checked(path: Path, method: str) -> checkpoints.Checkpoint:
    found = checkpoints.load(path, method=method)
    if found.config["format"] > FORMAT:
        raise UserError(f"{path} was written by mamba-fscil {found.version}, which is newer than this one: upgrade it")
    return found
