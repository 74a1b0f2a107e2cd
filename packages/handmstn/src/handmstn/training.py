"""The glue to Lightning: stage A trains the aligner, stage B identities while it rests, a joint stage moves both."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from handmstn.aligner import MultiSpatialTransformer, near, quartered, scrambled, warped
from handmstn.config import Optimizer, RunSettings
from handmstn.familiar import Familiar
from handmstn.losses import IdentityLoss, point_loss, sum_weighted, visibility_loss
from handmstn.models import _batches, build_aligner, build_model, given, parts_of
from handmstn.parts import PartSpec
from handmstn.recognizer import HandMSTN, fuse
from handmstn.records import Hands
from handmstn.sampling import people_and_views
from handmstn.warping import compose, fit_similarity
from tenfold import UserError
from tenfold.devices import choose_device, seed_everything
from tenfold.loading import KeyedLoader
from tenfold.modules import evaluating
from tenfold.runs import Run
from tenfold.training import fit


class HandItems(Dataset[Any]):
    """Pictures with labels, points and visibility, and light augmentation: brightness, contrast, and parts that lie a bit off.

    There is no flip: a mirrored hand is another hand.
    """

    def __init__(
        self,
        hands: Hands,
        labels: Tensor,
        points: Tensor,
        visibility: Tensor,
        parts: Sequence[PartSpec] = (),
        jitter: float = 0.0,
    ) -> None:
        assert hands.images is not None
        self.images, self.labels, self.points, self.visibility = hands.images, labels, points, visibility
        self.counts, self.jitter = [part.count for part in parts], jitter

    def __len__(self) -> int:
        return len(self.images)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index].float() / 255
        gain, lift = 0.8 + 0.4 * torch.rand(()), 0.2 * (torch.rand(()) - 0.5)
        points = self.points[index]
        if self.jitter:
            points = torch.cat([_moved(part, self.jitter) for part in torch.split(points, self.counts)])
        return {
            "images": ((image - 0.5) * gain + 0.5 + lift).clamp(0, 1),
            "labels": self.labels[index],
            "points": points,
            "visibility": self.visibility[index],
        }


def _moved(points: Tensor, deviation: float) -> Tensor:
    """A part's points (K, 2) shifted, turned and scaled together at random."""
    center = points.mean(0)
    away = points - center
    extent = away.square().sum(1).mean().sqrt()
    turn, size, shift = deviation * torch.randn(()), 1 + deviation * torch.randn(()), deviation * torch.randn(2)
    turned = torch.stack(
        [away[:, 0] * turn.cos() - away[:, 1] * turn.sin(), away[:, 0] * turn.sin() + away[:, 1] * turn.cos()], 1
    )
    return center + size * turned + extent * shift


class AlignTask(pl.LightningModule):
    """Stage A: points (or self-made warps), bending energy, visibility, and what a wrong side and no hand look like.

    Example:
        >>> from handmstn import preset
        >>> from handmstn.config import RunSettings
        >>> aligner = MultiSpatialTransformer(preset("eeprnet", 8), "hand:loc", levels=1, loc_size=64)
        >>> AlignTask(aligner, RunSettings(data="hands"), warps=False).aligner is aligner
        True
    """

    def __init__(self, aligner: MultiSpatialTransformer, settings: RunSettings, warps: bool) -> None:
        super().__init__()
        self.aligner = aligner
        self.settings = settings
        self.warps = warps

    @override
    def training_step(self, batch: Mapping[str, Tensor], number: int) -> Tensor:
        config, images = self.settings.aligner, batch["images"]
        points, visibility = batch["points"], batch["visibility"]
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        count = len(images)
        if self.warps:
            images, moved = warped(images, generator)
            points = compose(moved, self.aligner.pose.expand(count, -1, -1))
            visibility = torch.full_like(visibility, float("nan"))
        elif config.turns == "any":
            images, moved = warped(images, generator, 0.15, 0.1)
            points = compose(moved, points)
        elif config.turns == "quarter":
            images, points = quartered(images, points, generator)
        empty = round(config.scrambled * count)
        flipped = count // 8
        images = images.clone()
        if empty:
            images[:empty] = scrambled(images[:empty], generator)
            visibility = visibility.clone()
            visibility[:empty] = 0.0
            if self.warps:
                visibility[empty:] = 1.0
        images[empty : empty + flipped] = images[empty : empty + flipped].flip(-1)
        kept = slice(empty + flipped, None)
        found = self.aligner(images, self._frames(points, kept, generator))
        known = torch.isfinite(points[kept]).all(-1).float()
        parts = self.aligner.parts
        shares = torch.nan_to_num(visibility[kept], nan=1.0)
        spread = torch.cat([shares[:, i : i + 1].expand(-1, p.count) for i, p in enumerate(parts)], 1)
        counted = known * (0.2 + 0.8 * spread)  # a covered part still lies somewhere
        terms: dict[str, Tensor] = {}
        if config.point:
            terms["point"] = point_loss(found.points[kept], points[kept], counted, config.distance)
            if self.aligner.levels == 2:
                terms["point0"] = point_loss(found.first[kept], points[kept], counted, config.distance)
        if config.bending:
            terms["bending"] = self.aligner.grid.bending_energy(found.points[kept]).mean()
        if config.visibility:
            mask = torch.ones(count, 1, device=images.device)
            mask[empty : empty + flipped] = float("nan")
            terms["visibility"] = visibility_loss(found.visibility_logits, visibility * mask)
            side = torch.ones(count, device=images.device)
            side[empty : empty + flipped] = 0.0
            terms["side"] = visibility_loss(found.side_logits[empty:], side[empty:])
        weights = {"point": config.point, "point0": config.point, "bending": config.bending}
        weights |= {"visibility": config.visibility, "side": config.visibility}
        total = sum_weighted(terms, weights)
        self.log_dict({**{k: v.detach() for k, v in terms.items()}, "loss": total.detach()})
        outside = self.aligner.grid.outside(self.aligner.grid(found.points.detach())).mean()
        self.log("outside", outside)
        return total

    def _frames(self, points: Tensor, kept: slice, generator: torch.Generator) -> Tensor | None:
        """Frames for level 1: near the true one, and, of a share that grows to a half, level 0's own (NaN)."""
        if self.aligner.levels == 1:
            return None
        frames = torch.full((len(points), 2, 3), float("nan"), device=points.device)
        frames[kept] = near(
            fit_similarity(self.aligner.pose, points[kept]), generator
        )  # NaN where points are not known
        own = torch.rand(len(points), generator=generator) < min(0.5, self.global_step / self.settings.aligner.steps)
        frames[own.to(points.device)] = float("nan")
        return frames

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.aligner.parameters(), self.settings.aligner.lr)
        steps = self.settings.aligner.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Course(steps, 0.05))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclasses.dataclass(frozen=True)
class _Course:
    """A linear rise, then half a cosine down to a hundredth."""

    steps: int
    warm_up: float

    def __call__(self, step: int) -> float:
        rise = max(1, round(self.warm_up * self.steps))
        if step < rise:
            return (step + 1) / rise
        share = min(1.0, (step - rise) / max(1, self.steps - rise))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


class IdentityTask(pl.LightningModule):
    """Stage B, with points that are given or were found once; or, joint, with the aligner in the graph.

    Example:
        >>> from handmstn import HandMSTN, IdentityLoss, preset
        >>> from handmstn.config import Optimizer
        >>> model = HandMSTN(preset("eeprnet", 32), palm="hand:cnn4", dim=8)
        >>> losses = IdentityLoss({"identity": 1.0}, 2, part_dim=8, num_parts=1)
        >>> IdentityTask(model, losses, Optimizer(), steps=10, joint=False).model is model
        True
    """

    def __init__(self, model: HandMSTN, losses: IdentityLoss, optimizer: Optimizer, steps: int, joint: bool) -> None:
        super().__init__()
        self.model, self.losses = model, losses
        self.optimizer_settings, self.steps, self.joint = optimizer, steps, joint
        if model.aligner is not None:
            model.aligner.requires_grad_(joint)

    @override
    def train(self, mode: bool = True) -> "IdentityTask":
        """Training mode, but the aligner's batch statistics stay as stage A left them."""
        super().train(mode)
        if self.model.aligner is not None:
            self.model.aligner.eval()
        return self

    @override
    def training_step(self, batch: Mapping[str, Tensor], number: int) -> Tensor:
        images, labels = batch["images"], batch["labels"]
        given_points = None if self.joint else batch["points"]
        found = self.model.locate(images, given_points, None if self.joint else batch["visibility"])
        parts = self.model.describe(self.model.grid.crops(images, self.model.grid(found.points)))
        unit = torch.nn.functional.normalize(parts, dim=2)
        fused = fuse(unit, found.visibility, self.model.weights)
        terms = self.losses(fused, unit, found.visibility, labels)
        if self.joint:
            terms["bending"] = self.model.grid.bending_energy(found.points).mean()
        total = sum_weighted(terms, {**self.losses.weights, "bending": 1e-2})
        palm = self.model.weights[0].detach()
        self.log_dict({**{k: v.detach() for k, v in terms.items()}, "loss": total.detach(), "palm weight": palm})
        return total

    @override
    def configure_optimizers(self) -> Any:
        o = self.optimizer_settings
        nets = list(self.model.nets.parameters())
        ours = {id(p) for p in nets}
        aligner = [] if self.model.aligner is None else list(self.model.aligner.parameters())
        ours |= {id(p) for p in aligner}
        rest = [p for p in self.parameters() if id(p) not in ours]
        groups: list[dict[str, Any]] = [{"params": rest, "lr": o.lr}, {"params": nets, "lr": o.lr * o.backbone}]
        if self.joint and aligner:
            groups.append({"params": aligner, "lr": o.lr * o.aligner})
        optimizer = torch.optim.Adam(groups, o.lr, weight_decay=o.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Course(self.steps, o.warm_up))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _labels(hands: Hands) -> tuple[Tensor, list[str]]:
    found, index = np.unique(hands.classes, return_inverse=True)
    return torch.from_numpy(index.astype(np.int64)), found.tolist()


def _unknown(hands: Hands, points: int, parts: int) -> tuple[Tensor, Tensor]:
    """Points and visibility of the data, or NaN."""
    own = torch.from_numpy(hands.points)
    seen = torch.from_numpy(hands.visibility)
    if own.shape[1] != points:
        own = torch.full((len(hands), points, 2), float("nan"))
    if seen.shape[1] != parts:
        seen = torch.full((len(hands), parts), float("nan"))
    return own, seen


def _as_pointed(points: Tensor, parts: Sequence[PartSpec]) -> Tensor:
    """Visibility 1 of each part whose points are all known, else NaN: who marks a part has seen it.

    Without it, data that has points and no visibility would show the aligner nothing but parts that are not seen.
    """
    known = torch.isfinite(points).all(-1)
    whole = torch.stack([k.all(1) for k in torch.split(known, [part.count for part in parts], 1)], 1)
    return torch.where(whole, 1.0, float("nan"))


def train_aligner(
    hands: Hands, settings: RunSettings, seed: int, run: Run | None = None, *, quiet: bool = False
) -> MultiSpatialTransformer | None:
    """Stage A; None where there is nothing to align.

    Raises:
        UserError: fewer pictures than a batch, or no points and ``--aligner.warps never``.
    """
    aligner = build_aligner(settings, seed)
    config = settings.aligner
    if aligner is None or not config.steps:
        return aligner
    warps = config.warps == "always" or (config.warps == "auto" and not hands.has_points)
    if not warps and not hands.has_points:
        raise UserError(f"{hands.source}: no points to learn from, and --aligner.warps never")
    count = sum(part.count for part in aligner.parts)
    points, visibility = _unknown(hands, count, len(aligner.parts))
    if not warps and hands.points.shape[1] != count:
        raise UserError(f"{hands.source}: points of other parts than --preset {settings.preset} has")
    if not torch.isfinite(visibility).any():
        visibility = _as_pointed(points, aligner.parts)
    labels, _ = _labels(hands)
    size = min(config.batch_size, len(hands))
    coarse = dataclasses.replace(hands, images=_coarse(aligner, hands))
    items = HandItems(coarse, labels, points, visibility)
    loader = KeyedLoader(items, batch_size=size, seed=seed, num_workers=settings.workers)
    task = AlignTask(aligner, settings, warps)
    fit(
        task,
        loader,
        dataclasses.replace(settings, steps=config.steps, epochs=None),
        run,
        seed=seed,
        stage="align",
        quiet=quiet,
    )
    return aligner.eval()


def _coarse(aligner: MultiSpatialTransformer, hands: Hands) -> Tensor:
    """Every picture at the size that the aligner searches; the aligner sees nothing finer."""
    assert hands.images is not None
    with torch.no_grad():
        small = [aligner.coarse(hands.images[rows].float()) for rows in _batches(len(hands), 64)]
    return torch.cat(small).round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Points:
    """An aligner alone, as ``found_points`` takes it."""

    aligner: MultiSpatialTransformer


def found_points(
    model: HandMSTN | Points, hands: Hands, batch_size: int = 64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Points and visibility of every picture, from the aligner or from the data; computed once while the aligner rests."""
    assert hands.images is not None
    if isinstance(model, HandMSTN) and model.aligner is None:
        points = given(model, hands)
        assert points is not None
        _, seen = _unknown(hands, 0, len(model.parts))
        return points, torch.nan_to_num(seen, nan=1.0)
    found, visible = [], []
    assert model.aligner is not None
    with evaluating(model.aligner):
        for rows in _batches(len(hands), batch_size):
            out = model.aligner(hands.images[rows].to(device).float() / 255)
            found.append(out.points.cpu())
            visible.append(out.visibility.cpu())
    return torch.cat(found), torch.cat(visible)


def familiar_of(model: HandMSTN, hands: Hands, batch_size: int = 64) -> Familiar | None:
    """What the training's pictures look like to the aligner; None without one, or where the pictures are too few."""
    assert hands.images is not None
    if model.aligner is None:
        return None
    with evaluating(model.aligner):
        found = [model.aligner(hands.images[rows].float() / 255).features for rows in _batches(len(hands), batch_size)]
    return Familiar.fit(torch.cat(found), torch.from_numpy(np.unique(hands.persons, return_inverse=True)[1]))


def losses_of(settings: RunSettings, classes: int, parts: int) -> IdentityLoss:
    """The losses of stage B."""
    s = settings.losses
    return IdentityLoss(
        s.weights(),
        classes,
        settings.recognizer.dim,
        parts,
        s.kind,
        s.smoothing,
        s.scale,
        s.margin,
        s.triplet_margin,
        s.center_rate,
    )


def train_identities(
    hands: Hands,
    settings: RunSettings,
    seed: int,
    aligner: MultiSpatialTransformer | None,
    run: Run | None = None,
    *,
    quiet: bool = False,
) -> HandMSTN:
    """Stage B, and the joint stage where it is asked for.

    Raises:
        UserError: an identity has fewer pictures than a batch takes, or there are too few identities.
    """
    labels, classes = _labels(hands)
    seed_everything(seed, choose_device(settings.device))
    model = build_model(settings, seed, aligner)
    points, visibility = found_points(model, hands)
    torch.manual_seed(seed)
    losses = losses_of(settings, len(classes), len(model.parts))
    order = people_and_views(hands.classes, settings.people, settings.views, devices=settings.devices)
    items = HandItems(hands, labels, points, visibility, model.parts, settings.recognizer.jitter)
    stages: Sequence[tuple[str, int, bool]] = [
        ("identity", settings.steps or 0, False),
        ("joint", settings.joint_steps, True),
    ]
    for stage, steps, joint in stages:
        if not steps and not (stage == "identity" and settings.epochs):
            continue
        loader = KeyedLoader(items, order=order, seed=seed + 1, num_workers=settings.workers)
        epochs = settings.epochs if stage == "identity" else None
        own = dataclasses.replace(settings, steps=steps or None, epochs=epochs)
        task = IdentityTask(model, losses, settings.optimizer, own.total_steps(loader.batches), joint)
        with warnings.catch_warnings():  # the aligner rests on purpose
            warnings.filterwarnings("ignore", message="Found .* in eval mode")
            fit(task, loader, own, run, seed=seed + 1, stage=stage, quiet=quiet)
    model.requires_grad_(True)
    return model.eval()


def check(hands: Hands, settings: RunSettings) -> None:
    """Check, before anything is computed, what stage B will need of the data.

    Raises:
        UserError: an identity has fewer pictures than a batch takes, or there are too few identities.
    """
    people_and_views(hands.classes, settings.people, settings.views, devices=settings.devices)
    if settings.given_points and settings.preset != "whole":
        wanted = sum(part.count for part in parts_of(settings))
        if hands.points.shape[1] != wanted or not np.isfinite(hands.points).all():
            raise UserError(f"{hands.source}: --given_points needs the points of all parts in every picture")
