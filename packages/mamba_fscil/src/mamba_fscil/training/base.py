"""The base session: backbone and projector on the base classes, with Lightning, resumed to the same bits after a kill."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mamba_fscil.backbones import MapBackbone, build_backbone
from mamba_fscil.config import TRAINING_FREE, BaseConfig, ProjectorConfig, TrainSettings
from mamba_fscil.data import Part, SessionData, normalized
from mamba_fscil.head import ETFHead, dot_regression_loss
from mamba_fscil.projector import DualSSMProjector, MLPProjector, Projector
from tenfold import UserError
from tenfold.devices import choose_device, seed_everything
from tenfold.images import Indexed, read_random_crop
from tenfold.loading import KeyedLoader, cut
from tenfold.models import expected_statistics
from tenfold.modules import evaluating
from tenfold.randomness import generator
from tenfold.runs import Run
from tenfold.training import fit

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


class BaseSessionModule(pl.LightningModule):
    """Trains backbone and projector on fixed class vectors, in any Lightning Trainer.

    A batch is (index, label, images uint8 (B, 3, H, W)), or (index, label) with ``resident`` images or maps.

    Args:
        backbone: from images to maps; None for data that are maps.
        projector: from maps to embeddings.
        head: the class vectors.
        config: optimizer and augmentation.
        steps: steps of the whole training, for the schedule.
        statistics: mean and std of the pixels.
        resident: images (N, 3, H, W) uint8 or maps (N, c, H, W), or None.
        beside: a projector that is trained on the same maps, detached, so that it has no part in the backbone.

    Source: NC-FSCIL, arXiv 2302.03004, section 4; mixing as in Mamba-FSCIL's code.

    Example:
        >>> from mamba_fscil import DualSSMProjector, ETFHead
        >>> from mamba_fscil.config import BaseConfig
        >>> maps = torch.randn(12, 8, 3, 3)
        >>> projector, head = DualSSMProjector(8, (3, 3)), ETFHead(8, 4)
        >>> module = BaseSessionModule(None, projector, head, BaseConfig(), steps=3, statistics=((), ()), resident=maps)
        >>> module.head is head
        True
    """

    def __init__(
        self,
        backbone: MapBackbone | None,
        projector: Projector,
        head: ETFHead,
        config: BaseConfig,
        *,
        steps: int,
        statistics: Statistics,
        resident: Tensor | None = None,
        beside: Projector | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.projector, self.head, self.beside = backbone, projector, head, beside
        self.settings, self.steps, self.statistics = config, steps, statistics
        self._resident = (resident,)  # no buffer: it does not belong into a checkpoint

    def setup(self, stage: str) -> None:
        """Bring images to the device, once."""
        if self._resident[0] is not None:
            self._resident = (self._resident[0].to(self.device),)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """One step; what is drawn comes from torch's global generator, whose state a checkpoint holds."""
        index, labels = batch[0], batch[1]
        x = batch[2] if len(batch) > 2 else self._resident[0]
        assert x is not None
        x = x if len(batch) > 2 else x[index]
        partner, share = None, 1.0
        if x.dtype == torch.uint8:
            assert self.backbone is not None
            x = normalized(augmented(x, self.settings), *self.statistics)
            x, partner, share = mixed(x, self.settings)
            x = self.backbone(x)
        loss = self._loss(self.projector, x, labels, partner, share)
        self.log("loss", loss.detach())
        if self.beside is not None:
            loss = loss + self._loss(self.beside, x.detach(), labels, partner, share)
        return loss

    def _loss(self, projector: Projector, maps: Tensor, labels: Tensor, partner: Tensor | None, share: float) -> Tensor:
        mu = projector(maps).mu
        first = dot_regression_loss(mu, self.head.W, labels, balanced=self.settings.balanced)
        if partner is None:
            return first
        other = dot_regression_loss(mu, self.head.W, labels[partner], balanced=self.settings.balanced)
        return share * first + (1 - share) * other + (first if self.settings.extra_term else 0)

    def configure_optimizers(self) -> Any:
        """SGD with one schedule for all groups, by steps."""
        s = self.settings
        groups = [{"params": list(self.projector.parameters()), "lr": s.lr}]
        if self.beside is not None:
            groups.append({"params": list(self.beside.parameters()), "lr": s.lr})
        if self.backbone is not None and not self.backbone.frozen:
            groups.append({"params": list(self.backbone.parameters()), "lr": s.lr * s.backbone_lr})
        optimizer = torch.optim.SGD(groups, momentum=s.momentum, weight_decay=s.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: base_rate(step, self.steps, s))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def base_rate(step: int, steps: int, config: BaseConfig) -> float:
    """Factor of the learning rate at the 0-based ``step``."""
    done = step / max(1, steps)
    rise = min(1.0, (step + 1) / (config.warm_up * steps)) if config.warm_up * steps >= 1 else 1.0
    if config.schedule == "step":
        return rise * 0.25 ** sum(done >= share for share in config.milestones)
    return rise * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))


def augmented(images: Tensor, config: BaseConfig) -> Tensor:
    """Random crops of padded images, mirrored in half of the cases. Shapes: (b, C, H, W) uint8, likewise."""
    if config.mirror:
        flip = torch.rand(len(images), device="cpu").to(images.device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if not config.padding:
        return images
    b, _, h, w = images.shape
    pad = config.padding
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(2 * pad + 1, (2, b), device="cpu").to(images.device)
    rows = top[:, None] + torch.arange(h, device=images.device)
    columns = left[:, None] + torch.arange(w, device=images.device)
    where = torch.arange(b, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[where, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def mixed(x: Tensor, config: BaseConfig) -> tuple[Tensor, Tensor | None, float]:
    """A batch, mixed or patched with itself in another order; that order, and the share of the first labels.

    Source: mixup, arXiv 1710.09412 (alpha 0.8); CutMix, arXiv 1905.04899 (alpha 1).
    """
    draw = float(torch.rand(()))
    if draw >= config.mixup + config.cutmix:
        return x, None, 1.0
    partner = torch.randperm(len(x)).to(x.device)
    if draw < config.mixup:
        share = float(torch.distributions.Beta(0.8, 0.8).sample())
        return share * x + (1 - share) * x[partner], partner, share
    height, width = x.shape[2:]
    cut = (1 - float(torch.rand(()))) ** 0.5
    h, w = int(height * cut), int(width * cut)
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    x = x.clone()
    x[:, :, top : top + h, left : left + w] = x[partner][:, :, top : top + h, left : left + w]
    return x, partner, 1 - h * w / (height * width)


class _Order:
    """All rows in random order; the last partial batch is kept where batch norm can take it."""

    def __init__(self, rows: int, batch_size: int, devices: int) -> None:
        self.rows, self.batch_size, self.devices = rows, batch_size, devices

    def __call__(self, generator: torch.Generator) -> Sequence[Sequence[int]]:
        order = torch.randperm(self.rows, generator=generator)
        return cut(order, self.batch_size, self.devices) or [order.tolist()]


class _Numbered(Dataset[Any]):
    """(index, label) of rows in memory."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.labels[index])


@dataclasses.dataclass(frozen=True)
class Base:
    """What a base session gives.

    Attributes:
        backbone: frozen, in evaluation mode; None for data that are maps.
        projector: selective, or static where the method is.
        beside: the static one that was trained on the same maps, or None.
        head: the class vectors.
        statistics: mean and std of the pixels.
    """

    backbone: MapBackbone | None
    projector: Projector
    beside: Projector | None
    head: ETFHead
    statistics: Statistics


def prepare(data: SessionData, settings: TrainSettings, *, beside: bool = False) -> Base:
    """Backbone, projectors and class vectors as they are before the base session; they depend on the seed alone.

    Raises:
        UserError: no backbone for images, or one for maps; more classes than capacity or than dimensions.
    """
    seed_everything(settings.seed)
    backbone = None
    statistics = (data.mean, data.std)
    if data.base.maps is None:
        if settings.backbone is None:
            raise UserError("--backbone is missing: the data are images (fscil:resnet12, timm:resnet18...)")
        backbone = build_backbone(settings.backbone, settings.backbone_weights, data.size)
        if settings.backbone_weights is not None or settings.backbone.startswith(("packaged:", "hf:")):
            statistics = expected_statistics(backbone.model) or statistics
        if settings.freeze:
            backbone.freeze()
        channels, size = backbone.channels, backbone.size
    else:
        if settings.backbone is not None:
            raise UserError(f"--backbone {settings.backbone}: the data are maps already, which need none")
        channels, size = data.base.maps.shape[1], (data.base.maps.shape[2], data.base.maps.shape[3])
    config = settings.projector
    width = config.width or channels
    capacity = settings.capacity or min(max(2 * data.base_classes, len(data.classes)), width)
    if capacity < len(data.classes):
        raise UserError(f"--capacity {capacity}: the data have {len(data.classes)} classes; at most the width, {width}")
    if capacity > width:
        raise UserError(
            f"--capacity {capacity} is more than the width {width} of an embedding: raise --projector.width"
        )
    projector = projector_of(settings.method, channels, size, config)
    other = MLPProjector(channels, size, config) if beside else None
    head = ETFHead(width, capacity, generator(settings.seed, 0, width, capacity))
    return Base(backbone, projector, other, head, statistics)


def projector_of(method: str, channels: int, size: tuple[int, int], config: ProjectorConfig) -> Projector:
    """The projector of a method, without an incremental branch."""
    if method in {"mlp", "frozen-mlp"} or config.version == "mlp":
        return MLPProjector(channels, size, config)
    return DualSSMProjector(channels, size, config)


def train_base(
    data: SessionData,
    settings: TrainSettings,
    *,
    run: Run | None = None,
    stage: str = "base",
    beside: bool = False,
    quiet: bool = False,
) -> Base:
    """The base session from its settings; resumed where the run was interrupted.

    Args:
        data: the images or maps.
        settings: settings, method and seed.
        run: the run folder; None writes nothing.
        stage: name of this training in the run.
        beside: train a static projector on the same maps, too.
        quiet: no progress on stderr.

    Raises:
        UserError: data, backbone and projector do not fit each other.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    base = prepare(data, settings, beside=beside)
    device = choose_device(settings.device)
    part = data.base
    resident: Tensor | None
    if base.backbone is not None and base.backbone.frozen:
        base.backbone.to(device)
        resident = torch.cat([maps.cpu() for maps, _ in maps_of(base, part, device=device)])
    else:
        resident = part.maps if part.split is None else part.split.images
    workers, dataset = 0, _Numbered(part.labels)
    decode: Dataset[Any] = dataset
    if resident is None:
        assert part.split is not None
        workers, decode = settings.workers, Indexed(part.split, read_random_crop)
    order = _Order(len(part.labels), settings.batch_size, settings.devices)
    loader = KeyedLoader(decode, seed=settings.seed, order=order, num_workers=workers)
    module = BaseSessionModule(
        None if base.backbone is not None and base.backbone.frozen else base.backbone,
        base.projector,
        base.head,
        settings.base,
        steps=settings.total_steps(loader.batches),
        statistics=base.statistics,
        resident=resident,
        beside=base.beside,
    )
    if not (settings.freeze and settings.method in TRAINING_FREE and not beside):  # else nothing is there to be trained
        fit(module, loader, settings, run, seed=settings.seed, stage=stage, quiet=quiet)
    if base.backbone is not None:
        base.backbone.freeze().to(device)
    for projector in (base.projector, base.beside):
        if projector is not None:
            projector.eval().requires_grad_(False).to(device)
    base.head.to(device)
    return base


@torch.no_grad()
def maps_of(
    base: Base, part: Part, *, batch_size: int = 64, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps and labels of a part, batch by batch, with the images as they are for testing."""
    for index in torch.split(torch.arange(len(part)), batch_size):
        labels = part.labels[index]
        if part.maps is not None:
            yield part.maps[index].to(device), labels
        else:
            assert part.split is not None
            assert base.backbone is not None
            with evaluating(base.backbone):
                images = normalized(part.split.pixels(index).to(device), *base.statistics)
                yield base.backbone(images), labels
