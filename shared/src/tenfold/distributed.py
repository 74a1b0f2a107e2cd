"""Ranks that work together: gathering with gradient, running sums, splitting a list of work.

Everything here also works in a process without a process group, which is rank 0 of a world of 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process in its process group; 0 without one."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Size of the process group; 1 without one."""
    return dist.get_world_size() if is_initialized() else 1


def split(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The share of one rank: every ``world_size``-th item from its own number on (strided, so costs that grow even out).

    The shares of all ranks hold each item once; their lengths differ by one at most.

    Raises:
        ValueError: ``rank`` is not in [0, world_size).
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    return list(items[rank::world_size])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        shards = [local.new_empty(local.shape) for _ in range(world_size())]
        dist.all_gather(shards, local.contiguous())
        return torch.cat(shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.narrow(0, rank() * ctx.rows, ctx.rows)


def all_gather(local: Tensor) -> Tensor:
    """Concatenate the shards of all ranks along the first dimension, in order of rank, with gradient.

        out = [x_0; x_1; ...],   d(sum_r L_r) / dx_s = sum_r dL_r/d out[s]

    Each rank's shard receives the gradient of the sum of all ranks' losses. DDP averages parameters' gradients over
    ranks, so a loss that each rank computes in full on the gathered batch then has its single-process gradient.

    Shapes: (N, ...) on each rank, the same shape everywhere -> (world_size * N, ...). Identity without a process group.
    """
    if world_size() == 1:
        return local
    out: Tensor = _AllGather.apply(local)
    return out


def all_reduce_sums(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up running sums over all ranks, each in its own dtype and device; the given tensors stay as they are.

    All ranks give the same names and shapes; the order of names does not matter. Copies without a process group.
    """
    total = {name: sums[name].detach().clone(memory_format=torch.contiguous_format) for name in sorted(sums)}
    if world_size() > 1:
        for tensor in total.values():
            dist.all_reduce(tensor)
    return {name: total[name] for name in sums}
