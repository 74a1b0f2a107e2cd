"""Features of a reference, by timestep and layer: the tokens that its self-attention read.

Keys and values are projections of these tokens, W_k h and W_v h, and take twice the space; the projections of the target's
forward pass, which would otherwise be made of its own tokens, are made of these instead, at no further cost.

Shapes: G rows (guidance branches, unconditional first), N tokens of d entries.
"""

import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from tenfold import checkpoints
from visctrl.errors import BankMismatchError, MissingFeaturesError

METHOD = "visctrl.bank"
Where = Literal["memory", "pinned"]


def time_key(timestep: float) -> int:
    """A timestep as a whole number of ten-thousandths, so that float and int timesteps meet."""
    return round(float(timestep) * 10_000)


class FeatureBank:
    """Tokens by timestep and layer.

    Args:
        where: ``memory`` keeps tensors on the device where they were made; ``pinned`` on the CPU, in pinned memory where
            there is a GPU.
        max_bytes: largest size.
        about: what the features are of: model, schedule, size of the latents.
    """

    def __init__(
        self, where: Where = "memory", *, max_bytes: int | None = None, about: dict[str, Any] | None = None
    ) -> None:
        self.where = where
        self.max_bytes = max_bytes
        self.about: dict[str, Any] = about or {}
        self._tokens: dict[tuple[int, int], Tensor] = {}
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all features."""
        return self._nbytes

    @property
    def times(self) -> list[int]:
        """Keys of the timesteps of which there are features, ascending."""
        return sorted({time for time, _ in self._tokens})

    @property
    def layers(self) -> list[int]:
        """Layers of which there are features, ascending."""
        return sorted({layer for _, layer in self._tokens})

    def put(self, timestep: float, layer: int, tokens: Tensor) -> None:
        """Keep the tokens (G, N, d) of a layer at a timestep.

        Raises:
            MemoryError: the bank would be larger than ``max_bytes``.
        """
        kept = tokens.detach()
        if self.where == "pinned":
            kept = kept.cpu()
            if tokens.is_cuda:
                kept = kept.pin_memory()
        else:
            kept = kept.clone()
        key = (time_key(timestep), layer)
        before = self._tokens[key].nbytes if key in self._tokens else 0
        if self.max_bytes is not None and self._nbytes - before + kept.nbytes > self.max_bytes:
            raise MemoryError(f"the bank of features needs more than {self.max_bytes:,} bytes")
        self._nbytes += kept.nbytes - before
        self._tokens[key] = kept

    def get(self, timestep: float, layer: int, device: torch.device | None = None) -> Tensor:
        """The tokens (G, N, d) of a layer at a timestep.

        Raises:
            MissingFeaturesError: nothing was recorded there.
        """
        found = self._tokens.get((time_key(timestep), layer))
        if found is None:
            raise MissingFeaturesError(
                f"no features of layer {layer} at timestep {timestep:g}: recorded are timesteps"
                f" {', '.join(f'{t / 10_000:g}' for t in self.times) or 'none'} and layers"
                f" {', '.join(map(str, self.layers)) or 'none'}"
            )
        return found if device is None or found.device == device else found.to(device, non_blocking=True)

    def has(self, timestep: float) -> bool:
        """Whether anything was recorded at a timestep."""
        return time_key(timestep) in {time for time, _ in self._tokens}

    def clear(self) -> None:
        """Forget all features."""
        self._tokens.clear()
        self._nbytes = 0

    def check(self, about: dict[str, Any]) -> None:
        """Make sure that the features are of this model, schedule and size.

        Raises:
            BankMismatchError: they are of another one; the message says in what.
        """
        for name, value in about.items():
            if name in self.about and self.about[name] != value:
                raise BankMismatchError(f"the features are of another {name}: {self.about[name]}, expected {value}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one safetensors file."""
        tensors = {f"{time}.{layer}": x.cpu() for (time, layer), x in self._tokens.items()}
        checkpoints.save(path, tensors, method=METHOD, config=self.about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], where: Where = "memory") -> "FeatureBank":
        """Read what ``save`` wrote, bit for bit.

        Raises:
            UserError: another kind of file.
        """
        found = checkpoints.load(path, method=METHOD)
        bank = cls(where, about=dict(found.config))
        for name, tokens in found.tensors.items():
            time, _, layer = name.partition(".")
            bank._tokens[int(time), int(layer)] = tokens
            bank._nbytes += tokens.nbytes
        return bank
