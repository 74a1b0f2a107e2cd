"""Depth -> surface normals: four methods, batched and differentiable, that neither read nor spread what is not there.

Camera axes: x right, y down, z forward, OpenCV's intrinsics (the first pixel's center is (0, 0)). With U = u - cx,
V = v - cy and inverse depth D = 1 / Z, a plane n.X = d has

    D = (n_x U / f_x + n_y V / f_y + n_z) / d,

so inverse depth is affine in the pixel, and its two differences give the normal exactly. Letters: B batch, H and W rows
and columns, h the eight neighbors of a pixel.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormalMethod = Literal["plane", "sne", "3f2n", "d2nt"]
Orientation = Literal["up", "camera"]
RADII = (1, 2, 4, 8)
"""Radii in pixels over which holes are filled, one after another."""
NEIGHBORS = tuple((dv, du) for dv in (-1, 0, 1) for du in (-1, 0, 1) if (dv, du) != (0, 0))
HALF = ((0, 1), (1, 0), (1, 1), (1, -1))
"""One of each two opposite neighbors."""


def valid_depth(depth: Tensor, max_depth: float = float("inf")) -> Tensor:
    """Where depth is a distance: finite, above 0, below ``max_depth``; a boolean tensor of the same shape."""
    return (depth > 0) & (depth < max_depth)


def _slopes(values_BHW: Tensor, valid_BHW: Tensor, edges: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Differences per pixel along the columns and along the rows, and where both exist.

    The mean of the forward and the backward difference where both exist (the central difference), else the one that
    does. With ``edges`` the two are weighted by each other's square, (l r^2 + r l^2) / (l^2 + r^2), which takes the smaller
    at a jump
    and stays exact where they agree.
    """
    height, width = values_BHW.shape[-2:]
    padded, known = F.pad(values_BHW, (1, 1, 1, 1)), F.pad(valid_BHW, (1, 1, 1, 1))
    found, sides = [], []
    for late, early in (
        ((..., slice(1, -1), slice(1, None)), (..., slice(1, -1), slice(0, -1))),
        ((..., slice(1, None), slice(1, -1)), (..., slice(0, -1), slice(1, -1))),
    ):
        both = known[late] & known[early]
        step = torch.where(both, padded[late] - padded[early], 0.0)
        left, right = step[..., :height, :width], step[..., -height:, -width:]
        before, after = both[..., :height, :width], both[..., -height:, -width:]
        two = before & after
        mean = (left + right) * torch.where(two, 0.5, 1.0)
        if edges:
            squares = left.square() + right.square()
            weighted = left * right * (left + right) / squares.clamp_min(torch.finfo(values_BHW.dtype).tiny)
            mean = torch.where(two & (squares > 0), weighted, mean)
        found.append(mean)
        sides.append(before | after)
    return found[0], found[1], sides[0] & sides[1]


def _filled(inverse_BHW: Tensor, valid_BHW: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse depth with holes averaged from what is valid around them, and where there is a value now."""
    known = valid_BHW
    out = inverse_BHW
    for radius in RADII:
        kernel = 2 * radius + 1
        count = F.avg_pool2d(known.to(out.dtype).unsqueeze(1), kernel, 1, radius).squeeze(1)
        total = F.avg_pool2d((out * known).unsqueeze(1), kernel, 1, radius).squeeze(1)
        new = ~known & (count > 0)
        out = torch.where(new, total / count.clamp_min(1e-12), out)
        known = known | new
    return out, known


def _ratios(
    slopes: tuple[Tensor, Tensor],
    depth_BHW: Tensor,
    across: tuple[Tensor, Tensor],
    focal: tuple[Tensor, Tensor],
    valid_BHW: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:
    """q_h = (g_x dX + g_y dY) / dZ for each neighbor, and where it is a number.

    With X = a Z, Y = b Z and a neighbor at (du, dv): q_h = g_x a + g_y b - s Z_h / dZ with s = g_x du / f_x + g_y dv / f_y, so
    that Z is the only map whose neighbors are looked at. Two neighboring pixels share one quotient: seen from the other one,
    s changes its sign and Z_h / dZ becomes -(1 + Z_h / dZ), so q_h = g_x a + g_y b - s (1 + Z_h / dZ).
    """
    gx, gy = slopes
    along = gx * across[0] + gy * across[1]
    per_u, per_v = gx / focal[0], gy / focal[1]
    padded, there = F.pad(depth_BHW, (1, 1, 1, 1)), F.pad(valid_BHW, (1, 1, 1, 1))
    height, width = valid_BHW.shape[-2:]
    for (dv, du), step in zip(HALF, (per_u, per_v, per_u + per_v, per_v - per_u), strict=True):
        # of every pair with a pixel of the map in it: the first pixel of the pair, and the second, at (dv, du) from it
        first = (..., slice(1 - dv, height + 1), slice(1 - max(du, 0), width + 1 - min(du, 0)))
        second = (..., slice(1, height + 1 + dv), slice(1 + min(du, 0), width + 1 + max(du, 0)))
        dz = padded[first] - padded[second]
        ok = there[first] & there[second] & (dz != 0)
        part = padded[second] / torch.where(ok, dz, 1.0)
        of_first = (..., slice(dv, dv + height), slice(max(du, 0), max(du, 0) + width))
        of_second = (..., slice(0, height), slice(max(-du, 0), max(-du, 0) + width))
        yield torch.addcmul(along, step, part[of_first], value=-1), ok[of_first]
        yield torch.addcmul(along - step, step, part[of_second], value=-1), ok[of_second]


def depth_to_normals(
    depth: Tensor,
    intrinsics: Tensor,
    method: NormalMethod = "plane",
    *,
    orient: Orientation = "up",
    edges: bool = False,
    fill: bool = False,
    max_depth: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """Unit normals of a depth map, and how far they can be trusted; (0, 0, 0) where nothing is known.

    - ``plane``: n ~ (f_x D_u, f_y D_v, D - U D_u - V D_v), exact on planes, two differences.
    - ``sne``: with g = 2 (f_x D_u, f_y D_v), q_h = (g_x dX + g_y dY) / dZ to each of eight neighbors and
      r_h = 1 / |(g_x, g_y, q_h)|: n ~ (-g_x sum r, -g_y sum r, sum q r). The published routine goes through azimuth and
      inclination, which is the same without its trigonometry; where all dZ are 0 it is undefined, and ``plane`` steps in.
    - ``3f2n``: n ~ (g_x, g_y, -median q).
    - ``d2nt``: n ~ (f_x Z_u, f_y Z_v, -(Z + U Z_u + V Z_v)), which is exact in the limit of fine pixels alone.

    ``sne`` and ``3f2n`` divide by differences of depth: where these are rounding alone, they lose digits; ``plane`` does not.
    A difference whose neighbor is missing is taken to the other side; a pixel without any is invalid. Below the
    precision of 32 bits everything is computed in 32 bits.

    Args:
        depth: distance along z in any unit; 0, negative, NaN and infinite values are holes. It is not changed.
        intrinsics: (3, 3) or (B, 3, 3), of this picture size.
        method: as above.
        orient: ``up`` turns normals so that n_y <= 0; ``camera`` so that they face the camera.
        edges: weight the two sides of a difference so that jumps of depth are not averaged over.
        fill: give holes that have valid depth within 15 pixels a normal of their surroundings, at validity 0.5.
        max_depth: what is this far or farther is a hole as well (the far plane of a simulator's sky).

    Shapes: ``depth`` (B, 1, H, W) -> normals (B, 3, H, W), validity (B, 1, H, W) with values 0, 0.5 and 1.

    Raises:
        ValueError: another shape, or an unknown method.

    Source: SNE-RoadSeg, ECCV 2020 (sne); 3F2N, arXiv 2005.08165; D2NT, ICRA 2023; the closed form and the rules for holes
    are ours.
    """
    if depth.ndim != 4 or depth.shape[1] != 1:
        raise ValueError(f"depth: expected (B, 1, H, W), got {tuple(depth.shape)}")
    if intrinsics.shape[-2:] != (3, 3):
        raise ValueError(f"intrinsics: expected (3, 3) or (B, 3, 3), got {tuple(intrinsics.shape)}; of a 3 x 4 projection"
                         " take the first three columns")  # fmt: skip
    if method not in get_args(NormalMethod):
        raise ValueError(f"method: expected one of {', '.join(get_args(NormalMethod))}, got {method!r}")
    z_BHW = depth.squeeze(1)
    z_BHW = z_BHW.float() if z_BHW.dtype in {torch.float16, torch.bfloat16} or not z_BHW.is_floating_point() else z_BHW
    k = intrinsics.to(z_BHW).expand(z_BHW.shape[0], 3, 3)
    fx, fy, cx, cy = (k[:, i, j].view(-1, 1, 1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    known = valid_depth(z_BHW, max_depth)
    inverse = torch.where(known, z_BHW, torch.inf).reciprocal()
    trusted = known
    if fill:
        inverse, trusted = _filled(inverse, known)
    height, width = z_BHW.shape[-2:]
    u_BHW = torch.arange(width, dtype=z_BHW.dtype, device=z_BHW.device) - cx
    v_BHW = torch.arange(height, dtype=z_BHW.dtype, device=z_BHW.device).unsqueeze(1) - cy
    if method == "plane":
        du, dv, there = _slopes(inverse, trusted, edges)
        along = torch.addcmul(torch.addcmul(inverse, u_BHW, du, value=-1), v_BHW, dv, value=-1)
        nx, ny, nz = fx * du, fy * dv, along
    else:
        safe = torch.where(trusted, torch.where(trusted, inverse, 1.0).reciprocal() if fill else z_BHW, 1.0)
        values = safe * trusted if method == "d2nt" else inverse
        du, dv, there = _slopes(values, trusted, edges)
        nx, ny = fx * du, fy * dv
        if method == "d2nt":
            nz = -(values + u_BHW * du + v_BHW * dv)
        else:
            plane = values - u_BHW * du - v_BHW * dv
            gx, gy, across = 2 * nx, 2 * ny, (u_BHW / fx, v_BHW / fy)
            ratios = _ratios((gx, gy), safe, across, (fx, fy), trusted)
            nx, ny, nz = _sne(gx, gy, plane, ratios) if method == "sne" else _three_filters(gx, gy, plane, ratios)
    square = torch.addcmul(torch.addcmul(nx.square(), ny, ny), nz, nz)
    there = there & (square > 0)
    scale = torch.where(there, square, torch.inf).rsqrt()
    upward = orient == "up"  # camera: away from it, n.X > 0
    wrong = (ny > 0) | ((ny == 0) & (nz > 0)) if upward else nx * u_BHW / fx + ny * v_BHW / fy + nz > 0
    scale = torch.where(wrong, -scale, scale)
    validity = torch.where(known, 1.0, 0.5).to(scale.dtype) * there if fill else there.to(scale.dtype)
    return torch.stack([nx * scale, ny * scale, nz * scale], 1), validity.unsqueeze(1)


def _sne(gx: Tensor, gy: Tensor, plane: Tensor, ratios: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    flat = torch.addcmul(gx.square(), gy, gy)
    flat = torch.where(flat > 0, flat, torch.inf)  # else q is 0, too
    total, weighted = torch.zeros_like(gx), torch.zeros_like(gx)
    for q, ok in ratios:
        r = torch.where(ok, torch.addcmul(flat, q, q), torch.inf).rsqrt()
        total = total + r
        weighted = torch.addcmul(weighted, q, r)
    some = total > 0
    return (
        torch.where(some, -gx * total, gx / 2),
        torch.where(some, -gy * total, gy / 2),
        torch.where(some, weighted, plane),
    )


def _three_filters(
    gx: Tensor, gy: Tensor, plane: Tensor, ratios: Iterator[tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    all_h = torch.stack([torch.where(ok, -q, float("nan")) for q, ok in ratios])
    middle = all_h.nanmedian(0).values
    none = middle.isnan()
    return torch.where(none, gx / 2, gx), torch.where(none, gy / 2, gy), torch.where(none, plane, middle)


class SurfaceNormals(nn.Module):
    """Normals of depth maps as a module, so that they can be part of an exported network; see ``depth_to_normals``.

    Args:
        method: plane (closed form), sne, 3f2n or d2nt.
        orient: up or camera.
        edges: weight differences at jumps of depth.
        fill: fill holes from their surroundings, at validity 0.5.
        max_depth: what is this far or farther is a hole.

    Shapes: depth (B, 1, H, W), intrinsics (3, 3) or (B, 3, 3) -> normals (B, 3, H, W), validity (B, 1, H, W).

    Example:
        >>> K = torch.tensor([[20.0, 0.0, 8.0], [0.0, 20.0, 6.0], [0.0, 0.0, 1.0]])
        >>> normals, valid = SurfaceNormals(orient="camera")(torch.full((1, 1, 12, 16), 5.0), K)  # a wall in front
        >>> [round(abs(float(x)), 3) for x in normals[0, :, 6, 8]]
        [0.0, 0.0, 1.0]
    """

    def __init__(
        self,
        method: NormalMethod = "plane",
        orient: Orientation = "up",
        edges: bool = False,
        fill: bool = False,
        max_depth: float = float("inf"),
    ) -> None:
        super().__init__()
        self.method, self.orient, self.edges, self.fill, self.max_depth = method, orient, edges, fill, max_depth

    def forward(self, depth: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
        """Normals and validity."""
        return depth_to_normals(
            depth, intrinsics, self.method, orient=self.orient, edges=self.edges, fill=self.fill, max_depth=self.max_depth
        )  # fmt: skip


def resize_normals(normals: Tensor, valid: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Normals and validity at another size: valid vectors are averaged, then made unit again.

    Args:
        normals: (B, 3, H, W), 0 where invalid.
        valid: (B, 1, H, W).
        size: new (H, W).
    """
    if normals.shape[-2:] == size:
        return normals, valid
    smaller = size[0] < normals.shape[-2] or size[1] < normals.shape[-1]
    both = F.interpolate(
        torch.cat([normals * (valid > 0), valid], 1), size, mode="bilinear", align_corners=False, antialias=smaller
    )
    mean, share = both[:, :3], both[:, 3:]
    length = mean.norm(dim=1, keepdim=True)
    there = (share > 0.5 - 1e-6) & (length > 1e-3)
    unit = torch.where(there, mean / length.clamp_min(1e-12), 0.0)
    return unit, torch.where(there, share.clamp(0, 1), 0.0)


def flip_normals(normals: Tensor) -> Tensor:
    """Normals (..., 3, H, W) of the mirrored picture."""
    flipped = normals.flip(-1)
    return torch.cat([-flipped[..., :1, :, :], flipped[..., 1:, :, :]], -3)


def flip_intrinsics(intrinsics: Tensor, width: int) -> Tensor:
    """Intrinsics of the mirrored picture: c_x -> W - 1 - c_x."""
    out = intrinsics.clone()
    out[..., 0, 2] = width - 1 - intrinsics[..., 0, 2]
    return out


def angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles in degrees between unit vectors along dimension 1, also exact for tiny ones: 2 atan2(|a - b|, |a + b|)."""
    found: Tensor = torch.rad2deg(2 * torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1)))
    return found
