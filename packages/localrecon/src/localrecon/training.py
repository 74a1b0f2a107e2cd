"""Local training under Lightning: manual optimization, DDP of each module on its own, and a monitor of memory."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from localrecon.boundary import StepOptions
from localrecon.bpfree import BPFreeNet
from localrecon.config import SGRConfig
from localrecon.optimizers import Net, OptimizerFactory, SchedulerFactory, adamw, make_optimizers
from localrecon.trainer import Stepper
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

    It logs ``m{k}/loss``, ``m{k}/acc`` of each module, ``b{k}/cos``, ``b{k}/R`` of each boundary, and in validation
    ``val/acc`` and ``val/loss``. Clipping, accumulation and mixed precision are options here, since Lightning's own do
    not reach into a module's turn. Several devices: strategy "localrecon_ddp" (gradients are averaged module by module).

    Args:
        net: the net; batches are (inputs, labels).
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        options: seed, accumulation, clipping, number format and the like; default ``StepOptions()``. The length of the
            training is what the trainer expects, where it is not given.
        batch_transform: applied to (inputs, labels) of a training batch, such as mixup.
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

    def on_fit_start(self) -> None:
        """Refuse what Lightning would do to the whole, and make the loss scales."""
        if str(self.trainer.precision).startswith("16"):
            raise UserError(
                'Lightning\'s precision "16" scales one loss: give StepOptions(dtype=torch.float16) to LocalReconModule'
            )
        if self.stepper.scalers is None:
            self.stepper.place(self.device)

    def training_step(self, batch: Any, index: int) -> None:
        """One step of all modules."""
        inputs, labels = batch
        if self.batch_transform is not None:
            inputs, labels = self.batch_transform(inputs, labels)
        total = self.stepper.options.total_steps or int(self.trainer.estimated_stepping_batches)
        optimizers = _listed(self.optimizers(use_pl_optimizer=False))
        schedulers = _listed(self.lr_schedulers())
        report = self.stepper.step(inputs, labels, optimizers, schedulers, int(self.steps), total)
        self.steps += 1
        self.log_dict(report.metrics())

    def validation_step(self, batch: Any, index: int) -> None:
        """Loss and accuracy of the last head."""
        inputs, labels = batch
        logits = self.net.forward_exits(inputs)[-1].flatten(0, -2).float()
        loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        right = (logits.argmax(dim=1) == labels.flatten()).float().mean()
        self.log_dict({"val/loss": loss, "val/acc": right}, on_epoch=True, batch_size=labels.shape[0], sync_dist=True)

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
