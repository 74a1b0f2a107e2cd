"""Tiny networks of diffusers' own classes with random weights."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def tiny_unet(**changes):
    """Attention in the down, the middle and the up block: 6 self-attention layers."""
    torch.manual_seed(0)
    settings = dict(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    return UNet2DConditionModel(**settings | changes).eval()


def tiny_unconditional(**changes):
    torch.manual_seed(0)
    settings = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return UNet2DModel(**settings | changes).eval()


def ddim(**changes):
    return DDIMScheduler(**SCHEDULE | {"steps_offset": 1, "set_alpha_to_one": False} | changes)


def latents(seed, rows=1, size=8):
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))
