"""A classifier that is taught new classes from a few pictures: the base session, further sessions, answers, and its folder."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_fscil import baselines, metrics
from mamba_fscil.backbones import MapBackbone
from mamba_fscil.config import TRAINING_FREE, Method, SessionConfig, TrainSettings
from mamba_fscil.data import Part, SessionData, normalized, same_name
from mamba_fscil.head import ETFHead
from mamba_fscil.memory import FeatureMemory, check_maps
from mamba_fscil.projector import Projector
from mamba_fscil.session import Mechanism, SessionRows, learn, look
from mamba_fscil.training.store import Stored, read, write_base, write_session
from tenfold import UserError
from tenfold.devices import choose_device
from tenfold.modules import evaluating
from tenfold.randomness import keyed

if TYPE_CHECKING:
    from mamba_fscil.training.base import Base

Show = Callable[[Iterator[Tensor]], Iterator[Tensor]]
_SCALES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
"""Inverse temperatures of the cosines that are tried on training maps of the base session."""


class IncrementalLearner:
    """A classifier over all classes seen so far; one session adds classes and keeps no picture.

    ::

        learner = IncrementalLearner("mamba-fscil")
        learner.fit_base(images, labels, names, backbone="fscil:conv", epochs=20)
        learner.learn_session(five_images, ["lynx"] * 5)
        learner.predict(more_images)

    Args:
        method: what learns after the base session, see ``config.Method``.
        session: settings of a session.
        seed: seed of the sessions' draws.

    Attributes:
        classes: names of the classes seen, in the order in which they came.
        base_classes: number of base classes.
        sessions: number of sessions learned.
        memory: mean map of each class.
        mechanism: how the branch told base rows from novel ones in the last session.

    Source: Mamba-FSCIL, arXiv 2407.06136; NC-FSCIL, arXiv 2302.03004; TEEN, arXiv 2312.05229.

    Example:
        >>> images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
        >>> learner = IncrementalLearner("ncm")
        >>> names, labels = ["cat", "dog", "fox"], torch.arange(12) % 3
        >>> _ = learner.fit_base(images, labels, names, backbone="fscil:conv", epochs=1, capacity=9)
        >>> _ = learner.learn_session(images[:5], ["lynx"] * 5)
        >>> learner.classes
        ['cat', 'dog', 'fox', 'lynx']
    """

    def __init__(self, method: Method = "mamba-fscil", session: SessionConfig | None = None, seed: int = 0) -> None:
        self.method: Method = method
        self.session = session or SessionConfig()
        self.seed = seed
        self.classes: list[str] = []
        self.base_classes = self.sessions = 0
        self.memory = FeatureMemory()
        self.backbone: MapBackbone | None = None
        self.mechanism = Mechanism()
        self.statistics: tuple[Sequence[float], Sequence[float]] = ((), ())
        self.size = 0
        self.scale = 16.0
        self.backbone_spec: str | None = None
        self._projector: Projector | None = None
        self._head: ETFHead | None = None
        self.stored: Stored | None = None
        self.files = 0  # of the folder that it was read from or written to
        self._saved = 0  # sessions that are in it

    @property
    def projector(self) -> Projector:
        """What learns.

        Raises:
            RuntimeError: before ``fit_base``.
        """
        if self._projector is None:
            raise RuntimeError("the learner has no base session yet: call fit_base, or load one")
        return self._projector

    @property
    def head(self) -> ETFHead:
        """The class vectors.

        Raises:
            RuntimeError: before ``fit_base``.
        """
        if self._head is None:
            raise RuntimeError("the learner has no base session yet: call fit_base, or load one")
        return self._head

    @property
    def capacity(self) -> int:
        """Number of classes that there can ever be."""
        return self.head.capacity

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.head.W.device

    def to(self, device: str | torch.device) -> "IncrementalLearner":
        """Move to a device."""
        for module in (self.backbone, self._projector, self._head):
            if module is not None:
                module.to(device)
        return self

    # The base session

    def fit_base(
        self,
        inputs: Tensor,
        labels: Tensor | Sequence[int],
        classes: Sequence[str],
        *,
        quiet: bool = True,
        **settings: Any,
    ) -> "IncrementalLearner":
        """Train backbone and projector on the base classes.

        Args:
            inputs: images (N, 3, H, W) uint8, or maps (N, c, H, W) that were extracted elsewhere.
            labels: (N,), in [0, K).
            classes: K names.
            quiet: no progress on stderr.
            settings: fields of ``config.TrainSettings``, such as ``backbone``, ``epochs``, ``capacity``, ``projector``.

        Raises:
            UserError: settings, images and backbone do not fit each other, or a map holds NaN.
        """
        from mamba_fscil.training.base import train_base

        labels = torch.as_tensor(labels, dtype=torch.int64)
        data = _as_data(inputs, labels, tuple(classes))
        given = {"data": "given", "learner": "", "method": self.method, "session": self.session, "seed": self.seed}
        known = TrainSettings(**{**given, **settings})
        self.take_base(train_base(data, known, quiet=quiet), data, known.backbone)
        return self

    def take_base(self, base: "Base", data: SessionData, backbone_spec: str | None) -> None:
        """Begin from a trained base session: class means over all its pictures, and the scale of the confidence.

        Args:
            base: what the base session gave.
            data: what it was trained on.
            backbone_spec: name of its backbone.
        """
        self.backbone, self._projector, self._head = base.backbone, base.projector, base.head
        self.statistics, self.size = base.statistics, data.size
        kept: list[tuple[Tensor, Tensor]] = []
        for found, labels in self.maps_of(data.base):
            self.memory.update(found.cpu(), labels)
            kept.append((found, labels))
            if len(kept) > 64:  # every second batch, so that all classes stay in it
                kept = kept[::2]
        self.begin(base, data, backbone_spec, torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept]))

    def begin(self, base: "Base", data: SessionData, backbone_spec: str | None, maps: Tensor, labels: Tensor) -> None:
        """Begin from a trained base session whose class means are in ``memory`` already.

        Args:
            base: what the base session gave.
            data: what it was trained on.
            backbone_spec: name of its backbone.
            maps: some of its maps, to fit the scale of the confidence.
            labels: their classes.
        """
        self.backbone, self._projector, self._head = base.backbone, base.projector, base.head
        self.backbone_spec, self.statistics, self.size = backbone_spec, base.statistics, data.size
        self.classes, self.base_classes = list(data.classes[: data.base_classes]), data.base_classes
        if self.method not in {"mlp", "ssm", *TRAINING_FREE}:
            with keyed(self.seed, len(self.classes)):  # whatever was drawn before
                self.projector.add_incremental_branch()
        cosines = self.logits(maps).cpu()
        losses = [float(F.cross_entropy(scale * cosines, labels)) for scale in _SCALES]
        self.scale = _SCALES[losses.index(min(losses))]

    # Maps and answers

    @torch.no_grad()
    def maps_of(self, part: Part, batch_size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps and labels of a part of the data, batch by batch."""
        for index in torch.split(torch.arange(len(part)), batch_size):
            if part.maps is not None:
                yield self.maps(part.maps[index]), part.labels[index]
            else:
                assert part.split is not None
                yield self.maps(part.split.pixels(index)), part.labels[index]

    @torch.no_grad()
    def maps(self, inputs: Tensor) -> Tensor:
        """The backbone's maps of images (N, 3, H, W) uint8; maps pass through.

        Raises:
            UserError: images of another size, maps of another size, images without a backbone.
            NonFiniteError: a map holds NaN or infinity; the message names the row.
        """
        if inputs.dtype != torch.uint8:
            if not inputs.is_floating_point():
                raise UserError(f"expected images of dtype uint8 or maps of real numbers, got {inputs.dtype}")
            self.projector.check(inputs)
            check_maps(inputs)
            return inputs.to(self.device)
        if self.backbone is None:
            raise UserError("this learner was made from maps and has no backbone: give maps, not images")
        if inputs.ndim != 4 or tuple(inputs.shape[1:]) != (3, self.size, self.size):
            raise UserError(
                f"images are {tuple(inputs.shape[1:])} each, the learner was made for {(3, self.size, self.size)}"
            )
        with evaluating(self.backbone):
            found: Tensor = self.backbone(normalized(inputs.to(self.device), *self.statistics))
        check_maps(found, "the backbone's maps")
        return found

    @torch.no_grad()
    def logits(self, maps: Tensor, frozen: Tensor | None = None) -> Tensor:
        """Cosines with the classes seen, (N, K).

        Args:
            maps: maps (N, c, H, W).
            frozen: what ``frozen_output`` of the projector gave for them, where that has not changed since; None computes it.
        """
        seen = len(self.classes)
        if self.method in TRAINING_FREE:
            classifier = baselines.NearestClassMean(self.prototypes().to(maps))
            return classifier(maps.mean(dim=(2, 3)))
        kept = itertools.repeat(None) if frozen is None else torch.split(frozen, 256)
        pairs = zip(torch.split(maps, 256), kept, strict=False)
        parts = [self.head(self.projector.eval()(part, base).mu, seen) for part, base in pairs]
        return torch.cat(parts) if parts else maps.new_zeros(0, seen)

    def prototypes(self) -> Tensor:
        """Mean feature of each class, calibrated where the method is teen."""
        means = self.memory.means(range(len(self.classes))).mean(dim=(2, 3))
        return baselines.calibrated(means, self.base_classes) if self.method == "teen" else means

    def predict_proba(self, inputs: Tensor) -> Tensor:
        """Probabilities of the classes seen, (N, K), for images or maps."""
        parts = [
            torch.softmax(self.scale * self.logits(self.maps(part)), dim=1).cpu() for part in torch.split(inputs, 64)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, len(self.classes))

    def predict(self, inputs: Tensor) -> list[str]:
        """The most probable class of each image or map."""
        return [self.classes[k] for k in self.predict_proba(inputs).argmax(dim=1).tolist()]

    def evaluate(self, part: Part, batch_size: int = 64) -> metrics.SessionScores:
        """Scores on test pictures of classes that were seen."""
        found = [(self.logits(maps).cpu(), labels) for maps, labels in self.maps_of(part, batch_size)]
        logits, labels = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])
        return metrics.score(torch.softmax(self.scale * logits, dim=1), labels, self.base_classes)

    # Sessions

    def check_names(self, names: Sequence[str], *, update: bool = False) -> None:
        """Check that classes can be learned next.

        Raises:
            UserError: no class, a name that is there already (without ``update``) or differs by case or spaces from one that
                is, a base class with ``update``, or more classes than capacity.
        """
        if not names:
            raise UserError("a session needs at least one picture of a class")
        fresh = []
        for name in dict.fromkeys(names):
            if not name.strip():
                raise UserError("a class needs a name")
            alike = same_name(name, self.classes)
            if alike is not None and alike != name:
                raise UserError(
                    f"class '{name}': there is '{alike}' already; give another name, or that one to refit it"
                )
            if alike is None:
                fresh.append(name)
            elif not update:
                raise UserError(f"class '{name}' is there already: --update true learns it once more")
            elif self.classes.index(name) < self.base_classes:
                raise UserError(
                    f"class '{name}' is a base class, which a few pictures would only harm: give another name"
                )
        if len(self.classes) + len(fresh) > self.capacity:
            raise UserError(
                f"{len(self.classes)} classes and {len(fresh)} new ones are more than the capacity of {self.capacity}:"
                " train a learner with a larger --capacity (and --projector.width, which bounds it)"
            )

    def learn_session(
        self,
        inputs: Tensor,
        names: Sequence[str],
        *,
        update: bool = False,
        steps: int | None = None,
        seed: int | None = None,
        look_every: int = 0,
        show: Show = iter,
    ) -> None:
        """Learn new classes from a few pictures, beside the mean maps of all earlier ones.

        Args:
            inputs: images (N, 3, H, W) uint8 or maps (N, c, H, W).
            names: the class of each.
            update: learn classes that are there already once more; their old means are dropped.
            steps: number of steps; default: as the settings say.
            seed: seed of the session's draws; default: the learner's.
            look_every: steps between two looks at the mechanism.
            show: passes the batches through, to show progress.

        Raises:
            RuntimeError: before ``fit_base``.
            UserError: see ``check_names``; a picture without a name; images or maps of another size.
            NonFiniteError: NaN in a map, or a loss that is not finite. The learner is then unchanged.
        """
        projector = self.projector
        if len(inputs) != len(names):
            raise UserError(f"{len(inputs)} pictures, but {len(names)} names")
        self.check_names(names, update=update)
        maps = torch.cat([self.maps(part) for part in torch.split(inputs, 64)])
        classes = [*self.classes, *(name for name in dict.fromkeys(names) if name not in self.classes)]
        labels = torch.tensor([classes.index(name) for name in names])
        old = [k for k in range(len(self.classes)) if k not in set(labels.tolist())]
        session = self.sessions + 1
        before = {name: x.clone() for name, x in projector.state_dict().items()}
        if self.method not in TRAINING_FREE:
            copies = self.session.base_copies[min(session, len(self.session.base_copies)) - 1]
            rows = SessionRows.of(
                maps, labels.to(maps.device), self.memory.means(old).to(maps), torch.tensor(old).to(maps.device),
                self.base_classes, copies=self.session.copies, base_copies=copies,
            )  # fmt: skip
            config = self.session if steps is None else dataclasses.replace(self.session, steps=steps, more_steps=0)
            try:
                self.mechanism = learn(
                    projector, self.head.W, rows, config, base_classes=self.base_classes, session=session,
                    seed=self.seed if seed is None else seed, sensitive=self.method == "mamba-fscil",
                    look_every=look_every, show=show,
                )  # fmt: skip
            except BaseException:
                projector.load_state_dict(before)
                projector.eval().requires_grad_(False)
                raise
        for k in torch.unique(labels).tolist():
            self.memory.forget(k)
        self.memory.update(maps.cpu(), labels)
        self.classes, self.sessions = classes, session

    def look(self, maps: Tensor, labels: Tensor) -> tuple[float, float, float] | None:
        """Mean cosine, gate on base rows and on novel rows, over maps; see ``session.look``."""
        return look(self.projector.eval(), maps.to(self.device), labels.to(self.device), self.base_classes)

    # Its folder

    def save(self, folder: str | os.PathLike[str], *, option: str = "") -> Path:
        """Write what the folder does not hold yet: into a new one all that the learner is, else what it learned since.

        Returns:
            The file that was written.

        Raises:
            UserError: the folder holds another learner, or another command is adding to it.
        """
        if not self.files:
            path = write_base(self, folder, option=option)
        elif self.sessions == self._saved:
            raise UserError(f"{option} {folder}: nothing was learned since the learner was saved".strip())
        else:
            path = write_session(self, folder, option=option)
        self._saved = self.sessions
        return path

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: Any = "cpu", option: str = "learner"
    ) -> "IncrementalLearner":
        """The learner of a folder, or as it was at one of its files.

        Raises:
            UserError: no learner there, of a newer version, or a file whose backbone is another one.
        """
        stored = read(Path(path), option=option)
        learner = cls(stored.card["method"], stored.session, stored.card["seed"])
        learner.stored, learner.files = stored, stored.number
        card = stored.card
        learner.classes, learner.base_classes = list(card["classes"]), card["base_classes"]
        learner.statistics, learner.size, learner.scale = (card["mean"], card["std"]), card["size"], card["scale"]
        learner.backbone_spec, learner.sessions = card["backbone"], card["sessions"]
        learner.backbone, learner._projector, learner._head = stored.modules()
        learner.memory, learner._saved = stored.memory, learner.sessions
        return learner.to(choose_device(device))


def _as_data(inputs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> SessionData:
    """Tensors as the base session's data.

    Raises:
        UserError: labels that are out of range, a class without a picture, images that are not square.
    """
    from tenfold.images import Split, pixel_statistics

    if len(inputs) != len(labels) or not len(labels):
        raise UserError(f"{len(inputs)} pictures, but {len(labels)} labels")
    counts = torch.bincount(labels, minlength=len(classes)) if int(labels.min()) >= 0 else labels[:0]
    if len(counts) != len(classes) or not bool(counts.all()):
        raise UserError(f"labels must name each of the {len(classes)} classes, by 0 to {len(classes) - 1}")
    if inputs.dtype == torch.uint8:
        if inputs.ndim != 4 or inputs.shape[1] != 3 or inputs.shape[2] != inputs.shape[3]:
            raise UserError(f"images must be (N, 3, H, H) uint8, got {tuple(inputs.shape)}")
        size = inputs.shape[2]
        part = Part(labels, Split(labels, inputs, (), size))
        mean, std = (tuple(x.clamp_min(1e-3).tolist()) for x in pixel_statistics(inputs))
    else:
        check_maps(inputs)
        part, size, mean, std = Part(labels, None, inputs.float()), 0, (), ()
    return SessionData(classes, len(classes), part, (), part.part([]), mean, std, size, "given")
