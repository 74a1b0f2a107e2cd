"""Control points -> sampling grids by one fixed matrix per part, and all crops of a picture by one sampling call.

Letters of shapes: B pictures, P parts, K control points of a part, N = h w pixels of its crop, S = sum of N over parts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmstn.parts import PartSpec


def spline_kernel(squared: Tensor) -> Tensor:
    """U(r) = r^2 log r^2 of squared distances, with U(0) = 0."""
    return torch.where(squared > 0, squared * squared.clamp_min(1e-300).log(), torch.zeros_like(squared))


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b[None]).square().sum(-1)


def _pixels(part: PartSpec) -> Tensor:
    """Places of a crop's pixels in template coordinates, row by row, (N, 2)."""
    (height, width), (ex, ey) = part.out_size, part.extent
    y = torch.linspace(-1, 1, height, dtype=torch.float64) * ey if height > 1 else torch.zeros(1, dtype=torch.float64)
    x = torch.linspace(-1, 1, width, dtype=torch.float64) * ex if width > 1 else torch.zeros(1, dtype=torch.float64)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns, rows], -1).view(-1, 2)


def _design(points: Tensor) -> Tensor:
    """[1, x, y] per point."""
    return torch.cat([torch.ones(len(points), 1, dtype=points.dtype), points], 1)


def spline_system(points: Tensor) -> tuple[Tensor, Tensor]:
    """The two blocks of the inverse of [[U, D], [D^T, 0]]: (K, K) for the bending part, (3, K) for the affine part."""
    count = len(points)
    system = torch.zeros(count + 3, count + 3, dtype=torch.float64)
    system[:count, :count] = spline_kernel(_squared(points, points))
    system[:count, count:] = _design(points)
    system[count:, :count] = _design(points).T
    inverse = torch.linalg.inv(system)
    return inverse[:count, :count], inverse[count:, :count]


def grid_matrix(part: PartSpec) -> Tensor:
    """The constant M with grid = M points, in float64.

    - tps: M = [U(pixels, C), 1, x, y] [L_w; L_a], with [L_w; L_a] the first K columns of the inverse spline system.
    - affine: M = [1, x, y] (D^T D)^-1 D^T.
    - similarity: the same with the four-parameter design on the stacked vector (x_1, y_1, x_2, ...), so (2 N, 2 K).

    Source: Bookstein, PAMI 1989 (spline); the predecessor's released layer solves the same system with regularization 0.
    """
    pixels, points = _pixels(part), torch.tensor(part.points, dtype=torch.float64)
    if part.family == "tps":
        bend, affine = spline_system(points)
        return spline_kernel(_squared(pixels, points)) @ bend + _design(pixels) @ affine
    if part.family == "affine":
        return _design(pixels) @ torch.linalg.pinv(_design(points))
    return _similar(pixels) @ torch.linalg.pinv(_similar(points))


def _similar(points: Tensor) -> Tensor:
    """Design of x' = a x - b y + c, y' = b x + a y + d; rows x'_1, y'_1, x'_2, ..., (2 K, 4)."""
    x, y = points.unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.stack([torch.stack([x, -y, one, zero], -1), torch.stack([y, x, zero, one], -1)], 1)
    return rows.reshape(-1, 4)


class ControlPointGrid(nn.Module):
    """Sampling grids of all parts from their control points: one product with a constant matrix per geometry.

    The map is linear in the points, so the backward pass is the transposed product, and an affine map of the points is an
    affine map of the grid, exactly. Parts of one geometry (the five fingers) share a matrix and are one product.

    Args:
        parts: the parts, whose points follow each other in their order.

    Shapes: points (B, sum K, 2) -> grids (B, S, 2), part after part, rows of pixels within a part.

    Example:
        >>> grid = ControlPointGrid(preset("eeprnet", 8))
        >>> grid(torch.rand(2, 9, 2)).shape  # 8 x 8 places of each palm
        torch.Size([2, 64, 2])
    """

    def __init__(self, parts: Sequence[PartSpec]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.counts = [part.count for part in self.parts]
        self.pixels = [part.out_size[0] * part.out_size[1] for part in self.parts]
        self.groups: list[list[int]] = []
        keys: list[object] = []
        for number, part in enumerate(self.parts):
            key = (part.points, part.out_size, part.family, part.extent)
            if key not in keys:
                keys.append(key)
                self.groups.append([])
                self.register_buffer(f"matrix_{len(keys) - 1}", grid_matrix(part).float(), persistent=False)
                if part.family == "tps":
                    bend = spline_system(torch.tensor(part.points, dtype=torch.float64))[0]
                    self.register_buffer(f"bend_{len(keys) - 1}", bend.float(), persistent=False)
            self.groups[keys.index(key)].append(number)

    def split(self, points: Tensor) -> list[Tensor]:
        """The points of each part, (B, K, 2)."""
        return list(torch.split(points, self.counts, dim=1))

    def forward(self, points: Tensor) -> Tensor:
        """The grids of all parts.

        Raises:
            ValueError: another number of points than the parts have.
        """
        if points.shape[-2:] != (sum(self.counts), 2):
            raise ValueError(f"expected points (B, {sum(self.counts)}, 2), got {tuple(points.shape)}")
        given, batch = self.split(points), points.shape[0]
        found: list[Tensor] = [points] * len(self.parts)
        for index, members in enumerate(self.groups):
            matrix: Tensor = getattr(self, f"matrix_{index}")
            stacked_GBK2 = torch.stack([given[number] for number in members])
            if self.parts[members[0]].family == "similarity":
                grid_GBN2 = (stacked_GBK2.flatten(2) @ matrix.T.to(points)).view(len(members), batch, -1, 2)
            else:
                rows = stacked_GBK2.transpose(-1, -2).reshape(
                    -1, stacked_GBK2.shape[2]
                )  # one product, not one per picture
                grid_GBN2 = (rows @ matrix.to(points).T).view(len(members), batch, 2, -1).transpose(-1, -2)
            for place, number in enumerate(members):
                found[number] = grid_GBN2[place]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def bending_energy(self, points: Tensor) -> Tensor:
        """Bending energy of each part, (B, P): 1/2 sum over x, y of s^T L_w s; 0 for any affine placement and family.

        L_w U L_w = L_w, so this is w^T U w / 2 of the spline's weights w = L_w s.
        """
        given = self.split(points)
        found = [points.new_zeros(points.shape[0])] * len(self.parts)
        for index, members in enumerate(self.groups):
            if self.parts[members[0]].family == "tps":
                bend: Tensor = getattr(self, f"bend_{index}").to(points)
                for number in members:
                    found[number] = 0.5 * ((bend @ given[number]) * given[number]).sum((1, 2))
        return torch.stack(found, 1)

    def outside(self, grids: Tensor) -> Tensor:
        """Share of each part's grid that lies outside of the picture, (B, P)."""
        out = (grids.abs() > 1).any(-1).float()
        return torch.stack([part.mean(1) for part in torch.split(out, self.pixels, dim=1)], 1)

    def crops(self, images: Tensor, grids: Tensor) -> list[Tensor]:
        """The crop of each part, (B, C, h, w), by one sampling call; the picture is not repeated and outside is zero."""
        sampled = F.grid_sample(images, grids.unsqueeze(2), mode="bilinear", padding_mode="zeros", align_corners=True)
        flat = torch.split(sampled.squeeze(3), self.pixels, dim=2)
        return [crop.reshape(*crop.shape[:2], *part.out_size) for crop, part in zip(flat, self.parts, strict=True)]


def similarity(cos_sin: Tensor, log_scale: Tensor, shift: Tensor) -> Tensor:
    """The maps x -> e^s R x + t of a batch, (B, 2, 3); ``cos_sin`` (B, 2) need not have unit length."""
    cos, sin = F.normalize(cos_sin, dim=1, eps=1e-6).unbind(1)
    scale = log_scale.exp()
    rows = torch.stack([cos, -sin, shift[:, 0] / scale, sin, cos, shift[:, 1] / scale], 1) * scale[:, None]
    return rows.view(-1, 2, 3)


def compose(transform: Tensor, points: Tensor) -> Tensor:
    """``transform`` (B, 2, 3) applied to ``points`` (B, K, 2): levels are composed on points, before anything is sampled."""
    return points @ transform[:, :, :2].transpose(1, 2) + transform[:, None, :, 2]


def fit_similarity(source: Tensor, target: Tensor) -> Tensor:
    """The least-squares similarity that carries ``source`` (K, 2) onto each ``target`` (B, K, 2), (B, 2, 3)."""
    a, b = source - source.mean(0), target - target.mean(1, keepdim=True)
    norm = a.square().sum()
    cos = (b * a).sum((1, 2)) / norm
    sin = (b[..., 1] * a[:, 0] - b[..., 0] * a[:, 1]).sum(1) / norm
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    shift = target.mean(1) - (linear @ source.mean(0))
    return torch.cat([linear, shift[..., None]], 2)


def check_finite(points: Tensor, parts: Sequence[PartSpec]) -> None:
    """Check that no control point is NaN, infinite, or so far away that it must be in pixels.

    Raises:
        ValueError: one is; the message names the sample and the part, or the unit.
    """
    bad = ~torch.isfinite(points).all(-1)
    if bool(bad.any()):
        sample, place = (int(i) for i in bad.nonzero()[0])
        names = [part.name for part in parts for _ in range(part.count)]
        raise ValueError(f"sample {sample}: a control point of the part '{names[place]}' is not finite")
    if bool((points.abs() > 10).any()):
        raise ValueError(
            f"control points reach {float(points.abs().max()):.0f}: expected half widths of the picture, -1 to 1 from edge to"
            " edge; pixels would give black crops"
        )
