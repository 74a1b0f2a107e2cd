"""Which rows belong to which sample, where that was only supposed: samples change places, and their rows have to follow.

One row per sample (a pooled one), windows of pictures, flattened tokens: a layer's input does not say that it is that. The
rows that are routed to an expert may be as many as there are samples, and an input with the tokens first may be square.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corda.batches import Batch, forward
from corda.streams import DECODER, SIGHT_AND_SOUND, TEXT, Streams, Tokens

SUPPOSED = "was taken apart by samples as its shape suggests, but"
"""What is said of a layer whose rows do not follow."""


def settle(model: nn.Module, layers: Mapping[str, nn.Module], streams: Streams) -> None:
    """Check every doubt of ``streams`` on the batch where it arose; what does not hold becomes unknown, with a reason.

    A batch is put through the model twice, the second time with each sample one place further. The counted tokens of each
    sample must be the same both times.

    Args:
        model: the model, in evaluation mode.
        layers: name -> layer, at least those in doubt.
        streams: says which tokens count; no doubt is left afterwards.
    """
    doubts: dict[Callable[[], Any] | None, list[str]] = {}
    for name, recall in streams.doubts.items():
        doubts.setdefault(recall, []).append(name)
    for recall, names in doubts.items():
        wrong = names if recall is None else _wrong(model, recall(), {name: layers[name] for name in names}, streams)
        reason = (
            "this cannot be checked where a function runs the model; give batches"
            if recall is None
            else "where samples change places in the batch, its rows do not follow them"
        )
        for name in wrong:
            streams.unknown.setdefault(name, f"its input {SUPPOSED} {reason}")
    streams.doubts = {}


def _wrong(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module], streams: Streams) -> list[str]:
    count = _samples_in(batch)
    first, second = (_seen(model, given, layers, streams, count) for given in (batch, _moved(batch, count)))
    return [
        name
        for name in layers
        if len(first[name]) != len(second[name])
        or not all(_follow(a, b) for a, b in zip(first[name], second[name], strict=True))
    ]


def _seen(
    model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module], streams: Streams, count: int
) -> dict[str, list[list[Tensor]]]:
    """Of each call of each layer, one number per counted token, sample by sample."""
    found: dict[str, list[list[Tensor]]] = {name: [] for name in layers}

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            x = args[0] if args else keywords["input"]
            found[name].append(_by_sample(x.detach(), streams.of(name, x), count))

        return hook

    hooks = [layer.register_forward_pre_hook(before(name), with_kwargs=True) for name, layer in layers.items()]
    labels = streams.labels
    try:
        with streams.attached():
            streams.labels = batch.get("labels") if isinstance(batch, Mapping) else None
            forward(model, batch)
    finally:
        streams.labels = labels
        for hook in hooks:
            hook.remove()
    return found


def _by_sample(x: Tensor, tokens: Tokens, count: int) -> list[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(tokens.sample, Tensor):
        sample = tokens.sample.to(x.device)
    else:
        parts = tokens.sample or (len(x) if x.ndim > 2 else 1)
        sample = torch.arange(parts, device=x.device).repeat_interleave(len(rows) // parts)
    keep = torch.ones_like(sample, dtype=torch.bool) if tokens.keep is None else tokens.keep.to(x.device).flatten()
    direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0)).to(rows)
    numbers = rows @ direction
    return [numbers[keep & (sample == number)] for number in range(max(count, int(sample.max()) + 1))]


def _follow(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether the second list is the first one with each sample one place further, up to rounding."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second[1:] + second[:1], strict=True):
        allowed = max(1e-3, 4 * torch.finfo(one.dtype).eps) * one.norm()
        if one.shape != other.shape or not (one - other).norm() <= allowed:
            return False
    return True


def _samples_in(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        return len(batch)
    keys = [*TEXT, *SIGHT_AND_SOUND, *DECODER, *batch]
    return next(len(batch[key]) for key in keys if isinstance(batch.get(key), Tensor))


def _moved(batch: Batch, count: int) -> Batch:
    """The batch with each sample one place further."""
    if isinstance(batch, Tensor):
        return batch.roll(1, 0)
    return {
        key: value.roll(1, 0) if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for key, value in batch.items()
    }
