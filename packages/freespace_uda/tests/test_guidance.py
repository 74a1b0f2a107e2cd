"""Cross guidance: the identity when new, blind to pixels without depth, and closed forms."""

import copy

import pytest
import torch
from freespace_uda import CrossGuidance, FreespaceNet
from freespace_uda.encoders import Encoder, SmallEncoder
from freespace_uda.guidance import token_loss
from torch import nn

from tenfold import UserError


def maps(b=2, cr=6, cn=8, h=4, w=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    rgb = torch.randn(b, cr, h, w, generator=g, dtype=torch.float64)
    normal = torch.randn(b, cn, h, w, generator=g, dtype=torch.float64)
    valid = (torch.rand(b, 1, h, w, generator=g) > 0.3).double()
    return rgb, normal, valid


def awake(mode="tokens", tokens=2, channels=(6, 8), seed=1):
    torch.manual_seed(seed)
    guide = CrossGuidance(channels, tokens, mode).double()
    with torch.no_grad():
        guide.rgb.scale.fill_(0.7)
        guide.normal.scale.fill_(-0.4)
    return guide


@pytest.mark.parametrize("mode", ["tokens", "channel"])
def test_new_guidance_is_the_identity_bit_for_bit_with_the_gradients_of_none(mode):
    found = []
    for m in (mode, "none"):
        rgb, normal, valid = (t.requires_grad_(t.dim() == 4 and t.shape[1] > 1) for t in maps())
        torch.manual_seed(0)
        out = CrossGuidance((6, 8), 2, m).double()(rgb, normal, valid.detach())
        (out.rgb.square().sum() + out.normal.cos().sum()).backward()
        found.append((out.rgb, out.normal, rgb.grad, normal.grad))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


def test_a_network_with_new_guidance_equals_the_one_without():
    torch.manual_seed(0)
    guided = FreespaceNet("freespace:tiny", guidance="tokens", width=8)
    plain = FreespaceNet("freespace:tiny", guidance="none", width=8)
    plain.load_state_dict({k: v for k, v in guided.state_dict().items() if not k.startswith("guides")})
    rgb, normals, valid = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
    for a, b in zip(guided(rgb, normals, valid)[:3], plain(rgb, normals, valid)[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["tokens", "channel"])
def test_half_precision_is_near_64_bits_and_a_sample_without_depth_keeps_its_rgb(mode, kind):
    rgb, normal, valid = maps()
    valid[1] = 0
    guide = awake(mode)
    wanted = guide(rgb, normal, valid)
    for of_mask in (kind, torch.bool):
        found = guide.to(kind)(rgb.to(kind), normal.to(kind), valid.to(of_mask))
        assert found.rgb.dtype == found.normal.dtype == kind
        assert torch.allclose(found.rgb.double(), wanted.rgb, atol=0.06)
        assert torch.allclose(found.normal.double(), wanted.normal, atol=0.06)
        assert torch.equal(found.rgb[1], rgb[1].to(kind))
        if mode == "tokens":
            assert not found.normal_attention[1].any()


def literal(guide, rgb, normal, valid):
    """The formulas at full width, sample by sample and pixel by pixel."""

    def stream(m, o, f_m, f_o, v_o):
        out = torch.empty_like(f_m)
        for b in range(len(f_m)):
            pixels = f_o[b].flatten(1).T  # P, C
            scores = o.select(f_o[b : b + 1])[0].flatten(1)
            if v_o is not None:
                scores = scores + v_o[b].flatten().log()[None]
            alpha = scores.softmax(1) if v_o is None or v_o[b].any() else torch.zeros_like(scores)
            tokens = alpha @ pixels
            q = m.query(f_m[b].flatten(1).T)
            weights = (q @ m.key(tokens).T / m.width**0.5).softmax(1)
            g = m.out(weights @ m.value(tokens)).T.view_as(f_m[b])
            gate = m.gate(torch.cat([f_m[b], g])[None]).sigmoid()[0]
            if v_o is not None and not v_o[b].any():
                gate = gate * 0
            out[b] = f_m[b] + m.scale * gate * g
        return out

    return stream(guide.rgb, guide.normal, rgb, normal, valid), stream(guide.normal, guide.rgb, normal, rgb, None)


def test_guidance_equals_its_formulas_written_out_at_full_width():
    guide, (rgb, normal, valid) = awake(), maps()
    valid[1] = 0
    out = guide(rgb, normal, valid)
    wanted = literal(guide, rgb, normal, valid)
    assert torch.allclose(out.rgb, wanted[0], atol=1e-12)
    assert torch.allclose(out.normal, wanted[1], atol=1e-12)


def test_swapping_the_modalities_and_their_weights_swaps_the_result():
    guide, (rgb, normal, _) = awake(channels=(6, 6)), maps(cn=6)
    other = copy.deepcopy(guide)
    other.rgb, other.normal = other.normal, other.rgb
    everywhere = torch.ones(2, 1, 4, 5, dtype=torch.float64)
    first, second = guide(rgb, normal, everywhere), other(normal, rgb, everywhere)
    assert torch.allclose(first.rgb, second.normal, atol=1e-12)
    assert torch.allclose(first.normal, second.rgb, atol=1e-12)


@pytest.mark.parametrize("mode", ["tokens", "channel"])
def test_what_normals_say_where_there_is_no_depth_does_not_reach_rgb(mode):
    guide, (rgb, normal, valid) = awake(mode), maps()
    changed = torch.where(valid > 0, normal, normal + 50 * torch.randn_like(normal))
    assert torch.equal(guide(rgb, normal, valid).rgb, guide(rgb, changed, valid).rgb)
    assert not torch.equal(guide(rgb, normal, valid).rgb, guide(rgb, normal + 1, valid).rgb)


@pytest.mark.parametrize("mode", ["tokens", "channel"])
def test_without_any_depth_rgb_stays_as_it_is(mode):
    guide, (rgb, normal, valid) = awake(mode), maps()
    valid[0] = 0
    out = guide(rgb, normal, valid)
    assert torch.equal(out.rgb[0], rgb[0])
    assert not torch.equal(out.rgb[1], rgb[1])
    assert torch.isfinite(out.rgb).all()


def test_one_token_adds_one_vector_times_the_gate():
    guide, (rgb, normal, valid) = awake(tokens=1), maps()
    out = guide(rgb, normal, valid)
    tokens, _ = guide.rgb.read(rgb, None)
    vector = guide.normal.out(guide.normal.value(tokens))[:, 0]
    spread = vector[:, :, None, None].expand_as(normal)
    gate = guide.normal.gate(torch.cat([normal, spread], 1)).sigmoid()
    assert torch.allclose(out.normal, normal + guide.normal.scale * gate * spread, atol=1e-12)


def test_the_order_of_the_guiding_pixels_does_not_matter():
    guide, (rgb, normal, valid) = awake(), maps()
    order = torch.randperm(20)
    mixed, mask = (t.flatten(2)[..., order].view_as(t) for t in (normal, valid))
    assert torch.allclose(guide(rgb, normal, valid).rgb, guide(rgb, mixed, mask).rgb, atol=1e-12)


def test_tokens_that_read_road_and_rest_have_no_loss_and_exchanged_ones_have():
    road = torch.zeros(1, 1, 4, 4)
    road[..., 2:, :] = 1
    attention = torch.cat([road / 8, (1 - road) / 8], 1)
    known = torch.ones_like(road)
    assert float(token_loss(attention, road, known)) == pytest.approx(0, abs=1e-6)
    assert float(token_loss(attention.flip(1), road, known)) > 10
    assert float(token_loss(attention, torch.ones_like(road), known)) == 0  # no rest to read: nothing to learn


def net(**more):
    torch.manual_seed(0)
    return FreespaceNet("freespace:tiny", width=8, **more).eval()


def test_a_missing_modality_is_answered_by_the_head_of_the_other_one():
    n = net()
    rgb, normals = torch.rand(2, 3, 32, 64), torch.nn.functional.normalize(torch.randn(2, 3, 32, 64), dim=1)
    valid = torch.ones(2, 1, 32, 64)
    valid[1], normals[1] = 0, 0
    with torch.no_grad():
        p = n.probability(rgb, normals, valid)
        out = n(rgb, normals, valid)
        assert torch.allclose(p[0], out.fused.sigmoid()[0])
        assert torch.allclose(p[1], out.rgb.sigmoid()[1])
        assert torch.allclose(n.probability(rgb, None, None)[1], p[1], atol=1e-6)
        assert torch.allclose(n.probability(None, normals, valid), n(None, normals, valid).normal.sigmoid())
    with pytest.raises(ValueError, match="nothing to look at"):
        n.probability(None, None, None)


def test_one_pass_over_both_domains_equals_two_passes_and_live_statistics_would_not():
    pictures = (torch.rand(4, 3, 32, 32), torch.randn(4, 3, 32, 32), torch.ones(4, 1, 32, 32))
    for norm, equal in (("group", True), ("batch", False)):
        n = net(norm=norm).train()
        with torch.no_grad():
            both = n(*pictures).fused
            apart = torch.cat([n(*(t[:2] for t in pictures)).fused, n(*(t[2:] for t in pictures)).fused])
        assert torch.allclose(both, apart, atol=1e-5) is equal


def test_frozen_batch_normalization_keeps_its_statistics_in_training():
    encoder = Encoder("timm:resnet10t", norm="frozen").train()
    before = {k: v.clone() for k, v in encoder.state_dict().items() if "running" in k}
    with torch.no_grad():
        encoder(torch.rand(2, 3, 64, 64))
    assert before
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in before.items())


def test_group_normalization_replaces_batch_normalization_and_keeps_its_activation():
    torch.manual_seed(0)
    encoder = Encoder("timm:efficientnet_lite0", norm="group", size=(64, 64))
    kinds = [type(m) for m in encoder.modules()]
    assert not any(issubclass(k, nn.BatchNorm2d) for k in kinds)
    assert any(issubclass(k, nn.ReLU6) for k in kinds)
    assert encoder.reductions == (4, 8, 16, 32)


def test_normals_enter_by_the_filters_of_rgb_and_validity_by_zeros():
    torch.manual_seed(0)
    three = Encoder("timm:resnet10t")
    torch.manual_seed(0)
    four = Encoder("timm:resnet10t", in_chans=4)
    first = next(m for m in four.modules() if isinstance(m, nn.Conv2d)).weight
    assert torch.equal(first[:, :3], next(m for m in three.modules() if isinstance(m, nn.Conv2d)).weight)
    assert not first[:, 3].any()


def test_a_small_encoder_has_about_a_tenth_of_a_million_parameters():
    assert 80_000 < sum(p.numel() for p in SmallEncoder(16).parameters()) < 130_000


def test_encoders_that_cannot_do_this_are_refused_in_one_line():
    with pytest.raises(UserError, match="--rgb_encoder timm:vit_tiny_patch16_224"):
        Encoder("timm:vit_tiny_patch16_224", size=(64, 64))
    with pytest.raises(UserError, match="no model of this name"):
        Encoder("timm:resnet51")
    with pytest.raises(UserError, match="freespace"):
        Encoder("freespace:huge")
    with pytest.raises(UserError, match="--fusion sum"):
        FreespaceNet("freespace:tiny", "freespace:small", fusion="sum")
