"""Memory that a piece of code needs at its peak: live tensor bytes, counted, and what the system says."""

import contextlib
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryProbe:
    """Counts the bytes of all tensors that are alive, and remembers the most.

    ::

        with MemoryProbe(model, optimizer, batch) as probe:
            step()
        probe.peak_bytes

    Each storage counts once, however many tensors share it; what operators use internally does not count. The count is the
    same on each machine.

    Args:
        existing: what is there already: modules, optimizers, tensors, and lists or dicts of them. Without it, only what the
            block makes is counted.

    Attributes:
        peak_bytes: most live bytes at one time.
        start_bytes: bytes of what was given.
        saved_bytes: most bytes that autograd kept for the backward pass at one time, without what was given.
        rss_growth: growth of the process's resident memory at its peak; None where the system does not tell. glibc keeps
            freed blocks: start Python with MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=0 for numbers that mean
            something.
        cuda_bytes: peak of CUDA's allocator (``torch.cuda.max_memory_allocated``); None without a GPU.
    """

    def __init__(self, *existing: Any) -> None:
        self._existing = existing
        self._live: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._given: set[int] = set()
        self._saved: dict[int, list[int]] = {}  # storage -> [bytes, times saved]
        self._now = self._saved_now = 0
        self.peak_bytes = self.start_bytes = self.saved_bytes = 0
        self.rss_growth: int | None = None
        self.cuda_bytes: int | None = None

    def __enter__(self) -> "MemoryProbe":
        for tensor in tensors_in(self._existing):
            self._watch(tensor)
        self._given = set(self._live)
        self.start_bytes = self._now
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack))
        self._stack.enter_context(_Watcher(self))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._rss = _reset_resident_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        peak = _resident("VmHWM")
        self.rss_growth = None if self._rss is None or peak is None else peak - self._rss
        if torch.cuda.is_available():
            self.cuda_bytes = torch.cuda.max_memory_allocated()
        self._watched.clear()

    @property
    def live_bytes(self) -> int:
        """Live bytes now."""
        return self._now

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = size
        self._now += size
        self.peak_bytes = max(self.peak_bytes, self._now)

        def gone(reference: Any, key: int = key) -> None:
            self._now -= self._live.pop(key, 0)
            self._watched.pop(key, None)

        self._watched[key] = weakref.ref(storage, gone)

    def _pack(self, tensor: Tensor) -> "_Saved":
        key = tensor.untyped_storage()._cdata
        if key not in self._given:
            entry = self._saved.setdefault(key, [tensor.untyped_storage().nbytes(), 0])
            entry[1] += 1
            if entry[1] == 1:
                self._saved_now += entry[0]
                self.saved_bytes = max(self.saved_bytes, self._saved_now)
        saved = _Saved(tensor)
        weakref.finalize(saved, self._unsave, key)
        return saved

    def _unsave(self, key: int) -> None:
        if entry := self._saved.get(key):
            entry[1] -= 1
            if not entry[1]:
                self._saved_now -= self._saved.pop(key)[0]


class _Saved:
    """A tensor that autograd keeps; weakly referable, unlike what hooks may return otherwise."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: Any) -> Tensor:
    return torch.as_tensor(saved.tensor)


class _Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    def __init__(self, probe: MemoryProbe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.probe = probe

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self.probe._watch(leaf)
        return out


def tensors_in(things: Any) -> Iterator[Tensor]:
    """The tensors of modules (with gradients), optimizers (with states), lists and dicts, at any depth."""
    if isinstance(things, Tensor):
        yield things
        if things.is_leaf and things.grad is not None:
            yield things.grad
    elif isinstance(things, nn.Module):
        yield from tensors_in([*things.parameters(), *things.buffers()])
    elif isinstance(things, torch.optim.Optimizer):
        yield from tensors_in(list(things.state.values()))
    elif isinstance(things, Mapping):
        yield from tensors_in(list(things.values()))
    elif isinstance(things, Iterable) and not isinstance(things, str | bytes):
        for thing in things:
            yield from tensors_in(thing)


def _resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not sys.platform.startswith("linux") or not status.exists():
        return None
    line = next((line for line in status.read_text().splitlines() if line.startswith(f"{field}:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def _reset_resident_peak() -> int | None:
    """Resident bytes now, with the system's peak set back to it; None where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")
