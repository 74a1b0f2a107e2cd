"""The models that a command names, their weights, and teachers that stay as they are."""

import collections
import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pckd.tap import logits_of
from pckd.zoo import ZOO
from tenfold import UserError, checkpoints, models

METHOD = "pckd.student"
"""What our own files of weights call themselves."""
STUDENT = "student.safetensors"


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the pixels in [0, 1], per channel."""


def build(
    spec: str,
    num_classes: int,
    weights: str | None = None,
    *,
    option: str = "--student",
    args: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    size: int | None = None,
    whole: bool = False,
) -> nn.Module:
    """The model that ``spec`` names, with ``weights`` where given.

    Args:
        spec: cifar:NAME, or a name of ``tenfold.models`` (timm:NAME, tv:NAME, hf:PATH, py:MODULE:FUNCTION, packaged:NAME).
        num_classes: outputs of its classifier.
        weights: a file, the folder of a `pckd train`, or "pretrained".
        option: option that gave the name, for messages; that of the weights is ``{option}_weights``.
        args: further arguments of the model.
        in_chans: channels of the images.
        size: side of the images, for models that are made for one size.
        whole: the weights must have as many classes; else their classifier is replaced by a new one, with a warning.

    Raises:
        UserError: an unknown name, a library that is not installed, a file that cannot be read or does not fit.
    """
    pretrained = weights == "pretrained"
    own = {"cifar": {name: partial(_of_channels, make) for name, make in ZOO.items()}}
    model = models.build(
        spec,
        num_classes=num_classes,
        in_chans=in_chans,
        pretrained=pretrained,
        own=own,
        size=size,
        args=args,
        whole=whole and (weights is None or pretrained),  # a file replaces all that the name brings
        option=option,
    )
    if weights is not None and not pretrained:
        checkpoints.load_foreign_into(model, weights_file(weights), option=f"{option}_weights", new_head=not whole)
    return model


def _of_channels(make: Callable[..., nn.Module], num_classes: int, in_chans: int = 3, **args: Any) -> nn.Module:
    """A model of the zoo whose first convolution takes images of another number of channels."""
    model = make(num_classes, **args)
    if in_chans != 3:
        name, first = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        like = nn.Conv2d(
            in_chans,
            first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            bias=first.bias is not None,
        )
        model.set_submodule(name, like)
    return model


def weights_file(weights: str) -> Path:
    """The file itself, or that of the student in the folder of a `pckd train`."""
    path = Path(weights)
    return path / STUDENT if (path / STUDENT).is_file() else path


def card_of(weights: str) -> dict[str, Any]:
    """What a file or folder of a `pckd train` says of its student: classes, size, mean, std; empty for other files."""
    file = weights_file(weights)
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    try:
        header = json.loads(checkpoints.metadata(file).get("tenfold", "{}"))
    except ValueError:
        return {}
    return dict(header["config"]) if header.get("method") == METHOD else {}


def own_statistics(model: nn.Module, spec: str, weights: str | None) -> Statistics | None:
    """What the weights that a student starts from expect; None where they do not say, or it starts from random ones."""
    if weights is not None and weights != "pretrained":
        card = card_of(weights)
        return (tuple(card["mean"]), tuple(card["std"])) if "mean" in card else None
    if weights == "pretrained" or spec.partition(":")[0] in {"hf", "packaged"}:
        return models.expected_statistics(model)
    return None


def read_card(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a trained student: model, classes, size, mean, std.

    Raises:
        UserError: no such file, or not one of a trained student.
    """
    path = Path(folder) / "config.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "classes", "size", "mean", "std"} - set(card)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: expected the folder of a finished `pckd train` ({error})") from error
    if missing:
        raise UserError(f"{path}: no {', '.join(sorted(missing))}; expected the folder of a `pckd train`")
    return dict(card)


def freeze(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """A model in evaluation mode for good, without gradients, channels last, batch norms folded where they can be.

    A batch norm is folded into the convolution whose output it takes; modules keep their names and classes. The folded copy is
    returned only where it gives the same logits on ``images`` to 1e-4, else the model itself.
    """
    model.eval().requires_grad_(False)
    folded = None if images is None else _folded(model, images)
    return (model if folded is None else folded).to(memory_format=torch.channels_last)


@torch.no_grad()
def _folded(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy with folded batch norms; None where there are none, where it cannot be copied, or where it behaves otherwise."""
    pairs, expected = _norms_of_convolutions(model, images)
    if not pairs:
        return None
    try:
        folded = copy.deepcopy(model)
    except (TypeError, RuntimeError, NotImplementedError):  # locks, generators and the like in a user's model
        return None
    for convolution, norm in pairs:
        before: Any = folded.get_submodule(convolution)
        rest: Any = folded.get_submodule(norm)
        fused: nn.Module = fuse_conv_bn_eval(before, rest)
        after = [getattr(rest, part) for part in ("drop", "act") if isinstance(getattr(rest, part, None), nn.Module)]
        folded.set_submodule(convolution, fused)
        folded.set_submodule(norm, nn.Sequential(*after) if after else nn.Identity())
    folded.eval().requires_grad_(False)
    found = logits_of(folded(images))
    same = torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return folded if same else None


def _norms_of_convolutions(model: nn.Module, images: Tensor) -> tuple[list[tuple[str, str]], Tensor]:
    """Names of the convolutions, used once each, whose very output a batch norm takes, with that norm's; and the logits."""
    made: dict[int, tuple[str, Tensor]] = {}
    uses: collections.Counter[str] = collections.Counter()
    pairs: list[tuple[str, str]] = []

    def after(name: str, output: Tensor) -> None:
        uses[name] += 1
        made[id(output)] = name, output  # kept, so that its id is not given again

    def before(name: str, given: Tensor) -> None:
        uses[name] += 1
        if id(given) in made:
            pairs.append((made[id(given)][0], name))

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if type(module) is nn.Conv2d:
                handle = module.register_forward_hook(lambda _, __, output, name=name: after(name, output))
                hooks.callback(handle.remove)
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
                handle = module.register_forward_pre_hook(lambda _, inputs, name=name: before(name, inputs[0]))
                hooks.callback(handle.remove)
        logits = logits_of(model(images))
    return [pair for pair in pairs if uses[pair[0]] == uses[pair[1]] == 1], logits
