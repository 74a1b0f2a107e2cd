"""CMC and mAP against the Market-1501 loop, pairs against a literal loop, least squares against scikit-learn; memory."""

import sys
import tracemalloc

import numpy as np
import sklearn
from handmstn import Identification, OneVsAllPLS, Verification
from handmstn.gallery import Enrolled, Gallery
from sklearn.cross_decomposition import PLSRegression

from tenfold.bench import Comparison, compare, counted, main, peak_rss

RNG = np.random.default_rng(0)
Q, G, IDS = 2000, 4000, 500
PROBES, GALLERY = RNG.integers(0, IDS, Q), RNG.integers(0, IDS, G)
SCORES = (RNG.normal(size=(Q, G)) + 1.5 * (PROBES[:, None] == GALLERY[None])).astype(np.float32)


def ours_ranked() -> tuple[np.ndarray, float]:
    """CMC over images and mAP of the trapezoids, in one pass."""
    one = Identification(unit="image", ranks=50)
    one.update(SCORES, PROBES, GALLERY)
    found = one.compute()
    return found.cmc, found.map_step


def market_loop() -> tuple[np.ndarray, float]:
    """The evaluation of re-identification toolboxes as they publish it: sort, then a Python loop over probes."""
    order = np.argsort(-SCORES, axis=1)
    matches = (GALLERY[order] == PROBES[:, None]).astype(np.int32)
    every, aps = [], []
    for row in matches:
        if not row.any():
            continue
        cmc = row.cumsum()
        cmc[cmc > 1] = 1
        every.append(cmc[:50])
        precision = row.cumsum() / (np.arange(row.size) + 1.0)
        precision = [x * hit for x, hit in zip(precision, row, strict=True)]
        aps.append(sum(precision) / row.sum())
    return np.asarray(every).astype(np.float32).sum(0) / len(every), float(np.mean(aps))


def same_ranked(ours: tuple[np.ndarray, float], theirs: tuple[np.ndarray, float]) -> str:
    """CMC and mAP are the same."""
    gap = max(float(np.abs(ours[0] - theirs[0]).max()), abs(ours[1] - theirs[1]))
    assert gap < 1e-6, gap
    return f"CMC and mAP differ by {gap:.1e}"


PAIRS = RNG.normal(0.1, 0.2, 200_000).clip(-1, 1)
SAME = RNG.random(200_000) < 0.05


def ours_pairs() -> float:
    """The EER of histograms."""
    one = Verification()
    one.update(PAIRS, SAME)
    return one.compute().eer


def literal_pairs() -> float:
    """A Python loop over pairs that fills two histograms, as evaluation scripts do it."""
    counts = np.zeros((2, 65536), np.int64)
    for score, same in zip(PAIRS.tolist(), SAME.tolist(), strict=True):
        counts[int(same), min(65535, int((score + 1) * 32768))] += 1
    one = Verification()
    one.counts = counts
    one.sums += 1
    return one.compute().eer


def same_eer(ours: float, theirs: float) -> str:
    """The EERs are the same."""
    assert abs(ours - theirs) < 1e-12, (ours, theirs)
    return "equal EER"


CLASSES, DIM, COMPONENTS = 200, 512, 50
LABELS = np.repeat(np.arange(CLASSES), 5)
VECTORS = RNG.normal(size=(CLASSES, DIM))[LABELS] + 0.3 * RNG.normal(size=(len(LABELS), DIM))
FITTED = 8
"""Classes that scikit-learn fits; 50 times the whole is 2 times these 8."""


def ours_pls() -> np.ndarray:
    """Coefficients of all classes."""
    return OneVsAllPLS(COMPONENTS).fit(VECTORS, LABELS).coef_


def sklearn_pls() -> np.ndarray:
    """Coefficients of some classes, one after another."""
    found = []
    for number in range(FITTED):
        model = PLSRegression(COMPONENTS, scale=True, max_iter=500).fit(VECTORS, np.where(number == LABELS, 1.0, -1.0))
        found.append(model.coef_[0])
    return np.stack(found)


def same_pls(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The coefficients are the same."""
    gap = float(np.abs(ours[:FITTED] - theirs).max() / np.abs(theirs).max())
    assert gap < 1e-8, gap
    return f"coefficients differ by {gap:.1e} of the largest"


MATCHED = (10_000, 100_000)


def matching_memory() -> Comparison:
    """Peak bytes of all arrays of a search, the vectors among them, as numpy reports them to tracemalloc."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    probes, held = (_vectors(rng, count) for count in MATCHED)
    vectors = sum(e.parts.nbytes + e.visibility.nbytes for e in (probes, held))
    gallery = Gallery({"parts": list("abcdef"), "dim": 64, "weights": [1 / 6] * 6}, held)
    gallery.search(probes.parts, probes.visibility, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return counted(
        "memory of matching, all of it", peak / 1e6, 500.0, shape="10,000 x 100,000, 6 x 64 numbers", unit="MB",
        required=">= 1", equal=f"the vectors and their visibility alone are {vectors / 1e6:.0f} MB",
        statistic="peak of all arrays",
    )  # fmt: skip


def _vectors(rng: np.random.Generator, count: int) -> Enrolled:
    parts = rng.standard_normal((count, 6, 64), np.float32)
    words = np.arange(count).astype(str)
    same = np.full(count, "right")
    return Enrolled(parts, np.ones((count, 6), np.float32), words, same, words, words, same)


def memory() -> list[Comparison]:
    """Memory of a search, and of verification at two numbers of pairs."""
    code = "import numpy as np\nfrom handmstn.metrics import Verification\nv = Verification()\nr = np.random.default_rng(0)\n"
    code += "for _ in range({blocks}): v.update(r.uniform(-1, 1, 100_000), r.random(100_000) < 0.1)"
    few, many = (peak_rss([sys.executable, "-c", code.format(blocks=blocks)]) for blocks in (10, 200))
    constant = counted(
        "memory of verification, 20 million pairs / 1 million", many, few, shape="blocks of 100,000 pairs", unit="MB",
        required=">= 0.95", equal="equal histograms", statistic="peak resident size of a process",
    )  # fmt: skip
    return [matching_memory(), constant]


def measure() -> list[Comparison]:
    """All rows."""
    pls = compare(
        f"one-vs-all least squares, {FITTED} of {CLASSES} classes by scikit-learn", ours_pls, sklearn_pls,
        shape=f"k={COMPONENTS}, d={DIM}, {CLASSES} classes of clustered vectors", equal=same_pls,
        required=f">= {50 * FITTED / CLASSES:g}", pairs=5,
    )  # fmt: skip
    return [
        compare("CMC and mAP, Market-1501 loop (literal form)", ours_ranked, market_loop, shape=f"{Q} x {G}", equal=same_ranked,
                required=">= 10", pairs=5),
        compare("verification pairs, literal loop", ours_pairs, literal_pairs, shape="200,000 pairs", equal=same_eer,
                required=">= 50", pairs=5),
        pls,
        *memory(),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main("handmstn", {"scikit-learn": sklearn.__version__, "numpy": np.__version__}, measure))
