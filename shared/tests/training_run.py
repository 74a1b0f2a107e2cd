"""The training that the tests kill: a module with all that makes exact resuming hard, run in a process of its own."""

import multiprocessing
import os
import random
import signal
import sys
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tenfold import checkpoints
from tenfold.config import TrainerConfig
from tenfold.devices import seed_everything
from tenfold.loading import KeyedLoader
from tenfold.runs import Run
from tenfold.training import fit


class Points:
    """Points on a plane, labeled by the side of a curve; each draw adds noise from three sources."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        angle = 0.7 * index
        x = torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32) * (1 + index % 3)
        noise = torch.randn(2) + random.gauss(0, 1) + torch.from_numpy(np.random.normal(size=2)).float()
        return x + 0.1 * noise, int(np.sin(2 * angle) > 0)


class Net(pl.LightningModule):
    def __init__(self, learning_rate=0.02):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x + 0.05 * torch.randn_like(x) if self.training else x), y  # augmentation of whole batches

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.layers(x), y)
        self.log("loss", loss)
        self.log("index", float(batch_idx))
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * torch.randn_like(x)  # validation draws from the global state too
        logits = self.layers(x)
        self.log_dict({"val_loss": F.cross_entropy(logits, y), "val_top1": (logits.argmax(1) == y).float().mean()})

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0)
        return [optimizer], [
            {"scheduler": schedule, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "val_loss"},
        ]


class Average(pl.Callback):
    """Exponential average of the weights, which takes their place at the end."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, module, *batch):
        for name, value in module.state_dict().items():
            self.weights[name] = 0.9 * self.weights[name] + 0.1 * value if name in self.weights else value.clone()

    def on_train_end(self, trainer, module):
        module.load_state_dict({name: self.weights[name].to(v.dtype) for name, v in module.state_dict().items()})

    def state_dict(self):
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state):
        self.weights = state["weights"]


class Progress(pl.Callback):
    """Tells a pipe how many batches this process has begun, and waits for the answer."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.batches = 0

    def on_train_batch_start(self, *batch):
        self.batches += 1
        self.pipe.send(self.batches)
        self.pipe.recv()


class InterruptAt(pl.Callback):
    """Ctrl-C in the middle of a batch."""

    def __init__(self, batch):
        self.left = batch

    def on_before_backward(self, *step):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def die_in_save(number):
    """Die by SIGKILL in the ``number``-th checkpoint, when the first half of the file is written."""
    whole, left = torch.save, number

    def half(checkpoint, path):
        nonlocal left
        left -= 1
        whole(checkpoint, path)
        if left == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


@dataclass(frozen=True)
class Setup:
    """What a run trains: settings, and how many workers read the data."""

    config: TrainerConfig
    num_workers: int = 0


def train(path, setup, callbacks=(), fitted=lambda: None, resume=True):
    """One whole run: fit and export; called again on the same folder, it resumes."""
    settings = replace(setup, num_workers=0)  # changes nothing but the speed
    seed_everything(0)
    module = Net()
    loader = KeyedLoader(Points(), batch_size=6, num_workers=setup.num_workers)
    points = [Points()[i] for i in range(10)]
    validate = torch.utils.data.DataLoader(points, batch_size=5)
    with Run.open(path, package="tenfold", verb="train", settings=settings, resume=resume) as run:
        trainer = fit(
            module, loader, setup.config, run, validate=validate, callbacks=[Average(), *callbacks], quiet=True
        )
        fitted()
        weights = run.own("model.safetensors")
        checkpoints.save(weights, module.state_dict(), method="tenfold.test", config=setup.config)
        run.finish()
    return trainer


def train_in_process(path, setup, pipe, dies_in_save=0):
    """The target of a process; the parent answers ``pipe``, or kills."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers: quick, and at home in a test
    if dies_in_save:
        die_in_save(dies_in_save)
    train(path, setup, [Progress(pipe)], fitted=lambda: (pipe.send("fitted"), pipe.recv()))


if __name__ == "__main__":  # as Lightning's launcher wants it: the processes of further devices run the same command
    torch.set_num_threads(1)
    two = TrainerConfig(epochs=2, log_every=1, device="cpu", devices=2, strategy="ddp", precision="32")
    train(sys.argv[1], Setup(two), resume=False)
