"""Each term alone against torch or a closed form, and the total against its parts."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pckd import (
    CenterAlignLoss,
    Distiller,
    FeatureAlignLoss,
    Losses,
    Outputs,
    PCKDConfig,
    PCKDLoss,
    Preview,
    dkd_per_sample,
    kd_per_sample,
    preview_weights,
)
from pckd.config import DKDConfig, KDConfig
from pckd.losses import BaselineLoss, feature_distance
from torch import nn

from tenfold import UserError
from tenfold.testing import assert_gradient_isolated, assert_same_as_reference

ZERO = PCKDConfig(alpha=0, beta=0, delta=0, f=0)


def outputs(rows, classes=5, dim=6, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(dim, classes)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    feature = torch.randn(rows, dim, generator=generator, requires_grad=True)
    return Outputs(layer(feature), feature, layer.weight, layer.bias, **kwargs)


def small(seed=0, classes=5, width=6):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model.add_module("fc", nn.Linear(width, classes))
    return model


IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(5))
LABELS = torch.tensor([0, 3, 1])


def test_without_weights_it_is_plain_cross_entropy_on_the_upright_views_bit_for_bit():
    """Total, gradients and one step; no heads are built."""
    ours, plain = small(), small()
    distiller = Distiller(ours, small(1), "pckd", Losses(pckd=ZERO), example=IMAGES[:2])
    loss = distiller(IMAGES, LABELS, 1)
    expected = F.cross_entropy(plain(IMAGES)[::4], LABELS)
    assert torch.equal(loss.total, expected)
    assert not list(distiller.objective.parameters())
    for total, model in ((loss.total, ours), (expected, plain)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        total.backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.grad, b.grad)


def test_kd_equals_torch_and_is_zero_for_shifted_logits():
    student, teacher = outputs(4), outputs(4, seed=1)
    config = dataclasses.replace(ZERO, delta=1, preview=Preview(tail="none"))
    loss = PCKDLoss(6, 6, config)(student, teacher, torch.tensor([0, 1, 2, 3]), 1)
    T = 4
    zs, zt = student.logits, teacher.logits
    expected = T * T * F.kl_div(F.log_softmax(zs / T, 1), F.softmax(zt / T, 1), reduction="batchmean")
    assert_same_as_reference(loss.terms["kd"], expected, relative=1e-6)
    assert_same_as_reference(loss.total - loss.terms["ce"], expected, relative=1e-5)
    assert kd_per_sample(zt + 7, zt).abs().max() < 1e-5


def test_feature_alignment_of_parallel_orthogonal_and_opposite_features():
    """0, 2 and 4; the mean squared distance of unit rows; scale does not count."""
    a = torch.eye(4)[:2]
    for b, expected in ((3 * a, 0), (torch.eye(4)[2:], 2), (-a, 4)):
        assert float(feature_distance(a, b)) == pytest.approx(expected, abs=1e-6)
    x, y = torch.randn(7, 5), torch.randn(7, 5)
    distance = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean()
    assert_same_as_reference(feature_distance(x, y), distance, relative=1e-5)
    loss = FeatureAlignLoss(6, 5, 8)
    x = torch.randn(7, 6)
    assert_same_as_reference(loss(x, 9 * y), loss(x, y), relative=1e-5)


def test_center_alignment():
    """MSE of [W | b], 0 where equal; Gram form unchanged under rotation; one warning where widths differ."""
    s, t = outputs(2), outputs(2, seed=1)
    loss = CenterAlignLoss()
    expected = F.mse_loss(torch.cat([s.weight, s.bias[:, None]], 1), torch.cat([t.weight, t.bias[:, None]], 1))
    assert_same_as_reference(loss(s.weight, s.bias, t.weight, t.bias), expected, relative=1e-6)
    assert float(loss(t.weight, t.bias, t.weight, t.bias).detach()) == 0
    narrow = torch.randn(5, 3)
    with pytest.warns(UserWarning, match="6 dimensions, the teacher's 3"):
        assert float(loss(s.weight, s.bias, narrow, None)) == 0
    assert float(loss(s.weight, s.bias, narrow, None)) == 0  # no second warning: they are errors here
    gram = CenterAlignLoss("gram")
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    assert_same_as_reference(
        gram(s.weight, None, t.weight @ turn, None), gram(s.weight, None, t.weight, None), relative=1e-5
    )
    assert float(gram(t.weight, None, t.weight @ turn, None).detach()) < 1e-10
    assert gram(s.weight, None, narrow, None) > 0


@settings(max_examples=50, deadline=None)
@given(
    ce=st.lists(st.floats(0, 50), min_size=1, max_size=20),
    epoch=st.integers(1, 240),
    scale=st.floats(0.01, 100),
)
def test_preview_weights(ce, epoch, scale):
    """In (0, 1] but for underflow, never falling with epochs, blind to a common factor; gamma sums to B."""
    ce = torch.tensor(ce, dtype=torch.float64)
    v = preview_weights(ce, epoch)
    assert bool(((v >= 0) & (v <= 1)).all())
    assert bool((preview_weights(ce, epoch + 30) >= v).all())
    threshold = 1.005**epoch
    gamma = ce / ce.mean().clamp_min(1e-12)
    clear = (gamma / threshold - 1).abs() > 1e-5
    if float(ce.mean()) > 1e-6:
        assert torch.allclose(preview_weights(scale * ce, epoch)[clear], v[clear])
        assert float(gamma.sum()) == pytest.approx(len(ce))
    literal = [1.0 if g <= threshold * (1 + 1e-6) else math.exp(-g * g) for g in gamma.tolist()]
    assert v.tolist() == pytest.approx(literal)


def test_preview_of_equal_single_and_solved_samples():
    """Properties 10 and 11."""
    assert torch.equal(preview_weights(torch.full((5,), 0.3), 1), torch.ones(5))
    assert torch.equal(preview_weights(torch.tensor([7.0]), 1), torch.ones(1))
    assert torch.equal(preview_weights(torch.zeros(3), 1), torch.ones(3))
    v = preview_weights(torch.tensor([2.0, 0.0]), 1)
    assert v.tolist() == pytest.approx([math.exp(-4), 1])
    smooth = preview_weights(torch.tensor([3.0, 0.0, 0.0]), 1, Preview(tail="smooth"))
    assert float(smooth[0]) == pytest.approx(math.exp(1 - (3 / 1.005) ** 2))
    assert float(preview_weights(torch.tensor([2.0, 0.0]), 1, Preview(normalize=True)).mean()) == pytest.approx(1)


def test_schedule():
    """3.3102 in epoch 240; the same at the end of runs of other lengths; plain epochs on request."""
    preview = Preview()
    assert preview.threshold(240) == pytest.approx(3.3102, abs=1e-4)
    for epochs in (10, 30, 240):
        assert preview.threshold(epochs, epochs) == pytest.approx(3.3102, abs=1e-4)
    assert preview.threshold(30) == pytest.approx(1.161, abs=1e-3)
    assert Preview(scale_to=0).threshold(3, 10) == 1.005**3
    with pytest.raises(ValueError, match="1-based"):
        preview.threshold(0)


def test_weights_carry_no_gradient_and_neither_does_the_teacher():
    """The total's gradient is that with constants in the weights' place."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3])
    loss = PCKDLoss(6, 6)
    student, teacher = outputs(16), outputs(16, seed=1)
    found = loss(student, teacher, labels, 1)
    assert float(found.weights.min()) < 1
    v, rows = found.weights, labels.repeat_interleave(4)
    ce = F.cross_entropy(student.logits[::4], labels)
    kd = (v * kd_per_sample(student.logits[::4], teacher.logits[::4])).mean()
    each = loss.contrast(student.feature, student.weight, teacher.weight, rows)
    cc = (v.repeat_interleave(4) * each).mean()
    ca = loss.center_align(student.weight, student.bias, teacher.weight, teacher.bias)
    fa = loss.feature_align(student.feature, teacher.feature)
    total = ce + kd + 0.05 * cc + ca + 20 * fa
    assert_same_as_reference(found.total, total, relative=1e-6)
    inputs = [student.feature, student.weight]
    for a, b in zip(*(torch.autograd.grad(x, inputs, retain_graph=True) for x in (found.total, total)), strict=True):
        assert_same_as_reference(a, b, relative=1e-5)
    assert_gradient_isolated(
        found.total, reaches=[student.feature, student.weight], spares=[teacher.weight, teacher.bias]
    )


def test_a_teacher_stays_as_it_is():
    """No gradients, no new statistics, in evaluation mode after ``train()``, in no state dict."""
    teacher = small(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = Distiller(small(), teacher, "pckd", example=IMAGES[:2]).train()
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), 0.1)
    for epoch in (1, 2):
        distiller(IMAGES, LABELS, epoch).total.backward()
        optimizer.step()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name and "to_teacher" not in name for name in distiller.state_dict())


def test_arms_are_settings_of_one_loss():
    """No preview is ckd, no logits' term is pckd-nokd; five axes are the same as four."""

    def total(method, config=None, images=IMAGES):
        distiller = Distiller(small(), small(1), method, Losses(pckd=config or PCKDConfig()), example=IMAGES[:2])
        torch.manual_seed(3)
        for module in distiller.objective.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return distiller(images, LABELS, 1).total

    none = PCKDConfig(preview=Preview(tail="none"))
    assert torch.equal(total("pckd", none), total("ckd"))
    assert torch.equal(total("pckd", PCKDConfig(delta=0)), total("pckd-nokd"))
    assert not torch.equal(total("pckd"), total("ckd"))
    assert torch.equal(total("pckd", images=IMAGES.view(3, 4, 3, 8, 8)), total("pckd"))
    upright = IMAGES[:3]
    assert torch.equal(total("pckd", images=upright[:, None]), total("pckd", images=upright))


def test_rows_are_image_major():
    """With the upright views first instead, and labels to match, the contrast is the same."""
    torch.manual_seed(0)
    loss = PCKDLoss(6, 6, PCKDConfig(delta=0, f=0, alpha=0)).contrast
    s, t = outputs(12), outputs(12, seed=1)
    labels = torch.tensor([0, 3, 1])
    image_major = loss(s.feature, s.weight, t.weight, labels.repeat_interleave(4))
    view_major = loss(s.feature.view(3, 4, 6).transpose(0, 1).reshape(12, 6), s.weight, t.weight, labels.repeat(4))
    assert_same_as_reference(view_major.view(4, 3).T.reshape(12), image_major, relative=1e-6)


def test_bf16_autocast_is_near():
    """Finite, within 2 % of fp32."""
    torch.manual_seed(0)
    distiller = Distiller(small(), small(1), "pckd", example=IMAGES[:2])
    expected = distiller(IMAGES, LABELS, 1).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distiller(IMAGES, LABELS, 1).total
    assert float((found - expected).abs() / expected) < 0.02


def test_it_learns():
    """Thirty steps on 64 images lower the total and each of L_FA, L_CE, L_KD."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8), torch.randint(5, (64,))
    distiller = Distiller(small(width=16), small(1, width=16), "pckd", example=images[:2])
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), 0.02, momentum=0.9)
    history = []
    for _ in range(30):
        loss = distiller(images, labels, 240)
        history.append({"total": loss.total.detach(), **loss.terms})
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    for name in ("total", "fa", "ce", "kd"):
        assert history[-1][name] < history[0][name], name


def test_dkd_equals_its_definition():
    """TCKD on [q, 1 - q] and NCKD on the softmaxes without the target, written out."""
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 1, 3, 0])
    expected = []
    for zs, zt, y in zip(s / 4, t / 4, labels.tolist(), strict=True):
        qs, qt = zs.softmax(0)[y], zt.softmax(0)[y]
        tckd = qt * (qt / qs).log() + (1 - qt) * ((1 - qt) / (1 - qs)).log()
        rest = [c for c in range(5) if c != y]
        ps, pt = zs[rest].softmax(0), zt[rest].softmax(0)
        expected.append(16 * (tckd + 8 * (pt * (pt / ps).log()).sum()))
    assert_same_as_reference(dkd_per_sample(s, t, labels), torch.stack(expected), relative=1e-5)
    certain = torch.tensor([[500.0, 0, 0, 0, 0]])
    assert torch.isfinite(dkd_per_sample(torch.randn(1, 5), certain, torch.tensor([0]))).all()


def test_baselines_are_weighted_as_published():
    labels = torch.tensor([0, 1, 2, 3])
    student, teacher = outputs(4), outputs(4, seed=1)
    ce = F.cross_entropy(student.logits, labels)
    kd = kd_per_sample(student.logits, teacher.logits).mean()
    assert torch.allclose(BaselineLoss("kd")(student, teacher, labels, 1).total, 0.1 * ce + 0.9 * kd)
    both = BaselineLoss("kd", kd=KDConfig(ce=1, kd=2, T=4))(student, teacher, labels, 1).total
    assert torch.allclose(both, ce + 2 * kd)
    assert torch.equal(BaselineLoss("ce")(student, None, labels, 1).total, ce)
    each = dkd_per_sample(student.logits, teacher.logits, labels).mean()
    assert torch.allclose(BaselineLoss("dkd")(student, teacher, labels, 5).total, ce + 0.25 * each)
    assert torch.allclose(BaselineLoss("dkd")(student, teacher, labels, 5, 24).total, ce + each)
    off = BaselineLoss("dkd", dkd=DKDConfig(warm_up=0))(student, teacher, labels, 1).total
    assert torch.allclose(off, ce + each)


def test_bad_batches_and_settings():
    """What the losses themselves refuse."""
    student, teacher = outputs(4), outputs(4, seed=1)
    loss = PCKDLoss(6, 6)
    good = torch.tensor([0, 1, 2, 3])
    for labels, value in ((good - 2, "-2"), (good + 2, "5")):
        with pytest.raises(ValueError, match=f"label {value} is outside"):
            loss(student, teacher, labels, 1)
    with pytest.raises(ValueError, match="the teacher has 7 classes, the student 5"):
        loss(student, outputs(4, classes=7), good, 1)
    with pytest.raises(ValueError, match="no multiple"):
        loss(student, teacher, good[:3], 1)
    with pytest.raises(ValueError, match="1-based"):
        loss(student, teacher, good, 0)
    with pytest.raises(ValueError, match=r"must be \(N, D\)"):
        loss(dataclasses.replace(student, feature=torch.randn(4, 6, 2)), teacher, good, 1)
    broken = dataclasses.replace(teacher, logits=torch.full((4, 5), torch.nan))
    with pytest.raises(FloatingPointError, match="batch of 4 images"):
        loss(student, broken, good, 1)
    with pytest.raises(ValueError, match="BatchNorm"):
        loss(outputs(1), outputs(1), good[:1], 1)
    for changes in ({"T": 0}, {"tau": 0}, {"tau0": 0}, {"beta": -1}, {"align_hidden": "wide"}):
        with pytest.raises(UserError):
            PCKDConfig(**changes)
    with pytest.raises(UserError, match="base: expected 1 or more, got 0.9"):
        Preview(base=0.9)
    with pytest.raises(UserError, match="the teacher has 7 classes, the student 5"):
        Distiller(small(), small(1, classes=7), example=IMAGES[:2])
    with pytest.warns(UserWarning, match="8192 hidden units"):
        PCKDLoss(4, 512)
