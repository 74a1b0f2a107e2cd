"""The contrast against a literal O(M^2) form with masks, and against what can be said in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pckd import CategoryContrastLoss, PCKDConfig, category_contrast, contrast

from tenfold.testing import assert_same_as_reference

SCALE = 4 / 0.07


def literal(A, labels, tau=4.0, tau0=0.07, eps=None):
    """Section by section as the loss is defined, row by row."""
    S = A @ A.T / tau
    out = []
    for i in range(len(A)):
        others = [k for k in range(len(A)) if k != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if eps is None:
            lse = S[i, others].logsumexp(0)
        else:
            top = S[i].max().detach()
            lse = top + ((S[i, others] - top).exp().sum() + eps).log()
        out.append(tau / tau0 * (lse - S[i, positives].mean()))
    return torch.stack(out)


def rows(images, classes, dim, scale=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = scale * torch.randn(2 * images, dim, generator=generator, dtype=dtype)
    return A.requires_grad_(), torch.randint(classes, (images,), generator=generator).repeat(2)


@settings(max_examples=25, deadline=None)
@given(
    images=st.integers(1, 20),
    classes=st.integers(1, 7),
    chunk=st.sampled_from([1, 3, 7, 40, 1000]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_the_literal_form_with_its_gradient_for_any_chunk(images, classes, chunk, scale, seed, dtype, bound):
    """30 gives norms beyond which one exponential for both rows underflows."""
    A, labels = rows(images, classes, 5, scale, dtype, seed)
    weight = torch.rand(2 * images, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    wide = A.detach().double().requires_grad_()
    ours, theirs = category_contrast(A, labels, chunk=chunk), literal(wide, labels)
    # a difference of two large numbers has their rounding
    size = SCALE * float(wide.detach().square().sum(1).max()) / 4
    assert (ours - theirs).abs().max() <= bound * max(size, float(theirs.detach().abs().max()), 1)
    a, b = (torch.autograd.grad((weight.to(x.dtype) * x).sum(), y)[0] for x, y in ((ours, A), (theirs, wide)))
    assert (a - b).abs().max() <= max(bound, 1e-5 if dtype == torch.float32 and scale > 1 else 0) * max(
        float(b.abs().max()), size
    )


@pytest.mark.parametrize("form", ["relation", "center"])
@pytest.mark.parametrize("gram", ["never", "always"])
def test_gradcheck_on_features_centers_and_heads(form, gram):
    """On A through its parts, W_s, E_s and E_t."""
    torch.manual_seed(0)
    loss = CategoryContrastLoss(2, 2, PCKDConfig(contrast=form, gram=gram)).double()
    feature, weight, teacher = (torch.randn(n, 2, dtype=torch.float64) for n in (4, 3, 3))
    labels = torch.tensor([0, 0, 1, 2])
    names = [name for name, _ in loss.named_parameters()]

    def of(feature, weight, *heads):
        return torch.func.functional_call(
            loss, dict(zip(names, heads, strict=True)), (feature, weight, teacher, labels)
        )

    inputs = [feature.requires_grad_(), weight.requires_grad_(), *loss.parameters()]
    assert torch.autograd.gradcheck(of, inputs)


def test_all_rows_equal():
    """Ell_i = (tau / tau0) ln(2N - 1); 249.683 for 80 rows."""
    ell = category_contrast(torch.ones(80, 7), torch.arange(40).repeat(2) % 5)
    assert ell.allclose(torch.tensor(SCALE * math.log(79)), rtol=1e-6)
    assert float(ell[0]) == pytest.approx(249.683, abs=1e-3)


def test_lower_bound_and_its_limit():
    """Ell_i >= (tau / tau0) ln |P(i)|, reached as A = s onehot(y) grows."""
    A, labels = rows(24, 4, 4)
    positives = torch.bincount(labels)[labels] - 1
    bound = SCALE * positives.double().log()
    assert bool((category_contrast(A, labels) >= bound - 1e-9).all())
    sharp = 60 * torch.nn.functional.one_hot(labels, 4).double()
    assert torch.allclose(category_contrast(sharp, labels), bound, atol=1e-6)


def test_names_of_classes_and_order_of_images_do_not_matter():
    """A permutation of the classes, with the rows of W; a permutation of the images."""
    torch.manual_seed(0)
    loss = CategoryContrastLoss(6, 5)
    feature, weight, teacher = torch.randn(12, 6), torch.randn(8, 6), torch.randn(8, 5)
    labels = torch.randint(8, (12,))
    expected = loss(feature, weight, teacher, labels)
    order = torch.randperm(8)
    renamed = loss(feature, weight[order], teacher[order], order.argsort()[labels])
    assert_same_as_reference(renamed, expected, relative=1e-6)
    images = torch.randperm(12)
    assert_same_as_reference(loss(feature[images], weight, teacher, labels[images]), expected[images], relative=1e-6)


def test_gram_path_equals_the_direct_one():
    """More classes than dimensions; also the gradients of W_s."""
    torch.manual_seed(0)
    feature, teacher, labels = torch.randn(24, 6), torch.randn(40, 5), torch.randint(40, (24,))
    found = []
    for gram in ("never", "always", "auto"):
        torch.manual_seed(1)
        loss, weight = CategoryContrastLoss(6, 5, PCKDConfig(gram=gram)), torch.randn(40, 6, requires_grad=True)
        x = feature.clone().requires_grad_()
        out = loss(x, weight, teacher, labels)
        found.append((out, *torch.autograd.grad(out.sum(), [x, weight, *loss.parameters()])))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert_same_as_reference(a, b, relative=1e-5)
    assert torch.equal(found[1][0], found[2][0])  # auto takes it here


def test_the_authors_epsilon_is_exact_for_small_norms_and_kills_the_repulsion_of_large_ones():
    """1e-4 below |A|^2 / tau of 5, another value beyond 60; equal to the literal form in both."""
    for size, exact in ((4.0, True), (90.0, False)):
        A, labels = rows(16, 4, 100, seed=3)
        A = (A.detach() / A.detach().norm(dim=1, keepdim=True) * math.sqrt(4 * size)).requires_grad_()
        ours = category_contrast(A, labels, eps=1e-7)
        assert_same_as_reference(ours, literal(A, labels, eps=1e-7), relative=1e-9)
        plain = category_contrast(A, labels)
        assert (float(((ours - plain).norm() / plain.norm()).detach()) < 1e-4) == exact
        theirs = torch.autograd.grad(literal(A, labels, eps=1e-7).sum(), A)[0]
        assert_same_as_reference(torch.autograd.grad(ours.sum(), A)[0], theirs, relative=1e-9)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_waits_for_the_backward_pass_changes_nothing(monkeypatch, kept):
    """Also where the backward pass comes a second time."""
    A, labels = rows(50, 4, 9)
    found = []
    for number in (contrast.KEPT, kept):
        monkeypatch.setattr(contrast, "KEPT", number)
        loss = category_contrast(A, labels, chunk=7).sum()
        found += [torch.autograd.grad(loss, A, retain_graph=True)[0] for _ in range(2)]
    for other in found[1:]:
        assert_same_as_reference(other, found[0], relative=1e-12)


def test_memory_of_8192_rows():
    """Under 64 MiB beyond the inputs, where one tensor of all pairs has 256 MiB."""
    A, labels = rows(4096, 100, 32, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        category_contrast(A, labels).sum().backward()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 4 * A.numel() <= peak < 64 * 2**20, peak


def test_bad_arguments():
    A, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    for changes in ({"tau": 0.0}, {"tau0": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            category_contrast(A, labels, **changes)
    with pytest.raises(ValueError, match="class 5 has one row only"):
        category_contrast(A, torch.tensor([0, 5, 0, 0]))
    with pytest.raises(ValueError, match="chunk"):
        category_contrast(A, labels, chunk=0)
