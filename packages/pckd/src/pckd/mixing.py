"""Mixtures of two images of a batch, with the labels that go with them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pckd.config import Mixing


@dataclass(frozen=True)
class Mixture:
    """How the images of one batch are mixed; the same for the student's and the teacher's.

        mixup:  x' = l x_a + (1 - l) x_b,    y' = l y_a + (1 - l) y_b
        cutmix: x' is x_a with a rectangle of x_b whose share of the area is 1 - l,    y' counts the pixels

    Attributes:
        order: (B,) image b of each image a; all views of an image are mixed with those of that one.
        share: l, the share of image a.
        box: top, bottom, left and right of the rectangle, as shares of the sides; None for mixup.

    Source: Zhang et al., mixup: beyond empirical risk minimization, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """

    order: Tensor
    share: float
    box: tuple[float, float, float, float] | None

    def images(self, images: Tensor) -> Tensor:
        """Mixed images, (B V, C, H, W) image-major."""
        views = images.view(len(self.order), -1, *images.shape[1:])
        other = views[self.order.to(images.device)]
        if self.box is None:
            mixed = self.share * views + (1 - self.share) * other
        else:
            H, W = images.shape[-2:]
            top, bottom, left, right = (round(edge * side) for edge, side in zip(self.box, (H, H, W, W), strict=True))
            mixed = views.clone()
            mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return mixed.flatten(0, 1)

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """Soft labels, (B,) -> (B, C)."""
        one_hot = F.one_hot(labels, classes).float()
        return self.share * one_hot + (1 - self.share) * one_hot[self.order.to(labels.device)]


def draw_mixture(batch: int, size: tuple[int, int], settings: Mixing) -> Mixture:
    """A mixture for a batch of that many images, drawn from torch's global generator.

    l ~ Beta(alpha, alpha); where mixup and cutmix are both on, each is taken in half of the batches. The edges of a
    rectangle are whole pixels of images of ``size`` (H, W), and l is what is left of their area.
    """
    both = settings.mixup > 0 and settings.cutmix > 0
    cut = settings.cutmix > 0 and (not both or float(torch.rand(())) < 0.5)
    alpha = settings.cutmix if cut else settings.mixup
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(batch)
    if not cut:
        return Mixture(order, share, None)
    H, W = size
    height, width = (round(side * (1 - share) ** 0.5) for side in (H, W))
    top, left = (int(torch.randint(0, whole - part + 1, ())) for whole, part in ((H, height), (W, width)))
    box = (top / H, (top + height) / H, left / W, (left + width) / W)
    return Mixture(order, 1 - height * width / (H * W), box)
