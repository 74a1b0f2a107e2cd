"""One of two processes: counts its half of the probes, and says whom its batches hold; started by test_two_processes."""

import json
import sys

import numpy as np
import torch
import torch.distributed as dist
from handmstn.metrics import Identification, Verification
from handmstn.sampling import people_and_views

from tenfold import distributed
from tenfold.loading import KeyedLoader


def scores():
    """Scores of twenty probes against thirty pictures."""
    rng = np.random.default_rng(0)
    p, g = rng.integers(0, 5, 20), rng.integers(0, 5, 30)
    return np.clip(rng.normal(0, 0.3, (20, 30)) + 0.5 * (p[:, None] == g[None]), -1, 1), p, g


def counted(rows):
    """Metrics of some of the probes."""
    s, p, g = scores()
    one, two = Identification(), Verification()
    one.update(s[rows], p[rows], g)
    two.update(s[rows], p[rows][:, None] == g[None])
    return one, two


class Numbers(torch.utils.data.Dataset):
    """Items that are their own numbers."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    rank = dist.get_rank()
    one, two = counted(np.arange(rank, 20, 2))
    several = [None, None]
    dist.all_gather_object(several, (one, two))
    merged = [a.merge(b) for a, b in zip(*several, strict=True)]
    sums = distributed.all_reduce_sums({"counts": torch.from_numpy(counted(np.arange(rank, 20, 2))[1].counts)})
    classes = np.repeat(np.arange(10), 4)
    loader = KeyedLoader(Numbers(), order=people_and_views(classes, 3, 2), seed=4)
    held = [sorted(set(classes[batch.tolist()].tolist())) for batch in loader]
    found = {
        "cmc": merged[0].compute().cmc.tolist(),
        "map": merged[0].compute().map_step,
        "eer": merged[1].compute().eer,
    }
    sys.stdout.write(json.dumps({**found, "counts": int(sums["counts"].sum()), "held": held}))
    dist.destroy_process_group()
