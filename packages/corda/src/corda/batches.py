"""Calibration data as people have it: what counts as a batch, and one forward pass over it."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from corda.streams import DECODER, SIGHT_AND_SOUND, TEXT
from tenfold import UserError

Batch = Mapping[str, Any] | Tensor
"""Keyword arguments of a model, or its one argument."""
Data = Iterable[Batch] | Batch | Callable[[], object]
"""Batches, one batch, or a function that runs the model itself."""


class Stop(Exception):
    """Raised inside a forward pass once the last input that is needed has been seen."""


def is_batches(data: Data) -> bool:
    """Whether data are batches, not a function that runs the model."""
    return isinstance(data, Iterable)


def batches_of(data: Data) -> Iterator[Batch]:
    """The batches of data, each checked when its turn comes.

    Raises:
        UserError: a batch that is neither a dict of the model's arguments nor a tensor.
    """
    whole: Iterable[Any] = [data] if isinstance(data, Mapping | Tensor) else data  # type: ignore[assignment]
    if isinstance(whole, str):
        raise UserError("the calibration data are a text; expected batches of tokens (corda.data.calibration_batches)")
    for number, batch in enumerate(whole):
        yield _checked(number, batch)


def _checked(number: int, batch: Any) -> Batch:
    expected = "expected a dict of the model's arguments or a tensor"
    if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], Tensor):
        return batch[0]  # of a TensorDataset
    if isinstance(batch, str):
        raise UserError(f"batch {number} is a text: {expected}; tokenize it first (return_tensors='pt')")
    if isinstance(batch, Tensor):
        return batch
    if not isinstance(batch, Mapping):
        kind = type(batch).__name__
        raise UserError(f"batch {number} is a {kind}: {expected}; name its parts, as in {{'input_ids': batch[0]}}")
    for key in (*TEXT, *SIGHT_AND_SOUND, *DECODER, "attention_mask", "labels"):
        value = batch.get(key)
        if isinstance(value, str | list | tuple) and key != "pixel_values":
            raise UserError(f"batch {number}, {key}: expected a tensor, found a {type(value).__name__}")
    return batch


def forward(model: nn.Module, batch: Batch) -> None:
    """One forward pass, as far as the last input that is needed.

    ``labels`` are left out, but for an encoder-decoder that makes the decoder's input of them, as it does in training.

    Raises:
        UserError: rows that are longer than the model's table of positions.
    """
    length = _length(batch)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longer = isinstance(limit, int) and 0 < limit < length
    with contextlib.suppress(Stop):
        try:
            if isinstance(batch, Mapping):
                model(**arguments_of(model, batch))
            else:
                model(batch)
        except IndexError as error:
            if isinstance(limit, int) and length > limit - 8:  # some models keep a few of them for themselves
                raise UserError(f"rows of {length} tokens, but the model has {limit} positions; cut them") from error
            raise
    if longer:
        warnings.warn(f"rows of {length} tokens are longer than the model's {limit} positions", stacklevel=4)


def arguments_of(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch a model is called with."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    if decodes_labels(model, batch):
        given["labels"] = batch["labels"]
    named = inspect.signature(type(model).forward).parameters
    if "use_cache" in named and hasattr(getattr(model, "config", None), "use_cache"):
        given["use_cache"] = False
    return given


def decodes_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a model makes its decoder's input of the labels of this batch."""
    if not _decodes(model) or any(batch.get(key) is not None for key in DECODER):
        return False
    labels = batch.get("labels")
    return isinstance(labels, Tensor) and labels.ndim == 2


def _decodes(model: nn.Module) -> bool:
    two_sided = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return two_sided and getattr(model, "get_output_embeddings", lambda: None)() is not None


def warn_of_sources(model: nn.Module, batch: Batch) -> None:
    """Warn of an encoder-decoder that is given nothing for its decoder, and takes the source for it."""
    if not isinstance(batch, Mapping) or not _decodes(model) or decodes_labels(model, batch):
        return
    if all(batch.get(key) is None for key in DECODER):
        what = "the batches hold neither labels nor decoder_input_ids"
        warnings.warn(f"{what}: the decoder is calibrated on the source", stacklevel=4)


def _length(batch: Batch) -> int:
    ids = batch if isinstance(batch, Tensor) else next((batch[key] for key in TEXT if batch.get(key) is not None), None)
    whole = isinstance(ids, Tensor) and ids.ndim == (3 if ids.is_floating_point() else 2)
    return ids.shape[1] if whole and isinstance(ids, Tensor) else 0
