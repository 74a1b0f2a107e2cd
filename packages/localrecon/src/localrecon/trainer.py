"""The plain trainer, and what it shares with Lightning's: a step of either kind of net, its loss scales and its state."""

import dataclasses
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localrecon.boundary import StepOptions
from localrecon.bpfree import BPFreeNet
from localrecon.chain import Inputs
from localrecon.config import SGRConfig
from localrecon.evaluation import evaluate, moved
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
    labels: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    sgr: SGRConfig,
    options: StepOptions,
    scalers: Sequence[torch.amp.GradScaler] | None = None,
) -> StepReport:
    """``local_step``, or the closed form of a BP-free net."""
    if isinstance(net, BPFreeNet):
        if isinstance(inputs, Mapping):
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
        labels: Tensor,
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


class LocalTrainer:
    """A plain training loop around ``local_step``; it needs no other trainer's library.

    Args:
        net: the net.
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        options: seed, accumulation, clipping, number format and the like; default ``StepOptions()``. ``fit`` finds out the
            length of the training.
        device: where to compute.
        compile: whether each module is compiled.

    Raises:
        UserError: the factory's optimizers do not hold exactly one module's parameters each.
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
        self.net = net.to(self.device).train()
        self.stepper = Stepper(self.net, sgr, options)
        self.stepper.place(self.device)
        self.optimizers = make_optimizers(net, optim)
        self.schedulers = [scheduler(optimizer) for optimizer in self.optimizers] if scheduler else []
        self.step_count = self.stepper.options.step
        if compile and isinstance(net, LocalNet):
            net.compile_segments()

    def step(self, inputs: Inputs, labels: Tensor) -> StepReport:
        """One step on a batch."""
        return self._step(inputs, labels, None)

    def _step(self, inputs: Inputs, labels: Tensor, total: int | None) -> StepReport:
        self.net.train()
        batch = moved(inputs, self.device), labels.to(self.device)
        report = self.stepper.step(*batch, self.optimizers, self.schedulers, self.step_count, total)
        self.step_count += 1
        return report

    def fit(
        self,
        loader: KeyedLoader,
        epochs: int,
        *,
        on_step: Callable[[int, StepReport], None] | None = None,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 500,
    ) -> None:
        """Train for so many epochs; with a checkpoint, go on from it where it is there, bit for bit on a CPU.

        Args:
            loader: its batches depend on seed, epoch and index alone, so the position is a number.
            epochs: epochs in all, those of a checkpoint included.
            on_step: called after each step with its number and its report.
            checkpoint: file that the state is kept in, whole at any moment.
            checkpoint_every: steps between two of them.

        Raises:
            PlanMismatchError: the checkpoint is of another split.
            UserError: the checkpoint cannot be read.
        """
        total = epochs * len(loader)
        if checkpoint is not None and Path(checkpoint).exists():
            self.load(checkpoint)
        while self.step_count < total:
            epoch, start = divmod(self.step_count, len(loader))
            loader.seek(epoch, start)
            for inputs, labels in loader:
                report = self._step(inputs, labels, total)
                if on_step is not None:
                    on_step(self.step_count, report)
                if checkpoint is not None and (self.step_count % checkpoint_every == 0 or self.step_count == total):
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
