"""Selective alignment and the general methods: which gradients flow where, closed forms, and what a mask leaves out."""

import math

import pytest
import torch
import torch.nn.functional as F
from freespace_uda import SelectiveAlignment, mask_quality
from freespace_uda.alignment import PixelDiscriminator, masked_mean, shared_forward
from freespace_uda.objectives import (
    ClassDiscriminator,
    MapDiscriminator,
    class_alignment,
    entropy,
    information,
    output_alignment,
    probabilities,
    pseudo_label_loss,
    supervised,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SIZE = (6, 8)


def batch(seed=0, channels=5, b=2):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(b, channels, *SIZE, generator=g, dtype=torch.float64) for n in ("rgb", "normal")}


def align(mode="all", least=1, kernel=3):
    torch.manual_seed(3)
    return SelectiveAlignment({"rgb": 5, "normal": 5}, mode, min_pixels=least, hidden=4, kernel=kernel).double()


def mask(share=0.4, seed=1, b=2):
    return (torch.rand(b, 1, *SIZE, generator=torch.Generator().manual_seed(seed)) < share).double()


def test_one_shared_pass_gives_the_gradients_of_two_passes():
    source, target = batch(0), {k: v.requires_grad_() for k, v in batch(1).items()}
    module, where = align(), {"rgb": mask(), "normal": mask(seed=2)}
    losses = module(source, target, mask(seed=5), where)
    (0.3 * losses.adversarial + losses.discriminator).backward()
    shared = [p.grad.clone() for p in module.parameters()]
    features = {k: v.grad.clone() for k, v in target.items()}
    module.zero_grad()
    adversarial, own = 0, 0
    for name, d in module.discriminators.items():
        fresh = target[name].detach().requires_grad_()
        for p in d.parameters():
            p.requires_grad_(False)
        adversarial = 0.3 * masked_mean(F.softplus(-d(fresh)), where[name], 1)
        adversarial.backward()
        assert torch.allclose(features[name], fresh.grad, atol=1e-14, rtol=1e-12)
        for p in d.parameters():
            p.requires_grad_(True)
        own = own + 0.5 * masked_mean(F.softplus(-d(source[name])), mask(seed=5), 1)
        own = own + 0.5 * masked_mean(F.softplus(d(target[name].detach())), where[name], 1)
    own.backward()
    for ours, p in zip(shared, module.parameters(), strict=True):
        assert torch.allclose(ours, p.grad, atol=1e-14, rtol=1e-12)


class Plain:
    """A discriminator as functions, since the counter of operations follows modules with hooks that nested gradients break."""

    def __init__(self, layers):
        self.layers = layers

    def parameters(self):
        return self.layers.parameters()

    def __call__(self, x):
        for layer in self.layers:
            conv = isinstance(layer, nn.Conv2d)
            x = F.conv2d(x, layer.weight, layer.bias, 1, layer.padding) if conv else F.leaky_relu(x, 0.2)
        return x


def test_one_shared_pass_costs_seven_passes_where_two_cost_eight():
    torch.manual_seed(0)
    d = Plain(PixelDiscriminator(64, 32).double())
    x = torch.randn(1, 64, 16, 16, dtype=torch.float64, requires_grad=True)
    s = torch.randn_like(x).detach()
    with FlopCounterMode(display=False) as ours:
        for_encoder, for_itself = shared_forward(d, x)
        (for_encoder.mean() + for_itself.square().mean() + d(s).mean()).backward()
    with FlopCounterMode(display=False) as two:
        for p in d.parameters():
            p.requires_grad_(False)
        d(x).mean().backward()
        for p in d.parameters():
            p.requires_grad_(True)
        (d(x.detach()).square().mean() + d(s).mean()).backward()
    assert 1.1 < two.get_total_flops() / ours.get_total_flops() < 8 / 6


def test_all_is_the_plain_pixel_adversarial_loss():
    source, target, module = batch(0), batch(1), align("all")
    labels = torch.zeros(2, 24, 32, dtype=torch.uint8)
    of_source = module.source_mask(labels, SIZE).double()
    masks = module.target_masks({"fused": torch.randn(2, 1, 24, 32, dtype=torch.float64)}, SIZE)
    losses = module(source, target, of_source, masks)
    ones = torch.ones(2, 1, *SIZE, dtype=torch.float64)
    wanted = sum(F.binary_cross_entropy_with_logits(d(target[n]), ones) for n, d in module.discriminators.items())
    assert float(losses.adversarial) == pytest.approx(float(wanted), rel=1e-12)


def test_an_undecided_discriminator_has_losses_of_log_2_per_stream():
    module = align()
    for p in module.parameters():
        nn.init.zeros_(p)
    losses = module(batch(0), batch(1), mask(), {"rgb": mask(), "normal": mask()})
    assert float(losses.adversarial) == pytest.approx(2 * math.log(2))
    assert float(losses.discriminator) == pytest.approx(2 * math.log(2))


def test_an_empty_mask_or_a_small_one_gives_exactly_nothing():
    for least, share in ((1, 0.0), (97, 1.0)):
        target = {k: v.requires_grad_() for k, v in batch(1).items()}
        module = align(least=least)
        there = mask(share)
        losses = module(batch(0), target, there, {"rgb": there, "normal": there})
        assert float(losses.adversarial) == float(losses.discriminator) == 0
        (losses.adversarial + losses.discriminator).backward()
        assert all(not v.grad.any() for v in target.values())
        assert all(not p.grad.any() for p in module.parameters())


def test_features_beyond_the_reach_of_the_mask_do_not_matter():
    for kernel, reach in ((1, 0), (3, 2)):
        module = align(kernel=kernel)
        assert module.discriminators["rgb"].radius == reach
        there = torch.zeros(2, 1, *SIZE, dtype=torch.float64)
        there[:, :, 2, 3] = 1
        target = {k: v.requires_grad_() for k, v in batch(1).items()}
        losses = module(batch(0), target, there, {"rgb": there, "normal": there})
        losses.adversarial.backward()
        touched = target["rgb"].grad.abs().sum((0, 1)) > 0
        inside = torch.zeros(SIZE, dtype=torch.bool)
        inside[2 - reach : 3 + reach, 3 - reach : 4 + reach] = True
        assert torch.equal(touched, inside)
        changed = {k: torch.where(inside, v, v + 9).detach() for k, v in target.items()}
        again = module(batch(0), changed, there, {"rgb": there, "normal": there})
        assert float(again.adversarial) == pytest.approx(float(losses.adversarial), rel=1e-12)


def test_the_loss_is_a_mean_so_tiling_the_picture_changes_nothing_where_neighbors_are_not_seen():
    module = align(kernel=1)
    once = module(batch(0), batch(1), mask(), {"rgb": mask(), "normal": mask()})
    tile = lambda d: {k: v.tile(1, 1, 2, 2) for k, v in d.items()}  # noqa: E731
    large = mask().tile(1, 1, 2, 2)
    twice = module(tile(batch(0)), tile(batch(1)), large, {"rgb": large, "normal": large})
    assert float(once.adversarial) == pytest.approx(float(twice.adversarial), rel=1e-12)
    assert float(once.discriminator) == pytest.approx(float(twice.discriminator), rel=1e-12)


def test_exchanging_domains_and_the_sign_of_the_logit_leaves_the_discriminators_loss():
    module = align()
    first = module(batch(0), batch(1), mask(), {"rgb": mask(), "normal": mask()})
    with torch.no_grad():
        for d in module.discriminators.values():
            d[-1].weight.neg_()
            d[-1].bias.neg_()
    second = module(batch(1), batch(0), mask(), {"rgb": mask(), "normal": mask()})
    assert float(first.discriminator) == pytest.approx(float(second.discriminator), rel=1e-12)


def logits(p_r, p_n, p_f):
    shares = {"rgb": p_r, "normal": p_n, "fused": p_f}
    return {n: torch.tensor(p, dtype=torch.float64).logit().view(1, 1, 1, -1) for n, p in shares.items()}


@pytest.mark.parametrize(
    ("mode", "rgb", "normal"),
    [
        ("cross", [1, 0, 1, 0], [1, 1, 0, 0]),
        ("class", [1, 0, 0, 0], [1, 0, 0, 0]),
        ("agreement", [1, 0, 0, 0], [1, 0, 0, 0]),
        ("all", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("intersection", [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_each_mode_selects_its_pixels(mode, rgb, normal):
    found = logits([0.9, 0.9, 0.3, 0.2], [0.95, 0.4, 0.9, 0.1], [0.9, 0.9, 0.9, 0.1])
    masks = align(mode).target_masks(found, (1, 4), torch.zeros(1, 1, 1, 4, dtype=torch.float64))
    assert masks["rgb"].flatten().tolist() == rgb
    assert masks["normal"].flatten().tolist() == normal
    assert not masks["rgb"].requires_grad


def test_the_sources_mask_is_the_labeled_road_and_ignored_pixels_are_no_part_of_it():
    labels = torch.zeros(1, 4, 8, dtype=torch.uint8)
    labels[:, :, :2] = 1
    labels[:, :, 4:] = 255
    labels[:, 0, 4] = 1
    assert align("class").source_mask(labels, (1, 4)).flatten().tolist() == [1, 0, 0, 0]


def test_the_quality_of_a_mask_is_its_precision_and_recall():
    labels = torch.tensor([[[1, 1, 0, 255]]], dtype=torch.uint8)
    precision, recall = mask_quality(torch.tensor([[[[1.0, 0.0, 1.0, 1.0]]]]), labels)
    assert (float(precision), float(recall)) == (0.5, 0.5)


def test_ignored_pixels_have_no_part_in_the_supervised_loss():
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (2, 4, 4)).to(torch.uint8)
    labels[:, :, 2:] = 255
    loss = supervised(z, labels)
    loss.backward()
    assert not z.grad[..., 2:].any()
    wanted = F.binary_cross_entropy_with_logits(z[:, 0, :, :2], labels[:, :, :2].double())
    assert float(loss) == pytest.approx(float(wanted))
    assert float(supervised(z, torch.full_like(labels, 255))) == 0


def test_entropy_is_one_bit_where_undecided_and_none_where_sure():
    z = torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64).view(1, 1, 1, 3)
    assert entropy(z).flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-9)
    assert torch.allclose(information(z).sum(1, keepdim=True), entropy(z))


def test_output_alignment_moves_the_target_alone_and_a_fooled_discriminator_costs_log_2():
    torch.manual_seed(0)
    d = MapDiscriminator(2).double()
    s, t = (torch.rand(1, 2, 64, 64, dtype=torch.float64).requires_grad_() for _ in range(2))
    losses = output_alignment(d, s, t)
    (losses.adversarial + losses.discriminator).backward()
    assert s.grad is None
    assert t.grad.abs().sum() > 0
    for p in d.parameters():
        nn.init.zeros_(p)
    assert float(output_alignment(d, s, t).discriminator) == pytest.approx(math.log(2))


def test_class_alignment_of_a_blind_discriminator_is_the_cross_entropy_of_its_soft_labels():
    d = ClassDiscriminator(3, 4).double()
    for p in d.parameters():
        nn.init.zeros_(p)
    f = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    z = torch.full((1, 1, 4, 4), 20.0, dtype=torch.float64)  # sure of road: soft label clipped at 0.9
    losses = class_alignment(d, f.detach(), f, z, z)
    soft = 0.9 + float(torch.sigmoid(torch.tensor(-20 / 1.8)))
    assert float(losses.adversarial) == pytest.approx(soft * math.log(4), rel=1e-4)
    assert float(losses.discriminator) == pytest.approx(soft * math.log(4), rel=1e-4)


def test_pseudo_labels_count_by_the_share_that_the_teacher_is_sure_of():
    teacher = torch.tensor([10.0, -10.0, 0.1, -0.1], dtype=torch.float64).view(1, 1, 1, 4)
    z = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    loss = pseudo_label_loss(z, teacher)
    assert float(loss) == pytest.approx(0.5 * math.log(2))
    unsure = pseudo_label_loss(z, 0.1 * teacher)
    assert float(unsure) == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_losses_of_32_bits_in_32_bits(kind):
    source, target, module = batch(0), batch(1), align()
    there = {"rgb": mask(), "normal": mask(seed=2)}
    wanted = module(source, target, mask(seed=5), there)
    half = {k: v.to(kind).requires_grad_() for k, v in target.items()}
    module.to(kind)
    masks = {k: v.to(kind) for k, v in there.items()}
    found = module({k: v.to(kind) for k, v in source.items()}, half, mask(seed=5).to(kind), masks)
    assert found.adversarial.dtype == found.discriminator.dtype == torch.float32
    assert float(found.adversarial) == pytest.approx(float(wanted.adversarial), rel=2e-2)
    assert float(found.discriminator) == pytest.approx(float(wanted.discriminator), rel=2e-2)
    assert float(found.share["rgb"]) == pytest.approx(float(wanted.share["rgb"]))
    (found.adversarial + found.discriminator).backward()
    assert all(v.grad.dtype == kind and v.grad.any() for v in half.values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_general_methods_in_half_precision_give_the_losses_of_32_bits_in_32_bits(kind):
    generator = torch.Generator().manual_seed(3)
    maps = [torch.rand(2, 2, 64, 64, generator=generator).to(kind) for _ in range(2)]
    features = [torch.randn(2, 6, 8, 8, generator=generator).to(kind) for _ in range(2)]
    logits = [8 * torch.randn(2, 1, 8, 8, generator=generator).to(kind) for _ in range(2)]
    calls = (
        (output_alignment, MapDiscriminator(2), maps, ()),
        (class_alignment, ClassDiscriminator(6, 8), features, logits),
    )
    for loss, discriminator, (source, target), more in calls:
        wanted = loss(discriminator, source.float(), target.float(), *(z.float() for z in more))
        found = loss(discriminator, source, target, *more)  # maps of 16 bits, weights of 32, as under autocast
        assert found.adversarial.item() == pytest.approx(wanted.adversarial.item(), rel=1e-6)
        half = target.clone().requires_grad_()
        found = loss(discriminator.to(kind), source, half, *more)
        assert found.adversarial.dtype == found.discriminator.dtype == torch.float32
        assert found.adversarial.item() == pytest.approx(wanted.adversarial.item(), rel=2e-2)
        assert found.discriminator.item() == pytest.approx(wanted.discriminator.item(), rel=2e-2)
        (found.adversarial + found.discriminator).backward()
        assert half.grad.dtype == kind
        assert half.grad.any()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_entropy_of_sure_logits_is_finite_and_32_bits_wide_in_half_precision(kind):
    z = torch.tensor([-60.0, -9.0, 0.0, 9.0, 60.0]).to(kind).view(1, 1, 1, 5).requires_grad_()
    found = entropy(z)
    assert found.dtype == torch.float32
    assert torch.allclose(found, entropy(z.detach().float()))
    found.sum().backward()
    assert z.grad.isfinite().all()
    assert probabilities(z).dtype == information(z).dtype == torch.float32


@pytest.mark.parametrize("mode", ["cross", "intersection"])
def test_masks_of_any_type_give_the_same_losses(mode):
    module, pair = align(mode), (mask(seed=5), {"rgb": mask(), "normal": mask(seed=2)})
    wanted = module(batch(0), batch(1), *pair)
    for kind in (torch.bool, torch.uint8, torch.int64, torch.bfloat16):
        found = module(batch(0), batch(1), pair[0].to(kind), {k: v.to(kind) for k, v in pair[1].items()})
        assert torch.equal(found.adversarial, wanted.adversarial)
        assert torch.equal(found.discriminator, wanted.discriminator)
        assert torch.equal(found.accuracy["rgb"], wanted.accuracy["rgb"])
        assert torch.equal(found.share["normal"], wanted.share["normal"])
    labels = torch.randint(0, 2, (2, 24, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for ours, plain in zip(mask_quality(mask().bool(), labels), mask_quality(mask(), labels), strict=True):
        assert torch.equal(ours, plain)


def test_wrong_settings_are_refused_in_words():
    with pytest.raises(ValueError, match="tau"):
        SelectiveAlignment({"rgb": 4, "normal": 4}, tau=1.0)
    with pytest.raises(ValueError, match="cross needs RGB and normals"):
        SelectiveAlignment({"rgb": 4})
