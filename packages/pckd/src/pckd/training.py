"""The glue to Lightning: a module for anybody's Trainer, callbacks, and one training as the commands run it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pckd.cache import TeacherCache
from pckd.config import CacheSettings, Optimizer, TrainSettings, Views
from pckd.distiller import Distiller
from pckd.losses import LossOutput, Outputs
from pckd.models import build, freeze
from pckd.tap import ClassifierTap
from pckd.views import MultiView, normalize
from tenfold.checkpoints import digest
from tenfold.devices import seed_everything
from tenfold.images import ImageData, Indexed, Split, read_random_crop
from tenfold.loading import KeyedLoader
from tenfold.models import expected_statistics
from tenfold.runs import Run, plain
from tenfold.training import fit

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class PCKDLightning(pl.LightningModule):
    """Trains a ``Distiller`` in any Lightning Trainer.

    A batch is (index, label, images uint8 (B, 3, H, W)), or (index, label) with ``resident`` images, from which views are
    made on the device. Validation batches are the same; the upright image alone is used.

    Args:
        distiller: student, teacher and loss.
        optimizer: settings of the optimizer.
        epochs: epochs of the whole training.
        views: views of a training image.
        seed: seed of the views.
        resident: training images (N, 3, H, W) uint8, or None.
        statistics: mean and std of the student's images.
        teacher_statistics: mean and std of the teacher's images, where they differ.
        cache: outputs of the teacher that take its place.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: Optimizer,
        *,
        epochs: int,
        views: Views,
        seed: int = 0,
        resident: Tensor | None = None,
        statistics: Statistics,
        teacher_statistics: Statistics | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.distiller = distiller
        self.settings = optimizer
        self.epochs = epochs
        self.multi_view = MultiView(views, seed)
        self._resident = (resident,)  # no buffer: it does not belong into a checkpoint
        self.statistics = statistics
        self.teacher_statistics = teacher_statistics
        self.cache = cache
        self._right: dict[int, list[int]] = {}

    def setup(self, stage: str) -> None:
        """Bring the images to the device, once."""
        if self._resident[0] is not None:
            self._resident = (self._resident[0].to(self.device),)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Any]:
        """One step; also returns index, gamma and preview weight of each image."""
        index, labels = batch[0], batch[1]
        raw = batch[2] if len(batch) > 2 else self._resident[0]
        assert raw is not None
        raw = raw if len(batch) > 2 else raw[index]
        epoch = self.current_epoch
        drawn = epoch if self.cache is None else epoch % self.cache.epochs
        views = self.multi_view(raw, index, drawn)
        images = normalize(views, *self.statistics)
        teacher_images = None if self.teacher_statistics is None else normalize(views, *self.teacher_statistics)
        outputs = None if self.cache is None else self.cache.get(index, epoch)
        loss: LossOutput = self.distiller(
            images, labels, epoch + 1, self.epochs, teacher_images=teacher_images, teacher_outputs=outputs
        )
        every = getattr(self.trainer, "log_every_n_steps", 1)
        if (self.global_step + 1) % every == 0:  # what nobody writes down would cost as much as the losses
            self.log_dict({"loss": loss.total.detach(), **loss.terms, "mean weight": loss.weights.mean()})
        return {"loss": loss.total, "index": index, "gamma": loss.gamma, "weights": loss.weights}

    def on_validation_epoch_start(self) -> None:
        """Set the counts back."""
        self._right = {}

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts right answers."""
        images = normalize(batch[2], *self.statistics)
        right = int((self.distiller.student.model(images).argmax(dim=1) == batch[1]).sum())
        counts = self._right.setdefault(dataloader_idx, [0, 0])
        counts[0] += right
        counts[1] += len(images)

    def on_validation_epoch_end(self) -> None:
        """Log the share of right answers in percent: test_top1, and val_top1 where there is a second loader."""
        for number, (right, count) in self._right.items():
            self.log(("test_top1", "val_top1")[number], 100 * right / count)

    def configure_optimizers(self) -> Any:
        """SGD over student and heads, with a step or cosine schedule by epochs."""
        s = self.settings
        optimizer = torch.optim.SGD(
            list(self.distiller.trainable_parameters()), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        scheduler: Any
        if s.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        else:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, s.drops(self.epochs), 0.1)
        return [optimizer], [scheduler]


class PreviewMonitor(pl.Callback):
    """Keeps every image's difficulty and preview weight, by epoch; its state is in the checkpoint.

    Args:
        images: number of training images.
        epochs: epochs of the training.

    Attributes:
        gamma: (epochs, images) float16, NaN where an image was not seen.
        weights: likewise.
    """

    def __init__(self, images: int, epochs: int) -> None:
        self.gamma = torch.full((epochs, images), torch.nan, dtype=torch.float16)
        self.weights = self.gamma.clone()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep difficulty and weight of the batch's images."""
        index = outputs["index"].cpu()
        self.gamma[trainer.current_epoch, index] = outputs["gamma"].cpu().clamp(max=60000).half()
        self.weights[trainer.current_epoch, index] = outputs["weights"].cpu().half()

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {"gamma": self.gamma, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.gamma, self.weights = state_dict["gamma"], state_dict["weights"]

    def arrays(self) -> dict[str, Any]:
        """Both, for ``weights.npz``."""
        return {"gamma": self.gamma.numpy(), "weights": self.weights.numpy()}


class History(pl.Callback):
    """Accuracy by epoch, and the best weights where images are held out to choose them."""

    def __init__(self) -> None:
        self.test: list[float] = []
        self.val: list[float] = []
        self.best: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep accuracy, and the weights where they are the best so far."""
        assert isinstance(pl_module, PCKDLightning)
        self.test.append(float(trainer.callback_metrics["test_top1"]))
        if "val_top1" in trainer.callback_metrics:
            self.val.append(float(trainer.callback_metrics["val_top1"]))
            if self.val[-1] > max(self.val[:-1], default=-1.0):
                self.best = {k: v.detach().cpu().clone() for k, v in _weights(pl_module.distiller).items()}

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {"test": self.test, "val": self.val, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.test, self.val, self.best = list(state_dict["test"]), list(state_dict["val"]), dict(state_dict["best"])

    @property
    def chosen(self) -> int:
        """Number of the reported epoch, from 0: the best on held-out images, else the last."""
        return int(np.argmax(self.val)) if self.val else len(self.test) - 1


def _weights(distiller: Distiller) -> Mapping[str, Tensor]:
    state: Mapping[str, Tensor] = distiller.student.model.state_dict()
    return state


@dataclass(frozen=True)
class Trained:
    """What one training gives.

    Attributes:
        model: the student alone, at the reported epoch, in evaluation mode.
        tap: path of its last linear layer.
        top1: accuracy on the test images at that epoch, in percent.
        last: accuracy of the last epoch.
        best: accuracy of the epoch that is best on the test images, which flatters.
        epoch: the reported epoch, 1-based.
        history: accuracy by epoch.
        preview: gamma and weights (epochs, images).
    """

    model: nn.Module
    tap: str
    top1: float
    last: float
    best: float
    epoch: int
    history: list[float]
    preview: dict[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher, ready to be run.

    Attributes:
        model: the model, folded where that is possible.
        plain: the model as it was built, for intermediate maps.
        statistics: mean and std that it expects.
        hash: digest of its weights.
    """

    model: nn.Module
    plain: nn.Module
    statistics: Statistics
    hash: str


def example_images(data: ImageData, statistics: Statistics) -> Tensor:
    """Two test images as a model takes them."""
    return normalize(data.test.pixels(torch.arange(min(2, len(data.test)))), *statistics)


def load_teacher(spec: str, weights: str | None, data: ImageData) -> Teacher:
    """A teacher from its name and file."""
    return as_teacher(build(spec, len(data.classes), weights, option="--teacher"), data, own=weights == "pretrained")


def as_teacher(model: nn.Module, data: ImageData, *, own: bool = False) -> Teacher:
    """Freeze a model; ``own`` takes the pixel statistics that a pretrained model came with."""
    statistics = (expected_statistics(model) if own else None) or (data.mean, data.std)
    model.eval().requires_grad_(False)
    folded = freeze(model, example_images(data, statistics))
    return Teacher(folded, model, statistics, digest(model.state_dict()))


def cache_card(data: ImageData, views: Views, seed: int, teacher: str) -> dict[str, Any]:
    """What a cache has to be made of to be used."""
    assert data.train.images is not None
    pixels = digest([data.train.images[:: max(1, len(data.train) // 512)]])
    return {"teacher": teacher, "data": f"{len(data.train)} images, {pixels}", "views": plain(views), "seed": seed}


class _Order:
    """All images in random order, the last partial batch kept where it has two images or more."""

    def __init__(self, images: int, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size

    def __call__(self, generator: torch.Generator) -> Sequence[Sequence[int]]:
        order = torch.randperm(self.images, generator=generator)
        return [part.tolist() for part in torch.split(order, self.batch_size) if len(part) > 1]


class _Pixels(torch.utils.data.Dataset[Any]):
    """(index, label, image) of a split, without augmentation."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, int, Tensor]:
        return index, int(self.split.labels[index]), self.split.pixels(torch.tensor([index]))[0]


def loader(split: Split, batch_size: int = 256, workers: int = 0) -> DataLoader[Any]:
    """Images of a split in order, for validation."""
    return DataLoader(_Pixels(split), batch_size=batch_size, num_workers=0 if split.images is not None else workers)


def train_student(
    data: ImageData,
    settings: TrainSettings,
    *,
    run: Run | None = None,
    stage: str = "",
    teacher: Teacher | None = None,
    cache: TeacherCache | None = None,
    quiet: bool = False,
) -> Trained:
    """One training from its settings; resumed where the run was interrupted.

    Args:
        data: the images.
        settings: settings of the training, its method and its seed.
        run: the run folder; None writes nothing.
        stage: name of this training where a run has several.
        teacher: the frozen teacher; not for method ce.
        cache: what takes its place.
        quiet: no progress on stderr.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite.
        UserError: the models do not fit the data or each other.
    """
    method = settings.chosen_method
    seed_everything(settings.seed)
    statistics = (data.mean, data.std)
    student = build(settings.student, len(data.classes), settings.student_weights).to(memory_format=torch.channels_last)
    teacher_model = None
    if teacher is not None and method != "ce":
        teacher_model = teacher.plain if method == "fitnet" else teacher.model
    dims = None if cache is None else tuple(cache.weight.shape)
    distiller = Distiller(
        student,
        teacher_model if cache is None else None,
        method,
        settings.losses,
        example=example_images(data, statistics),
        tap=settings.tap,
        teacher_tap=settings.teacher_tap,
        teacher_dims=None if dims is None else (dims[0], dims[1]),
    )
    resident = data.train.images is not None
    views = settings.views if resident else dataclasses.replace(settings.views, padding=0, mirror=False)
    module = PCKDLightning(
        distiller,
        settings.optimizer,
        epochs=settings.epochs,
        views=views,
        seed=settings.seed,
        resident=data.train.images,
        statistics=statistics,
        teacher_statistics=teacher.statistics if teacher is not None and teacher.statistics != statistics else None,
        cache=cache if method != "ce" else None,
    )
    train = KeyedLoader(
        Indexed(data.train, read_random_crop),
        seed=settings.seed,
        order=_Order(len(data.train), settings.batch_size),
        num_workers=0 if resident else settings.workers,
    )
    monitor, history = PreviewMonitor(len(data.train), settings.epochs), History()
    splits = [data.test] if data.val is None else [data.test, data.val]
    validate = [loader(split, workers=settings.workers) for split in splits]
    callbacks = [monitor, history]
    fit(
        module,
        train,
        settings,
        run,
        seed=settings.seed,
        validate=validate,
        callbacks=callbacks,
        stage=stage,
        quiet=quiet,
    )
    if history.best:
        student.load_state_dict(history.best)
    path = distiller.student.path
    distiller.student.classifier._forward_pre_hooks.clear()
    return Trained(
        model=student.eval().cpu(),
        tap=path,
        top1=history.test[history.chosen],
        last=history.test[-1],
        best=max(history.test),
        epoch=history.chosen + 1,
        history=history.test,
        preview=monitor.arrays(),
    )


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, statistics: Statistics, *, tap: str | None = None, batch_size: int = 256
) -> Outputs:
    """Outputs of a model for all images of a split, without augmentation."""
    tapped = ClassifierTap(model.eval(), tap)
    device = next(model.parameters()).device
    parts = [
        tapped(normalize(split.pixels(index), *statistics).to(device))
        for index in torch.split(torch.arange(len(split)), batch_size)
    ]
    tapped.classifier._forward_pre_hooks.clear()
    logits, features = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("logits", "feature"))
    bias = parts[0].bias
    return Outputs(logits, features, parts[0].weight.detach().cpu(), None if bias is None else bias.detach().cpu())


def teaching(teacher: Teacher, settings: CacheSettings, data: ImageData) -> Any:
    """(index, epoch) -> the frozen teacher's outputs on the views of that epoch."""
    assert data.train.images is not None
    tap = ClassifierTap(teacher.model, settings.teacher_tap)
    views = MultiView(settings.views, settings.seed)
    device = next(teacher.model.parameters()).device
    images = data.train.images.to(device)

    @torch.no_grad()
    def teach(index: Tensor, epoch: int) -> Outputs:
        where = index.to(device)
        out: Outputs = tap(normalize(views(images[where], where, epoch), *teacher.statistics))
        return out

    return teach
