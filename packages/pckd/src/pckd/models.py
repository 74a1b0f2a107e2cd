"""Models by name, and weights from the files that people have; nothing is unpickled."""

import argparse
import importlib
import importlib.util
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pckd.zoo import ZOO
from tenfold import UserError, checkpoints
from tenfold.errors import MissingExtraError, did_you_mean

METHOD = "pckd.student"
"""What our own files of weights call themselves."""
STUDENT = "student.safetensors"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that torchvision's models, and most of timm's, expect."""
_KINDS = ("cifar", "timm", "tv")


def build(spec: str, num_classes: int, weights: str | None = None) -> nn.Module:
    """The model that ``spec`` names, with ``weights`` where given.

    Args:
        spec: cifar:NAME, timm:NAME, tv:NAME, or package.module:function.
        num_classes: outputs of its classifier.
        weights: a file, the folder of a ``pckd train``, or "pretrained".

    Raises:
        UserError: an unknown name, a library that is not installed, a file that cannot be read or does not fit.
    """
    kind, _, name = spec.partition(":")
    pretrained = weights == "pretrained"
    if not name:
        raise UserError(f"model '{spec}': expected {', '.join(f'{k}:NAME' for k in _KINDS)} or package.module:function")
    if kind == "cifar":
        if name not in ZOO:
            raise UserError(f"model '{spec}': unknown name; {did_you_mean(name, ZOO)}")
        if pretrained:
            raise UserError(f"model '{spec}': this package brings no weights; give a file")
        model = ZOO[name](num_classes)
    elif kind == "timm":
        model = _timm(name, num_classes, pretrained)
    elif kind == "tv":
        model = _torchvision(name, num_classes, pretrained)
    elif "." in kind or importlib.util.find_spec(kind) is not None:
        model = _own(spec, kind, name, num_classes)
    else:
        raise UserError(f"model '{spec}': unknown kind '{kind}'; {did_you_mean(kind, _KINDS)}")
    if weights is not None and not pretrained:
        load_weights(model, weights)
    return model


def _timm(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(f'model timm:{name} needs timm; pip install "pckd[timm]"') from error
    if not timm.is_model(name):
        raise UserError(
            f"model 'timm:{name}': timm {timm.__version__} has none of this name; {_near(name, timm.list_models())}"
        )
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    return model


def _torchvision(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError(f'model tv:{name} needs torchvision; pip install "pckd[torchvision]"') from error
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"model 'tv:{name}': torchvision has no classifier of this name; {_near(name, known)}")
    if pretrained:
        model: nn.Module = models.get_model(name, weights="DEFAULT")
        found = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features
        if found != num_classes:
            raise UserError(f"model 'tv:{name}': its pretrained weights have {found} classes, the data {num_classes}")
        return model
    extra = {"aux_logits": False, "init_weights": True} if name in {"googlenet", "inception_v3"} else {}
    model = models.get_model(name, num_classes=num_classes, **extra)
    return model


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {len(known)} others"


def _own(spec: str, module: str, name: str, num_classes: int) -> nn.Module:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model '{spec}': {error}") from error
    model = function(num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"model '{spec}': the function gave {type(model).__name__}, expected a torch module")
    return model


def normalization(model: nn.Module, default: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[Any, Any]:
    """Mean and deviation that a pretrained timm model expects, or the data's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else default


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file into a model: safetensors, or a checkpoint of RepDistiller, mdistiller, SSKD, timm or Lightning.

    Raises:
        UserError: no such file, not readable without unpickling foreign objects, or names or shapes differ.
    """
    state = read_weights(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in expected.keys() - state.keys():
        if name.endswith("num_batches_tracked"):  # of torch before 0.4.1
            state[name] = model.state_dict()[name]
    if {n: tuple(t.shape) for n, t in state.items()} != expected:
        heads = [n for n, t in state.items() if n in expected and t.ndim == 2 and t.shape[0] != expected[n][0]]
        if heads and len(heads) == sum(
            tuple(state[n].shape) != expected[n] for n in state if n in expected and state[n].ndim > 1
        ):
            ours, theirs = expected[heads[-1]][0], state[heads[-1]].shape[0]
            raise UserError(f"{path} has {theirs} classes, the data {ours}")
        checkpoints.check_shapes(path, expected, state)
    model.load_state_dict(state)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors by name, without DataParallel's, torch.compile's and Lightning's prefixes."""
    path = Path(path)
    if path.is_dir():
        path = path / STUDENT
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # old scripts keep their options beside the weights
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read without running what is in it ({text}): where you trust it, save its weights alone with"
            " torch.save(model.state_dict(), FILE) and give that"
        ) from error
    for key in ("model", "state_dict", "model_state_dict", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"{path}: expected weights by name, alone or under 'model' or 'state_dict'")
    state = dict(found)
    for prefix in ("module.", "_orig_mod.", "student.model.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def read_card(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a trained student: model, classes, size, mean, std."""
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
    """In evaluation mode for ever, without gradients, channels last; batch norms folded into convolutions where they can be.

    The folded model is taken only where it can be traced and gives the same logits on ``images`` to 1e-4.
    """
    model.eval().requires_grad_(False)
    if images is None:
        return model.to(memory_format=torch.channels_last)
    from torch.fx.experimental.optimization import fuse

    try:
        folded = fuse(model)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        NameError,
    ):  # control flow that cannot be traced
        return model.to(memory_format=torch.channels_last)
    folded.requires_grad_(False)
    with torch.no_grad():
        ours, theirs = folded(images), model(images)
    same = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    return (folded if same else model).eval().to(memory_format=torch.channels_last)
