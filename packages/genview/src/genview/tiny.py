"""A tiny Stable unCLIP that a CPU trains in a minute, saved as an ordinary folder of diffusers.

``train_tiny`` learns from unlabeled pictures of the user's own: a CLIP-like image encoder by contrasting crops (or one that
is handed in), and a denoiser of patches. Shapes: N images of S x S pixels, D entries of an embedding.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from genview.generators import UnCLIPGenerator, noised, quietly
from genview.losses import QDNTXentLoss
from genview.patches import ConvEncoder, PatchVAE
from tenfold.randomness import generator

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
    """

    image: int = 16
    embedding: int = 32
    width: int = 64
    channels: tuple[int, ...] = (32, 64)


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
    depth = len(size.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=size.image // 2,
            in_channels=12,
            out_channels=12,
            down_block_types=("DownBlock2D",) * depth,
            up_block_types=("UpBlock2D",) * depth,
            mid_block_type="UNetMidBlock2D",
            block_out_channels=size.channels,
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=CONTEXT,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * encoder.config.projection_dim,
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
        most_level: largest noise level that the denoiser learns for.
    """

    steps: int = 1500
    batch: int = 64
    rate: float = 2e-3
    dropped: float = 0.1
    average: float = 0.995
    most_level: int = 999


def embed_all(pipe: Any, images: Tensor, batch: int = 512) -> Tensor:
    """Embeddings of uint8 images. Shapes: (N, 3, S, S) -> (N, D)."""
    reader = UnCLIPGenerator(pipe)
    return torch.cat([reader.embed(part.float() / 255) for part in torch.split(images, batch)])


def train_denoiser(
    pipe: Any,
    images: Tensor,
    training: Training | None = None,
    *,
    seed: int = 0,
    show: Callable[[range], Any] = iter,
) -> list[float]:
    """Teach the pipeline's denoiser to draw pictures from their noised embeddings.

        L = mean || v - v_theta(x_t, t, y) ||^2,    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x,    y of a random level

    The normalizer of embeddings is set from the pictures. Weights are those of the moving average.

    Args:
        pipe: the pipeline; its denoiser and its normalizer change.
        images: uint8 pictures.
        training: length and rates.
        seed: seed of everything that is drawn.
        show: passes the steps through and shows how far they are.

    Shapes: ``images`` (N, 3, S, S) -> losses of the steps.
    """
    t = training or Training()
    embeddings = embed_all(pipe, images)
    with torch.no_grad():
        pipe.image_normalizer.mean.copy_(embeddings.mean(dim=0, keepdim=True))
        pipe.image_normalizer.std.copy_(embeddings.std(dim=0, keepdim=True).clamp_min(1e-4))
    mean, std = pipe.image_normalizer.mean[0].detach(), pipe.image_normalizer.std[0].detach()
    abar_level = pipe.image_noising_scheduler.alphas_cumprod
    abar = pipe.scheduler.alphas_cumprod
    unet = pipe.unet.train()
    kept = [p.detach().clone() for p in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=t.rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, t.rate, total_steps=t.steps, pct_start=0.1)
    context = torch.zeros(t.batch, 1, CONTEXT)
    draw = generator(seed, 1)
    losses = []
    for step in show(range(t.steps)):
        index = torch.randint(len(images), (t.batch,), generator=draw)
        latents = pipe.vae.encode(images[index].float() / 127.5 - 1).latents * pipe.vae.config.scaling_factor
        levels = torch.randint(t.most_level + 1, (t.batch,), generator=draw)
        noise = torch.randn(t.batch, embeddings.shape[1], generator=draw)
        y = noised(embeddings[index], levels, noise, abar_level, mean, std)
        y = torch.where(torch.rand(t.batch, 1, generator=draw) < t.dropped, 0.0, y)
        times = torch.randint(1000, (t.batch,), generator=draw)
        eps = torch.randn(latents.shape, generator=draw)
        a = abar[times].view(-1, 1, 1, 1)
        x, v = a.sqrt() * latents + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * latents
        loss = F.mse_loss(unet(x, times, encoder_hidden_states=context, class_labels=y).sample, v)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(t.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(kept, [p.detach() for p in unet.parameters()], 1 - decay)
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for p, average in zip(unet.parameters(), kept, strict=True):
            p.copy_(average)
    unet.eval()
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
