"""Selective alignment: make the features of the road alike in both domains, per modality, and leave the rest alone.

Letters: B batch, C channels, h and w rows and columns of the maps that are aligned. Domain label: source 1, target 0.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import distributed

MaskMode = Literal["cross", "class", "agreement", "intersection", "all"]


class AlignmentLosses(NamedTuple):
    """Losses of one batch, and what they rest on, by stream.

    Attributes:
        adversarial: L_adv, the sum over the streams; its gradient reaches the target's features and nothing else.
        discriminator: L_D, the sum over the streams; its gradient reaches the discriminators and nothing else.
        accuracy: share of the masked pixels whose domain the discriminator tells, by stream; NaN where there are none.
        share: masked share of the target's pixels, by stream.
    """

    adversarial: Tensor
    discriminator: Tensor
    accuracy: dict[str, Tensor]
    share: dict[str, Tensor]


class PixelDiscriminator(nn.Sequential):
    """One logit per pixel: source or target? 1 x 1 to ``hidden``, then 3 x 3 convolutions to ``hidden`` / 2 and 1.

    Args:
        channels: channels of the maps.
        hidden: width of the bottleneck; 0 takes 3 x 3 convolutions to 256 and 128 without one, as FADA's are.
        kernel: size of the later convolutions; 1 sees no neighbors.
    """

    def __init__(self, channels: int, hidden: int = 128, kernel: int = 3) -> None:
        pad = kernel // 2
        first, second = (hidden, max(1, hidden // 2)) if hidden else (256, 128)
        entry = nn.Conv2d(channels, first, 1) if hidden else nn.Conv2d(channels, first, kernel, 1, pad)
        super().__init__(
            entry,
            nn.LeakyReLU(0.2),
            nn.Conv2d(first, second, kernel, 1, pad),
            nn.LeakyReLU(0.2),
            nn.Conv2d(second, 1, kernel, 1, pad),
        )
        self.radius = pad * (2 if hidden else 3)
        """Pixels around a pixel that its logit depends on."""


class _Split(torch.autograd.Function):
    """One forward pass, given out twice: gradients of the first copy go to the input, of the second to the parameters."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, features: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.wants = features.requires_grad
        with torch.enable_grad():
            inner = features.detach().requires_grad_(ctx.wants)
            logits = module(inner)
        ctx.inner, ctx.logits, ctx.weights = inner, logits, parameters
        return logits.detach(), logits.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_features, of_weights = grads
        down = None
        if ctx.wants:
            (down,) = torch.autograd.grad(ctx.logits, ctx.inner, of_features, retain_graph=True)
        weights = torch.autograd.grad(ctx.logits, ctx.weights, of_weights, retain_graph=True)
        return (None, down, *weights)


def shared_forward(discriminator: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a discriminator, computed once, for the encoder (no gradient to its weights) and for itself (none to features).

    Two forward passes with frozen weights and with detached features give the same two gradients; here one pass and one
    ``backward`` of the sum of all losses do, so the discriminator's weights cannot have moved in between.
    """
    found: tuple[Tensor, Tensor] = _Split.apply(discriminator, features, *discriminator.parameters())
    return found


def full_precision(values: Tensor) -> Tensor:
    """The tensor in 32 bits where it has fewer."""
    return values.float() if values.dtype in {torch.float16, torch.bfloat16} else values


def masked_mean(values: Tensor, mask: Tensor, least: int) -> Tensor:
    """Mean of (B, 1, h, w) over a mask of any type, exactly 0 where it has fewer than ``least`` pixels, in 32 bits or more.

    Counts are those of all ranks: each gives its own sum over the common count times the number of ranks, whose average over
    the ranks (what DDP makes of gradients) is the mean over all.
    """
    values = full_precision(values)
    mask = mask.to(values.dtype)
    count = distributed.all_reduce_sums({"count": mask.sum()})["count"]
    inside = torch.where(mask > 0, values, 0.0) * mask
    return torch.where(count >= least, distributed.world_size() * inside.sum() / count.clamp_min(1), 0.0)


class SelectiveAlignment(nn.Module):
    """Adversarial alignment of the pixels that a mask selects, one discriminator per modality.

    With <f>_M the mean over a mask and s = sigmoid(D):

        L_D = -1/2 <log s(F^s)>_{M^s} - 1/2 <log(1 - s(F^t))>_{M^t},        L_adv = -<log s(F^t)>_{M^t}

    The source's mask is the labeled road. The target's has no gradient, and is by ``mask_mode``:

    - ``cross``: where the *other* modality's head is confident of road, p_o > tau;
    - ``class``: where all heads are, p_r, p_n, p_f > tau;
    - ``agreement``: p_r > 1/2 and p_n > 1/2;
    - ``intersection``: ``class``, and the source and target pictures that are paired in the batch both show road there;
    - ``all``: everywhere, in both domains: plain alignment of features.

    Args:
        channels: channels of the maps by stream (``rgb``, ``normal``).
        mask_mode: as above.
        tau: confidence of the target's mask.
        min_pixels: a mask of fewer pixels gives losses of exactly 0.
        hidden: width of the discriminators' bottleneck, see ``PixelDiscriminator``.
        kernel: size of their convolutions.

    Raises:
        ValueError: ``tau`` is not in [0, 1), or there are fewer than two streams where the mask needs both.

    Source: the abstract of "Cross-Modality Domain Adaptation for Freespace Detection", ACM MM 2022, which aligns the
    "consistent foreground area"; ``cross`` is ours: the consensus of ``class`` leaves out just the pixels that one modality
    gets wrong.

    Example:
        >>> align = SelectiveAlignment({"rgb": 8, "normal": 8}, min_pixels=1, hidden=8)
        >>> maps = {"rgb": torch.randn(2, 8, 4, 5), "normal": torch.randn(2, 8, 4, 5)}
        >>> mask = torch.ones(2, 1, 4, 5)
        >>> losses = align(maps, maps, mask, {"rgb": mask, "normal": mask})
        >>> losses.adversarial.shape, losses.discriminator.shape
        (torch.Size([]), torch.Size([]))
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        mask_mode: MaskMode = "cross",
        tau: float = 0.8,
        min_pixels: int = 64,
        hidden: int = 128,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        if not 0 <= tau < 1:
            raise ValueError(f"tau: expected 0 or more and less than 1, got {tau}")
        if len(channels) < 2 and mask_mode not in {"all", "class"}:
            raise ValueError(f"mask_mode {mask_mode} needs RGB and normals")
        self.mask_mode, self.tau, self.min_pixels = mask_mode, tau, min_pixels
        self.discriminators = nn.ModuleDict({n: PixelDiscriminator(c, hidden, kernel) for n, c in channels.items()})

    def source_mask(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """M^s (B, 1, h, w): more than half of what is labeled under a pixel is road, and more than half is labeled.

        Args:
            labels: (B, H, W) of 0, 1 and 255.
            size: (h, w).
        """
        if self.mask_mode == "all":
            return labels.new_ones((len(labels), 1, *size), dtype=torch.float32)
        known = F.adaptive_avg_pool2d((labels != 255).float().unsqueeze(1), size)
        road = F.adaptive_avg_pool2d((labels == 1).float().unsqueeze(1), size)
        return ((road > 0.5 * known) & (known > 0.5)).float()

    @torch.no_grad()
    def target_masks(
        self, logits: Mapping[str, Tensor], size: tuple[int, int], source: Tensor | None = None
    ) -> dict[str, Tensor]:
        """M^t (B, 1, h, w) of each stream.

        Args:
            logits: of the target by head (``fused``, ``rgb``, ``normal``), any size.
            size: (h, w).
            source: M^s of the paired source pictures, for ``intersection``.
        """
        p = {
            k: F.interpolate(full_precision(v), size, mode="bilinear", align_corners=False).sigmoid()
            for k, v in logits.items()
        }
        names = list(self.discriminators)
        if self.mask_mode == "all":
            return {name: torch.ones_like(p["fused"]) for name in names}
        if self.mask_mode == "cross":
            other = {"rgb": "normal", "normal": "rgb"}
            return {name: (p[other[name]] > self.tau).float() for name in names}
        if self.mask_mode == "agreement":
            mask = ((p["rgb"] > 0.5) & (p["normal"] > 0.5)).float()
        else:
            mask = torch.stack([v > self.tau for v in p.values()]).all(0).float()
        if self.mask_mode == "intersection":
            if source is None or len(source) != len(mask):
                raise ValueError("intersection pairs the pictures of both domains: their batches need one size")
            mask = mask * source
        return dict.fromkeys(names, mask)

    def forward(
        self,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        source_mask: Tensor,
        target_masks: Mapping[str, Tensor],
    ) -> AlignmentLosses:
        """Both losses, from one forward pass of each discriminator per domain; in 32 bits or more.

        Args:
            source: guided maps of the source by stream, (B, C, h, w).
            target: those of the target.
            source_mask: M^s, of any type (boolean, too).
            target_masks: M^t by stream, likewise.
        """
        adversarial, own = [], []
        accuracy, share = {}, {}
        for name, discriminator in self.discriminators.items():
            kind = next(discriminator.parameters()).dtype
            at_target, for_itself = map(full_precision, shared_forward(discriminator, target[name].to(kind)))
            at_source = full_precision(discriminator(source[name].detach().to(kind)))
            there = target_masks[name].to(at_source.dtype)
            mask = source_mask.to(at_source.dtype)
            mask = mask if self.mask_mode != "intersection" else mask * there
            adversarial.append(masked_mean(F.softplus(-at_target), there, self.min_pixels))
            own.append(
                0.5 * masked_mean(F.softplus(-at_source), mask, self.min_pixels)
                + 0.5 * masked_mean(F.softplus(for_itself), there, self.min_pixels)
            )
            with torch.no_grad():
                right = ((at_source > 0) * mask).sum() + ((for_itself <= 0) * there).sum()
                accuracy[name] = right / (mask.sum() + there.sum())
                share[name] = there.mean()
        return AlignmentLosses(torch.stack(adversarial).sum(), torch.stack(own).sum(), accuracy, share)


def mask_quality(mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of a mask (B, 1, h, w) against labels (B, H, W) of 0, 1, 255; for reports alone.

    Returns:
        Two scalars; NaN where a mask, or the road, is empty.
    """
    large = F.interpolate(mask.float(), labels.shape[-2:], mode="nearest").squeeze(1) * (labels != 255)
    road = (labels == 1).float()
    hit = (large * road).sum()
    return hit / large.sum(), hit / road.sum()
