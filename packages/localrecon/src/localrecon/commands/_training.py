"""Training and testing of one arm: what ``train``, ``compare`` and ``evaluate`` share."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from localrecon.arms import Arm
from localrecon.boundary import StepOptions
from localrecon.config import RecordSettings, TrainingSettings
from localrecon.data import Data, load_data, mixing, split_validation
from localrecon.evaluation import evaluate
from localrecon.net import LocalNet
from localrecon.optimizers import Net, optimizer_of, scheduler_of
from localrecon.training import LocalReconModule
from tenfold.config import TrainerConfig
from tenfold.devices import choose_device, choose_precision
from tenfold.loading import KeyedLoader
from tenfold.runs import Run
from tenfold.training import fit

_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def checked_data(settings: TrainingSettings) -> Data:
    """The data of a training, after what is cheaper to check.

    Raises:
        UserError: device, precision, augmentation or data do not go together here.
    """
    choose_precision(settings.precision, choose_device(settings.device))
    data = load_data(settings, settings)
    mixing(settings, data.form)
    return data


@dataclass(frozen=True)
class Training:
    """A training that is ready to begin."""

    module: LocalReconModule
    loader: KeyedLoader
    held: Any
    config: TrainerConfig
    seed: int

    def fit(self, run: Run | None = None, *, quiet: bool = False) -> None:
        """Train the arm's net in place; with a run folder, exactly resumable."""
        fit(self.module, self.loader, self.config, run, seed=self.seed, validate=self.held, quiet=quiet)


def training_of(
    arm: Arm, settings: TrainingSettings, data: Data, seed: int, record: RecordSettings | None = None
) -> Training:
    """The training of an arm.

    Args:
        arm: the arm.
        settings: settings of the training.
        data: the data.
        seed: seed of order, augmentation and dropout.
        record: what is written on the way, and the share of the data that is held out; default: nothing is held out.

    Raises:
        UserError: the data do not fill a batch, or the settings do not go with them.
    """
    record = record or RecordSettings()
    train, held = split_validation(data, record.validation, seed)
    loader = KeyedLoader(train, batch_size=settings.batch_size, seed=seed, num_workers=settings.workers)
    total = settings.epochs * (loader.batches // settings.devices)
    module = LocalReconModule(
        arm.net,
        arm.sgr,
        partial(optimizer_of, settings.optimizer),
        partial(scheduler_of, settings.optimizer, total),
        StepOptions(
            total_steps=total,
            seed=seed,
            accumulate=arm.accumulate,
            clip_norm=settings.clip_norm,
            dtype=_DTYPES[choose_precision(settings.precision, choose_device(settings.device))],
        ),
        batch_transform=mixing(settings, data.form),
    )
    if settings.compile and isinstance(arm.net, LocalNet):
        arm.net.compile_segments()
    config = TrainerConfig(
        epochs=settings.epochs,
        checkpoint_every=record.checkpoint_every,
        log_every=record.log_every,
        validate_every=record.validate_every,
        device=settings.device,
        devices=settings.devices,
        precision="32",  # the module's own: see its arguments
        strategy="localrecon_ddp" if settings.devices > 1 or settings.strategy == "ddp" else "auto",
    )
    validate = None if held is None else DataLoader(held, batch_size=settings.batch_size)
    return Training(module, loader, validate, config, seed)


def on_test_data(net: Net, data: Data, batch_size: int, device: str) -> dict[str, float]:
    """Accuracy and loss of a net on the test data."""
    return evaluate(net.to(device), DataLoader(data.test, batch_size=max(batch_size, 128)), device)
