"""A tiny Stable unCLIP that a CPU trains in a minute, saved as an ordinary folder of diffusers.

``train_tiny`` learns from unlabeled pictures of the user's own: a CLIP-like image encoder by contrasting crops (or one that
is handed in), and a denoiser of patches. Shapes: N images of S x S pixels, D entries of an embedding.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.pipelines.stable_diffusion import StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from genview.generators import UnCLIPGenerator, noised, quietly
from genview.losses import QDNTXentLoss
from genview.patches import ConvEncoder, PatchVAE
from genview.sketch import SketchUNet
from tenfold.randomness import generator

LOW = 100
"""Largest level at which residuals beside sketches are measured: more noise blurs a sketch, and the blur would be drawn."""
CONTEXT = 8
"""Width of the empty text that the pipeline hands to the denoiser."""


@dataclass(frozen=True)
class TinySize:
    """How large the parts are.

    Attributes:
        image: side of a picture in pixels.
        embedding: D.
        width: channels of the encoder's tokens, of which there is one per 2 x 2 pixels.
        channels: channels of the denoiser at each resolution.
        hidden: width of the layers that lay a condition out as a sketch.
    """

    image: int = 16
    embedding: int = 32
    width: int = 64
    channels: tuple[int, ...] = (32, 64)
    hidden: int = 256


def build_encoder(size: TinySize, seed: int = 0) -> ConvEncoder:
    """An image encoder with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvEncoder(size.image, size.width, size.embedding).eval()


def build_tiny_unclip(
    size: TinySize | None = None, *, encoder: Any = None, seed: int = 0
) -> StableUnCLIPImg2ImgPipeline:
    """The pipeline with random weights.

    Args:
        size: sizes of the parts.
        encoder: an image encoder that is there already.
        seed: seed of the weights.
    """
    size = size or TinySize()
    encoder = encoder or build_encoder(size, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = SketchUNet(
            sample_size=size.image // 2,
            in_channels=12,
            block_out_channels=size.channels,
            cross_attention_dim=CONTEXT,
            projection_class_embeddings_input_dim=2 * encoder.config.projection_dim,
            hidden=size.hidden,
        )
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": size.image}, crop_size=size.image),
        image_encoder=encoder,
        image_normalizer=StableUnCLIPImageNormalizer(encoder.config.projection_dim),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=None,
        text_encoder=None,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", clip_sample=False),
        vae=PatchVAE(),
    )


def save(pipe: Any, folder: str | os.PathLike[str]) -> None:
    """Write the pipeline as a folder that ``UnCLIPGenerator.from_pretrained`` reads."""
    with quietly():
        pipe.save_pretrained(Path(folder), safe_serialization=True)


@torch.no_grad()
def unit_spread(encoder: ConvEncoder, images: Tensor, mean: Tensor, std: Tensor) -> None:
    """Scale the projection so that embeddings of uint8 images spread by about 1, beside the code of the level.

    Contrasting looks at directions alone, so that their length says nothing; a denoiser learns from embeddings of that size
    several times as fast.
    """
    encoder.eval()
    found = [encoder((part.float() / 255 - mean) / std).image_embeds for part in torch.split(images, 512)]
    scale = 1 / torch.cat(found).std(dim=0).mean().clamp_min(1e-6)
    encoder.projection.weight.mul_(scale)
    encoder.projection.bias.mul_(scale)


@dataclass(frozen=True)
class Training:
    """Length and rates of a training.

    Attributes:
        steps: steps of the denoiser.
        batch: pictures per step.
        rate: largest learning rate.
        dropped: share of pictures whose condition is all zeros, for guidance.
        average: decay of the average of weights that is kept.
        most_level: largest noise level that the denoiser learns for; half of the levels are below a quarter of it.
        sketch_steps: steps of the sketch, which come first and cost little.
        sketch_batch: pictures per step of the sketch.
    """

    steps: int = 1500
    batch: int = 32
    rate: float = 2e-3
    dropped: float = 0.1
    average: float = 0.99
    most_level: int = 800
    sketch_steps: int = 1500
    sketch_batch: int = 256


def embed_all(pipe: Any, images: Tensor, batch: int = 512) -> Tensor:
    """Embeddings of uint8 images. Shapes: (N, 3, S, S) -> (N, D)."""
    reader = UnCLIPGenerator(pipe)
    return torch.cat([reader.embed(part.float() / 255) for part in torch.split(images, batch)])


class _Conditions:
    """Draws pictures with their noised embeddings, some of them left out; sets the pipeline's normalizer of embeddings."""

    def __init__(self, pipe: Any, images: Tensor, training: Training, draw: torch.Generator) -> None:
        self.training, self.draw = training, draw
        self.embeddings = embed_all(pipe, images)
        scale = pipe.vae.config.scaling_factor
        self.latents = pipe.vae.encode(images.float() / 127.5 - 1).latents * scale
        self.mean, self.std = self.embeddings.mean(dim=0), self.embeddings.std(dim=0).clamp_min(1e-4)
        self.products = pipe.image_noising_scheduler.alphas_cumprod
        with torch.no_grad():
            pipe.image_normalizer.mean.copy_(self.mean[None])
            pipe.image_normalizer.std.copy_(self.std[None])

    def batch(self, number: int, *, most_level: int | None = None) -> tuple[Tensor, Tensor]:
        """Latents and conditions; none of them is left out where a largest level is given.

        Shapes: -> (number, C, S, S), (number, 2 D).
        """
        t, draw = self.training, self.draw
        index = torch.randint(len(self.latents), (number,), generator=draw)
        most = t.most_level if most_level is None else most_level
        levels = (torch.rand(number, generator=draw).square() * (most + 1)).long()
        noise = torch.randn(number, self.embeddings.shape[1], generator=draw)
        y = noised(self.embeddings[index], levels, noise, self.products, self.mean, self.std)
        left_out = torch.rand(number, 1, generator=draw) < (t.dropped if most_level is None else 0.0)
        return self.latents[index], torch.where(left_out, 0.0, y)


def _rate(step: int, steps: int, most: float, warm: int = 30) -> float:
    """Learning rate of a step: a warm-up, then half a cosine."""
    return most * min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / steps)) / 2


def train_denoiser(
    pipe: Any,
    images: Tensor,
    training: Training | None = None,
    *,
    seed: int = 0,
    show: Callable[[range], Any] = iter,
) -> list[float]:
    """Teach the pipeline's denoiser to draw pictures from their noised embeddings.

        sketch:  L = mean || x - mu(y) ||^2
        U-Net:   L = mean || v - v_theta(x_t, t, y) ||^2,    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x,    y of a random level

    The normalizer of embeddings is set from the pictures. Times of a batch are spread evenly over the schedule. Weights are
    those of the moving average.

    Args:
        pipe: the pipeline; its denoiser and its normalizer change.
        images: uint8 pictures.
        training: length and rates.
        seed: seed of everything that is drawn.
        show: passes the steps of each part through and shows how far they are.

    Shapes: ``images`` (N, 3, S, S) -> losses of the U-Net's steps.
    """
    t = training or Training()
    draw = generator(seed, 1)
    drawn = _Conditions(pipe, images, t, draw)
    unet = pipe.unet.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.layout.parameters(), lr=1.5 * t.rate, fused=True)
    for step in show(range(t.sketch_steps)):
        optimizer.param_groups[0]["lr"] = _rate(step, t.sketch_steps, 1.5 * t.rate)
        x, y = drawn.batch(t.sketch_batch)
        loss = F.mse_loss(unet.sketch(y), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
    x, y = drawn.batch(min(8192, 4 * len(images)), most_level=min(LOW, t.most_level))
    with torch.no_grad():
        unet.fit_residuals(x - unet.sketch(y))
    unet.layout.requires_grad_(False)
    losses = _train_unet(pipe, drawn, t, draw, show)
    unet.requires_grad_(True).eval()
    return losses


def _train_unet(
    pipe: Any, drawn: _Conditions, t: Training, draw: torch.Generator, show: Callable[[range], Any]
) -> list[float]:
    unet, abar = pipe.unet, pipe.scheduler.alphas_cumprod
    learned = [p for p in unet.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in learned]
    optimizer = torch.optim.AdamW(learned, lr=t.rate, weight_decay=1e-3, fused=True)
    context = torch.zeros(t.batch, 1, CONTEXT)
    losses = []
    for step in show(range(t.steps)):
        optimizer.param_groups[0]["lr"] = _rate(step, t.steps, t.rate)
        latents, y = drawn.batch(t.batch)
        times = ((torch.arange(t.batch) + torch.rand(t.batch, generator=draw)) / t.batch * 1000).long().clamp(max=999)
        eps = torch.randn(latents.shape, generator=draw)
        a = abar[times].view(-1, 1, 1, 1)
        x, v = a.sqrt() * latents + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * latents
        loss = F.mse_loss(unet(x, times, context, class_labels=y).sample, v)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        decay = min(t.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(kept, [p.detach() for p in learned], 1 - decay)
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for p, average in zip(learned, kept, strict=True):
            p.copy_(average)
    return losses


def train_encoder(
    encoder: Any,
    images: Tensor,
    pairs: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int = 300,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    show: Callable[[range], Any] = iter,
) -> list[float]:
    """Teach an image encoder by contrasting two views of each picture (SimCLR), for data without captions.

    Args:
        encoder: the encoder; it changes.
        images: uint8 pictures (N, 3, S, S).
        pairs: makes two normalized views of pictures in [0, 1], with a generator of random numbers.
        steps: steps.
        batch: pictures per step.
        rate: largest learning rate.
        seed: seed of what is drawn.
        show: passes the steps through and shows how far they are.

    Returns:
        Losses of the steps.
    """
    encoder.train()
    loss_of = QDNTXentLoss(0.2, gather=False)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw = generator(seed, 2)
    losses = []
    for _ in show(range(steps)):
        index = torch.randint(len(images), (batch,), generator=draw)
        a, b = pairs(images[index].float() / 255, draw)
        out = [encoder(pixel_values=view).image_embeds for view in (a, b)]
        loss = loss_of(*out)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    encoder.eval()
    return losses
