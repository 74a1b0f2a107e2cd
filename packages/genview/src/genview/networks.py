"""The methods as plain modules: backbone, projector, predictor, momentum copy, and the weighted loss of two views."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genview.config import METHODS, Heads
from genview.losses import (
    QDMoCoLoss,
    QDMoCoV3Loss,
    QDNegativeCosine,
    QDNTXentLoss,
    QDSwAVLoss,
    check_method,
)
from tenfold import UserError, models
from tenfold.errors import did_you_mean
from tenfold.modules import evaluating

KEY_MOMENTUM = {"mocov2": 0.999, "mocov3": 0.99, "byol": 0.996}
"""Momentum of the key encoder at the start; in MoCo v3 and BYOL it rises to 1 along half a cosine."""
TEMPERATURE = {"simclr": 0.2, "mocov2": 0.2, "mocov3": 1.0, "swav": 0.1}


class ConvNet(nn.Module):
    """Three convolutions for pictures of 8 to 32 pixels, and the mean over the picture.

    The first two halve the resolution, so that the last one sees 17 pixels: with the first at full resolution it sees 9, less
    than a digit, and costs twice as much.

    Args:
        width: channels of the first convolution; the others have two and three times as many.
        classes: outputs of a classifier; 0 gives the features.
    """

    def __init__(self, width: int = 32, classes: int = 0) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for (a, b), side, stride in zip(itertools.pairwise(widths), (5, 3, 3), (2, 2, 1), strict=True):
            layers += [nn.Conv2d(a, b, side, stride, side // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.num_features = widths[-1]
        self.fc = nn.Linear(widths[-1], classes) if classes else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 3 width), or logits."""
        out: Tensor = self.fc(self.body(images).mean(dim=(2, 3)))
        return out


OWN: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {
    "conv": {str(width): (lambda classes=0, width=width: ConvNet(width, classes)) for width in (8, 16, 24, 32, 48, 64)}
}
"""Backbones of our own, ``conv:32``."""
_HEADS = ("fc", "classifier", "head", "heads", "last_linear")


def build_backbone(spec: str, *, option: str = "--backbone") -> nn.Module:
    """A backbone with random weights that gives one vector per picture.

    Raises:
        UserError: an unknown name, or a classifier whose last layer is not found.
    """
    kind = spec.partition(":")[0]
    model = models.build(spec, num_classes=0 if kind in {"timm", "conv"} else None, own=OWN, option=option)
    if kind == "tv":
        name = next((name for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)), None)
        if name is None:
            raise UserError(f"{option} {spec}: its classifier is not found; give py:MODULE:FUNCTION without one")
        setattr(model, name, nn.Identity())
    return model


def width_of(backbone: nn.Module, size: int) -> int:
    """Entries of a backbone's vector, by running it.

    Raises:
        UserError: it gives no vector per picture at this size.
    """
    device = next(backbone.parameters()).device
    with evaluating(backbone):
        try:
            out = backbone(torch.zeros(2, 3, size, size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"--size {size}: the backbone does not take such pictures ({str(error)[:160]})") from error
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(f"--backbone: expected one vector per picture, it gives {shape}")
    return int(out.shape[1])


def mlp(
    inputs: int, hidden: int, out: int, layers: int, *, last_norm: bool = True, affine: bool = False
) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between, and a last batch norm without shift and scale."""
    parts: list[nn.Module] = []
    for number in range(layers):
        last = number == layers - 1
        a, b = inputs if number == 0 else hidden, out if last else hidden
        norm = last_norm or not last
        parts.append(nn.Linear(a, b, bias=not norm))
        if norm:
            parts.append(nn.BatchNorm1d(b, affine=affine or not last))
        if not last:
            parts.append(nn.ReLU())
    return nn.Sequential(*parts)


class SelfSupervised(nn.Module):
    """A method around a backbone: two batches of views and a weight per pair -> loss.

    Args:
        backbone: gives one vector per picture.
        method: simclr, mocov2, mocov3, simsiam, byol or swav.
        heads: settings of projector and predictor.
        features: entries of the backbone's vector.
        seed: seed of MoCo's first queue.

    Raises:
        NotImplementedError: a method that has no loss of a pair (Barlow Twins, VICReg).
        UserError: an unknown method.
    """

    def __init__(self, backbone: nn.Module, method: str, heads: Heads, features: int, *, seed: int = 0) -> None:
        super().__init__()
        check_method(method)
        if method not in METHODS:
            raise UserError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
        self.method, self.backbone = method, backbone
        momentum = heads.key_momentum
        self.key_momentum = KEY_MOMENTUM.get(method, 0.0) if momentum is None else momentum
        norm = method in {"mocov3", "simsiam"}
        self.projector = mlp(features, heads.hidden, heads.out, heads.layers, last_norm=norm)
        self.predictor: nn.Module = nn.Identity()
        if method in {"mocov3", "simsiam", "byol"}:
            self.predictor = mlp(heads.out, heads.predictor_hidden, heads.out, 2, last_norm=method == "mocov3")
        temperature = heads.temperature or TEMPERATURE.get(method, 1.0)
        self.prototypes: nn.Module = nn.Identity()
        if method == "swav":
            self.prototypes = nn.Linear(heads.out, heads.prototypes, bias=False)
        losses: dict[str, Callable[[], nn.Module]] = {
            "simclr": lambda: QDNTXentLoss(temperature),
            "mocov2": lambda: QDMoCoLoss(heads.out, heads.queue, temperature, seed=seed),
            "mocov3": lambda: QDMoCoV3Loss(temperature),
            "simsiam": QDNegativeCosine,
            "byol": lambda: QDNegativeCosine(byol=True),
            "swav": lambda: QDSwAVLoss(temperature),
        }
        self.loss = losses[method]()
        self.teacher: nn.Module = nn.Identity()
        if method in KEY_MOMENTUM:
            self.teacher = copy.deepcopy(nn.Sequential(backbone, self.projector)).requires_grad_(False)

    def embed(self, views: Tensor) -> Tensor:
        """Backbone and projector."""
        out: Tensor = self.projector(self.backbone(views))
        return out

    def forward(self, first: Tensor, second: Tensor, weight: Tensor | None = None) -> Tensor:
        """The weighted loss of pairs of views.

        Shapes: (n, 3, S, S) twice, weight (n,) -> scalar.
        """
        loss = self.loss
        if self.method == "simclr":
            return cast(Tensor, loss(self.embed(first), self.embed(second), weight))
        if self.method == "swav":
            with torch.no_grad():
                layer = cast(nn.Linear, self.prototypes)
                layer.weight.copy_(F.normalize(layer.weight, dim=1))
            scores = [self.prototypes(F.normalize(self.embed(v), dim=1)) for v in (first, second)]
            return cast(Tensor, loss(scores, weight=weight))
        if self.method == "mocov2":
            with torch.no_grad():
                keys = self.teacher(second)
            return cast(Tensor, loss(self.embed(first), keys, weight))
        z1, z2 = self.embed(first), self.embed(second)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.method == "simsiam":
            return cast(Tensor, (loss(p1, z2, weight) + loss(p2, z1, weight)) / 2)
        with torch.no_grad():
            k1, k2 = self.teacher(first), self.teacher(second)
        return cast(Tensor, loss(p1, k2, weight) + loss(p2, k1, weight))

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Move the momentum copy after a step; ``progress`` runs from 0 to 1 over the training."""
        if self.method not in KEY_MOMENTUM:
            return
        m = self.key_momentum
        if self.method != "mocov2":
            m = 1 - (1 - m) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2
        own = [p.detach() for p in nn.Sequential(self.backbone, self.projector).parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), own, 1 - m)

    def groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters in groups: without weight decay for biases and normalizations, SimSiam's predictor at a fixed rate."""
        out: list[dict[str, Any]] = []
        parts: list[tuple[Sequence[nn.Module], bool]] = [([self.backbone, self.projector, self.prototypes], False)]
        parts.append(([self.predictor], self.method == "simsiam"))
        for modules, fixed in parts:
            found = [p for module in modules for p in module.parameters() if p.requires_grad]
            for flat in (False, True):
                chosen = [p for p in found if (p.ndim <= 1) == flat]
                if chosen:
                    out.append({"params": chosen, "weight_decay": 0.0 if flat else weight_decay, "fixed": fixed})
        return out
