"""The contrast, forward and backward, against pytorch-metric-learning's SupConLoss and the plain form with masks.

SupConLoss with dot products that are not normalized, tau as its temperature, and doubled labels is the same loss but for the
factor tau / tau0 and the mean, which are put on; its gradient is compared. The mask form is a literal one, written here from
the definition with one tensor for each step, as the usual implementations have it. Memory is the peak of what tensors
take beyond the inputs, by torch's profiler, forward and backward.
"""

import importlib.metadata
from collections.abc import Callable

import torch
from pckd import category_contrast
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor

from tenfold import bench

TAU, TAU0 = 4.0, 0.07
Step = Callable[[Tensor, Tensor], Tensor]


def ours(A: Tensor, labels: Tensor) -> Tensor:
    """Our loss, as a mean."""
    return category_contrast(A, labels, TAU, TAU0).mean()


def library(A: Tensor, labels: Tensor) -> Tensor:
    """The same by pytorch-metric-learning."""
    loss = SupConLoss(temperature=TAU, distance=DotProductSimilarity(normalize_embeddings=False))
    return TAU / TAU0 * loss(A, labels)


def masks(A: Tensor, labels: Tensor) -> Tensor:
    """The same with a tensor for each step."""
    S = A @ A.T / TAU
    others = ~torch.eye(len(A), dtype=torch.bool)
    positive = (labels[:, None] == labels[None, :]) & others
    S = S - S.amax(dim=1, keepdim=True).detach()
    log_p = S - (S.exp() * others).sum(dim=1, keepdim=True).log()
    return TAU / TAU0 * -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()


def batch(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Relation vectors, and labels of both halves."""
    generator = torch.Generator().manual_seed(0)
    A = 0.5 * torch.randn(rows, classes, generator=generator)
    return A, torch.randint(classes, (rows // 2,), generator=generator).repeat(2)


def gradient(step: Step, A: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward."""
    A = A.detach().requires_grad_()
    step(A, labels).backward()
    assert A.grad is not None
    return A.grad


def agreement(a: Tensor, b: Tensor) -> str:
    """Whether two gradients are the same."""
    error = float((a - b).norm() / b.norm())
    assert error < 1e-4, error
    return f"gradients differ by {error:.1g}"


def peak(step: Step, A: Tensor, labels: Tensor) -> float:
    """MiB that are held at the worst moment, beyond the inputs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        gradient(step, A, labels)
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20


def time_row(id: str, peer: Step, rows: int, classes: int, required: str, pairs: int = 21) -> bench.Comparison:
    """Seconds of forward and backward."""
    A, labels = batch(rows, classes)
    return bench.compare(
        id,
        lambda: gradient(ours, A, labels),
        lambda: gradient(peer, A, labels),
        agreement,
        shape=f"2N={rows}, C={classes}",
        required=required,
        pairs=pairs,
    )


def memory_row(id: str, peer: Step, rows: int, classes: int, required: str) -> bench.Comparison:
    """Peak of memory."""
    A, labels = batch(rows, classes)
    equal = agreement(gradient(ours, A, labels), gradient(peer, A, labels))
    a, b = peak(ours, A, labels), peak(peer, A, labels)
    return bench.counted(
        id,
        a,
        b,
        shape=f"2N={rows}, C={classes}",
        unit="MiB",
        required=required,
        equal=equal,
        statistic="peak of tensors beyond the inputs, forward and backward",
    )


def bounded_row(rows: int, classes: int, limit: float) -> bench.Comparison:
    """Our memory against a limit; the peer is what one tensor of all pairs takes."""
    A, labels = batch(rows, classes)
    found, pairs = peak(ours, A, labels), rows * rows * 4 / 2**20
    return bench.counted(
        "memory of one tensor of all pairs",
        found,
        pairs,
        shape=f"2N={rows}, C={classes}",
        unit="MiB",
        required=f">= {pairs / limit:.3g}",
        equal=f"our peak has to stay under {limit:.0f} MiB",
        statistic="peak of tensors beyond the inputs; the peer by counting",
    )


def measure() -> list[bench.Comparison]:
    """All rows."""
    return [
        time_row("time, SupConLoss", library, 512, 100, ">= 1"),
        time_row("time, SupConLoss", library, 2048, 100, ">= 8"),
        time_row("time, SupConLoss", library, 4096, 1000, ">= 4", pairs=5),
        time_row("time, masks", masks, 512, 100, ">= 1"),
        time_row("time, masks", masks, 2048, 100, ">= 4"),
        time_row("time, masks", masks, 4096, 1000, ">= 2", pairs=5),
        memory_row("memory, SupConLoss", library, 2048, 100, ">= 20"),
        memory_row("memory, masks", masks, 2048, 100, ">= 4"),
        bounded_row(8192, 100, 64.0),
    ]


if __name__ == "__main__":
    peers = {
        "pytorch-metric-learning": importlib.metadata.version("pytorch-metric-learning"),
        "masks": "literal, in the script",
    }
    raise SystemExit(bench.main("pckd", peers, measure))
