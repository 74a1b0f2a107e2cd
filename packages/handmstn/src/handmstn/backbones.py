"""Networks by name: maps for the aligner, pooled features for palm and fingers; timm's, packaged ones, and two small ones."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import UserError, models


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SmallNet(nn.Module):
    """Four or five 3 x 3 blocks that halve the picture; the mean of the last map is the feature."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], pooled: bool) -> None:
        super().__init__()
        ends = (3, *widths)
        self.blocks = nn.Sequential(*(_block(a, b, s) for a, b, s in zip(ends, widths, strides, strict=False)))
        self.pooled = pooled
        self.num_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D), or the map."""
        maps: Tensor = self.blocks(x)
        return maps.mean((2, 3)) if self.pooled else maps


def _cnn4(classes: int = 0) -> nn.Module:
    return SmallNet((16, 32, 64, 96), (1, 2, 2, 2), pooled=True)


def _loc(classes: int = 0) -> nn.Module:
    return SmallNet((16, 32, 48, 64, 64), (2, 2, 1, 2, 1), pooled=False)


def _loc6(classes: int = 0) -> nn.Module:
    return SmallNet((16, 32, 48, 64, 96, 128), (2, 2, 1, 2, 1, 2), pooled=False)


OWN: dict[str, dict[str, Callable[..., nn.Module]]] = {"hand": {"cnn4": _cnn4, "loc": _loc, "loc6": _loc6}}
"""Models of ours: ``hand:cnn4`` reads crops, ``hand:loc`` and ``hand:loc6`` give maps for the aligner."""


class _LastMap(nn.Module):
    """The map of the deepest stage whose stride is 16 or less."""

    def __init__(self, net: nn.Module, stage: int) -> None:
        super().__init__()
        self.net, self.stage = net, stage

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)[self.stage]
        return found


class _Resized(nn.Module):
    """A network that takes pictures of one size only, given crops of another."""

    def __init__(self, net: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(F.interpolate(x, self.size, mode="bilinear", align_corners=False))
        return found


def build_map(spec: str, size: int, *, option: str = "--aligner.backbone") -> nn.Module:
    """A network that gives one map (B, C, h, w) for pictures of ``size`` pixels.

    Raises:
        UserError: an unknown name, or a network that gives no maps of pictures of this size.
    """
    kind = spec.partition(":")[0]
    net = models.build(spec, features_only=kind != "hand", own=OWN, option=option)
    if kind == "hand":
        if not isinstance(net, SmallNet) or net.pooled:
            raise UserError(f"{option} {spec} gives no map: take hand:loc, timm:NAME or packaged:NAME")
        return net
    with _one_line(f"{option} {spec}", (size, size)):
        reductions = list(net.feature_info.reduction())  # type: ignore[union-attr, operator]
        stage = max((i for i, r in enumerate(reductions) if r <= 16), default=len(reductions) - 1)
        wrapped = _LastMap(net, stage)
        with torch.no_grad():
            maps = wrapped.eval()(torch.zeros(1, 3, size, size))
        if maps.ndim != 4:
            raise ValueError(f"its maps have the shape {tuple(maps.shape)}")
    return wrapped


def build_pooled(
    spec: str, size: tuple[int, int], *, pretrained: bool = False, option: str = "--recognizer.palm"
) -> tuple[nn.Module, int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """A network that gives one feature (B, D) per crop of ``size``; D; mean and deviation of the pixels that it expects.

    A network that takes pictures of a fixed size only has the crops resized to it; one that fails on them, to multiples of 32.

    Raises:
        UserError: an unknown name, or a network that gives no features of crops of this size.
    """
    if spec.startswith(("tv:", "hf:")):
        raise UserError(f"{option} {spec}: expected timm:NAME, packaged:NAME, hand:NAME or py:MODULE:FUNCTION")
    net: nn.Module = models.build(spec, num_classes=0, pretrained=pretrained, own=OWN, option=option)
    statistics = models.expected_statistics(net) or ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    config: Any = getattr(net, "pretrained_cfg", None) or {}
    fixed = bool(config.get("fixed_input_size"))
    side = tuple(config.get("input_size", (3, 224, 224))[-2:])
    if fixed and side != size:
        net = _Resized(net, (int(side[0]), int(side[1])))
    with _one_line(f"{option} {spec}", size), torch.no_grad():
        try:
            feature = net.eval()(torch.zeros(2, 3, *size))
        except RuntimeError:  # maps of several scales that meet only for whole multiples of 32
            net = _Resized(net, (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32))
            feature = net.eval()(torch.zeros(2, 3, *size))
        if not isinstance(feature, Tensor) or feature.ndim != 2 or not feature.shape[1]:
            shape = tuple(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
            raise ValueError(f"it gives {shape}, expected features (B, D)")
    return net.train(), int(feature.shape[1]), statistics


class _Placed(nn.Module):
    """A map in few channels, flattened: what lies where is kept."""

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = net
        self.reduce = nn.Conv2d(channels, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reduce(self.net(x))
        return out.flatten(1)


CHANNELS = 16
"""Numbers per place of a feature that keeps places."""


def build_placed(
    spec: str, size: tuple[int, int], places: int, *, pretrained: bool = False, option: str = "--recognizer.palm"
) -> tuple[nn.Module, int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """As ``build_pooled``, but the feature keeps what lies where in a crop: the deepest map with ``places`` or more a side.

    Raises:
        UserError: an unknown name, or a network that gives no such map of crops of this size.
    """
    own = spec.startswith("hand:")
    net: nn.Module = models.build(spec, features_only=not own, pretrained=pretrained, own=OWN, option=option)
    statistics = models.expected_statistics(net) or ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    with _one_line(f"{option} {spec}", size), torch.no_grad():
        if isinstance(net, SmallNet):
            net.pooled = False
            maps = [net.eval()(torch.zeros(2, 3, *size))]
        else:
            maps = list(net.eval()(torch.zeros(2, 3, *size)))
    if any(m.ndim != 4 for m in maps) or max(maps[0].shape[2:]) < places:
        shape = tuple(maps[0].shape)
        raise UserError(
            f"--recognizer.places {places}: {option} {spec} has no map of so many places a side of crops of"
            f" {size[0]} x {size[1]} pixels, its largest is {shape}"
        )
    stage = max(i for i, m in enumerate(maps) if max(m.shape[2:]) >= places)
    found = maps[stage]
    kept = net if isinstance(net, SmallNet) else _LastMap(net, stage)
    return _Placed(kept, found.shape[1]).train(), CHANNELS * found[0, 0].numel(), statistics


@contextlib.contextmanager
def _one_line(shown: str, size: tuple[int, int]) -> Iterator[None]:
    """What a network says of pictures that it cannot take, as the user's fault."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError, AttributeError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{shown} cannot read pictures of {size[0]} x {size[1]} pixels ({reason[:150]})") from error
