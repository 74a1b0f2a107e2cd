"""What the general adaptation methods add to the supervised loss; losses as functions and small modules, tensors in and out."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freespace_uda.alignment import full_precision, masked_mean, shared_forward


def supervised(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over what is labeled; 0 where nothing is.

    Args:
        logits: (B, 1, H, W).
        labels: (B, H, W) of 0, 1 and 255 (ignored).
    """
    known = (labels != 255).float().unsqueeze(1)
    loss = F.binary_cross_entropy_with_logits(
        full_precision(logits), (labels == 1).unsqueeze(1).to(full_precision(logits).dtype), reduction="none"
    )
    return masked_mean(loss, known, 1)


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities of road and of the rest, (B, 2, H, W), in 32 bits or more: 16 bits have none between 0.9995 and 1."""
    p = full_precision(logits).sigmoid()
    return torch.cat([p, 1 - p], 1)


def information(logits: Tensor) -> Tensor:
    """Weighted self-information of both classes, (B, 2, H, W): -p log2 p, p for road and for the rest; as `probabilities`."""
    both = probabilities(logits)
    return -both * (both + 1e-30).log2()


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits per pixel, (B, 1, H, W), in [0, 1]."""
    return information(logits).sum(1, keepdim=True)


class MapDiscriminator(nn.Sequential):
    """Five 4 x 4 convolutions of stride 2, width to 8 width and to 1, over maps of two channels; of AdaptSegNet and AdvEnt.

    Args:
        width: channels of the first layer (64 in the papers).
    """

    def __init__(self, width: int = 64) -> None:
        sizes = (2, width, 2 * width, 4 * width, 8 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(sizes[-1], 1, 4, 2, 1))


class PairLosses(NamedTuple):
    """An adversarial loss for the network, the discriminator's own, and the discriminator's accuracy."""

    adversarial: Tensor
    discriminator: Tensor
    accuracy: Tensor


def output_alignment(discriminator: nn.Module, source: Tensor, target: Tensor) -> PairLosses:
    """Binary cross-entropy GAN over maps of predictions: source 1, target 0; gradients are split as in ``shared_forward``.

    Maps are brought to the discriminator's type; the losses are in 32 bits or more.

    Args:
        discriminator: over (B, 2, H, W).
        source: maps of the source; their gradient is not used.
        target: maps of the target.

    Source: AdaptSegNet, CVPR 2018 (probabilities); AdvEnt, CVPR 2019 (weighted self-information).
    """
    kind = next(discriminator.parameters()).dtype
    at_target, for_itself = map(full_precision, shared_forward(discriminator, target.to(kind)))
    at_source = full_precision(discriminator(source.detach().to(kind)))
    own = 0.5 * F.softplus(-at_source).mean() + 0.5 * F.softplus(for_itself).mean()
    right = 0.5 * (at_source > 0).float().mean() + 0.5 * (for_itself <= 0).float().mean()
    return PairLosses(F.softplus(-at_target).mean(), own, right.detach())


class ClassDiscriminator(nn.Sequential):
    """2 x 2 logits per pixel: road and rest, of the source and of the target; FADA's, with a bottleneck as ours.

    Args:
        channels: channels of the maps.
        hidden: width of the bottleneck.
    """

    def __init__(self, channels: int, hidden: int = 128) -> None:
        half = max(1, hidden // 2)
        super().__init__(
            nn.Conv2d(channels, hidden, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, half, 3, 1, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(half, 4, 3, 1, 1),
        )


def class_alignment(
    discriminator: nn.Module,
    source: Tensor,
    target: Tensor,
    source_logits: Tensor,
    target_logits: Tensor,
    temperature: float = 1.8,
    clip: float = 0.9,
) -> PairLosses:
    """Class-wise alignment of features: the domain is told per class, weighted by soft predictions.

    With soft labels a = clip(softmax(z / T)) over road and rest, the discriminator learns [a^s, 0] and [0, a^t]; the
    features of the target are moved so that it says [a^t, 0]. Maps are brought to the discriminator's type; soft labels
    and losses are in 32 bits or more.

    Args:
        discriminator: over (B, C, h, w), four logits.
        source: maps of the source.
        target: maps of the target.
        source_logits: of road, (B, 1, h, w); no gradient flows into the soft labels.
        target_logits: likewise.
        temperature: T.
        clip: largest soft label.

    Source: FADA, ECCV 2020, its soft labels, temperature and clipping.
    """

    def soft(logits: Tensor) -> Tensor:
        return probabilities(full_precision(logits.detach()) / temperature).clamp(max=clip)

    def against(logits: Tensor, wanted: Tensor) -> Tensor:
        return -(wanted * logits.log_softmax(1)).sum(1).mean()

    kind = next(discriminator.parameters()).dtype
    at_target, for_itself = map(full_precision, shared_forward(discriminator, target.to(kind)))
    at_source = full_precision(discriminator(source.detach().to(kind)))
    of_source, of_target = soft(source_logits), soft(target_logits)
    zero_s, zero_t = torch.zeros_like(of_source), torch.zeros_like(of_target)
    own = 0.5 * against(at_source, torch.cat([of_source, zero_s], 1))
    own = own + 0.5 * against(for_itself, torch.cat([zero_t, of_target], 1))
    told = [logits.detach().softmax(1)[:, :2].sum(1) for logits in (at_source, for_itself)]
    right = 0.5 * (told[0] > 0.5).float().mean() + 0.5 * (told[1] <= 0.5).float().mean()
    return PairLosses(against(at_target, torch.cat([of_target, zero_t], 1)), own, right)


def pseudo_label_loss(logits: Tensor, teacher: Tensor, threshold: float = 0.968) -> Tensor:
    """Cross-entropy against a teacher's hard labels, weighted by the share of pixels that the teacher is sure of.

    Args:
        logits: of the student, (B, 1, H, W).
        teacher: logits of the teacher; no gradient.
        threshold: probability of either class from which a pixel counts as sure.

    Source: DACS, WACV 2021, and DAFormer, CVPR 2022 (weight and threshold).
    """
    at = math.log(threshold / (1 - threshold))
    share = (teacher.detach().abs() > at).float().mean((1, 2, 3), keepdim=True)
    loss = F.binary_cross_entropy_with_logits(
        full_precision(logits), (teacher.detach() > 0).to(full_precision(logits).dtype), reduction="none"
    )
    return (share * loss).mean()
