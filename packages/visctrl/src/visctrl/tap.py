"""EXPERIMENTAL: injection into transformers of any make, by the inputs of their key and value projections.

    tap = KeyTap("-8:", tokens=slice(-4096, None))  # of [text; picture] the picture's tokens
    with tap.attach(transformer):
        with tap.recording(bank):
            transformer(reference_latents, ...)
        with tap.injecting(bank):
            transformer(target_latents, ...)

The model's own attention does the rest, with its normalization, rotary positions, text and backend, so reference and target
need the same number of tokens, and the reference takes the target's positions. For models that ``SelfAttentionController``
knows it gives what that gives in mode replace. Shapes: B rows, N tokens of d entries.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

from torch import Tensor, nn

from visctrl.banks import FeatureBank, time_key
from visctrl.control import one_time
from visctrl.errors import AttachedError, ShapeMismatchError, UnsupportedModelError
from visctrl.layers import unwrapped


class KeyTap:
    """Records and exchanges what keys and values are made of, in every module with ``to_q``, ``to_k`` and ``to_v``.

    Whether a layer is self-attention is seen in each call: its keys are made of the very tensor that its queries are made of.

    Args:
        layers: layers as ``start:end`` over the modules in the order of registration.
        tokens: which tokens of a layer are the picture's.
    """

    def __init__(self, layers: slice | str = "0:", tokens: slice = slice(None)) -> None:
        if isinstance(layers, str):
            first, _, last = layers.partition(":")
            layers = slice(int(first) if first else None, int(last) if last else None)
        self.layers = layers
        self.tokens = tokens
        self.names: list[str] = []
        self.injected = 0
        self._mode: Literal["off", "record", "inject"] = "off"
        self._bank: FeatureBank | None = None
        self._times: frozenset[int] | None = None
        self._time = 0.0
        self._queries: dict[int, Tensor] = {}
        self._attached = False

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator["KeyTap"]:
        """Hook the projections of a network; at the end the hooks are gone.

        Raises:
            AttachedError: it is attached already.
            UnsupportedModelError: no module has the three projections.
        """
        if self._attached:
            raise AttachedError("this tap is attached already")
        model = unwrapped(model)
        parts = ("to_q", "to_k", "to_v")
        found = [(n, m) for n, m in model.named_modules() if all(hasattr(m, part) for part in parts)]
        if not found:
            raise UnsupportedModelError(f"{type(model).__name__} has no module with to_q, to_k and to_v")
        self.names = [name for name, _ in found]
        arguments = list(inspect.signature(model.forward).parameters)
        handles = [model.register_forward_pre_hook(self._before(arguments), with_kwargs=True)]
        self._attached, self.injected, asked = True, 0, False
        try:
            for number in range(len(found))[self.layers]:
                module: Any = found[number][1]
                handles.append(module.to_q.register_forward_pre_hook(self._ask(number)))
                handles.append(module.to_k.register_forward_pre_hook(self._exchange(number, record=True)))
                handles.append(module.to_v.register_forward_pre_hook(self._exchange(number, record=False)))
            yield self
            asked = self._times is not None
        finally:
            for handle in handles:
                handle.remove()
            self._attached = False
            self._queries.clear()
        if asked and not self.injected:
            warnings.warn("nothing was injected: no self-attention ran at a chosen timestep", stacklevel=2)

    @contextlib.contextmanager
    def recording(self, bank: FeatureBank) -> Iterator[None]:
        """Within the block, forward passes put the picture's tokens into a bank."""
        self._mode, self._bank = "record", bank
        try:
            yield
        finally:
            self._mode, self._bank = "off", None

    @contextlib.contextmanager
    def injecting(self, bank: FeatureBank, *, timesteps: Collection[float] = ()) -> Iterator[None]:
        """Within the block, keys and values of the picture are made of the bank's tokens.

        Args:
            bank: features of the reference.
            timesteps: timesteps at which to inject; none given means all that the bank has.
        """
        self._mode, self._bank = "inject", bank
        self._times = frozenset(map(time_key, timesteps)) or frozenset(bank.times)
        try:
            yield
        finally:
            self._mode, self._bank = "off", None

    def _before(self, arguments: list[str]) -> Callable[..., None]:
        def read(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._mode != "off":
                self._time = one_time((dict(zip(arguments, given, strict=False)) | named).get("timestep"))

        return read

    def _ask(self, number: int) -> Callable[..., None]:
        def ask(_: nn.Module, given: tuple[Any, ...]) -> None:
            if self._mode != "off":
                self._queries[number] = given[0]

        return ask

    def _exchange(self, number: int, *, record: bool) -> Callable[..., tuple[Tensor, ...] | None]:
        def exchange(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
            h: Tensor = given[0]
            if self._mode == "off" or id(self._queries.get(number)) != id(h):
                return None
            assert self._bank is not None
            if self._mode == "record":
                if record:
                    self._bank.put(self._time, number, h[:, self.tokens])
                return None
            if self._times is not None and time_key(self._time) not in self._times:
                return None
            tokens = self._bank.get(self._time, number, h.device).to(h.dtype)
            if tokens.shape[1:] != h[:, self.tokens].shape[1:] or len(h) % len(tokens):
                raise ShapeMismatchError(
                    f"layer {number}: features {tuple(tokens.shape)}, expected {tuple(h[:, self.tokens].shape)}"
                )
            out = h.clone()
            out[:, self.tokens] = tokens.repeat_interleave(len(h) // len(tokens), dim=0)
            self.injected += record
            return (out, *given[1:])

        return exchange
