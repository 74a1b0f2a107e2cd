"""A network from its settings, as files, and back."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from freespace_uda.config import GUIDED, Method, NetSettings
from freespace_uda.encoders import Norm
from freespace_uda.network import FreespaceNet
from tenfold import UserError, checkpoints, runs
from tenfold.modules import evaluating
from tenfold.randomness import keyed

METHOD = "freespace_uda.model"
WEIGHTS = "model.safetensors"


def norm_of(settings: NetSettings, method: Method) -> Norm:
    """The normalization that settings and method ask for."""
    if method == "adabn":
        return "batch"
    if settings.norm != "auto":
        return settings.norm
    return "frozen" if settings.pretrained or settings.rgb_encoder.startswith("packaged:") else "group"


def build_net(settings: NetSettings, method: Method, seed: int, *, trial: bool = True) -> FreespaceNet:
    """A fresh network; its weights depend on the seed alone.

    Args:
        settings: settings of the network.
        method: guidance and normalization depend on it.
        seed: seed of the weights.
        trial: whether foreign encoders are tried with a picture of the size that they will see.

    Raises:
        UserError: an encoder that there is not, or that cannot do this.
    """
    normal = settings.normal_encoder
    if normal is None and settings.rgb_encoder.startswith("packaged:"):
        normal = "freespace:small"
    with keyed(seed, 12):
        return FreespaceNet(
            settings.rgb_encoder,
            normal,
            streams=settings.streams,
            guidance=settings.guidance if method in GUIDED else "none",
            tokens=settings.tokens,
            fusion=settings.fusion,
            width=settings.width,
            norm=norm_of(settings, method),
            pretrained=settings.pretrained,
            size=(settings.size[1], settings.size[0]) if trial else None,
        )


def card_of(settings: NetSettings, method: Method, **more: Any) -> dict[str, Any]:
    """What has to be known to use a network."""
    own = NetSettings(**{name: getattr(settings, name) for name in NetSettings.__dataclass_fields__})
    return {"settings": runs.plain(own), "method": method, **more}


def save_model(path: Path, net: nn.Module, card: dict[str, Any]) -> None:
    """Write weights and card as one safetensors file."""
    checkpoints.save(path, net.state_dict(), method=METHOD, config=card)


def load_model(path: str | Path) -> tuple[FreespaceNet, NetSettings, dict[str, Any]]:
    """The network that ``save_model`` wrote, in evaluation mode, with its settings and card.

    Raises:
        UserError: no such file, or not one of ours.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    found = checkpoints.load(path, method=METHOD)
    try:
        settings = runs.from_plain(NetSettings, {**found.config["settings"], "pretrained": False})
        method: Method = found.config["method"]
        norm = norm_of(runs.from_plain(NetSettings, found.config["settings"]), method)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its card is of another version of freespace-uda ({error})") from error
    if norm == "frozen":
        settings = runs.from_plain(NetSettings, {**found.config["settings"], "pretrained": False, "norm": "frozen"})
    net = build_net(settings, method, 0, trial=False)
    checkpoints.check_shapes(path, {k: v.shape for k, v in net.state_dict().items()}, found.tensors)
    net.load_state_dict(found.tensors)
    return net.eval(), settings, found.config


@torch.no_grad()
def adapt_statistics(net: FreespaceNet, batches: list[tuple[torch.Tensor, ...]]) -> None:
    """Take the statistics of batch normalization anew from batches of (rgb, normals, valid); AdaBN.

    Source: "Revisiting Batch Normalization for Practical Domain Adaptation", arXiv 1603.04779.
    """
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [layer.momentum for layer in layers]
    with evaluating(net):
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
            layer.train()
        for rgb, normals, valid in batches:
            net(rgb, normals, valid)
        for layer, momentum in zip(layers, kept, strict=True):
            layer.momentum = momentum
