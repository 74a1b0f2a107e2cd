"""From which of its inputs a module has computed a tensor: followed through every operation that runs meanwhile.

A layer may be given what a module has made of the states that it attends to (normalized, projected, cut), beside what it has
made of its own. Both may have the same shape, so only the computation itself says which one it is.
"""

from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Provenance:
    """Marks tensors, and everything that is computed from them while it is on.

    A mark belongs to a tensor's storage: views have it too, and what is written into by a marked tensor gets it. No tensor
    is kept alive. What leaves torch (to NumPy and back) has no mark.
    """

    def __init__(self) -> None:
        self._marks: dict[int, tuple[StorageWeakRef, frozenset[Hashable]]] = {}
        self._mode = _Following(self)

    def __enter__(self) -> "Provenance":
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._marks.clear()

    def mark(self, tensor: Tensor, *marks: Hashable) -> None:
        """Add marks to a tensor."""
        storage = _storage(tensor)
        if storage is not None:
            key: int = storage._cdata
            weak, known = self._marks.get(key, (None, frozenset[Hashable]()))
            # the weak reference keeps the address from being used again
            self._marks[key] = weak or StorageWeakRef(storage), known | set(marks)  # type: ignore[no-untyped-call]

    def of(self, tensor: Tensor) -> frozenset[Hashable]:
        """The marks of all tensors that this one was computed from."""
        storage = _storage(tensor)
        return frozenset() if storage is None else self._marks.get(storage._cdata, (None, frozenset[Hashable]()))[1]


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, provenance: Provenance) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.provenance = provenance

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call: Callable[..., Any] = func
        returned = call(*args, **kwargs)
        marks = frozenset[Hashable]().union(*map(self.provenance.of, _tensors((args, kwargs))))
        if marks:
            for tensor in _tensors((returned, _written(func, args, kwargs))):
                self.provenance.mark(tensor, *marks)
        return returned


def _tensors(things: Any) -> list[Tensor]:
    return [thing for thing in tree_leaves(things) if isinstance(thing, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Arguments that an operation writes into."""
    if not func._schema.is_mutable:
        return []
    named = {argument.name: place for place, argument in enumerate(func._schema.arguments) if argument.is_write}
    return [args[place] if place < len(args) else kwargs.get(name) for name, place in named.items()]


def _storage(tensor: Tensor) -> Any:
    """The tensor's storage; None where it has none of its own (sparse tensors, wrappers)."""
    try:
        return tensor.untyped_storage() if type(tensor) in (Tensor, torch.nn.Parameter) else None
    except (NotImplementedError, RuntimeError):
        return None
