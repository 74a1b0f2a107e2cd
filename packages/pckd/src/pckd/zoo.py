"""The classifiers of the CIFAR-100 literature on distillation, with the names of weights that RepDistiller's files have.

So published teachers load as they are. Two small plain networks for little images besides.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


def _pooled(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


class _Basic(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = None
        if stride > 1 or inputs != planes:
            self.downsample = nn.Sequential(_conv(inputs, planes, 1, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 x 32 images (arXiv 1512.03385, section 4.2), in widths of one's choice."""

    def __init__(self, depth: int, filters: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, filters[0], 3), nn.BatchNorm2d(filters[0])
        inputs = filters[0]
        for number, planes in enumerate(filters[1:], 1):
            blocks = [_Basic(inputs, planes, 2 if number > 1 else 1)]
            blocks += [_Basic(planes, planes, 1) for _ in range((depth - 2) // 6 - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs = planes
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.get_submodule("layer3")(self.get_submodule("layer2")(self.get_submodule("layer1")(x)))
        out: Tensor = self.fc(_pooled(x))
        return out


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, planes, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), _conv(planes, planes, 3)
        self.convShortcut = None if inputs == planes else _conv(inputs, planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(out))))


class _WideStage(nn.Module):
    def __init__(self, count: int, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        blocks = [_WideBlock(inputs if i == 0 else planes, planes, stride if i == 0 else 1) for i in range(count)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width (arXiv 1605.07146)."""

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        count, planes = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
        self.conv1 = _conv(3, 16, 3)
        self.block1 = _WideStage(count, 16, planes[0], 1)
        self.block2 = _WideStage(count, planes[0], planes[1], 2)
        self.block3 = _WideStage(count, planes[1], planes[2], 2)
        self.bn1 = nn.BatchNorm2d(planes[2])
        self.fc = nn.Linear(planes[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        out: Tensor = self.fc(_pooled(F.relu(self.bn1(x))))
        return out


class VGG(nn.Module):
    """VGG with batch norm and one linear layer; each block's last rectifier stands outside of it."""

    def __init__(self, plan: Sequence[Sequence[int]], num_classes: int) -> None:
        super().__init__()
        inputs = 3
        for number, widths in enumerate(plan):
            layers: list[nn.Module] = []
            for planes in widths:
                layers += [_conv(inputs, planes, 3, bias=True), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
                inputs = planes
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        large = x.shape[2] == 64
        for number in range(5):
            x = F.relu(self.get_submodule(f"block{number}")(x))
            if number < 3 or (number == 3 and large):
                x = F.max_pool2d(x, 2)
        out: Tensor = self.classifier(_pooled(x))
        return out


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, 4 * planes), nn.BatchNorm2d(4 * planes)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != 4 * planes:
            self.shortcut = nn.Sequential(_conv(inputs, 4 * planes, 1, stride), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 with a 3 x 3 stem of stride 1, for 32 x 32 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 3), nn.BatchNorm2d(64)
        inputs = 64
        for number, count in enumerate((3, 4, 6, 3), 1):
            planes, blocks = 32 * 2**number, []
            for i in range(count):
                blocks.append(_Bottleneck(inputs, planes, 2 if i == 0 and number > 1 else 1))
                inputs = 4 * planes
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
        out: Tensor = self.linear(_pooled(x))
        return out


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, self.residual = inputs * expansion, stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *(_conv(inputs, inner), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(_conv(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
            *(_conv(inner, outputs), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 of half width and expansion 6, for 32 x 32 images."""

    def __init__(self, num_classes: int, width: float = 0.5, expansion: int = 6) -> None:
        super().__init__()
        T, inputs = expansion, int(32 * width)
        self.conv1 = nn.Sequential(_conv(3, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        plan = [
            (1, 16, 1, 1),
            (T, 24, 2, 1),
            (T, 32, 3, 2),
            (T, 64, 4, 2),
            (T, 96, 3, 1),
            (T, 160, 3, 2),
            (T, 320, 1, 1),
        ]
        for t, c, n, s in plan:
            outputs, layers = int(c * width), []
            for i in range(n):
                layers.append(_Inverted(inputs, outputs, s if i == 0 else 1, t))
                inputs = outputs
            self.blocks.append(nn.Sequential(*layers))
        self.conv2 = nn.Sequential(_conv(inputs, 1280), nn.BatchNorm2d(1280), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = self.conv1(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.classifier(_pooled(self.conv2(x)))
        return out


def _shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class _ShuffleBlock1(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, 1 if inputs == 24 else groups
        outputs -= inputs if stride == 2 else 0
        inner = outputs // 4
        self.conv1, self.bn1 = _conv(inputs, inner, groups=self.groups), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = _conv(inner, outputs, groups=groups), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = _shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], dim=1))
        return F.relu(out + x)


class ShuffleV1(nn.Module):
    """ShuffleNet (arXiv 1707.01083) of three groups, for 32 x 32 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 24), nn.BatchNorm2d(24)
        inputs = 24
        for number, (outputs, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            blocks = [_ShuffleBlock1(inputs, outputs, 2, 3)]
            blocks += [_ShuffleBlock1(outputs, outputs, 1, 3) for _ in range(count - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, 4):
            x = self.get_submodule(f"layer{number}")(x)
        out: Tensor = self.linear(_pooled(x))
        return out


class _ShuffleBlock2(nn.Module):
    def __init__(self, planes: int) -> None:
        super().__init__()
        half = planes // 2
        self.conv1, self.bn1 = _conv(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _conv(half, half, 3, 1, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return _shuffle(torch.cat([kept, F.relu(self.bn3(self.conv3(out)))], dim=1), 2)


class _ShuffleDown(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = _conv(inputs, inputs, 3, 2, inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _conv(inputs, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv(inputs, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _conv(half, half, 3, 2, half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], dim=1), 2)


class ShuffleV2(nn.Module):
    """ShuffleNetV2 1x (arXiv 1807.11164), for 32 x 32 images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 24), nn.BatchNorm2d(24)
        inputs = 24
        for number, (outputs, count) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            blocks: list[nn.Module] = [_ShuffleDown(inputs, outputs), *(_ShuffleBlock2(outputs) for _ in range(count))]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            inputs = outputs
        self.conv2, self.bn2 = _conv(inputs, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, 4):
            x = self.get_submodule(f"layer{number}")(x)
        out: Tensor = self.linear(_pooled(F.relu(self.bn2(self.conv2(x)))))
        return out


class Plain(nn.Module):
    """Three 3 x 3 convolutions of widths w, 2 w, 4 w (the later two of stride 2), then 1 x 1 to a feature of 64."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs, kernel, stride in ((width, 3, 1), (2 * width, 3, 2), (4 * width, 3, 2), (64, 1, 1)):
            layers += [_conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, C)."""
        out: Tensor = self.fc(_pooled(self.features(x)))
        return out


_THIN, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
_VGG8 = ((64,), (128,), (256,), (512,), (512,))
ZOO: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{d}": partial(ResNet, d, _THIN) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{d}x4": partial(ResNet, d, _WIDE) for d in (8, 32)},
    **{f"wrn_{d}_{w}": partial(WideResNet, d, w) for d in (16, 40) for w in (1, 2)},
    "vgg8": partial(VGG, _VGG8),
    "vgg13": partial(VGG, tuple((*widths, *widths) for widths in _VGG8)),
    "ResNet50": ResNet50,
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
    **{f"plain{w}": partial(Plain, w) for w in (4, 8, 16, 32)},
}
"""Name -> a function of the number of classes."""
