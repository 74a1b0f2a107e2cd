import itertools
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold import distributed

sys.path.insert(0, str(Path(__file__).parent))
import distributed_run

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["lightning.pytorch", "tenfold.training"])  # the same as test_training's: one server


def on_two_ranks(function, tmp_path):
    """The results of ``function(rank, 2)`` in two processes of one gloo group."""
    running = []
    for rank in range(2):
        ours, theirs = forks.Pipe()
        process = forks.Process(target=distributed_run.in_group, args=(function, rank, 2, tmp_path / "store", theirs))
        process.start()
        theirs.close()
        running.append((process, ours))
    results = [pipe.recv() for _, pipe in running]
    for process, _ in running:
        process.join()
        assert process.exitcode == 0
    return results


def test_gather_gives_the_batch_and_the_gradient_of_the_sum_over_ranks(tmp_path):
    """Against one process that has the whole batch: rank 0 counts the loss once and rank 1 twice, so L = 3 l."""
    w, x = distributed_run.data()
    embeddings = (x @ w).tanh()
    (3 * distributed_run.contrastive(embeddings)).backward()
    (gathered_0, shard_0, w_0), (gathered_1, shard_1, w_1) = on_two_ranks(distributed_run.gathered_gradients, tmp_path)
    torch.testing.assert_close(torch.tensor(gathered_0, dtype=torch.float64), embeddings.detach())
    assert gathered_1 == gathered_0
    torch.testing.assert_close(torch.tensor(shard_0 + shard_1, dtype=torch.float64), x.grad)
    summed = torch.tensor(w_0, dtype=torch.float64) + torch.tensor(w_1, dtype=torch.float64)
    torch.testing.assert_close(summed, w.grad)


def test_gather_takes_shards_that_are_not_contiguous(tmp_path):
    shard = torch.arange(6).view(2, 3).T
    expected = torch.cat([shard, shard + 10]).tolist()
    assert on_two_ranks(distributed_run.gathered_not_contiguous, tmp_path) == [expected, expected]


def test_running_sums_are_added_in_their_own_dtype_whatever_the_order_of_names(tmp_path):
    for sums, dtype, untouched in on_two_ranks(distributed_run.reduced_sums, tmp_path):
        assert sums["count"] == [6, 1]
        assert sums["loss"] == pytest.approx(1 + 2e-9, rel=1e-15)
        assert dtype == "torch.float64"
        assert untouched


def test_each_rank_knows_its_number_and_takes_its_share(tmp_path):
    assert on_two_ranks(distributed_run.own_share, tmp_path) == [(0, 2, [0, 2, 4, 6]), (1, 2, [1, 3, 5])]


def test_without_a_group_there_is_one_rank_and_gathering_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert distributed.all_gather(x) is x
    assert (distributed.rank(), distributed.world_size(), distributed.is_initialized()) == (0, 1, False)
    sums = {"n": torch.tensor([2.0])}
    out = distributed.all_reduce_sums(sums)
    out["n"] += 1
    assert sums["n"].item() == 2


@given(items=st.lists(st.integers(), max_size=30), world_size=st.integers(1, 8))
def test_shares_hold_each_item_once_and_are_even(items, world_size):
    shares = [distributed.split(items, rank, world_size) for rank in range(world_size)]
    lengths = [len(share) for share in shares]
    assert sorted(itertools.chain(*shares)) == sorted(items)
    assert max(lengths) - min(lengths) <= 1


def test_a_rank_outside_of_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        distributed.split([1, 2, 3], 2, 2)
