"""Identification, verification, open set, bootstrap and calibration against literal loops and scikit-learn."""

import numpy as np
import pytest
from handmstn import Calibration, Identification, OpenSet, Verification, bootstrap
from handmstn.calibration import cllr, fit_logistic, in_words, isotonic, min_cllr
from handmstn.evaluation import rank_table
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_curve


def scores_of(seed, probes=30, gallery=40, classes=8, levels=0):
    rng = np.random.default_rng(seed)
    p, g = rng.integers(0, classes, probes), rng.integers(0, classes - 1, gallery)
    p[0], p[1] = classes - 1, g[0]  # one probe without a mate, one with
    scores = rng.uniform(-1, 1, (probes, gallery)) + 0.6 * (p[:, None] == g[None])
    scores = np.clip(scores, -1, 1)
    return (np.round(scores * levels) / levels if levels else scores), p.astype(str), g.astype(str)


def literal(scores, probes, gallery, unit, ties):
    """CMC and AP by sorting each probe's list, tie by tie."""
    ranks, aps, trapezoids = [], [], []
    for row, name in zip(scores, probes, strict=True):
        mates = row[gallery == name]
        if not len(mates):
            continue
        others = row[gallery != name]
        share = {"optimistic": 0, "mean": 0.5, "pessimistic": 1}[ties]
        each = [
            j + 1 + (others > s).sum() + share * (others == s).sum() for j, s in enumerate(sorted(mates, reverse=True))
        ]
        aps.append(np.mean([(j + 1) / r for j, r in enumerate(each)]))
        before = [1.0 if r == 1 else j / (r - 1) for j, r in enumerate(each)]
        trapezoids.append(np.mean([((j + 1) / r + b) / 2 for j, (r, b) in enumerate(zip(each, before, strict=True))]))
        if unit == "class":
            best = {c: row[gallery == c].max() for c in set(gallery)}
            own = best.pop(name)
            ranks.append(1 + sum(v > own for v in best.values()) + share * sum(v == own for v in best.values()))
        else:
            ranks.append(each[0])
    ranks = np.asarray(ranks)
    return [np.mean(ranks <= k) for k in range(1, 11)], np.mean(aps), np.mean(trapezoids)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 3]))
def test_cmc_and_average_precision_equal_a_literal_loop_also_with_ties(seed, levels):
    scores, p, g = scores_of(seed, levels=levels)
    for unit in ("class", "image"):
        for ties in ("optimistic", "mean", "pessimistic"):
            one = Identification(unit, ties, ranks=10)
            one.update(scores, p, g)
            found = one.compute()
            cmc, ap, trapezoid = literal(scores, p, g, unit, ties)
            assert np.allclose(found.cmc, cmc)
            assert found.map_step == pytest.approx(ap)
            assert found.map_trapezoid == pytest.approx(trapezoid)


def test_average_precision_equals_scikit_learns_and_the_worked_example():
    scores, p, g = scores_of(3)
    one = Identification()
    one.update(scores, p, g)
    expected = [
        average_precision_score(g == name, row) for row, name in zip(scores, p, strict=True) if (g == name).any()
    ]
    assert one.compute().map_step == pytest.approx(np.mean(expected))
    example = Identification()
    example.update(np.asarray([[3.0, 2.0, 1.0, 0.0]]), ["a"], ["a", "b", "a", "c"])
    assert example.compute().map_step == pytest.approx(0.8333, abs=1e-4)
    assert example.compute().map_trapezoid == pytest.approx(0.7917, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 29))
def test_blocks_and_shards_in_any_order_count_the_same(seed, cut):
    scores, p, g = scores_of(seed)
    whole = [Identification(), OpenSet(), Verification()]
    halves = [[type(one)() for one in whole] for _ in range(2)]
    same = p[:, None] == g[None]
    for one in whole:
        one.update(*((scores, same) if isinstance(one, Verification) else (scores, p, g)))
    for part, rows in zip(halves, (slice(cut), slice(cut, None)), strict=True):
        for one in part:
            one.update(*((scores[rows], same[rows]) if isinstance(one, Verification) else (scores[rows], p[rows], g)))
    merged = [b.merge(a) for a, b in zip(*halves, strict=True)]
    assert np.array_equal(merged[0].compute().cmc, whole[0].compute().cmc)
    assert merged[0].compute().map_step == pytest.approx(whole[0].compute().map_step)
    assert merged[1].compute(0.1) == whole[1].compute(0.1)
    assert np.array_equal(merged[2].counts, whole[2].counts)


def test_perfect_scores_and_reversed_ones():
    p = np.asarray(list("aabbcc"))
    scores = (p[:, None] == p[None]).astype(float)
    one, two = Identification(), Verification()
    one.update(scores, p, p)
    two.update(scores, p[:, None] == p[None])
    assert one.compute().cmc[0] == one.compute().map_step == 1
    assert two.compute().eer == 0
    flipped = Verification()
    flipped.update(-scores, p[:, None] == p[None])
    assert flipped.compute().eer == 1
    rng = np.random.default_rng(0)
    random = Verification()
    random.update(rng.uniform(-1, 1, 20000), rng.random(20000) < 0.5)
    assert random.compute().eer == pytest.approx(0.5, abs=3 * 0.5 / np.sqrt(10000))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 200))
def test_the_eer_of_histograms_is_exact_after_refinement_and_within_a_bin_before(seed, bins):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(0.3, 0.2, 80), rng.normal(-0.1, 0.25, 300)]).clip(-0.99, 0.99)
    same = np.arange(380) < 80
    steps = np.append(np.unique(scores), np.inf)
    far = np.asarray([(scores[~same] >= t).mean() for t in steps])
    frr = np.asarray([(scores[same] < t).mean() for t in steps])
    after = int(np.argmax(frr >= far))
    a, b = far[after - 1] - frr[after - 1], frr[after] - far[after]
    exact = far[after - 1] + a / (a + b) * (far[after] - far[after - 1])
    one = Verification(bins=bins)
    one.update(scores, same)
    assert one.refined([(scores, same)]) == pytest.approx(exact, abs=1e-12)
    one_score = 1 / 80 + 1 / 300  # the bin of the crossing holds one score of each kind at most
    assert Verification_fine(scores, same).compute().eer == pytest.approx(exact, abs=one_score)


def Verification_fine(scores, same):
    one = Verification()
    one.update(scores, same)
    return one


def test_rates_equal_scikit_learns_roc_and_d_prime_its_formula():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(0.3, 0.1, 500), rng.normal(0.0, 0.1, 5000)]).clip(-1, 1)
    same = np.arange(5500) < 500
    found = Verification_fine(scores, same).compute((1e-1, 1e-2, 1e-3))
    false, true, _ = roc_curve(same, scores, drop_intermediate=False)
    for f, value in found.tar.items():
        assert value == pytest.approx(true[false <= f].max(), abs=5e-3)
    a, b = scores[same], scores[~same]
    assert found.d_prime == pytest.approx(abs(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))
    with pytest.raises(ValueError, match="expected genuine and impostor pairs"):
        Verification().compute()


def test_an_open_set_with_the_lowest_threshold_is_the_closed_set_and_fpir_falls_with_it():
    scores, p, g = scores_of(5, probes=60)
    one, closed = OpenSet(rank=1), Identification("class")
    one.update(scores, p, g)
    closed.update(scores, p, g)
    assert one.at(-np.inf).dir == pytest.approx(closed.compute().cmc[0])
    thresholds = np.linspace(-1, 1, 21)
    assert (np.diff([one.at(t).fpir for t in thresholds]) <= 0).all()
    for fpir in (0.5, 0.25, 0.1, 0.0):
        result = one.compute(fpir)
        assert result.fpir <= fpir
        tops = scores[~np.isin(p, g)].max(1)
        assert result.fpir == pytest.approx((tops >= result.threshold).mean())
    with pytest.raises(ValueError, match="without a mate"):
        OpenSet().threshold(0.1)


@pytest.mark.parametrize(
    ("scores", "eer"), [([0.1, 0.9], 0.0), ([0.9, 0.1], 1.0), ([0.5, 0.5], 0.5), ([-1.0, 1.0], 0.0)]
)
def test_one_pair_of_each_kind_has_an_eer_and_no_d_prime(scores, eer):
    """openbr issues 579 and 593: EER was NaN with few or separated scores; here d' was infinite, which no JSON takes."""
    one = Verification()
    one.update(np.asarray(scores), np.asarray([False, True]))
    found = one.compute()
    assert found.eer == eer
    assert np.isnan(found.d_prime)


def test_the_threshold_of_a_far_keeps_to_it_and_gives_the_tar():
    """feerci issue 1 and openbr issue 582: a rate without its threshold cannot be worked with."""
    rng = np.random.default_rng(0)
    impostor, genuine = rng.normal(0, 0.2, 5000).clip(-1, 1), rng.normal(0.6, 0.2, 500).clip(-1, 1)
    one = Verification()
    one.update(np.append(impostor, genuine), np.arange(5500) >= 5000)
    found = one.compute()
    for far, threshold in found.thresholds.items():
        assert (impostor >= threshold).mean() <= far
        assert (genuine >= threshold).mean() == pytest.approx(found.tar[far], abs=1e-9)


def test_a_probe_that_is_in_the_gallery_does_not_find_itself():
    names = np.asarray(list("aab"))
    scores = np.asarray([[1.0, 0.2, 0.5], [0.2, 1.0, 0.1], [0.5, 0.1, 1.0]])
    with_itself, without = Identification(), Identification()
    with_itself.update(scores, names, names)
    without.update(scores, names, names, exclude=np.eye(3, dtype=bool))
    assert with_itself.compute().cmc[0] == 1
    assert without.compute().cmc[0] == 0.5
    assert without.compute().without_mate == 1


def test_faults_are_named():
    with pytest.raises(ValueError, match="gallery is empty"):
        Identification().update(np.zeros((1, 0)), ["a"], [])
    with pytest.raises(ValueError, match="score of probe 0 is NaN"):
        Identification().update(np.asarray([[np.nan]]), ["a"], ["a"])
    with pytest.raises(ValueError, match="no probe has a mate"):
        Identification().compute()


def test_the_bootstrap_redraws_persons_not_probes():
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(40), 25)
    values = np.repeat(rng.random(40) < 0.5, 25).astype(float)  # every probe of a person is the same
    mean, (low, high) = bootstrap(values, person)
    spread = values.reshape(40, 25)[:, 0].std() / np.sqrt(40)
    assert mean == values.mean()
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
    both = np.stack([values, 1 - values], 1)
    estimate, ci = bootstrap(both, person, statistic=lambda m: m[:, 0] - m[:, 1])
    assert estimate == pytest.approx(2 * mean - 1)
    assert ci[0] < estimate < ci[1]


def test_calibration_of_gaussian_scores_is_the_analytic_ratio():
    rng = np.random.default_rng(0)
    genuine, impostor = rng.normal(2, 1, 20000), rng.normal(0, 1, 20000)
    a, b = fit_logistic(genuine, impostor)  # LLR of N(2, 1) against N(0, 1) is 2 s - 2
    assert a == pytest.approx(2, abs=3 * 0.03)
    assert b == pytest.approx(-2, abs=3 * 0.03)
    x = np.concatenate([genuine, impostor])[:, None]
    y = np.repeat([1, 0], 20000)
    model = LogisticRegression(C=1e9, tol=1e-10).fit(x, y)
    assert a == pytest.approx(float(model.coef_[0, 0]), rel=1e-3)


def test_cllr_of_useless_scores_is_one_and_the_minimum_is_not_above_it():
    rng = np.random.default_rng(1)
    assert cllr(np.zeros(5), np.zeros(9)) == pytest.approx(1)
    genuine, impostor = rng.normal(1, 1, 200), rng.normal(0, 1, 500)
    a, b = fit_logistic(genuine, impostor)
    assert min_cllr(genuine, impostor) <= cllr(a * genuine + b, a * impostor + b) <= 1
    assert min_cllr(np.ones(3), np.zeros(3)) == pytest.approx(0)
    targets = (rng.random(300) < 0.5).astype(float)
    scores = np.round(rng.normal(size=300), 1)
    weights = rng.uniform(0.5, 2, 300)
    expected = IsotonicRegression().fit(scores, targets, weights).predict(scores)
    assert np.allclose(isotonic(scores, targets, weights), expected)


def test_separated_scores_stay_finite_and_bins_have_their_own_maps():
    a, b = fit_logistic(np.asarray([0.9, 0.8]), np.asarray([0.1, 0.2]))
    assert np.isfinite([a, b]).all()
    assert a > 0
    rng = np.random.default_rng(2)
    visible = rng.random(4000)
    same = rng.random(4000) < 0.5
    spread = np.where(visible > 0.5, 0.5, 2.0)
    scores = same + spread * rng.normal(size=4000)
    fitted = Calibration.fit(scores, same, visible, (0.5,))
    assert fitted.slopes[1] > 3 * fitted.slopes[0]
    llr = fitted.llr(np.asarray([1.0, 1.0]), np.asarray([0.1, 0.9]))
    assert llr[1] > llr[0]
    with pytest.raises(ValueError, match="ascending borders"):
        Calibration.fit(scores, same, visible, (0.5, 0.5))
    assert in_words(np.log(1000)) == "moderately strong support for the same hand"
    assert in_words(0.1) == "supports neither"
    assert in_words(-8) == "strong support for different hands"


def test_a_rank_at_which_everybody_is_found_has_no_row():
    classes = [f"p{i}" for i in range(10)]
    one = Identification()
    one.update(np.random.default_rng(0).random((10, 10)), classes, classes)
    found = rank_table(one)
    assert [name for name in found if name.startswith("rank-")] == ["rank-1", "rank-5"]
    assert found["ranked among"] == 10
