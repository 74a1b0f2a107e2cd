"""The local classifiers of the modules."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrecon.config import HeadSpec
from localrecon.plan import SplitPlan
from tenfold import UserError


def simplex_etf(classes: int, features: int) -> Tensor:
    """Rows (C, D) of a simplex equiangular tight frame, of unit length and pairwise cosine -1 / (C - 1).

    Needs D >= C - 1. Directions are drawn; they turn the frame and nothing else.
    """
    if features < classes - 1:
        raise UserError(f"an etf classifier of {classes} classes needs {classes - 1} features, got {features}")
    centered = torch.eye(classes, dtype=torch.float64) - 1 / classes
    u, s, _ = torch.linalg.svd(centered)
    corners = u[:, : classes - 1] * s[: classes - 1]  # (C, C - 1), isometric to the centered simplex
    basis = torch.linalg.qr(torch.randn(features, classes - 1, dtype=torch.float64))[0]
    return F.normalize(corners @ basis.T, dim=1).float()


def classifier(features: int, classes: int, spec: HeadSpec) -> nn.Linear:
    """The last layer of a head; random and etf ones are fixed."""
    layer = nn.Linear(features, classes, bias=spec.classifier == "trainable")
    if spec.classifier == "etf":
        layer.weight = nn.Parameter(simplex_etf(classes, features) * math.sqrt(features))
    return layer.requires_grad_(spec.classifier == "trainable")


class TokenPool(nn.Module):
    """(B, T, D) -> (B, D): the mean over tokens, or the first token."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """One vector per sample."""
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, (B, T, D) -> (B, T, D), by torch's fused attention."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The tokens after attention and MLP."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.proj(attended.transpose(1, 2).reshape(B, T, D)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return x


def _conv(before: int, after: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    ]


def _norm_linear(features: int, classes: int, spec: HeadSpec) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(features), classifier(features, classes, spec))


def _gap_linear(channels: int, classes: int, spec: HeadSpec) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier(channels, classes, spec))


def _conv_gap(shape: Sequence[int], classes: int, spec: HeadSpec, last_stage: bool) -> nn.Module:
    channels = shape[0]
    features = min(spec.channels, channels if last_stage else 2 * channels)
    conv = _conv(channels, features, stride=1 if last_stage else 2)
    hidden = [nn.Linear(features, spec.hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *hidden, classifier(spec.hidden, classes, spec))


def _mlp_sr(shape: Sequence[int], classes: int, spec: HeadSpec) -> nn.Module:
    channels, height, width = shape
    small = nn.AdaptiveAvgPool2d((-(-height // 4), -(-width // 4)))
    convs = [layer for _ in range(3) for layer in _conv(channels, channels, kernel=1)]
    features = 4 * channels
    mlp: list[nn.Module] = []
    for _ in range(2):
        mlp += [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU(inplace=True)]
    return nn.Sequential(
        small, *convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *mlp, classifier(features, classes, spec)
    )


def _aug(later: Sequence[Sequence[int]], shape: Sequence[int], depth: int, classes: int, spec: HeadSpec) -> nn.Module:
    """Convolutions of the widths and sizes that evenly spaced later blocks have."""
    places = sorted(set(torch.linspace(0, len(later) - 1, depth).round().long().tolist()))
    layers: list[nn.Module] = []
    channels, height = shape[0], shape[1]
    for place in places:
        after = later[place]
        layers += _conv(channels, after[0], stride=max(1, round(height / after[1])))
        channels, height = after[0], after[1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier(channels, classes, spec))


def _lm(features: int, vocabulary: int, spec: HeadSpec) -> nn.Module:
    if spec.rank is None:
        return nn.Sequential(nn.RMSNorm(features), nn.Linear(features, vocabulary, bias=False))
    low = nn.Linear(features, spec.rank, bias=False)
    return nn.Sequential(nn.RMSNorm(features), low, nn.Linear(spec.rank, vocabulary, bias=False))


class _Dense(nn.Module):
    """3 x 3 convolution, BatchNorm, ReLU, 1 x 1 convolution, resized: (B, C, H, W) -> (B, C', s_h H, s_w W)."""

    def __init__(self, shape: Sequence[int], output: Sequence[int], channels: int) -> None:
        super().__init__()
        hidden = min(channels, shape[0])
        self.layers = nn.Sequential(*_conv(shape[0], hidden), nn.Conv2d(hidden, output[0], 1))
        self.scale = output[1] / shape[1], output[2] / shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """One row of numbers per position of the model's output."""
        size = [round(scale * side) for scale, side in zip(self.scale, x.shape[2:], strict=True)]
        return F.interpolate(self.layers(x), size=size, mode="bilinear", align_corners=False)


def _kind_of(spec: HeadSpec, shape: Sequence[int], plan: SplitPlan, *, last: bool) -> str:
    """The kind that auto stands for."""
    if spec.kind != "auto":
        return spec.kind
    if plan.task == "lm" or (plan.task == "custom" and len(plan.output) == len(shape) == 2):
        return "lm"
    if plan.task == "custom" and len(plan.output) == 3:
        return "dense"
    if last:
        return "token"
    return {1: "linear", 2: "token", 3: "conv_gap"}.get(len(shape), "linear")


def _channels_last(spec: HeadSpec, plan: SplitPlan, k: int, place: int) -> bool:
    """Whether a module gives a map (H, W, C), as in Swin.

    Raises:
        UserError: that is not known.
    """
    shape = plan.shapes[place]
    if len(shape) != 3:
        return False
    if spec.layout != "auto":
        return spec.layout == "channels_last"
    known = plan.channels_last[place] if plan.channels_last else shape[0] == shape[1] != shape[2]  # plans of 0.1.0
    if known is None:
        raise UserError(
            f"module {k + 1} gives (B, {', '.join(map(str, shape))}), of which it cannot be told where the channels are:"
            " say so by the layout of its head (HeadSpec(layout=...), --head.layout channels_first or channels_last)"
        )
    return known


def build_head(spec: HeadSpec, plan: SplitPlan, k: int, place: int | None = None) -> nn.Module:
    """The head of one module.

    Args:
        spec: which head.
        plan: shapes of the blocks' outputs and of the model's own.
        k: number of the module, from 0 on.
        place: number of the module's last block; default: as planned.

    Raises:
        UserError: the head does not fit the module's output.
    """
    place = plan.ranges[k][1] - 1 if place is None else place
    shapes, classes, modules = plan.shapes, plan.classes, plan.k
    shape = shapes[place]
    last = _channels_last(spec, plan, k, place)
    kind = _kind_of(spec, shape, plan, last=last)
    if kind.startswith("token") and last:
        tokens = (shape[0] * shape[1], shape[2])
        return nn.Sequential(nn.Flatten(1, 2), _single(kind, spec, [tokens], 0, (k, modules), classes))
    single = {"linear": 1, "gap_linear": 3, "conv_gap": 3, "mlp_sr": 3, "aug": 3, "token": 2, "token_block": 2}
    needs = {**single, "lm": 2, "dense": 3}
    custom = plan.task == "custom"
    outputs = {"lm": 2, "dense": 3}.get(kind, 1)
    fits = outputs == max(1, len(plan.output)) if custom else (kind == "lm") == (plan.task == "lm") and kind != "dense"
    if len(shape) != needs[kind] or not fits:
        expected = {1: "(B, D)", 2: "(B, T, D)", 3: "(B, C, H, W)"}[needs[kind]]
        goal = {"lm": "one output per token", "dense": "one output per position"}.get(kind, "a classifier")
        found, output = (", ".join(map(str, sizes)) for sizes in (shape, plan.output))
        raise UserError(
            f"head {kind} of module {k + 1} does not fit: it needs {expected} and {goal}; the module gives (B, {found}), the"
            f" model (B, {output}) and the task is {plan.task}: choose another kind, or give LocalNet heads of yours"
        )
    if kind == "lm":
        return _lm(shape[1], classes, spec)
    if kind == "dense":
        return _Dense(shape, plan.output, spec.channels)
    head = _single(kind, spec, shapes, place, (k, modules), classes)
    return nn.Sequential(head, nn.Flatten(0)) if custom and not plan.output else head


def _single(
    kind: str, spec: HeadSpec, shapes: Sequence[Sequence[int]], place: int, modules: tuple[int, int], classes: int
) -> nn.Module:
    """A head that gives one row of numbers per sample."""
    shape = shapes[place]
    if kind == "linear":
        return _norm_linear(shape[0], classes, spec)
    if kind == "gap_linear":
        return _gap_linear(shape[0], classes, spec)
    if kind == "conv_gap":
        last = [s for s in shapes if len(s) == 3][-1]
        return _conv_gap(shape, classes, spec, last_stage=list(shape) == list(last) and shape[1] <= 8)
    if kind == "mlp_sr":
        return _mlp_sr(shape, classes, spec)
    if kind == "aug":
        left = 1 - modules[0] / max(1, modules[1] - 1)
        later = [s for s in shapes[place + 1 :] if len(s) == 3] or [shape]
        return _aug(later, shape, max(1, round(spec.depth * left)), classes, spec)
    block = []
    if kind == "token_block":
        heads = max(h for h in range(1, 9) if shape[1] % h == 0)
        block = [TransformerBlock(shape[1], heads)]
    return nn.Sequential(*block, TokenPool(spec.pool), _norm_linear(shape[1], classes, spec))
