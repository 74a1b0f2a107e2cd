"""The losses of one process of two: `python losses_run.py RANK PORT FOLDER`; the test takes the batch from here."""

import sys

import torch
import torch.distributed as dist
from mamba_fscil.head import dot_regression_loss, simplex_etf
from mamba_fscil.losses import ClassSensitiveLoss


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(rows=8):
    g = generator()
    gate = torch.randn(rows, 4, 6, generator=g)
    params = tuple(torch.randn(rows, n, generator=g) for n in (3, 5, 5))
    return gate, params, torch.tensor([0, 7, 1, 8, 2, 9, 0, 7][:rows])


def main(rank, port, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gate, params, labels = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    own = gate[mine].clone().requires_grad_()
    parts = tuple(p[mine] for p in params)
    found = {}
    for ranks in (1, 2):
        loss = ClassSensitiveLoss(3.0, 0.5, 0.2, "fro_over_numel", ranks)(own, parts, labels[mine], 5).total
        (grad,) = torch.autograd.grad(loss, own)
        found[f"loss {ranks}"], found[f"gradient {ranks}"] = loss.detach(), grad / 2  # as DDP averages it
    mu = torch.randn(8, 8, generator=generator(3))[mine]
    W = simplex_etf(8, 8, generator())
    found["regression"] = dot_regression_loss(mu, W, labels[mine] % 8, balanced=True)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
