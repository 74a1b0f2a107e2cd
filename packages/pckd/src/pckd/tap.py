"""Features and category centers of a model that is not edited, read by hooks that stay only while it runs.

Shape suffixes: N rows, C classes, D width of the feature, T tokens, K channels of a map.
"""

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pckd.losses import Outputs
from tenfold import UserError
from tenfold.errors import did_you_mean
from tenfold.modules import evaluating

_STAGES = ("layer2", "block2", "stages.1", "layers.1")
"""Names of a second stage: ResNets of all libraries and WRNs, timm's stages, Swin."""
_MOST_PREFIX = 8
"""Class tokens and registers that may precede the tokens of the image."""


class ClassifierNotFound(UserError):
    """The layer that gives the logits could not be found; the message lists the candidates."""


class ClassifierTap(nn.Module):
    """Runs a classifier and gives logits, the feature that its last layer saw, and that layer's weights.

    The last layer is linear, or a convolution of one pixel (SqueezeNet, ResNetV2), whose feature is the mean of its input
    over the image. Where the logits are the mean of two such layers (DeiT and LeViT with a distillation token), the feature
    is both inputs side by side and the weights are half of both. Outputs may be tensors, tuples whose first entry is the
    logits (auxiliary heads in training), dicts or objects with ``logits``. Hooks are set while the model runs and removed
    afterwards, also where it fails, so that the model stays as it was. Dropout before the layer makes the feature stochastic
    in training, as it does the logits.

    Args:
        model: any classifier.
        path: path of the layer as in ``named_modules``, or of two, joined by a comma; default: found on ``example``.
        hint: path of the module whose output is the intermediate map for FitNet.
        example: images (N, 3, H, W) as the model takes them, to find the layer, or to check the one that is named.
        order: (C,) the model's class for each class of the data; default: as the model has them.

    Raises:
        ClassifierNotFound: no layer gives the logits, or the named one does not; the message lists the candidates.
        UserError: the model has no module ``hint``, or neither ``path`` nor ``example`` is given.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> out = ClassifierTap(model, example=torch.randn(2, 3, 2, 2))(torch.randn(4, 3, 2, 2))
        >>> out.logits.shape, out.feature.shape, out.weight.shape
        (torch.Size([4, 3]), torch.Size([4, 5]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | None = None,
        hint: str | None = None,
        *,
        example: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        if path is None:
            if example is None:
                raise UserError("the layer of the logits is found on example images: give them, or its path")
            path = find_classifier(model, example)
        else:
            _check_named(model, path, example)
        self.model = model
        self.path = path
        self.hint = hint
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)
        if hint is not None and hint not in (modules := dict(model.named_modules())):
            raise UserError(f"the model has no module '{hint}': {did_you_mean(hint, modules)}")

    @property
    def layers(self) -> list[Any]:
        """The layers whose mean is the logits: one, or two."""
        return [self.model.get_submodule(name) for name in self.path.split(",")]

    @property
    def feature_dim(self) -> int:
        """Width D of the feature."""
        return sum(layer.weight.shape[1] for layer in self.layers)

    @property
    def num_classes(self) -> int:
        """Classes C."""
        return int(self.layers[0].weight.shape[0]) if self.order is None else len(self.order)

    @property
    def centers(self) -> tuple[Tensor, Tensor | None]:
        """Weights (C, D) and bias (C,) of the last layer."""
        layers = self.layers
        weight = torch.cat([layer.weight.flatten(1) for layer in layers], dim=1) / len(layers)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        bias = sum(biases[1:], biases[0]) / len(layers) if biases else None
        if len(layers) == 1:
            weight, bias = layers[0].weight.flatten(1), layers[0].bias
        if self.order is not None:
            weight, bias = weight[self.order], None if bias is None else bias[self.order]
        return weight, bias

    def forward(self, images: Tensor) -> Outputs:
        """Images (N, 3, H, W) -> ``Outputs``.

        Raises:
            ClassifierNotFound: the layer was not used.
            ValueError: the logits are not (N, C), or the intermediate map has no image axes.
        """
        seen: dict[str, Any] = {}
        with contextlib.ExitStack() as hooks:
            for name in self.path.split(","):
                _hook_input(hooks, self.model.get_submodule(name), name, seen)
            if self.hint is not None:
                _hook_output(hooks, self.model.get_submodule(self.hint), "hint", seen)
            logits = logits_of(self.model(images), len(self.layers))
        missing = [name for name in self.path.split(",") if name not in seen]
        if missing:
            raise ClassifierNotFound(f"the layer '{missing[0]}' was not used: {_candidates(self.model)}")
        if logits.shape != (len(images), self.layers[0].weight.shape[0]):
            raise ValueError(f"the logits must be ({len(images)}, C), got {tuple(logits.shape)}")
        features = [
            _over_places(seen[name], layer) for name, layer in zip(self.path.split(","), self.layers, strict=True)
        ]
        weight, bias = self.centers
        hint = None if self.hint is None else as_map(first_tensor(seen["hint"]), images, self.hint, self.model)
        if self.order is not None:
            logits = logits[:, self.order]
        return Outputs(logits, features[0] if len(features) == 1 else torch.cat(features, dim=1), weight, bias, hint)

    @torch.no_grad()
    def check(self, images: Tensor) -> Outputs:
        """Outputs in evaluation mode; each submodule keeps its own mode."""
        with evaluating(self.model):
            found: Outputs = self(images)
        return found


def logits_of(output: Any, heads: int = 1) -> Tensor:
    """The logits within what a classifier returns.

    Of a dict or an object, its ``logits``; of a tuple, the first tensor, or the mean of the first two where the model has
    two heads of equal standing. One row may come without its axis: (C,) gives (1, C).

    Raises:
        ValueError: there are none.
    """
    if not isinstance(output, Tensor):
        named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        parts = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
        if isinstance(named, Tensor):
            output = named
        elif isinstance(output, Mapping) and len(output) == 1:
            return logits_of(next(iter(output.values())), heads)
        elif heads > 1 and len(parts) >= heads:
            output = sum(parts[1:heads], parts[0]) / heads
        elif parts:
            output = parts[0]
        else:
            held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
            raise ValueError(f"the model returns {type(output).__name__}{held}: expected logits, or 'logits' in it")
    tensor: Tensor = output
    return tensor[None] if tensor.ndim == 1 else tensor


def find_classifier(model: nn.Module, images: Tensor) -> str:
    """Path of the layer whose outputs are the logits, by running the model once in evaluation mode.

    Raises:
        ClassifierNotFound: no layer, and no mean of two layers, gives them; the message lists the candidates.
    """
    logits, outputs = _run(model, images)
    for name, output in reversed(outputs.items()):
        if _gives(output, logits):
            return name
    wide = [name for name, output in outputs.items() if output.shape == logits.shape]
    for a, b in itertools.combinations(wide[-4:], 2):
        if _close((outputs[a] + outputs[b]) / 2, logits):
            return f"{a},{b}"
    raise ClassifierNotFound(
        f"no layer of {type(model).__name__} gives its logits alone (a scale, a sum of heads?); --tap or --teacher_tap"
        f" names the layer: {_candidates(model)}"
    )


def _check_named(model: nn.Module, path: str, images: Tensor | None) -> None:
    known = _layers(model)
    for name in path.split(","):
        if name not in known:
            raise ClassifierNotFound(f"'{name}' is no linear layer: {_candidates(model)}")
    if images is None:
        return
    logits, outputs = _run(model, images)
    parts = [outputs.get(name) for name in path.split(",")]
    if any(part is None or (len(parts) > 1 and part.shape != logits.shape) for part in parts):
        raise ClassifierNotFound(f"the layer '{path}' was not used for the logits: {_candidates(model)}")
    mean = parts[0] if len(parts) == 1 else torch.stack([part for part in parts if part is not None]).mean(dim=0)
    assert mean is not None
    if not _gives(mean, logits):
        raise ClassifierNotFound(
            f"the logits are not those of the layer '{path}' alone; name another: {_candidates(model)}"
        )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that can be the last one of a classifier."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or (isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1} and module.groups == 1)
    }


def _run(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a model in evaluation mode, and what each candidate layer gave, in the order of their last use."""
    seen: dict[str, Any] = {}
    with contextlib.ExitStack() as hooks, evaluating(model):
        for name, module in _layers(model).items():
            _hook_output(hooks, module, name, seen)
        logits = logits_of(model(images))
    return logits, seen


def _hook_input(hooks: contextlib.ExitStack, module: nn.Module, name: str, seen: dict[str, Any]) -> None:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[name] = inputs[0]

    hooks.callback(module.register_forward_pre_hook(keep).remove)


def _hook_output(hooks: contextlib.ExitStack, module: nn.Module, name: str, seen: dict[str, Any]) -> None:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.pop(name, None)  # so that the order is that of the last uses
        seen[name] = output

    hooks.callback(module.register_forward_hook(keep).remove)


def _over_places(x: Tensor, layer: nn.Module) -> Tensor:
    """The mean over the image: (N, D, H, W) of a convolution, (N, ..., D) of a linear layer -> (N, D)."""
    if isinstance(layer, nn.Conv2d):
        return x.mean(dim=(2, 3)) if x.ndim == 4 else x
    return x.flatten(1, -2).mean(dim=1) if x.ndim > 2 else x


def _gives(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are a layer's outputs, over the image where it has one, of their positive parts where so made."""
    if output.ndim == 4:
        return _close(output.mean(dim=(2, 3)), logits) or _close(F.relu(output).mean(dim=(2, 3)), logits)
    return _close(output, logits)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def _candidates(model: nn.Module, most: int = 8) -> str:
    names = [name for name in _layers(model) if name]
    if not names:
        return "it has no linear layer inside"
    return f"its last linear layers are {', '.join(names[-most:])}"


def first_tensor(output: Any) -> Tensor:
    """A module's output, or the first tensor in it."""
    found: Tensor = next(x for x in output if isinstance(x, Tensor)) if isinstance(output, tuple | list) else output
    return found


def as_map(x: Tensor, images: Tensor, name: str, model: nn.Module | None = None) -> Tensor:
    """An intermediate output as (N, K, H, W): channels brought to the front, tokens laid out as the image.

    Args:
        x: (N, K, H, W), (N, H, W, K), or tokens (N, T, K) whose first ones may be class tokens or registers.
        images: what the model was given, (N, 3, H, W), whose sides tell which axes are the image's.
        name: the module, for messages.
        model: its ``num_prefix_tokens`` counts the tokens before those of the image; default: what is beyond a square.

    Raises:
        UserError: it cannot be told which axes are the image's.
    """
    height, width = images.shape[-2:]
    if x.ndim == 4:
        first = abs(x.shape[2] * width - x.shape[3] * height) <= max(width, height)
        last = abs(x.shape[1] * width - x.shape[2] * height) <= max(width, height)
        if height == width:
            first, last = x.shape[2] == x.shape[3], x.shape[1] == x.shape[2]
        if first != last:
            return x if first else x.permute(0, 3, 1, 2)
    elif x.ndim == 3 and height == width:
        tokens = x.shape[1]
        known = getattr(model, "num_prefix_tokens", None)
        side = int((tokens - (known or 0)) ** 0.5)
        if known is None or tokens != side**2 + known:  # before they are added, or a model that does not say
            side = int(tokens**0.5)
        prefix = tokens - side**2
        if side > 1 and prefix <= _MOST_PREFIX:
            return x[:, prefix:].transpose(1, 2).reshape(len(x), -1, side, side)
    raise UserError(f"'{name}' gives {tuple(x.shape)}: not to be told which axes are the image's; name another module")


def second_stage(model: nn.Module, images: Tensor) -> str:
    """Path of the module that FitNet takes its map from.

    layer2, block2, stages.1 or layers.1 where there is one; else the last module at the second resolution; of a model with
    one resolution (a vision transformer), the block in the middle.

    Raises:
        UserError: there is neither.
    """
    modules = dict(model.named_modules())
    seen: dict[str, Any] = {}
    with contextlib.ExitStack() as hooks, evaluating(model):
        for name, module in modules.items():
            if name:
                _hook_output(hooks, module, name, seen)
        model(images)
    maps: dict[str, int] = {}
    for name, output in seen.items():
        if "attn" in name or "attention" in name:  # (N, heads, T, T) is no map
            continue
        if isinstance(output, Tensor) or (
            isinstance(output, tuple | list) and output and isinstance(output[0], Tensor)
        ):
            with contextlib.suppress(UserError):
                maps[name] = as_map(first_tensor(output), images, name, model).shape[-1]
    maps = {name: side for name, side in maps.items() if side > 1}
    for name in _STAGES:
        if name in maps:
            return name
    sides = sorted(set(maps.values()), reverse=True)
    if len(sides) > 1:
        return [name for name, side in maps.items() if side == sides[1]][-1]
    inside: list[str] = []
    for name, module in modules.items():  # the longest row of blocks
        if isinstance(module, nn.ModuleList | nn.Sequential):
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if len(children) > max(1, len(inside)) and all(child in maps for child in children):
                inside = children
    if inside:
        return inside[len(inside) // 2 - 1]
    raise UserError(
        f"{type(model).__name__} has no second stage: name the module by --losses.fitnet.student or .teacher"
    )
