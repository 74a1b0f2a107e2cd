"""A small denoiser of diffusers' own attention, and a linear codec, that learn blobs within two minutes of one core.

They go through the same adapter, controller, banks and steppers as Stable Diffusion. Shapes: pictures (B, 3, 32, 32),
latents (B, 16, 8, 8), 64 tokens of 64 entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tenfold.randomness import generator, keyed
from visctrl.families import UnconditionalAdapter

SIDE = 8
"""Latents per side."""


class PatchCodec(nn.Module):
    """Patches of 4 x 4 pixels as their principal components, and back: an autoencoder of two matrices.

    Args:
        channels: components per patch.
    """

    multiple = 4

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("mean", torch.zeros(48))
        self.register_buffer("basis", torch.eye(48)[:, :channels].clone())
        self.register_buffer("scale", torch.ones(()))
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor

    @torch.no_grad()
    def fit(self, images: Tensor) -> float:
        """Take the components of pictures, scaled to unit mean variance; returns the share of the variance they hold."""
        patches = self._patches(images).flatten(0, 2)
        self.mean.copy_(patches.mean(dim=0))
        _, s, v = torch.linalg.svd(patches - self.mean, full_matrices=False)
        signs = torch.sign(v[: self.channels].gather(1, v[: self.channels].abs().argmax(dim=1, keepdim=True)))
        self.basis.copy_((signs * v[: self.channels]).T)
        power = s.square()
        self.scale.copy_(1 / (power[: self.channels].sum() / len(patches) / self.channels).sqrt())
        return float(power[: self.channels].sum() / power.sum())

    def _patches(self, images: Tensor) -> Tensor:
        b, c, h, w = images.shape
        return images.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 4, w // 4, 48)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of pictures."""
        return ((self._patches(images) - self.mean) @ self.basis * self.scale).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents."""
        b, _, h, w = latents.shape
        patches = latents.permute(0, 2, 3, 1) / self.scale @ self.basis.T + self.mean
        return patches.view(b, h, w, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, 4 * h, 4 * w)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.shift = nn.Linear(width, 4 * width)
        self.attn = Attention(query_dim=width, heads=heads, dim_head=width // heads, bias=True)
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.out = nn.Conv2d(2 * width, width, 1)
        nn.init.zeros_(self.attn.to_out[0].weight)
        nn.init.zeros_(self.attn.to_out[0].bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Shapes: (B, N, d), (B, d) -> (B, N, d)."""
        a, b, c, d = self.shift(time)[:, None].chunk(4, dim=-1)
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]) * (1 + a) + b)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + c) + d
        h = h.transpose(1, 2).reshape(len(x), -1, SIDE, SIDE)
        return x + self.out(F.gelu(self.conv(h))).flatten(2).transpose(1, 2)


@dataclass
class ToyOutput:
    """What the denoiser says: the velocity."""

    sample: Tensor


class ToyDenoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Tokens with learned positions, blocks of self-attention and convolution; it predicts the velocity.

    Args:
        channels: channels of the latents.
        width: entries of a token.
        heads: attention heads.
        blocks: number of blocks.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, channels: int = 16, width: int = 64, heads: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.read = nn.Linear(channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(1, SIDE * SIDE, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(blocks))
        self.write = nn.Linear(width, channels)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, sample: Tensor, timestep: Tensor) -> ToyOutput:
        """The velocity of noisy latents. Shapes: (B, C, 8, 8), () or (B,) -> (B, C, 8, 8)."""
        x = self.read(sample.flatten(2).transpose(1, 2)) + self.place
        half = x.shape[-1] // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=x.device) / half)
        angle = timestep.reshape(-1, 1).to(x.dtype) * rates
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=-1)).expand(len(x), -1)
        for block in self.layers:
            x = block(x, time)
        return ToyOutput(self.write(F.layer_norm(x, x.shape[-1:])).transpose(1, 2).reshape(sample.shape))


def toy_scheduler() -> DDIMScheduler:
    """1,000 timesteps with betas from 1e-4 to 0.02, velocity, trailing steps."""
    return DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)


def toy_adapter(model: nn.Module, codec: PatchCodec) -> UnconditionalAdapter:
    """The adapter of the denoiser and its codec."""
    return UnconditionalAdapter(model, toy_scheduler(), codec)


@dataclass(frozen=True)
class Training:
    """Length and rates of a training.

    Attributes:
        steps: steps.
        batch: pictures per step.
        rate: largest learning rate.
        average: decay of the average of weights that is kept.
        warm_up: steps over which the rate rises.
        middle: draw timesteps as 1000 sigmoid(n + middle) with n of a standard normal; None: as 1000 u^0.8 with uniform u.
    """

    steps: int = 2500
    batch: int = 16
    rate: float = 2e-3
    average: float = 0.99
    warm_up: int = 30
    middle: float | None = None

    def timesteps(self, draw: torch.Generator) -> Tensor:
        """Timesteps of one step's pictures. Shapes: -> (batch,)."""
        if self.middle is None:
            share = torch.rand(self.batch, generator=draw).pow(0.8)
        else:
            share = torch.sigmoid(torch.randn(self.batch, generator=draw) + self.middle)
        return (1000 * share).long().clamp(max=999)


Arch = Literal["toy", "unet"]


def denoiser(arch: Arch = "toy") -> nn.Module:
    """A denoiser of these latents with new weights.

    Args:
        arch: the small one above, or a ``UNet2DModel`` of diffusers, which learns to use its attention far more slowly.
    """
    if arch == "toy":
        return ToyDenoiser()
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=16,
        out_channels=16,
        layers_per_block=1,
        block_out_channels=(64,),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )


def train_toy(
    images: Tensor, training: Training, seed: int, show: Callable[[range], Any] = iter, arch: Arch = "toy"
) -> tuple[nn.Module, PatchCodec]:
    """A codec and a denoiser of these pictures.

        L = mean || v - v_theta(z_t, t) ||^2,  v = sqrt(abar_t) e - sqrt(1 - abar_t) z

    Args:
        images: pictures (N, 3, 32, 32).
        training: length and rates.
        seed: seed of the weights and of what is drawn.
        show: passes the steps through and shows how far they are.
        arch: the denoiser.
    """
    codec = PatchCodec()
    codec.fit(images[:512])
    with keyed(seed, 0):
        model = denoiser(arch)
    z, abar = codec.encode(images), toy_scheduler().alphas_cumprod
    draw = generator(seed, 1)
    weights = list(model.parameters())
    kept = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=training.rate, betas=(0.9, 0.99), fused=True)
    for step in show(range(training.steps)):
        done = step / training.steps
        rate = (
            training.rate
            * min(1.0, (step + 1) / training.warm_up)
            * (0.005 + 0.995 * (1 + math.cos(math.pi * done)) / 2)
        )
        optimizer.param_groups[0]["lr"] = rate
        x = z[torch.randint(len(z), (training.batch,), generator=draw)]
        t = training.timesteps(draw)
        e = torch.randn(x.shape, generator=draw)
        a = abar[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(model(a.sqrt() * x + (1 - a).sqrt() * e, t).sample, a.sqrt() * e - (1 - a).sqrt() * x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(training.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(kept, [p.detach() for p in weights], 1 - decay)
    with torch.no_grad():
        for p, average in zip(weights, kept, strict=True):
            p.copy_(average)
    return model.eval(), codec
