"""Parts of a tiny pipeline: patches of pixels as latents, and a convolutional image encoder.

A folder of ``genview train-tiny`` names this module and its classes; diffusers loads them only where the module has been
imported, as ``UnCLIPGenerator.from_pretrained`` sees to.
"""

import itertools
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


class ConvEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # what they are is Any
    """Stands where a pipeline has CLIP's vision model, with its outputs; learns from few pictures, as transformers do not.

    Args:
        image_size: side of a picture in pixels, a multiple of 4.
        width: channels of the tokens, a multiple of 4; there is one token per 2 x 2 pixels.
        projection_dim: entries of the embedding.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, image_size: int = 16, width: int = 64, projection_dim: int = 32) -> None:
        super().__init__()
        widths = (3, width // 2, width * 3 // 4, width)
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, 2 if number == 1 else 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.top = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.projection = nn.Linear(4 * width, projection_dim)

    def forward(self, pixel_values: Tensor) -> Any:
        """Tokens behind one for the whole picture, and the embedding.

        Shapes: (N, 3, S, S) -> last_hidden_state (N, 1 + S S / 4, width), image_embeds (N, D).
        """
        maps = self.body(pixel_values)
        tokens = maps.flatten(2).transpose(1, 2)
        high = self.top(maps)
        vector = self.projection(torch.cat([high.mean(dim=(2, 3)), high.amax(dim=(2, 3))], dim=1))
        return SimpleNamespace(
            last_hidden_state=torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1), image_embeds=vector
        )
