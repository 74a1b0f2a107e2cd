"""A frozen teacher and what it was trained for: its classes and their order, its normalization, the size of its images."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pckd.config import TeacherSettings
from pckd.models import Statistics, build, card_of, freeze
from pckd.tap import ClassifierTap
from pckd.views import normalize
from tenfold import UserError
from tenfold.checkpoints import digest
from tenfold.images import ImageData
from tenfold.models import expected_statistics

CHECKED = 128
"""Training images that a teacher is tried on before it teaches."""


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher, ready to be run.

    Attributes:
        plain: the model as it was built.
        folded: a copy with folded batch norms where that is possible, else the same model.
        path: path of the layer that gives its logits.
        order: (C,) the teacher's class for each class of the data; None where they are in the same order.
        statistics: mean and std of the pixels that it expects.
        size: side of the images that it was trained on; None where that is not known, and it then takes the data's.
        source: where its weights come from.
        hash: digest of its weights.
    """

    plain: nn.Module
    folded: nn.Module
    path: str
    order: Tensor | None
    statistics: Statistics
    size: int | None
    source: str
    hash: str

    def tap(self, hint: str | None = None) -> ClassifierTap:
        """The teacher with its outputs in the order of the data's classes; for a map ``hint``, the plain model."""
        return ClassifierTap(self.folded if hint is None else self.plain, self.path, hint, order=self.order)

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W) uint8 as the teacher takes them: normalized, and scaled to its size."""
        images = normalize(pixels, *self.statistics)
        if self.size is None or self.size == images.shape[-1]:
            return images
        return F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)

    def card(self) -> dict[str, Any]:
        """What has to be the same for its outputs to be the same."""
        return {
            "weights": self.hash,
            "layer": self.path,
            "order": None if self.order is None else self.order.tolist(),
            "mean": list(self.statistics[0]),
            "std": list(self.statistics[1]),
            "size": self.size,
        }

    def to(self, device: torch.device | str) -> "Teacher":
        """Both forms moved, in place."""
        self.plain.to(device)
        self.folded.to(device)
        return self


def load_teacher(settings: TeacherSettings, data: ImageData) -> Teacher:
    """A teacher from its name and weights, checked against the data.

    The folder (or file) of a `pckd train` says which classes it was trained on, in which order, at which size and with which
    normalization, and that is used. Of other files the number of classes is known alone; their normalization is
    ``teacher_mean`` and ``teacher_std``, else what the model's configuration says, else that of the data.

    Raises:
        UserError: weights of other classes, by name where they are known; a model or file that cannot be read.
    """
    spec, weights = settings.teacher, settings.teacher_weights
    assert spec is not None
    card = {} if weights in {None, "pretrained"} else card_of(str(weights))
    order = None
    if "classes" in card:
        order = _order_of(data.classes, card["classes"], f"--teacher_weights {weights}")
    size = card.get("size")
    model = build(
        spec,
        len(data.classes),
        weights,
        option="--teacher",
        args=settings.teacher_args,
        in_chans=len(data.mean),
        size=size or data.size,
        whole=True,
    )
    own = expected_statistics(model)
    statistics: Statistics = (tuple(data.mean), tuple(data.std))
    if settings.teacher_mean is not None and settings.teacher_std is not None:
        statistics = tuple(settings.teacher_mean), tuple(settings.teacher_std)
    elif "mean" in card:
        statistics = tuple(card["mean"]), tuple(card["std"])
    elif own is not None:
        statistics = own
    if len(statistics[0]) != len(data.mean):
        raise UserError(f"the teacher's normalization has {len(statistics[0])} channels, the data {len(data.mean)}")
    source = "its package" if weights is None else str(weights)
    return as_teacher(
        model, data, tap=settings.teacher_tap, order=order, statistics=statistics, size=size, source=source
    )


def as_teacher(
    model: nn.Module,
    data: ImageData,
    *,
    tap: str | None = None,
    order: Tensor | None = None,
    statistics: Statistics | None = None,
    size: int | None = None,
    source: str = "memory",
) -> Teacher:
    """Freeze a model that was trained on the data's classes, and try it on some training images.

    A warning says so where it is no better than chance there.

    Args:
        model: the model; it is set to evaluation mode, without gradients.
        data: the images.
        tap: path of the layer that gives its logits; default: found.
        order: the model's class for each class of the data.
        statistics: mean and std of the pixels that it expects; default: the data's.
        size: side of the images that it was trained on.
        source: where its weights come from, for messages.
    """
    model.eval().requires_grad_(False)
    found = Teacher(model, model, "", order, statistics or (data.mean, data.std), size, source, "")
    index = torch.linspace(0, len(data.train) - 1, min(CHECKED, len(data.train))).long()
    index = torch.unique(index)
    images = found.images(data.train.pixels(index))
    path = ClassifierTap(model, tap, example=images[:2]).path
    folded = freeze(model, images[:2])
    teacher = Teacher(model, folded, path, order, found.statistics, size, source, digest(model.state_dict()))
    _check_better_than_chance(teacher, images, data.train.labels[index])
    return teacher


@torch.no_grad()
def _check_better_than_chance(teacher: Teacher, images: Tensor, labels: Tensor) -> None:
    tap = teacher.tap()
    guess = torch.cat([tap(part).logits.argmax(dim=1) for part in torch.split(images, 32)])
    right = int((guess == labels).sum())
    count, most = len(labels), float(labels.bincount().max())
    chance = most / count
    if count >= 32 and right <= most + 2 * (count * chance * (1 - chance)) ** 0.5:
        warnings.warn(
            f"the teacher ({teacher.source}) has {right} of {count} training images right, no better than chance"
            f" ({most:.0f}): are these its classes, in its order, with its normalization (--teacher_mean, --teacher_std)?",
            stacklevel=2,
        )


def _order_of(classes: tuple[str, ...], theirs: list[str], shown: str) -> Tensor | None:
    """The teacher's number of each class; None where the order is the same."""
    missing = sorted(set(classes) - set(theirs))
    further = sorted(set(theirs) - set(classes))
    if missing or further:
        parts = [f"it does not know {', '.join(missing[:5])}"] if missing else []
        parts += [f"the data lack its {', '.join(further[:5])}"] if further else []
        raise UserError(f"{shown} was trained on other classes than the data's: {'; '.join(parts)}")
    order = [theirs.index(name) for name in classes]
    return None if order == sorted(order) else torch.tensor(order)
