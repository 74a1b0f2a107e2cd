"""`handmstn demo`: rendered hands at any angle, partly covered; what do alignment, fingers and losses bring?

For each seed, networks of equal size learn 60 invented people: from the whole picture, from a box around the hand, from
the aligned palm, and from palm and fingers. Other people are enrolled with two pictures each and searched for; strangers
are searched for, too. One aligner per seed, trained from the free points, serves all arms that align.
"""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from handmstn.commands import _pictures
from handmstn.commands._demo_arms import half_width, joined, measure_aligner, measure_arm
from handmstn.commands._world import DATA, aligner, prepared, world
from handmstn.config import LEVELS, Arm, DemoSettings
from handmstn.data import hand6_like
from handmstn.evidence import crops_of
from handmstn.metrics import bootstrap
from handmstn.training import Points, found_points
from tenfold import executors
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, image_grid, line_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, track

SHOWN: dict[str, tuple[Arm, ...]] = {
    "quick": ("whole", "palm", "all"),
    "default": ("whole", "palm", "all"),
    "full": ("whole", "box", "palm", "fingers-ce", "all", "oracle"),
}
"""Arms of each level."""
NETWORK = "hand:cnn4"


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Render, train, measure, decide; write results, figures and ``report.html``."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    seeds = settings.seeds_of({"quick": 1, "default": 1, "full": 3})
    for seed in seeds:
        for name in (f"seed-{seed}.npz", f"aligner-{seed}.safetensors"):
            folder.own(f"worlds/{name}", result=False)
    study = Study(folder, level=level, data=DATA, seeds=seeds)
    where = str(folder.path)
    tasks: dict[str, Any] = {"aligner": functools.partial(measure_aligner, where, settings)}
    tasks |= {arm: functools.partial(measure_arm, where, settings, arm, NETWORK) for arm in SHOWN[level]}
    show: Any = functools.partial(track, description="arms", quiet=invocation.quiet)
    alone = settings.processes == 1 or level == "quick"  # a further process takes longer to start than all that work
    with executors.make(None if alone else f"processes:{settings.processes}") as pool:
        # aligners first, or the arms of a seed wait for its own and a process is idle meanwhile
        ready = (
            [pool.submit(prepared, where, settings, seed) for seed in seeds]
            if pool is not None and len(seeds) > 1
            else []
        )
        try:
            study.over_arms(tasks, pool, show)
        finally:
            for one in ready:
                one.cancel()
    _decide(study, level)
    _note(study, settings)
    captions = _draw(study, settings, seeds[0])
    summary = study.finish()
    write_report(folder, "handmstn: whose hand is this?", captions)
    return show_claims(summary, strict=invocation.strict)


Columns = Mapping[str, np.ndarray]


def _columns(study: Study, arm: str, key: str) -> np.ndarray:
    """A result per probe of every seed, one after another."""
    return np.concatenate([study.arrays(arm, seed)[key] for seed in study.seeds])


class _Claims:
    """Claims about probes, by a bootstrap over the persons of all seeds."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.persons = _columns(study, "whole", "persons")

    def add(
        self,
        id: str,
        text: str,
        kind: Any,
        columns: Sequence[np.ndarray],
        statistic: Callable[[np.ndarray], np.ndarray],
        required: str,
        *,
        where: np.ndarray | None = None,
        main: bool = False,
    ) -> None:
        """Add one; with ``where``, over some of the probes."""
        table = np.stack([np.asarray(c, np.float64) for c in columns], 1)
        kept = np.ones(len(table), np.bool_) if where is None else where
        persons = self.persons[kept]
        estimate, ci95 = bootstrap(table[kept], persons, statistic=statistic)
        method = f"bootstrap over {len(np.unique(persons))} persons, {int(kept.sum())} probes"
        self.study.claim(id, text, kind, estimate, ci95, method=method, required=required, main=main)


def _difference(means: np.ndarray) -> np.ndarray:
    out: np.ndarray = 100 * (means[:, 0] - means[:, 1])
    return out


def _ratio(means: np.ndarray) -> np.ndarray:
    out: np.ndarray = means[:, 0] / np.maximum(means[:, 1], 1e-3)
    return out


def _decide(study: Study, level: str) -> None:
    claims = _Claims(study)
    hits = {arm: _columns(study, arm, "rank") <= 1 for arm in SHOWN[level]}
    pair = [hits["palm"], hits["whole"]]
    claims.add(
        "palm_times_whole",
        "rank-1 of the aligned palm / of the whole picture",
        "ratio",
        pair,
        _ratio,
        ">= 3",
        main=True,
    )
    text = "rank-1, aligned palm - whole picture (points)"
    claims.add("palm_over_whole", text, "difference", pair, _difference, ">= 20", main=True)
    text = "rank-1, palm and fingers with all losses - palm alone"
    claims.add("all_over_palm", text, "difference", [hits["all"], hits["palm"]], _difference, ">= 0")
    covered = _columns(study, "whole", "covered")
    if covered.any():
        text = "the same, where more than 15 % of the palm is covered"
        pair = [hits["all"], hits["palm"]]
        claims.add("all_over_palm_covered", text, "difference", pair, _difference, ">= 2", where=covered)
    if "oracle" in hits:
        text = "rank-1 with found points / with true points"
        claims.add("all_of_oracle", text, "ratio", [hits["all"], hits["oracle"]], _ratio, ">= 0.6")
        text = "rank-1, all losses - cross-entropy alone"
        claims.add("losses", text, "difference", [hits["all"], hits["fingers-ce"]], _difference, ">= 0")
    error = [np.concatenate([study.arrays("aligner", s)[k] for s in study.seeds]) for k in ("error", "naive")]
    drawn = np.random.default_rng(0).integers(0, len(error[0]), (1000, len(error[0])))
    ratios = np.median(error[0][drawn], 1) / np.median(error[1][drawn], 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    text = "median error of the points / of their mean over the training pictures"
    estimate = float(np.median(error[0]) / np.median(error[1]))
    method = f"bootstrap over {len(error[0])} pictures"
    study.claim("aligner", text, "ratio", estimate, (float(low), float(high)), method=method, required="<= 1/5")
    blind = _columns(study, "all", "rank, all visible") <= 1
    if covered.any():
        text = "rank-1 on covered hands, matching that leaves covered parts out - that takes all as seen"
        claims.add("visible", text, "difference", [hits["all"], blind], _difference, ">= 0", where=covered)
    other = [_columns(study, arm, "rank, other domain") <= 1 for arm in ("all", "whole")]
    text = "another camera, skin and light than trained on: rank-1 of all / of the whole picture"
    claims.add("other_domain", text, "ratio", other, _ratio, ">= 2")
    found = [_columns(study, arm, "found") for arm in ("all", "whole")]
    text = "open set: found at 1 % false positives, all - whole picture (points)"
    claims.add("open_set", text, "difference", found, _difference, ">= 10")
    values = study.values(("all", "Cllr"))
    text = "Cllr after calibration on other people (1 says nothing)"
    study.claim(
        "cllr", text, "ratio", float(values.mean()), None, method=f"mean of {len(values)} seeds", required="<= 0.7"
    )


def _note(study: Study, settings: DemoSettings) -> None:
    level = settings.level
    if (settings.sizes, settings.steps) != LEVELS[level]:
        study.note(f"Sizes or steps are not those of the level {level}; config.yaml has them.")
    told = "; ".join(
        f"{arm} {study.values((arm, 'rank-1')).mean():.1f} (covered {study.values((arm, 'rank-1, covered')).mean():.1f})"
        for arm in SHOWN[level]
    )
    study.note(f"Rank-1 in percent: {told}.")
    error, naive = (study.values(("aligner", k)).mean() for k in ("error", "mean pose"))
    study.note(f"Median error of the points {error:.3f} halves of the palm's width; of the mean pose {naive:.3f}.")
    study.note(
        f"Learned weight of the palm {study.values(('all', 'palm weight')).mean():.2f}, of a finger the rest / 5."
    )


def _draw(study: Study, settings: DemoSettings, seed: int) -> dict[str, str]:
    """Pictures of the first seed."""
    folder = study.run
    people = world(folder.path, settings, seed)
    both = joined(people.test, people.strangers)
    parts = hand6_like(both)
    points = study.arrays("aligner", seed)["points"]
    _draw_aligned(folder, "aligned", people.test, points, parts)
    curves: dict[str, Curve] = {}
    persons = _columns(study, "whole", "persons")
    for arm in SHOWN[settings.level]:
        rank = _columns(study, arm, "rank")
        ks = list(range(1, 11))
        found = [bootstrap(rank <= k, persons, draws=300) for k in ks]
        mean, bands = [100 * f[0] for f in found], [f[1] for f in found]
        curves[arm] = Curve(ks, mean, [100 * b[0] for b in bands], [100 * b[1] for b in bands])
    line_chart(folder.figure("cmc"), [Panel("people that nobody trained on", "rank", "probes found (%)", curves)])
    found_aligner = aligner(folder.path, settings, seed, people.train)
    some = people.other.part(np.unique(np.linspace(0, len(people.other) - 1, 60).astype(int)))
    spots, _ = found_points(Points(found_aligner), some)
    elsewhere = _draw_aligned(folder, "other-domain", some, spots.numpy(), parts)
    _draw_probes(study, seed, both, folder)
    home, mean_pose = (float(study.values(("aligner", key))[0]) for key in ("error", "mean pose"))
    rows = "Each row is a picture: the one with the smallest error of its points, three between, and the one with the largest."
    return {
        "aligned": f"Test people. {rows} Errors are in halves of the palm's width; their median is {home:.2f}, that of the mean"
        f" pose {mean_pose:.2f}. Beside the crops that were found: what the true points give.",
        "cmc": "Share of the probes found within a rank; bands are 95 % of a bootstrap over persons.",
        "other-domain": f"The same aligner on {len(some)} pictures of another rendered domain (skin, light, background, camera)"
        f" that it never saw. {rows} Their median error is {elsewhere:.2f}, against {home:.2f} in its own domain: where it is"
        " large, the crops show background, and nobody can be recognized by them.",
        "probes": "Palm and fingers with all losses, first seed: each probe above the enrolled picture that it is most like."
        " Above: probes with the best ranks. Below: those with the worst.",
    }


def _draw_aligned(folder: Any, name: str, hands: Any, points: np.ndarray, parts: Any) -> float:
    """Five pictures from the smallest to the largest error of their points, with crops by found and by true points."""
    error = np.linalg.norm(points - hands.points, axis=-1).mean(1) / half_width(hands.points)
    chosen = np.argsort(error, kind="stable")[np.linspace(0, len(error) - 1, 5).astype(int)]
    images = hands.images[chosen].numpy()
    rows = _pictures.overlays(images, points[chosen], parts)
    truth = [_pictures.pasted(crops_of(i, p, parts)) for i, p in zip(images, hands.points[chosen], strict=True)]
    which = ("least", "1st quarter", "median", "3rd quarter", "largest")
    titles = [f"{w}: {e:.2f}" for w, e in zip(which, error[chosen].tolist(), strict=True)]
    columns = ["picture", "found points", "crops by them", "crops by true points"]
    image_grid(
        folder.figure(name),
        [[*row, crops] for row, crops in zip(rows, truth, strict=True)],
        row_titles=titles,
        column_titles=columns,
        cell=1.6,
    )
    return float(np.median(error))


def _draw_probes(study: Study, seed: int, both: Any, folder: Any) -> None:
    arrays = study.arrays("all", seed)
    order = np.argsort(arrays["rank"], kind="stable")
    rows: list[Any] = []
    titles = []
    for name, chosen in (("best", order[:8]), ("worst", order[-8:])):
        for which, index in (("probe", arrays["rows"][chosen]), ("most alike", arrays["best"][chosen])):
            rows.append([np.ascontiguousarray(both.images[int(i)].permute(1, 2, 0).numpy()) for i in index])
            titles.append(f"{name}: {which}")
    image_grid(folder.figure("probes"), rows, row_titles=titles)
