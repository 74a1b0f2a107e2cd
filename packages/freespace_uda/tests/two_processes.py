"""One of two processes: the losses of its half of a batch, whose mean gradients are compared; started by test_two_processes."""

import sys

import torch
import torch.distributed as dist
from freespace_uda import FreespaceNet, SelectiveAlignment
from freespace_uda.objectives import supervised


def gradients(rows):
    """Gradients of segmentation, adversarial and discriminator loss for some rows of a fixed batch of four."""
    torch.manual_seed(0)
    net = FreespaceNet("freespace:tiny", width=8).double()
    align = SelectiveAlignment(net.feature_channels, "cross", 0.3, 1, 8).double()
    rgb, normals = torch.rand(8, 3, 32, 64, dtype=torch.float64), torch.randn(8, 3, 32, 64, dtype=torch.float64)
    labels = (torch.rand(4, 32, 64) < 0.4).to(torch.uint8)
    labels[1, 5:] = 255  # ranks have unlike numbers of labeled pixels
    s, t = rows, [4 + r for r in rows]
    pictures = [torch.cat([x[s], x[t]]) for x in (rgb, normals, torch.ones(8, 1, 32, 64, dtype=torch.float64))]
    out, n = net(*pictures), len(rows)
    of_source = align.source_mask(labels[s], (4, 8)).double()
    logits = {"fused": out.fused, "rgb": out.rgb, "normal": out.normal}
    masks = align.target_masks({k: v.detach()[n:] for k, v in logits.items()}, (4, 8))
    masks = {k: v.double() for k, v in masks.items()}
    source, target = ({k: f[part] for k, f in out.features.items()} for part in (slice(n), slice(n, None)))
    losses = align(source, target, of_source, masks)
    total = supervised(out.fused[:n], labels[s]) + 0.1 * losses.adversarial + losses.discriminator
    total.backward()
    return {
        name: p.grad
        for part, module in (("net", net), ("align", align))
        for name, p in ((f"{part}.{k}", p) for k, p in module.named_parameters())
        if p.grad is not None
    }


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    rank = dist.get_rank()
    found = gradients([0, 1] if rank == 0 else [2, 3])
    for grad in found.values():
        dist.all_reduce(grad)
        grad /= 2  # as DDP does
    if rank == 0:
        torch.save(found, sys.argv[3])
    dist.destroy_process_group()
