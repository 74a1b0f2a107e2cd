"""One-vs-all partial least squares against scikit-learn, NIPALS and least squares."""

import numpy as np
import pytest
from handmstn import OneVsAllPLS
from handmstn.pls import krylov_coefficients, lanczos_coefficients
from sklearn.cross_decomposition import PLSRegression


def clustered(classes, each, dim, spread, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    return rng.normal(size=(classes, dim))[labels] + spread * rng.normal(size=(len(labels), dim)), labels


def nearly_singular(seed=0):
    x, labels = clustered(12, 8, 20, 0.3, seed)
    rng = np.random.default_rng(seed)
    return np.hstack([x, x[:, :20] @ rng.normal(size=(20, 40)) + 1e-3 * rng.normal(size=(len(x), 40))]), labels


CASES = {
    "clustered": clustered(20, 10, 96, 0.2),
    "well conditioned": clustered(60, 5, 64, 0.5),
    "nearly singular": nearly_singular(),
    "fewer pictures than dimensions": clustered(15, 5, 120, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_coefficients_equal_scikit_learns_at_50_components(name):
    x, labels = CASES[name]
    ours = OneVsAllPLS(50).fit(x, labels)
    for column in (0, 3, 7):
        y = np.where(labels == column, 1.0, -1.0)
        theirs = PLSRegression(50, scale=True, max_iter=500).fit(x, y)
        scale = np.abs(theirs.coef_).max()
        assert np.abs(ours.coef_[column] - theirs.coef_[0]).max() < 1e-8 * max(scale, 1)
        assert np.allclose(ours.decision_function(x)[:, column], theirs.predict(x).ravel(), atol=1e-7)


@pytest.mark.parametrize(
    "singular",
    [np.geomspace(30, 0.03, 120), np.repeat([9.0, 4.0, 1.0], 40), np.linspace(2, 1, 120)],
    ids=["as ill conditioned as is allowed", "a space that is exhausted after three steps", "close together"],
)
def test_lanczos_on_the_squares_gives_what_bidiagonalization_gives(singular):
    right_side = np.random.default_rng(0).normal(size=(7, len(singular)))
    right_side[3] = 0.0
    for k in (1, 2, 50, 500):
        one = krylov_coefficients(singular, right_side, k)
        two = lanczos_coefficients(singular**2, singular * right_side, k)
        assert np.abs(one - two).max() < 1e-9 * np.abs(one).max()
    assert np.abs(one - right_side / singular).max() < 1e-9 * np.abs(one).max()  # more components than there are values


def nipals(x, y, k):
    """PLS1 as textbooks have it, on standardized data."""
    x, y = x.copy(), y.copy()
    w_, p_, q_ = [], [], []
    for _ in range(k):
        w = x.T @ y
        w /= np.linalg.norm(w)
        t = x @ w
        p, q = x.T @ t / (t @ t), y @ t / (t @ t)
        x, y = x - np.outer(t, p), y - q * t
        w_.append(w)
        p_.append(p)
        q_.append(q)
    w, p = np.stack(w_, 1), np.stack(p_, 1)
    return w @ np.linalg.solve(p.T @ w, np.asarray(q_))


def test_coefficients_equal_nipals():
    x, labels = clustered(8, 10, 40, 0.5)
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    y = np.where(labels == 2, 1.0, -1.0)
    y = (y - y.mean()) / y.std(ddof=1)
    for k in (1, 2, 10, 25):
        ours = OneVsAllPLS(k).fit(x, labels)
        beta = ours.coef_[2] * x.std(0, ddof=1) / np.where(labels == 2, 1.0, -1.0).std(ddof=1)
        assert np.abs(beta - nipals(z, y, k)).max() < 1e-9


def test_more_components_than_the_rank_give_least_squares_and_one_gives_the_covariance():
    x, labels = clustered(5, 6, 12, 0.7)
    z = x - x.mean(0)
    full = OneVsAllPLS(60).fit(x, labels)
    standard = z / x.std(0, ddof=1)
    y = np.where(labels == 1, 1.0, -1.0)
    least = np.linalg.lstsq(standard, y - y.mean(), rcond=None)[0] / x.std(0, ddof=1)
    assert np.allclose(full.coef_[1], least, atol=1e-8)
    one = OneVsAllPLS(1).fit(x, labels).coef_[1] * x.std(0, ddof=1)
    covariance = standard.T @ (y - y.mean())
    assert np.allclose(one / np.linalg.norm(one), covariance / np.linalg.norm(covariance), atol=1e-10)


def test_renaming_classes_permutes_columns_and_faults_are_named():
    x, labels = clustered(6, 5, 10, 0.5)
    a = OneVsAllPLS(5).fit(x, labels)
    b = OneVsAllPLS(5).fit(x, 5 - labels)
    assert np.allclose(a.coef_, b.coef_[::-1], atol=1e-12)
    assert (a.predict(x) == labels).mean() > 0.9
    with pytest.raises(ValueError, match="two classes or more"):
        OneVsAllPLS(5).fit(x, np.zeros(len(x)))
    with pytest.raises(ValueError, match=r"expected embeddings \(M, 10\)"):
        a.decision_function(x[:, :4])
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="embedding 3 is not finite"):
        OneVsAllPLS(5).fit(x, labels)
