"""Weights of pairs: exact for equal qualities, of mean 1, sharp, the same for any number of processes."""

import json
import math
import subprocess
import sys

import pytest
import torch
from genview.losses import QDNTXentLoss
from genview.weights import check_weight, effective_share, pair_weights, weighted_mean
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("gamma", [0.0, 1.0, 7.3])
def test_equal_qualities_weigh_exactly_one_for_every_size(gamma):
    for n in range(1, 513):
        assert torch.equal(pair_weights(torch.full((n,), 0.3), gamma), torch.ones(n)), n


def test_gamma_zero_weighs_exactly_one():
    assert torch.equal(pair_weights(torch.randn(47), 0.0), torch.ones(47))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=40), st.floats(0.1, 5))
def test_weights_are_positive_of_mean_one_and_follow_the_softmax(values, gamma):
    q = torch.tensor(values, dtype=torch.float64)
    w = pair_weights(q, gamma)
    assert float(w.mean()) == pytest.approx(1)
    assert bool((w > 0).all())
    assert torch.allclose(w, len(q) * torch.softmax(gamma * q, dim=0))
    assert torch.allclose(pair_weights(q + 0.7, gamma), w)


def test_weights_increase_with_quality_and_follow_a_permutation():
    q = torch.randn(20)
    order = torch.randperm(20)
    w = pair_weights(q, 2.0)
    assert torch.equal(w.argsort(), q.argsort())
    assert torch.allclose(pair_weights(q[order], 2.0), w[order])


def test_a_huge_gamma_chooses_the_best_pair_without_overflow():
    w = pair_weights(torch.tensor([0.1, 0.5, -0.2, 0.4]), 1e4)
    assert torch.equal(w, torch.tensor([0.0, 4.0, 0.0, 0.0]))
    assert effective_share(w) == pytest.approx(0.25)


def test_pairs_outside_of_the_mask_weigh_one_and_have_no_part_in_the_mean():
    q, mask = torch.tensor([0.0, 1.0, 50.0]), torch.tensor([True, True, False])
    w = pair_weights(q, 1.0, mask=mask)
    assert float(w[2]) == 1
    assert torch.allclose(w[:2], pair_weights(q[:2], 1.0))
    assert torch.equal(pair_weights(q, 1.0, mask=torch.zeros(3, dtype=torch.bool)), torch.ones(3))


def test_no_gradient_goes_through_weights():
    q = torch.randn(5, requires_grad=True)
    assert not pair_weights(q).requires_grad


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (torch.ones(3), "one per pair"),
        (torch.tensor([1.0, -1, 1, 1]), "negative"),
        (torch.tensor([1.0, math.nan, 1, 1]), "NaN"),
        (torch.zeros(4), "all weights are 0"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weight, text):
    with pytest.raises(ValueError, match=text):
        check_weight(weight, 4, device=torch.device("cpu"))


def test_qualities_that_are_no_vector_or_hold_nan_are_refused():
    with pytest.raises(ValueError, match="vector"):
        pair_weights(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        pair_weights(torch.tensor([0.0, math.nan]))


def test_weights_with_a_gradient_are_detached_with_a_warning():
    with pytest.warns(UserWarning, match="detached"):
        assert not check_weight(torch.ones(3, requires_grad=True), 3, device=torch.device("cpu")).requires_grad


def test_a_mean_with_weights_of_one_is_the_plain_mean_bit_for_bit():
    losses = torch.randn(777)
    assert torch.equal(weighted_mean(losses, torch.ones(777)), weighted_mean(losses, None))


TWO = """
import json, sys
import torch
from genview.losses import QDNTXentLoss
from genview.weights import pair_weights

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
draw = torch.Generator().manual_seed(5)
q, a, b = (torch.randn(n, generator=draw, dtype=torch.float64) for n in ((12,), (12, 6), (12, 6)))
mine, found = slice(rank * 6, rank * 6 + 6), {}
for scope in ("global", "local"):
    x = a[mine].clone().requires_grad_()
    w = pair_weights(q[mine], 3.0, scope)
    loss = QDNTXentLoss(0.5)(x, b[mine], w)
    (loss / 2).backward()
    found[scope] = (w.tolist(), loss.item(), x.grad.tolist())
json.dump(found, open(out, "w"))
torch.distributed.destroy_process_group()
"""


def test_two_processes_with_global_weights_are_one_and_with_local_weights_are_not(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, str(r), str(tmp_path / "store"), str(tmp_path / f"{r}.json")])
        for r in (0, 1)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1)]
    draw = torch.Generator().manual_seed(5)
    q, a, b = (torch.randn(n, generator=draw, dtype=torch.float64) for n in ((12,), (12, 6), (12, 6)))
    a.requires_grad_()
    w = pair_weights(q, 3.0)
    loss = QDNTXentLoss(0.5)(a, b, w)
    loss.backward()
    for scope, equal in (("global", True), ("local", False)):
        weights, grads = (torch.tensor(found[0][scope][k] + found[1][scope][k], dtype=torch.float64) for k in (0, 2))
        mean = (found[0][scope][1] + found[1][scope][1]) / 2
        assert torch.allclose(weights, w) is equal
        assert torch.allclose(grads, a.grad) is equal
        assert (mean == pytest.approx(loss.item())) is equal
