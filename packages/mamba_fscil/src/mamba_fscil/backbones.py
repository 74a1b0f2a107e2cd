"""Backbones that give a map: our own for the benchmarks of the field, and any classifier of timm, torchvision or the user's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold import UserError, checkpoints, models
from tenfold.modules import evaluating


class ResidualBlock(nn.Module):
    """Three 3 x 3 convolutions with a shortcut, and a pooling by 2.

    Source: Mamba-FSCIL's and NC-FSCIL's code, after TADAM, arXiv 1805.10123.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(3):
            layers += [nn.Conv2d(outputs if number else inputs, outputs, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs)] + ([nn.LeakyReLU(0.1)] if number < 2 else [])
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (b, inputs, H, W) -> (b, outputs, H // 2, W // 2)."""
        return F.max_pool2d(F.leaky_relu(self.body(x) + self.shortcut(x), 0.1), 2)


class ResNet12(nn.Module):
    """The backbone of few-shot learning on small pictures: four residual blocks, each of which halves the map.

    Args:
        widths: channels of the blocks; (64, 160, 320, 640) has 12,424,320 parameters.
        in_chans: channels of the images.

    Source: Mamba-FSCIL's and NC-FSCIL's code: no DropBlock, Kaiming-normal weights by fan-out.

    Example:
        >>> ResNet12(widths=(4, 8, 8, 8))(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 2, 2])
    """

    def __init__(self, widths: Sequence[int] = (64, 160, 320, 640), in_chans: int = 3) -> None:
        super().__init__()
        pairs = zip((in_chans, *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairs))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (b, 3, H, W) -> (b, 640, H // 16, W // 16)."""
        return self.blocks(x)


class SmallConv(nn.Module):
    """Three convolutions with batch norm and two poolings, for pictures of letters.

    Args:
        widths: channels of the convolutions.
        in_chans: channels of the images.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), in_chans: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(zip((in_chans, *widths), widths, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if number < len(widths) - 1 else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (b, 3, H, W) -> (b, 64, H // 4, W // 4)."""
        return self.layers(x)


def _resnet18(in_chans: int = 3) -> nn.Module:
    return models.build("timm:resnet18", in_chans=in_chans, num_classes=0)


OWN: dict[str, Callable[..., nn.Module]] = {
    "resnet12": ResNet12,
    "resnet12-half": lambda in_chans=3: ResNet12((32, 80, 160, 320), in_chans),
    "resnet18": _resnet18,
    "conv": SmallConv,
}
"""Backbones by the name ``fscil:NAME``."""


def as_map(found: Tensor, channels: int | None, prefix: int | None) -> Tensor:
    """What a model gave before its pooling as a map (b, c, H, W), whatever its layout.

    Args:
        found: (b, c, H, W), (b, H, W, c), tokens (b, L, c), or a pooled feature (b, c), which is a map of one place.
        channels: c, where the model says; tells channels-last from channels-first.
        prefix: number of tokens before those of the map (class, distillation, register); None infers it.

    Raises:
        UserError: tokens that fill no square map.
    """
    if found.ndim == 4:
        last = channels is not None and found.shape[-1] == channels and found.shape[1] != channels
        return found.permute(0, 3, 1, 2).contiguous() if last else found
    if found.ndim == 2:
        return found[:, :, None, None]
    if found.ndim != 3:
        raise UserError(f"a backbone must give a map, tokens or a feature, got a tensor of shape {tuple(found.shape)}")
    length = found.shape[1]
    if prefix is None:  # the largest square that leaves a few tokens for classes, distillation and registers
        prefix = length - math.isqrt(length) ** 2
    side = math.isqrt(length - prefix)
    if side * side != length - prefix or prefix > 16:
        raise UserError(f"{length} tokens of a backbone fill no square map (with {prefix} tokens before it)")
    return found[:, prefix:].transpose(1, 2).reshape(found.shape[0], found.shape[2], side, side)


class MapBackbone(nn.Module):
    """A backbone as a module from images to maps; frozen, it stays in evaluation mode, batch norms included.

    Args:
        model: gives maps, or has timm's ``forward_features``, or is a classifier in which the last map or tokens can be found.
        example: images (2, C, H, W) that are looked at once.

    Attributes:
        channels: channels of the map.
        size: height and width of the map.

    Raises:
        UserError: no map is found in the model.

    Example:
        >>> backbone = MapBackbone(nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8))
        >>> backbone.channels, backbone.size
        (8, (4, 4))
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.model = model
        self.frozen = False
        self._path = ""
        self._kept: list[Tensor] = []
        self._channels: int | None = getattr(model, "num_features", None)
        self._prefix: int | None = getattr(model, "num_prefix_tokens", None)
        self._features = hasattr(model, "forward_features")
        with evaluating(model):
            if not self._features:
                out = model(example)
                if not (isinstance(out, Tensor) and out.ndim == 4):
                    self._find(example)
            found = self(example)
        self.channels, self.size = found.shape[1], (found.shape[2], found.shape[3])

    def _find(self, example: Tensor) -> None:
        """Find the module whose output is the last map or the last tokens of all places."""
        seen: list[tuple[str, Tensor]] = []
        hooks = [
            module.register_forward_hook(lambda m, i, o, name=name: seen.append((name, o)))
            for name, module in self.model.named_modules()
            if name
        ]
        try:
            self.model(example)
        finally:
            for hook in hooks:
                hook.remove()
        maps = [(name, o) for name, o in seen if isinstance(o, Tensor) and o.ndim == 4 and min(o.shape[2:]) > 1]
        tokens = [(name, o) for name, o in seen if isinstance(o, Tensor) and o.ndim == 3 and o.shape[1] > 4]
        chosen = maps if maps and (not tokens or seen.index(maps[-1]) > seen.index(tokens[-1])) else tokens
        if not chosen:
            raise UserError(f"{type(self.model).__name__} gives no map before its classifier: give a model that does")
        self._path = chosen[-1][0]
        self.model.get_submodule(self._path).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._kept = [output]

    def freeze(self) -> "MapBackbone":
        """Take no gradient, and stay in evaluation mode for good."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> "MapBackbone":
        """Training mode; nothing for a frozen backbone."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Shapes: ``images`` (b, C, H, W) -> (b, c, h, w)."""
        if self._features:
            found = self.model.forward_features(images)  # type: ignore[operator]
        else:
            found = self.model(images)
            if self._path:
                (found,) = self._kept
                self._kept = []
        if isinstance(found, dict):  # hierarchical models of several heads
            found = next(value for value in reversed(found.values()) if isinstance(value, Tensor))
        elif isinstance(found, tuple | list):
            found = next(value for value in found if isinstance(value, Tensor))
        return as_map(found, self._channels, self._prefix)


def build_backbone(spec: str, weights: str | None, size: int, *, option: str = "--backbone") -> MapBackbone:
    """The backbone that ``spec`` names.

    Args:
        spec: fscil:NAME, or a name of ``tenfold.models`` (timm:NAME, tv:NAME, hf:PATH, py:MODULE:FUNCTION, packaged:NAME).
        weights: a file of weights, "pretrained", or None.
        size: side of the images.
        option: option that gave the name, for messages; that of the weights is ``{option}_weights``.

    Raises:
        UserError: an unknown name, weights that do not fit, or a model that does not take images of this size.
    """
    pretrained = weights == "pretrained"
    model = models.build(spec, pretrained=pretrained, own={"fscil": OWN}, option=option)
    if weights is not None and not pretrained:
        _load(model, weights, option)
    try:
        return MapBackbone(model, torch.zeros(2, 3, size, size))
    except UserError as error:
        raise UserError(f"{option} {spec}: {error}") from error
    except (RuntimeError, AssertionError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option} {spec} does not take images of {size} x {size} pixels ({line})") from error


def _load(model: nn.Module, weights: str, option: str) -> None:
    """Load a file of weights; those of a classifier with another number of classes, or none, are taken without its head."""
    own = model.state_dict()
    found = checkpoints.read_foreign(weights, option=f"{option}_weights", names=own.keys()).tensors
    differ = [name for name, x in found.items() if name in own and x.shape != own[name].shape]
    missing = [name for name in own if name not in found and not name.endswith("num_batches_tracked")]
    heads = _heads(model)
    if any(name not in heads for name in [*differ, *missing]):
        checkpoints.check_shapes(
            f"{option}_weights {weights}",
            {name: tuple(x.shape) for name, x in own.items() if name not in heads and name in {*differ, *missing}},
            {name: x for name, x in found.items() if name in differ},
        )
    model.load_state_dict({name: x for name, x in found.items() if name in own and name not in differ}, strict=False)


def _heads(model: nn.Module) -> set[str]:
    """Names of the parameters of the classifier, which gives no part of a map."""
    known = getattr(model, "pretrained_cfg", None) or {}
    heads = known.get("classifier") or ()
    prefixes = [heads] if isinstance(heads, str) else list(heads)
    prefixes += ["fc", "classifier", "head", "heads"]
    return {
        name for name in model.state_dict() if name.split(".")[0] in prefixes or name.rpartition(".")[0] in prefixes
    }
