"""How much of the reference arrived, and how much of the target stayed. Shapes: (B, 3, H, W) in [-1, 1], masks (B, H, W)."""

import torch
from torch import Tensor


def mean_color(images: Tensor, masks: Tensor) -> Tensor:
    """The mean color over a mask. Shapes: -> (B, 3)."""
    m = masks[:, None].to(images.dtype)
    return (images * m).sum(dim=(2, 3)) / m.sum(dim=(2, 3)).clamp_min(1e-9)


def transfer(images: Tensor, target: Tensor, ideal: Tensor, masks: Tensor) -> Tensor:
    """How far the subject's mean color went from the target's (0) to the ideal's (1). Shapes: -> (B,).

    <c(x) - c(target), d> / <d, d>  with  d = c(ideal) - c(target)
    """
    before = mean_color(target, masks)
    d = mean_color(ideal, masks) - before
    return ((mean_color(images, masks) - before) * d).sum(dim=1) / d.square().sum(dim=1).clamp_min(1e-9)


def toward(images: Tensor, target: Tensor, masks: Tensor, color: Tensor) -> Tensor:
    """``transfer``, where only the mean color of the reference's subject is known. Shapes: ``color`` (B, 3) -> (B,)."""
    before = mean_color(target, masks)
    d = color - before
    return ((mean_color(images, masks) - before) * d).sum(dim=1) / d.square().sum(dim=1).clamp_min(1e-9)


def structure(images: Tensor, target: Tensor, *, side: int = 16) -> Tensor:
    """How differently two pictures are laid out, in [0, 1], whatever their colors. Shapes: -> (B,).

    Of both, reduced to ``side`` x ``side`` places: the distances between the colors of all pairs of places, over their
    mean; half the mean difference of these. Equal where colors are exchanged one for one; a shape that moves, melts or
    vanishes changes which places are alike.

    The idea, with features of a network in place of colors: Tumanyan et al., Splicing ViT Features, CVPR 2022.
    """

    def alike(x: Tensor) -> Tensor:
        size = (min(side, x.shape[-2]), min(side, x.shape[-1]))
        places = torch.nn.functional.adaptive_avg_pool2d(x.float().clamp(-1, 1), size).flatten(2).transpose(1, 2)
        distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
        return distances / distances.mean(dim=(1, 2), keepdim=True).clamp_min(1e-6)

    return (alike(images) - alike(target)).abs().mean(dim=(1, 2)) / 2


def overlap(images: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask and what looks like the subject. Shapes: -> (B,).

    A pixel looks like the subject where it is nearer to the picture's own mean color over the mask than to that outside.
    """
    ahead = mean_color(images, masks)[:, :, None, None]
    behind = mean_color(images, 1 - masks)[:, :, None, None]
    found = (images - ahead).square().sum(dim=1) < (images - behind).square().sum(dim=1)
    true = masks >= 0.5
    both, either = (found & true).flatten(1).sum(dim=1), (found | true).flatten(1).sum(dim=1)
    return both.double() / either.clamp_min(1)


def rmse(images: Tensor, other: Tensor, masks: Tensor | None = None) -> Tensor:
    """Root mean square difference, over a mask where there is one. Shapes: -> (B,)."""
    square = (images - other).square().mean(dim=1)
    if masks is None:
        return square.flatten(1).mean(dim=1).sqrt()
    m = masks.to(square.dtype)
    return ((square * m).flatten(1).sum(dim=1) / m.flatten(1).sum(dim=1).clamp_min(1e-9)).sqrt()


def psnr(images: Tensor, other: Tensor, masks: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in decibels, of a range of 2; infinite for equal pictures. Shapes: -> (B,)."""
    return 20 * torch.log10(2 / rmse(images, other, masks))


def ssim(images: Tensor, other: Tensor, masks: Tensor | None = None) -> Tensor:
    """Structural similarity with a Gaussian window of 1.5 pixels, over a mask where there is one. Shapes: -> (B,).

    Source: Wang et al., Image Quality Assessment, 2004.
    """
    x = torch.arange(-5, 6, dtype=torch.float64)
    window = torch.exp(-x.square() / (2 * 1.5**2))
    window = window / window.sum()

    def smooth(y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        y = torch.nn.functional.pad(y.reshape(b * c, 1, h, w), (5, 5, 5, 5), mode="reflect")
        y = torch.nn.functional.conv2d(y, window.view(1, 1, 11, 1))
        return torch.nn.functional.conv2d(y, window.view(1, 1, 1, 11)).view(b, c, h, w)

    a, b = images.double(), other.double()
    ma, mb = smooth(a), smooth(b)
    va, vb, vab = smooth(a * a) - ma**2, smooth(b * b) - mb**2, smooth(a * b) - ma * mb
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    found = ((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean(dim=1)
    if masks is None:
        return found.flatten(1).mean(dim=1)
    m = masks.double()
    return (found * m).flatten(1).sum(dim=1) / m.flatten(1).sum(dim=1).clamp_min(1e-9)


def match_colors(target: Tensor, reference: Tensor, target_mask: Tensor, reference_mask: Tensor) -> Tensor:
    """The target with mean and deviation of its subject's colors set to those of the reference's. Shapes: -> as ``target``.

    The strong simple alternative: no network. Source: Reinhard et al., Color Transfer between Images, 2001, here in RGB.
    """

    def moments(x: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        m = masks[:, None].to(x.dtype)
        mean = mean_color(x, masks)[:, :, None, None]
        spread = (((x - mean).square() * m).sum(dim=(2, 3)) / m.sum(dim=(2, 3)).clamp_min(1e-9)).sqrt()
        return mean, spread[:, :, None, None]

    (mean, spread), (other, other_spread) = moments(target, target_mask), moments(reference, reference_mask)
    moved = (target - mean) * (other_spread / spread.clamp_min(1e-3)) + other
    m = target_mask[:, None].to(target.dtype)
    return (m * moved + (1 - m) * target).clamp(-1, 1)


def flicker(edited: Tensor, target: Tensor) -> Tensor:
    """Change between neighboring frames beyond that of the input. Shapes: (T, 3, H, W) -> (T - 1,).

        mean max(0, |y_{t+1} - y_t| - |x_{t+1} - x_t|)

    The input itself has none. An edit that raises the contrast of what moves has some that is no fault: compare ways to edit
    one video, not videos.
    """
    after, before = edited[1:] - edited[:-1], target[1:] - target[:-1]
    return (after.abs() - before.abs()).clamp_min(0).flatten(1).mean(dim=1)
