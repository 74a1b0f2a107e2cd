"""What each of two processes computes for the tests of ``tenfold.distributed``."""

import torch
import torch.distributed as dist

from tenfold import distributed


def in_group(function, rank, world_size, store, pipe):
    """Join a gloo group, compute, send the result as plain lists."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    pipe.send(function(rank, world_size))
    dist.barrier()
    dist.destroy_process_group()


def data():
    """Weights (3, 2) and a batch (4, 3) of two ranks' shards."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 2), (4, 3)))
    return w.requires_grad_(), x.requires_grad_()


def contrastive(embeddings):
    """A loss in which every item meets every other one."""
    return -torch.log_softmax(embeddings @ embeddings.T, dim=1).diagonal().mean()


def gathered_gradients(rank, world_size):
    """Gradients of a loss on the gathered batch that differs between ranks: rank r counts it (r + 1) times."""
    w, x = data()
    shard = x.detach()[2 * rank : 2 * rank + 2].requires_grad_()
    gathered = distributed.all_gather((shard @ w).tanh())
    (contrastive(gathered) * (rank + 1)).backward()
    return gathered.tolist(), shard.grad.tolist(), w.grad.tolist()


def gathered_not_contiguous(rank, world_size):
    """A transposed integer shard."""
    return distributed.all_gather(torch.arange(6).view(2, 3).T + 10 * rank).tolist()


def reduced_sums(rank, world_size):
    """Running sums of several dtypes, named in another order on each rank; and whether the given ones are untouched."""
    sums = {"loss": torch.tensor(1e-9 + rank, dtype=torch.float64), "count": torch.tensor([3, rank])}
    given = dict(reversed(sums.items())) if rank else sums
    out = distributed.all_reduce_sums(given)
    untouched = float(sums["loss"]) == 1e-9 + rank
    return {name: tensor.tolist() for name, tensor in out.items()}, str(out["loss"].dtype), untouched


def own_share(rank, world_size):
    """What one rank knows of the group."""
    share = distributed.split(range(7), distributed.rank(), distributed.world_size())
    return distributed.rank(), distributed.world_size(), share
