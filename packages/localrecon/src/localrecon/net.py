"""A user's model as gradient-isolated modules with local heads."""

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from localrecon.adapters import build_chain
from localrecon.chain import Chain
from localrecon.config import HeadSpec
from localrecon.heads import build_head
from localrecon.inputs import Inputs, call
from localrecon.losses import Loss
from localrecon.plan import SplitPlan
from localrecon.stage import Stage
from tenfold import UserError
from tenfold.randomness import keyed


class LocalNet(nn.Module):
    """A model split into K modules, each with its own head, that share no gradient.

    The model stays the user's: same objects, same key names. ``net(x)`` is ``model(x)``.

    Args:
        model: the model.
        plan: where it is cut, from ``plan_split``.
        heads: "auto", a ``HeadSpec`` for all local heads, or a list of K - 1, each a ``HeadSpec`` or a module of yours that
            maps a module's output to logits. The last module's head is the model's own classifier.
        loss: loss of yours, (output of a head, labels) -> mean over the batch, in place of cross-entropy; needed where the
            plan was made with one.
        seed: seed of the heads' weights; default: torch's global generator, as anywhere in torch.

    Attributes:
        model: the model.
        heads: the K - 1 local heads.
        segments: the K modules with their heads.

    Raises:
        PlanMismatchError: the plan is for another model.
        UserError: a head does not fit, there are not K - 1 of them, or plan and loss do not go together.

    Example:
        >>> from localrecon import plan_split
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> net = LocalNet(model, plan_split(model, x, k=2))
        >>> torch.equal(net(x), model(x)), len(net.segments), len(net.heads)
        (True, 2, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SplitPlan,
        heads: str | HeadSpec | Sequence[HeadSpec | nn.Module] = "auto",
        *,
        loss: Loss | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if (loss is None) == (plan.task == "custom"):
            raise UserError(
                "the plan is for a loss of yours: give LocalNet that loss"
                if loss is None
                else "the plan was made for cross-entropy: give plan_split(loss=...) your loss as well"
            )
        if plan.route is not None:
            plan.check_names([name for name, _ in model.named_modules()])
        chain = build_chain(model, plan.adapter, route=plan.route)
        plan.check([block.name for block in chain.blocks])
        self.loss = loss
        self.plan = plan
        self.model = model
        specs = _specs(heads, plan.k)
        own = next(model.parameters())
        built: list[nn.Module] = []
        for k, given in enumerate(specs):
            head = given
            if isinstance(given, HeadSpec):
                with contextlib.nullcontext() if seed is None else keyed(seed, k):
                    head = build_head(given, plan, k)
            built.append(cast("nn.Module", head).to(device=own.device, dtype=own.dtype))
        self.heads = nn.ModuleList(built)
        stages = []
        for k, (a, b) in enumerate(plan.ranges):
            given = specs[k] if k < len(specs) else HeadSpec()
            spec = given if isinstance(given, HeadSpec) else HeadSpec()
            stage = Stage(chain, a, b, self.heads[k] if k < len(specs) else None, k, spec)
            stage.task, stage.loss, stage.by_token = plan.task, loss, plan.by_token
            stages.append(stage)
        self.__dict__["chain"] = chain  # not registered: the model and the heads are, once
        self.__dict__["segments"] = stages
        self.training = model.training  # and the submodules as the user has set them
        self.heads.train(model.training)
        for stage in stages:
            stage.training = model.training

    chain: Chain
    segments: list[Stage]

    @property
    def k(self) -> int:
        """Number of modules."""
        return self.plan.k

    def forward(self, x: Inputs) -> Any:
        """What the model gives."""
        return call(self.model, x)

    def __reduce__(self) -> tuple[Any, ...]:
        """What ``copy.deepcopy`` and other processes are sent: the model, the heads and the plan; the rest is built again."""
        kept = [(stage.spec, stage.loss_average, stage.checkpointing) for stage in self.segments]
        return _rebuild, (self.model, self.plan, list(self.heads), self.loss, kept)

    def train(self, mode: bool = True) -> "LocalNet":
        """Training or evaluation mode, of the model and the heads alike."""
        super().train(mode)
        for stage in self.segments:
            stage.training = mode
        return self

    @torch.no_grad()
    def forward_exits(self, x: Inputs) -> list[Tensor]:
        """Logits of every head, in order; the last ones are the model's own."""
        context = self.chain.context(x)
        exits = []
        for stage in self.segments:
            x = stage.run_blocks(x, context)
            exits.append(stage.logits(x, context))
        return exits

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """What module k (from 0 on) trains, its head's parameters included."""
        return self.segments[k].trained()

    def to_backbone(self) -> nn.Module:
        """The user's model: the same object."""
        return self.model

    def distribute(self) -> None:
        """Average each module's gradients over the ranks as soon as its backward has run (one DDP per module)."""
        from torch.nn.parallel import DistributedDataParallel

        for stage in self.segments:
            stage.__dict__["parallel"] = DistributedDataParallel(stage)

    def compile_segments(self, **options: Any) -> None:
        """``torch.compile`` the submodules of each module, one by one, and the heads; the options are torch's.

        What is compiled stays so when the model is used elsewhere. Its weights and their names do not change.
        """
        for stage in self.segments:
            stage.compile_parts(**options)


def _rebuild(
    model: nn.Module,
    plan: SplitPlan,
    heads: list[nn.Module],
    loss: Loss | None,
    kept: list[tuple[HeadSpec, float | None, int]],
) -> LocalNet:
    net = LocalNet(model, plan, heads, loss=loss)
    for stage, (spec, average, checkpointing) in zip(net.segments, kept, strict=True):
        stage.spec, stage.loss_average, stage.checkpointing = spec, average, checkpointing
    return net


def _specs(heads: str | HeadSpec | Sequence[HeadSpec | nn.Module], k: int) -> list[HeadSpec | nn.Module]:
    if isinstance(heads, str):
        if heads != "auto":
            raise UserError(f"heads must be 'auto', a HeadSpec or a list of {k - 1}, got '{heads}'")
        return [HeadSpec()] * (k - 1)
    if isinstance(heads, HeadSpec):
        return [heads] * (k - 1)
    if len(heads) != k - 1:
        raise UserError(f"{k} modules need {k - 1} local heads (the last module has the model's own), got {len(heads)}")
    return list(heads)
