"""Which self-attention layers a network has, in the order in which they run.

Names of diffusers' own dictionaries come in the order of registration (down, up, middle); layers here are numbered as they
are executed: down, middle, up.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from tenfold.errors import did_you_mean
from visctrl.errors import UnsupportedModelError

Kind = Literal["plain", "joint", "flux"]
PLAIN = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
    "AttnProcessorNPU",
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
)
"""Processors that are known to take keys and values from ``encoder_hidden_states``."""
_TEMPORAL = re.compile(r"motion_modules|temporal")


@dataclass(frozen=True)
class LayerInfo:
    """One self-attention layer.

    Attributes:
        index: number in the order of execution.
        name: name of the module.
        place: down, mid or up in a U-Net, block in a transformer, single in Flux's blocks of one stream.
        width: entries of a token.
        heads: attention heads.
        kind: plain self-attention, or attention over picture and text together (joint: SD3; flux).
        tokens: number of tokens, where a forward pass was watched.
    """

    index: int
    name: str
    place: str
    width: int
    heads: int
    kind: Kind
    tokens: int | None = None


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def self_attention_layers(model: nn.Module) -> list[LayerInfo]:
    """The self-attention layers of a network of diffusers, in the order of execution.

    Cross-attention, attention over frames (motion modules) and attention with added keys of a text are left out.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = []
    for name, module in unwrapped(model).named_modules():
        if hasattr(module, "processor") and hasattr(module, "to_q") and not _TEMPORAL.search(name):
            kind = _kind(module)
            if kind is not None:
                found.append(LayerInfo(0, name, _place(name), _width(module), int(module.heads), kind))
    if not found:
        raise UnsupportedModelError(f"{type(unwrapped(model)).__name__} has no self-attention layers of diffusers")
    found.sort(key=lambda layer: {"down": 0, "mid": 1, "up": 2}.get(layer.place, 0))  # stable: else as registered
    return [replace(layer, index=i) for i, layer in enumerate(found)]


def _kind(module: Any) -> Kind | None:
    name = type(module).__name__
    if name == "FluxAttention":
        return "flux"
    if name != "Attention" or getattr(module, "is_cross_attention", False):
        return None
    if "Joint" in type(module.processor).__name__:
        return "joint"
    return "plain" if getattr(module, "added_kv_proj_dim", None) is None else None


def _place(name: str) -> str:
    for prefix, place in (("down_blocks", "down"), ("mid_block", "mid"), ("up_blocks", "up")):
        if name.startswith(prefix):
            return place
    return "single" if name.startswith("single_transformer_blocks") else "block"


def _width(module: Any) -> int:
    return int(module.to_k.in_features if hasattr(module, "to_k") else module.to_qkv.in_features)


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[list[LayerInfo]]:
    """Within the block, the layers that run are added to a list as they do, with their numbers of tokens.

    Raises:
        UnsupportedModelError: the model has no self-attention.
    """
    seen: list[LayerInfo] = []
    handles = []
    for layer in self_attention_layers(model):

        def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], layer: LayerInfo = layer) -> None:
            h = given[0] if given else named["hidden_states"]
            seen.append(replace(layer, tokens=h.shape[-2] * h.shape[-1] if h.ndim == 4 else h.shape[1]))

        module = unwrapped(model).get_submodule(layer.name)
        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def select_layers(text: str, layers: list[LayerInfo]) -> tuple[int, ...]:
    """Numbers of the layers that an expression names.

    ``1:`` (from 1 on), ``44:64``, ``0,3,-1``, ``up``, ``mid,up``, a module's name or the beginning of names; ``none``.

    Raises:
        ValueError: no such layer; the message lists what there is.
    """
    chosen: set[int] = set()
    numbers = range(len(layers))
    for part in filter(None, (part.strip() for part in text.split(","))):
        if part == "none":
            continue
        if match := re.fullmatch(r"(-?\d*):(-?\d*)", part):
            bounds = [int(x) if x else None for x in match.groups()]
            chosen |= set(numbers[slice(*bounds)])
        elif re.fullmatch(r"-?\d+", part):
            if not -len(layers) <= int(part) < len(layers):
                raise ValueError(f"layers: {part} is none of the layers 0 to {len(layers) - 1}")
            chosen.add(numbers[int(part)])
        else:
            found = {layer.index for layer in layers if part == layer.place or layer.name.startswith(part)}
            if not found:
                known = [*dict.fromkeys(layer.place for layer in layers), *(layer.name for layer in layers)]
                raise ValueError(
                    f"layers: '{part}' is none of the layers 0 to {len(layers) - 1}: {did_you_mean(part, known)}"
                )
            chosen |= found
    return tuple(sorted(chosen))
