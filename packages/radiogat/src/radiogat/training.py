"""The tasks in Lightning: one batch is the number of a step, and the module's loss is the task's."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from radiogat.tasks import Task
from tenfold.loading import KeyedLoader


class RadioGATModule(pl.LightningModule):
    """A ``BlockTask`` (RadioGAT) or ``NeighborTask`` (RadioGATx) as a LightningModule.

    Trained by ``tenfold.training.fit`` or any ``lightning.Trainer`` with the loader of ``RadioMapDataModule``, it ends with
    the same weights as ``run_task``, bit for bit on one CPU, and resumes to them.

    Args:
        task: what to train.

    Example:
        >>> from radiogat import CityConfig, RadioGATxConfig, city
        >>> from radiogat.tasks import NeighborTask
        >>> truth = city(CityConfig(size=40, freq_mhz=(1750.0,)))
        >>> samples = truth.samples(truth.draw(rate=0.2, seed=0))
        >>> module = RadioGATModule(NeighborTask(samples, truth.scene, RadioGATxConfig(steps=5)))
        >>> module.training_step(torch.tensor([0]), 0).shape
        torch.Size([])
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.network = task.network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of the step whose number the batch holds."""
        loss = self.task.loss(int(batch[0]))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """The task's optimizer and schedule."""
        optimizer = self.task.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.task.rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Steps(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class RadioMapDataModule(pl.LightningDataModule):
    """The numbers 0 to ``task.steps`` in order, one a batch: the task draws its own data from them.

    Args:
        task: what to train.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def train_dataloader(self) -> KeyedLoader:
        """For a trainer of one epoch."""
        steps = self.task.steps
        return KeyedLoader(_Steps(steps), order=lambda generator: [[step] for step in range(steps)])
