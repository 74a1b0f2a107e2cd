"""The plain trainer, and what it shares with Lightning's: a step of either kind of net, its loss scales and its state."""

import dataclasses
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localrecon.boundary import StepOptions
from localrecon.bpfree import BPFreeNet
from localrecon.config import SGRConfig
from localrecon.evaluation import evaluate
from localrecon.inputs import Inputs, Labels, moved, split_batch
from localrecon.net import LocalNet
from localrecon.optimizers import Net, OptimizerFactory, SchedulerFactory, adamw, make_optimizers
from localrecon.plan import PlanMismatchError, SplitPlan
from localrecon.step import StepReport, local_step
from tenfold import UserError
from tenfold.files import replacing
from tenfold.loading import KeyedLoader


def train_step(
    net: Net,
    inputs: Inputs,
    labels: Labels,
    optimizers: Sequence[torch.optim.Optimizer],
    sgr: SGRConfig,
    options: StepOptions,
    scalers: Sequence[torch.amp.GradScaler] | None = None,
) -> StepReport:
    """``local_step``, or the closed form of a BP-free net."""
    if isinstance(net, BPFreeNet):
        if not isinstance(inputs, Tensor):
            raise TypeError("a BP-free net takes a tensor")
        return net.step(inputs, labels, optimizers, sgr, options.step, options.total_steps)
    return local_step(net, inputs, labels, optimizers, sgr, options, scalers)


class Stepper:
    """Steps of one net under one reconciliation, and the state of them besides weights and optimizers.

    Args:
        net: the net.
        sgr: the reconciliation; default ``SGRConfig()``.
        options: seed, length of the training and the like; default ``StepOptions()``. With float16 there is one loss scale
            per module, so an overflow skips that module alone.
    """

    def __init__(self, net: Net, sgr: SGRConfig | None = None, options: StepOptions | None = None) -> None:
        self.net = net
        self.sgr = sgr or SGRConfig()
        self.options = options or StepOptions()
        self.scalers: list[torch.amp.GradScaler] | None = None

    def place(self, device: torch.device) -> None:
        """Make the loss scales that float16 needs on this device."""
        if self.options.dtype == torch.float16:
            self.scalers = [torch.amp.GradScaler(device.type) for _ in range(self.net.k)]

    def step(
        self,
        inputs: Inputs,
        labels: Labels,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[torch.optim.lr_scheduler.LRScheduler],
        number: int,
        total_steps: int | None = None,
    ) -> StepReport:
        """Step ``number`` (from 0 on) of all modules, then of the schedulers; ``total_steps`` where none was given."""
        options = dataclasses.replace(self.options, step=number, total_steps=self.options.total_steps or total_steps)
        report = train_step(self.net, inputs, labels, optimizers, self.sgr, options, self.scalers)
        for scheduler in schedulers:
            scheduler.step()
        return report

    def state_dict(self) -> dict[str, Any]:
        """Plan, averages of the gate and loss scales."""
        state: dict[str, Any] = {"scalers": [scaler.state_dict() for scaler in self.scalers or ()]}
        if isinstance(self.net, LocalNet):
            state["plan"] = self.net.plan.to_json()
            state["averages"] = [stage.loss_average for stage in self.net.segments]
        return state

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Put them back.

        Args:
            state: what ``state_dict`` gave.
            source: where it comes from, for the message.

        Raises:
            PlanMismatchError: the state is of another split.
        """
        if isinstance(self.net, LocalNet):
            if difference := SplitPlan.from_json(state["plan"]).difference(self.net.plan):
                raise PlanMismatchError(f"{source} is of another split ({difference})")
            for stage, average in zip(self.net.segments, state["averages"], strict=True):
                stage.loss_average = average
        for scaler, saved in zip(self.scalers or [], state["scalers"], strict=True):
            scaler.load_state_dict(saved)


def needs_length(sgr: SGRConfig, total_steps: int | None) -> None:
    """Refuse a ramp of a training whose length is not known.

    Raises:
        UserError: with what to give.
    """
    if total_steps is None and sgr.needs_length:
        name = "ramp" if sgr.ramp else "anneal_last"
        raise UserError(
            f"{name} is a share of the training, whose length is not known here: give StepOptions(total_steps=...), or"
            f" SGRConfig({name}=0)"
        )


def _endless(loader: Any) -> bool:
    """Whether a loader has ``len`` by its class, but no length."""
    try:
        len(loader)
    except TypeError:
        return True
    return False


def set_training(net: Net) -> None:
    """Training mode where the whole is in evaluation mode; else each submodule keeps its own, such as a frozen BatchNorm."""
    if not net.training or (isinstance(net, LocalNet) and not net.model.training):
        net.train()


class LocalTrainer:
    """A plain training loop around ``local_step``; it needs no other trainer's library.

    Args:
        net: the net; put into training mode where the model is in evaluation mode, else its submodules stay as they are.
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        options: seed, accumulation, clipping, number format and the like; default ``StepOptions()``. ``fit`` finds out the
            length of the training.
        device: where to compute.
        compile: whether each module is compiled.

    Raises:
        UserError: the factory's optimizers do not hold exactly one module's parameters each.

    Example:
        >>> from localrecon import LocalNet, plan_split
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> trainer = LocalTrainer(LocalNet(model, plan_split(model, x, k=2)))
        >>> report = trainer.step(x, torch.tensor([0, 1, 2, 0]))
        >>> len(report.modules)
        2
    """

    def __init__(
        self,
        net: Net,
        sgr: SGRConfig | None = None,
        optim: OptimizerFactory = adamw,
        scheduler: SchedulerFactory | None = None,
        options: StepOptions | None = None,
        *,
        device: str = "cpu",
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.net = net.to(self.device)
        set_training(self.net)
        self.stepper = Stepper(self.net, sgr, options)
        self.stepper.place(self.device)
        self.optimizers = make_optimizers(net, optim)
        self.schedulers = [scheduler(optimizer) for optimizer in self.optimizers] if scheduler else []
        self.step_count = self.stepper.options.step
        if compile and isinstance(net, LocalNet):
            net.compile_segments()

    def step(self, inputs: Inputs, labels: Labels) -> StepReport:
        """One step on a batch."""
        return self._step(inputs, labels, None)

    def _step(self, inputs: Inputs, labels: Labels, total: int | None) -> StepReport:
        set_training(self.net)
        batch = moved(inputs, self.device), moved(labels, self.device)
        report = self.stepper.step(*batch, self.optimizers, self.schedulers, self.step_count, total)
        self.step_count += 1
        return report

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        *,
        on_step: Callable[[int, StepReport], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 500,
    ) -> None:
        """Train for so many epochs; with a checkpoint, go on from it where it is there.

        With a ``KeyedLoader`` that goes on bit for bit (on a CPU). Of another loader, batches that were trained on are
        passed over; whether it gives the same ones again is up to it.

        Args:
            loader: any loader, of (inputs, labels), (input, input, labels), or mappings with labels. Without a length
                (an ``IterableDataset``), ramps of ``SGRConfig`` need ``StepOptions(total_steps=...)``.
            epochs: epochs in all, those of a checkpoint included.
            on_step: called after each step with its number and its report.
            checkpoint: file that the state is kept in, whole at any moment.
            checkpoint_every: steps between two of them.

        Raises:
            PlanMismatchError: the checkpoint is of another split.
            UserError: the checkpoint cannot be read, a batch has no labels, or the length is not known and needed.
        """
        length = len(loader) if isinstance(loader, Sized) and not _endless(loader) else None
        total = None if length is None else epochs * length
        needs_length(self.stepper.sgr, self.stepper.options.total_steps or total)
        if checkpoint is not None and Path(checkpoint).exists():
            self.load(checkpoint)
        done = 0  # steps before the batch at hand
        for epoch in range(epochs):
            if length is not None and done + length <= self.step_count:
                done += length
                continue
            if isinstance(loader, KeyedLoader):
                loader.seek(epoch, max(0, self.step_count - done))
                done = max(done, self.step_count)
            for batch in loader:
                done += 1
                if done <= self.step_count:
                    continue
                report = self._step(*split_batch(batch), total)
                if on_step is not None:
                    on_step(self.step_count, report)
                if checkpoint is not None and (self.step_count % checkpoint_every == 0 or self.step_count == total):
                    self.save(checkpoint)
        if checkpoint is not None and total is None:
            self.save(checkpoint)

    def evaluate(self, loader: Any) -> dict[str, float]:
        """Accuracy and loss of every head over the batches of a loader: ``localrecon.evaluation.evaluate``."""
        return evaluate(self.net, loader, self.device)

    def save(self, path: str | Path) -> None:
        """Write the whole state, whole or not at all: net, optimizers, schedulers, loss scales, gate, step."""
        state = {
            **self.stepper.state_dict(),
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "step": self.step_count,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: str | Path) -> None:
        """Go on from what ``save`` wrote; nothing is unpickled.

        Args:
            path: the file.

        Raises:
            PlanMismatchError: the checkpoint is of another split.
            UserError: it cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            step, weights = state["step"], state["net"]
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} holds more than weights and numbers, and is not unpickled") from error
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a checkpoint of localrecon: {type(error).__name__}") from error
        self.stepper.load_state_dict(state, str(path))
        self.net.load_state_dict(weights)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.step_count = step
