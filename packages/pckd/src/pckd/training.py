"""The glue to Lightning: a module for anybody's Trainer, callbacks, and one training as the commands run it."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pckd.analysis import top_k
from pckd.augment import TrainingImages
from pckd.cache import TeacherCache
from pckd.config import CacheSettings, Mixing, Optimizer, TrainSettings, Views
from pckd.distiller import Distiller
from pckd.losses import LossOutput, Outputs
from pckd.mixing import draw_mixture
from pckd.models import Statistics, build, own_statistics
from pckd.optimizers import make_optimizer, make_schedule
from pckd.tap import ClassifierTap, logits_of, second_stage
from pckd.teacher import Teacher
from pckd.views import MultiView, normalize
from tenfold import UserError
from tenfold.checkpoints import digest
from tenfold.devices import seed_everything
from tenfold.images import ImageData, Split
from tenfold.loading import KeyedLoader, cut
from tenfold.runs import Run, plain
from tenfold.training import fit


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
        teacher: what makes the teacher's images, where they differ from the student's.
        cache: outputs of the teacher that take its place.
        mixing: settings of mixup and cutmix.
        head_epochs: epochs at the beginning in which classifier and heads of the loss are trained alone.

    Example:
        >>> images = torch.randn(2, 3, 4, 4)
        >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
        >>> distiller = Distiller(student, None, "ce", example=images)
        >>> statistics = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        >>> module = PCKDLightning(distiller, Optimizer(), epochs=10, views=Views(number=1), statistics=statistics)
        >>> module.distiller is distiller
        True
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
        teacher: Teacher | None = None,
        cache: TeacherCache | None = None,
        mixing: Mixing | None = None,
        head_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.distiller = distiller
        self.settings = optimizer
        self.epochs = epochs
        self.multi_view = MultiView(views, seed)
        self._resident = (resident,)  # no buffer: it does not belong into a checkpoint
        self.statistics = statistics
        self._teacher = (teacher,)  # no submodule
        self.cache = cache
        self.mixing = mixing or Mixing()
        self.head_epochs = head_epochs
        kept = {id(p) for layer in distiller.student.layers for p in layer.parameters()}
        self._body = tuple(p for p in distiller.student.parameters() if p.requires_grad and id(p) not in kept)
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
        if self.head_epochs:
            for parameter in self._body:
                parameter.requires_grad_(epoch >= self.head_epochs)
        views = self.multi_view(raw, index, drawn)
        images = normalize(views, *self.statistics)
        teacher = self._teacher[0]
        teacher_images = None if teacher is None else teacher.images(views)
        targets = labels
        if self.mixing.on:
            mixture = draw_mixture(len(labels), (images.shape[-2], images.shape[-1]), self.mixing)
            images, targets = mixture.images(images), mixture.labels(labels, self.distiller.student.num_classes)
            teacher_images = None if teacher_images is None else mixture.images(teacher_images)
        outputs = None if self.cache is None else self.cache.get(index, epoch)
        loss: LossOutput = self.distiller(
            images, targets, epoch + 1, self.epochs, teacher_images=teacher_images, teacher_outputs=outputs
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
        student = self.distiller.student
        right = int((logits_of(student.model(images), len(student.layers)).argmax(dim=1) == batch[1]).sum())
        counts = self._right.setdefault(dataloader_idx, [0, 0])
        counts[0] += right
        counts[1] += len(images)

    def on_validation_epoch_end(self) -> None:
        """Log the share of right answers in percent: test_top1, and val_top1 where there is a second loader."""
        for number, (right, count) in self._right.items():
            self.log(("test_top1", "val_top1")[number], 100 * right / count)

    def configure_optimizers(self) -> Any:
        """The optimizer over student and heads, and the course of its rate by epochs."""
        optimizer = make_optimizer(self.distiller.named_parameters(), self.settings)
        return [optimizer], [make_schedule(optimizer, self.settings, self.epochs)]


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
        self.step = -1
        """Steps of the training before the latest validation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep accuracy, and the weights where they are the best so far."""
        assert isinstance(pl_module, PCKDLightning)
        found = [float(trainer.callback_metrics[k]) for k in ("test_top1", "val_top1") if k in trainer.callback_metrics]
        self.add(trainer.global_step, found, _weights(pl_module.distiller))

    def add(self, step: int, found: Sequence[float], weights: Mapping[str, Tensor]) -> None:
        """Keep the accuracy on the test images, and on those held out if there are any, of these weights."""
        self.step = step
        self.test.append(found[0])
        if len(found) > 1:
            self.val.append(found[1])
            if self.val[-1] > max(self.val[:-1], default=-1.0):
                self.best = {k: v.detach().cpu().clone() for k, v in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {"test": self.test, "val": self.val, "best": self.best, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.test, self.val, self.best = list(state_dict["test"]), list(state_dict["val"]), dict(state_dict["best"])
        self.step = state_dict.get("step", -1)

    @property
    def chosen(self) -> int:
        """Number of the reported epoch, from 0: the best on held-out images, else the last."""
        return int(np.argmax(self.val)) if self.val else len(self.test) - 1


class MovingAverage(pl.Callback):
    """An exponential moving average of the student's weights, which takes their place while the student is tested.

        w' <- d w' + (1 - d) w after each update; whole numbers (counters of batch norms) are copied

    Args:
        decay: d.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._steps = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights where they were updated."""
        assert isinstance(pl_module, PCKDLightning)
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        weights = _weights(pl_module.distiller)
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in weights.items()}
        for name, value in weights.items():
            mean = self.average[name] = self.average[name].to(value.device)
            if value.is_floating_point():
                mean.lerp_(value.detach(), 1 - self.decay)
            else:
                mean.copy_(value)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place of the weights."""
        assert isinstance(pl_module, PCKDLightning)
        if self.average:
            self._own = {name: value.detach().clone() for name, value in _weights(pl_module.distiller).items()}
            pl_module.distiller.student.model.load_state_dict(self.average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        assert isinstance(pl_module, PCKDLightning)
        if self._own:
            pl_module.distiller.student.model.load_state_dict(self._own)
            self._own = {}

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint."""
        return {"average": self.average, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.average, self._steps = dict(state_dict["average"]), int(state_dict["steps"])


def _weights(distiller: Distiller) -> Mapping[str, Tensor]:
    state: Mapping[str, Tensor] = distiller.student.model.state_dict()
    return state


@dataclass(frozen=True)
class Trained:
    """What one training gives.

    Attributes:
        model: the student alone, at the reported epoch, in evaluation mode.
        tap: path of the layer that gives its logits.
        statistics: mean and std of the pixels that it expects.
        top1: accuracy on the test images at that epoch, in percent.
        last: accuracy of the last epoch.
        best: accuracy of the epoch that is best on the test images, which flatters.
        epoch: the reported epoch, 1-based.
        history: accuracy by epoch.
        preview: gamma and weights (epochs, images).
    """

    model: nn.Module
    tap: str
    statistics: Statistics
    top1: float
    last: float
    best: float
    epoch: int
    history: list[float]
    preview: dict[str, Any]


def example_images(data: ImageData, statistics: Statistics) -> Tensor:
    """Two test images as a model takes them."""
    return normalize(data.test.pixels(torch.arange(min(2, len(data.test)))), *statistics)


def cache_card(data: ImageData, views: Views, seed: int, teacher: Teacher) -> dict[str, Any]:
    """What a cache has to be made of to be used."""
    assert data.train.images is not None
    pixels = digest([data.train.images[:: max(1, len(data.train) // 512)]])
    own = {"data": f"{len(data.train)} images, {pixels}", "classes": list(data.classes)}
    return {"teacher": teacher.card(), **own, "views": plain(views), "seed": seed}


class _Order:
    """All images in random order, the last partial batch kept where it has two images or more.

    Args:
        labels: label of each image.
        batch_size: images of a batch of one device.
        devices: number of devices.
        balanced: draw each image with a probability such that all classes come equally often.
    """

    def __init__(self, labels: Tensor, batch_size: int, devices: int = 1, *, balanced: bool = False) -> None:
        self.labels, self.batch_size, self.devices = labels, batch_size, devices
        counts = labels.bincount().double()
        self.weights = 1 / counts[labels] if balanced else None

    def __call__(self, generator: torch.Generator) -> Sequence[Sequence[int]]:
        if self.weights is None:
            order = torch.randperm(len(self.labels), generator=generator)
        else:
            order = torch.multinomial(self.weights, len(self.labels), replacement=True, generator=generator)
        return cut(order, self.batch_size, self.devices)


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
    student = build(
        settings.student,
        len(data.classes),
        settings.student_weights,
        args=settings.student_args,
        in_chans=len(data.mean),
        size=data.size,
    )
    student = student.to(memory_format=torch.channels_last)
    statistics = own_statistics(student, settings.student, settings.student_weights) or (data.mean, data.std)
    if len(statistics[0]) != len(data.mean):
        statistics = (data.mean, data.std)
    teaching = teacher if method != "ce" else None
    cached = cache if method != "ce" else None
    tapped, hint = None, None
    if teaching is not None and cached is None:
        if method == "fitnet":
            hint = settings.losses.fitnet.teacher or second_stage(teaching.plain, _example(teaching, data))
        tapped = teaching.tap(hint)
    dims = None if cached is None else tuple(cached.weight.shape)
    distiller = Distiller(
        student,
        tapped,
        method,
        settings.losses,
        example=example_images(data, statistics),
        teacher_example=None if teaching is None else _example(teaching, data),
        tap=settings.tap,
        teacher_dims=None if dims is None else (dims[0], dims[1]),
        label_smoothing=settings.label_smoothing,
    )
    items = TrainingImages(data.train, settings.views)
    same = teaching is None or (teaching.statistics == statistics and teaching.size in {None, data.size})
    module = PCKDLightning(
        distiller,
        settings.optimizer,
        epochs=settings.epochs,
        views=dataclasses.replace(settings.views, padding=0) if items.resized else settings.views,
        seed=settings.seed,
        resident=data.train.images if items.on_device else None,
        statistics=statistics,
        teacher=None if same else teaching,
        cache=cached,
        mixing=settings.mixing,
        head_epochs=settings.head_epochs,
    )
    train = KeyedLoader(
        items,
        seed=settings.seed,
        order=_Order(data.train.labels, settings.batch_size, settings.devices, balanced=settings.balanced),
        num_workers=0 if items.on_device else settings.workers,
    )
    _check_running_statistics(student, settings, len(train))
    monitor, history = PreviewMonitor(len(data.train), settings.epochs), History()
    average = None if settings.ema is None else MovingAverage(settings.ema)
    splits = [data.test] if data.val is None else [data.test, data.val]
    validate = [loader(split, workers=settings.workers) for split in splits]
    frozen = {name: p.requires_grad for name, p in student.named_parameters()}
    callbacks: list[pl.Callback] = [monitor, history, *([] if average is None else [average])]
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
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(frozen[name])
    if average is not None and average.average:
        student.load_state_dict(average.average)
    if history.step < module.global_step:  # --steps ended it between two validations
        found = [_accuracy(student, split, statistics, distiller.student.path) for split in splits]
        history.add(module.global_step, found, student.state_dict())
    if history.best:
        student.load_state_dict(history.best)
    return Trained(
        model=student.eval().cpu(),
        tap=distiller.student.path,
        statistics=statistics,
        top1=history.test[history.chosen],
        last=history.test[-1],
        best=max(history.test),
        epoch=history.chosen + 1,
        history=history.test,
        preview=monitor.arrays(),
    )


def _accuracy(model: nn.Module, split: Split, statistics: Statistics, tap: str) -> float:
    """Percent of a split that a model has right."""
    return top_k(predict(model, split, statistics, tap=tap).logits, torch.as_tensor(split.labels))


def _check_running_statistics(student: nn.Module, settings: TrainSettings, batches: int) -> None:
    """Warn where batch norms that start anew follow the data so slowly that a training of this length leaves them behind.

    A norm of momentum m sees the last 1 / m steps; the student is evaluated by what it saw, and is at chance where its weights
    have moved further meanwhile (torchvision's MobileNetV3 has 0.01: 300 steps of AdamW, right on half of the training images
    with the batch's own statistics, on a tenth of the test images without).
    """
    steps = settings.epochs * max(1, batches // settings.accumulate)
    steps = min(steps, settings.steps or steps)
    norms = [
        m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.momentum
    ]
    slowest = min((m.momentum or 1.0 for m in norms if m.track_running_stats), default=1.0)
    if settings.student_weights is None and slowest < 0.05 and steps * slowest < 10:
        warnings.warn(
            f"--student {settings.student}: its batch norms follow the data with a momentum of {slowest:g}, too slowly for a"
            f" training of {steps} steps: on the test images it may be at chance; train longer, or take a model with 0.1",
            stacklevel=3,
        )


def answers(trained: Trained, split: Split, teacher: Teacher | None) -> dict[str, Any]:
    """The class that a student, and its teacher, give to each image of a split, without augmentation."""
    out = predict(trained.model, split, trained.statistics, tap=trained.tap)
    found = {"student": out.logits.argmax(dim=1).numpy()}
    if teacher is not None:
        device = next(teacher.folded.parameters()).device
        found["teacher"] = predict(teacher.to("cpu"), split).logits.argmax(dim=1).numpy()
        teacher.to(device)
    return found


def _example(teacher: Teacher, data: ImageData) -> Tensor:
    """Two test images as a teacher takes them."""
    return teacher.images(data.test.pixels(torch.arange(min(2, len(data.test)))))


@torch.no_grad()
def predict(
    model: nn.Module | Teacher,
    split: Split,
    statistics: Statistics | None = None,
    *,
    tap: str | None = None,
    batch_size: int = 256,
) -> Outputs:
    """Outputs of a student or a teacher for all images of a split, without augmentation.

    Args:
        model: a student, or a teacher.
        split: the images.
        statistics: mean and std of the pixels that a student expects.
        tap: path of the layer that gives a student's logits; default: found.
        batch_size: images at once.
    """
    if isinstance(model, Teacher):
        tapped, made = model.tap(), model.images
    else:
        assert statistics is not None

        def made(pixels: Tensor) -> Tensor:
            return normalize(pixels, *statistics)

        first = made(split.pixels(torch.arange(min(2, len(split)))))
        device = next(model.parameters()).device
        tapped = ClassifierTap(model.eval(), tap, example=None if tap else first.to(device))
    device = next(tapped.parameters()).device
    parts = [
        tapped(made(split.pixels(index)).to(device)) for index in torch.split(torch.arange(len(split)), batch_size)
    ]
    logits, features = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("logits", "feature"))
    bias = parts[0].bias
    return Outputs(logits, features, parts[0].weight.detach().cpu(), None if bias is None else bias.detach().cpu())


def teaching(teacher: Teacher, settings: CacheSettings, data: ImageData) -> Any:
    """(index, epoch) -> the frozen teacher's outputs on the views of that epoch.

    Raises:
        UserError: the views are not made from images in memory on the device.
    """
    if data.train.images is None or settings.views.resized(data.size):
        raise UserError("a cache needs images in memory (--reading.resident_gb) and --views.crop padded")
    tap = teacher.tap()
    views = MultiView(settings.views, settings.seed)
    device = next(tap.parameters()).device
    images = data.train.images.to(device)

    @torch.no_grad()
    def teach(index: Tensor, epoch: int) -> Outputs:
        where = index.to(device)
        out: Outputs = tap(teacher.images(views(images[where], where, epoch)))
        return out

    return teach
