"""Training: a plain loop, a LightningModule, and what the command line does with them; one loop for all methods.

Back-propagation is the net of one module; checkpointing and accumulation are ways to run it. So all arms of a comparison
differ in nothing else.
"""

import copy
import csv
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.utils.data import DataLoader

from localrecon.bpfree import BPFreeNet
from localrecon.chain import Inputs
from localrecon.config import (
    CompareSettings,
    HeadSpec,
    Method,
    OptimizerSettings,
    SGRConfig,
    SplitSettings,
    TrainingSettings,
    TrainSettings,
)
from localrecon.data import Data, load_data, split_validation
from localrecon.errors import PlanMismatchError
from localrecon.heads import terms_of
from localrecon.memory import MemoryProbe
from localrecon.models import build_bpfree, build_model
from localrecon.net import EarlyExit, LocalNet
from localrecon.plan import SplitPlan
from localrecon.planning import plan_split
from localrecon.step import StepOptions, StepReport, local_step
from tenfold import UserError, checkpoints
from tenfold.claims import Study, interval, mean_ci95
from tenfold.figures import Curve, Panel, arm_chart, line_chart
from tenfold.report import write_report
from tenfold.runs import Run, replacing
from tenfold.training import KeyedLoader, TrainerConfig, choose_device, choose_precision, fit, seed_everything

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
Net = LocalNet | BPFreeNet
BACKBONE = "backbone.safetensors"
HEADS = "heads.safetensors"


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW at a learning rate of 1e-3: the default of the trainers."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def make_optimizers(net: Net, factory: OptimizerFactory) -> list[torch.optim.Optimizer]:
    """One optimizer a module.

    Raises:
        UserError: a factory that does not give each module's optimizer exactly that module's parameters.
    """
    made = [factory(net.parameters_of(k)) for k in range(net.k)]
    for k, optimizer in enumerate(made):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = {id(p) for p in net.parameters_of(k)}
        if held != own or any(optimizer is other for other in made[:k]):
            others = [j + 1 for j in range(net.k) if j != k and held & {id(p) for p in net.parameters_of(j)}]
            shared = f" and parameters of module {others[0]}" if others else ""
            raise UserError(
                f"the optimizer of module {k + 1} holds {len(held & own)} of its {len(own)} parameters{shared}: the factory"
                " has to make a new optimizer of exactly the parameters that it is given"
            )
    return made


def optimizer_of(settings: OptimizerSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the settings name; with ``partial``, a factory that processes can be sent."""
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    momentum = settings.momentum
    decay = settings.weight_decay
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)


def scheduler_of(
    settings: OptimizerSettings, total_steps: int, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then cosine to 0 or constant; of the global step, the same for all modules."""

    def factor(step: int) -> float:
        warm = settings.warmup * total_steps
        if step < warm:
            return (step + 1) / warm
        if settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1.0, total_steps - warm))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


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


class LocalTrainer:
    """A plain training loop around ``local_step``.

    Args:
        net: the net.
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        seed: of dropout.
        total_steps: of the training, for the ramps; ``fit`` finds it out.
        accumulate: parts that a batch is computed in.
        clip_norm: largest norm of a module's gradient.
        device: where to compute.
        precision: 32, bf16 or 16, mixed; 16 has one loss scale a module, so an overflow skips that module alone.
        compile: compile each module.

    Raises:
        UserError: the factory's optimizers do not hold exactly one module's parameters each.
    """

    def __init__(
        self,
        net: LocalNet,
        sgr: SGRConfig | None = None,
        optim: OptimizerFactory = adamw,
        scheduler: SchedulerFactory | None = None,
        *,
        seed: int = 0,
        total_steps: int | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        device: str = "cpu",
        precision: str = "32",
        compile: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.net = net.to(self.device).train()
        self.sgr = sgr or SGRConfig()
        self.optimizers = make_optimizers(net, optim)
        self.schedulers = [scheduler(optimizer) for optimizer in self.optimizers] if scheduler else []
        self.options = StepOptions(
            total_steps=total_steps, seed=seed, accumulate=accumulate, clip_norm=clip_norm, dtype=dtype_of(precision)
        )
        self.scalers = scalers_of(precision, self.device, net.k)
        self.step_count = 0
        if compile:
            net.compile_segments()

    def step(self, inputs: Inputs, labels: Tensor) -> StepReport:
        """One step on a batch."""
        options = dataclasses.replace(self.options, step=self.step_count)
        self.net.train()
        inputs = _to(inputs, self.device)
        report = local_step(self.net, inputs, labels.to(self.device), self.optimizers, self.sgr, options, self.scalers)
        for scheduler in self.schedulers:
            scheduler.step()
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
            epochs: in all, those of a checkpoint included.
            on_step: called after each step with its number and its report.
            checkpoint: file that the state is kept in, whole at any moment.
            checkpoint_every: steps between two of them.
        """
        total = epochs * len(loader)
        self.options = dataclasses.replace(self.options, total_steps=self.options.total_steps or total)
        if checkpoint is not None and Path(checkpoint).exists():
            self.load(checkpoint)
        while self.step_count < total:
            epoch, start = divmod(self.step_count, len(loader))
            loader.seek(epoch, start)
            for inputs, labels in loader:
                report = self.step(inputs, labels)
                if on_step is not None:
                    on_step(self.step_count, report)
                if checkpoint is not None and (self.step_count % checkpoint_every == 0 or self.step_count == total):
                    self.save(checkpoint)

    def evaluate(self, loader: Any) -> dict[str, float]:
        """See ``evaluate``."""
        return evaluate(self.net, loader, self.device)

    def save(self, path: str | Path) -> None:
        """The whole state, whole or not at all: model, heads, optimizers, schedulers, loss scales, step."""
        state = {
            "plan": self.net.plan.to_json(),
            "net": self.net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scalers": [scaler.state_dict() for scaler in self.scalers or ()],
            "averages": [stage.loss_average for stage in self.net.segments],
            "step": self.step_count,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: str | Path) -> None:
        """Go on from what ``save`` wrote; nothing is unpickled.

        Raises:
            PlanMismatchError: the checkpoint is of another split.
            UserError: it cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            plan = SplitPlan.from_json(state["plan"])
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, ImportError) as error:
            raise UserError(f"{path} cannot be read as a checkpoint of localrecon: {type(error).__name__}") from error
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            raise UserError(f"{path} holds more than weights and numbers, and is not unpickled") from error
        if difference := plan.difference(self.net.plan):
            raise PlanMismatchError(f"{path} is of another split ({difference})")
        self.net.load_state_dict(state["net"])
        parts: list[tuple[Sequence[Any], str]] = [(self.optimizers, "optimizers"), (self.schedulers, "schedulers")]
        parts.append((self.scalers or [], "scalers"))
        for objects, name in parts:
            for one, saved in zip(objects, state[name], strict=True):
                one.load_state_dict(saved)
        for stage, average in zip(self.net.segments, state["averages"], strict=True):
            stage.loss_average = average
        self.step_count = state["step"]


def _to(value: Any, device: torch.device) -> Any:
    return {key: item.to(device) for key, item in value.items()} if isinstance(value, Mapping) else value.to(device)


def dtype_of(precision: str) -> torch.dtype | None:
    """Of mixed precision, by the names of the command line or of Lightning."""
    return {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[precision.partition("-")[0]]


def scalers_of(precision: str, device: torch.device, k: int) -> list[torch.amp.GradScaler] | None:
    """A loss scale for each module, where the precision needs one."""
    return [torch.amp.GradScaler(device.type) for _ in range(k)] if precision.startswith("16") else None


@torch.no_grad()
def evaluate(net: Net, loader: Any, device: torch.device | str = "cpu") -> dict[str, float]:
    """``accuracy`` of the last head in percent, its ``loss``, and ``accuracy 1`` .. of every head.

    Of a language model, ``loss`` is in nats a token, and there is ``bits`` in bits a token.
    """
    mode = net.training
    net.eval()
    device = torch.device(device)
    task = net.plan.task if isinstance(net, LocalNet) else "classify"
    total, loss = 0, 0.0
    right = [0.0] * net.k
    for batch, answers in loader:
        inputs, labels = _to(batch, device), answers.to(device)
        exits = net.forward_exits(inputs)
        flat = [logits.flatten(0, -2).float() for logits in exits]
        truth = labels.flatten()
        loss += float(nn.functional.cross_entropy(flat[-1], truth, ignore_index=-100, reduction="sum"))
        for k, logits in enumerate(flat):
            right[k] += float((logits.argmax(dim=1) == truth).sum())
        total += terms_of(labels, task)
    net.train(mode)
    found = {"accuracy": 100 * right[-1] / total, "loss": loss / total}
    if task == "lm":
        found["bits"] = loss / total / math.log(2)
    return found | {f"accuracy {k}": 100 * r / total for k, r in enumerate(right, 1)}


class LocalReconModule(pl.LightningModule):
    """Local training under Lightning: manual optimization, one optimizer a module.

    It logs ``m{k}/loss``, ``m{k}/acc`` of each module, ``b{k}/cos``, ``b{k}/R`` of each boundary, and in validation
    ``val/acc`` and ``val/loss``. Clipping, accumulation and mixed precision are arguments here, since Lightning's own do
    not reach into a module's turn. Several devices: strategy "localrecon_ddp" (gradients are averaged module by module).

    Args:
        net: the net; batches are (inputs, labels).
        sgr: the reconciliation; default ``SGRConfig()``.
        optim: parameters of a module -> its optimizer; default AdamW at 1e-3.
        scheduler: optimizer -> learning-rate scheduler, stepped after each step.
        seed: of dropout.
        total_steps: of the training, for the ramps; default: what the trainer expects.
        accumulate: parts that a batch is computed in.
        clip_norm: largest norm of a module's gradient.
        precision: 32, bf16 or 16.
        batch_transform: applied to (inputs, labels) of a training batch, such as mixup.
    """

    def __init__(
        self,
        net: Net,
        sgr: SGRConfig | None = None,
        optim: OptimizerFactory = adamw,
        scheduler: SchedulerFactory | None = None,
        *,
        seed: int = 0,
        total_steps: int | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        precision: str = "32",
        batch_transform: Callable[[Any, Tensor], tuple[Any, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.sgr = sgr or SGRConfig()
        self.optim, self.scheduler = optim, scheduler
        self.options = StepOptions(
            total_steps=total_steps, seed=seed, accumulate=accumulate, clip_norm=clip_norm, dtype=dtype_of(precision)
        )
        self.precision, self.batch_transform = precision, batch_transform
        self.scalers: list[torch.amp.GradScaler] | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._held: list[tuple[float, float, int]] = []

    steps: Tensor

    def configure_optimizers(self) -> Any:
        """One optimizer a module, and one scheduler each."""
        optimizers = make_optimizers(self.net, self.optim)
        return optimizers, [self.scheduler(optimizer) for optimizer in optimizers] if self.scheduler else []

    def on_fit_start(self) -> None:
        """Refuse what Lightning would do to the whole, and make the loss scales."""
        if str(self.trainer.precision).startswith("16"):
            raise UserError('Lightning\'s precision "16" scales one loss: give precision="16" to LocalReconModule')
        if self.scalers is None:
            self.scalers = scalers_of(self.precision, self.device, self.net.k)

    def training_step(self, batch: Any, index: int) -> None:
        """One step of all modules."""
        inputs, labels = batch
        if self.batch_transform is not None:
            inputs, labels = self.batch_transform(inputs, labels)
        total = self.options.total_steps or int(self.trainer.estimated_stepping_batches)
        options = dataclasses.replace(self.options, step=int(self.steps), total_steps=total)
        optimizers = cast("Any", self.optimizers(use_pl_optimizer=False))
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        report = train_step(self.net, inputs, labels, optimizers, self.sgr, options, self.scalers)
        schedulers = cast("Any", self.lr_schedulers())
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
            scheduler.step()
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
        """Plan, averages of the gate and loss scales."""
        state: dict[str, Any] = {"scalers": [scaler.state_dict() for scaler in self.scalers or ()]}
        if isinstance(self.net, LocalNet):
            state["plan"] = self.net.plan.to_json()
            state["averages"] = [stage.loss_average for stage in self.net.segments]
        checkpoint["localrecon"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them back; another split is refused."""
        state = checkpoint["localrecon"]
        if isinstance(self.net, LocalNet):
            if difference := SplitPlan.from_json(state["plan"]).difference(self.net.plan):
                raise PlanMismatchError(f"the checkpoint is of another split ({difference})")
            for stage, average in zip(self.net.segments, state["averages"], strict=True):
                stage.loss_average = average
        self.scalers = scalers_of(self.precision, self.device, self.net.k)
        for scaler, saved in zip(self.scalers or [], state["scalers"], strict=True):
            scaler.load_state_dict(saved)


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
    """Logs ``memory/peak_mib`` and ``memory/saved_mib``, counted in every so-manieth training step.

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
        """Log it."""
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            found = {"peak_mib": self._probe.peak_bytes, "saved_mib": self._probe.saved_bytes}
            module.log_dict({f"memory/{name}": value / 2**20 for name, value in found.items()})
            self._probe = None


# What the command line does


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A net that is ready to be trained, with its data."""

    net: Net
    data: Data
    sgr: SGRConfig
    accumulate: int


def make_plan(settings: SplitSettings, model: nn.Module, data: Data, *, measure: bool = True) -> SplitPlan:
    """The plan that the settings ask for, on a batch of the data."""
    batch, _ = next(iter(DataLoader(data.plain, batch_size=settings.batch_size)))
    return plan_split(
        model,
        batch,
        k=settings.k,
        budget=settings.budget,
        balance=settings.balance,
        cuts=settings.cuts,
        adapter=settings.adapter,
        heads=settings.head,
        sgr=settings.sgr,
        optimizer_states=2 if settings.optimizer.name == "adamw" else 1,
        measure=measure,
    )


def prepare(
    settings: TrainingSettings, method: Method, data: Data, seed: int, *, feedback: str = "transpose", plan: str = ""
) -> Prepared:
    """Model, split and heads of one arm; weights depend on the seed alone, and are the same for all methods but bpfree.

    Args:
        settings: of the training.
        method: of the arm.
        data: of all arms.
        seed: of the weights.
        feedback: of bpfree.
        plan: JSON of a plan that was made before, in place of making one.
    """
    torch.manual_seed(seed)
    if method == "bpfree":
        return Prepared(build_bpfree(settings, data.form, cast("Any", feedback)), data, settings.sgr, 1)
    model = build_model(settings, data.form)
    one = dataclasses.replace(settings, k=1, budget=None, cuts=None)
    whole = method in {"bp", "ckpt", "accum"}
    sgr = dataclasses.replace(settings.sgr, lam=0.0) if method != "sgr" else settings.sgr
    split = (
        SplitPlan.from_json(plan)
        if plan
        else make_plan(dataclasses.replace(one if whole else settings, sgr=sgr), model, data, measure=not whole)
    )
    net = LocalNet(model, split, settings.head)
    if method == "ckpt":
        net.segments[0].checkpointing = best_checkpointing(len(net.segments[0].blocks))
    accumulate = max(settings.accumulate, settings.k) if method == "accum" else settings.accumulate
    return Prepared(net, data, sgr, accumulate)


def best_checkpointing(blocks: int) -> int:
    """Blocks in a checkpointed segment: about the square root of their number, where memory is least."""
    return max(1, round(math.sqrt(blocks)))


def module_for(prepared: Prepared, settings: TrainingSettings, seed: int, total_steps: int) -> LocalReconModule:
    """The LightningModule of one arm."""
    device = choose_device(settings.device)
    return LocalReconModule(
        prepared.net,
        prepared.sgr,
        partial(optimizer_of, settings.optimizer),
        partial(scheduler_of, settings.optimizer, total_steps),
        seed=seed,
        total_steps=total_steps,
        accumulate=prepared.accumulate,
        clip_norm=settings.clip_norm,
        precision=choose_precision(settings.precision, device),
        batch_transform=_mixing(settings, prepared.data),
    )


def _mixing(settings: TrainingSettings, data: Data) -> Callable[[Any, Tensor], tuple[Any, Tensor]] | None:
    if not (settings.mixup or settings.cutmix):
        return None
    from timm.data.mixup import Mixup

    mixup: Any = Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.head.label_smoothing,
        num_classes=data.form.classes,
    )

    def mix(inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        mixed, soft = mixup(inputs, labels)
        return mixed, torch.as_tensor(soft).to(inputs.device)

    return mix


def run_training(
    settings: TrainingSettings, prepared: Prepared, seed: int, run: Run | None, *, quiet: bool = False, stage: str = ""
) -> LocalReconModule:
    """Train one arm to its end; with a run folder, exactly resumable."""
    train, held = split_validation(prepared.data, settings.validation, seed)
    loader = KeyedLoader(train, batch_size=settings.batch_size, seed=seed, num_workers=settings.workers)
    total = settings.epochs * (len(loader) // settings.devices)
    module = module_for(prepared, settings, seed, total)
    if settings.compile and isinstance(prepared.net, LocalNet):
        prepared.net.compile_segments()
    config = TrainerConfig(
        max_epochs=settings.epochs,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        seed=seed,
        device=settings.device,
        devices=settings.devices,
        precision="32",
        strategy="localrecon_ddp" if settings.devices > 1 or settings.strategy == "ddp" else "auto",
    )
    validate = None if held is None else DataLoader(held, batch_size=settings.batch_size)
    fit(module, loader, config, run, validate=validate, stage=stage, quiet=quiet)
    return module


def peak_bytes(prepared: Prepared, settings: TrainingSettings, seed: int) -> int:
    """Peak bytes of live tensors in a step, on a copy: parameters, heads, gradients, states, batch and activations."""
    net = copy.deepcopy(prepared.net).train()
    if isinstance(prepared.net, LocalNet) and isinstance(net, LocalNet):
        for mine, theirs in zip(prepared.net.segments, net.segments, strict=True):
            theirs.checkpointing = mine.checkpointing
    batch = next(iter(DataLoader(prepared.data.plain, batch_size=settings.batch_size)))
    optimizers = make_optimizers(net, partial(optimizer_of, settings.optimizer))
    sgr = dataclasses.replace(prepared.sgr, ramp=0.0)
    options = StepOptions(seed=seed, accumulate=prepared.accumulate)
    inputs, labels = batch
    train_step(net, inputs, labels, optimizers, sgr, options)
    with MemoryProbe(net, optimizers, batch) as probe:
        train_step(net, inputs, labels, optimizers, sgr, options)
    return probe.peak_bytes


def train_arm(
    settings: TrainingSettings,
    method: Method,
    data: Data,
    seed: int,
    *,
    feedback: str = "transpose",
    quiet: bool = True,
) -> dict[str, float]:
    """Train one arm and measure it on the test data, once, at the end."""
    seed_everything(seed, choose_device(settings.device))
    prepared = prepare(settings, method, data, seed, feedback=feedback)
    peak = peak_bytes(prepared, settings, seed)
    start = time.perf_counter()
    module = run_training(settings, prepared, seed, None, quiet=quiet)
    seconds = time.perf_counter() - start
    found = test(module.net, settings, data)
    return found | {"peak MiB": peak / 2**20, "seconds": seconds, "k": module.net.k}


def test(net: Net, settings: TrainingSettings, data: Data) -> dict[str, float]:
    """Measure a net on the test data."""
    device = choose_device(settings.device)
    return evaluate(net.to(device), DataLoader(data.test, batch_size=max(settings.batch_size, 128)), device)


def save_backbone(net: Net, run: Run, settings: TrainingSettings, method: str, version: str) -> None:
    """The model's weights under its own key names, and the local heads beside them."""
    backbone = net.model if isinstance(net, LocalNet) else net
    header: dict[str, Any] = {"version": version, "config": {"model": settings.model, "method": method}}
    checkpoints.save(run.own(BACKBONE), backbone.state_dict(), method="localrecon.backbone", **header)
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.save(run.own(HEADS), net.heads.state_dict(), method="localrecon.heads", **header)


def load_run(folder: Path, data: str | None, device: str) -> tuple[Net, TrainingSettings, Data, str]:
    """The net of a finished training, its settings, its data (or others of the same form), and its method.

    Raises:
        UserError: the folder is no finished run of ``localrecon train``, or the data have another form.
    """
    settings, method, feedback, plan = read_run(folder)
    settings = dataclasses.replace(settings, device=cast("Any", device), augment="none", data=data or settings.data)
    found = load_data(settings)
    prepared = prepare(settings, method, found, settings.seed, feedback=feedback, plan=plan)
    net = prepared.net
    backbone = net.model if isinstance(net, LocalNet) else net
    checkpoints.load_into(backbone, folder / BACKBONE, method="localrecon.backbone")
    if isinstance(net, LocalNet) and len(net.heads):
        checkpoints.load_into(net.heads, folder / HEADS, method="localrecon.heads")
    return net.eval(), settings, found, method


def read_run(folder: Path) -> tuple[TrainingSettings, Method, str, str]:
    """Settings, method, feedback and plan of a training's folder."""
    import yaml

    if not (folder / BACKBONE).is_file():
        raise UserError(f"{folder}: expected the folder of a finished `localrecon train`, found no {BACKBONE}")
    try:
        values: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        method, feedback = values.pop("method"), values.pop("feedback")
        nested = {"head": HeadSpec, "sgr": SGRConfig, "optimizer": OptimizerSettings}
        parts: dict[str, Any] = {name: kind(**values.pop(name)) for name, kind in nested.items()}
        settings = TrainingSettings(**values, **parts)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not the settings of `localrecon train` ({error})") from error
    plan = folder / "plan.json"
    return settings, method, feedback, plan.read_text(encoding="utf-8") if plan.is_file() else ""


@torch.no_grad()
def early_exit(net: LocalNet, threshold: float, loader: Any, device: str) -> dict[str, float]:
    """Accuracy with early exits, and the mean share of the modules' computation that was done."""
    leave = EarlyExit(net, threshold)
    flops = [sum(net.plan.flops[a:b]) for a, b in net.plan.ranges]
    done = torch.tensor(flops, dtype=torch.float64).cumsum(0) / max(1, sum(flops))
    right, total, spent = 0.0, 0, 0.0
    for inputs, labels in loader:
        logits, exits = leave(inputs.to(device))
        right += float((logits.argmax(dim=1).cpu() == labels).sum())
        spent += float(done[exits.cpu()].sum())
        total += len(labels)
    return {"accuracy with early exits": 100 * right / total, "share of the computation": spent / total}


def train(settings: TrainSettings, run: Run, *, quiet: bool = False) -> dict[str, float]:
    """``localrecon train``: writes weights, heads, plan, metrics, figure, report and summary; exactly resumable."""
    from localrecon import __version__

    seed = settings.seed
    seed_everything(seed, choose_device(settings.device))
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainingSettings)}
    plain = TrainingSettings(**fields)
    data = load_data(plain)
    known = run.path / "plan.json"
    plan = known.read_text(encoding="utf-8") if run.resumed and known.is_file() else ""
    prepared = prepare(plain, settings.method, data, seed, feedback=settings.feedback, plan=plan)
    if isinstance(prepared.net, LocalNet) and not plan:
        run.write_text("plan.json", prepared.net.plan.to_json() + "\n")
    module = run_training(plain, prepared, seed, run, quiet=quiet)
    found = test(module.net, plain, data)
    if isinstance(module.net, LocalNet) and module.net.plan.predicted_peak:
        found["predicted peak MiB"] = module.net.plan.predicted_peak / 2**20
    save_backbone(module.net, run, plain, settings.method, __version__)
    run.write_json("config.json", {"model": settings.model, "method": settings.method, "classes": list(data.classes)})
    study = _study(run, "train", data, [seed])
    study.over_arms({settings.method: lambda seed: found})
    study.finish()
    captions = {"losses": "Local loss of each module, and how far neighbors agree."} if _draw_metrics(run) else {}
    write_report(run, f"localrecon: {settings.model} on {settings.data}", captions)
    return found


def _study(run: Run, command: str, data: Data, seeds: Sequence[int]) -> Study:
    from localrecon import __version__

    head: dict[str, Any] = {"package": "localrecon", "version": __version__, "command": command, "data": data.source}
    return Study(run, level="full", seeds=seeds, **head)


def _draw_metrics(run: Run) -> bool:
    """Loss of each module and cosine at each boundary, over the steps; False where nothing was logged."""
    path = run.path / "metrics.csv"
    if not path.exists():
        return False
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    panels = []
    for title, label, prefix, suffix in (
        ("modules", "local loss", "m", "/loss"),
        ("boundaries", "cosine", "b", "/cos"),
    ):
        curves = {}
        for name in rows[0] if rows else ():
            if name.startswith(prefix) and name.endswith(suffix):
                points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
                curves[f"{'module' if prefix == 'm' else 'boundary'} {name[1:].partition('/')[0]}"] = Curve(
                    [x for x, _ in points], [y for _, y in points]
                )
        if curves:
            panels.append(Panel(title, "step", label, curves))
    if panels:
        line_chart(run.own("figures/losses.png"), panels)
    return bool(panels)


def arms_of(settings: CompareSettings) -> dict[str, tuple[Method, TrainingSettings]]:
    """Name of each arm -> its method and settings: local and sgr once for each number of modules."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(TrainingSettings)}
    plain = TrainingSettings(**fields)
    arms: dict[str, tuple[Method, TrainingSettings]] = {}
    for method in settings.methods:
        if method not in {"local", "sgr"}:
            arms[method] = (method, plain)
            continue
        for k in settings.ks or [settings.k]:
            arms[f"{method}-k{k}"] = (method, dataclasses.replace(plain, k=k))
    return arms


def compare(settings: CompareSettings, run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """``localrecon compare``: every arm on every seed, at equal epochs; the test data are looked at once, at the end."""
    arms = arms_of(settings)
    data = load_data(next(iter(arms.values()))[1])
    study = _study(run, "compare", data, settings.seeds)

    def measure(method: Method, how: TrainingSettings, seed: int) -> Mapping[str, float]:
        found = train_arm(how, method, data, seed, feedback=settings.feedback, quiet=quiet)
        return {name: value for name, value in found.items() if name in MEASURED}

    study.over_arms({name: partial(measure, method, how) for name, (method, how) in arms.items()})
    _decide(study, arms)
    study.note(
        "peak MiB is counted in one step on a copy (parameters, heads, gradients, optimizer states, batch, activations); "
        "seconds are those of the training with one process, on whatever else the machine was doing."
    )
    accuracies = {name: study.values((name, "accuracy")).tolist() for name in arms}
    arm_chart(run.own("figures/accuracy.png"), accuracies, xlabel="test accuracy (%)")
    peaks = {name: study.values((name, "peak MiB")).tolist() for name in arms}
    arm_chart(run.own("figures/memory.png"), peaks, xlabel="peak of live tensors in a step (MiB)")
    summary = study.finish()
    captions = {"accuracy": "Test accuracy of each arm.", "memory": "Peak bytes of live tensors in a training step."}
    write_report(run, f"localrecon: {settings.model} on {settings.data}, methods compared", captions)
    return summary


MEASURED = ("accuracy", "loss", "bits", "peak MiB", "seconds")


def _decide(study: Study, arms: Mapping[str, Any]) -> None:
    for name in arms:
        plain = name.replace("sgr", "local")
        if name.startswith("sgr") and plain in arms:
            text = f"accuracy (points) of {name} minus {plain}"
            study.difference(f"{name}_accuracy", text, (name, "accuracy"), (plain, "accuracy"), required=">= 0")
        for whole in ("bp", "ckpt"):
            if name.startswith("sgr") and whole in arms:
                bound = "<= 0.5" if whole == "bp" else "<= 1.1"
                ours, theirs = (float(study.values((arm, "peak MiB")).mean()) for arm in (name, whole))
                study.claim(
                    f"{name}_{whole}_peak",
                    f"peak bytes of {name} / {whole}",
                    "ratio",
                    ours / theirs,
                    None,
                    method="counted, the same on every seed",
                    required=bound,
                )


def rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of the arms."""
    arms = summary["arms"]
    names = list(next(iter(arms.values())))
    cells = [[arm, *(interval(*mean_ci95(values[name])) for name in names)] for arm, values in arms.items()]
    return ["arm", *names], cells
