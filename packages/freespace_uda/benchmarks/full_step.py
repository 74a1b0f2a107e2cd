"""One step of the full-size recipe on this machine's CPU: two ResNet-50, 1248 x 384, 1 + 1 pictures; seconds and peak memory.

``python full_step.py`` prints them; it takes about a minute and 6 GB.
"""

import resource
import sys
import time

import torch
from freespace_uda import AdaptTask
from freespace_uda.config import Alignment, RunSettings
from freespace_uda.models import build_net


def main() -> int:
    """Two steps, of which the second is timed."""
    settings = RunSettings(data="roads-flat", batch_size=1, align=Alignment(start=0.0, ramp=0.0, min_pixels=1))
    net = build_net(settings, "ccg-sfa", 0)
    task = AdaptTask(net, settings, "ccg-sfa", 10, 0.25, [])
    network, discriminators = task.configure_optimizers()
    torch.manual_seed(0)
    size = (settings.size[1], settings.size[0])
    rgb, normals, valid = torch.rand(2, 3, *size), torch.randn(2, 3, *size), torch.ones(2, 1, *size)
    normals = torch.nn.functional.normalize(normals, dim=1)
    labels = (torch.rand(1, *size) < 0.3).to(torch.uint8)
    batch = {
        "source": {"rgb": rgb[:1], "normals": normals[:1], "valid": valid[:1], "labels": labels},
        "target": {"rgb": rgb[1:], "normals": normals[1:], "valid": valid[1:]},
    }
    for turn in range(2):
        start = time.perf_counter()
        out = task.net(rgb, normals, valid)
        terms: dict[str, torch.Tensor] = {"segmentation": torch.nn.functional.softplus(out.fused[:1]).mean()}
        total = terms["segmentation"] + task._beside(out, 1, labels, terms)
        extra, _ = task._from_target(out, 1, labels, batch, 1e-3, 1, False)
        network.zero_grad()
        discriminators.zero_grad()
        (total + extra).backward()
        network.step()
        discriminators.step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        sys.stdout.write(
            f"step {turn + 1}: {seconds:.1f} s, peak resident memory {peak:.2f} GiB, {torch.get_num_threads()} thread(s)\n"
        )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
