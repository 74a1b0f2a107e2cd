"""Control points, grids and crops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from handmstn.aligner import MultiSpatialTransformer, near, quartered
from handmstn.parts import PartSpec, from_landmarks, landmarks_21, mirror_points, palm_part, preset
from handmstn.warping import (
    ControlPointGrid,
    check_finite,
    compose,
    fit_similarity,
    grid_matrix,
    similarity,
    spline_kernel,
    spline_system,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RBFInterpolator

SQUARE = ((-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))
FAMILIES = ["tps", "affine", "similarity"]


def part(family="tps", size=(9, 7), points=SQUARE):
    return PartSpec("p", points, size, family)


def template(spec):
    return torch.tensor(spec.points, dtype=torch.float64)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_itself_gives_the_identity_grid_and_the_picture(family):
    spec = part(family, (16, 16))
    grid = ControlPointGrid([spec])
    found = grid(template(spec).float())
    y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
    assert torch.allclose(found[0], torch.stack([x, y], -1).view(-1, 2), atol=1e-6)
    image = torch.rand(1, 3, 16, 16)
    assert torch.allclose(grid.crops(image, found)[0], image, atol=1e-5)


@pytest.mark.parametrize("family", ["tps", "affine"])
def test_rows_of_the_matrix_sum_to_one_and_the_grid_is_affine_equivariant(family):
    spec = part(family, points=palm_part().points)
    m = grid_matrix(spec)
    assert torch.allclose(m.sum(1), torch.ones(len(m), dtype=torch.float64), atol=1e-12)
    s = torch.randn(len(spec.points), 2, dtype=torch.float64)
    a, b = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    assert torch.allclose(m @ (s @ a.T + b), (m @ s) @ a.T + b, atol=1e-11)


def test_a_similarity_grid_is_equivariant_to_similarities_and_keeps_the_shape_of_a_strip():
    spec = PartSpec("p-0-1", ((0.0, 1.0), (0.0, -1.0)), (32, 16), "similarity", extent=(0.5, 1.0))
    grid = ControlPointGrid([spec])
    points = torch.tensor([[[0.1, 0.6], [0.1, -0.6]]])
    g = grid(points).view(32, 16, 2)
    assert torch.allclose(g[0, :, 1], torch.full((16,), -0.6), atol=1e-6)
    assert torch.allclose(g[0, -1, 0] - g[0, 0, 0], torch.tensor(0.6), atol=1e-6)  # half as wide as it is long
    t = similarity(torch.tensor([[0.6, 0.8]]), torch.tensor([0.3]), torch.tensor([[0.1, -0.2]]))
    assert torch.allclose(grid(compose(t, points)), compose(t, grid(points)), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_the_spline_equals_scipys_thin_plate_interpolator_and_passes_through_the_points(seed):
    spec = part(points=palm_part().points, size=(11, 13))
    target = np.random.default_rng(seed).normal(0, 0.5, (9, 2))
    ours = ControlPointGrid([spec])(torch.from_numpy(target).float()[None])[0]
    y, x = np.meshgrid(np.linspace(-1, 1, 11), np.linspace(-1, 1, 13), indexing="ij")
    oracle = RBFInterpolator(np.asarray(spec.points), target, kernel="thin_plate_spline", degree=1)
    assert np.abs(ours.numpy() - oracle(np.stack([x, y], -1).reshape(-1, 2))).max() < 1e-5
    bend, affine = spline_system(torch.tensor(spec.points, dtype=torch.float64))
    at = torch.tensor(spec.points, dtype=torch.float64)
    kernel = spline_kernel((at[:, None] - at[None]).square().sum(-1))
    s = torch.from_numpy(target)
    through = kernel @ (bend @ s) + torch.cat([torch.ones(9, 1, dtype=torch.float64), at], 1) @ (affine @ s)
    assert torch.allclose(through, s, atol=1e-10)


def test_kornias_spline_is_equal_at_the_points_and_everywhere_for_affine_placements():
    """Its kernel is centered on the targets, so between the points it is another interpolant."""
    kornia = pytest.importorskip("kornia")
    spec = part(points=palm_part().points, size=(9, 9))
    source = torch.tensor(spec.points, dtype=torch.float64)[None]
    pixels = ControlPointGrid([spec])(source.float()).double()  # where the template is
    for target, affine in ((source + 0.2 * torch.randn(1, 9, 2), False), (0.5 * source.flip(2) + 0.1, True)):
        weights, linear = kornia.geometry.transform.get_tps_transform(source, target)
        warp = kornia.geometry.transform.warp_points_tps
        ours = ControlPointGrid([spec])(target.float()).double()
        assert torch.allclose(warp(source, target, weights, linear), target, atol=1e-4)
        theirs = warp(pixels, target, weights, linear)
        at = [int((pixels - p).square().sum(-1).argmin()) for p in source[0]]
        assert torch.allclose(ours[0, at], theirs[0, at], atol=1e-4)
        assert torch.allclose(ours, theirs, atol=1e-4) == affine


def test_the_bending_energy_is_that_of_the_splines_weights_and_zero_for_affine_placements():
    spec = palm_part(8)
    grid = ControlPointGrid([spec])
    s = torch.randn(4, 9, 2)
    bend, _ = spline_system(torch.tensor(spec.points, dtype=torch.float64))
    at = torch.tensor(spec.points, dtype=torch.float64)
    kernel = spline_kernel((at[:, None] - at[None]).square().sum(-1))
    w = bend @ s.double()
    expected = 0.5 * torch.einsum("bkc,kl,blc->b", w, kernel, w)
    found = grid.bending_energy(s)[:, 0]
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    assert bool((found >= 0).all())
    affine = at.float() @ torch.randn(2, 2) + torch.randn(2)
    assert torch.allclose(grid.bending_energy(s + affine), grid.bending_energy(s), atol=1e-3)
    s = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(grid.bending_energy(s).sum(), s)
    assert torch.allclose(gradient, bend.float() @ s, atol=1e-4)  # of 1/2 s^T L s


def test_points_to_crops_is_differentiable_and_a_part_outside_has_no_gradient():
    spec = part(points=palm_part().points, size=(4, 4))
    matrix = grid_matrix(spec)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12), indexing="ij")
    image = (torch.sin(2 * x) * torch.cos(y))[None, None].double()

    def mean(points):
        return F.grid_sample(image, (matrix @ points).view(1, 4, 4, 2), align_corners=True).mean()

    torch.manual_seed(1)
    inside = (0.31 * template(spec) + 0.013 * torch.randn(1, 9, 2)).requires_grad_()
    assert torch.autograd.gradcheck(mean, inside, eps=1e-7, atol=1e-4)
    grid = ControlPointGrid([spec, part(points=palm_part().points, size=(5, 5))])
    points = torch.cat([0.3 * template(spec), 0.3 * template(spec) + 9], 1).float().requires_grad_()
    sum(c.square().sum() for c in grid.crops(image.float(), grid(points))).backward()
    assert points.grad[0, :9].abs().sum() > 0
    assert not points.grad[0, 9:].any()
    assert grid.outside(grid(points.detach())).tolist() == [[0.0, 1.0]]


def test_one_sampling_call_equals_one_call_per_part_forward_and_backward():
    parts = preset("hand6", 24, (20, 8))
    grid = ControlPointGrid(parts)
    torch.manual_seed(0)
    points = torch.cat([torch.from_numpy(p.start) for p in parts]).float() + 0.05 * torch.randn(3, 39, 2)
    results = []
    for together in (True, False):
        image = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
        s = points.clone().requires_grad_()
        grids = grid(s)
        if together:
            crops = grid.crops(image, grids)
        else:
            each = grids.split(grid.pixels, 1)
            crops = [
                F.grid_sample(image, g.view(3, *p.out_size, 2), align_corners=True)
                for g, p in zip(each, parts, strict=True)
            ]
        sum((c * c).sum() for c in crops).backward()
        results.append((torch.cat([c.flatten() for c in crops]).detach(), s.grad, image.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def test_composed_levels_sample_a_ramp_without_the_blur_of_a_second_resampling():
    spec = part(points=palm_part().points, size=(8, 8))
    grid = ControlPointGrid([spec])
    ramp = torch.linspace(-1, 1, 33)
    sharp = (ramp[None].expand(33, 33) * 40).sin()[None, None]
    t = similarity(torch.tensor([[0.9, 0.43]]), torch.tensor([-0.7]), torch.tensor([[0.05, 0.02]]))
    points = 0.5 * template(spec).float()
    line = torch.linspace(-1, 1, 33).expand(33, 33)[None, None]
    once = grid.crops(line, grid(compose(t, points)))[0]
    assert torch.allclose(once[0, 0].flatten(), grid(compose(t, points))[0, :, 0], atol=1e-5)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="ij")
    view = compose(t, torch.stack([x, y], -1).view(1, -1, 2)).view(1, 33, 33, 2)
    twice = grid.crops(F.grid_sample(sharp, view, align_corners=True), grid(points))[0]
    assert (grid.crops(sharp, grid(compose(t, points)))[0] - twice).abs().max() > 0.05


def test_mirrored_points_are_an_involution_and_mirrored_pictures_give_mirrored_crops():
    parts = preset("hand6", 24, (20, 8))
    grid = ControlPointGrid(parts)
    points = torch.cat([torch.from_numpy(p.start) for p in parts]).float()[None] + 0.03 * torch.randn(1, 39, 2)
    flipped = mirror_points(points.numpy(), parts)
    assert np.allclose(mirror_points(flipped, parts), points)
    image = torch.rand(1, 3, 32, 32)
    a = grid.crops(image, grid(points))
    b = grid.crops(image.flip(-1), grid(torch.from_numpy(flipped)))
    for one, other in zip(a, b, strict=True):
        assert torch.allclose(one, other.flip(-1), atol=1e-4)


@pytest.mark.parametrize(
    ("points", "family", "message"),
    [
        (((0, 0), (1, 1)), "tps", "needs 3 points or more, got 2"),
        (((0, 0),), "similarity", "needs 2 points"),
        (((0, 0), (1, 1), (2, 2)), "tps", "one line"),
        (((0, 0), (0, 0), (1, 0), (0, 1)), "affine", "points 0 and 1 are the same"),
    ],
)
def test_templates_that_fix_no_map_are_refused(points, family, message):
    with pytest.raises(ValueError, match=message):
        PartSpec("p", points, (4, 4), family)


def test_a_point_that_is_not_finite_is_named_by_sample_and_part():
    parts = preset("hand6")
    points = torch.zeros(2, 39, 2)
    points[1, 10, 0] = float("nan")
    with pytest.raises(ValueError, match="sample 1: a control point of the part 'thumb'"):
        check_finite(points, parts)
    with pytest.raises(ValueError, match=r"expected points \(B, 39, 2\)"):
        ControlPointGrid(parts)(torch.zeros(1, 9, 2))


def test_an_untrained_aligner_puts_every_part_where_an_upright_hand_has_it():
    parts = preset("hand6", 24, (20, 8))
    for levels in (1, 2):
        torch.manual_seed(0)
        head = "dense" if levels == 1 else "places"
        aligner = MultiSpatialTransformer(parts, "hand:loc6", levels, 48, head=head).eval()
        found = aligner(torch.rand(2, 3, 64, 64))
        pose = torch.cat([torch.from_numpy(p.start) for p in parts]).float()
        assert (found.points - pose).abs().max() < 0.1
        assert found.visibility.shape == (2, 6)
    with pytest.raises(ValueError, match="gray ones need 3 channels"):
        aligner(torch.rand(2, 1, 64, 64))


def test_quarter_turns_of_a_picture_are_turned_back_before_they_vote(monkeypatch):
    parts = preset("eeprnet", 16)
    aligner = MultiSpatialTransformer(parts, "hand:loc", 2, 32).eval()
    line = torch.linspace(-1, 1, 32)
    y, x = torch.meshgrid(line, line, indexing="ij")

    def brightest(pictures):
        """A level 0 that knows the direction and the place of what is bright, whatever the angle."""
        weight = pictures.mean(1) - pictures.mean(1).amin((1, 2), keepdim=True)
        at = torch.stack([(weight * axis).sum((1, 2)) / weight.sum((1, 2)) for axis in (x, y)], 1)
        return compose(similarity(at, torch.zeros(len(at)), at), aligner.pose.expand(len(at), -1, -1))

    monkeypatch.setattr(aligner, "_first", brightest)
    pictures = torch.rand(3, 3, 32, 32)
    pictures[:, :, 4:12, 20:28] += 3.0
    four, turned = aligner(pictures).transform, aligner(torch.rot90(pictures, 1, (2, 3))).transform
    aligner.votes = 1
    assert torch.allclose(four, aligner(pictures).transform, atol=1e-5)
    assert torch.allclose(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) @ four, turned, atol=1e-5)


def test_a_picture_turned_by_a_quarter_keeps_its_points_on_the_same_pixels():
    pictures = torch.rand(24, 3, 9, 9)
    places = torch.randint(9, (24, 5, 2), generator=torch.Generator().manual_seed(0))
    points = places / 4 - 1.0  # the centers of pixels, (x, y)
    turned, moved = quartered(pictures, points, torch.Generator().manual_seed(1))
    at = ((moved + 1) * 4).round().long()
    before = pictures[torch.arange(24)[:, None], :, places[..., 1], places[..., 0]]
    assert torch.equal(turned[torch.arange(24)[:, None], :, at[..., 1], at[..., 0]], before)
    assert len({tuple(row.tolist()) for row in (moved[:, 0] - points[:, 0]).sign()}) > 1


def test_level_1_trains_in_frames_that_it_is_given_and_leaves_level_0_alone():
    parts = preset("eeprnet", 16)
    aligner = MultiSpatialTransformer(parts, "hand:loc", 2, 32).train()
    picture = torch.rand(4, 3, 32, 32)
    frames = near(torch.eye(2, 3).expand(4, 2, 3).clone(), torch.Generator().manual_seed(0))
    frames[2:] = float("nan")
    found = aligner(picture, frames)
    own = aligner(picture).transform
    spots = aligner.pose.expand(4, -1, -1)
    assert (found.points[:2] - compose(frames[:2], spots[:2])).abs().max() < 0.05
    assert (found.points[2:] - compose(own[2:], spots[2:])).abs().max() < 0.05
    found.points.square().sum().backward()
    grads = [[p.grad for p in net.parameters()] for net in aligner.nets]
    assert all(g is None for g in grads[0])
    assert all(g is not None for g in grads[1])


def test_21_landmarks_of_the_canonical_hand_give_the_canonical_points():
    parts = preset("hand6")
    found = from_landmarks(landmarks_21(), parts)
    pose = np.concatenate([p.start for p in parts])
    assert np.abs(found[:9] - pose[:9]).max() < 1e-5
    assert np.abs(found - pose).max() < 0.16
    segments = from_landmarks(landmarks_21(), preset("hand21"))
    assert np.allclose(segments, np.concatenate([p.start for p in preset("hand21")]), atol=1e-6)
    with pytest.raises(ValueError, match="expected 21 landmarks"):
        from_landmarks(np.zeros((20, 2)), parts)


def test_a_fitted_similarity_is_the_least_squares_one():
    torch.manual_seed(0)
    source = torch.randn(7, 2)
    t = similarity(torch.randn(3, 2), torch.randn(3) * 0.3, torch.randn(3, 2))
    target = compose(t, source.expand(3, -1, -1))
    assert torch.allclose(fit_similarity(source, target), t, atol=1e-4)
