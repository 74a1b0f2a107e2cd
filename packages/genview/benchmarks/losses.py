"""NT-Xent against lightly's and pytorch-metric-learning's; nearest neighbors against lightly's; streaming PCA."""

import sys

import lightly
import lightly.loss
import pytorch_metric_learning
import torch
import torch.nn.functional as F
from genview.foreground import StreamingPCA
from genview.losses import QDNTXentLoss
from genview.neighbors import knn_votes
from lightly.utils.benchmarking import knn_predict
from pytorch_metric_learning.losses import NTXentLoss as MetricNTXent
from sklearn.decomposition import PCA

from tenfold.bench import Comparison, compare, counted, main
from tenfold.memory import MemoryProbe

DIM, T = 128, 0.2


def step(loss, a, b):
    """Gradients of a loss, and its value."""
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = loss(x, y)
    value.backward()
    return value.detach(), x.grad, y.grad


def metric(a, b):
    """pytorch-metric-learning's loss of pairs."""
    n = len(a)
    return MetricNTXent(temperature=T)(torch.cat([a, b]), torch.arange(n).repeat(2))


def close(ours, theirs):
    """Values and gradients agree."""
    differences = [float((x - y).abs().max() / y.abs().max()) for x, y in zip(ours, theirs, strict=True)]
    assert max(differences) < 1e-3, differences
    return f"value and gradients differ by {max(differences):.1e} at most, relative"


def nt_xent() -> list[Comparison]:
    """Time at 1,024 pairs, tensors at 4,096."""
    rows = []
    own, theirs = QDNTXentLoss(T), lightly.loss.NTXentLoss(T)
    for n, required in ((256, ">= 0.8"), (1024, ">= 1.5")):
        a, b = torch.randn(n, DIM), torch.randn(n, DIM)
        shape = f"n={n}, D={DIM}"
        peers = {"lightly": (theirs, required)}
        if n == 256:
            peers["pml"] = (metric, ">= 1.2")  # at n=1,024 it asks for a tensor of 34 GB
        for name, (peer, bound) in peers.items():
            rows.append(
                compare(
                    f"nt_xent_time_{name}_{n}",
                    lambda a=a, b=b: step(own, a, b),
                    lambda peer=peer, a=a, b=b: step(peer, a, b),
                    close,
                    shape=shape,
                    required=bound,
                )
            )
    a, b = torch.randn(4096, DIM), torch.randn(4096, DIM)
    peaks = []
    for loss in (own, theirs):
        with MemoryProbe(a, b) as probe:
            found = step(loss, a, b)
        peaks.append((probe.peak_bytes - probe.start_bytes, found))
    equal = close(peaks[0][1], peaks[1][1])
    statistic = "most live bytes of tensors beyond the inputs, counted"
    rows.append(
        counted(
            "nt_xent_memory_4096",
            peaks[0][0] / 2**20,
            peaks[1][0] / 2**20,
            shape=f"n=4096, D={DIM}",
            unit="MiB",
            required=">= 4",
            equal=equal,
            statistic=statistic,
        )
    )
    return rows


def neighbors() -> list[Comparison]:
    """A bank of 50,000 features of 512 entries, 1,000 classes, k 200."""
    bank, labels = F.normalize(torch.randn(50_000, 512), dim=1), torch.randint(1000, (50_000,))
    queries = F.normalize(torch.randn(512, 512), dim=1)

    def ours():
        return knn_votes(queries, bank, labels, 1000, k=200, temperature=0.07).argmax(dim=1)

    def theirs():
        # in parts of 256, as its benchmarks read their data: all at once takes twice the memory
        parts = [knn_predict(q, bank.T, labels, 1000, knn_k=200, knn_t=0.07) for q in queries.split(256)]
        return torch.cat(parts)[:, 0]

    def equal(a, b):
        share = float((a == b).double().mean())
        assert share > 0.999, share
        return f"{100 * share:.1f} % of the answers are the same"

    shape = "512 queries, bank 50,000 x 512, k=200, C=1000"
    rows = [compare("knn_time", ours, theirs, equal, shape=shape, required=">= 3", pairs=11)]
    peaks = []
    for call in (ours, theirs):
        with MemoryProbe(bank, labels, queries) as probe:
            answers = call()
        peaks.append((probe.peak_bytes - probe.start_bytes, answers))
    rows.append(
        counted(
            "knn_memory",
            peaks[0][0] / 2**20,
            peaks[1][0] / 2**20,
            shape=shape,
            unit="MiB",
            required=">= 10",
            equal=equal(peaks[0][1], peaks[1][1]),
            statistic="most live bytes of tensors beyond bank and queries, counted",
        )
    )
    return rows


def pca() -> list[Comparison]:
    """200,000 tokens of 256 channels, in pieces of 4,096."""
    x = torch.randn(200_000, 256) * torch.linspace(3, 0.5, 256)

    def ours():
        stream = StreamingPCA(256)
        for part in x.split(4096):
            stream.update(part)
        return stream.components()[0].float()

    def theirs():
        return torch.from_numpy(PCA(1, svd_solver="full").fit(x.numpy()).components_[0]).float()

    a, b = ours(), theirs()
    cosine = abs(float(a @ b))
    assert cosine > 1 - 1e-5, cosine
    with MemoryProbe(x) as probe:
        ours()
    mine, whole = (probe.peak_bytes - probe.start_bytes) / 2**20, x.numel() * 4 / 2**20
    return [
        counted(
            "pca_memory",
            mine,
            whole,
            shape="200,000 x 256",
            unit="MiB",
            required=">= 5",
            equal=f"cosine of the first directions {cosine:.7f}",
            statistic="ours: live bytes of tensors; peer: the centered copy that the full solver makes, at least",
        )
    ]


def measure() -> list[Comparison]:
    """All rows."""
    torch.manual_seed(0)
    return [*nt_xent(), *neighbors(), *pca()]


if __name__ == "__main__":
    versions = {"lightly": lightly.__version__, "pytorch-metric-learning": pytorch_metric_learning.__version__}
    sys.exit(main("genview", versions, measure))
