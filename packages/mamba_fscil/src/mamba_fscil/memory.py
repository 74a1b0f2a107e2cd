"""What is kept of pictures: the mean map of each class, and the maps of a few while they are learned."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tenfold.errors import NonFiniteError, UserError


def check_maps(maps: Tensor, what: str = "maps") -> None:
    """Check that maps are finite numbers.

    Raises:
        NonFiniteError: NaN or infinity; the message names the first row.
    """
    good = maps.flatten(1).isfinite().all(dim=1)
    if not bool(good.all()):
        raise NonFiniteError(f"{what}: row {int((~good).nonzero()[0])} holds NaN or infinity")


class FeatureMemory:
    """Mean map and count of each class, in the order in which the classes came; means are summed in double precision.

    Attributes:
        counts: class -> number of maps.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.counts)

    def update(self, maps: Tensor, labels: Tensor) -> None:
        """Add maps to the means of their classes; batches may come in any order.

        Shapes: ``maps`` (b, c, H, W), ``labels`` (b,) int64.

        Raises:
            NonFiniteError: a map holds NaN or infinity; the message names its row.
            UserError: maps of another size than before.
        """
        check_maps(maps)
        for label in torch.unique(labels).tolist():
            rows = maps[labels == label].double()
            known = next(iter(self._sums.values()), None)
            if known is not None and known.shape != rows.shape[1:]:
                raise UserError(f"maps are {tuple(rows.shape[1:])} each, those before are {tuple(known.shape)}")
            total = rows.sum(dim=0).cpu()
            self._sums[label] = self._sums[label] + total if label in self._sums else total
            self.counts[label] = self.counts.get(label, 0) + len(rows)

    def forget(self, label: int) -> None:
        """Drop a class, so that it can be learned once more."""
        self._sums.pop(label, None)
        self.counts.pop(label, None)

    def means(self, labels: Sequence[int] | None = None) -> Tensor:
        """Mean maps (K, c, H, W) of some classes, single precision; default: all, in the order of their numbers."""
        chosen = sorted(self.counts) if labels is None else labels
        return torch.stack([(self._sums[k] / self.counts[k]).float() for k in chosen])

    def tensors(self, labels: Sequence[int]) -> dict[str, Tensor]:
        """Numbers, counts and sums of some classes, as a file keeps them."""
        sums = torch.stack([self._sums[k] for k in labels]) if labels else torch.zeros(0, dtype=torch.float64)
        counts = torch.tensor([self.counts[k] for k in labels], dtype=torch.int64)
        return {"memory.labels": torch.tensor(labels, dtype=torch.int64), "memory.counts": counts, "memory.sums": sums}

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Add the classes that ``tensors`` gave."""
        numbers, counts = tensors["memory.labels"].tolist(), tensors["memory.counts"].tolist()
        for k, count, total in zip(numbers, counts, tensors["memory.sums"], strict=True):
            self.counts[k], self._sums[k] = count, total.double()


class FeatureBank:
    """Maps of pictures that are computed once, with their labels.

    Attributes:
        maps: (N, c, H, W).
        labels: (N,) int64.
    """

    def __init__(self, maps: Tensor, labels: Tensor) -> None:
        self.maps, self.labels = maps, labels

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> "FeatureBank":
        """All batches of maps and labels, one after another."""
        maps, labels = zip(*batches, strict=True)
        return cls(torch.cat(maps), torch.cat(labels))
