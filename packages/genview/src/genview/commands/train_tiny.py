"""`genview train-tiny`: a small generator of the user's own pictures, as a folder of diffusers."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from genview import augment, tiny
from genview.config import TrainTinySettings, ViewSettings
from genview.data import load, pixels_of
from genview.encoders import CLIP
from tenfold.cli import Invocation
from tenfold.devices import seed_everything
from tenfold.terminal import track

CROPS = ViewSettings(least_area=0.5, jitter=[0.4, 0.4, 0.4, 0.05], jitter_share=0.5, gray=0.1, blur=0.0)
"""Views that the image encoder learns from: mild ones, since its embedding has to keep what a picture looks like."""


def run(settings: TrainTinySettings, invocation: Invocation) -> None:
    """Train the encoder, then the denoiser; write the pipeline."""
    folder = invocation.folder
    seed_everything(settings.seed)
    images = pixels_of(load(settings.data).train, settings.size)
    size = tiny.TinySize(image=settings.size, embedding=settings.embedding, channels=tuple(settings.channels))
    encoder = tiny.build_encoder(size, settings.seed)
    show: Callable[[str], Any] = lambda name: partial(track, description=name, quiet=invocation.quiet)  # noqa: E731
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in CLIP)

    def pairs(batch: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        u = torch.rand(2, len(batch), 20, generator=draw)
        views = [augment.augment(batch, u[s], CROPS, size=settings.size).images for s in (0, 1)]
        return (views[0] - mean) / std, (views[1] - mean) / std

    first = tiny.train_encoder(
        encoder, images, pairs, steps=settings.encoder_steps, seed=settings.seed, show=show("encoder")
    )
    tiny.unit_spread(encoder, images, mean, std)
    pipe = tiny.build_tiny_unclip(size, encoder=encoder, seed=settings.seed)
    training = tiny.Training(
        steps=settings.steps,
        batch=settings.batch_size,
        rate=settings.optimizer.lr,
        sketch_steps=settings.sketch_steps,
    )
    second = tiny.train_denoiser(pipe, images, training, seed=settings.seed, show=show("denoiser"))
    with folder.replacing_folder("generator") as temporary:
        tiny.save(pipe, temporary)
    folder.write_json(
        "training.json", {"encoder_loss": first[-1], "denoiser_loss": sum(second[-50:]) / len(second[-50:])}
    )
    sys.stdout.write(
        f"generator of {settings.size} x {settings.size} pictures in {folder.path / 'generator'}: loss of the encoder"
        f" {first[-1]:.3f}, of the denoiser {second[-1]:.3f}\n"
    )
