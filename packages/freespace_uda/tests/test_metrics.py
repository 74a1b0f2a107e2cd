"""Counts as KITTI's kit makes them, against a literal form of it; rings, merging, the view from above, the bootstrap."""

import numpy as np
import pytest
from freespace_uda import BirdsEye, FreespaceMeter, bootstrap, gap_closed, to_birdseye
from freespace_uda.birdseye import level_homography, road_homography
from freespace_uda.metrics import histogram, pooled_f1, rates, scores_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score


def devkit(probability, road, valid):
    """The kit's own counting: two histograms with 257 bins of real edges."""
    thresholds = np.arange(256) / 255.0
    edges = np.concatenate(([-np.inf], thresholds, [np.inf]))
    fn = np.cumsum(np.histogram(probability[road & valid], bins=edges)[0])[:256]
    fp = np.flipud(np.cumsum(np.flipud(np.histogram(probability[~road & valid], bins=edges)[0]))[:256])
    positive = int((road & valid).sum())
    tp = positive - fn
    recall = tp / max(positive, 1e-10)
    precision = tp / (tp + fp + 1e-10)
    kept = ~((recall == 0) & (precision == 0))
    p, r = precision[kept], recall[kept]
    best = (2 * p * r / (p + r + 1e-10)).max() if len(p) else 0.0
    ap = np.mean([p[r >= level].max() if (r >= level).any() else 0.0 for level in np.arange(0, 1.1, 0.1)])
    return fn, fp, best, ap


@given(st.integers(0, 2**31), st.floats(0.01, 0.99), st.booleans())
@settings(max_examples=30, deadline=None)
def test_counts_maxf_and_ap_equal_those_of_the_devkit(seed, share, ignoring):
    g = np.random.default_rng(seed)
    scores = g.integers(0, 256, (13, 17)).astype(np.uint8)
    labels = (g.uniform(size=scores.shape) < share).astype(np.uint8)
    if ignoring:
        labels[g.uniform(size=scores.shape) < 0.3] = 255
    fn, fp, best, ap = devkit(scores / 255.0, labels == 1, labels != 255)
    counts = histogram(scores, labels)
    positive = counts[1].sum()
    tp = counts[1][::-1].cumsum()[::-1]
    assert np.array_equal(positive - tp, fn)
    assert np.array_equal(counts[0][::-1].cumsum()[::-1], fp)
    found = rates(counts)
    assert found.max_f == pytest.approx(best, abs=1e-12)
    assert found.ap == pytest.approx(ap, abs=1e-12)


def test_rates_at_one_half_equal_those_of_scikit_learn():
    g = np.random.default_rng(0)
    p, labels = g.uniform(size=(20, 30)), g.integers(0, 2, (20, 30)).astype(np.uint8)
    meter = FreespaceMeter()
    meter.update(p, labels)
    r, said = meter.compute(), (p >= 0.5).ravel()
    truth = labels.ravel()
    assert r.f1 == pytest.approx(f1_score(truth, said))
    assert r.iou == pytest.approx(jaccard_score(truth, said))
    assert r.precision == pytest.approx(precision_score(truth, said))
    assert r.recall == pytest.approx(recall_score(truth, said))
    assert r.f1 == pytest.approx(2 * r.iou / (1 + r.iou))


def test_level_128_and_above_is_exactly_one_half_and_above():
    values = np.array([0.0, 0.4999999, 0.5, 0.5000001, 1.0])
    assert (scores_of(values) >= 128).tolist() == [False, False, True, True, True]


def test_a_perfect_map_has_one_and_a_constant_one_has_two_pi_over_one_plus_pi():
    labels = (np.arange(100) < 30).astype(np.uint8).reshape(10, 10)
    perfect = rates(histogram((labels * 255).astype(np.uint8), labels))
    assert perfect.max_f == pytest.approx(1)
    assert perfect.ap == pytest.approx(1)
    constant = rates(histogram(np.full((10, 10), 77, np.uint8), labels))
    assert constant.max_f == pytest.approx(2 * 0.3 / 1.3)


def test_a_level_of_recall_that_nobody_reaches_counts_nothing():
    empty = rates(histogram(np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)))
    assert empty.max_f == empty.ap == empty.f1 == 0


def test_ignored_pixels_and_their_scores_never_matter():
    g = np.random.default_rng(1)
    p, labels = g.uniform(size=(8, 9)), g.integers(0, 2, (8, 9)).astype(np.uint8)
    labels[2:5] = 255
    found = []
    for _ in range(2):
        meter = FreespaceMeter()
        meter.update(p, labels)
        found.append(meter.compute())
        p = np.where(labels == 255, g.uniform(size=p.shape), p)
    assert found[0] == found[1]


def test_shards_merge_to_the_whole_and_rings_add_up_to_it():
    g = np.random.default_rng(2)
    parts, whole = [FreespaceMeter(), FreespaceMeter()], FreespaceMeter()
    for i in range(5):
        p, labels = g.uniform(size=(8, 9)), g.integers(0, 2, (8, 9)).astype(np.uint8)
        depth = np.where(g.uniform(size=p.shape) < 0.2, 0.0, g.uniform(0.1, 80, p.shape))
        parts[i % 2].update(p, labels, depth)
        whole.update(p, labels, depth)
    merged = parts[0].merge(parts[1])
    assert merged.compute() == whole.compute()
    assert sorted(merged.scenes.tolist()) == sorted(whole.scenes.tolist())
    rings = whole.by_distance()
    assert list(rings) == ["0-10 m", "10-20 m", "20-40 m", "> 40 m", "no depth"]
    assert sum(r.pixels for r in rings.values()) == whole.compute().pixels
    hit, alarm, miss = whole.scenes.sum(0)
    assert whole.compute().f1 == pytest.approx(2 * hit / (2 * hit + alarm + miss))


def test_a_pixel_belongs_to_the_ring_of_its_distance():
    meter = FreespaceMeter()
    depth = np.array([[9.99, 10.0, 19.9, 20.0, 40.0, 0.0, np.nan]])
    meter.update(np.ones((1, 7)), np.ones((1, 7), np.uint8), depth)
    assert meter.counts.sum((1, 2)).tolist() == [1, 2, 1, 1, 2]


def test_wrong_labels_and_sizes_are_refused():
    with pytest.raises(ValueError, match="differ in size"):
        FreespaceMeter().update(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="expected 0, 1 and 255"):
        FreespaceMeter().update(np.ones((2, 2)), np.full((2, 2), 7))
    with pytest.raises(ValueError, match="rings differ"):
        FreespaceMeter().merge(FreespaceMeter((0.0, 5.0)))


def test_the_gap_is_closed_fully_by_the_oracle_and_not_at_all_by_the_source():
    assert gap_closed(0.9, 0.5, 0.9) == pytest.approx(1)
    assert gap_closed(0.5, 0.5, 0.9) == 0
    assert gap_closed(0.5, 0.9, 0.9) == 0


def test_the_bootstrap_pairs_scenes_and_its_interval_covers_the_estimate():
    g = np.random.default_rng(3)
    a = g.integers(10, 50, (3, 40, 3))
    estimate, ci = bootstrap([a, a], lambda x, y: x - y)
    assert estimate == 0
    assert ci == (0, 0)
    better = a.copy()
    better[..., 0] += 40
    estimate, (low, high) = bootstrap([better, a], lambda x, y: 100 * (x - y))
    assert low < estimate < high
    assert low > 0
    assert estimate == pytest.approx(100 * (pooled_f1(better).mean() - pooled_f1(a).mean()))


def test_a_grid_painted_on_the_road_is_regular_from_above():
    k = np.array([[700.0, 0, 620], [0, 700.0, 180], [0, 0, 1]])
    h = level_homography(k, 1.65, 0.02)
    v, u = np.mgrid[0:375, 0:1242]
    there = np.linalg.inv(h) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    x, z = (there[0] / there[2]).reshape(u.shape), (there[1] / there[2]).reshape(u.shape)
    view = BirdsEye(left=-4, right=4, near=6, far=14, cell=0.1)
    squares = ((np.floor(x) + np.floor(z)) % 2).astype(np.uint8)
    above = to_birdseye(squares, h, view)
    at = view.centers()
    wanted = (np.floor(at[..., 0]) + np.floor(at[..., 1])) % 2
    inner = (np.abs(at[..., 0] % 1 - 0.5) < 0.35) & (np.abs(at[..., 1] % 1 - 0.5) < 0.35)
    assert (above == wanted)[inner].mean() > 0.99
    assert BirdsEye().shape == (800, 400)


def test_points_of_the_road_come_back_within_half_a_pixel():
    k = np.array([[700.0, 0, 620], [0, 650.0, 180], [0, 0, 1]])
    height, pitch = 1.6, 0.05
    h = level_homography(k, height, pitch)
    c, s = np.cos(pitch), np.sin(pitch)
    for x, z in ((0.0, 8.0), (3.0, 20.0), (-4.0, 40.0)):
        camera = np.array([x, c * height - s * z, s * height + c * z])
        pixel = k @ camera
        again = h @ np.array([x, z, 1])
        assert np.abs(pixel[:2] / pixel[2] - again[:2] / again[2]).max() < 1e-6


def test_kittis_transform_and_a_level_camera_agree():
    p2 = np.array([[700.0, 0, 620, 0], [0, 700.0, 180, 0], [0, 0, 1, 0]])
    # road = camera moved up by 1.65 m: y of the road plane is 0
    to_road = np.array([[1.0, 0, 0, 0], [0, 1, 0, -1.65], [0, 0, 1, 0]])
    assert np.allclose(road_homography(p2, np.eye(3), to_road), level_homography(p2[:, :3], 1.65, 0.0))
