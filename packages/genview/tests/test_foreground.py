"""Principal directions in pieces, thresholds, signs, levels."""

import math

import numpy as np
import pytest
import torch
from genview.foreground import ForegroundModel, StreamingPCA, center_margin, exact_threshold, grid_of, soft_maps
from genview.levels import AdaptivePolicy, ConstantPolicy, RandomPolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import UserError

K = 6


def tokens(n=12, side=6, seed=0, *, centered=True):
    """Tokens whose direction e1 is large on a square object, in the middle or at the border."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(n, side, side, K, generator=draw)
    a, b = (side // 4, side - side // 4) if centered else (0, 2)
    x[:, a:b, a:b, 0] += 3
    return x.flatten(1, 2) + 40.0


def fit(x, **options):
    return ForegroundModel.fit(lambda: torch.split(x, 5), encoder="test", **options)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99), st.floats(0, 1e4))
def test_pieces_in_any_number_and_order_give_the_whole_covariance(sizes, seed, mean):
    draw = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, K, generator=draw, dtype=torch.float64) + mean for n in [*sizes, 9]]
    whole = torch.cat(parts).numpy()
    left, right = StreamingPCA(K), StreamingPCA(K)
    for number, part in enumerate(parts):
        (left if number % 2 else right).update(part)
    right.merge(left)
    expected = np.cov(whole, rowvar=False)
    assert np.allclose(right.covariance(), expected, rtol=1e-6, atol=1e-6)
    values, vectors = np.linalg.eigh(expected)
    assert abs(float(right.components()[0] @ torch.from_numpy(vectors[:, -1].copy()))) > 1 - 1e-6 or (
        values[-1] - values[-2] < 1e-6
    )


def test_a_planted_direction_is_found_also_with_fewer_tokens_than_dimensions():
    direction = torch.nn.functional.normalize(torch.randn(50), dim=0)
    pca = StreamingPCA(50)
    pca.update(100 + 5 * torch.randn(20, 1) * direction + 0.01 * torch.randn(20, 50))
    assert abs(float(pca.components()[0].float() @ direction)) > 0.999
    with pytest.raises(ValueError, match="two vectors"):
        StreamingPCA(3).covariance()


@pytest.mark.parametrize("quantile", [0.5, 0.6, 0.65])
def test_the_threshold_leaves_its_share_above_to_one_token(quantile):
    x = tokens(10)
    ratio = fit(x, quantile=quantile).ratio(x)
    assert float(ratio.mean()) == pytest.approx(1 - quantile, abs=1.01 / (10 * 36))
    counts = ratio * 36
    assert torch.allclose(counts, counts.round(), atol=1e-4)


def test_ratios_fall_as_the_threshold_rises():
    x = torch.randn(100)
    assert exact_threshold(x, 0.3) < exact_threshold(x, 0.6)
    with pytest.raises(ValueError, match="quantile"):
        exact_threshold(x, 1.0)


def test_the_side_of_the_foreground_is_that_of_the_middle():
    for sign in (1, -1):
        model = fit(sign * tokens(), quantile=0.5)
        mask = model.mask(sign * tokens()).view(-1, 6, 6)
        assert bool(mask[:, 2:4, 2:4].all())
        assert model.margin > 0.5


def test_an_object_at_the_border_needs_the_users_sign():
    x = tokens(centered=False)
    auto = fit(x, quantile=0.85)
    other = fit(x, quantile=0.85, sign="-1" if auto.direction[auto.direction.abs().argmax()] > 0 else "+1")
    assert torch.allclose(other.direction, -auto.direction)
    assert bool(other.mask(x).view(-1, 6, 6)[:, :2, :2].all())


def test_a_side_that_is_a_guess_is_warned_about_with_its_margin():
    torch.manual_seed(0)
    x = torch.randn(400, 1, 1, K).expand(-1, 4, 4, K).flatten(1, 2) + 1e-3 * torch.randn(400, 16, K)
    with pytest.warns(UserWarning, match="is a guess"):
        model = fit(x)
    assert abs(model.margin) < 0.05


def test_turning_direction_and_threshold_gives_the_complement():
    x = tokens()
    model = fit(x)
    turned = ForegroundModel(
        -model.direction, model.mean, -model.threshold, 0.4, "test", model.grid, model.margin, "+1", 12
    )
    on_edge = (model.project(x) == model.threshold).float().mean(dim=1)
    assert torch.allclose(turned.ratio(x) + on_edge, 1 - model.ratio(x), atol=1e-6)


def test_a_model_is_read_as_it_was_written_and_refused_for_another_encoder(tmp_path):
    model = fit(tokens())
    model.save(tmp_path / "f.safetensors")
    again = ForegroundModel.load(tmp_path / "f.safetensors", encoder="test")
    assert torch.equal(again.ratio(tokens()), model.ratio(tokens()))
    assert again.grid == (6, 6)
    with pytest.raises(UserError, match="of test, expected one of timm:other"):
        ForegroundModel.load(tmp_path / "f.safetensors", encoder="timm:other")
    with pytest.raises(ValueError, match="6"):
        model.project(torch.zeros(1, 36, 5))


def test_a_grid_that_is_not_square_has_to_be_given():
    with pytest.raises(ValueError, match="give the grid"):
        grid_of(35)
    assert grid_of(35, (5, 7)) == (5, 7)
    assert center_margin(torch.zeros(2, 35), (5, 7)) == 0


def test_soft_maps_are_finite_for_constant_tokens_and_sum_to_one():
    front, back = soft_maps(torch.zeros(2, 9))
    assert bool(front.isfinite().all())
    assert torch.allclose(back.sum(dim=1), torch.ones(2))
    front, back = soft_maps(torch.randn(3, 9))
    assert torch.allclose(front.sum(dim=1), torch.ones(3), atol=1e-5)


def test_levels_are_those_of_the_published_bins_for_every_ratio_of_tokens():
    policy = AdaptivePolicy()
    for n in (25, 49, 64, 196, 256):
        for k in range(n + 1):
            expected = 100 * min(4, max(0, -(-5 * k // n) - 1))
            assert policy(k / n) == expected, (k, n)


def test_levels_rise_with_the_foreground():
    levels = [AdaptivePolicy()(k / 100) for k in range(101)]
    assert levels == sorted(levels)
    assert levels[-1] == 400


@pytest.mark.parametrize("ratio", [1.01, -0.1, math.nan])
def test_a_ratio_that_is_none_is_refused(ratio):
    for policy in (AdaptivePolicy(), ConstantPolicy(3), RandomPolicy()):
        with pytest.raises(ValueError, match="ratio"):
            policy(ratio, 0)


def test_policies_that_make_no_sense_are_refused():
    for make in (
        lambda: AdaptivePolicy((0.4, 0.2), (0, 1, 2)),
        lambda: AdaptivePolicy((0.2,), (0, 1, 2)),
        lambda: AdaptivePolicy((0.2,), (0, 1000)),
        lambda: ConstantPolicy(1000),
        lambda: RandomPolicy(()),
    ):
        with pytest.raises(ValueError, match=r"edges|levels|level"):
            make()


def test_random_levels_depend_on_seed_and_number_alone_and_are_even():
    policy = RandomPolicy(seed=3)
    drawn = [policy(0.5, i) for i in range(2000)]
    assert drawn == [policy(0.1, i) for i in range(2000)]
    assert drawn != [RandomPolicy(seed=4)(0.5, i) for i in range(2000)]
    for level in (0, 100, 200, 300, 400):
        assert abs(drawn.count(level) - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8)
