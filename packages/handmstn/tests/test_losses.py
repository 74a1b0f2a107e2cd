"""The losses, one by one and mixed with pytorch-metric-learning's."""

import math

import pytest
import torch
import torch.nn.functional as F
from handmstn import ArcMarginHead, BatchHardTriplet, CenterLoss, IdentityLoss, SoftmaxHead
from handmstn.losses import arc_logits, point_loss, sum_weighted, visibility_loss

from tenfold.testing import assert_gradient_isolated


def batch(size=8, dim=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dim, generator=generator), torch.arange(size) % classes


def test_arcface_without_margin_is_the_scaled_cosine_softmax():
    x, y = batch()
    head = ArcMarginHead(4, 6, scale=20.0, margin=0.0)
    expected = F.cross_entropy(20 * F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T, y)
    assert torch.allclose(head(x, y), expected, atol=1e-5)


def test_arcfaces_target_logit_falls_with_the_angle_and_jumps_once():
    theta = torch.linspace(0.01, math.pi - 0.01, 2000, dtype=torch.float64)
    logit = arc_logits(theta.cos()[:, None].float(), torch.zeros(2000, dtype=torch.long), 1.0, 0.5)[:, 0].double()
    steps = logit.diff()
    assert bool((steps < 0).all())
    here = torch.tensor([math.cos(math.pi - 0.5) + 1e-6, math.cos(math.pi - 0.5) - 1e-6])
    above, below = arc_logits(here[:, None], torch.zeros(2, dtype=torch.long), 1.0, 0.5)[:, 0].tolist()
    assert above - below == pytest.approx(math.cos(0.5) + 0.5 * math.sin(0.5) - 1, abs=1e-3)
    assert math.cos(0.5) + 0.5 * math.sin(0.5) - 1 == pytest.approx(0.117, abs=1e-3)


def test_arcface_is_finite_in_half_precision_at_cosines_of_one():
    cosine = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float16, requires_grad=True)
    found = arc_logits(cosine, torch.tensor([0, 0]), 30.0, 0.5)
    assert bool(torch.isfinite(found).all())
    (gradient,) = torch.autograd.grad(found.float().sum(), cosine)
    assert bool(torch.isfinite(gradient).all())


def test_the_batch_hard_triplet_is_the_hardest_of_each_anchor():
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [1.0, 4.0]])
    y = torch.tensor([0, 0, 1, 1])
    d = torch.cdist(x, x)
    expected = []
    for i in range(4):
        far = max(float(d[i, j]) for j in range(4) if y[j] == y[i])
        near = min(float(d[i, j]) for j in range(4) if y[j] != y[i])
        expected.append(max(0.0, 0.3 + far - near))
    assert float(BatchHardTriplet(0.3)(x, y)) == pytest.approx(sum(expected) / 4, abs=1e-5)
    soft = sum(math.log1p(math.exp(e - 0.3)) for e in expected) / 4
    assert float(BatchHardTriplet(0.0)(x, y)) == pytest.approx(soft, abs=0.2)


def test_equal_embeddings_give_the_margin_with_a_finite_gradient_and_one_class_is_refused():
    x = torch.ones(4, 3, requires_grad=True)
    loss = BatchHardTriplet(0.3)(x, torch.tensor([0, 0, 1, 1]))
    assert float(loss) == pytest.approx(0.3)
    loss.backward()
    assert bool(torch.isfinite(x.grad).all())
    with pytest.raises(ValueError, match="two identities"):
        BatchHardTriplet()(x, torch.zeros(4, dtype=torch.long))


def test_centers_move_by_the_papers_formula_and_only_in_training():
    loss = CenterLoss(3, 2, rate=0.5)
    loss.centers[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    x, y = torch.tensor([[2.0, 0.0], [4.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    value = loss(x, y)
    assert float(value) == pytest.approx(0.5 * (1 + (9 + 4) + 1) / 3)
    first = torch.tensor([1.0, 0.0]) - 0.5 * (torch.tensor([-1.0, 0.0]) + torch.tensor([-3.0, -2.0])) / 3
    second = torch.tensor([0.0, 1.0]) - 0.5 * torch.tensor([0.0, 1.0]) / 2
    assert torch.allclose(loss.centers, torch.stack([first, second, torch.tensor([5.0, 5.0])]))
    before = loss.eval().centers.clone()
    loss(x, y)
    assert torch.equal(loss.centers, before)


def test_a_weight_of_zero_makes_no_term_and_leaves_no_graph():
    x, y = batch()
    parts = x.view(8, 2, 3).clone().requires_grad_()
    whole = parts.flatten(1)
    loss = IdentityLoss({"identity": 1.0, "part": 0.0, "triplet": 0.0, "center": 0.0}, 4, 3, 2)
    terms = loss(whole, parts, torch.ones(8, 2), y)
    assert set(terms) == {"identity"}
    assert set(loss.terms) == {"identity"}
    assert not list(loss.buffers())
    with pytest.raises(ValueError, match="nothing is learned"):
        sum_weighted({}, {})


def test_a_hidden_part_gives_its_loss_no_gradient():
    x, y = batch()
    parts = x.view(8, 2, 3).clone().requires_grad_()
    loss = IdentityLoss({"part": 1.0}, 4, 3, 2)
    visibility = torch.ones(8, 2)
    visibility[:, 1] = 0.0
    first, second = parts[:, :1].clone(), parts[:, 1:].clone()
    total = loss.total(loss(parts.flatten(1), torch.cat([first, second], 1), visibility, y))
    assert_gradient_isolated(total, reaches=[first], spares=[second])


def test_unknown_points_and_visibilities_count_for_nothing():
    points, target = torch.zeros(2, 3, 2, requires_grad=True), torch.ones(2, 3, 2)
    target[0, 1] = float("nan")
    counted = torch.isfinite(target).all(-1).float()
    gap = torch.nan_to_num(points - target).square().sum(-1).sqrt()
    plain = sum(float(c * g) for c, g in zip(counted.flatten(), gap.flatten(), strict=True)) / float(counted.sum())
    assert float(point_loss(points, target, counted, "plain")) == pytest.approx(plain, abs=1e-4)
    loss = point_loss(points, target, counted)
    assert float(loss) == pytest.approx(2.0)
    loss.backward()
    assert not points.grad[0, 1].any()
    logits = torch.zeros(1, 2, requires_grad=True)
    assert float(visibility_loss(logits, torch.tensor([[float("nan"), 1.0]]))) == pytest.approx(math.log(2))


def test_losses_mix_with_pytorch_metric_learnings_losses_and_miners():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    x, y = batch(12, 6, 4)
    x = x.requires_grad_()
    ours = {
        "softmax": SoftmaxHead(4, 6),
        "arc": ArcMarginHead(4, 6),
        "triplet": BatchHardTriplet(),
        "center": CenterLoss(4, 6),
    }
    mixed = losses.MultipleLosses(
        {**ours, "supcon": losses.SupConLoss()}, weights={**dict.fromkeys(ours, 1.0), "supcon": 0.5}
    )
    total = mixed(x, y)
    total.backward()
    assert bool(torch.isfinite(x.grad).all())
    for miner in (miners.BatchHardMiner(), miners.MultiSimilarityMiner()):
        mined = miner(x, y)
        assert bool(torch.isfinite(BatchHardTriplet()(x, y, mined)))
    hardest = miners.BatchHardMiner(
        distance=__import__("pytorch_metric_learning.distances").distances.LpDistance(normalize_embeddings=False)
    )
    assert float(BatchHardTriplet()(x, y, hardest(x, y))) == pytest.approx(float(BatchHardTriplet()(x, y)), abs=1e-4)


def test_batches_of_pytorch_metric_learnings_samplers_train_with_our_losses():
    samplers = pytest.importorskip("pytorch_metric_learning.samplers")
    labels = torch.arange(6).repeat_interleave(5)
    data = torch.utils.data.TensorDataset(torch.randn(30, 3, 6, generator=torch.Generator().manual_seed(0)), labels)
    losses = IdentityLoss({"identity": 1.0, "triplet": 1.0, "center": 1e-3}, 6, 6, 3)
    for sampler in (samplers.MPerClassSampler(labels, 2, 12), samplers.FixedSetOfTriplets(labels, 30)):
        for parts, classes in torch.utils.data.DataLoader(data, batch_size=12, sampler=sampler):
            unit = torch.nn.functional.normalize(parts, dim=2).requires_grad_()
            total = losses.total(losses(unit.flatten(1), unit, torch.ones(len(unit), 3), classes))
            total.backward()
            assert bool(torch.isfinite(unit.grad).all())
