"""One step of the full-size recipe on this machine's CPU: two ResNet-50, 1248 x 384, 1 + 1 pictures; seconds and peak memory.

``python full_step.py --out FILE`` takes about a minute and 7 GB. What is no network (masks, losses, metrics) is timed alone, on
the step's own maps, and compared with the whole step.
"""

import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from freespace_uda import AdaptTask, FreespaceMeter
from freespace_uda.alignment import SelectiveAlignment
from freespace_uda.config import Alignment, RunSettings
from freespace_uda.models import build_net
from freespace_uda.objectives import supervised
from torch import Tensor

from tenfold.bench import Comparison, counted, main

SETTINGS = RunSettings(data="roads-flat", batch_size=1, align=Alignment(start=0.0, ramp=0.0, min_pixels=1))
SHAPE = f"two ResNet-50, {SETTINGS.size[0]} x {SETTINGS.size[1]}, 1 + 1"
HEADS = ("fused", "rgb", "normal")


def best_of(work: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest run."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure() -> list[Comparison]:
    """Two steps, of which the second is timed, and its parts that are no network."""
    torch.set_num_threads(1)
    task = AdaptTask(build_net(SETTINGS, "ccg-sfa", 0), SETTINGS, "ccg-sfa", 10, 0.25, [])
    network, discriminators = task.configure_optimizers()
    torch.manual_seed(0)
    size = (SETTINGS.size[1], SETTINGS.size[0])
    rgb, normals, valid = torch.rand(2, 3, *size), torch.randn(2, 3, *size), torch.ones(2, 1, *size)
    normals = torch.nn.functional.normalize(normals, dim=1)
    labels = (torch.rand(1, *size) < 0.3).to(torch.uint8)
    batch = {
        "source": {"rgb": rgb[:1], "normals": normals[:1], "valid": valid[:1], "labels": labels},
        "target": {"rgb": rgb[1:], "normals": normals[1:], "valid": valid[1:]},
    }

    def step() -> None:
        out = task.net(rgb, normals, valid)
        terms: dict[str, Tensor] = {"segmentation": supervised(out.fused[:1], labels)}
        total = terms["segmentation"] + task._beside(out, 1, labels, terms)
        extra, _ = task._from_target(out, 1, labels, batch, 1e-3, 1, False)
        network.zero_grad()
        discriminators.zero_grad()
        (total + extra).backward()
        network.step()
        discriminators.step()

    step()
    whole = best_of(step, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sys.stdout.write(
        f"one step: {whole:.1f} s, peak resident memory {peak:.2f} GiB, {torch.get_num_threads()} thread\n"
    )
    align = task.discriminators["align"]
    assert isinstance(align, SelectiveAlignment)
    maps = (size[0] // 8, size[1] // 8)
    logits = {name: torch.randn(2, 1, *size) for name in HEADS}
    shown = np.random.default_rng(0).random(size)
    truth, depth = labels[0].numpy(), np.full(size, 15.0, np.float32)

    def masks() -> None:
        of_source = align.source_mask(labels, maps)
        align.target_masks({name: value[1:] for name, value in logits.items()}, maps, of_source)

    def losses() -> None:
        leaves = [value.clone().requires_grad_() for value in logits.values()]
        torch.stack([supervised(leaf[:1], labels) for leaf in leaves]).sum().backward()  # type: ignore[no-untyped-call]

    def metrics() -> None:
        FreespaceMeter().update(shown, truth, depth)

    rows = []
    for name, work in (("masks", masks), ("losses of three heads", losses), ("metrics of a picture", metrics)):
        work()
        own = best_of(work)
        rows.append((name, own))
    rows.append(("all three", sum(own for _, own in rows)))
    return [
        counted(
            f"{name}, of the whole step", own, whole, shape=SHAPE, unit="s", required="<= 0.01", equal="-",
            statistic="seconds: the fastest of 3, of one step", ratio=own / whole,
        )
        for name, own in rows
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("freespace-uda", {"torch": torch.__version__}, measure))
