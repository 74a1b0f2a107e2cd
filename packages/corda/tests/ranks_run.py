"""What each of two processes computes for the test of ranks in ``test_streaming``, and what one computes alone."""

import torch
import torch.distributed as dist
from corda import CordaInit, build_factors, collect_context, stream_factors
from corda.context import agreed
from corda.factors import _owners
from peft import LoraConfig
from torch import nn

LORA = LoraConfig(r=2, target_modules=["q", "k", "down"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.q(x) + self.k(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.idle = nn.Linear(6, 6)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def problem():
    torch.manual_seed(0)
    return Net().double(), [torch.randn(2, 9, 6, dtype=torch.float64) for _ in range(3)]


def plain(factors, tokens=None):
    return {"tokens": tokens, "products": {name: (f.B @ f.A).tolist() for name, f in factors.factors.items()}}


def reduced(model, share, **options):
    targets = [name for name, _ in model.named_modules() if name.endswith((".q", ".k", ".down"))]
    stats = collect_context(model, share, targets, complete=False, **options).reduce()
    return plain(build_factors(model, stats, LORA), stats.tokens)


def alone():
    model, data = problem()
    return {"reduced": reduced(model, data), "streamed": plain(stream_factors(model, data, LORA))}


def in_group(rank, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    pipe.send(together(rank))
    dist.barrier()
    dist.destroy_process_group()


def together(rank):
    model, data = problem()
    found = {
        "rank": rank,
        "reduced": reduced(model, data[:1] if rank else data[1:]),
        "empty share": reduced(model, data if rank else [], reusable=False),
        "streamed": plain(stream_factors(model, data[:1] if rank else data[1:], LORA)),
        "owners": set(
            _owners(model, {f"blocks.{i}.{name}": f"blocks.{i}" for i in range(3) for name in "qk"}).values()
        ),
        "errors": [],
    }
    stats = collect_context(model, data[: 1 + rank], list(found["reduced"]["products"]))

    def unlucky():
        if rank:
            raise RuntimeError("no luck")

    for work in (
        lambda: collect_context(model, data, ["idle"][:0], CordaInit(scale=("peft", "none")[rank])).reduce(),
        lambda: build_factors(model, stats, LORA),
        lambda: agreed(unlucky),
        lambda: collect_context(model, data, ["idle"], complete=False).reduce(),
    ):
        try:
            work()
        except Exception as error:
            found["errors"].append(f"{type(error).__name__}: {error}")
    return found
