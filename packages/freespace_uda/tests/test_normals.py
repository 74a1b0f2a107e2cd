"""Normals against closed forms, a literal trigonometric routine, and the rules for holes."""

import json
import math

import numpy as np
import pytest
import torch
from freespace_uda import NormalCache, RoadWorld, SurfaceNormals, depth_to_normals
from freespace_uda.normal_cache import INDEX, NUMBERS, decode, encode, write
from freespace_uda.normals import angles, flip_intrinsics, flip_normals, resize_normals
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import UserError

K = torch.tensor([[721.0, 0, 30.2], [0, 650.0, 9.7], [0, 0, 1]], dtype=torch.float64)
METHODS = ["plane", "sne", "3f2n", "d2nt"]


def plane_depth(normal, distance, k=K, size=(20, 60)):
    """Depth of n.X = d, and which pixels see it."""
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    rays = torch.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)])
    along = (torch.as_tensor(normal, dtype=torch.float64).view(3, 1, 1) * rays).sum(0)
    depth = distance / along
    return torch.where(depth > 0, depth, 0.0)[None, None]


def upward(normal):
    n = torch.as_tensor(normal, dtype=torch.float64)
    n = n / n.norm()
    return -n if n[1] > 0 else n


@given(
    st.floats(-0.9, 0.9), st.floats(-1, -0.05), st.floats(-0.9, 0.9), st.floats(0.5, 40),
    st.floats(30, 900), st.floats(30, 900), st.sampled_from(["plane", "sne", "3f2n"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_a_plane_gives_its_own_normal_also_where_fx_is_unlike_fy(nx, ny, nz, distance, fx, fy, method):
    k = torch.tensor([[fx, 0, 30.2], [0, fy, 9.7], [0, 0, 1]], dtype=torch.float64)
    n = torch.tensor([nx, ny, nz], dtype=torch.float64)
    if method != "plane" and any(0 < abs(c) < 1e-6 for c in (nx, nz)):
        return  # neighbors differ by rounding alone, and these methods divide by that difference
    n = n / n.norm()
    depth = plane_depth(n, -distance, k)
    depth = torch.where(depth > 0, depth, plane_depth(n, distance, k))
    depth = torch.where(depth < 1e4, depth, 0.0)
    if (depth > 0).sum() < 300:
        return
    if (plane_depth(n, -distance, k) > 0).any() and (plane_depth(n, distance, k) > 0).any():
        return  # the plane's horizon crosses the picture: two sheets meet there
    normals, valid = depth_to_normals(depth, k, method)
    found = angles(normals, upward(n).view(1, 3, 1, 1).expand_as(normals))[valid[:, 0] > 0]
    assert float(found.max()) < 1e-4


def test_fx_in_place_of_fy_tilts_a_plane_so_the_test_above_can_fail():
    n = torch.tensor([0.1, -0.9, -0.42], dtype=torch.float64)
    n = n / n.norm()
    k = torch.tensor([[72.0, 0, 30.2], [0, 65.0, 9.7], [0, 0, 1]], dtype=torch.float64)
    wrong = k.clone()
    wrong[1, 1] = wrong[0, 0]
    depth = plane_depth(n, -1.6, k)
    normals, valid = depth_to_normals(depth, wrong)
    off = angles(normals, upward(n).view(1, 3, 1, 1).expand_as(normals))[valid[:, 0] > 0]
    assert float(off.median()) > 0.5


def literal_sne(depth, k):
    """SNE-RoadSeg's formulas pixel by pixel, through azimuth and inclination, for interior pixels."""
    z = depth[0, 0].numpy()
    rows, columns = z.shape
    fx, fy, cx, cy = (float(k[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    out = np.full((3, rows, columns), np.nan)
    x = z * (np.arange(columns)[None] - cx) / fx
    y = z * (np.arange(rows)[:, None] - cy) / fy
    for v in range(1, rows - 1):
        for u in range(1, columns - 1):
            gx = fx * (1 / z[v, u + 1] - 1 / z[v, u - 1])
            gy = fy * (1 / z[v + 1, u] - 1 / z[v - 1, u])
            phi = math.atan(gy / gx) + math.pi
            sums = np.zeros(3)
            for dv in (-1, 0, 1):
                for du in (-1, 0, 1):
                    if not dv and not du:
                        continue
                    dx, dy, dz = (a[v, u] - a[v + dv, u + du] for a in (x, y, z))
                    if dz == 0:
                        continue
                    q = (gx * dx + gy * dy) / dz
                    sums += np.array([gx, gy, q]) / math.sqrt(gx**2 + gy**2 + q**2)
            theta = -math.atan((sums[0] * math.cos(phi) + sums[1] * math.sin(phi)) / sums[2])
            n = np.array([math.sin(theta) * math.cos(phi), math.sin(theta) * math.sin(phi), math.cos(theta)])
            out[:, v, u] = -n if n[1] > 0 else n
    return torch.from_numpy(out)[None]


def test_sne_equals_the_published_trigonometric_routine():
    torch.manual_seed(0)
    depth = 5 + 0.3 * torch.rand(1, 1, 12, 14, dtype=torch.float64).cumsum(2)
    ours, _ = depth_to_normals(depth, K, "sne")
    theirs = literal_sne(depth, K)
    off = angles(ours, theirs)[:, 1:-1, 1:-1]
    off = torch.minimum(off, 180 - off)  # the literal one flips where n_y is about 0
    assert float(off.median()) < 1e-6
    assert float(off.quantile(0.95)) < 1e-5


def test_d2nt_meets_the_exact_normal_as_pixels_grow_finer():
    n = torch.tensor([0.05, -1.0, -0.1], dtype=torch.float64)
    n = n / n.norm()
    errors = []
    for fine in (1, 4):
        k = torch.tensor([[700.0 * fine, 0, 50.0], [0, 700.0 * fine, 50.0], [0, 0, 1]], dtype=torch.float64)
        depth = plane_depth(n, -1.6, k, (24, 24))
        there = depth_to_normals(depth[..., 8:, :], flip_free(k, 8), "d2nt")
        normals, valid = there
        errors.append(float(angles(normals, n.view(1, 3, 1, 1).expand_as(normals))[valid[:, 0] > 0].median()))
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 1e-3


def flip_free(k, top):
    """Intrinsics after rows were cut off."""
    out = k.clone()
    out[1, 2] -= top
    return out


def road_depth(seed=0, domain="roads-real"):
    scene = RoadWorld(domain, (64, 32), seed, 1)[0]
    return torch.from_numpy(scene.depth)[None, None].double(), torch.from_numpy(scene.camera.intrinsics)


@pytest.mark.parametrize("method", METHODS)
def test_normals_are_unit_where_valid_zero_elsewhere_and_point_up(method):
    depth, k = road_depth()
    normals, valid = depth_to_normals(depth, k, method)
    there = valid[:, 0] > 0
    assert 0.3 < float(there.double().mean()) < 1
    assert torch.allclose(normals.norm(dim=1)[there], torch.ones(int(there.sum()), dtype=torch.float64))
    assert (normals.movedim(1, -1)[~there] == 0).all()
    assert (normals[:, 1] <= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_unit_of_depth_does_not_matter(method):
    depth, k = road_depth()
    first, _ = depth_to_normals(depth, k, method)
    second, _ = depth_to_normals(depth * 3.7, k, method)
    assert float(angles(first, second).max()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_mirrored_picture_has_mirrored_normals_exactly(method):
    depth, k = road_depth()
    first, valid = depth_to_normals(depth, k, method)
    second, mirrored = depth_to_normals(depth.flip(-1), flip_intrinsics(k, 64), method)
    if method in {"plane", "d2nt"}:
        assert torch.equal(flip_normals(first), second)
    else:  # sums over eight neighbors run in another order
        assert torch.allclose(flip_normals(first), second, atol=1e-9)
    assert torch.equal(valid.flip(-1), mirrored)


@pytest.mark.parametrize("method", METHODS)
def test_a_crop_has_the_same_normals_inside_and_pixels_count_from_zero(method):
    depth, k = road_depth()
    whole, _ = depth_to_normals(depth, k, method)
    cut = k.clone()
    cut[0, 2] -= 5
    cut[1, 2] -= 3
    part, _ = depth_to_normals(depth[..., 3:, 5:], cut, method)
    assert torch.allclose(whole[..., 4:-1, 6:-1], part[..., 1:-1, 1:-1], atol=1e-9)
    off_by_one = k.clone()
    off_by_one[:2, 2] += 1
    moved, _ = depth_to_normals(depth, off_by_one, method)
    assert not torch.allclose(whole, moved, atol=1e-6)


def sphere(size):
    """A sphere of unit radius 4 units ahead, seen at a resolution, its exact normals, and its inner part."""
    k = torch.tensor([[2.0 * size, 0, size / 2], [0, 2.0 * size, size / 2], [0, 0, 1]], dtype=torch.float64)
    v, u = torch.meshgrid(
        torch.arange(size, dtype=torch.float64), torch.arange(size, dtype=torch.float64), indexing="ij"
    )
    rays = torch.stack([(u - size / 2) / (2 * size), (v - size / 2) / (2 * size), torch.ones_like(u)])
    a, b = rays.square().sum(0), rays[2] * 4
    root = b.square() - a * 15
    z = torch.where(root > 0, (b - root.clamp_min(0).sqrt()) / a, 0.0)
    exact = rays * z - torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64).view(3, 1, 1)
    inner = (exact[:2].norm(dim=0) < 0.5) & (z > 0)
    exact = torch.where(exact[1] > 0, -exact, exact)
    return z[None, None], k, exact[None], inner


def test_on_a_sphere_the_error_falls_with_the_square_of_the_resolution():
    errors = []
    for size in (100, 200):
        depth, k, exact, inner = sphere(size)
        normals, _ = depth_to_normals(depth, k)
        off = angles(normals, exact)[0]
        errors.append(float(torch.minimum(off, 180 - off)[inner].quantile(0.99)))
    assert errors[1] < 0.5
    assert errors[1] < 0.35 * errors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hole", [0.0, float("nan"), float("inf"), -3.0])
def test_a_hole_changes_its_own_neighborhood_alone_and_never_leaks(method, hole):
    torch.manual_seed(1)
    depth = 5 + torch.rand(1, 1, 11, 13, dtype=torch.float64)
    before, _ = depth_to_normals(depth, K, method)
    holed = depth.clone()
    holed[0, 0, 5, 6] = hole
    kept = holed.clone()
    after, valid = depth_to_normals(holed, K, method)
    assert torch.equal(torch.nan_to_num(holed), torch.nan_to_num(kept)), "the input is not changed"
    assert torch.isfinite(after).all()
    changed = (before != after).any(1)[0]
    changed[4:7, 5:8] = False
    assert not changed.any()
    assert float(valid[0, 0, 5, 6]) == 0
    assert (after[0, :, 5, 6] == 0).all()
    assert (valid[0, 0].sum() == 11 * 13 - 1).all()


def test_a_pixel_without_neighbors_is_invalid_and_a_one_sided_difference_is_exact_on_a_plane():
    n = torch.tensor([0.1, -0.9, -0.3], dtype=torch.float64)
    n = n / n.norm()
    depth = plane_depth(n, -2.0)
    depth[..., ::2] = 0.0  # no horizontal neighbor is left
    normals, valid = depth_to_normals(depth, K)
    assert not valid.any()
    assert not normals.any()
    depth = plane_depth(n, -2.0)
    depth[..., ::3] = 0.0
    normals, valid = depth_to_normals(depth, K)
    assert float(angles(normals, n.view(1, 3, 1, 1).expand_as(normals))[valid[:, 0] > 0].max()) < 1e-5
    assert float((valid > 0).double().sum()) == float((depth > 0).double().sum())


def test_filled_holes_have_half_validity_and_the_normal_of_their_plane():
    n = torch.tensor([0.0, -1.0, -0.05], dtype=torch.float64)
    n = n / n.norm()
    depth = plane_depth(n, -1.5, size=(20, 60))
    depth[..., 12:15, 20:26] = 0.0
    normals, valid = depth_to_normals(depth, K, fill=True)
    assert (valid[0, 0, 12:15, 20:26] == 0.5).all()
    inside = angles(normals, n.view(1, 3, 1, 1).expand_as(normals))[0, 12:15, 20:26]
    assert float(inside.median()) < 25  # averages of what is around: roughly the plane
    untouched = torch.ones(20, 60, dtype=torch.bool)
    untouched[11:16, 19:27] = False
    plain, _ = depth_to_normals(depth, K)
    assert torch.equal(plain[0][:, untouched], normals[0][:, untouched])


def test_weighted_differences_keep_a_plane_exact_and_do_not_average_over_a_jump():
    n = torch.tensor([0.2, -0.9, -0.2], dtype=torch.float64)
    n = n / n.norm()
    depth = plane_depth(n, -2.0)
    flat, _ = depth_to_normals(depth, K, edges=True)
    assert float(angles(flat, n.view(1, 3, 1, 1).expand_as(flat)).max()) < 1e-4
    jump = depth.clone()
    jump[..., 30:] = jump[..., 30:] * 3
    errors = []
    for edges in (False, True):
        normals, _ = depth_to_normals(jump, K, edges=edges)
        errors.append(float(angles(normals, n.view(1, 3, 1, 1).expand_as(normals))[0, 5:-5, 29].median()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_from_normals_to_depth_is_exact_and_finite_beside_holes(method):
    torch.manual_seed(2)
    depth = (4 + torch.rand(1, 1, 5, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: depth_to_normals(z, K, method)[0], depth, eps=1e-7, atol=1e-4)
    holed = depth.detach().clone()
    holed[0, 0, 2, 2] = float("nan")
    holed.requires_grad_()
    depth_to_normals(holed, K, method)[0].sum().backward()
    assert torch.isfinite(holed.grad).all()
    assert float(holed.grad[0, 0, 2, 2]) == 0


def test_normals_that_face_the_camera_agree_with_upward_ones_on_the_ground():
    depth, k = road_depth()
    up, valid = depth_to_normals(depth, k)
    facing, _ = depth_to_normals(depth, k, orient="camera")
    v, u = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    rays = torch.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)])
    assert ((facing * rays).sum(1) <= 1e-12).all()
    depth, k = road_depth(domain="roads-flat")  # noise can tip the normals of far pixels over
    up, valid = depth_to_normals(depth, k)
    facing, _ = depth_to_normals(depth, k, orient="camera")
    ground = (valid[0, 0] > 0) & (up[0, 1] < -0.9)
    assert torch.equal(up[0][:, ground], facing[0][:, ground])


def test_a_batch_equals_its_pictures_one_by_one_in_any_precision():
    depths = torch.cat([road_depth(seed)[0] for seed in range(3)]).float()
    ks = torch.stack([road_depth(seed)[1] for seed in range(3)]).float()
    together, valid = SurfaceNormals()(depths, ks)
    for i in range(3):
        one, its = SurfaceNormals()(depths[i : i + 1], ks[i])
        assert torch.equal(one[0], together[i])
        assert torch.equal(its[0], valid[i])
    half, _ = SurfaceNormals()(depths.half(), ks)
    assert half.dtype == torch.float32


def test_a_wrong_shape_or_method_is_refused_in_words():
    with pytest.raises(ValueError, match="expected \\(B, 1, H, W\\)"):
        depth_to_normals(torch.ones(4, 4), K)
    with pytest.raises(ValueError, match="first three columns"):
        depth_to_normals(torch.ones(1, 1, 4, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match="plane, sne, 3f2n, d2nt"):
        depth_to_normals(torch.ones(1, 1, 4, 4), K, "sobel")


def test_resized_normals_are_unit_again_and_holes_stay_out():
    depth, k = road_depth()
    normals, valid = depth_to_normals(depth, k)
    small, share = resize_normals(normals, valid, (16, 32))
    there = share[:, 0] > 0
    assert torch.allclose(small.norm(dim=1)[there], torch.ones(int(there.sum()), dtype=torch.float64))
    assert (small.movedim(1, -1)[~there] == 0).all()
    same, _ = resize_normals(normals, valid, (32, 64))
    assert torch.equal(same, normals)


@pytest.mark.parametrize(("encoding", "most"), [("int8", 0.5), ("oct16", 0.01)])
def test_cached_normals_differ_by_little_and_mirror_as_fresh_ones_do(tmp_path, encoding, most):
    depth, k = road_depth()
    normals, valid = depth_to_normals(depth.float(), k.float(), orient="camera")
    with (tmp_path / NUMBERS).open("wb") as file:
        places = write(file, [("a", normals[0].numpy(), valid[0].numpy())], encoding)

    (tmp_path / INDEX).write_text(json.dumps({"encoding": encoding, "places": places}))
    cache = NormalCache.open(tmp_path)
    read, its = cache.read("a")
    assert np.array_equal(its, valid[0].numpy())
    there = valid[0, 0].numpy() > 0
    off = angles(torch.from_numpy(read)[None].double(), normals.double())[0].numpy()
    assert off[there].max() < most
    assert (read[:, ~there] == 0).all()
    mirrored = flip_normals(normals)[0].numpy()
    again = decode(encode(mirrored, encoding), encoding, (2 * valid[0, 0].flip(-1)).byte().numpy())
    assert np.allclose(again, flip_normals(torch.from_numpy(read)).numpy(), atol=1e-6)
    with pytest.raises(UserError, match="no normals of b"):
        cache.read("b")
    (tmp_path / NUMBERS).write_bytes(b"")
    with pytest.raises(UserError, match="shorter than"):
        NormalCache.open(tmp_path)
