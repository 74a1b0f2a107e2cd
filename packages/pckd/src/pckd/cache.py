"""The teacher's outputs on disk, for augmentation that comes again every k epochs."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pckd.losses import Outputs
from tenfold import UserError
from tenfold.files import reserve
from tenfold.readers import BROKEN_ARRAYS
from tenfold.runs import Run

CARD = "cache.json"


class CacheMismatchError(UserError):
    """A cache of another teacher, other data or other augmentation; the message says what differs."""


class TeacherCache:
    """Features of all views and logits of the upright one, fp16, by (epoch mod k, image).

    Args:
        folder: what ``write`` made.

    Attributes:
        card: what it was made of: teacher, data, views, seed, epochs.
        epochs: k.

    Raises:
        CacheMismatchError: not a whole cache.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            self.card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
            self._features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
            self._logits = np.load(folder / "logits.npy", mmap_mode="r", allow_pickle=False)
            head = np.load(folder / "head.npz", allow_pickle=False)
            self.weight = torch.from_numpy(head["weight"])
            self.bias = torch.from_numpy(head["bias"]) if "bias" in head.files else None
            self.epochs = int(self.card["epochs"])
        except (*BROKEN_ARRAYS, KeyError, TypeError) as error:
            raise CacheMismatchError(f"{folder}: expected the folder of a finished `pckd cache` ({error})") from error

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache that was made of something else.

        Raises:
            CacheMismatchError: names each entry that differs.
        """
        faults = [f"{k} is {self.card.get(k)!r}, here {v!r}" for k, v in expected.items() if self.card.get(k) != v]
        if faults:
            raise CacheMismatchError(f"the cache was made for something else: {'; '.join(faults)}")

    def get(self, index: Tensor, epoch: int) -> Outputs:
        """The teacher's outputs for these images in the 0-based ``epoch``: features (B V, D) and upright logits (B, C)."""
        rows = index.cpu().numpy()
        features = torch.from_numpy(self._features[epoch % self.epochs, rows]).to(index.device)
        logits = torch.from_numpy(self._logits[epoch % self.epochs, rows]).to(index.device)
        weight = self.weight.to(index.device)
        bias = None if self.bias is None else self.bias.to(index.device)
        return Outputs(logits.float(), features.flatten(0, 1).float(), weight, bias)

    @staticmethod
    def write(
        run: Run,
        card: Mapping[str, Any],
        teach: Callable[[Tensor, int], Outputs],
        batches: Iterable[tuple[int, Tensor]],
        centers: tuple[Tensor, Tensor | None],
        shape: tuple[int, int, int],
    ) -> None:
        """Run the teacher over ``batches`` of (epoch, index) and keep what it gives, whole or not at all.

        Args:
            run: folder.
            card: what it is made of.
            teach: (index, epoch) -> outputs, features of all views and logits of the upright ones.
            batches: all images of each of the k epochs.
            centers: weights (C, D) and bias of the teacher's last layer.
            shape: (k, images, views).
        """
        k, images, views = shape
        names = [run.replacing(name) for name in ("features.npy", "logits.npy")]
        with names[0] as features_path, names[1] as logits_path:
            features = np.lib.format.open_memmap(
                features_path, mode="w+", dtype=np.float16, shape=(k, images, views, centers[0].shape[1])
            )
            logits = np.lib.format.open_memmap(
                logits_path, mode="w+", dtype=np.float16, shape=(k, images, len(centers[0]))
            )
            for path in (features_path, logits_path):
                reserve(path)
            for epoch, index in batches:
                out = teach(index, epoch)
                for array, values in (
                    (features, out.feature.view(len(index), views, -1)),
                    (logits, out.logits[:: len(out.logits) // len(index)]),
                ):
                    half = values.half()
                    if not bool(torch.isfinite(half).all()):
                        raise CacheMismatchError("the teacher's outputs exceed half precision: train without a cache")
                    array[epoch, index.numpy()] = half.cpu().numpy()
            features.flush()
            logits.flush()
            del features, logits
        weight, bias = centers
        arrays: dict[str, Any] = {"weight": weight.detach().cpu().numpy()}
        if bias is not None:
            arrays["bias"] = bias.detach().cpu().numpy()
        with run.replacing("head.npz") as path:
            np.savez(path, **arrays)
        run.write_json(CARD, card)
