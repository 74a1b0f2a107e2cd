"""What a model takes and what labels are: a tensor, several in a tuple, or a dict of them (``BatchEncoding`` too)."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import UserError

Inputs = Any
"""What the model takes: a tensor, a tuple of tensors (arguments), or a mapping of tensors (arguments by name)."""
Labels = Any
"""What a loss takes beside the output: a tensor, or a tuple, list or mapping of tensors."""
ANSWERS = ("labels", "label")
"""Names of the labels in a batch that is a mapping."""


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in it, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with ``function`` of each tensor; what is no tensor stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(mapped(function, item) for item in value)
    return value


def check_inputs(value: Any) -> None:
    """Refuse what no model takes.

    Raises:
        TypeError: it is no tensor, and no tuple or mapping that holds one.
    """
    if not isinstance(value, Tensor | Mapping | list | tuple) or not tensors_of(value):
        raise TypeError(
            f"expected a tensor, a tuple of tensors or a mapping of tensors as input; got {type(value).__name__}"
        )


def samples_in(value: Any) -> int:
    """Size B of the batch: that of the first tensor."""
    return tensors_of(value)[0].shape[0]


def moved(value: Any, device: torch.device | str) -> Any:
    """The same on that device."""
    return mapped(lambda tensor: tensor.to(device), value)


def rows_of(value: Any, rows: Tensor, samples: int) -> Any:
    """The samples ``rows`` (indices or a mask) of each tensor whose first dimension is the batch of ``samples``."""
    return mapped(lambda tensor: tensor[rows] if tensor.ndim and tensor.shape[0] == samples else tensor, value)


def parts_of(value: Any, count: int) -> list[Any]:
    """A batch cut into ``count`` parts along the first dimension; tensors of another size go to each part.

    Raises:
        UserError: fewer samples than parts.
    """
    samples = samples_in(value)
    if samples < count:
        raise UserError(f"accumulate is {count}, but the batch has {samples} samples")
    chunks = torch.tensor_split(torch.arange(samples), count)
    return [_span(value, int(rows[0]), int(rows[-1]) + 1, samples) for rows in chunks]


def _span(value: Any, start: int, stop: int, samples: int) -> Any:
    return mapped(lambda t: t[start:stop] if t.ndim and t.shape[0] == samples else t, value)


def split_batch(batch: Any) -> tuple[Inputs, Labels]:
    """Inputs and labels of what a loader gives: (inputs, labels), (input, input, labels), or a mapping with ``labels``.

    Raises:
        UserError: there are no labels in it.
    """
    if isinstance(batch, Mapping):
        name = next((name for name in ANSWERS if name in batch), None)
        if name is None:
            raise UserError(f"a batch has {', '.join(map(str, batch)) or 'nothing'}: expected labels among them")
        return {key: value for key, value in batch.items() if key != name}, batch[name]
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise UserError(f"a batch is a {type(batch).__name__}: expected (inputs, labels), or a mapping with labels")
    *inputs, labels = batch
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), labels


def call(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    """What the model gives."""
    if isinstance(inputs, Mapping):
        return model(**inputs, **options)
    return model(*inputs, **options) if isinstance(inputs, list | tuple) else model(inputs, **options)


def logits_of(output: Any) -> Tensor:
    """The one tensor of a model's output that a loss is computed from.

    Raises:
        UserError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    found = tensors_of(output)
    if not found:
        raise UserError(f"the model returns a {type(output).__name__}: expected a tensor, or something with logits")
    return found[0]
