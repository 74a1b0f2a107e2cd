"""Grids of thin-plate splines against a solve per sample and kornia; one sampling call against one per part."""

import sys

import kornia
import torch
import torch.nn.functional as F
from handmstn import ControlPointGrid, preset
from handmstn.parts import palm_part
from handmstn.warping import spline_kernel
from torch import Tensor

from tenfold.bench import Comparison, compare, counted, main
from tenfold.memory import MemoryProbe

BATCH, SIZE = 32, 112
SPEC = palm_part(SIZE)
GRID = ControlPointGrid([SPEC])
TEMPLATE = torch.tensor(SPEC.points)
PIXELS = GRID(TEMPLATE[None])[0]
POINTS = 0.5 * TEMPLATE + 0.05 * torch.randn(BATCH, 9, 2, generator=torch.Generator().manual_seed(0))


def solved() -> Tensor:
    """The standard spline: a system of 12 unknowns per sample, the kernel of all pixels per sample."""
    found = []
    for target in POINTS.double():
        at = TEMPLATE.double()
        design = torch.cat([torch.ones(9, 1, dtype=torch.float64), at], 1)
        system = torch.zeros(12, 12, dtype=torch.float64)
        system[:9, :9] = spline_kernel((at[:, None] - at[None]).square().sum(-1))
        system[:9, 9:], system[9:, :9] = design, design.T
        right = torch.cat([target, torch.zeros(3, 2, dtype=torch.float64)])
        weights = torch.linalg.solve(system, right)
        pixels = PIXELS.double()
        kernel = spline_kernel((pixels[:, None] - at[None]).square().sum(-1))
        values = torch.cat([kernel, torch.ones(len(pixels), 1, dtype=torch.float64), pixels], 1)
        found.append(values @ weights)
    return torch.stack(found).float()


def of_kornia() -> Tensor:
    """kornia's spline, which is another interpolant."""
    source = TEMPLATE[None].expand(BATCH, -1, -1)
    weights, affine = kornia.geometry.transform.get_tps_transform(source, POINTS)
    out: Tensor = kornia.geometry.transform.warp_points_tps(PIXELS.expand(BATCH, -1, -1), POINTS, weights, affine)
    return out


def equal(ours: Tensor, theirs: Tensor) -> str:
    """The largest difference, in half widths of the picture."""
    gap = float((ours - theirs).abs().max())
    assert gap < 1e-5, gap
    return f"grids differ by {gap:.1e} at most"


def equal_at_points(ours: Tensor, theirs: Tensor) -> str:
    """The largest difference at the control points' own pixels (an odd number of them is needed for a middle one)."""
    corners = [0, SIZE - 1, SIZE * SIZE - SIZE, SIZE * SIZE - 1]
    gap = float((ours[:, corners] - theirs[:, corners]).abs().max())
    assert gap < 1e-3, gap
    return f"equal at the corner points to {gap:.1e}; another interpolant between them"


def sampling() -> Comparison:
    """Peak tensor bytes of one sampling call and of one per part, on a picture repeated per part."""
    parts = preset("hand6")
    grid = ControlPointGrid(parts)
    points = torch.cat([torch.from_numpy(part.start) for part in parts]).float().expand(8, -1, -1)
    images = torch.rand(8, 3, 448, 448)
    grids = grid(points)

    def together() -> list[Tensor]:
        return grid.crops(images, grids)

    def apart() -> list[Tensor]:
        each = grids.split(grid.pixels, 1)
        repeated = images.repeat(len(parts), 1, 1, 1).split(len(images))
        places = zip(repeated, each, parts, strict=True)
        return [F.grid_sample(i, g.view(len(i), *p.out_size, 2), align_corners=True) for i, g, p in places]

    gap = max(float((a - b).abs().max()) for a, b in zip(together(), apart(), strict=True))
    assert gap < 1e-5, gap
    peaks = []
    for function in (together, apart):
        with MemoryProbe(images, grids) as probe:
            kept = function()
        peaks.append((probe.peak_bytes - probe.start_bytes) / 2**20)
        del kept
    shape = "8 pictures of 448 x 448, palm 112 x 112 and five fingers 96 x 32"
    return counted(
        "sampling, one call per part",
        *peaks,
        shape=shape,
        unit="MiB",
        required=">= 2",
        equal=f"crops differ by {gap:.1e}",
    )


def measure() -> list[Comparison]:
    """All rows."""
    shape = f"B={BATCH}, {SIZE} x {SIZE}, 9 points"
    ours = lambda: GRID(POINTS)  # noqa: E731
    return [
        compare("grids, a solve per sample", ours, solved, shape=shape, equal=equal, required=">= 50"),
        compare("grids, kornia", ours, of_kornia, shape=shape, equal=equal_at_points, required=">= 10"),
        sampling(),
    ]


if __name__ == "__main__":
    sys.exit(main("handmstn", {"kornia": kornia.__version__, "torch": torch.__version__}, measure))
