"""Random numbers that depend on a key alone, by convention (seed, epoch, index): the same on each machine, in any order.

Two packages that draw for the same key draw the same numbers, since there is one function from keys to seeds.
"""

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def key(*parts: int) -> int:
    """A seed of 63 bits that depends on every part and on their order, the same on each machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator whose numbers depend on the key alone, by convention (seed, epoch, index)."""
    return torch.Generator().manual_seed(key(*parts))


def generator_on(device: torch.device | str, *parts: int) -> torch.Generator:
    """A generator of ``device`` whose numbers depend on the key and the kind of device.

    A GPU draws other numbers than the CPU for the same key. Where both have to agree, draw on the CPU and copy.
    """
    return torch.Generator(device).manual_seed(key(*parts))


def seed_all(seed: int) -> None:
    """Seed the global CPU generators of Python, NumPy and torch.

    ``torch.manual_seed`` draws the same numbers on the CPU, but where there is no CUDA it records a traceback in each
    call, which costs a tenth of a small model's step; and where there is one, it seeds every GPU as well.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def keyed(*parts: int, device: torch.device | str | None = None) -> Iterator[None]:
    """Within the block, global draws on the CPU depend on the key alone; afterwards all generators are as before.

    Args:
        parts: the key.
        device: device whose global generator is keyed and restored as well; the CPU's generators always are.
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    on_device = _global_generator(device)
    device_state = None if on_device is None else on_device.get_state()
    seed_all(key(*parts))
    if on_device is not None:
        on_device.manual_seed(key(*parts))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
        if on_device is not None and device_state is not None:
            on_device.set_state(device_state)


def _global_generator(device: torch.device | str | None) -> torch.Generator | None:
    """The generator that draws on a GPU use by default; None for the CPU."""
    device = torch.device("cpu" if device is None else device)
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return None
