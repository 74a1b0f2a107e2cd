"""Normals at 1242 x 375 against the published module's formulas, written out, and d2nt; counts against the devkit's form."""

import sys

import d2nt
import numpy as np
import torch
import torch.nn.functional as F
from freespace_uda import RoadWorld, depth_to_normals
from freespace_uda.metrics import histogram
from freespace_uda.normals import NEIGHBORS, angles
from numpy.typing import NDArray
from torch import Tensor

from tenfold.bench import Comparison, compare, main

SIZE = (1242, 375)
SCENE = RoadWorld("roads-flat", SIZE, 0, 1)[0]
K = torch.from_numpy(SCENE.camera.intrinsics).float()
DEPTH = torch.from_numpy(np.where(SCENE.depth > 0, SCENE.depth, 90.0).astype(np.float32))[None, None]
"""Dense, since the literal form and d2nt have no holes."""


def literal() -> Tensor:
    """SNE-RoadSeg's module: 26 convolutions of 3 x 3, azimuth and inclination."""
    z = DEPTH[0, 0].clone()
    height, width = z.shape
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = z * (u - K[0, 2]) / K[0, 0], z * (v - K[1, 2]) / K[1, 1]

    def filtered(values: Tensor, kernel: list[list[float]]) -> Tensor:
        return F.conv2d(values[None, None], torch.tensor(kernel, dtype=torch.float32)[None, None], padding=1)[0, 0]

    inverse = 1 / z
    gx = K[0, 0] * filtered(inverse, [[0, 0, 0], [-1, 0, 1], [0, 0, 0]])
    gy = K[1, 1] * filtered(inverse, [[0, -1, 0], [0, 0, 0], [0, 1, 0]])
    phi = torch.atan(gy / gx) + torch.pi
    sums = [torch.zeros_like(z) for _ in range(3)]
    for dv, du in NEIGHBORS:
        kernel = [[0.0] * 3 for _ in range(3)]
        kernel[1][1], kernel[1 + dv][1 + du] = 1.0, -1.0
        dx, dy, dz = (filtered(a, kernel) for a in (x, y, z))
        q = (gx * dx + gy * dy) / dz
        norm = torch.sqrt(gx**2 + gy**2 + q**2)
        for total, part in zip(sums, (gx, gy, q), strict=True):
            share = part / norm
            share[~torch.isfinite(share)] = 0
            total += share
    theta = -torch.atan((sums[0] * torch.cos(phi) + sums[1] * torch.sin(phi)) / sums[2])
    n = torch.stack([torch.sin(theta) * torch.cos(phi), torch.sin(theta) * torch.sin(phi), torch.cos(theta)])
    bad = torch.isnan(n).any(0)
    n[:, bad] = torch.tensor([0.0, 0.0, -1.0])[:, None]
    return torch.where(n[1] > 0, -n, n)[None]


def equal(ours: Tensor, theirs: Tensor) -> str:
    """Median of the angles on the ground inside of the picture, up to orientation."""
    off = angles(ours.double(), theirs.double())[:, 1:-1, 1:-1]
    off = torch.minimum(off, 180 - off)[0][torch.from_numpy(SCENE.label[1:-1, 1:-1] == 1)]
    middle = float(off.median())
    assert middle < 0.3, middle
    return f"median angle on the road {middle:.1e} degrees"


def exactly(ours: Tensor, theirs: Tensor) -> str:
    """As ``equal``, to a thousandth of a degree."""
    text = equal(ours, theirs)
    assert float(text.split()[-2]) < 1e-3, text
    return text


def of_d2nt() -> Tensor:
    """d2nt's basic version; it counts pixels from 1, so its principal point is moved along."""
    k = K.numpy().copy()
    k[:2, 2] += 1
    n = torch.from_numpy(d2nt.depth2normal(DEPTH[0, 0].numpy(), k, version="d2nt_basic")).permute(2, 0, 1)
    return torch.where(n[1] > 0, -n, n)[None]


def ours(method: str) -> Tensor:
    """Ours, with holes and batches besides."""
    return depth_to_normals(DEPTH, K, method)[0]  # type: ignore[arg-type]


G = np.random.default_rng(0)
SCORES = G.integers(0, 256, SIZE[::-1]).astype(np.uint8)
LABELS = np.where(G.uniform(size=SCORES.shape) < 0.1, 255, G.uniform(size=SCORES.shape) < 0.3).astype(np.uint8)


def devkit() -> NDArray[np.int64]:
    """Misses and false alarms per threshold as the kit counts them: two histograms with real edges."""
    p = SCORES.astype(np.float64) / 255
    road, valid = LABELS == 1, LABELS != 255
    edges = np.concatenate(([-np.inf], np.arange(256) / 255.0, [np.inf]))
    fn = np.cumsum(np.histogram(p[road & valid], bins=edges)[0])[:256]
    fp = np.flipud(np.cumsum(np.flipud(np.histogram(p[~road & valid], bins=edges)[0]))[:256])
    return np.stack([fn, fp])


def counts() -> NDArray[np.int64]:
    """The same from one count of integers."""
    background, road = histogram(SCORES, LABELS)
    return np.stack([road.sum() - road[::-1].cumsum()[::-1], background[::-1].cumsum()[::-1]])


def identical(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> str:
    """All integers."""
    assert np.array_equal(ours, theirs)
    return "identical integers"


def measure() -> list[Comparison]:
    """All rows."""
    torch.set_num_threads(1)
    shape = f"{SIZE[0]} x {SIZE[1]}"
    sne, plane = (lambda: ours("sne")), (lambda: ours("plane"))
    return [
        compare("sne, the published module (literal form)", sne, literal, shape=shape, equal=exactly, required=">= 3"),
        compare(
            "plane, the published module (literal form)", plane, literal, shape=shape, equal=equal, required=">= 10"
        ),
        compare("plane, d2nt basic", plane, of_d2nt, shape=shape, equal=equal, required=">= 1", pairs=21),
        compare("MaxF counts, devkit's form", counts, devkit, shape=shape, equal=identical, required=">= 5", pairs=21),
    ]


if __name__ == "__main__":
    sys.exit(main("freespace-uda", {"d2nt": d2nt.__version__, "torch": torch.__version__}, measure))
