import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from visctrl import metrics
from visctrl.blobs import APART, render_pairs
from visctrl.errors import ShapeMismatchError
from visctrl.guard import DriftGuard, clipped
from visctrl.masks import blend, crop_subject, paste_back, to_images, to_pictures
from visctrl.provenance import (
    COLORS,
    Origins,
    Trace,
    color_map,
    color_name,
    provenance_of,
    provenance_picture,
    reference_picture,
)
from visctrl.selection import Keys, token_grid


def photo(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def box(height=40, width=60, top=10, bottom=30, left=5, right=45):
    mask = np.zeros((height, width), np.float32)
    mask[top:bottom, left:right] = 1
    return mask


@given(st.integers(1, 30), st.integers(1, 30), st.integers(16, 48))
@settings(max_examples=25, deadline=None)
def test_a_crop_keeps_the_aspect_ratio_is_centered_and_pastes_back_to_the_photograph(h, w, size):
    picture, mask = photo(), box(top=5, bottom=5 + h, left=9, right=9 + w)
    crop = crop_subject(picture, mask, size)
    top, left, bottom, right = crop.inner
    assert crop.picture.shape == (size, size, 3)
    assert abs((bottom - top) * w - (right - left) * h) <= max(h, w)
    assert abs(top - (size - bottom)) <= 1
    assert abs(left - (size - right)) <= 1
    assert (crop.picture[0] == 255).all()
    assert np.array_equal(paste_back(crop.picture, crop, picture, mask), picture)
    edited = np.zeros_like(crop.picture)
    out = paste_back(edited, crop, picture, mask)
    assert (out[mask > 0] == 0).all()
    assert np.array_equal(out[mask == 0], picture[mask == 0])


def test_a_feathered_blend_leaves_the_photograph_outside_of_the_mask_bit_for_bit_and_meets_it_softly():
    picture, edited, mask = photo(), photo(seed=1), box()
    out = blend(picture, edited, mask, feather=4)
    assert np.array_equal(out[mask == 0], picture[mask == 0])
    inner = ndimage.binary_erosion(mask > 0, iterations=5)
    assert np.array_equal(out[inner], edited[inner])
    rim = (mask > 0) & ~ndimage.binary_erosion(mask > 0)
    assert not np.array_equal(out[rim], edited[rim])


def test_masks_of_another_size_and_empty_ones_are_refused():
    with pytest.raises(ShapeMismatchError, match="50 x 40 pixels, the picture has 60 x 40"):
        crop_subject(photo(), box(width=50), 16)
    with pytest.raises(ValueError, match="no pixel of the subject"):
        crop_subject(photo(), 0.3 * box(), 16)
    with pytest.raises(ValueError, match="margin"):
        crop_subject(photo(), box(), 16, margin=0.5)
    crop = crop_subject(photo(), box(), 16)
    with pytest.raises(ShapeMismatchError, match="edited square"):
        paste_back(photo(), crop, photo(), box())
    with pytest.raises(ShapeMismatchError, match="different sizes"):
        to_images([photo(), photo(20, 20)])


def test_pictures_of_odd_sizes_are_padded_and_come_back_bit_for_bit():
    picture = photo(13, 17)
    x = to_images([picture], 8)
    assert x.shape == (1, 3, 16, 24)
    assert np.array_equal(to_pictures(x, 13, 17)[0], picture)


def test_the_guard_fires_on_planted_drift_and_is_silent_without():
    guard = DriftGuard(0.1, 0.05)
    calm = torch.zeros(2, 3, 8, 8)
    loud = calm.clone()
    loud[1] += 1.5
    assert guard.after(calm, calm) == ["", ""]
    assert [bool(x) for x in guard.after(loud, calm)] == [False, True]
    assert guard.after(loud, loud) == ["", ""], "what the target had already is no drift"
    assert [bool(x) for x in guard.before(torch.tensor([0.05, 0.2]), True)] == [False, True]
    assert guard.before(torch.tensor([0.05, 0.2]), False) == ["", ""]
    assert clipped(loud).tolist() == [0.0, 1.0]


def test_the_guard_fires_where_shapes_melt_after_the_first_round_and_not_where_colors_change():
    guard = DriftGuard(0.1, 0.05, 0.05)
    pairs = render_pairs(4, 3)
    target, first = pairs.target.images, pairs.ideal
    brighter = 0.7 * first + 0.3 * pairs.target.images
    melted = torch.nn.functional.avg_pool2d(first, 9, 1, 4, count_include_pad=False)
    assert guard.after(melted, target) == [""] * 4, "what the first round changes is meant"
    assert guard.after(brighter, target, first) == [""] * 4
    assert all("layout" in reason for reason in guard.after(melted, target, first))
    assert guard.after(melted, target, melted) == [""] * 4


def test_metrics_know_the_untouched_target_and_the_ideal():
    p = render_pairs(8, 3)
    t, m = p.target.images, p.target.masks
    assert torch.allclose(metrics.transfer(t, t, p.ideal, m), torch.zeros(8), atol=1e-6)
    assert torch.allclose(metrics.transfer(p.ideal, t, p.ideal, m), torch.ones(8), atol=1e-5)
    assert torch.allclose(metrics.transfer((t + p.ideal) / 2, t, p.ideal, m), torch.full((8,), 0.5), atol=1e-5)
    assert (metrics.overlap(p.ideal, m) > 0.95).all()
    assert (metrics.overlap(p.reference.images, m) < 0.8).all()
    assert (metrics.rmse(p.ideal, p.ideal) == 0).all()
    matched = metrics.match_colors(t, p.reference.images, m, p.reference.masks)
    assert (metrics.rmse(matched, p.ideal) < 0.35 * metrics.rmse(t, p.ideal)).all()


def test_psnr_and_ssim_are_those_of_their_definitions():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = (np.random.default_rng(i).random((24, 24)) for i in (0, 1))
    x, y = (torch.from_numpy(2 * v - 1)[None, None].expand(1, 3, -1, -1) for v in (a, b))
    assert float(metrics.psnr(x, y)) == pytest.approx(peak_signal_noise_ratio(2 * a - 1, 2 * b - 1, data_range=2))
    want = structural_similarity(
        2 * a - 1, 2 * b - 1, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )[1]
    inner = torch.zeros(1, 24, 24)
    inner[:, 6:-6, 6:-6] = 1
    assert float(metrics.ssim(x, y, inner)) == pytest.approx(want[6:-6, 6:-6].mean(), abs=1e-6)


def test_hues_of_a_pair_lie_apart():
    import colorsys

    p = render_pairs(20, 0)
    for i in range(20):
        hues = [colorsys.rgb_to_hsv(*((x.colors[i] + 1) / 2).tolist())[0] for x in (p.target, p.reference, p.wrong)]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            d = abs(hues[a] - hues[b])
            assert min(d, 1 - d) >= APART - 1e-6


def test_provenance_is_the_largest_attention_averaged_over_heads():
    torch.manual_seed(0)

    class Layer:
        heads = 2
        to_q = torch.nn.Linear(8, 8)
        to_k = torch.nn.Linear(8, 8)

    h, other = torch.randn(1, 6, 8), torch.randn(1, 5, 8)
    both = torch.cat([h[:, :2], other], dim=1)
    trace = Trace(0, 10)
    positions, numbers = torch.tensor([[0, 1, *range(10, 15)], [-1, -1, 0, 0, 1, 1, 1]])[:, None]
    trace.take(Layer, h, Keys(both, None, 2, positions, numbers))
    want = []
    for n in range(6):
        total = torch.zeros(7)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            total += (both[0] @ Layer.to_k.weight.T + Layer.to_k.bias)[:, part].mul(
                (h[0, n] @ Layer.to_q.weight.T + Layer.to_q.bias)[part]
            ).sum(dim=1).div(2).softmax(dim=0) / 2
        want.append((10 + int(total[2:].argmax()), float(total[2:].max()), float(total[2:].sum())))
    assert trace.source[0].tolist() == [x[0] for x in want]
    assert trace.reference[0].tolist() == [int(x[0] >= 12) for x in want]
    assert torch.allclose(trace.confidence[0], torch.tensor([x[1] for x in want]))
    assert torch.allclose(trace.share[0], torch.tensor([x[2] for x in want]))


def test_a_provenance_picture_has_the_colors_of_the_places_and_white_for_nothing():
    colors = color_map((3, 4))
    assert (colors[0, 0] == [0, 0, 255]).all()
    assert (colors[2, 3] == [255, 255, 0]).all()
    origins = Origins(torch.tensor([0, 11, 5]), torch.zeros(3, dtype=torch.long), torch.tensor([1.0, 1.0, 0.0]))
    picture = provenance_picture(origins, (1, 3), [(3, 4)])
    assert picture.tolist() == [[[0, 0, 255], [255, 255, 0], [255, 255, 255]]]


def test_of_several_references_each_part_says_which_one_it_came_from_and_its_place_there():
    origins = Origins(torch.tensor([3, 3, 0]), torch.tensor([0, 2, 11]), torch.ones(3))
    places = provenance_picture(origins, (1, 3), [(2, 2), (9, 9), (4, 4), *[(1, 1)] * 9])[0]
    assert (places[0] == color_map((2, 2))[1, 1]).all()
    assert (places[1] == color_map((4, 4))[0, 3]).all()
    pictures = reference_picture(origins, (1, 3))[0].tolist()
    assert [tuple(x) for x in pictures] == [COLORS[color_name(j)] for j in (0, 2, 11)]
    found = provenance_of([origins], (1, 3), [(2, 2)] * 12)
    assert found.shares[0] == pytest.approx([1 / 3, 0, 1 / 3, *[0] * 8, 1 / 3])


def test_token_grids_follow_halvings_that_round_up():
    assert token_grid((9, 7), 20) == (5, 4)
    assert token_grid((8, 8), 64) == (8, 8)
    with pytest.raises(ShapeMismatchError, match="no grid"):
        token_grid((8, 8), 17)
