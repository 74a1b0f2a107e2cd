"""Class vectors, dot regression and the class-sensitive losses, by their formulas, and on two processes."""

import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba_fscil.head import ETFHead, dot_regression_loss, simplex_etf
from mamba_fscil.losses import ClassSensitiveLoss, gate_size

from tenfold import UserError

_spec = importlib.util.spec_from_file_location("losses_run", Path(__file__).with_name("losses_run.py"))
_run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_run)
batch, generator = _run.batch, _run.generator


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(0, 20))
def test_class_vectors_are_a_simplex(classes, more):
    W = simplex_etf(classes + more, classes, generator()).double()
    expected = classes / (classes - 1) * torch.eye(classes).double() - 1 / (classes - 1)
    assert torch.allclose(W.t() @ W, expected, atol=1e-5)
    assert torch.allclose(W.sum(dim=1), torch.zeros(classes + more).double(), atol=1e-5)
    assert torch.equal(
        simplex_etf(classes + more, classes, generator()), simplex_etf(classes + more, classes, generator())
    )


def test_class_vectors_depend_on_their_generator_alone():
    torch.manual_seed(5)
    a = ETFHead(8, 4, generator()).W
    torch.manual_seed(6)
    assert torch.equal(a, ETFHead(8, 4, generator()).W)
    assert not torch.equal(a, ETFHead(8, 4, generator(1)).W)


def test_more_classes_than_dimensions_are_refused_with_both_numbers():
    with pytest.raises(UserError, match="9 classes does not fit into 8 dimensions"):
        ETFHead(8, 9)


def test_dot_regression_is_zero_at_the_class_vector_and_blind_to_length():
    W = simplex_etf(8, 5, generator())
    labels = torch.tensor([0, 3, 4])
    assert float(dot_regression_loss(W.t()[labels] * 7, W, labels)) == pytest.approx(0, abs=1e-9)
    mu = torch.randn(3, 8, generator=generator(), requires_grad=True)
    loss = dot_regression_loss(mu, W, labels)
    assert torch.allclose(loss, dot_regression_loss(3 * mu, W, labels))
    (grad,) = torch.autograd.grad(loss, mu)
    assert torch.allclose((grad * mu).sum(dim=1), torch.zeros(3), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_balanced_loss_is_the_mean_over_classes_and_the_authors_form_with_lengths(labels):
    W, labels = simplex_etf(8, 5, generator()).double(), torch.tensor(labels)
    mu = F.normalize(torch.randn(len(labels), 8, generator=generator()).double(), dim=1)
    cosine = (mu * W.t()[labels]).sum(dim=1)
    each = [5 * (cosine[labels == k] - 1).square().mean() for k in labels.unique()]
    found = dot_regression_loss(mu, W, labels, balanced=True)
    assert torch.allclose(found, torch.stack(each).mean())
    counts = torch.bincount(labels, minlength=5)
    length = ((len(labels) / len(each)) / counts[labels].double()).sqrt()
    theirs = 5 * (length * cosine - length).square().mean()
    assert torch.allclose(found, theirs)
    if len(set(counts[counts > 0].tolist())) == 1:
        assert torch.allclose(found, dot_regression_loss(mu, W, labels))


def test_the_terms_are_their_formulas_in_every_norm():
    gate, params, labels = batch()
    base = labels < 5
    for norm, size in {
        "rms": lambda g: g.square().mean().sqrt(),
        "fro_over_numel": lambda g: g.square().sum().sqrt() / g.numel(),
        "mean_square": lambda g: g.square().mean(),
    }.items():
        found = ClassSensitiveLoss(3.0, 0.5, 0.2, norm)(gate, params, labels, 5)
        assert float(found.suppression_base) == pytest.approx(3 * float(size(gate[base])))
        assert float(found.suppression_novel) == pytest.approx(-0.5 * float(size(gate[~base])))
        expected = 0.0
        for p in params:
            pair = F.normalize(torch.stack([p[base].mean(0), p[~base].mean(0)]), dim=1)
            expected += 0.2 * float((torch.eye(2) - pair @ pair.t()).abs().mean())
        assert float(found.separation) == pytest.approx(expected, rel=1e-5)


def test_separation_is_half_of_its_weight_for_parallel_means_and_zero_for_orthogonal_ones_whatever_their_length():
    gate, _, labels = batch(4)
    base = (labels < 5).float()[:, None]
    for angle, expected in ((torch.tensor([[2.0, 0.0]]), 0.5), (torch.tensor([[0.0, 3.0]]), 0.0)):
        p = base * torch.tensor([[1.0, 0.0]]) + (1 - base) * angle
        found = ClassSensitiveLoss(0, 0, 1.0)(gate, (p, 5 * p, p), labels, 5).separation
        assert float(found) == pytest.approx(3 * expected)


@pytest.mark.parametrize("norm", ["rms", "fro_over_numel", "mean_square"])
def test_a_gate_of_zeros_gives_a_gradient_of_zero_not_nan(norm):
    gate, params, labels = batch()
    gate = torch.zeros_like(gate, requires_grad=True)
    ClassSensitiveLoss(1, 1, 1, norm)(gate, params, labels, 5).total.backward()
    assert not gate.grad.any()
    assert float(gate_size(gate.detach(), norm)) == 0


def test_a_term_counts_only_where_every_group_has_the_rows_that_it_needs():
    gate, params, labels = batch()
    loss = ClassSensitiveLoss(1, 1, 1, virtual_ranks=2)
    found = loss(gate, params, torch.tensor([0, 1, 2, 3, 0, 9, 9, 9]), 5)
    assert (float(found.suppression_novel), float(found.separation)) == (0, 0)
    assert float(found.suppression_base) > 0
    assert float(loss(gate, params, labels, 0).suppression_base) == 0
    with pytest.raises(ValueError, match="7 rows do not make 2 equal groups"):
        loss(gate[:7], tuple(p[:7] for p in params), labels[:7], 5)


def test_groups_weaken_the_authors_norm_by_the_root_of_their_number_and_leave_rms():
    """Eight GPUs of eight rows pull harder than one of 64 rows."""
    gate, labels = torch.ones(64, 4, 6), torch.arange(64) % 10
    params = tuple(torch.ones(64, 3) for _ in range(3))
    pulls = {
        (norm, r): float(ClassSensitiveLoss(1, 0, 0, norm, r)(gate, params, labels, 10).total)
        for norm in ("rms", "fro_over_numel")
        for r in (1, 8)
    }
    assert pulls["rms", 8] == pytest.approx(pulls["rms", 1])
    assert pulls["fro_over_numel", 8] / pulls["fro_over_numel", 1] == pytest.approx(8**0.5)


def whole(norm, ranks):
    gate, params, labels = batch()
    gate.requires_grad_()
    W = simplex_etf(8, 8, generator())
    mu = torch.randn(8, 8, generator=generator(3))
    loss = ClassSensitiveLoss(3.0, 0.5, 0.2, norm, ranks)(gate, params, labels, 5).total
    return gate, loss, dot_regression_loss(mu, W, labels % 8, balanced=True)


def test_two_processes_give_what_one_gives_with_the_same_number_of_groups(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    script = str(Path(__file__).with_name("losses_run.py"))
    both = [subprocess.Popen([sys.executable, script, str(rank), port, str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for ranks in (1, 2):
        gate, loss, regression = whole("fro_over_numel", ranks)
        (grad,) = torch.autograd.grad(loss, gate)
        for rank in (0, 1):
            assert torch.allclose(shares[rank][f"loss {ranks}"], loss, atol=1e-7)
            assert torch.allclose(shares[rank][f"gradient {ranks}"], grad[4 * rank : 4 * rank + 4], atol=1e-7)
    assert torch.allclose((shares[0]["regression"] + shares[1]["regression"]) / 2, regression)
