"""Training and testing of one arm: what ``train``, ``compare`` and ``evaluate`` share."""

from functools import partial

from torch.utils.data import DataLoader

from localrecon.arms import Arm
from localrecon.config import RecordSettings, TrainingSettings
from localrecon.data import Data, mixing, split_validation
from localrecon.evaluation import evaluate
from localrecon.net import LocalNet
from localrecon.optimizers import Net, optimizer_of, scheduler_of
from localrecon.training import LocalReconModule
from tenfold.runs import Run
from tenfold.training import KeyedLoader, TrainerConfig, choose_device, choose_precision, fit


def train_arm(
    arm: Arm,
    settings: TrainingSettings,
    data: Data,
    seed: int,
    run: Run | None = None,
    record: RecordSettings | None = None,
    *,
    quiet: bool = False,
) -> None:
    """Train an arm's net to its end; with a run folder, exactly resumable.

    Args:
        arm: the arm; its net is trained in place.
        settings: settings of the training.
        data: the data.
        seed: seed of order, augmentation and dropout.
        run: the run folder; None writes nothing.
        record: what is written on the way, and the share of the data that is held out for validation.
        quiet: no progress on stderr.
    """
    record = record or RecordSettings()
    train, held = split_validation(data, record.validation, seed)
    loader = KeyedLoader(train, batch_size=settings.batch_size, seed=seed, num_workers=settings.workers)
    total = settings.epochs * (len(loader) // settings.devices)
    module = LocalReconModule(
        arm.net,
        arm.sgr,
        partial(optimizer_of, settings.optimizer),
        partial(scheduler_of, settings.optimizer, total),
        seed=seed,
        total_steps=total,
        accumulate=arm.accumulate,
        clip_norm=settings.clip_norm,
        precision=choose_precision(settings.precision, choose_device(settings.device)),
        batch_transform=mixing(settings, data.form.classes),
    )
    if settings.compile and isinstance(arm.net, LocalNet):
        arm.net.compile_segments()
    config = TrainerConfig(
        max_epochs=settings.epochs,
        checkpoint_every=record.checkpoint_every,
        log_every=record.log_every,
        seed=seed,
        device=settings.device,
        devices=settings.devices,
        precision="32",
        strategy="localrecon_ddp" if settings.devices > 1 or settings.strategy == "ddp" else "auto",
    )
    validate = None if held is None else DataLoader(held, batch_size=settings.batch_size)
    fit(module, loader, config, run, validate=validate, quiet=quiet)


def on_test_data(net: Net, data: Data, batch_size: int, device: str) -> dict[str, float]:
    """Accuracy and loss of a net on the test data."""
    return evaluate(net.to(device), DataLoader(data.test, batch_size=max(batch_size, 128)), device)
