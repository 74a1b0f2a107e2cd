"""Rendered hands: the same for a seed, and labels that fit the pixels."""

import hashlib

import numpy as np
import pytest
import torch
from handmstn import ControlPointGrid, SyntheticHands, preset
from handmstn.rendering import identity_textures


def pixels(hands):
    return hashlib.sha256(hands.rendered.images.tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_pixels_and_another_seed_or_domain_others():
    a, b = SyntheticHands(2, 2, 48, 3), SyntheticHands(2, 2, 48, 3)
    assert pixels(a) == pixels(b)
    assert len({pixels(a), pixels(SyntheticHands(2, 2, 48, 4)), pixels(SyntheticHands(2, 2, 48, 3, domain="b"))}) == 3


def test_a_person_looks_the_same_in_whatever_set_they_are():
    first, second = SyntheticHands(3, 2, 48, 0), SyntheticHands(1, 2, 48, 0, first=2)
    assert np.array_equal(first.rendered.images[4:], second.rendered.images)
    assert not np.allclose(identity_textures(0, 1)[0], identity_textures(0, 2)[0])


def test_crops_at_the_true_points_show_the_persons_own_creases():
    hands = SyntheticHands(2, 3, 160, 5, upright=True, jpeg=False)
    parts = preset("hand6", 64, (48, 16))
    grid = ControlPointGrid(parts)
    images = torch.from_numpy(hands.rendered.images).float() / 255
    crops = grid.crops(images, grid(torch.from_numpy(hands.rendered.points)))[0].mean(1)
    fine = crops - torch.nn.functional.avg_pool2d(crops[:, None], 15, 1, 7)[:, 0]
    fine = fine[:, 8:-8, 8:-8].flatten(1)
    alike = np.corrcoef(fine.numpy())
    same, other = alike[0, 1:3].mean(), alike[0, 3:].mean()
    assert same > 0.4
    assert same > other + 0.3


def test_the_points_lie_on_the_hand_and_what_is_covered_is_not_in_the_mask():
    hands = SyntheticHands(4, 4, 96, 1)
    r = hands.rendered
    assert r.points.shape == (16, 39, 2)
    assert r.visibility.min() >= 0
    assert r.visibility.max() <= 1
    assert 0.2 < (r.visibility[:, 0] < 0.99).mean() < 0.8
    middle = ((r.points[:, 4] + 1) / 2 * 95).round().astype(int)  # of the palm
    inside = np.asarray([r.masks[i, y, x] for i, (x, y) in enumerate(middle)])
    assert inside[r.visibility[:, 0] > 0.9].mean() > 0.9
    free = r.visibility[:, 0] == 1
    assert r.masks[free].mean() > r.masks[~free].mean()


def test_a_sample_has_picture_label_points_visibility_and_mask():
    hands = SyntheticHands(2, 2, 48, 0)
    item = hands[3]
    assert item["image"].shape == (3, 48, 48)
    assert item["label"] == 1
    assert item["points"].shape == (39, 2)
    assert item["visibility"].shape == (6,)
    assert item["mask"].dtype == torch.bool
    with pytest.raises(ValueError, match="16 pixels or more"):
        SyntheticHands(1, 1, 8)
