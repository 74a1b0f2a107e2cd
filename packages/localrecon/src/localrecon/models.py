"""The models that the command line knows by name; all plain ``nn.Sequential``, but for those of timm and transformers."""

import importlib
import importlib.util
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrecon.bpfree import BPFreeConv2d, BPFreeLinear, BPFreeNet
from localrecon.config import Feedback, ModelSettings
from localrecon.heads import TokenPool, TransformerBlock
from localrecon.tying import untie
from tenfold import UserError
from tenfold.errors import MissingExtraError, did_you_mean

NAMES = ("mlp", "convnet", "resnet20", "resnet32", "resnet110", "vit", "gpt")


def mlp(inputs: int, classes: int, width: int = 32, depth: int = 10) -> nn.Sequential:
    """``depth`` times Linear, LayerNorm, GELU; then a linear classifier behind a LayerNorm."""
    layers: list[nn.Module] = []
    for i in range(depth):
        block = nn.Sequential(nn.Linear(inputs if i == 0 else width, width), nn.LayerNorm(width), nn.GELU())
        layers.append(nn.Sequential(nn.Flatten(), *block) if i == 0 else block)
    return nn.Sequential(*layers, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes)))


def conv_block(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


def convnet(channels: int, classes: int, width: int = 24, depth: int = 12) -> nn.Sequential:
    """``depth`` convolution blocks of equal width, pooled, then a linear classifier."""
    blocks = [conv_block(channels if i == 0 else width, width) for i in range(depth)]
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, (B, C, H, W) -> (B, C', H / stride, W / stride).

    Where the shape changes, the shortcut takes every stride-th pixel and pads channels with zeros (ResNet's option A).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(before, after, stride), nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        )
        self.stride, self.added = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        short = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            short = F.pad(short, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(self.body(x) + short)


def cifar_resnet(depth: int, channels: int, classes: int, width: int = 16) -> nn.Sequential:
    """The ResNets of 6 n + 2 layers for CIFAR (He et al., 2016): widths 16, 32, 64."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv_block(channels, width))
    before = width
    for stage in range(3):
        for i in range((depth - 2) // 6):
            after = width * 2**stage
            parts[f"stage{stage + 1}_{i}"] = Residual(before, after, 2 if stage and i == 0 else 1)
            before = after
    parts["head"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
    return nn.Sequential(parts)


class Patches(nn.Module):
    """Images as tokens with learned positions, (B, C, H, W) -> (B, T, D)."""

    def __init__(self, channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class Tokens(nn.Module):
    """Token and position embeddings, (B, T) int64 -> (B, T, D)."""

    def __init__(self, vocabulary: int, window: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, window, width))
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.as_tensor(self.token(x)) + self.position[:, : x.shape[1]]


def _heads(width: int) -> int:
    return max(h for h in range(1, max(1, width // 16) + 1) if width % h == 0)


def vit(
    channels: int, size: int, classes: int, width: int = 192, depth: int = 8, patch: int | None = None
) -> nn.Sequential:
    """A small ViT with mean pooling; patches so that 36 to 64 tokens come of an image."""
    patch = patch or max(1, size // 8 if size % 8 == 0 else size // 6)
    if size % patch:
        raise UserError(f"images of {size} pixels do not divide into patches of {patch}")
    blocks = [TransformerBlock(width, _heads(width)) for _ in range(depth)]
    head = nn.Sequential(nn.LayerNorm(width), TokenPool("mean"), nn.Linear(width, classes))
    return nn.Sequential(Patches(channels, size, patch, width), *blocks, head)


def gpt(vocabulary: int, window: int, width: int = 128, depth: int = 4) -> nn.Sequential:
    """A small causal transformer; embedding and output are not tied, since the first and the last module own them."""
    blocks = [TransformerBlock(width, _heads(width), causal=True) for _ in range(depth)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False))
    return nn.Sequential(Tokens(vocabulary, window, width), *blocks, head)


@dataclass(frozen=True)
class DataForm:
    """What a model has to know of its data.

    Attributes:
        task: classify or lm.
        shape: of an image (C, H, W); (T,) of text.
        classes: or size of the vocabulary.
    """

    task: str
    shape: tuple[int, ...]
    classes: int


def build_model(settings: ModelSettings, data: DataForm) -> nn.Module:
    """The model that the settings name, for data of that form.

    Raises:
        UserError: an unknown name, or one that does not go with the data.
    """
    kind, colon, name = settings.model.partition(":")
    if colon:
        return _from_elsewhere(settings.model, kind, name, data)
    if settings.model not in NAMES:
        forms = "timm:NAME, hf:FOLDER_OR_CONFIG.json or py:MODULE:FUNCTION"
        raise UserError(f"--model {settings.model}: {did_you_mean(settings.model, NAMES)}; or {forms}")
    if (settings.model == "gpt") != (data.task == "lm"):
        raise UserError(
            f"--model {settings.model} does not go with --data {settings.data}: text wants gpt or hf:, images not"
        )
    sizes = {key: value for key in ("width", "depth") if (value := getattr(settings, key)) is not None}
    if settings.model == "gpt":
        return gpt(data.classes, settings.window, **sizes)
    channels, height, width = data.shape
    if settings.model == "mlp":
        return mlp(channels * height * width, data.classes, **sizes)
    if settings.model == "convnet":
        return convnet(channels, data.classes, **sizes)
    if settings.model == "vit":
        return vit(channels, height, data.classes, **sizes)
    if "depth" in sizes:
        raise UserError(f"--depth is in the name of --model {settings.model}")
    return cifar_resnet(int(settings.model.removeprefix("resnet")), channels, data.classes, **sizes)


def _from_elsewhere(full: str, kind: str, name: str, data: DataForm) -> nn.Module:
    if kind == "timm":
        _needs("timm", "timm")
        import timm

        known = timm.list_models()
        if name.partition(".")[0] not in known:
            raise UserError(f"--model {full}: {did_you_mean(name, known)}")
        return _as_module(timm.create_model(name, num_classes=data.classes, in_chans=data.shape[0]))
    if kind == "hf":
        return _transformers(full, name, data)
    if kind == "py":
        module, colon, function = name.rpartition(":")
        if not colon or importlib.util.find_spec(module.partition(".")[0]) is None:
            raise UserError(f"--model {full}: expected py:MODULE:FUNCTION of a module that can be imported")
        factory = getattr(importlib.import_module(module), function, None)
        if factory is None:
            raise UserError(f"--model {full}: module {module} has no {function}")
        model = factory()
        if not isinstance(model, nn.Module):
            raise UserError(f"--model {full}: it returned {type(model).__name__}, expected a torch module")
        return model
    raise UserError(f"--model {full}: unknown kind '{kind}'; {did_you_mean(kind, ['timm', 'hf', 'py'])}")


def _as_module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


def _transformers(full: str, name: str, data: DataForm) -> nn.Module:
    _needs("transformers", "transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name)
    if data.task != "lm":
        raise UserError(f"--model {full} does not go with these data: it is a language model, and wants text")
    if not path.exists():
        raise UserError(f"--model {full}: no such file or folder: {path}")
    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config = AutoConfig.for_model(values.pop("model_type"), **values)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a configuration of transformers ({error})") from error
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    vocabulary = model.config.vocab_size
    if vocabulary < data.classes:
        raise UserError(
            f"{path}: a vocabulary of {vocabulary} is too small for bytes, of which there are {data.classes}"
        )
    return untie(_as_module(model))


def _needs(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f'{module} is not installed; pip install "localrecon[{extra}]"')


def build_bpfree(settings: ModelSettings, data: DataForm, feedback: Feedback) -> BPFreeNet:
    """The BP-free net of the size of ``mlp`` or ``convnet``: one layer a module, ReLU, no normalization.

    Raises:
        UserError: another model.
    """
    if settings.model not in {"mlp", "convnet"}:
        raise UserError(f"method bpfree takes --model mlp or convnet (one layer a module), not {settings.model}")
    channels, height, width = data.shape
    layers: list[BPFreeLinear | BPFreeConv2d] = []
    if settings.model == "mlp":
        wide, depth = settings.width or 32, settings.depth or 10
        for i in range(depth):
            inputs = channels * height * width if i == 0 else wide
            layers.append(BPFreeLinear(inputs, wide, data.classes, feedback=feedback))
    else:
        wide, depth = settings.width or 24, settings.depth or 12
        for i in range(depth):
            inputs = channels if i == 0 else wide
            layers.append(BPFreeConv2d(inputs, wide, 3, 1, data.classes, feedback=feedback))
    return BPFreeNet(layers)
