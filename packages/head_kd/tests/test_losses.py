import pytest
import torch
from head_kd.losses import PerAnchorLinear, gap_r2, mimic_loss, pkd_loss, ramp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def rows(m=40, d=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((m, d), generator=generator), torch.randn((m, d), generator=generator)


def test_the_plain_loss_is_the_mean_over_all_elements_written_out():
    p, t = rows()
    expected = sum((float(p[m, k]) - float(t[m, k])) ** 2 for m in range(40) for k in range(7)) / (40 * 7)
    assert float(mimic_loss(p, t)) == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_the_normalized_loss_does_not_see_a_common_scale(scale, seed):
    p, t = rows(seed=seed)
    assert float(mimic_loss(scale * p, scale * t, normalize=True)) == pytest.approx(
        float(mimic_loss(p, t, normalize=True)), rel=1e-4
    )


def test_predicting_the_mean_leaves_all_of_the_variance():
    """With the population variance, the mean's normalized loss is 1."""
    _, t = rows()
    assert float(mimic_loss(t.mean(dim=0).expand_as(t), t, normalize=True)) == pytest.approx(1, abs=1e-6)


def test_the_order_of_regions_does_not_matter():
    p, t = rows()
    order = torch.randperm(len(p))
    assert float(mimic_loss(p[order], t[order], normalize=True)) == pytest.approx(
        float(mimic_loss(p, t, normalize=True)), rel=1e-6
    )


def test_least_squares_is_the_floor_of_a_linear_adapter():
    """L-BFGS on the adapter reaches 1 - R^2 of least squares."""
    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=torch.float64)
    t = x @ torch.randn(5, 4, dtype=torch.float64) + torch.randn(60, 4, dtype=torch.float64)
    with_bias = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    residual = t - with_bias @ torch.linalg.lstsq(with_bias, t).solution
    # the loss divides by the mean variance of the features, so R^2 pools them alike
    floor = float((residual**2).mean() / t.var(dim=0, correction=0).mean())
    phi = nn.Linear(5, 4).float()
    optimizer = torch.optim.LBFGS(phi.parameters(), max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = mimic_loss(phi(x.float()), t.float(), normalize=True)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure()) == pytest.approx(floor, abs=1e-4)


def test_nothing_to_imitate_is_zero_with_a_zero_gradient():
    phi = nn.Linear(3, 2)
    loss = mimic_loss(phi(torch.zeros(0, 3)), torch.zeros(0, 2), normalize=True)
    loss.backward()
    assert float(loss) == 0
    assert all(p.grad is not None and not p.grad.any() for p in phi.parameters())


def test_the_target_gets_no_gradient_and_half_precision_is_summed_in_fp32():
    p, t = rows()
    t.requires_grad_()
    mimic_loss(p.requires_grad_(), t).backward()
    assert t.grad is None
    assert mimic_loss(p.half(), t.half()).dtype == torch.float32


def test_the_schedule_rises_and_stops():
    assert [ramp(i, warmup=2000) for i in (0, 1000, 2000, 5000)] == [0, 0.5, 1, 1]
    assert [ramp(i, warmup=2000, stop=3000) for i in (2999, 3000, 9000)] == [1, 0, 0]
    assert [ramp(i, warmup=10, start=5) for i in (0, 5, 10, 15)] == [0, 0, 0.5, 1]
    assert [ramp(i, warmup=0) for i in (0, 1)] == [1, 1]


def test_an_adapter_for_each_anchor_is_a_loop_over_rows():
    torch.manual_seed(0)
    layer = PerAnchorLinear(3, 4, 5)
    x, anchor = torch.randn(20, 4), torch.randint(3, (20,))
    loop = torch.stack([layer.maps[int(a)](row) for row, a in zip(x, anchor, strict=True)])
    assert torch.allclose(layer(x, anchor), loop, atol=1e-6)
    layer(x, torch.zeros(20, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_pkd_is_one_minus_the_correlation_of_each_channel():
    torch.manual_seed(0)
    p, t = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
    correlations = [torch.corrcoef(torch.stack([p[:, c].flatten(), t[:, c].flatten()]))[0, 1] for c in range(5)]
    assert float(pkd_loss(p, t)) == pytest.approx(float(1 - torch.stack(correlations).mean()), abs=1e-5)
    assert float(pkd_loss(3 * t + 4, t)) == pytest.approx(0, abs=1e-6)


def test_the_semantic_gap_of_a_linear_copy_and_of_noise():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    assert gap_r2(x, x @ torch.randn(8, 6), ridge=1e-8) == pytest.approx(1, abs=1e-6)
    assert gap_r2(x, torch.randn(400, 6)) < 0.05
    assert gap_r2(x[:3], x[:3]) != gap_r2(x[:3], x[:3])  # nan
