"""Patches of pixels where a pipeline of diffusers has the latents of an autoencoder.

A folder of ``genview train-tiny`` names this module and this class; diffusers loads it only where the module has been
imported, as ``UnCLIPGenerator.from_pretrained`` sees to.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PatchVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]  # what they are is Any
    """Stands where a pipeline has its autoencoder: latents are patches of 2 x 2 pixels, nothing is learned or lost.

    Args:
        scaling_factor: what latents are multiplied by; 2 gives patches of pictures about unit variance.
        block_out_channels: their number minus 1 is the power of 2 by which latents are smaller.
        latent_channels: numbers of a latent, 3 per pixel of a patch.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, scaling_factor: float = 2.0, block_out_channels: tuple[int, ...] = (1, 1), latent_channels: int = 12
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # a module without a parameter has no device and no dtype

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> Any:
        """Patches of images in [-1, 1]. Shapes: (N, 3, S, S) -> (N, 3 p p, S / p, S / p)."""
        return SimpleNamespace(latents=F.pixel_unshuffle(images, self.patch))

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Images of patches."""
        images = F.pixel_shuffle(latents, self.patch)
        return SimpleNamespace(sample=images) if return_dict else (images,)
