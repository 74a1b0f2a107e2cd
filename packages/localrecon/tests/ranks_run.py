"""One rank of test_processes.py: local steps on half of the batch against one process on the whole."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from localrecon import LocalNet, SGRConfig, StepOptions, local_step, plan_split
from torch import nn


def net_of():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6 if i == 0 else 12, 12), nn.LayerNorm(12), nn.Tanh()) for i in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(12, 3)).double()
    plan = plan_split(model, torch.randn(8, 6, dtype=torch.float64), k=3, measure=False)
    return LocalNet(model, plan).train()


def main(meeting):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)
    cases = [
        SGRConfig(lam=0),
        SGRConfig(ramp=0),
        SGRConfig(ramp=0, estimator="exact"),
        SGRConfig(ramp=0, reg_to_head=False),
    ]
    for sgr in cases:
        for accumulate in (1, 2):
            alone = net_of()
            shared = copy.deepcopy(alone)
            shared.distribute()
            counts = {"reduced": 0}
            for stage in shared.segments:

                def hook(state, bucket, counts=counts):
                    counts["reduced"] += len(bucket.parameters())
                    return dist.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)

                stage.__dict__["parallel"].register_comm_hook(None, hook)
            for net, rows in ((alone, slice(None)), (shared, slice(4 * rank, 4 * rank + 4))):
                optimizers = [torch.optim.SGD(net.parameters_of(k), lr=0.1) for k in range(3)]
                for step in range(2):
                    local_step(net, x[rows], y[rows], optimizers, sgr, StepOptions(step=step, accumulate=accumulate))
            assert counts["reduced"] == 2 * sum(len(shared.parameters_of(k)) for k in range(3)), counts
            for name, wanted in alone.state_dict().items():
                torch.testing.assert_close(shared.state_dict()[name], wanted, rtol=1e-6, atol=1e-8, msg=f"{sgr} {name}")
    dist.destroy_process_group()


if __name__ == "__main__":
    import torch.distributed.algorithms.ddp_comm_hooks.default_hooks

    main(sys.argv[1])
