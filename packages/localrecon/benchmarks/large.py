"""Where memory hurts: one step of ResNet-50 at 224 pixels, ViT-S at 224 and GPT-2 small at 1,024 tokens, by every method.

Peak bytes are the allocator's account of one step with AdamW (operators' temporaries count) over what was there before, which
is counted as well: parameters, heads, optimizer states, batch. Seconds are of that one step, and want an idle machine.
"""

import gc
import sys
import time

import timm
import torch
import transformers
from localrecon import SGRConfig, StepOptions, local_step, plan_split, untie
from localrecon.allocation import allocated_peak
from localrecon.arms import run_as

from tenfold.bench import counted, main
from tenfold.memory import tensors_in

RECONCILED = SGRConfig(ramp=0)
PLAIN = SGRConfig(lam=0)
WAYS = {
    "bp": (1, PLAIN, {}),
    "ckpt": (1, PLAIN, {"method": "ckpt"}),
    "accum": (1, PLAIN, {"accumulate": 4}),
    "sgr": (4, RECONCILED, {}),
    "sgr_ckpt": (4, RECONCILED, {"checkpointing": True}),
}


def gpt2():
    """GPT-2 small, untied."""
    config = transformers.GPT2Config(attn_implementation="sdpa")
    tokens = torch.randint(50257, (1, 1024))
    return untie(transformers.GPT2LMHeadModel(config)), tokens, tokens


MODELS = {
    "resnet50": ("ResNet-50, 224 px, B 8", lambda: images("resnet50", 8)),
    "vit_small": ("ViT-S/16, 224 px, B 8", lambda: images("vit_small_patch16_224", 8)),
    "gpt2": ("GPT-2 small, 1,024 tokens, B 1", gpt2),
}


def images(name, batch):
    """A model of timm with 1000 classes, and a batch."""
    return timm.create_model(name), torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))


def step_of(make, way):
    """(peak bytes, seconds) of one step, the second one: optimizer states are there."""
    k, sgr, how = WAYS[way]
    gc.collect()  # the network before is held by its own hooks
    torch.manual_seed(0)
    model, x, y = make()
    model.train()
    plan = plan_split(model, x, k=k, measure=False)
    net = run_as(how.get("method", "split"), model, plan, checkpointing=how.get("checkpointing", False)).train()
    optimizers = [torch.optim.AdamW(net.parameters_of(i), lr=1e-5) for i in range(net.k)]
    options = StepOptions(accumulate=how.get("accumulate", 1))
    local_step(net, x, y, optimizers, sgr, options)
    start = time.perf_counter()
    local_step(net, x, y, optimizers, sgr, options)
    seconds = time.perf_counter() - start
    there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in((net, optimizers, x, y))}
    return sum(there.values()) + allocated_peak(lambda: local_step(net, x, y, optimizers, sgr, options)), seconds


def measure():
    """A row per model and method, against back-propagation."""
    rows = []
    for name, (shape, make) in MODELS.items():
        whole, seconds = step_of(make, "bp")
        for way in WAYS:
            if way == "bp" or (way == "accum" and name == "gpt2"):  # one sequence is not divided
                continue
            peak, took = step_of(make, way)
            rows.append(
                counted(
                    f"{name}_{way}",
                    peak / 2**20,
                    whole / 2**20,
                    shape=shape,
                    unit="MiB",
                    required=">= 1",
                    equal=f"one step with AdamW; {took:.1f} s, back-propagation {seconds:.1f} s",
                    statistic="the allocator's events in one step",
                )
            )
    return rows


if __name__ == "__main__":
    sys.exit(main("localrecon", {"torch": torch.__version__, "timm": timm.__version__}, measure))
