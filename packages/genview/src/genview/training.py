"""The glue to Lightning: a module for anybody's Trainer, callbacks, and one pretraining as the commands run it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genview import augment, data
from genview.config import Optimizer, ProbeSettings, QualitySettings, TrainSettings, ViewSettings
from genview.data import GeneratedViews, PairedViewDataset, PictureData, Pictures
from genview.encoders import build_encoder
from genview.foreground import ForegroundModel
from genview.neighbors import knn_accuracy
from genview.networks import SelfSupervised, build_backbone, width_of
from genview.probes import few_labels
from genview.quality import QualityScorer
from genview.weights import effective_share, pair_weights
from tenfold import UserError
from tenfold.devices import choose_device, seed_everything
from tenfold.loading import KeyedLoader
from tenfold.models import IMAGENET
from tenfold.modules import evaluating
from tenfold.randomness import generator, keyed
from tenfold.runs import Run
from tenfold.training import fit

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
FOREGROUND = "foreground.safetensors"


def normalized(images: Tensor, statistics: Statistics) -> Tensor:
    """Pixels in [0, 1] or bytes, less their mean, over their deviation."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (x.new_tensor(part).view(-1, 1, 1) for part in statistics)
    return (x - mean) / std


class GenViewModule(pl.LightningModule):
    """Pretrains a backbone on pairs of views in any Lightning Trainer.

    A batch is that of ``PairedViewDataset``: (index, picture, generated view, whether there is one), uint8. Views are made on
    the device. The frozen scorer is no part of the module: it is in no checkpoint, in no bucket of DistributedDataParallel.

    Args:
        network: the method around its backbone.
        optimizer: settings of the optimizer.
        views: settings of the views.
        size: side of a view.
        qd: how pairs are weighted.
        scorer: for online and cached.
        static: quality of each picture's pair (N,), for static; NaN where none was scored.
        maps: kept maps of the pictures and of their views, for cached (N, K, G, G) each.
        statistics: mean and deviation of the pixels that the backbone gets.
        seed: seed of the views.

    Example:
        >>> from genview.config import Heads
        >>> from genview.networks import SelfSupervised, build_backbone, width_of
        >>> backbone = build_backbone("conv:8")
        >>> network = SelfSupervised(backbone, "simclr", Heads(hidden=16, out=8), features=width_of(backbone, 32))
        >>> module = GenViewModule(network, size=32)
        >>> sorted(module.network.state_dict())[0].split(".")[0]
        'backbone'
    """

    def __init__(
        self,
        network: SelfSupervised,
        optimizer: Optimizer | None = None,
        *,
        views: ViewSettings | None = None,
        size: int = 224,
        qd: QualitySettings | None = None,
        scorer: QualityScorer | None = None,
        static: Tensor | None = None,
        maps: tuple[Tensor, Tensor] | None = None,
        statistics: Statistics = IMAGENET,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.settings, self.views = optimizer or Optimizer(), views or ViewSettings()
        self.size, self.statistics, self.seed = size, statistics, seed
        self.qd = qd or QualitySettings()
        self._frozen = (scorer, static, maps)  # a tuple: neither parameters nor buffers, and in no checkpoint

    def quality(self, batch: Sequence[Tensor], pair: augment.Pair) -> tuple[Tensor, Tensor]:
        """q of each pair, and for which pairs it is known. Shapes: -> (n,), (n,) bool."""
        scorer, static, maps = self._frozen
        index, known = batch[0], torch.ones(len(batch[0]), dtype=torch.bool, device=batch[1].device)
        if self.qd.mode == "static":
            assert static is not None
            q = static[index.cpu()].to(batch[1].device)
            known = ~q.isnan() & (pair.generated >= 0)
            return torch.where(known, q, 0.0), known
        assert scorer is not None
        if self.qd.mode == "online":
            return scorer(pair.first.images, pair.second.images).q, known
        assert maps is not None
        where = index.cpu()
        kept = [
            torch.where((pair.generated == s).cpu().view(-1, 1, 1, 1), maps[1][where], maps[0][where]).to(
                batch[1].device
            )
            for s in (0, 1)
        ]
        flips = (pair.first.flips, pair.second.flips)
        return scorer.from_maps(kept[0], kept[1], pair.first.boxes, pair.second.boxes, flips).q, known

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Two views of each picture, their weights, the loss."""
        index, images, generated, has_view = batch
        u = augment.uniforms(self.seed, self.current_epoch, index.tolist())
        pair = augment.make_pairs(images, generated, has_view, u, self.views, size=self.size)
        weight, logged = None, dict[str, Any]()
        if self.qd.mode != "none":
            q, known = self.quality(batch, pair)
            weight = pair_weights(q, self.qd.gamma, self.qd.scope, known)
            logged = {"quality": q.mean(), "effective share": effective_share(weight)}
        first, second = (normalized(v.images, self.statistics) for v in (pair.first, pair.second))
        loss: Tensor = self.network(first, second, weight)
        every = getattr(self.trainer, "log_every_n_steps", 1) if self._trainer is not None else 1
        if self._trainer is not None and (self.global_step + 1) % every == 0:
            self.log_dict({"loss": loss.detach(), **logged})
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """An update of the weights, then of the momentum copy."""
        super().optimizer_step(*args, **kwargs)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        self.network.follow(self.global_step / total)

    def configure_optimizers(self) -> Any:
        """SGD, AdamW or LARS with warm-up and a cosine by steps; SimSiam's predictor keeps its rate."""
        s = self.settings
        groups = self.network.groups(s.weight_decay)
        optimizer: torch.optim.Optimizer
        if s.name == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=s.lr)
        elif s.name == "lars":
            from timm.optim import Lars  # type: ignore[attr-defined]  # not in its __all__

            optimizer = Lars(groups, lr=s.lr, momentum=s.momentum)
        else:
            optimizer = torch.optim.SGD(groups, lr=s.lr, momentum=s.momentum)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        epochs = self.trainer.max_epochs or 1
        warm = round(s.warm_up * total / epochs) if epochs > 0 else 0

        def moving(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return (math.cos(math.pi * (step - warm) / max(1, total - warm)) + 1) / 2

        rules = [(lambda step: 1.0) if group["fixed"] else moving for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@torch.no_grad()
def extract(backbone: nn.Module, images: Tensor, statistics: Statistics, batch_size: int = 256) -> Tensor:
    """Features of uint8 images without augmentation, on the CPU. Shapes: (N, 3, S, S) -> (N, D) float32."""
    device = next(backbone.parameters()).device
    with evaluating(backbone):
        parts = [
            backbone(normalized(part.to(device), statistics)).float().cpu() for part in torch.split(images, batch_size)
        ]
    return torch.cat(parts)


class OnlineKNN(pl.Callback):
    """Reads the accuracy of nearest neighbors every few epochs, and logs it as knn_top1.

    Args:
        bank: labeled training images, uint8 (N, 3, S, S).
        bank_labels: their classes.
        test: labeled test images.
        test_labels: their classes.
        every: epochs between two readings.
        k: neighbors.
    """

    def __init__(
        self, bank: Tensor, bank_labels: Tensor, test: Tensor, test_labels: Tensor, *, every: int = 1, k: int = 20
    ) -> None:
        self.bank, self.bank_labels, self.test, self.test_labels = bank, bank_labels, test, test_labels
        self.every, self.k = every, k

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read and log."""
        if (trainer.current_epoch + 1) % self.every == 0:
            assert isinstance(pl_module, GenViewModule)
            backbone, statistics = pl_module.network.backbone, pl_module.statistics
            bank, test = (extract(backbone, x, statistics) for x in (self.bank, self.test))
            k = min(self.k, len(bank))
            found = knn_accuracy(test, self.test_labels, bank, self.bank_labels, k=k, top=(1,))
            pl_module.log("knn_top1", found[1])


@dataclass(frozen=True)
class Prepared:
    """What a pretraining reads before it begins.

    Attributes:
        dataset: pictures with their views.
        data: the data.
        static: quality of each picture's pair, or None.
        scorer: for online and cached, or None.
        maps: kept maps, or None.
    """

    dataset: PairedViewDataset
    data: PictureData
    static: Tensor | None
    scorer: QualityScorer | None
    maps: tuple[Tensor, Tensor] | None


def foreground_file(path: str) -> Path:
    """The file of a foreground model, from its path or the folder of its command."""
    found = Path(path).expanduser()
    return found / FOREGROUND if found.is_dir() else found


def joined(first: Pictures, second: Pictures) -> Pictures:
    """Pictures of two data sets as one, without labels; keys of the second begin with ``external/``."""
    n = len(first)
    keys = first.keys + tuple(f"external/{key}" for key in second.keys)
    side = first.side if first.side == second.side else 0
    return Pictures(keys, None, lambda i: first.read(i) if i < n else second.read(i - n), side=side)


def prepare(
    settings: TrainSettings, source: PictureData | None = None, views: GeneratedViews | None = None
) -> Prepared:
    """Read data, views and scorer.

    Raises:
        UserError: any of them cannot be used.
    """
    found = source or data.load(settings.data)
    views = views or views_of(settings)
    pictures = found.train
    if settings.external is not None:
        pictures = joined(pictures, data.load(settings.external, option="--external").train)
    size = settings.size if settings.size < 128 else round(settings.size * 8 / 7)
    number = sum(len(files) for files in views.files.values()) if views is not None else 0
    fits = (len(pictures) + number) * 3 * size**2 <= settings.resident_gb * 1e9
    dataset = PairedViewDataset(pictures, views, size, resident=fits)
    mode, static, scorer, maps = settings.qd.mode, None, None, None
    if mode == "static":
        assert views is not None
        static = torch.tensor([views.quality.get(key, math.nan) for key in pictures.keys])
    elif mode != "none":
        assert settings.qd.encoder is not None
        assert settings.qd.foreground is not None
        device = choose_device(settings.device)
        encoder = build_encoder(settings.qd.encoder, weights=settings.qd.weights, device=device, option="--qd.encoder")
        model = ForegroundModel.load(foreground_file(settings.qd.foreground), encoder=encoder.name)
        scorer = QualityScorer(encoder, model, mode)
        if mode == "cached":
            maps = kept_maps(scorer, dataset)
    return Prepared(dataset, found, static, scorer, maps)


def views_of(settings: TrainSettings) -> GeneratedViews | None:
    """The generated views that a training takes; None where it takes none.

    Raises:
        UserError: they cannot be read, or have no scores where static ones are asked for.
    """
    if settings.views is None:
        return None
    views = data.read_manifest(settings.views)
    if settings.qd.mode == "static" and not views.quality:
        raise UserError(f"--qd.mode static: {views.path} has no scores; run genview merge with --quality_encoder")
    return views


def kept_maps(scorer: QualityScorer, dataset: PairedViewDataset, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Maps of all pictures and of their first views, for ``cached``. Shapes: -> (N, K, 14, 14) twice, float16."""
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in torch.split(torch.arange(len(dataset)), batch_size):
        items = [dataset[i] for i in rows.tolist()]
        parts.append(tuple(scorer.maps(torch.stack([item[k] for item in items]) / 255) for k in (1, 2)))  # type: ignore[arg-type,misc]
    return torch.cat([a for a, _ in parts]).cpu(), torch.cat([b for _, b in parts]).cpu()


def pretrain(
    settings: TrainSettings,
    prepared: Prepared,
    *,
    run: Run | None = None,
    stage: str = "",
    statistics: Statistics = IMAGENET,
    quiet: bool = False,
) -> nn.Module:
    """One pretraining from its settings; resumed where the run was interrupted. Returns the backbone, on the CPU.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite.
        UserError: the backbone does not take such pictures.
    """
    seed_everything(settings.seed)
    backbone = build_backbone(settings.backbone)
    network = SelfSupervised(
        backbone, settings.method, settings.heads, width_of(backbone, settings.size), seed=settings.seed
    )
    module = GenViewModule(
        network,
        settings.optimizer,
        views=settings.view,
        size=settings.size,
        qd=settings.qd,
        scorer=prepared.scorer,
        static=prepared.static,
        maps=prepared.maps,
        statistics=statistics,
        seed=settings.seed,
    )
    resident = prepared.dataset.images is not None
    loader = KeyedLoader(
        prepared.dataset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_workers=0 if resident else settings.workers,
    )
    callbacks: list[pl.Callback] = []
    if settings.knn_every:
        callbacks.append(_online(settings, prepared))
    fit(module, loader, settings, run, seed=settings.seed, callbacks=callbacks, stage=stage, quiet=quiet)
    return backbone.eval().cpu()


def _online(settings: TrainSettings, prepared: Prepared, most: int = 20000) -> OnlineKNN:
    train, test = labeled(prepared.data)
    step = max(1, len(train) // most)
    bank = train.part(range(0, len(train), step))
    assert bank.labels is not None
    assert test.labels is not None
    images = [data.pixels_of(part, settings.size) for part in (bank, test)]
    return OnlineKNN(images[0], bank.labels, images[1], test.labels, every=settings.knn_every)


def labeled(found: PictureData) -> tuple[Pictures, Pictures]:
    """The labeled training and test pictures.

    Raises:
        UserError: the data have no labels or no test part.
    """
    if found.test is None or found.train.labels is None or found.test.labels is None:
        raise UserError(
            "an evaluation needs labels and a test part: imagefolder:DIR with train/ and val/, npz:FILE or cifar"
        )
    return found.train, found.test


def train_classifier(
    backbone: nn.Module,
    images: Tensor,
    labels: Tensor,
    classes: int,
    settings: ProbeSettings,
    statistics: Statistics,
    *,
    size: int,
    finetune: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> nn.Module:
    """A linear layer on a backbone by augmented epochs: frozen (the usual probe), or fine-tuned with it. Returns both.

    Crops and mirrors are as in ``augment`` without changes of color; SGD with momentum 0.9, no weight decay, cosine by steps.
    Frozen, the backbone stays in evaluation mode.

    Args:
        backbone: the backbone; fine-tuning changes it.
        images: uint8 (N, 3, S, S).
        labels: their classes.
        classes: number of classes.
        settings: settings of the probe.
        statistics: mean and deviation of the pretraining.
        size: side of a crop.
        finetune: whether the backbone learns as well, at ``backbone_lr`` times the rate.
        seed: seed of classifier, order and crops.
        device: where to compute.
    """
    with keyed(seed, 7):
        head = nn.Linear(width_of(backbone, size), classes)
    nn.init.normal_(head.weight, std=0.01, generator=generator(seed, 8))
    nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head).to(device)
    batch = min(settings.batch_size, len(images))
    rate = settings.lr * batch / 256
    groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr": rate}]
    if finetune:
        groups.append({"params": list(backbone.parameters()), "lr": rate * settings.backbone_lr})
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    steps = settings.epochs * max(1, len(images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (math.cos(math.pi * min(1, s / steps)) + 1) / 2)
    least = settings.least_area or (0.08 if size >= 128 else 0.5)
    crops = ViewSettings(least_area=least, jitter_share=0, gray=0, blur=0, flip=settings.flip)
    backbone.train(finetune)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), generator=generator(seed, epoch))
        for index in order[: len(images) // batch * batch].view(-1, batch):
            u = augment.uniforms(seed, epoch, index.tolist(), slots=1)[0]
            x = normalized(augment.augment(images[index].to(device), u, crops, size=size).images, statistics)
            with torch.set_grad_enabled(finetune):
                features = backbone(x)
            loss = F.cross_entropy(head(features), labels[index].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, statistics: Statistics, batch_size: int = 256) -> float:
    """Right answers in percent."""
    device = next(model.parameters()).device
    model.eval()
    right = [
        (model(normalized(x.to(device), statistics)).argmax(dim=1).cpu() == y).sum()
        for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
    ]
    return 100 * float(torch.stack(right).sum()) / len(labels)


def semi_supervised(
    backbone: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: int,
    share: float,
    settings: ProbeSettings,
    statistics: Statistics,
    *,
    size: int,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[float, list[int]]:
    """Fine-tune a copy of the whole network on a share of the labels; accuracy in percent and the subset that was used."""
    import copy

    chosen = few_labels(train[1], share)
    model = train_classifier(
        copy.deepcopy(backbone),
        train[0][chosen],
        train[1][chosen],
        classes,
        settings,
        statistics,
        size=size,
        finetune=True,
        seed=seed,
        device=device,
    )
    return top1(model, *test, statistics), chosen
