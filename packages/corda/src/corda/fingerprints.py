"""Which model something belongs to: a fingerprint of its weights that also says in what two models differ.

Statistics, factors, starts and anchored adapters carry the fingerprint of the model that they were made for, and are refused
where they meet another one.
"""

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corda.targets import dequantizes, is_linear, offloaded
from tenfold import UserError

PARTS = (("values", 24), ("names", 10), ("shapes", 10), ("dtype", 10), ("others", 10))
"""What a fingerprint is made of, and how many of its digits each takes; others are the weights outside of linear layers."""


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and a strided sample of the values of a model's weights.

    Adapter weights do not count, and peft's wrapping of names neither, so a model keeps its fingerprint when an adapter
    that leaves its weights alone is attached.

    Raises:
        UserError: a weight has no values (it is on the meta device, and accelerate did not put it there).
    """
    digests = {name: hashlib.sha256() for name, _ in PARTS}
    lines = {_plain_name(f"{name}.") for name, module in model.named_modules() if is_linear(module)}
    for name, value in sorted(_weights(model), key=lambda found: found[0]):
        flat = (value.dequantize() if dequantizes(value) else value).detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.float32)
        digests["values"].update(json.dumps(sample.tolist()).encode())
        digests["names"].update(f"{name}\n".encode())
        digests["shapes"].update(f"{list(value.shape)}\n".encode())
        digests["dtype"].update(f"{value.dtype}\n".encode())
        if not any(name[: end + 1] in lines for end, letter in enumerate(name) if letter == "."):
            rounded = sample.bfloat16().tolist()  # a model may be loaded in fewer bits for quantization
            digests["others"].update(json.dumps([name, list(value.shape), rounded]).encode())
    return "".join(digests[name].hexdigest()[:length] for name, length in PARTS)


def differences(expected: str, found: str) -> list[str]:
    """In what two models differ, by their fingerprints: names, shapes, dtype, values; empty for models of equal values."""
    parts = {}
    start = 0
    for name, length in PARTS:
        parts[name] = expected[start : start + length] != found[start : start + length]
        start += length
    if not (parts["values"] or parts["names"] or parts["shapes"]):
        return []  # a model that was loaded in more bits holds the same numbers
    parts["dtype"] = parts["dtype"] and not parts["names"]  # of other tensors, it says nothing
    return [name for name in ("names", "shapes", "dtype", "values") if parts[name]]


def check_same(what: str, expected: str | None, model: nn.Module, *, quantized: bool = False) -> None:
    """Raise ``UserError`` unless a model is the one that something was made for.

    Args:
        what: what was made for it, for the message.
        expected: fingerprint of the model that it was made for; None where that is not known.
        model: the model.
        quantized: whether the model may hold quantized forms of that model's linear layers; then the other weights
            have to agree.
    """
    if expected is None:
        return
    found = fingerprint(model)
    length = dict(PARTS)["others"]
    if quantized and expected[-length:] == found[-length:]:
        return
    differing = differences(expected, found)
    if differing:
        raise UserError(f"{what} for another model ({listed(differing)} differ)")


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, or ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    modules = dict(model.named_modules())
    for name, value in model.state_dict().items():
        if ".lora_" in name or not isinstance(value, Tensor):
            continue
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        if value.device.type == "meta":
            stored = None if owner is None else offloaded(owner, leaf)
            if stored is None:
                raise UserError(f"weight {name} has no values: the model is on the meta device; load its weights first")
            value = stored
        if isinstance(owner, Conv1D) and leaf == "weight":
            value = value.T  # factors do not depend on the layout
        yield _plain_name(name), value


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
