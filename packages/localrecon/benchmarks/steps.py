"""A training step of four modules against back-propagation, activation checkpointing and one process.

Memory is counted in live tensor bytes (parameters, heads, gradients, optimizer states, batch, activations), so those rows
need no idle machine; times and the pipeline do. Checkpointing is torch's own, non-reentrant, in segments of the square root
of the number of blocks, which needs less memory than one segment per block and takes as long.
"""

import copy
import os
import sys
from functools import partial

import timm
import torch
from localrecon import LocalNet, PipelineTrainer, SGRConfig, StepOptions, local_step, plan_split
from localrecon.allocation import allocated_peak
from localrecon.commands._machine import memory_net, pipeline_net
from localrecon.models import convnet, gpt, vit
from torch import nn

from tenfold.bench import compare, counted, main, resident
from tenfold.memory import MemoryProbe, tensors_in

K = 4
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""glibc gives freed blocks back at once; without it, resident memory shows half of the saving."""
RECONCILED = SGRConfig(ramp=0)
PLAIN = SGRConfig(lam=0)


def networks(names=("conv", "vit", "resnet50", "gpt")):
    """Name -> (model, batch, labels, shape for the table)."""
    torch.manual_seed(0)
    images = partial(torch.randint, 10)
    made = {
        "conv": lambda: (convnet(3, 10), torch.randn(64, 3, 24, 24), images((64,))),
        "vit": lambda: (vit(3, 96, 10, depth=8, patch=16), torch.randn(16, 3, 96, 96), images((16,))),
        "resnet50": lambda: (timm.create_model("resnet50", num_classes=10), torch.randn(32, 3, 64, 64), images((32,))),
        "gpt": lambda: (gpt(256, 128, width=128, depth=6), *torch.randint(256, (2, 16, 128))),
    }
    shapes = {
        "conv": "12 conv-BN-ReLU, 24 ch, 24x24, B 64",
        "vit": "ViT-tiny, depth 8, 96 px, B 16",
        "resnet50": "timm ResNet-50, 64 px, B 32",
        "gpt": "GPT, 6 layers, width 128, 128 tokens, B 16",
    }
    return {name: (*made[name](), shapes[name]) for name in names}


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor, how: str, sgr: SGRConfig, make=torch.optim.AdamW):
    """A function of a step number, and what its probe has to know."""
    net, parts = memory_net(copy.deepcopy(model), x, how, K)
    optimizers = [make(net.parameters_of(k), lr=1e-4) for k in range(net.k)]

    def step(number: int = 0):
        return local_step(net, x, y, optimizers, sgr, StepOptions(step=number, accumulate=parts))

    return step, (net, optimizers, x, y)


def peak(model, x, y, how, sgr, make):
    """Peak bytes of a step, the second one, when the optimizer states are there."""
    step, known = stepper(model, x, y, how, sgr, make)
    step()
    with MemoryProbe(*known) as probe:
        step()
    return probe.peak_bytes


def memory_rows():
    """Peak bytes of SGR (shift) against back-propagation and checkpointing; with plain SGD, and with AdamW's two states."""
    rows = []
    bounds = {"conv": ">= 2.222", "vit": ">= 2", "resnet50": ">= 2", "gpt": ">= 2"}
    for name, (model, x, y, shape) in networks().items():
        for make in (torch.optim.SGD, torch.optim.AdamW):
            arms = {"split": RECONCILED, "whole": PLAIN, "ckpt": PLAIN}
            bytes_of = {how: peak(model, x, y, how, sgr, make) for how, sgr in arms.items()}
            plain = make is torch.optim.SGD
            tail, with_states = ("", f"{shape}, SGD") if plain else ("_adamw", f"{shape}, AdamW")
            for how, peer, required in (("whole", "bp", bounds[name]), ("ckpt", "ckpt", ">= 0.909")):
                rows.append(
                    counted(
                        f"memory_{name}_{peer}{tail}",
                        bytes_of["split"] / 2**20,
                        bytes_of[how] / 2**20,
                        shape=with_states,
                        unit="MiB",
                        required=required,
                        equal="same model and batch",
                        statistic="counted in one step; the same in every run",
                    )
                )
    return rows


def allocator_rows():
    """The convolutions again, by the allocator's account: what operators take for a moment counts."""
    model, x, y, shape = networks(("conv",))["conv"]
    bytes_of = {}
    for how, sgr in {"split": RECONCILED, "whole": PLAIN, "ckpt": PLAIN}.items():
        step, known = stepper(model, x, y, how, sgr)
        step()
        there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(known)}
        bytes_of[how] = sum(there.values()) + allocated_peak(step)
    return [
        counted(
            f"allocator_conv_{peer}",
            bytes_of["split"] / 2**20,
            bytes_of[how] / 2**20,
            shape=f"{shape}, AdamW",
            unit="MiB",
            required=required,
            equal="same model and batch",
            statistic="the allocator's events in one step, temporaries of operators included",
        )
        for how, peer, required in (("whole", "bp", ">= 2.222"), ("ckpt", "ckpt", ">= 0.909"))
    ]


def budget_rows():
    """Does a step of a budget's plan need what the plan predicts?"""
    rows = []
    for name, (model, x, y, shape) in networks().items():
        whole = plan_split(copy.deepcopy(model), x, k=1).predicted_peak
        four = plan_split(copy.deepcopy(model), x, k=K).predicted_peak
        budget = (whole + four) // 2
        plan = plan_split(copy.deepcopy(model), x, budget=budget)
        torch.manual_seed(0)
        net = LocalNet(copy.deepcopy(model), plan).train()
        optimizers = [torch.optim.AdamW(net.parameters_of(k), lr=1e-4) for k in range(net.k)]
        local_step(net, x, y, optimizers, RECONCILED)
        with MemoryProbe(net, optimizers, x, y) as probe:
            local_step(net, x, y, optimizers, RECONCILED)
        within = max(probe.peak_bytes / plan.predicted_peak, plan.predicted_peak / probe.peak_bytes)
        rows.append(
            counted(
                f"budget_{name}",
                probe.peak_bytes / 2**20,
                plan.predicted_peak / 2**20,
                shape=shape,
                unit="MiB",
                required="<= 1.1",
                equal=f"K {plan.k}, {probe.peak_bytes / budget:.2f} of the budget",
                statistic="measured, predicted; ratio is the larger over the smaller",
                ratio=within,
            )
        )
    return rows


def time_rows():
    """Four steps of SGR, every=4, against four of checkpointing."""
    rows = []
    for name in ("conv", "vit"):
        model, x, y, shape = networks()[name]
        ours, _ = stepper(model, x, y, "split", SGRConfig(ramp=0, every=4))
        peer, _ = stepper(model, x, y, "ckpt", PLAIN)

        def equal(a, b):
            assert all(torch.isfinite(torch.tensor(report.losses)).all() for report in (*a, *b))
            return "not the same: both train the same model on the same batch"

        rounds = [partial(lambda step: [step(number) for number in range(4)], step) for step in (ours, peer)]
        rows.append(compare(f"time_{name}_ckpt", *rounds, equal, shape=f"{shape}, 4 steps", required=">= 1", pairs=21))
    return rows


def pipeline_row():
    """Two processes of one thread against one process of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(32, 3, 24, 24, generator=generator), torch.randint(10, (32,), generator=generator))
        for _ in range(10)
    ]
    make = partial(torch.optim.SGD, lr=0.01)
    alone = pipeline_net()
    optimizers = [make(alone.parameters_of(k)) for k in range(K)]
    done = {"steps": 0}

    def peer():
        losses = []
        for x, y in batches:
            options = StepOptions(step=done["steps"])
            losses.append(local_step(alone, x, y, optimizers, RECONCILED, options).losses)
            done["steps"] += 1
        return losses

    def equal(a, b):
        assert a == b
        return "losses of all modules and steps equal, bit for bit"

    with PipelineTrainer(pipeline_net(), make, RECONCILED, workers=2) as trainer:
        row = compare(
            "pipeline_2",
            lambda: [report.losses for report in trainer.steps(batches)],
            peer,
            equal,
            shape="12 conv blocks, 4 modules, 2 processes x 1 thread, B 32, 10 steps",
            required=">= 1.3",
        )
    torch.set_num_threads(threads)
    return row


def rss_rows():
    """Peak resident memory of processes that train two steps, over one that plans on the same batch and takes none."""
    command = [sys.executable, __file__, "--child"]
    return [
        resident(
            f"rss_conv_{name}",
            [*command, "split"],
            [*command, how],
            [*command, "none"],
            shape="12 conv-BN-ReLU, 24 ch, 24x24, B 64",
            required=required,
            equal="same model and batch; the idle process plans on it and takes no step",
            environment=ALLOCATOR,
        )
        for how, name, required in (("whole", "bp", ">= 1.667"), ("ckpt", "ckpt", f">= {1 / 1.2:.3f}"))
    ]


def child(how: str) -> None:
    """One process of the rows of resident memory: all of it, or without the steps."""
    model, x, y, _ = networks(("conv",))["conv"]
    for warm in ("split", "ckpt", "whole"):
        step, _ = stepper(model, x[:2], y[:2], warm, RECONCILED if warm == "split" else PLAIN)
        step()
    step, _ = stepper(model, x, y, "split" if how == "none" else how, RECONCILED if how == "split" else PLAIN)
    if how != "none":
        step()
        step()
    os._exit(0)  # taking the interpreter down needs more memory than the steps, and would hide them


def measure():
    """All rows."""
    return [*memory_rows(), *allocator_rows(), *budget_rows(), *rss_rows(), *time_rows(), pipeline_row()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        sys.exit(main("localrecon", {"torch": torch.__version__, "timm": timm.__version__}, measure))
