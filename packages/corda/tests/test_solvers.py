import mpmath
import pytest
import torch
from corda import CordaInit, DampedCovariance, factorize
from corda.factors import output_energy
from corda.moments import CrossMoment
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import NonFiniteError, UserError
from tenfold.testing import assert_same_as_reference

SHAPES = [(12, 20), (16, 16), (24, 10)]
MODES = ["ipm", "kpm"]


def problem(m, n, seed=0, tokens=None, outliers=20.0):
    """W, C and X with a few strong channels, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    X = torch.randn(n, tokens or 4 * n, generator=generator, dtype=torch.float64)
    X[: max(1, n // 8)] *= outliers
    return W, X @ X.T, X


def damped(C, delta=0.01):
    return C + delta * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)


def literal(W, C, r, mode, s=1.0, power=1):
    """The published recipe: SVD of W C_d^p, V^T C_d^-p by an explicit inverse, sqrt of sigma on both sides."""
    values, vectors = torch.linalg.eigh(damped(C))
    root = vectors @ torch.diag(values**power) @ vectors.T
    U, S, Vh = torch.linalg.svd(W @ root, full_matrices=False)
    Vh = Vh @ torch.linalg.inv(root)
    chosen = slice(None, r) if mode == "ipm" else slice(len(S) - r, None)
    S = S[chosen] / s
    return S.sqrt()[:, None] * Vh[chosen], U[:, chosen] * S.sqrt()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    mode=st.sampled_from(MODES),
    power=st.sampled_from([1, 0.5, 0]),
    s=st.sampled_from([0.5, 1.0, 2.0]),
    r=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_product_equals_the_published_recipe(shape, mode, power, s, r, seed):
    """No inverse and no V, the same B A, for wide, square and tall layers."""
    W, C, _ = problem(*shape, seed=seed)
    A, B = literal(W, C, r, mode, s, power)
    factors = factorize(W, C, r, CordaInit(mode=mode, power=power), scaling=s)
    assert_same_as_reference(factors.B @ factors.A, B @ A, relative=1e-7)
    assert_same_as_reference(factors.A.norm(dim=1).sort().values, A.norm(dim=1).sort().values, relative=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_a_projection(shape, mode):
    """U is orthonormal, U^T W' = 0, B^T W' = 0, the rank falls by r."""
    W, C, _ = problem(*shape)
    factors = factorize(W, C, 3, CordaInit(mode=mode))
    U = factors.left
    residual = W - factors.B @ factors.A
    assert (U.T @ U - torch.eye(3)).abs().max() < 1e-12
    assert (U.T @ residual).abs().max() < 1e-11
    assert (factors.B.T @ residual).abs().max() < 1e-9
    assert torch.linalg.matrix_rank(residual) == min(shape) - 3


@pytest.mark.parametrize("shape", SHAPES)
def test_power_zero_is_the_plain_svd(shape):
    """PiSSA's leading and MiLoRA's trailing factors up to sign, without any covariance."""
    W, _, _ = problem(*shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for mode, chosen in (("ipm", slice(None, 3)), ("kpm", slice(len(S) - 3, None))):
        factors = factorize(W, None, 3, CordaInit(mode=mode, power=0))
        assert_same_as_reference(factors.B.abs(), (U[:, chosen] * S[chosen].sqrt()).abs(), relative=1e-9)
        assert_same_as_reference(factors.A.abs(), (S[chosen].sqrt()[:, None] * Vh[chosen]).abs(), relative=1e-9)


def test_identity_covariance_changes_only_the_split():
    """With C = I, B and A of the plain SVD times and divided by sqrt(1 + delta)."""
    W, _, _ = problem(16, 16)
    plain = factorize(W, None, 3, CordaInit(mode="ipm", power=0))
    ours = factorize(W, torch.eye(16, dtype=torch.float64), 3, CordaInit(mode="ipm"))
    assert_same_as_reference(ours.B, plain.B * 1.01**0.5, relative=1e-10)
    assert_same_as_reference(ours.A, plain.A / 1.01**0.5, relative=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_the_covariance_moves_between_A_and_B_only(mode):
    """C -> 100 C leaves B A; |B| x 10 and |A| / 10 with paper, nothing at all with balanced."""
    W, C, _ = problem(12, 20)
    for balance, factor in (("paper", 10.0), ("balanced", 1.0)):
        init = CordaInit(mode=mode, balance=balance)
        one, hundred = factorize(W, C, 3, init), factorize(W, 100 * C, 3, init)
        assert_same_as_reference(hundred.B @ hundred.A, one.B @ one.A, relative=1e-10)
        assert_same_as_reference(hundred.B, one.B * factor, relative=1e-9)
        assert_same_as_reference(hundred.A, one.A / factor, relative=1e-9)
    assert_same_as_reference(one.A.norm(dim=1), one.B.norm(dim=0), relative=1e-12)


def test_leading_components_are_the_best_projection():
    """The smallest weighted error among 200 random projections, and the sum of what is dropped."""
    W, C, _ = problem(12, 20)
    Cd = damped(C)
    S = torch.linalg.svdvals(W @ Cd)
    U = factorize(W, C, 5, CordaInit(mode="ipm", solver="exact")).left
    best = ((W - U @ U.T @ W) @ Cd).norm()
    assert best.item() == pytest.approx(S[5:].square().sum().sqrt().item(), rel=1e-9)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        Q = torch.linalg.qr(torch.randn(12, 5, generator=generator, dtype=torch.float64)).Q
        assert ((W - Q @ Q.T @ W) @ Cd).norm() >= best


def trailing(W, C, damping):
    """The last four left singular vectors of W C_d, by 60-digit arithmetic."""
    m = len(W)
    mpmath.mp.dps = 60
    M = mpmath.matrix(W.tolist()) * mpmath.matrix(damped(C, damping).tolist())
    values, vectors = mpmath.eigsy(M * M.T)
    order = sorted(range(m), key=lambda i: values[i])[m - min(W.shape) :][:4]
    return torch.tensor([[float(vectors[row, i]) for i in order] for row in range(m)], dtype=torch.float64)


def graded(m, n, decades, seed):
    """A matrix whose singular values span so many decades."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(size, min(m, n), generator=generator, dtype=torch.float64)).Q for size in (m, n)
    )
    return U @ torch.diag(torch.logspace(0, -decades, min(m, n), dtype=torch.float64)) @ V.T


@pytest.mark.parametrize("shape", [(24, 24), (32, 24), (24, 40)])
def test_trailing_subspace_of_a_graded_covariance_is_accurate(shape):
    """Eigenvalues of C over six decades; the subspace against 60-digit arithmetic, angle below 1e-6."""
    m, n = shape
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = graded(n, n, 3, seed=1)
    C = root @ root.T
    ours = factorize(W, C, 4, CordaInit(mode="kpm", damping=1e-9)).left
    exact = trailing(W, C, 1e-9)
    sines = torch.linalg.svdvals(ours - exact @ (exact.T @ ours))
    assert sines.max() < 1e-6
    fp32 = factorize(W, C, 4, CordaInit(mode="kpm", damping=1e-9, solver="lapack_svd", precision="fp32")).left
    assert torch.linalg.svdvals(fp32 - exact @ (exact.T @ fp32).to(fp32)).max() > 1e-6, "the published way is worse"


@pytest.mark.parametrize("shape", [(24, 24), (32, 24), (24, 40)])
def test_trailing_subspace_of_an_ill_conditioned_weight_is_accurate(shape):
    """Singular values of W over six decades, of which the Cholesky factor of W^T W keeps few digits."""
    W, (_, C, _) = graded(*shape, 6, seed=2), problem(*shape)
    ours = factorize(W, C, 4, CordaInit(mode="kpm"))
    exact = trailing(W, C, 0.01)
    assert (ours.solver, ours.null) == ("inverse", 0)
    assert torch.linalg.svdvals(ours.left - exact @ (exact.T @ ours.left)).max() < 1e-8


@pytest.mark.parametrize("shape", [(96, 160), (128, 128), (160, 96)])
def test_solvers_agree(shape):
    """The same energy in both modes, randomized in fp32 and fp64 too."""
    W, C, _ = problem(*shape)
    M = W @ damped(C)

    def energy(**init):
        return (factorize(W, C, 6, CordaInit(**init)).left.T @ M).square().sum().item()

    reference = energy(mode="ipm", solver="lapack_svd")
    assert energy(mode="ipm", solver="exact") == pytest.approx(reference, rel=1e-10)
    assert energy(mode="ipm", solver="randomized") == pytest.approx(reference, rel=1e-6)
    assert energy(mode="ipm", solver="randomized", precision="fp32") == pytest.approx(reference, rel=1e-5)
    assert energy(mode="kpm") == pytest.approx(energy(mode="kpm", solver="lapack_svd"), rel=1e-6)


def test_auto_takes_the_randomised_solver_for_few_components_and_says_so():
    W, C, _ = problem(200, 256)
    assert factorize(W, C, 4, CordaInit(mode="ipm")).solver == "randomized"
    assert factorize(W, C, 60, CordaInit(mode="ipm")).solver == "exact"
    assert factorize(W, C, 4, CordaInit(mode="kpm")).solver == "inverse"
    assert factorize(W.float(), C, 4, CordaInit(mode="ipm")).precision == "fp32"
    assert factorize(W.float(), C, 4, CordaInit(mode="kpm")).precision == "fp64"


@pytest.mark.parametrize("mode", MODES)
def test_sign_convention_and_determinism(mode):
    """The largest entry of each u is positive; the same seed gives the same bits."""
    W, C, _ = problem(128, 160)
    one, two = (factorize(W.float(), C, 4, CordaInit(mode=mode)) for _ in range(2))
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    peak = one.left.gather(0, one.left.abs().argmax(dim=0, keepdim=True))
    assert (peak > 0).all()
    assert (one.sigma.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(16, 24), (16, 16), (24, 16)])
def test_null_directions_of_a_rank_deficient_weight_are_left_out(shape):
    """A direction that W does not have contributes nothing to B A; the next components are taken."""
    W, C, _ = problem(*shape)
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(shape[0], 10, generator=generator, dtype=torch.float64)
    W = low @ torch.randn(10, shape[1], generator=generator, dtype=torch.float64)
    factors = factorize(W, C, 3, CordaInit(mode="kpm"))
    assert factors.null == 6
    U, S, _ = torch.linalg.svd(W @ damped(C), full_matrices=False)
    assert_same_as_reference(factors.left @ factors.left.T, U[:, 7:10] @ U[:, 7:10].T, relative=1e-6)
    assert_same_as_reference(factors.sigma, S[7:10], relative=1e-6)
    with pytest.raises(UserError, match="rank 11 of a .* layer whose weight has rank 10"):
        factorize(W, C, 11, CordaInit(mode="kpm"))


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
@pytest.mark.parametrize("balance", ["paper", "balanced"])
def test_null_directions_can_be_taken_as_they_are(shape, balance):
    """As the paper's own last components: dead ones, with zero rows of A and columns of B, before the next smallest."""
    W, C, _ = problem(*shape)
    W[:, -4:] = 0 if shape[0] > shape[1] else W[:, -4:]
    W[:4] = 0 if shape[0] < shape[1] else W[:4]
    init = CordaInit(mode="kpm", skip_null=False, balance=balance)
    factors = factorize(W, C, 6, init)
    assert factors.null == 4
    assert factors.sigma[2:].abs().max() == 0
    assert factors.A[2:].abs().max() == factors.B[:, 2:].abs().max() == 0
    assert_same_as_reference(factors.left.T @ factors.left, torch.eye(6, dtype=torch.float64), relative=1e-10)
    alive = factorize(W, C, 2, CordaInit(mode="kpm", balance=balance))
    assert_same_as_reference(factors.B @ factors.A, alive.B @ alive.A, relative=1e-8)
    assert factorize(W, C, 3, init).A.abs().max() == 0


@pytest.mark.parametrize("shape", [(256, 320), (320, 256)])
@pytest.mark.parametrize("kind", ["outliers", "power law", "one strong"])
def test_randomised_components_are_exact_one_by_one(shape, kind):
    """For the small ones too: sigma_i of the leading components span several decades."""
    m, n = shape
    W, _, X = problem(m, n, outliers=1.0)
    strength = {
        "outliers": torch.cat([torch.full((8,), 50.0), torch.ones(n - 8)]),
        "power law": torch.arange(1, n + 1) ** -1.0,
        "one strong": torch.cat([torch.tensor([1e3]), torch.arange(1, n) ** -0.5]),
    }[kind].double()[:, None]
    C = (strength * X) @ (strength * X).T
    M = W @ damped(C)
    sigma = torch.linalg.svdvals(M)[:12]
    for precision in ("fp32", "fp64"):
        factors = factorize(W, C, 12, CordaInit(mode="ipm", solver="randomized", precision=precision))
        captured = (factors.left.T @ M).square().sum().item()
        assert captured == pytest.approx(sigma.square().sum().item(), rel=1e-6)
        assert factors.energy == pytest.approx(captured, rel=1e-5)
        if factors.solver == "randomized":
            assert factors.iterations >= 3
            torch.testing.assert_close(factors.sigma.to(sigma), sigma, rtol=2e-3, atol=1e-5 * sigma[0].item())


@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(mode):
    W, C, _ = problem(160, 200)
    plain = factorize(W.float(), C, 8, CordaInit(mode=mode))
    with torch.autocast("cpu", torch.bfloat16):
        cast = factorize(W.float(), C, 8, CordaInit(mode=mode))
    assert torch.equal(cast.A, plain.A)
    assert torch.equal(cast.B, plain.B)


def test_the_randomised_solver_goes_on_until_the_energy_is_there():
    """A flat spectrum, where every step finds a little more."""
    W, _, _ = problem(720, 768)
    factors = factorize(W, None, 12, CordaInit(mode="ipm", power=0, solver="randomized"))
    best = torch.linalg.svdvals(W)[:12].square().sum().item()
    assert factors.solver == "randomized"
    assert (factors.left.T @ W).square().sum().item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("shape", [(480, 512), (640, 512), (512, 640)])
def test_the_randomised_subspace_is_as_exact_as_an_svd_of_its_precision(shape):
    """In fp32, against an SVD in fp64; energies alone would not show it."""
    W, C, _ = problem(*shape, outliers=2.0)
    W = W.float()
    M = W.double() @ damped(C)
    best = torch.linalg.svd(M).U[:, :12]

    def lost(U):
        return 1 - (best.T @ torch.linalg.qr(U.double()).Q).square().sum().item() / 12

    factors = factorize(W, C, 12, CordaInit(mode="ipm"))
    assert (factors.solver, factors.precision) == ("randomized", "fp32")
    assert lost(factors.left) <= lost(torch.linalg.svd(M.float()).U[:, :12])


@pytest.mark.parametrize("power", [1, 0.5, 0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_functions_used_on_a_gpu_give_the_same(monkeypatch, shape, mode, power):
    """torch.linalg instead of SciPy, here on the CPU."""
    W, C, _ = problem(*shape)
    init = CordaInit(mode=mode, power=power)
    expected = factorize(W, C, 3, init)
    monkeypatch.setattr("corda.algebra.on_cpu", lambda matrix: False)
    found = factorize(W, C, 3, init)
    assert_same_as_reference(found.B @ found.A, expected.B @ expected.A, relative=1e-9)
    assert_same_as_reference(found.sigma, expected.sigma, relative=1e-9)


def test_the_exact_solver_takes_over_where_the_randomised_one_does_not_end():
    """A flat spectrum on a small layer."""
    W, _, _ = problem(96, 96)
    factors = factorize(torch.linalg.qr(W).Q + 1e-3 * W, None, 4, CordaInit(mode="ipm", power=0, solver="randomized"))
    assert (factors.solver, factors.iterations, factors.precision) == ("exact", 0, "fp64")


def test_a_shared_damped_covariance_gives_the_same_factors():
    W, C, _ = problem(12, 20)
    for mode in MODES:
        own = factorize(W, C, 3, CordaInit(mode=mode))
        shared = factorize(W, DampedCovariance(C, 0.01), 3, CordaInit(mode=mode))
        assert torch.equal(own.A, shared.A)


def cross(W, C):
    return CrossMoment(W.double() @ C, C.trace().item())


@pytest.mark.parametrize("shape", [(96, 160), (128, 128), (160, 96)])
@pytest.mark.parametrize(
    "init",
    [
        CordaInit(mode="kpm"),
        CordaInit(mode="kpm", solver="lapack_svd"),
        CordaInit(mode="ipm", solver="randomized"),
        CordaInit(mode="ipm", solver="exact", balance="balanced"),
    ],
)
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_cross_moment_gives_what_the_covariance_gives(monkeypatch, shape, init, on_cpu):
    """W C in place of C, wide, square and tall; also by the functions that a GPU takes."""
    W, C, X = problem(*shape)
    before = cross(W, C)
    expected = factorize(W, C, 6, init)
    monkeypatch.setattr("corda.algebra.on_cpu", lambda matrix: on_cpu)
    moment = cross(W, C)
    found = factorize(W, moment, 6, init)
    assert (found.solver, found.precision) == (expected.solver, expected.precision)
    assert_same_as_reference(found.B @ found.A, expected.B @ expected.A, relative=1e-10)
    assert_same_as_reference(found.sigma, expected.sigma, relative=1e-10)
    assert torch.equal(moment.product, before.product), "not written into"
    energy = (found.left.T @ W @ X).square().sum() / (W @ X).square().sum()
    assert output_energy(W, moment, found.left) == pytest.approx(energy.item(), rel=1e-9)
    assert output_energy(W, C, found.left) == pytest.approx(energy.item(), rel=1e-9)


@pytest.mark.parametrize("shape", [(16, 24), (16, 16), (24, 16)])
def test_null_directions_with_a_cross_moment(shape):
    W, C, _ = problem(*shape)
    W[:4, :] = 0
    W[:, :6] = 0
    for skip in (True, False):
        init = CordaInit(mode="kpm", skip_null=skip)
        found, expected = factorize(W, cross(W, C), 3, init), factorize(W, C, 3, init)
        assert found.null == expected.null > 0
        assert_same_as_reference(found.B @ found.A, expected.B @ expected.A, relative=1e-9)


def test_bad_cross_moments():
    W, C, _ = problem(12, 20)
    with pytest.raises(UserError, match="serves power 1 only, got power 0.5; collect with accumulate='cov'"):
        factorize(W, cross(W, C), 3, CordaInit(power=0.5))
    with pytest.raises(UserError, match="cross moment of 10 x 20 does not fit a weight of 12 x 20"):
        factorize(W, cross(W[:10], C), 3)
    with pytest.raises(UserError, match="all inputs were zero"):
        factorize(W, cross(W, 0 * C), 3)
    with pytest.raises(NonFiniteError, match="the cross moment holds NaN"):
        factorize(W, CrossMoment(W * float("nan"), 1.0), 3)


def test_nothing_that_is_given_is_written_into():
    """Whatever the solvers overwrite is their own, fp64 and every power included."""
    for shape in SHAPES:
        W, C, _ = problem(*shape)
        given = W.clone(), C.clone()
        for mode in MODES:
            for power in (1, 0.5, 0):
                shared = DampedCovariance(C, 0.01)
                one = factorize(W, shared, 3, CordaInit(mode=mode, power=power))
                assert torch.equal(one.A, factorize(W, shared, 3, CordaInit(mode=mode, power=power)).A)
        assert torch.equal(W, given[0])
        assert torch.equal(C, given[1])


def test_dtypes_of_the_factors():
    W, C, _ = problem(12, 20)
    assert factorize(W, C, 3).A.dtype == torch.float64
    assert factorize(W.bfloat16(), C.float(), 3).A.dtype == torch.float32
    assert factorize(W.half(), C.float(), 3, CordaInit(mode="ipm")).B.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "kmp"}, "mode: expected one of kpm, ipm, got 'kmp': did you mean kpm?"),
        ({"scale": "mean"}, "scale: expected one of peft, token_mean, none, got 'mean'"),
        ({"solver": "svd"}, "solver: expected one of auto, randomized, exact, lapack_svd, got 'svd'"),
        ({"power": 2}, "power: expected one of 0, 0.5, 1, got 2"),
        ({"damping": 0}, "damping: expected more than 0, got 0"),
        ({"skip_first": -1}, "skip_first: expected 0 or more, got -1"),
        ({"mode": "kpm", "solver": "randomized"}, "solver: randomized finds leading components only"),
        ({"power": 0.5, "accumulate": "cross"}, "accumulate: cross serves power 1 only"),
    ],
)
def test_settings_outside_of_their_choices(change, message):
    """A ValueError that lists the choices."""
    with pytest.raises(ValueError, match=message):
        CordaInit(**change)


def test_bad_numbers_and_shapes():
    """Rank, shapes, NaN, an input that is all zero."""
    W, C, _ = problem(12, 20)
    with pytest.raises(ValueError, match="rank 13 of a 12 x 20 layer: expected 1 to 12"):
        factorize(W, C, 13)
    with pytest.raises(UserError, match="20 inputs does not fit a weight of 10"):
        factorize(W[:, :10], C, 3)
    with pytest.raises(UserError, match="needs a covariance"):
        factorize(W, None, 3)
    with pytest.raises(UserError, match="all inputs were zero"):
        factorize(W, C * 0, 3)
    with pytest.raises(FloatingPointError, match="covariance"):
        factorize(W, C * float("nan"), 3)
    W[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="weight holds NaN"):
        factorize(W, C, 3)
