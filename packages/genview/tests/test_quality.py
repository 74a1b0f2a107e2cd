"""Quality of pairs: symmetric, invariant, exact where a closed form is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from genview.foreground import ForegroundModel
from genview.quality import QualityScorer, Tokens, crop_maps, pair_quality
from genview.weights import pair_weights

from tenfold import UserError

N, L, K = 9, 16, 5


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, L, K, generator=draw) for _ in range(2))
    return a, b, F.normalize(torch.randn(K, generator=draw), dim=0)


def test_turning_the_direction_turns_quality(pairs):
    a, b, u = pairs
    q, turned = pair_quality(a, b, u).q, pair_quality(a, b, -u).q
    assert torch.allclose(q, -turned, atol=1e-5)
    product = pair_weights(q) * pair_weights(turned)
    assert torch.allclose(product, product[:1].expand(N), atol=1e-5)


def test_quality_is_symmetric_and_does_not_depend_on_scale_or_on_the_mean(pairs):
    a, b, u = pairs
    q = pair_quality(a, b, u).q
    assert torch.allclose(q, pair_quality(b, a, u).q, atol=1e-6)
    assert torch.allclose(q, pair_quality(7 * a, 0.2 * b, u).q, atol=1e-5)
    assert torch.allclose(q, pair_quality(a, b, u, mean=torch.randn(K)).q, atol=1e-5)


def test_identical_views_have_quality_zero_and_weight_one(pairs):
    a, _, u = pairs
    found = pair_quality(a, a, u)
    assert torch.allclose(found.s_fg, torch.ones(N), atol=1e-5)
    assert torch.allclose(found.q, torch.zeros(N), atol=1e-5)


def test_cosines_and_quality_stay_in_their_ranges_and_are_finite_for_constant_maps(pairs):
    a, b, u = pairs
    found = pair_quality(a, b, u)
    assert bool((found.s_fg.abs() <= 1).all())
    assert bool((found.q.abs() <= 2).all())
    assert bool(pair_quality(torch.ones(2, L, K), torch.zeros(2, L, K), u).q.isfinite().all())


def test_a_sharp_mask_gives_the_vectors_of_its_two_sides():
    mask = torch.tensor([1, 1, 0, 0, 0, 1, 0, 0]).bool()
    e = torch.eye(4)
    u = (e[0] - e[1]) / math.sqrt(2)
    a = torch.where(mask[:, None], e[0], e[1])[None]
    b = torch.where(mask[:, None], e[0], e[2] - e[0])[None]
    found = pair_quality(a, b, u)
    assert float(found.s_fg) == pytest.approx(1, abs=1e-5)
    assert float(found.s_bg) == pytest.approx(0, abs=1e-5)
    assert float(found.q) == pytest.approx(1, abs=1e-5)


def test_no_gradient_reaches_the_encoder_or_the_views(pairs):
    a, b, u = pairs
    assert not pair_quality(a.requires_grad_(), b, u).q.requires_grad


def test_views_of_different_tokens_are_refused(pairs):
    a, b, u = pairs
    with pytest.raises(ValueError, match="do not form pairs"):
        pair_quality(a, b[:, :4], u)


class Patches:
    """An encoder whose tokens are the mean colors of 4 x 4 patches."""

    name = "patches"

    def __call__(self, images):
        cells = F.avg_pool2d(images, images.shape[-1] // 4)
        return Tokens(cells.flatten(2).transpose(1, 2), cells.mean(dim=(2, 3)), (4, 4))


def model(name="patches"):
    return ForegroundModel(F.normalize(torch.ones(3), dim=0), torch.zeros(3), 0.5, 0.6, name, (4, 4), 1.0, "auto", 1)


def test_the_pixels_that_the_scorer_sees_do_not_depend_on_how_views_are_normalized():
    a, b = torch.rand(6, 3, 16, 16), torch.rand(6, 3, 16, 16)
    found = []
    for mean, std in (
        ((0.0,) * 3, (1.0,) * 3),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5,) * 3, (0.27,) * 3),
    ):
        m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        found.append(QualityScorer(Patches(), model(), "online", mean, std)((a - m) / s, (b - m) / s).q)
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert torch.allclose(found[0], found[2], atol=1e-5)


def test_a_cached_map_of_the_whole_picture_gives_the_online_quality_of_that_picture():
    a, b = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    cached = QualityScorer(Patches(), model(), "cached")
    whole, no = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(4, 4), torch.zeros(4, dtype=torch.bool)
    maps = [cached.maps(x, cells=4) for x in (a, b)]
    q = cached.from_maps(*maps, whole, whole, (no, no), size=4).q
    assert torch.allclose(q, QualityScorer(Patches(), model())(a, b).q, atol=2e-3)


def test_a_crop_of_a_map_is_the_part_that_its_box_covers_and_is_mirrored():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    box = torch.tensor([[0.5, 0.0, 0.5, 0.5]])
    cut = crop_maps(maps, box, torch.tensor([False]), size=2)[0, :, 0]
    assert torch.allclose(cut, torch.tensor([8.0, 9.0, 12.0, 13.0]))
    cut = crop_maps(maps, box, torch.tensor([True]), size=2)[0, :, 0]
    assert torch.allclose(cut, torch.tensor([9.0, 8.0, 13.0, 12.0]))


def test_a_scorer_is_of_one_encoder_and_never_changes_its_mode_in_silence():
    with pytest.raises(UserError, match="of other, the quality encoder is patches"):
        QualityScorer(Patches(), model("other"))
    with pytest.raises(ValueError, match="needs an encoder"):
        QualityScorer(None, None, "online")
    static = QualityScorer(None, None, "static")
    with pytest.raises(ValueError, match="static"):
        static(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="static"):
        static.from_maps(*[torch.zeros(1, 3, 4, 4)] * 2, *[torch.zeros(1, 4)] * 2, (torch.zeros(1),) * 2)
