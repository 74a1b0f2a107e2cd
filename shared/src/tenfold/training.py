"""Training with Lightning that can be killed at any moment and resumed, and then ends with the same bits.

A run repeats itself when three things do: the data (order and augmentation are keyed by seed, epoch and index, in
``KeyedLoader``), the state (``checkpoints/last.ckpt`` holds weights, optimizer, schedulers, callbacks, loop position
and random states) and the place where the state is taken: between two steps, after everything that belongs to the
earlier one (validation too) and before the next batch is asked for. ``KeyedLoader`` sees that moment in every version
of Lightning, so ``fit`` does its bookkeeping there.
"""

import contextlib
import logging
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tenfold import distributed
from tenfold.config import TrainerConfig
from tenfold.devices import choose_device, choose_precision, seed_everything
from tenfold.errors import MissingExtraError, NonFiniteError, UserError
from tenfold.loading import KeyedLoader
from tenfold.randomness import key
from tenfold.runs import Metrics, Run, plain
from tenfold.terminal import track

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise MissingExtraError('training needs Lightning: pip install "tenfold[lightning]"') from error
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor


class _Interrupted(BaseException):
    """Passes through Lightning, which would turn a KeyboardInterrupt into exit code 1."""


def fit(
    module: pl.LightningModule,
    train: KeyedLoader | Mapping[str, KeyedLoader],
    config: TrainerConfig,
    run: Run | None = None,
    *,
    seed: int = 0,
    validate: Any = None,
    callbacks: Sequence[pl.Callback] = (),
    stage: str = "",
    quiet: bool = False,
) -> pl.Trainer:
    """Train ``module``; with a run folder, write ``metrics.csv`` and checkpoints there, and continue an unfinished run.

    Killed at any moment and called again in the resumed run, it ends on a CPU with the same weights and the same
    ``metrics.csv``, bit for bit, as an unbroken run (same machine and number of threads). For that, call
    ``seed_everything`` before building the module; the rest is done here. A checkpoint is written every
    ``config.checkpoint_every`` steps, at the end, and on Ctrl-C (a second Ctrl-C stops at once, without one).

    ``metrics.csv`` holds what the module logs in a training step (of every ``log_every``-th step, the last of the
    accumulated batches), in validation and in ``on_train_epoch_end``, besides the epoch and the learning rate (of the
    first group).

    What a module must do for it: keep what it learns or counts in parameters, buffers or a callback's ``state_dict``
    (plain tensors, numbers, strings, lists, dicts), since attributes are not saved and ``on_train_epoch_start`` is not
    called again when a run resumes within its epoch. Hyper-parameters are not in the checkpoint; ``config.yaml`` has
    them. On several devices the random states of rank 0 alone are saved, the others start from keyed ones: such runs
    resume, not bit for bit. Manual optimization: a step here is a batch; ``steps`` counts calls of an optimizer.

    Args:
        module: with its optimizers and schedulers from ``configure_optimizers``.
        train: a loader, or loaders of equal length by name, whose batches come together in a dict.
        config: settings.
        run: the run folder; None writes nothing.
        seed: seed of what is drawn outside of the loaders, such as dropout.
        validate: a ``DataLoader`` or several, for ``validation_step``.
        callbacks: of Lightning.
        stage: name of this training when a run has several one after another; its files are then
            ``metrics.STAGE.csv`` and ``checkpoints/STAGE.ckpt``, and a resumed run passes quickly over finished ones.
        quiet: no progress on stderr.

    Returns:
        The trainer, for its ``callback_metrics``. The module holds the weights of the last step.

    Raises:
        NonFiniteError: the loss or a gradient is NaN or infinite; the message says at which step and where.
        UserError: device or precision is not available, or the checkpoint cannot be read.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is whole.
    """
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    loaders = [train] if isinstance(train, KeyedLoader) else list(train.values())
    if len({len(loader) for loader in loaders}) > 1:
        raise ValueError(f"loaders of {[len(loader) for loader in loaders]} batches: give them the same 'batches'")
    if loaders[0].batches < config.devices:
        found = loaders[0].batches
        raise UserError(f"the data fill {found} of {config.devices} batches, one per device: lower the batch size")
    keeper = _Keeper(config, run, loaders, stage, seed, quiet)
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator="gpu" if device == "cuda" else device,
            devices=config.devices,
            strategy=config.strategy,
            precision=precision,
            max_epochs=-1 if config.epochs is None else config.epochs,
            max_steps=-1 if config.steps is None else config.steps,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip_norm,
            log_every_n_steps=config.log_every,
            val_check_interval=config.validate_every * config.accumulate or 1.0,
            check_val_every_n_epoch=None if config.validate_every else 1,
            num_sanity_val_steps=0,
            logger=_RunLogger(keeper),
            callbacks=[keeper, *callbacks],
            plugins=[_RunCheckpointIO(run)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=None if run is None else run.path,
        )
        checkpoint = None if run is None else run.path / keeper.checkpoint_name
        resume = checkpoint is not None and checkpoint.exists()
        if run is not None and resume and not run.resumed:
            raise ValueError(f"{checkpoint} exists: another training of this run needs another stage")
        if keeper.metrics is not None and run is not None and run.resumed and not resume and trainer.is_global_zero:
            keeper.metrics.cut_after(-1)  # killed before the first checkpoint
        seed_everything(seed, device)
        loaders[0].between_steps = keeper.between_steps
        together = train if isinstance(train, KeyedLoader) else CombinedLoader(dict(train), mode="min_size")
        try:
            with keeper.catching_interrupt():
                trainer.fit(module, together, validate, ckpt_path=checkpoint if resume else None)
                keeper.restore(trainer)  # when nothing was left to do
                if not keeper.done:
                    keeper.done = True
                    keeper.save(trainer)
        except _Interrupted:
            raise KeyboardInterrupt from None
        finally:
            loaders[0].between_steps = lambda: None
            keeper.close()
    if keeper.interrupted:
        raise KeyboardInterrupt
    return trainer


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's advertisements and the hints that ``fit`` has made obsolete."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            hints = "is not resumable|many workers|logging interval|have no `val_data|LeafSpec"
            warnings.filterwarnings("ignore", message=f"(?s).*({hints})")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _RunLogger(Logger):
    """Hands what Lightning logs to ``metrics.csv``."""

    def __init__(self, keeper: "_Keeper") -> None:
        super().__init__()
        self.keeper = keeper

    name = version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row a step, by our count of steps."""
        if self.keeper.metrics is not None and distributed.rank() == 0:
            rate = {} if self.keeper.learning_rate is None else {"lr": self.keeper.learning_rate}
            self.keeper.metrics.log(self.keeper.step, {**metrics, **rate})


class _RunCheckpointIO(CheckpointIO):
    """Checkpoints that appear whole or not at all, and that nothing is unpickled from."""

    def __init__(self, run: Run | None) -> None:
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert self.run is not None
        name = Path(path).relative_to(self.run.path).as_posix()
        with self.run.replacing(name) as temporary:
            torch.save(checkpoint, temporary)
            try:
                torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                kind = re.search(r"GLOBAL (\S+)", str(error))
                raise TypeError(
                    f"a state_dict holds {kind[1] if kind else 'an object'}, which only unpickling could read: keep"
                    " tensors, numbers, strings, lists and dicts in the states of modules and callbacks"
                ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{path} cannot be read as a checkpoint: --overwrite starts anew") from error
        if "tenfold" not in checkpoint:
            raise UserError(f"{path} is a checkpoint of another program: --overwrite starts anew")
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class _Keeper(pl.Callback):
    """Counts steps, saves and restores, stops on Ctrl-C, watches for NaN, shows progress."""

    def __init__(
        self,
        config: TrainerConfig,
        run: Run | None,
        loaders: Sequence[KeyedLoader],
        stage: str,
        seed: int,
        quiet: bool,
    ) -> None:
        self.config = config
        self.seed = seed
        self.run = run
        self.loaders = loaders
        self.quiet = quiet
        self.checkpoint_name = f"checkpoints/{stage or 'last'}.ckpt"
        self.metrics = None if run is None else Metrics(run.own(f"metrics.{stage}.csv" if stage else "metrics.csv"))
        self.description = stage or "train"
        self.step = self.saved = 0  # updates of the weights so far; of the newest checkpoint
        self.between_updates = True  # false when gradients are half accumulated
        self.done = self.interrupted = False
        self.learning_rate: float | None = None
        self.restored: dict[str, Any] | None = None  # to be put back before the next batch
        self.progress: Iterator[int] | None = None
        self.trainer: pl.Trainer | None = None

    # Saving and restoring

    def between_steps(self) -> None:
        """Called before each batch is fetched: everything of the earlier ones is over."""
        trainer = self.trainer
        assert trainer is not None
        self.restore(trainer)
        if self.between_updates and self.step > 0:
            stop = bool(trainer.strategy.reduce_boolean_decision(self.interrupted, all=False))
            if self.step != self.saved and (stop or self.step % self.config.checkpoint_every == 0):
                self.save(trainer)
            if stop:
                raise _Interrupted
        elif self.interrupted and self.step == 0:
            raise _Interrupted

    def restore(self, trainer: pl.Trainer) -> None:
        """Put back what Lightning does not, as late as this, since setting up draws numbers and clears metrics."""
        if self.restored is None:
            return
        _restore_random_states(self.restored["random_states"], self.seed, self.step)
        trainer.callback_metrics.update(self.restored["callback_metrics"])
        trainer.fit_loop._restarting = False  # else ReduceLROnPlateau would sit out the rest of this epoch
        self.restored = None

    def save(self, trainer: pl.Trainer) -> None:
        """Write rows and checkpoint; the rows first, since resuming can drop some but not find them again."""
        if self.run is None or self.metrics is None:
            return
        if trainer.is_global_zero:
            self.metrics.flush()
        trainer.save_checkpoint(self.run.path / self.checkpoint_name)
        self.saved = self.step

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self.run is not None
        checkpoint.pop("hyper_parameters", None)
        position = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        checkpoint["tenfold"] = {
            "step": self.step,
            "done": self.done,
            "epoch": trainer.current_epoch,
            "batches": position,  # of this epoch
            "random_states": _random_states(),
            "callback_metrics": dict(trainer.callback_metrics),  # schedulers and early stopping monitor them
            "settings": plain(self.run.settings),
        }
        if not self.done:
            # Lightning restarts most simply from what it saves itself within on_train_batch_end, where the last batch
            # does not count as completed yet; from a state between two batches it would skip or repeat a validation.
            loops = checkpoint["loops"]["fit_loop"]
            for part in ("total", "current"):
                loops["epoch_loop.batch_progress"][part]["completed"] -= 1
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["tenfold"]
        self.step = self.saved = state["step"]
        self.done = state["done"]
        self.restored = state
        for loader in self.loaders:
            loader.seek(state["epoch"], state["batches"])
        if self.metrics is not None and trainer.is_global_zero:
            self.metrics.cut_after(self.step)
        if self.done:  # also when a callback had ended it early
            trainer.should_stop = True

    # The course of a training

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.trainer = trainer
        for loader in self.loaders:
            loader.seek(0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches) - self.step
        shown = trainer.is_global_zero and not self.quiet
        self.progress = iter(track(range(total), self.description, total, quiet=not shown))
        next(self.progress, None)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for loader in self.loaders:
            loader.seek(trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *batch: Any) -> None:
        count = trainer.fit_loop.batch_idx + 1
        self.between_updates = count % self.config.accumulate == 0 or count == trainer.num_training_batches
        if self.between_updates:
            self.step += 1
            if self.progress is not None:
                next(self.progress, None)
        for metric in trainer.fit_loop.epoch_loop._results.values():
            if metric.meta.on_epoch and metric.meta.fx != "on_train_epoch_end":
                raise ValueError(
                    f"{metric.meta.fx} logs '{metric.meta.name}' with on_epoch=True; a run that resumes within an epoch"
                    " could not repeat that mean: log it per step, or in on_train_epoch_end from a buffer"
                )

    def close(self) -> None:
        """Take the progress bar away."""
        if self.progress is not None:
            self.progress.close()  # type: ignore[attr-defined]  # track is a generator

    # Faults

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        if bool(torch.isfinite(loss).all()):
            return
        logged = [name for name, value in trainer.callback_metrics.items() if not bool(torch.isfinite(value).all())]
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        bad = next((n for n, w in weights.items() if w.is_floating_point() and not bool(torch.isfinite(w).all())), None)
        raise NonFiniteError(
            f"step {self.step + 1}: the loss is {float(loss.detach().sum())}"
            + (f"; not finite among the logged values: {', '.join(logged)}" if logged else "")
            + (f"; first weight that is not finite: {bad}" if bad else "; all weights are finite")
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # half precision: its scaler skips such steps
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None and not p.grad.is_sparse}
        if math.isfinite(torch.nn.utils.get_total_norm(list(grads.values()))):
            return
        bad = next((name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())), None)
        if bad:
            raise NonFiniteError(
                f"step {self.step + 1}: the loss is finite, but its gradient is not; first such layer: {bad}"
            )

    @contextlib.contextmanager
    def catching_interrupt(self) -> Iterator[None]:
        """Ctrl-C asks for a stop between two steps; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def on_interrupt(number: int, frame: FrameType | None) -> None:
            if os.getpid() != process:
                return
            if self.interrupted:
                raise _Interrupted
            self.interrupted = True
            if not self.quiet:
                sys.stderr.write("finishing the step and writing the checkpoint; Ctrl-C again stops at once\n")

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _random_states() -> dict[str, Any]:
    """The states of all global generators, of plain types."""
    version, numbers, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(states: Mapping[str, Any], seed: int, step: int) -> None:
    if distributed.rank() > 0:
        torch.manual_seed(key(seed, step, distributed.rank()))
        return
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, words, *rest = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
