"""A training loop of mmengine's that can be killed at any moment and resumed to the same bits.

mmengine resumes weights, optimizer and schedulers, but neither the position inside an epoch nor any random state. Here
every random draw is keyed (``tenfold.randomness``): data order by (seed, epoch), augmentation by (seed, epoch, index), the
model's own draws by (seed, iteration, rank). So nothing has to be restored but where the loop stands.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS, HOOKS, LOOPS
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import Sampler

from tenfold import UserError
from tenfold.randomness import generator, keyed


@DATASETS.register_module()
class KeyedDataset:
    """A data set whose augmentation depends on (seed, epoch, index) alone.

    Its indices are ``epoch * len + index``, which is what ``KeyedSampler`` yields.

    Args:
        dataset: mmdet data set, or its config.
        seed: seed of the augmentation.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.seed = seed

    def __getattr__(self, name: str) -> Any:
        """What hooks, samplers and wrappers ask a data set for is the data set's own."""
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def pipeline(self) -> Any:
        """The data set's own; mmdet's ``PipelineSwitchHook`` puts another in its place."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self.dataset.pipeline = pipeline

    def __len__(self) -> int:
        return len(self.dataset)

    def get_data_info(self, key: int) -> Any:
        """Annotations of one image."""
        return self.dataset.get_data_info(key % len(self))

    def get_cat_ids(self, key: int) -> Any:
        """Classes of one image."""
        return self.dataset.get_cat_ids(key % len(self))

    def __getitem__(self, key: int) -> Any:
        """An item, augmented.

        Raises:
            UserError: its image cannot be read.
        """
        epoch, index = divmod(key, len(self))
        with keyed(self.seed, epoch, index):
            try:
                return self.dataset[index]
            except (OSError, AttributeError, TypeError) as error:
                info = self.dataset.get_data_info(index)
                path = info.get("img_path", "") if isinstance(info, dict) else ""
                if path and not _readable(path):
                    raise UserError(f"{path}: the image cannot be read") from error
                raise


def _readable(path: str) -> bool:
    """Whether an image file can be decoded."""
    try:
        return mmcv.imread(path) is not None
    except (OSError, ValueError):
        return False


@DATASETS.register_module()
class MemoryDataset:
    """A data set whose items are made once and kept; for small data whose pipeline draws nothing at random.

    Args:
        dataset: mmdet data set or its config.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self._items: dict[int, Any] = {}

    @property
    def metainfo(self) -> Any:
        """The data set's own."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def get_data_info(self, index: int) -> Any:
        """Annotations of one image."""
        return self.dataset.get_data_info(index)

    def __getitem__(self, index: int) -> Any:
        if index not in self._items:
            self._items[index] = self.dataset[index]
        return dict(self._items[index])


@DATA_SAMPLERS.register_module()
class KeyedSampler(Sampler[int]):
    """Every image once per epoch, in an order that depends on (seed, epoch); each process takes its share.

    Args:
        dataset: a ``KeyedDataset``.
        seed: seed of the order.
        shuffle: whether to shuffle; else images come in the data set's order.
        inner: config of another sampler (mmdet's ``ClassAwareSampler``), whose order is taken, seeded alike.
    """

    def __init__(self, dataset: Any, seed: int | None = None, shuffle: bool = True, inner: Any = None) -> None:
        self.dataset = dataset
        self.inner = None
        if inner is not None:
            self.inner = DATA_SAMPLERS.build(inner, default_args={"dataset": dataset, "seed": seed or 0})
        self.seed = seed or 0
        self.shuffle = shuffle
        self.epoch = 0
        self.rank, self.world = get_dist_info()

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of ``epoch``."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world) if self.inner is None else len(self.inner)

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)
        if self.inner is not None:
            self.inner.set_epoch(self.epoch)
            with keyed(self.seed, self.epoch):
                return iter([self.epoch * count + int(index) for index in self.inner])
        order = list(range(count))
        if self.shuffle:
            order = torch.randperm(count, generator=generator(self.seed, self.epoch)).tolist()
        order += order[: len(self) * self.world - count]
        return iter([self.epoch * count + index for index in order[self.rank :: self.world]])


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler[Sequence[int]]):
    """Batches of a sampler, the first of which can be left out once (after a resume).

    Args:
        sampler: sampler of single images.
        batch_size: images per batch.
        inner: config of another batch sampler, such as mmdet's by aspect ratio.
        drop_last: whether to leave out a last batch that is not full.
    """

    def __init__(self, sampler: Any, batch_size: int, inner: Any = None, drop_last: bool = False) -> None:
        self.sampler = sampler
        self.skip = 0
        self.inner: Any
        if inner is not None:
            self.inner = DATA_SAMPLERS.build(inner, default_args={"sampler": sampler, "batch_size": batch_size})
        else:
            self.inner = torch.utils.data.BatchSampler(sampler, batch_size, drop_last)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Sequence[int]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self.inner):
            if number >= skip:
                yield batch


@LOOPS.register_module()
class ExactTrainLoop(EpochBasedTrainLoop):  # type: ignore[misc]
    """Epochs or iterations, with an exact position inside of an epoch.

    Args:
        runner: the runner.
        dataloader: its loader.
        max_epochs: passes over the data.
        max_iters: iterations; where both are given, the one that is reached first ends the training.
        val_interval: epochs between two validations, or iterations where ``val_by_epoch`` is false; the last
            iteration is always validated.
        val_by_epoch: whether ``val_interval`` and ``val_begin`` count epochs.
        val_begin: first epoch or iteration that is validated.
        dynamic_intervals: (epoch or iteration, interval) from which on another ``val_interval`` holds, as in mmengine.
        seed: seed of the model's own draws.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        val_interval: int = 1,
        val_by_epoch: bool = True,
        val_begin: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(runner, dataloader, max_epochs or 1, val_begin, val_interval, dynamic_intervals)
        length = len(self.dataloader)
        if max_epochs is None:
            assert max_iters is not None
            self._max_epochs = -(-max_iters // length)
        self._max_iters = min(max_iters or self._max_epochs * length, self._max_epochs * length)
        self.val_by_epoch = val_by_epoch
        self.seed = seed

    def run(self) -> Any:
        """Train from where the loop stands to its end."""
        runner = self.runner
        runner.call_hook("before_train")
        length, rank = len(self.dataloader), get_dist_info()[0]
        device = next(runner.model.parameters()).device
        while self._iter < self._max_iters and not self.stop_training:
            done = self._iter - self._epoch * length
            sampler = self.dataloader.batch_sampler
            if hasattr(sampler.sampler, "set_epoch"):
                sampler.sampler.set_epoch(self._epoch)
            sampler.skip = done
            runner.call_hook("before_train_epoch")
            runner.model.train()
            if done < length:
                for index, batch in enumerate(self.dataloader, done):
                    with keyed(self.seed, self._iter, rank, device=device):
                        self.run_iter(index, batch)
                    if not self.val_by_epoch and self._iter < self._max_iters and self._due(self._iter):
                        self._validate(self._iter)
                    if self._iter >= self._max_iters or index + 1 >= length:
                        break
                    runner.call_hook("after_step")
            runner.call_hook("after_train_epoch")
            self._epoch += 1
            last = self._iter >= self._max_iters
            number = self._epoch if self.val_by_epoch else self._iter
            if last or self._due(number):
                self._validate(number, last=last)
            runner.call_hook("after_step")
        runner.call_hook("after_train")
        return runner.model

    def _due(self, number: int) -> bool:
        """Whether an epoch or iteration is validated."""
        place = bisect.bisect(self.dynamic_milestones, number + 1) - 1  # as mmengine counts
        return number % int(self.dynamic_intervals[max(place, 0)]) == 0

    def _validate(self, number: int, *, last: bool = False) -> None:
        if self.runner.val_loop is not None and (last or number >= self.val_begin):
            self.runner.val_loop.run()
            self.runner.model.train()


@HOOKS.register_module()
class PlainCheckpointHook(Hook):  # type: ignore[misc]
    """Keep checkpoints free of objects, so that ``torch.load(weights_only=True)``, torch's default, reads them.

    mmengine stores its log buffers as pickled objects, which its own ``resume`` cannot read back with torch 2.6 and
    later. They only smooth the printed losses, and are left out. So are functions among a scheduler's attributes, which
    the config makes again.
    """

    priority = "VERY_LOW"

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Leave plain values in the message hub."""
        from collections import OrderedDict

        for key in ("meta", "message_hub", "optimizer", "param_schedulers"):
            if key in checkpoint:
                checkpoint[key] = _plain(checkpoint[key])
        info = checkpoint["message_hub"].get("runtime_info", {})
        plain = {k: v for k, v in info.items() if isinstance(v, str | int | float | bool)}
        checkpoint["message_hub"] = {
            "log_scalars": OrderedDict(),
            "runtime_info": OrderedDict(plain),
            "resumed_keys": OrderedDict(),
        }
        meta = checkpoint["meta"]
        dataset = meta.get("dataset_meta") or {}
        meta["dataset_meta"] = {k: v for k, v in dataset.items() if k in ("classes", "palette", "CLASSES")}


def _plain(value: Any) -> Any:
    """Containers without functions, and numpy's scalars (which are pickled as objects) as Python's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    return value
