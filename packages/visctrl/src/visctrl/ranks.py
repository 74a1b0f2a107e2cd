"""One command in several processes (torchrun, accelerate): a list of work is split over them, what they share is gathered.

    torchrun --nproc_per_node 4 --no-python visctrl views --data nerfstudio:scene ...

A picture is edited by itself, whichever process does it, so that the results are the same for any number of processes.
"""

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from tenfold import UserError
from tenfold.distributed import is_initialized, rank, world_size

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for the others, whose shares may take longer."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block, the processes of one launch form a group, each with a GPU of its own where there are some.

    Raises:
        UserError: several processes, and nothing says where they meet.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or is_initialized():
        yield
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError("WORLD_SIZE is set, and MASTER_ADDR or MASTER_PORT is not: start the processes with torchrun")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Within the block, what all processes would warn about alike is said by the first alone."""
    with warnings.catch_warnings():
        if rank():
            warnings.simplefilter("ignore")
        yield


def gathered(own: Mapping[int, T]) -> dict[int, T]:
    """What all processes have made, by number in ascending order."""
    if world_size() == 1:
        return dict(sorted(own.items()))
    shares: list[dict[int, T]] = [{} for _ in range(world_size())]
    dist.all_gather_object(shares, dict(own))
    return dict(sorted((number, made) for share in shares for number, made in share.items()))


def wait_for_all() -> None:
    """Return once all processes are here."""
    if world_size() > 1:
        dist.barrier()
