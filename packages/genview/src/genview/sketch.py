"""A denoiser that a CPU trains in a minute: a sketch of the picture, what is Gaussian around it in closed form, and a U-Net.

A U-Net that is conditioned through its normalizations alone has to build a spatial layout out of a vector, which takes some
hundred thousand pictures. Here the condition is laid out first: a perceptron draws the mean picture of a condition (the
sketch), the exact denoiser of pictures that are Gaussian around their sketches needs no training beyond a covariance, and the
U-Net learns what is left. The pipeline around it is diffusers' own.

Shapes: N pictures, C latent channels on S x S cells, d = C S S, k principal directions, D entries of a condition.
"""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class SketchUNet(UNet2DConditionModel, ModelMixin):  # type: ignore[misc]  # diffusers looks for ModelMixin in this module
    """Predicts v of noisy latents, given a condition.

        v = v_G(x, mu(y), t) + UNet(x, mu(y), t, y)
        v_G = -sqrt(1 - a) mu + Q diag(g) Q' (x - sqrt(a) mu),    g = sqrt(a (1 - a)) (1 - l) / (a l + 1 - a)

    with mu the sketch, a the schedule's product at t, and (Q, l) directions and variances of what pictures are beside their
    sketches. v_G is the posterior mean of v where latents are N(mu, Q diag(l) Q'). Directions beyond the first k share one
    variance.

    Args:
        sample_size: S.
        in_channels: C.
        block_out_channels: channels at each resolution.
        cross_attention_dim: width of the text that the pipeline hands over, which is not looked at.
        projection_class_embeddings_input_dim: D.
        hidden: width of the sketch's layers.
        directions: most directions k.

    Source: the Gaussian denoiser is the Wiener filter; the split is our choice for demonstrations and tiny generators.
    """

    basis: Tensor
    variances: Tensor
    rest: Tensor
    products: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 12,
        block_out_channels: tuple[int, ...] = (32, 64),
        cross_attention_dim: int = 8,
        projection_class_embeddings_input_dim: int = 64,
        hidden: int = 256,
        directions: int = 256,
    ) -> None:
        depth = len(block_out_channels)
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=("DownBlock2D",) * depth,
            up_block_types=("UpBlock2D",) * depth,
            mid_block_type="UNetMidBlock2D",
            block_out_channels=block_out_channels,
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=cross_attention_dim,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            resnet_time_scale_shift="scale_shift",
        )
        entries = in_channels * sample_size**2
        rank = min(directions, entries)
        self.conv_in = nn.Conv2d(2 * in_channels, block_out_channels[0], 3, padding=1)
        self.layout = nn.Sequential(
            nn.Linear(projection_class_embeddings_input_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, entries),
        )
        self.register_buffer("basis", torch.zeros(entries, rank))
        self.register_buffer("variances", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))
        schedule = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
        self.register_buffer("products", schedule.alphas_cumprod.clone())

    def sketch(self, condition: Tensor) -> Tensor:
        """The mean picture of each condition. Shapes: (N, D) -> (N, C, S, S)."""
        side = self.config.sample_size
        drawn: Tensor = self.layout(condition).view(len(condition), self.config.in_channels, side, side)
        return drawn

    def gaussian(self, sample: Tensor, timestep: Tensor, mean: Tensor) -> Tensor:
        """v_G. Shapes: (N, C, S, S), () or (N,) int64, (N, C, S, S) -> (N, C, S, S)."""
        a = self.products.float()[timestep.long()].view(-1, 1)
        r = sample.flatten(1).float() - a.sqrt() * mean.flatten(1).float()
        scale = (a * (1 - a)).sqrt()
        rest = scale * (1 - self.rest.float()) / (a * self.rest.float() + 1 - a)
        gain = scale * (1 - self.variances.float()) / (a * self.variances.float() + 1 - a)
        basis = self.basis.float()
        v = rest * r + ((r @ basis) * (gain - rest)) @ basis.T - (1 - a).sqrt() * mean.flatten(1).float()
        return v.view_as(sample).to(sample.dtype)

    @torch.no_grad()
    def fit_residuals(self, residuals: Tensor) -> None:
        """Set directions and variances from what pictures are beside their sketches, and let the U-Net start at zero.

        Shapes: (N, C, S, S).
        """
        x = residuals.flatten(1).float()
        n, entries = x.shape
        rank = self.basis.shape[1]
        total = x.square().sum() / n
        if entries <= 1024:
            values, vectors = torch.linalg.eigh(x.T @ x / n)
            values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _, singular, vectors = torch.svd_lowrank(x, q=min(rank + 32, n, entries), niter=4)
            values, vectors = singular[:rank].square() / n, vectors[:, :rank]
        self.basis.zero_()
        self.basis[:, : len(values)] = vectors
        self.rest.copy_(((total - values.sum()) / max(1, entries - len(values))).clamp_min(1e-4))
        self.variances.fill_(float(self.rest))
        self.variances[: len(values)] = values.clamp_min(1e-4)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """v of each picture; what else the pipeline hands over goes to the U-Net.

        Shapes: (N, C, S, S), () or (N,), (N, 1, W), (N, D) -> sample (N, C, S, S).
        """
        assert class_labels is not None
        mean = self.sketch(class_labels)
        times = torch.as_tensor(timestep, device=sample.device)
        both = torch.cat([sample, mean], dim=1).contiguous(memory_format=torch.channels_last)
        learned = super().forward(
            both, times, encoder_hidden_states, class_labels=class_labels, return_dict=False, **others
        )[0]
        out = learned + self.gaussian(sample, times, mean)
        return SimpleNamespace(sample=out) if return_dict else (out,)
