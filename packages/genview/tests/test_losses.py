"""Weighted losses against literal loops, closed forms, and lightly's losses where weights are left out."""

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from genview.contrast import info_nce
from genview.losses import (
    QDMoCoLoss,
    QDMoCoV3Loss,
    QDMultiPositiveLoss,
    QDNegativeCosine,
    QDNTXentLoss,
    QDSwAVLoss,
    check_method,
    image_text_qd_loss,
    positive_weights,
)
from genview.weights import pair_weights

from tenfold.testing import assert_gradient_isolated

N, D = 7, 5


def views(n=N, d=D, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=draw, dtype=dtype, requires_grad=True) for _ in range(2)]


def frozen_moco():
    return QDMoCoLoss(D, 11).double().eval()


PAIRWISE = {
    "simclr": QDNTXentLoss,
    "mocov2": frozen_moco,
    "mocov3": QDMoCoV3Loss,
    "simsiam": QDNegativeCosine,
    "byol": lambda: QDNegativeCosine(byol=True),
}


@pytest.mark.parametrize("name", PAIRWISE)
def test_without_weights_with_ones_and_with_gamma_zero_a_loss_is_the_same_to_the_bit(name):
    loss = PAIRWISE[name]()
    a, b = views()
    plain = loss(a, b)
    assert torch.equal(plain, loss(a, b, torch.ones(N, dtype=torch.float64)))
    assert torch.equal(plain, loss(a, b, pair_weights(torch.randn(N), 0.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*PAIRWISE, "several", "text"])
def test_rows_of_zeros_in_half_precision_give_numbers(name, dtype):
    several = lambda a, b: QDMultiPositiveLoss()(torch.cat([a, b]), torch.arange(N).repeat(2))  # noqa: E731
    more = {"several": several, "text": lambda a, b: image_text_qd_loss(a, b, 10.0)}
    loss = more.get(name) or PAIRWISE[name]()
    a, b = (x.detach().to(dtype).index_fill_(0, torch.tensor([row]), 0) for x, row in zip(views(), (2, 4), strict=True))
    a.requires_grad_()
    value = loss(a, b)
    value.backward()
    assert bool(value.isfinite())
    assert bool(a.grad.isfinite().all())


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_loss_is_linear_in_the_weights(name):
    loss = PAIRWISE[name]()
    a, b = views()
    u, v = torch.rand(N, dtype=torch.float64), torch.rand(N, dtype=torch.float64)
    together = 0.3 * loss(a, b, u) + 2.0 * loss(a, b, v)
    assert torch.allclose(loss(a, b, 0.3 * u + 2.0 * v), together)


@pytest.mark.parametrize("name", PAIRWISE)
def test_the_gradient_of_a_weighted_loss_is_right(name):
    loss = PAIRWISE[name]()
    a, b = views(4)
    w = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, b.detach(), w), (a,))


def test_the_simclr_loss_is_the_cross_entropy_on_the_explicit_matrix():
    a, b = views()
    z = F.normalize(torch.cat([a, b]), dim=1)
    logits = (z @ z.T / 0.3).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    target = torch.arange(2 * N).roll(N)
    w = torch.rand(N, dtype=torch.float64)
    each = F.cross_entropy(logits, target, reduction="none")
    assert torch.allclose(QDNTXentLoss(0.3)(a, b), each.mean())
    assert torch.allclose(QDNTXentLoss(0.3)(a, b, w), (each * w.repeat(2)).mean())


@pytest.mark.parametrize("chunk", [1, 3, 14, 100])
def test_the_chunked_simclr_loss_is_the_dense_one(chunk):
    grads = []
    for size in (chunk, 10**6):
        a, b = views(dtype=torch.float32)
        loss = QDNTXentLoss(0.2, chunk=size)(a, b, torch.linspace(0.5, 1.5, N))
        loss.backward()
        grads.append((loss, a.grad, b.grad))
    assert torch.allclose(grads[0][0], grads[1][0], atol=1e-6)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(grads[0][1:], grads[1][1:], strict=True))


def test_the_gradient_of_the_chunked_core_is_right_for_both_inputs():
    a, c = views(3, 4)[0], views(6, 4, seed=1)[0]
    positive, exclude = torch.tensor([2, 0, 5]), torch.tensor([1, -1, 0])
    call = lambda x, y: info_nce(x, y, positive, exclude=exclude, temperature=0.7, chunk=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, (a, c))


def test_without_weights_losses_are_lightlys():
    a, b = views(dtype=torch.float32)
    assert torch.allclose(QDNTXentLoss(0.5)(a, b), lightly.loss.NTXentLoss(0.5)(a, b), atol=1e-6)
    assert torch.allclose(QDNegativeCosine()(a, b), lightly.loss.NegativeCosineSimilarity()(a, b.detach()), atol=1e-6)


def test_the_swav_loss_is_lightlys():
    draw = torch.Generator().manual_seed(0)
    high = [F.normalize(torch.randn(16, 8, generator=draw), dim=1) for _ in range(2)]
    low = [F.normalize(torch.randn(16, 8, generator=draw), dim=1) for _ in range(3)]
    assert torch.allclose(QDSwAVLoss()(high, low), lightly.loss.SwaVLoss()(high, low), atol=1e-4)
    ones = torch.ones(16)
    assert torch.equal(QDSwAVLoss()(high, low, ones), QDSwAVLoss()(high, low))


def test_the_moco_v2_loss_is_the_cross_entropy_against_key_and_queue():
    loss = QDMoCoLoss(D, 11, 0.2).double().eval()
    a, b = views()
    q, k = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ loss.queue.T], dim=1) / 0.2
    w = torch.rand(N, dtype=torch.float64)
    expected = (F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64), reduction="none") * w).mean()
    assert torch.allclose(loss(a, b, w), expected)


def test_the_queue_is_written_around_its_end_and_no_key_is_lost():
    loss = QDMoCoLoss(2, 5)
    keys = [F.normalize(torch.randn(3, 2), dim=1) for _ in range(4)]
    for part in keys:
        loss(torch.randn(3, 2), part)
    last = torch.cat(keys)[-5:]
    assert int(loss.pointer) == 12 % 5
    assert torch.allclose(loss.queue.sort(dim=0).values, last.sort(dim=0).values)
    loss.enqueue(torch.randn(8, 2))
    assert int(loss.pointer) == 20 % 5


def test_the_moco_v3_loss_is_the_scaled_cross_entropy():
    a, b = views()
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.4
    assert torch.allclose(QDMoCoV3Loss(0.4)(a, b), 2 * 0.4 * F.cross_entropy(logits, torch.arange(N)))


def test_simsiam_and_byol_are_cosines_and_weigh_each_samples_gradient():
    a, b = views()
    cosine = F.cosine_similarity(a, b.detach(), dim=1)
    assert torch.allclose(QDNegativeCosine()(a, b), -cosine.mean())
    assert torch.allclose(QDNegativeCosine(byol=True)(a, b), (2 - 2 * cosine).mean())
    w = torch.rand(N, dtype=torch.float64)
    plain = torch.autograd.grad(QDNegativeCosine()(a, b), a)[0]
    weighted = torch.autograd.grad(QDNegativeCosine()(a, b, w), a)[0]
    assert torch.allclose(weighted, plain * w[:, None])


@pytest.mark.parametrize("name", ["mocov2", "mocov3", "simsiam", "byol"])
def test_no_gradient_goes_into_keys_and_targets(name):
    a, b = views()
    assert_gradient_isolated(PAIRWISE[name]()(a, b), reaches=[a], spares=[b])


def test_several_positives_are_stableReps_double_loop():
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    labels, w = torch.tensor([0, 0, 0, 1, 1, 1]), torch.rand(6, 6, generator=draw, dtype=torch.float64)
    x = F.normalize(z, dim=1)
    total = 0.0
    for k in range(6):
        others = [j for j in range(6) if j != k]
        lse = torch.logsumexp(torch.stack([x[k] @ x[j] / 0.1 for j in others]), dim=0)
        positives = [j for j in others if labels[j] == labels[k]]
        total -= sum(w[k, j] * (x[k] @ x[j] / 0.1 - lse) / len(positives) for j in positives)
    assert torch.allclose(QDMultiPositiveLoss()(z, labels, w), total / 6)


def test_with_one_positive_each_several_positives_are_simclr():
    a, b = views()
    q = torch.randn(N)
    labels = torch.arange(N).repeat(2)
    both = positive_weights(q.repeat(2)[:, None].expand(-1, 2 * N), labels, gamma=1.0)
    found = QDMultiPositiveLoss(0.2)(torch.cat([a, b]), labels, both)
    assert torch.allclose(found, QDNTXentLoss(0.2)(a, b, pair_weights(q, 1.0)), atol=1e-6)


def test_the_image_text_loss_is_clips_and_its_scale_is_held_at_100():
    a, b = views()
    x, t = F.normalize(a, dim=1), F.normalize(b, dim=1)
    own = torch.arange(N)
    expected = (F.cross_entropy(20 * x @ t.T, own) + F.cross_entropy(20 * t @ x.T, own)) / 2
    assert torch.allclose(image_text_qd_loss(a, b, 20.0), expected)
    assert torch.equal(image_text_qd_loss(a, b, 500.0), image_text_qd_loss(a, b, 100.0))
    assert not torch.allclose(image_text_qd_loss(a, b, 20.0, torch.linspace(0, 2, N)), expected)


def test_what_does_not_fit_is_refused_with_its_shapes():
    a, b = views()
    with pytest.raises(ValueError, match=r"\(7, 5\) and \(6, 5\)"):
        QDNTXentLoss()(a, b[:6])
    with pytest.raises(ValueError, match="temperature"):
        QDNTXentLoss(0.0)
    with pytest.raises(ValueError, match=r"\(7,\)"):
        QDNegativeCosine()(a, b, torch.ones(3))
    with pytest.raises(ValueError, match="one view only"):
        QDMultiPositiveLoss()(a, torch.arange(N))
    with pytest.raises(ValueError, match="two crops"):
        QDSwAVLoss()([a])


@pytest.mark.parametrize("name", ["barlow_twins", "BarlowTwins", "vicreg"])
def test_methods_without_a_loss_of_a_pair_are_refused_with_the_reason(name):
    with pytest.raises(NotImplementedError, match="no loss of a pair"):
        check_method(name)
