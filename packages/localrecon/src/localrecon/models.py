"""The models that the command line knows by name: our own, all plain ``nn.Sequential``, and those of ``tenfold.models``."""

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localrecon.bpfree import BPFreeConv2d, BPFreeLinear, BPFreeNet
from localrecon.config import Feedback, ModelSettings
from localrecon.heads import TokenPool, TransformerBlock
from localrecon.tying import untie
from tenfold import UserError, models
from tenfold.checkpoints import read_foreign
from tenfold.errors import did_you_mean

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
        """The sum of both ways, rectified."""
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
        """One token per patch, with its position."""
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


class Tokens(nn.Module):
    """Token and position embeddings, (B, T) int64 -> (B, T, D)."""

    def __init__(self, vocabulary: int, window: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, window, width))
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """One embedding per token, with its position."""
        return torch.as_tensor(self.token(x)) + self.position[:, : x.shape[1]]


def _heads(width: int) -> int:
    return max(h for h in range(1, max(1, width // 16) + 1) if width % h == 0)


def vit(
    channels: int, size: int, classes: int, width: int = 192, depth: int = 8, patch: int | None = None
) -> nn.Sequential:
    """A small ViT with mean pooling; patches are chosen so that an image gives 36 to 64 tokens."""
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
        shape: shape of an input: (C, H, W) of an image, (T,) of text.
        classes: number of classes, or size of the vocabulary.
    """

    task: Literal["classify", "lm"]
    shape: tuple[int, ...]
    classes: int

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return f"{shape} bytes of text" if self.task == "lm" else f"images of {shape} in {self.classes} classes"


def build_model(settings: ModelSettings, form: DataForm, *, pretrained: bool = True) -> nn.Module:
    """The model that the settings name, for data of that form.

    Args:
        settings: name, sizes and file of weights.
        form: what the model has to know of the data.
        pretrained: whether the file of weights is read.

    Raises:
        UserError: an unknown name, one that does not go with the data, or weights of another model.
        MissingExtraError: the library of the model is not installed.
    """
    model = _fresh(settings, form)
    if settings.weights is not None and pretrained:
        load_pretrained(model, settings.weights)
    if ":" in settings.model and form.task == "classify":
        _fit_size(model, settings.model, form.shape)
    return model


def load_pretrained(model: nn.Module, path: str) -> None:
    """Load other people's weights; those of a classifier for another number of classes are left out.

    Raises:
        UserError: the file cannot be read, or it holds the weights of another model.
    """
    own = model.state_dict()
    found = read_foreign(path, option="--weights", names=own.keys()).tensors
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    last = layers[-1] if layers else ""
    other = [n for n, t in found.items() if n in own and t.shape != own[n].shape]
    missing = [n for n in own if n not in found and not n.endswith("num_batches_tracked")]
    spare = [n for n in found if n not in own]
    wrong = [n for n in other if n.rpartition(".")[0] != last]
    for what, names in (("of other shapes", wrong), ("missing", missing), ("unknown", spare)):
        if names:
            raise UserError(
                f"--weights {path}: not the weights of this {type(model).__name__}: {len(names)} are {what}, such as"
                f" {names[0]}"
            )
    model.load_state_dict({n: t for n, t in found.items() if n not in other}, strict=False)
    if other:
        sys.stderr.write(f"--weights {path}: {last} is for {found[other[0]].shape[0]} classes, and stays fresh\n")


def _fit_size(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Tell a model of fixed size what size the images have.

    Raises:
        UserError: it takes another size, and cannot be told.
    """
    size = shape[1:]
    told = next((m.img_size for m in model.modules() if getattr(m, "img_size", None)), None)
    fixed: Any = told or getattr(getattr(model, "config", None), "image_size", None)
    fixed = (fixed, fixed) if isinstance(fixed, int) else fixed
    if not fixed or tuple(fixed) == size:
        return
    tell: Any = getattr(model, "set_input_size", None)
    why = ""
    if tell is not None:
        try:
            tell(img_size=size)
            return
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError, TypeError) as error:
            why = f" ({' '.join(str(error).split())[:80] or type(error).__name__})"
    elif told is None and not _has_positions(model):  # a configuration states a size that convolutions do not mind
        return
    raise UserError(
        f"--model {name} takes images of {fixed[0]} x {fixed[1]}, the data have {size[0]} x {size[1]}{why}: give"
        f" --image_size {fixed[0]}, or another model"
    )


def _has_positions(model: nn.Module) -> bool:
    """Whether a model of transformers has a parameter per patch."""
    return any("position" in name for name, _ in model.named_parameters())


def _fresh(settings: ModelSettings, form: DataForm) -> nn.Module:
    name = settings.model
    named = ":" in name
    if not named and name not in NAMES:
        forms = ", ".join(models.FORMS.values())
        raise UserError(f"--model {name}: unknown name: {did_you_mean(name, NAMES)}; or one of {forms}")
    if _task_of(name) not in {form.task, ""}:
        raise UserError(
            f"--model {name} does not go with --data {settings.data}: text wants gpt, hf: or py:, images another one"
        )
    sizes = {key: value for key in ("width", "depth") if (value := getattr(settings, key)) is not None}
    if named:
        if sizes:
            raise UserError(f"--{next(iter(sizes))} is for built-in models, not for --model {name}")
        return _named(name, form)
    if name == "gpt":
        return gpt(form.classes, *form.shape, **sizes)
    channels, height, width = form.shape
    if name == "mlp":
        return mlp(channels * height * width, form.classes, **sizes)
    if name == "convnet":
        return convnet(channels, form.classes, **sizes)
    if name == "vit":
        return vit(channels, height, form.classes, **sizes)
    if "depth" in sizes:
        raise UserError(f"--depth is in the name of --model {name}")
    return cifar_resnet(int(name.removeprefix("resnet")), channels, form.classes, **sizes)


def _task_of(name: str) -> str:
    """The task that a model is for; empty where only its data or the model itself can say."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return "lm" if name == "gpt" else "classify"
    if kind == "packaged" and rest in models.PACKAGED:
        return "classify" if models.PACKAGED[rest].architecture else "lm"
    return "classify" if kind in {"timm", "tv"} else ""


def _named(name: str, form: DataForm) -> nn.Module:
    if form.task == "classify":
        return models.build(name, num_classes=form.classes, in_chans=form.shape[0])
    model = models.build(name, num_classes=form.classes, auto="AutoModelForCausalLM")
    if name.startswith("py:"):
        return model
    vocabulary = int(cast("Any", model).config.vocab_size)
    if vocabulary < form.classes:
        raise UserError(
            f"--model {name}: a vocabulary of {vocabulary} is too small for bytes, of which there are {form.classes}"
        )
    return untie(model)


def build_bpfree(settings: ModelSettings, form: DataForm, feedback: Feedback) -> BPFreeNet:
    """The BP-free net of the size of ``mlp`` or ``convnet``: one layer per module, ReLU, no normalization.

    Raises:
        UserError: the settings name another model.
    """
    if settings.model not in {"mlp", "convnet"}:
        raise UserError(f"method bpfree takes --model mlp or convnet (one layer per module), not {settings.model}")
    channels, height, width = form.shape
    layers: list[BPFreeLinear | BPFreeConv2d] = []
    if settings.model == "mlp":
        wide, depth = settings.width or 32, settings.depth or 10
        for i in range(depth):
            inputs = channels * height * width if i == 0 else wide
            layers.append(BPFreeLinear(inputs, wide, form.classes, feedback=feedback))
    else:
        wide, depth = settings.width or 24, settings.depth or 12
        for i in range(depth):
            inputs = channels if i == 0 else wide
            layers.append(BPFreeConv2d(inputs, wide, 3, 1, form.classes, feedback=feedback))
    return BPFreeNet(layers)
