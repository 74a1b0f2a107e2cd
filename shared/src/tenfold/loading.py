"""Batches that are a function of (seed, epoch, index): a ``DataLoader`` for loops that can be killed and resumed.

It needs torch alone; ``tenfold.training`` trains with it under Lightning, a plain loop calls ``seek`` and iterates.
"""

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tenfold import distributed
from tenfold.errors import UserError
from tenfold.randomness import generator, key, keyed, seed_all

Batches = Sequence[Sequence[int]]


class _KeyedDataset(Dataset[Any]):
    """``dataset[index]`` with keyed randomness, so that neither the worker nor the order of work matters."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, keys: Sequence[tuple[int, int, int]]) -> list[Any]:
        items = []
        with keyed():  # once a batch: taking and putting back states costs more than seeding
            for parts in keys:
                seed_all(key(self.seed, *parts))
                items.append(self.dataset[parts[1]])
        return items


class _KeyedBatches:
    """The batches of ``epoch`` from number ``start`` on, as lists of (epoch, index, times drawn before)."""

    def __init__(self, order: Callable[[torch.Generator], Batches], length: int, seed: int) -> None:
        self.order = order
        self.length = length
        self.seed = seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.length // distributed.world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        epoch, start = self.epoch, self.start
        batches = self.order(generator(self.seed, epoch))
        assert len(batches) == self.length, f"order gave {len(batches)} batches in epoch {epoch}, not {self.length}"
        drawn: Counter[int] = Counter()
        keyed = []
        for batch in batches:
            keyed.append([(epoch, index, drawn[index]) for index in batch])
            drawn.update(batch)
        yield from distributed.split(keyed, distributed.rank(), distributed.world_size())[start : len(self)]


def cut(order: Tensor, batch_size: int, devices: int = 1) -> list[list[int]]:
    """Cut an order of rows into batches; what does not fill one on each device is shared out in equal parts.

    The batches of one step have one size on all devices, so that what is gathered has one shape. Parts of a single row
    are left out: batch norm cannot take them.

    Args:
        order: numbers of the rows.
        batch_size: rows per batch of one device.
        devices: number of devices.
    """
    whole = len(order) // (batch_size * devices) * batch_size * devices
    batches = list(torch.split(order[:whole], batch_size)) if whole else []
    each = (len(order) - whole) // devices
    batches += list(torch.split(order[whole : whole + each * devices], each)) if each > 1 else []
    return [batch.tolist() for batch in batches]


class KeyedLoader(DataLoader[Any]):
    """A ``DataLoader`` whose batches are a function of (seed, epoch, index), for any number of workers.

    Whatever ``dataset[index]`` draws from the global generators of Python, NumPy or torch is keyed, so augmentation in
    the dataset needs no care. Give it to ``fit``; iterated by hand, it gives the epoch that ``seek`` has set.

    Args:
        dataset: has ``len`` and gives an item for an index.
        batch_size: items a batch; on several devices, a batch of one device.
        seed: of order and augmentation.
        order: makes the batches of an epoch (lists of indices, as many in every epoch) from a generator of that epoch;
            default is a new random order every epoch, cut into whole batches of ``batch_size``. With it, balanced or
            fixed orders are a function of a few lines.
        batches: batches an epoch, over all devices; default is what one pass gives. With more, items come again in a
            new order and with new augmentation. It makes loaders of different data equally long.
        num_workers: processes that read ahead; they change nothing but the speed.
        collate_fn: makes a batch from a list of items, as in ``DataLoader``.

    Raises:
        UserError: the dataset does not fill one batch on each device.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int = 1,
        seed: int = 0,
        order: Callable[[torch.Generator], Batches] | None = None,
        batches: int | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if order is not None and batches is not None:
            raise ValueError("'order' decides how many batches there are: give it or 'batches'")
        if order is None:
            size, count = len(dataset), batches or len(dataset) // batch_size
            if not count or not size:
                raise UserError(f"{size} items do not fill a batch of {batch_size}: lower the batch size")

            def order(generator: torch.Generator) -> Batches:
                passes = [torch.randperm(size, generator=generator) for _ in range(-(-count * batch_size // size))]
                rows: Batches = torch.cat(passes)[: count * batch_size].view(count, batch_size).tolist()
                return rows

        else:
            count = len(order(generator(seed, 0)))
        self.keyed_batches = _KeyedBatches(order, count, seed)
        self.between_steps: Callable[[], None] = lambda: None
        super().__init__(
            _KeyedDataset(dataset, seed),
            batch_sampler=self.keyed_batches,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # else each iterator would draw from the global one
        )

    @property
    def batches(self) -> int:
        """Batches per epoch over all devices; ``len`` counts those of this device once a process group is there."""
        return self.keyed_batches.length

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration give the batches of ``epoch`` from number ``start`` (of this device) on."""
        self.keyed_batches.epoch, self.keyed_batches.start = epoch, start

    def __iter__(self) -> Any:
        self.between_steps()
        for batch in super().__iter__():
            yield batch
            self.between_steps()


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer decides when to stop
