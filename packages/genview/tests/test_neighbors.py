"""Nearest neighbors and probes against literal loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from genview.neighbors import knn_accuracy, knn_votes, largest
from genview.probes import few_labels, linear_sweep, rates_of, standardized, train_heads
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression


def blobs(n=120, d=6, classes=3, spread=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centers = 3 * torch.eye(classes, d)
    return centers[y] + spread * torch.randn(n, d, generator=draw), y


def test_votes_are_those_of_a_loop_for_every_chunk():
    (bank, y), (x, _) = blobs(40), blobs(9, seed=1)
    b, q = F.normalize(bank, dim=1), F.normalize(x, dim=1)
    expected = torch.zeros(9, 3)
    for i in range(9):
        s = b @ q[i]
        near = sorted(range(40), key=lambda j: -float(s[j]))[:7]
        for j in near:
            expected[i, y[j]] += math.exp((float(s[j]) - float(s[near[0]])) / 0.07)
    for chunk in (1, 4, 100):
        assert torch.allclose(knn_votes(x, bank, y, 3, k=7, chunk=chunk), expected, rtol=1e-4)


def test_many_queries_and_a_long_bank_have_the_votes_of_a_plain_sort():
    (bank, y), (x, _) = blobs(2003), blobs(103, seed=1)
    found = (F.normalize(x, dim=1) @ F.normalize(bank, dim=1).T).topk(9, dim=1)
    strength = ((found.values - found.values[:, :1]) / 0.07).exp()
    expected = torch.zeros(103, 3).scatter_add_(1, y[found.indices], strength)
    for chunk in (40, 64, 128):
        assert torch.allclose(knn_votes(x, bank, y, 3, k=9, chunk=chunk), expected, rtol=1e-4)


def test_the_nearest_neighbor_of_a_training_picture_is_itself():
    x, y = blobs()
    assert knn_accuracy(x, y, x, y, k=1) == {1: 100.0, 5: 100.0}


def test_a_class_without_a_vote_is_not_among_the_most_voted_ones():
    bank = torch.eye(10).repeat_interleave(3, dim=0)
    assert knn_accuracy(torch.eye(10), torch.ones(10).long(), bank, torch.zeros(30).long(), k=3) == {1: 0.0, 5: 0.0}


def test_more_neighbors_than_there_are_are_clipped_with_a_warning():
    x, y = blobs(10)
    with pytest.warns(UserWarning, match="k is 50, but the bank holds 10"):
        knn_votes(x, x, y, 3, k=50)
    with pytest.raises(ValueError, match="no fit"):
        knn_votes(x, x[:0], y[:0], 3)


def test_a_probe_separates_what_can_be_separated():
    (x, y), (t, z) = blobs(spread=0.1), blobs(60, spread=0.1, seed=1)
    assert linear_sweep(x, y, t, z, rates=5, epochs=20).top1 == 100


def test_a_probe_is_as_good_as_logistic_regression():
    (x, y), (t, z) = blobs(600, 20, 5, 1.6), blobs(2000, 20, 5, 1.6, seed=1)
    found = linear_sweep(x, y, t, z, rates=12, epochs=40)
    a, b = standardized(x, t)
    theirs = 100 * LogisticRegression(max_iter=2000).fit(a.numpy(), y.numpy()).score(b.numpy(), z.numpy())
    assert abs(found.top1 - theirs) <= 1.0 + 100 / 2000
    assert found.rate in found.rates


def test_many_rates_at_once_are_each_rate_alone():
    x, y = blobs(64, 4)
    rates = rates_of(4)
    w, b = train_heads(x, y, 3, rates, epochs=3, batch_size=16)
    for i, rate in enumerate(rates):
        single = train_heads(x, y, 3, (rate,), epochs=3, batch_size=16)
        assert torch.allclose(w[i], single[0][0], atol=1e-5)
        assert torch.allclose(b[i], single[1][0], atol=1e-5)


def test_a_share_of_the_labels_is_stratified_and_the_same_again():
    y = torch.arange(200) % 10
    chosen = few_labels(y, 0.1)
    assert np.bincount(y[chosen].numpy()).tolist() == [2] * 10
    assert chosen == few_labels(y, 0.1)
    assert len(few_labels(y, 0.01)) == 10


@given(
    st.integers(1, 4), st.integers(1, 700), st.integers(1, 40), st.sampled_from([2, 9, 10**6]), st.integers(0, 10**6)
)
@settings(max_examples=300, deadline=None)
def test_the_largest_of_rows_with_ties_are_those_of_topk_each_at_a_place_of_its_own(rows, columns, k, kinds, seed):
    k = min(k, columns)
    values = torch.randint(kinds, (rows, columns), generator=torch.Generator().manual_seed(seed)).float() - kinds // 2
    found, where = largest(values, k)
    assert torch.equal(found, values.topk(k, dim=1).values)
    assert torch.equal(values.gather(1, where), found)
    assert all(len(set(row)) == k for row in where.tolist())


@pytest.mark.parametrize(("rows", "columns", "k"), [(4, 5003, 20), (2, 50_000, 200), (2, 1000, 1), (1, 64, 64)])
def test_the_largest_of_long_rows_without_ties_stand_where_topk_finds_them(rows, columns, k):
    draw = torch.Generator().manual_seed(columns)
    values = torch.stack([torch.randperm(columns, generator=draw) for _ in range(rows)]).float()
    values[:, :3] = -torch.inf
    found, where = largest(values, k)
    expected = values.topk(k, dim=1)
    assert torch.equal(found, expected.values)
    assert torch.equal(where, expected.indices) or k == columns
