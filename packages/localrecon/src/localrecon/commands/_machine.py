"""Parts D3 and D4 of the demonstration: memory and time of a step, and modules in two processes."""

import copy
import time
from functools import partial

import torch
from torch import Tensor, nn

from localrecon.arms import run_as
from localrecon.boundary import StepOptions
from localrecon.config import SGRConfig
from localrecon.models import convnet, vit
from localrecon.net import LocalNet
from localrecon.pipeline import PipelineTrainer
from localrecon.profiling import plan_split
from localrecon.step import local_step
from tenfold.memory import MemoryProbe
from tenfold.terminal import track

MEMORY_ARMS: dict[str, tuple[str, SGRConfig]] = {
    "bp": ("whole", SGRConfig(lam=0)),
    "ckpt": ("ckpt", SGRConfig(lam=0)),
    "accum": ("accum", SGRConfig(lam=0)),
    "local": ("split", SGRConfig(lam=0)),
    "sgr": ("split", SGRConfig(ramp=0)),
    "sgr, every 4": ("split", SGRConfig(ramp=0, every=4)),
    "sgr, exact": ("split", SGRConfig(ramp=0, estimator="exact", math_attention=True)),
}


def memory_models(small: bool) -> dict[str, tuple[nn.Module, Tensor]]:
    """The two networks of D3, and a batch for each."""
    torch.manual_seed(0)
    batch = 8 if small else 64
    images = torch.randn(batch, 3, 24, 24), torch.randn(max(2, batch // 4), 3, 96, 96)
    return {"conv": (convnet(3, 10), images[0]), "vit": (vit(3, 96, 10, depth=2 if small else 8, patch=16), images[1])}


def memory_net(model: nn.Module, x: Tensor, how: str, k: int = 4) -> tuple[LocalNet, int]:
    """The net of an arm, and the parts that it computes a batch in."""
    plan = plan_split(model, x, k=k if how == "split" else 1, measure=False)
    torch.manual_seed(0)
    return run_as(how, model, plan).train(), k if how == "accum" else 1


def memory_part(small: bool, quiet: bool) -> dict[str, dict[str, float]]:
    """D3: peak MiB of live tensors, and mean seconds per step, of every arm."""
    out: dict[str, dict[str, float]] = {}
    for kind, (model, x) in memory_models(small).items():
        labels = torch.zeros(len(x), dtype=torch.int64)
        k = 2 if small else 4
        for name, (how, sgr) in track(MEMORY_ARMS.items(), f"memory of a step, {kind}", quiet=quiet):
            net, parts = memory_net(copy.deepcopy(model), x, how, k)
            optimizers = [torch.optim.AdamW(net.parameters_of(i)) for i in range(net.k)]
            local_step(net, x, labels, optimizers, sgr, StepOptions(accumulate=parts))
            with MemoryProbe(net, optimizers, x, labels) as probe:
                local_step(net, x, labels, optimizers, sgr, StepOptions(accumulate=parts))
            seconds = []
            for step in range(2 if small else 4):
                start = time.perf_counter()
                local_step(net, x, labels, optimizers, sgr, StepOptions(step=step, accumulate=parts))
                seconds.append(time.perf_counter() - start)
            mean = sum(seconds) / len(seconds)  # of whole rounds of every=4
            out[f"{kind}: {name}"] = {"peak MiB": probe.peak_bytes / 2**20, "seconds per step": mean}
    return out


def pipeline_net() -> LocalNet:
    """The net of D4."""
    torch.manual_seed(0)
    model = convnet(3, 10, depth=12)
    plan = plan_split(model, torch.randn(32, 3, 24, 24), k=4, balance="flops", measure=False)
    return LocalNet(model, plan).train()


def pipeline_part(steps: int) -> dict[str, float]:
    """D4: two processes of one thread against one of one; equality, and how many times as fast."""
    generator = torch.Generator().manual_seed(0)
    count = steps + 3
    batches = [(torch.randn(32, 3, 24, 24, generator=generator), torch.randint(10, (32,))) for _ in range(count)]
    sgr, make = SGRConfig(ramp=0), partial(torch.optim.SGD, lr=0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = pipeline_net()
    optimizers = [make(alone.parameters_of(k)) for k in range(4)]
    took = 0.0
    for step, (x, y) in enumerate(batches):
        start = time.perf_counter()
        local_step(alone, x, y, optimizers, sgr, StepOptions(step=step))
        took += time.perf_counter() - start if step >= 3 else 0.0
    net = pipeline_net()
    with PipelineTrainer(net, make, sgr, workers=2) as trainer:
        list(trainer.steps(batches[:3]))  # starting the processes does not count
        start = time.perf_counter()
        list(trainer.steps(batches[3:]))
        piped = time.perf_counter() - start
        trainer.collect()
    torch.set_num_threads(threads)
    pairs = zip(alone.state_dict().values(), net.state_dict().values(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    return {"equal": float(equal), "times as fast": took / piped}
