"""Local training under Lightning: manual optimization, DDP of each module on its own, and a monitor of memory."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from localrecon.boundary import StepOptions
from localrecon.bpfree import BPFreeNet
from localrecon.config import SGRConfig
from localrecon.evaluation import evaluate_batch
from localrecon.inputs import samples_in, split_batch
from localrecon.optimizers import Net, OptimizerFactory, SchedulerFactory, adamw, make_optimizers
from localrecon.trainer import Stepper, needs_length, set_training
from tenfold import UserError
from tenfold.errors import MissingExtraError
from tenfold.memory import MemoryProbe

try:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
except ImportError as error:
    raise MissingExtraError('LocalReconModule needs Lightning: pip install "tenfold[lightning]"') from error


class LocalReconModule(pl.LightningModule):
    """Local training under Lightning: manual optimization, one optimizer per module.

    It logs ``m{k}/loss``, ``m{k}/acc`` of each module, ``b{k}/cos``, ``b{k}/R`` of each boundary, and in validation and test
    ``val/acc`` and ``val/loss``, ``test/acc`` and ``test/loss``. ``global_step`` counts batches. Clipping, accumulation and
    mixed precision are options here, since Lightning's own do not reach into a module's turn. Several devices: strategy
    "localrecon_ddp" (gradients are averaged module by module).

    Args:
        net: the net; batches are (inputs, labels), (input, input, labels), or mappings with ``labels``.
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        options: seed, accumulation, clipping, number format and the like; default ``StepOptions()``. The length of the
            training is what the trainer expects, where it is not given; where that is not known either, ramps are refused.
        batch_transform: applied to (inputs, labels) of a training batch, such as mixup.

    Example:
        >>> from localrecon import LocalNet, plan_split
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> module = LocalReconModule(LocalNet(model, plan_split(model, x, k=2)))
        >>> module(x).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        net: Net,
        sgr: SGRConfig | None = None,
        optim: OptimizerFactory = adamw,
        scheduler: SchedulerFactory | None = None,
        options: StepOptions | None = None,
        *,
        batch_transform: Callable[[Any, Tensor], tuple[Any, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.stepper = Stepper(net, sgr, options)
        self.optim, self.scheduler, self.batch_transform = optim, scheduler, batch_transform
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    steps: Tensor

    def configure_optimizers(self) -> Any:
        """One optimizer per module, and one scheduler each."""
        optimizers = make_optimizers(self.net, self.optim)
        return optimizers, [self.scheduler(optimizer) for optimizer in optimizers] if self.scheduler else []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model gives."""
        if named:
            return self.net(named)
        return self.net(inputs[0] if len(inputs) == 1 else inputs)

    def on_fit_start(self) -> None:
        """Refuse what Lightning would do to the whole, and make the loss scales.

        Raises:
            UserError: Lightning's own half precision or clipping, or a ramp of a training whose length is not known.
        """
        if str(self.trainer.precision).startswith("16"):
            raise UserError(
                'Lightning\'s precision "16" scales one loss: give StepOptions(dtype=torch.float16) to LocalReconModule'
            )
        needs_length(self.stepper.sgr, self._length())
        set_training(self.net)
        if self.stepper.scalers is None:
            self.stepper.place(self.device)

    def _length(self) -> int | None:
        """Steps of the training; None where neither the options nor the trainer say."""
        if self.stepper.options.total_steps:
            return self.stepper.options.total_steps
        expected = self.trainer.estimated_stepping_batches
        return int(expected) if math.isfinite(expected) and expected > 0 else None

    def training_step(self, batch: Any, index: int) -> None:
        """One step of all modules."""
        inputs, labels = split_batch(batch)
        if self.batch_transform is not None:
            inputs, labels = self.batch_transform(inputs, labels)
        optimizers = _listed(self.optimizers(use_pl_optimizer=False))
        schedulers = _listed(self.lr_schedulers())
        report = self.stepper.step(inputs, labels, optimizers, schedulers, int(self.steps), self._length())
        self.steps += 1
        # Lightning counts calls of its optimizers, of which there is one per module; ``max_steps``, ``ModelCheckpoint`` and
        # loggers go by this number
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.log_dict(report.metrics(), batch_size=samples_in(labels))

    def validation_step(self, batch: Any, index: int) -> None:
        """Loss and accuracy of the last head."""
        self._measure(batch, "val")

    def test_step(self, batch: Any, index: int) -> None:
        """Loss and accuracy of the last head."""
        self._measure(batch, "test")

    def _measure(self, batch: Any, name: str) -> None:
        inputs, labels = split_batch(batch)
        found = evaluate_batch(self.net, inputs, labels)
        values = {f"{name}/{key}": value for key, value in found.items() if key != "terms"}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=int(found["terms"]), sync_dist=True)

    def predict_step(self, batch: Any, index: int) -> Any:
        """What the model gives for a batch as in training, or for inputs alone (a tensor or a mapping)."""
        whole = isinstance(batch, list | tuple) or (isinstance(batch, Mapping) and "labels" in batch)
        return self.net(split_batch(batch)[0] if whole and len(batch) > 1 else batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add plan, averages of the gate and loss scales."""
        checkpoint["localrecon"] = self.stepper.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them back.

        Raises:
            PlanMismatchError: the checkpoint is of another split.
        """
        self.stepper.place(self.device)
        self.stepper.load_state_dict(checkpoint["localrecon"], "the checkpoint")


def _listed(value: Any) -> list[Any]:
    """What Lightning gives as nothing, one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


class LocalDDPStrategy(DDPStrategy):
    """DDP of each module on its own, so that its gradients are averaged within its turn; ``localrecon_ddp`` by name."""

    def _setup_model(self, model: nn.Module) -> Any:
        net = cast("LocalReconModule", model).net
        if isinstance(net, BPFreeNet):
            raise UserError("method bpfree runs on one device")
        net.distribute()
        return model

    def _register_ddp_hooks(self) -> None:
        """None: there is no DDP around the whole."""


if "localrecon_ddp" not in StrategyRegistry.available_strategies():
    StrategyRegistry.register("localrecon_ddp", LocalDDPStrategy, description=LocalDDPStrategy.__doc__ or "")


class MemoryMonitor(pl.Callback):
    """Logs ``memory/peak_mib`` and ``memory/saved_mib``, counted in every ``every``-th training step.

    Args:
        every: steps between two counts; counting slows a step down.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self._probe: MemoryProbe | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        """Begin to count."""
        if index % self.every == 0:
            self._probe = MemoryProbe(module, trainer.optimizers, batch)
            self._probe.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Log the count."""
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            found = {"peak_mib": self._probe.peak_bytes, "saved_mib": self._probe.saved_bytes}
            module.log_dict({f"memory/{name}": value / 2**20 for name, value in found.items()})
            self._probe = None
