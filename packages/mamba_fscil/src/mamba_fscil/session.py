"""One incremental session in plain torch: which rows it sees, at which rate, with which losses; every draw has a key.

Repeated from the same learner with the same seed, a session gives the same bits: order and mixing are functions of
(seed, session, step).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mamba_fscil.config import SessionConfig
from mamba_fscil.head import dot_regression_loss
from mamba_fscil.losses import ClassSensitiveLoss, mean_cosine
from mamba_fscil.projector import Projector
from tenfold.errors import NonFiniteError
from tenfold.randomness import generator

_ROWS = 256
"""Maps that are projected at once where no gradient is needed."""
_EXEMPT = ("A_log", "A_logs", "D", "Ds")
"""Parameters of a scan that weight decay would pull toward another decay."""


@dataclass(frozen=True)
class SessionRows:
    """What one session learns from.

    Attributes:
        maps: (U, c, H, W), each row once.
        labels: (U,).
        repeats: times that each row is in one pass.
    """

    maps: Tensor
    labels: Tensor
    repeats: Tensor

    @classmethod
    def of(
        cls,
        shots: Tensor,
        labels: Tensor,
        means: Tensor,
        mean_labels: Tensor,
        base_classes: int,
        *,
        copies: int = 1,
        base_copies: int = 1,
    ) -> "SessionRows":
        """The new pictures' maps, and the mean map of each earlier class several times.

        Args:
            shots: maps of new classes.
            labels: their classes.
            means: mean maps of earlier classes.
            mean_labels: their classes.
            base_classes: number of base classes, whose labels come first.
            copies: times that the mean of an earlier novel class is there.
            base_copies: times that the mean of a base class is there.

        Source: NC-FSCIL, arXiv 2302.03004, section 5.1, and its code.
        """
        number = torch.where(mean_labels < base_classes, base_copies, copies)
        repeats = torch.cat([torch.ones(len(labels), dtype=torch.int64), number.long()])
        return cls(torch.cat([shots, means.to(shots)]), torch.cat([labels, mean_labels]), repeats)

    def __len__(self) -> int:
        """Rows of one pass."""
        return int(self.repeats.sum())

    def batches(self, size: int, steps: int, seed: int, session: int) -> Iterator[Tensor]:
        """Indices of the rows of each step; a pass is shuffled, and a batch may reach into the next one."""
        whole = torch.repeat_interleave(torch.arange(len(self.labels)), self.repeats)
        waiting, number = whole[:0], 0
        for _ in range(steps):
            while len(waiting) < size:
                order = torch.randperm(len(whole), generator=generator(seed, session, -1, number))
                waiting, number = torch.cat([waiting, whole[order]]), number + 1
            yield waiting[:size]
            waiting = waiting[size:]


def learning_rate(step: int, steps: int, lr: float, *, warm_up: int = 5, cool_down: int = 5) -> float:
    """Rate of the 1-based ``step``: a cosine to a hundredth with a short rise before it and a thousandth after it.

        lr (0.01 + 0.495 (1 + cos(pi i / T'))),   T' = steps - cool_down;   1e-3 lr beyond T'

    Source: Mamba-FSCIL's code, which counts a step before it reads its rate.
    """
    bend = max(1, steps - cool_down)
    if step > bend:
        return lr * 1e-3
    rate = lr * (0.01 + 0.495 * (1 + math.cos(math.pi * step / bend)))
    return rate * (1 - (1 - step / warm_up) * 0.9) if step < warm_up else rate


@dataclass
class Mechanism:
    """How the branch tells base rows from novel ones, over the course of a session.

    Attributes:
        steps: the steps that were looked at.
        cosine: mean over delta, B and C of |cos(mean of base rows, mean of novel rows)|.
        gate_base: root mean square of the gate on base rows.
        gate_novel: the same on novel rows.
    """

    steps: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    gate_base: list[float] = field(default_factory=list)
    gate_novel: list[float] = field(default_factory=list)


@torch.no_grad()
def look(
    projector: Projector, maps: Tensor, labels: Tensor, base_classes: int, frozen: Tensor | None = None
) -> tuple[float, float, float] | None:
    """Mean cosine, root mean square of the gate on base rows, and on novel rows; None for MLPs or where a kind is missing.

    Args:
        projector: the projector.
        maps: its inputs.
        labels: their classes.
        base_classes: number of base classes, whose labels come first.
        frozen: what ``projector.frozen_output`` gave for the maps; None computes it.
    """
    base = labels < base_classes
    if bool(base.all()) or not bool(base.any()):
        return None
    kept = [None] * len(maps) if frozen is None else torch.split(frozen, _ROWS)
    found = [projector(part, own) for part, own in zip(torch.split(maps, _ROWS), kept, strict=False)]
    if found[0].gate is None or found[0].params is None:
        return None
    gate = torch.cat([out.gate for out in found if out.gate is not None])
    cosines = []
    for number in range(3):
        rows = torch.cat([out.params[number] for out in found if out.params is not None])
        cosines.append(float(mean_cosine(rows[None], base[None]).abs()))

    def size(rows: Tensor) -> float:
        return float(rows.square().mean().sqrt())

    return sum(cosines) / 3, size(gate[base]), size(gate[~base])


def parameter_groups(projector: Projector, config: SessionConfig) -> list[dict[str, object]]:
    """Groups for SGD, each with the factor of its rate, ``scale``.

    The whole projector is fine-tuned where it has no incremental branch; else that branch, and the base side at ``base_lr``
    of its rate.
    """
    if projector.inc is None:
        parts: list[tuple[nn.Module, float]] = [(projector, 1.0)]
    else:
        parts = [(projector.inc, 1.0)]
        parts += [(projector.base, config.base_lr), (projector.residual, config.base_lr)] if config.base_lr else []
    groups: list[dict[str, object]] = []
    for module, scale in parts:
        for exempt in (False, True):
            names = [
                p
                for name, p in module.named_parameters()
                if (not config.decay_all and name.rpartition(".")[2] in _EXEMPT) == exempt
            ]
            if names:
                decay = 0.0 if exempt else config.weight_decay
                groups.append({"params": names, "weight_decay": decay, "scale": scale})
    return groups


def learn(
    projector: Projector,
    W: Tensor,
    rows: SessionRows,
    config: SessionConfig,
    *,
    base_classes: int,
    session: int,
    seed: int = 0,
    sensitive: bool = True,
    look_every: int = 0,
    show: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter,
) -> Mechanism:
    """Train a projector, in place, on the rows of one session.

    Args:
        projector: with its incremental branch, where the method has one.
        W: class vectors (d, K).
        rows: what is learned.
        config: settings.
        base_classes: number of base classes.
        session: number of the session, from 1.
        seed: seed of order and mixing.
        sensitive: whether the class-sensitive losses are on; they need a gate.
        look_every: steps between two looks at the mechanism; 0 looks at the end alone.
        show: passes the batches through, to show progress.

    Returns:
        The mechanism over the steps; empty for MLPs.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message names the step.

    Source: Mamba-FSCIL, arXiv 2407.06136, and its code.
    """
    steps = config.steps + config.more_steps * (session - 1)
    dual = projector.inc is not None
    trains_base = not dual or config.base_lr > 0
    modules = [projector] if trains_base else [projector.inc]
    for module in modules:
        assert module is not None
        module.train().requires_grad_(True)
    if not trains_base:
        projector.freeze_base()
    optimizer = torch.optim.SGD(parameter_groups(projector, config), lr=config.lr, momentum=config.momentum)
    loss_of = ClassSensitiveLoss(
        config.suppression_base, config.suppression_novel, config.separation, config.norm, config.virtual_ranks
    )
    kept = None
    if dual and not trains_base and config.cache:
        kept = torch.cat([projector.frozen_output(part) for part in torch.split(rows.maps, _ROWS)])
    found = Mechanism()
    for step, index in enumerate(show(rows.batches(config.batch_size, steps, seed, session)), 1):
        once, again = _without_repeats(index.to(rows.maps.device))
        labels = rows.labels[once if again is None else once[again]]
        out = projector(rows.maps[once], None if kept is None else kept[once], detach=not trains_base)
        out = out if again is None else out.rows(again)
        loss = _classification(out.mu, W, labels, config, generator(seed, session, step))
        if sensitive and dual and out.gate is not None and out.params is not None:
            loss = loss + loss_of(out.gate, out.params, labels, base_classes).total
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"session {session}, step {step}: the loss is {float(loss.detach())}; lower --session.lr"
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config.lr * group["scale"])
        optimizer.step()
        if step == steps or (look_every and (step == 1 or step % look_every == 0)):
            seen = look(projector.eval(), rows.maps, rows.labels, base_classes, kept)
            projector.train()
            if seen is not None:
                found.steps.append(step)
                for values, value in zip((found.cosine, found.gate_base, found.gate_novel), seen, strict=True):
                    values.append(value)
    projector.eval().requires_grad_(False)
    return found


def _without_repeats(index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Each number once, and where each of the given ones is among them; the given ones and None where few are repeated.

    What a projector gives for a row does not depend on the others, so a batch of few rows many times costs what they cost.
    """
    once, again = torch.unique(index, return_inverse=True)
    return (index, None) if 2 * len(once) > len(index) else (once, again)


def _classification(mu: Tensor, W: Tensor, labels: Tensor, config: SessionConfig, draws: torch.Generator) -> Tensor:
    """The classification loss; with the probability ``mix`` of a step's embeddings mixed in pairs, half and half."""
    if float(torch.rand((), generator=draws)) >= config.mix:
        return dot_regression_loss(mu, W, labels, balanced=config.balanced)
    partner = torch.randperm(len(labels), generator=draws).to(mu.device)
    mixed = (mu + mu[partner]) / 2
    both = [dot_regression_loss(mixed, W, y, balanced=config.balanced) for y in (labels, labels[partner])]
    return (both[0] + both[1]) / 2
