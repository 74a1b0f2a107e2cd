"""The glue to Lightning: every method in one loop, one backward pass per step, and the checkpoint chosen without labels."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from freespace_uda import objectives
from freespace_uda.alignment import SelectiveAlignment
from freespace_uda.config import ALIGNED, Method, RunSettings
from freespace_uda.guidance import token_loss
from freespace_uda.items import Readable, SceneItems, to_network
from freespace_uda.models import adapt_statistics, build_net
from freespace_uda.network import FreespaceNet, Outputs
from freespace_uda.normal_cache import NormalCache
from freespace_uda.selection import Signals, better, mean_signals, signals
from tenfold import UserError
from tenfold.devices import choose_device, seed_everything
from tenfold.loading import KeyedLoader
from tenfold.modules import evaluating
from tenfold.runs import Run
from tenfold.training import fit

Watch = Callable[[FreespaceNet, int, Mapping[str, float]], None]
"""Sees the averaged network at each candidate for the choice, the step, and the health of that step; for reports alone."""
Batch = Mapping[str, Mapping[str, Tensor]]


class AdaptTask(pl.LightningModule):
    """One step: a batched pass over both domains, the losses of the method, one backward pass, both optimizers.

    Averaged weights, the chosen ones, and all counters are part of the state, so that a resumed run repeats itself.

    Args:
        net: the network.
        settings: settings.
        method: the method.
        steps: number of steps, by which rates decay and alignment begins.
        prior: share of road in the source's labels.
        watched: batches of unlabeled target pictures, (rgb, normals, valid), that the choice looks at.
        watch: called with the averaged network at each candidate.

    Example:
        >>> from freespace_uda.config import RunSettings
        >>> net = FreespaceNet("freespace:tiny", width=8)
        >>> task = AdaptTask(net, RunSettings(data="roads-flat"), "source-only", steps=10, prior=0.3, watched=[])
        >>> task.net is net
        True
    """

    updates: Tensor
    best: Tensor
    seen: Tensor

    def __init__(
        self,
        net: FreespaceNet,
        settings: RunSettings,
        method: Method,
        steps: int,
        prior: float,
        watched: list[tuple[Tensor, ...]],
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.average = copy.deepcopy(net).requires_grad_(False).eval()
        self.chosen = copy.deepcopy(net).requires_grad_(False).eval()
        self.settings, self.method, self.steps, self.prior = settings, method, steps, prior
        self.watched, self.watch = watched, watch
        self.every = settings.validate_every or max(1, steps // 10)
        self.discriminators = nn.ModuleDict()
        s, channels = settings, net.feature_channels
        if method in ALIGNED:
            a = s.align
            self.discriminators["align"] = SelectiveAlignment(channels, a.mask_mode, a.tau, a.min_pixels, a.hidden)
        elif method in {"advent", "adaptsegnet"}:
            self.discriminators["map"] = objectives.MapDiscriminator(s.general.width)
        elif method == "fada":
            self.discriminators["class"] = objectives.ClassDiscriminator(sum(channels.values()), s.align.hidden or 128)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("best", torch.full((4,), float("nan"), dtype=torch.float64))
        self.register_buffer("seen", torch.full((3,), float("nan"), dtype=torch.float64))

    @property
    def chosen_step(self) -> int:
        """The step whose averaged weights were chosen."""
        return int(self.best[3])

    @override
    def train(self, mode: bool = True) -> "AdaptTask":
        super().train(mode)
        self.average.eval()
        self.chosen.eval()
        return self

    def weight(self, step: int) -> float:
        """Weight of what is learned from the target at a step: the method's own, 0 at first, then growing."""
        s, g = self.settings, self.settings.general
        full = {
            "minent": g.minent,
            "advent": g.advent,
            "adaptsegnet": g.adaptsegnet,
            "fada": g.fada,
            "self-training": g.self_training,
            "ccg-sfa": s.align.weight,
            "ccg-sfa-ema": s.align.weight,
        }.get(self.method, 0.0)
        begin, over = s.align.start * self.steps, max(1.0, s.align.ramp * self.steps)
        return full * min(1.0, max(0.0, (step - begin) / over))

    @override
    def training_step(self, batch: Batch, number: int) -> None:
        step = int(self.updates)
        source = batch["source"]
        weight = self.weight(step)
        candidate = (step + 1) % self.every == 0 or step + 1 == self.steps
        logged = candidate or (step + 1) % self.settings.log_every == 0
        rgb, normals, valid = (source[k] for k in ("rgb", "normals", "valid"))
        count = len(rgb)
        if weight:
            target = batch["target"]
            rgb, normals, valid = (torch.cat([source[k], target[k]]) for k in ("rgb", "normals", "valid"))
        s = self.settings.streams
        out: Outputs = self.net(None if s == "normals" else rgb, None if s == "rgb" else normals, valid)
        labels = source["labels"]
        terms: dict[str, Tensor] = {"segmentation": objectives.supervised(out.fused[:count], labels)}
        total = terms["segmentation"] + self._beside(out, count, labels, terms)
        health: dict[str, Tensor] = {}
        if weight:
            extra, health = self._from_target(out, count, labels, batch, weight, step, logged)
            total = total + extra
        optimizers = self.optimizers()
        both = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer, rate in zip(both, self._rates(step), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.zero_grad()
        self.manual_backward(total)
        if self.settings.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.settings.optimizer.clip_norm)
        for optimizer in both if weight else both[:1]:
            optimizer.step()
        self._average(step)
        self.updates += 1
        self.log_dict({**{k: v.detach() for k, v in terms.items()}, **health, "loss": total.detach()})
        if candidate:
            self._consider(step + 1, {name: float(value) for name, value in health.items()})
        if not bool(
            self.best.isnan().any()
        ):  # those of the last candidate in every row, so that a resumed run has them too
            names = ("target agreement", "target entropy", "target road")
            self.log_dict({**dict(zip(names, self.seen.tolist(), strict=True)), "chosen step": float(self.best[3])})

    def _beside(self, out: Outputs, count: int, labels: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """Losses of the single-modality heads and of the tokens."""
        total = torch.zeros((), device=labels.device)
        if self.settings.streams != "both":
            return total
        for name, logits in (("rgb head", out.rgb), ("normal head", out.normal)):
            assert logits is not None
            terms[name] = objectives.supervised(logits[:count], labels)
            total = total + self.settings.aux * terms[name]
        if out.attention and self.settings.token and self.settings.tokens >= 2:
            height, width = out.attention["rgb"].shape[-2:]
            known = nn.functional.adaptive_avg_pool2d((labels != 255).float().unsqueeze(1), (height, width))
            road = nn.functional.adaptive_avg_pool2d(
                (labels == 1).float().unsqueeze(1), (height, width)
            ) / known.clamp_min(1e-6)
            pairs = [token_loss(attention[:count], road, known) for attention in out.attention.values()]
            terms["tokens"] = torch.stack(pairs).mean()
            total = total + self.settings.token * terms["tokens"]
        return total

    def _from_target(
        self, out: Outputs, count: int, labels: Tensor, batch: Batch, weight: float, step: int, logged: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the method learns from the target, with the discriminators' own losses, and its health."""
        g, health = self.settings.general, {"weight": torch.tensor(weight)}
        if self.method == "minent":
            spread = objectives.entropy(out.fused[count:]).mean()
            return weight * spread, {**health, "target entropy": spread.detach()}
        if self.method == "self-training":
            loss = self._taught(out, count, batch)
            return weight * loss, {**health, "pseudo-labels": loss.detach()}
        if self.method in {"advent", "adaptsegnet"}:
            maps = objectives.information(out.fused)
            if self.method == "adaptsegnet":
                maps = objectives.probabilities(out.fused)
            pair = objectives.output_alignment(self.discriminators["map"], maps[:count], maps[count:])
        elif self.method == "fada":
            features = torch.cat(list(out.features.values()), 1)
            size = features.shape[-2:]
            logits = nn.functional.interpolate(out.fused.detach(), size, mode="bilinear", align_corners=False)
            pair = objectives.class_alignment(
                self.discriminators["class"], features[:count], features[count:], logits[:count], logits[count:],
                g.temperature, g.clip,
            )  # fmt: skip
        else:
            return self._aligned(out, count, labels, batch, weight, health, logged)
        health |= {"adversarial": pair.adversarial.detach(), "discriminator accuracy": pair.accuracy}
        return weight * pair.adversarial + pair.discriminator, health

    def _taught(self, out: Outputs, count: int, batch: Batch) -> Tensor:
        target = batch["target"]
        with torch.no_grad():
            teacher = self.average(target["rgb"], target["normals"], target["valid"]).fused
        return objectives.pseudo_label_loss(out.fused[count:], teacher, self.settings.general.threshold)

    def _aligned(
        self,
        out: Outputs,
        count: int,
        labels: Tensor,
        batch: Batch,
        weight: float,
        health: dict[str, Tensor],
        logged: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        align = self.discriminators["align"]
        assert isinstance(align, SelectiveAlignment)
        source = {name: f[:count] for name, f in out.features.items()}
        target = {name: f[count:] for name, f in out.features.items()}
        size = next(iter(source.values())).shape[-2:]
        of_source = align.source_mask(labels, (size[0], size[1]))
        heads = {"fused": out.fused, "rgb": out.rgb, "normal": out.normal}
        there = {k: v.detach()[count:] for k, v in heads.items() if v is not None}
        masks = align.target_masks(there, (size[0], size[1]), of_source)
        losses = align(source, target, of_source, masks)
        total = weight * losses.adversarial + losses.discriminator
        health = {**health, "adversarial": losses.adversarial.detach(), "discriminator": losses.discriminator.detach()}
        health |= {f"mask {n}": v for n, v in losses.share.items()}
        if logged:
            assert out.rgb is not None
            assert out.normal is not None
            health |= {f"accuracy {n}": v for n, v in losses.accuracy.items() if bool(torch.isfinite(v))}
            health["agreement"] = ((out.rgb[count:] > 0) == (out.normal[count:] > 0)).float().mean()
            here = {k: v.detach()[:count] for k, v in heads.items() if v is not None}
            by_rule = align.target_masks(here, (size[0], size[1]), of_source)
            for name, mask in by_rule.items():
                health[f"precision on source {name}"] = (mask * of_source).sum() / mask.sum().clamp_min(1)
            if bool(losses.adversarial > 0):
                health["gradient ratio"] = self._ratio(out, count, weight * losses.adversarial, labels)
        if self.method == "ccg-sfa-ema":
            taught = self._taught(out, count, batch)
            share = weight / self.settings.align.weight if self.settings.align.weight else 1.0
            total = total + share * self.settings.general.self_training * taught
            health["pseudo-labels"] = taught.detach()
        return total, health

    def _ratio(self, out: Outputs, count: int, adversarial: Tensor, labels: Tensor) -> Tensor:
        """Norm of the adversarial gradient over that of the supervised one, at the maps that are aligned."""
        features = list(out.features.values())
        supervised = objectives.supervised(out.fused[:count], labels)
        norms = [
            torch.stack([g.norm() for g in torch.autograd.grad(loss, features, retain_graph=True)]).norm()
            for loss in (adversarial, supervised)
        ]
        return norms[0] / norms[1].clamp_min(1e-12)

    def _rates(self, step: int) -> list[float]:
        """Learning rates of the network and of the discriminators."""
        o = self.settings.optimizer
        rise = o.warm_up * self.steps
        shape = (step + 1) / (rise + 1) if step < rise else (1 - step / self.steps) ** o.power
        return [o.lr * shape, o.discriminator * shape][: 1 + bool(len(self.discriminators))]

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.settings.optimizer.ema, (1 + step) / (10 + step))
        for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)
        for held, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
            held.copy_(buffer)

    @torch.no_grad()
    def _consider(self, step: int, health: Mapping[str, float]) -> None:
        """Look at the averaged network without labels, and keep it where it beats the best so far."""
        device = self.updates.device
        batches = [tuple(part.to(device) for part in batch) for batch in self.watched]
        if self.method == "adabn" and batches:
            adapt_statistics(self.average, batches)
        found: list[Signals] = []
        with evaluating(self.average):
            for rgb, normals, valid in batches:
                out = self.average(rgb, normals, valid)
                found.append(signals(out.fused, out.rgb, out.normal))
        seen = mean_signals(found, [len(batch[0]) for batch in batches]) if found else Signals(1.0, 0.0, self.prior)
        self.seen.copy_(torch.tensor(seen, dtype=torch.float64))
        before = None if bool(self.best.isnan().any()) else Signals(*self.best[:3].tolist())
        if better(seen, before, self.prior, self.settings.select_by):
            self.best.copy_(torch.tensor([*seen, float(step)], dtype=torch.float64))
            self.chosen.load_state_dict(self.average.state_dict())
        if self.watch is not None:
            self.watch(self.average, step, health)

    @override
    def configure_optimizers(self) -> Any:
        o = self.settings.optimizer
        encoders = list(self.net.encoders.parameters())
        own = {id(p) for p in encoders}
        rest = [p for p in self.net.parameters() if id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": encoders, "factor": 1.0}, {"params": rest, "factor": o.head}]
        network: torch.optim.Optimizer
        if o.kind == "sgd":
            network = torch.optim.SGD(groups, o.lr, momentum=0.9, weight_decay=o.weight_decay)
        else:
            network = torch.optim.AdamW(groups, o.lr, weight_decay=o.weight_decay)
        if not len(self.discriminators):
            return network
        return [network, torch.optim.Adam(self.discriminators.parameters(), o.discriminator, betas=(0.9, 0.99))]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network and how it was chosen.

    Attributes:
        net: the chosen averaged weights, in evaluation mode.
        step: the step they are of.
        signals: what they look like on the target, without labels.
        plausible: whether they call about as much road as the source's labels.
        prior: share of road in the source's labels.
    """

    net: FreespaceNet
    step: int
    signals: Signals
    plausible: bool
    prior: float


def road_share(scenes: Readable, most: int = 64) -> float:
    """Share of the labeled pixels that is road, over some scenes.

    Raises:
        UserError: no road in any of them, or nothing else.
    """
    road = known = 0
    for index in range(0, len(scenes), max(1, len(scenes) // most)):
        label = scenes.label(index)
        road += int((label == 1).sum())
        known += int((label != 255).sum())
    if not road:
        raise UserError(f"{scenes.source}: no label has a pixel of road: the palette or the road ids are others")
    if road == known:
        raise UserError(
            f"{scenes.source}: every labeled pixel is road, so there is nothing to tell it from: what is not road needs a"
            " label of its own (0, not 255, which counts nowhere)"
        )
    return road / known


def watched_batches(scenes: Readable, settings: RunSettings) -> list[tuple[Tensor, ...]]:
    """Batches of target pictures, evenly spaced, that the choice of a checkpoint looks at."""
    count = min(settings.watched, len(scenes))
    rows = [round(i * (len(scenes) - 1) / max(1, count - 1)) for i in range(count)]
    parts = [to_network(scenes.item(i), settings) for i in rows]
    size = settings.batch_size
    return [
        tuple(torch.stack(column) for column in zip(*parts[i : i + size], strict=True))
        for i in range(0, len(parts), size)
    ]


def train(
    source: Readable,
    target: Readable,
    settings: RunSettings,
    method: Method,
    seed: int,
    run: Run | None = None,
    *,
    watch: Watch | None = None,
    caches: tuple[NormalCache | None, NormalCache | None] = (None, None),
    quiet: bool = False,
) -> Trained:
    """Train one method.

    Args:
        source: labeled scenes.
        target: scenes of which no label is read, but by ``oracle``.
        settings: settings.
        method: the method.
        seed: seed of weights, order and augmentation.
        run: run folder; None writes nothing.
        watch: sees the averaged network at each candidate, for reports.
        caches: normals of source and target that were computed before.
        quiet: no progress.

    Raises:
        UserError: too few scenes for a batch, no road in the labels, or what ``fit`` refuses.
    """
    seed_everything(seed, choose_device(settings.device))
    learned = target if method == "oracle" else source
    net = build_net(settings, method, seed)
    size = settings.batch_size
    if len(learned) < size * settings.devices or len(target) < size:
        each = f" on each of {settings.devices} devices" if settings.devices > 1 else ""
        scenes = min(len(learned), len(target))
        raise UserError(f"{scenes} scenes do not fill a batch of {size}{each}: lower --batch_size")
    per_epoch, epochs = len(learned) // (size * settings.devices), settings.epochs or 1
    total = per_epoch * epochs
    if settings.steps is not None and (settings.epochs is None or settings.steps < total):
        per_epoch = total = settings.steps  # drawn anew pass after pass, in one epoch of Lightning
        epochs = 1
    batches = per_epoch * settings.devices
    prior = road_share(learned)
    of_learned = caches[1] if method == "oracle" else caches[0]
    labeled = SceneItems(learned, settings, settings.augment, labels=True, faults=True, cache=of_learned)
    loaders = {
        "source": KeyedLoader(labeled, batch_size=size, seed=seed + 1, batches=batches, num_workers=settings.workers)
    }
    if method not in {"source-only", "adabn", "ccg", "oracle"}:
        unlabeled = SceneItems(target, settings, settings.augment, labels=False, faults=False, cache=caches[1])
        loaders["target"] = KeyedLoader(
            unlabeled, batch_size=size, seed=seed + 2, batches=batches, num_workers=settings.workers
        )
    task = AdaptTask(net, settings, method, total, prior, watched_batches(target, settings), watch)
    changes: dict[str, Any] = {"steps": None, "epochs": epochs, "validate_every": 0}
    if settings.devices > 1 and settings.strategy in {"auto", "ddp"}:  # heads and discriminators rest in some steps
        changes["strategy"] = "ddp_find_unused_parameters_true"
    config = dataclasses.replace(settings, **changes)
    with warnings.catch_warnings():  # the averaged and the chosen network rest on purpose
        warnings.filterwarnings("ignore", message="Found .* in eval mode")
        fit(task, loaders, config, run, seed=seed + 3, quiet=quiet)
    found = Signals(*task.best[:3].tolist())
    return Trained(task.chosen.cpu().eval(), task.chosen_step, found, found.plausible(prior), prior)
