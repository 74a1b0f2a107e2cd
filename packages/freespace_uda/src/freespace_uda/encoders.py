"""Encoders: maps at growing strides from timm by name, from packages of weights, or our own small one."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tenfold import UserError, models

Norm = Literal["group", "frozen", "batch"]


def _group(channels: int) -> nn.Module:
    groups = next(g for g in (8, 6, 5, 4, 3, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Makes the normalization of a layer of our own from its number of channels."""
    return nn.BatchNorm2d if norm == "batch" else _group


class SmallEncoder(nn.Module):
    """Maps at strides 4, 8 and 16 from eight 3 x 3 convolutions, about 0.1 M parameters at width 16.

    Args:
        width: channels of the first layer; the maps have 2, 3 and 4 times as many.
        norm: group or batch normalization.
    """

    reductions = (4, 8, 16)

    def __init__(self, width: int = 16, norm: Norm = "group") -> None:
        super().__init__()
        make = norm_layer(norm)

        def layer(before: int, after: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            return nn.Sequential(convolution, make(after), nn.ReLU(inplace=True))

        w = width
        self.channels = (2 * w, 3 * w, 4 * w)
        self.stem = layer(3, w, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(layer(before, after, 2), layer(after, after, 1))
            for before, after in ((w, 2 * w), (2 * w, 3 * w), (3 * w, 4 * w))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps at strides 4, 8 and 16."""
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


OWN = {"freespace": {"tiny": 8, "small": 16, "medium": 32}}
"""Widths of our own encoders, ``freespace:NAME``."""


def _with_groups(module: nn.Module) -> None:
    """Replace batch normalization by group normalization, with the activation that timm may have put into it."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            group = _group(child.num_features)
            extra = [part for part in (getattr(child, "drop", None), getattr(child, "act", None)) if part is not None]
            setattr(module, name, nn.Sequential(group, *extra) if extra else group)
        else:
            _with_groups(child)


def widen_first(module: nn.Module, channels: int) -> None:
    """Let the first convolution take more channels, whose filters are 0 at the start.

    Raises:
        ValueError: there is no convolution of three channels.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d) and child.in_channels == 3 and child.groups == 1:
            wider = copy.deepcopy(child)
            more = channels - 3
            wider.in_channels = channels
            wider.weight = nn.Parameter(
                torch.cat(
                    [child.weight.detach(), child.weight.new_zeros(len(child.weight), more, *child.kernel_size)], 1
                )
            )
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, wider)
            return
    raise ValueError("no convolution of three channels was found")


class Encoder(nn.Module):
    """Maps of a picture at strides 4 to 32 (of which a network may lack some), from pixels in [0, 1] or from normals.

    Args:
        name: ``timm:NAME``, ``packaged:NAME``, or ``freespace:tiny``, ``freespace:small``, ``freespace:medium``.
        pretrained: weights that timm publishes; packaged ones always have theirs.
        in_chans: 3 (RGB), or 4 (normals and validity).
        norm: group (batch normalization is replaced), frozen (it keeps the statistics that came with the weights), or batch
            (live statistics, for networks that only ever see one domain at a time).
        size: height and width of the pictures, for a trial that finds out what an encoder cannot take.
        option: option that gave the name, for messages.

    Raises:
        UserError: an unknown name, or an encoder that has no maps at a stride of 4 or 8, or cannot take this size.

    Example:
        >>> [tuple(each.shape[-2:]) for each in Encoder("freespace:tiny")(torch.rand(1, 3, 64, 128))]
        [(16, 32), (8, 16), (4, 8)]
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        in_chans: int = 3,
        norm: Norm = "group",
        size: tuple[int, int] | None = None,
        option: str = "--rgb_encoder",
    ) -> None:
        super().__init__()
        kind, _, own = name.partition(":")
        shown = f"{option} {name}"
        if kind in OWN and own in OWN[kind]:
            if pretrained:
                raise UserError(f"{shown}: there are no pretrained weights of this encoder")
            small = SmallEncoder(OWN[kind][own], norm)
            body: nn.Module = small
            self.channels: tuple[int, ...]
            self.reductions: tuple[int, ...]
            self.channels, self.reductions = small.channels, SmallEncoder.reductions
            self.rows: tuple[int, ...] = (0, 1, 2)
            statistics: tuple[Sequence[float], Sequence[float]] = ((0.5,) * 3, (0.25,) * 3)
        else:
            args = {"img_size": size} if size is not None and "swin" in own else None
            body = models.build(
                name, pretrained=pretrained, features_only=True, option=option, own={"freespace": {}}, args=args
            )
            info = body.feature_info
            found = dict(zip(info.reduction(), info.channels(), strict=True))  # type: ignore[operator, union-attr]
            steps = tuple(r for r in (4, 8, 16, 32) if r in found)
            if not {4, 8} & set(steps) or len(steps) < 2:
                raise UserError(
                    f"{shown}: maps at strides 4 or 8 are needed, its own are at {', '.join(map(str, found))}"
                )
            reductions = list(info.reduction())  # type: ignore[operator, union-attr]
            self.rows = tuple(len(reductions) - 1 - reductions[::-1].index(r) for r in steps)
            self.channels, self.reductions = tuple(info.channels()[i] for i in self.rows), steps  # type: ignore[operator, union-attr]
            if norm == "group":
                _with_groups(body)
            statistics = models.expected_statistics(body) or ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        if in_chans != 3:
            try:
                widen_first(body, in_chans)
            except ValueError as error:
                raise UserError(f"{shown}: {error}") from error
            statistics = ((0.0,) * in_chans, (1.0,) * in_chans)
        self.body = body
        self.norm = norm
        self.register_buffer("mean", torch.tensor(statistics[0]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics[1]).view(1, -1, 1, 1), persistent=False)
        if size is not None and kind not in OWN:
            self._try(size, in_chans, shown)

    def limit(self, reductions: tuple[int, ...]) -> None:
        """Give the maps of some strides alone."""
        kept = [i for i, r in enumerate(self.reductions) if r in reductions]
        self.rows, self.channels = tuple(self.rows[i] for i in kept), tuple(self.channels[i] for i in kept)
        self.reductions = tuple(self.reductions[i] for i in kept)

    def _try(self, size: tuple[int, int], in_chans: int, shown: str) -> None:
        try:
            with torch.no_grad():
                maps = self(torch.zeros(2, in_chans, *size))
        except (RuntimeError, AssertionError, ValueError) as error:
            line = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{shown}: it cannot take pictures of {size[1]} x {size[0]} pixels ({line})") from error
        got = [tuple(m.shape[1:]) for m in maps]
        wanted = [(c, -(-size[0] // r), -(-size[1] // r)) for c, r in zip(self.channels, self.reductions, strict=True)]
        if got != wanted:
            raise UserError(f"{shown}: its maps are {got}, expected {wanted}: take a size that is a multiple of 32")

    def train(self, mode: bool = True) -> "Encoder":
        """Training mode, but frozen batch normalization keeps its statistics."""
        super().train(mode)
        if self.norm == "frozen":
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps, finest first, channels first."""
        found = self.body((images - self.mean) / self.std)
        maps = [found[i] for i in self.rows]
        return [
            m.permute(0, 3, 1, 2) if m.shape[1] != c and m.shape[-1] == c else m
            for m, c in zip(maps, self.channels, strict=True)
        ]
