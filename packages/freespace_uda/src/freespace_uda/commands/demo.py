"""`freespace-uda demo`: rendered roads whose colors swap their roles; what do guidance and alignment bring, without labels?

For each seed a source world with labels and a target world without are rendered; every arm is a network of the same two
encoders, trained as long with the same augmentation, and measured on target scenes that nothing was chosen by.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from freespace_uda.commands import _pictures
from freespace_uda.commands._arms import HEALTH, shown_rows
from freespace_uda.commands._world import DATA, TARGET, measure_arm, scenes_of, settings_of, world_file
from freespace_uda.config import Arm, DemoSettings, NormalSettings
from freespace_uda.items import normals_of
from freespace_uda.metrics import FreespaceMeter, bootstrap
from tenfold import executors
from tenfold.claims import Study, arm_rows, mean_ci95
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, line_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track

SOURCE = "roads-flat"
OTHERS = ("roads-noisy", "roads-city")
BASES: tuple[Arm, ...] = ("rgb", "normals", "both")
GENERAL: tuple[Arm, ...] = ("minent", "advent", "adaptsegnet", "fada", "self-training")
FEW: tuple[Arm, ...] = (*BASES, "ccg-sfa", "oracle")
ARMS: dict[str, tuple[Arm, ...]] = {
    "quick": FEW,
    "default": FEW,
    "full": (*BASES, "adabn", *GENERAL, "ccg", "ccg-sfa", "ccg-sfa-class", "ccg-sfa-all", "ccg-sfa-ema", "oracle"),
}
"""Arms of each level, from the first source."""
ELSEWHERE: tuple[Arm, ...] = ("both", "adaptsegnet", "ccg-sfa")
"""Arms from the other two sources; the oracle is the same."""


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Render, train, measure, decide; write results, figures and ``report.html``."""
    sys.stdout.write(f"data: {DATA}\n")
    sys.stdout.flush()
    folder, level = invocation.folder, settings.level
    seeds = settings.seeds_of({"quick": 1, "default": 1, "full": 3})
    others = OTHERS if level == "full" else ()
    for seed in seeds:
        for domain, part in ((SOURCE, "train"), (TARGET, "train"), (TARGET, "test"), *((o, "train") for o in others)):
            folder.own(world_file(Path(), domain, part, seed).as_posix(), result=False)
    study = Study(folder, level=level, data=DATA, seeds=seeds)
    where = str(folder.path)
    tasks: dict[str, Any] = {a: functools.partial(measure_arm, where, level, SOURCE, a) for a in ARMS[level]}
    tasks |= {f"{o}-{a}": functools.partial(measure_arm, where, level, o, a) for o in others for a in ELSEWHERE}
    show: Any = functools.partial(track, description="arms", quiet=invocation.quiet)
    alone = settings.processes == 1 or level == "quick"  # a further process takes longer to start than all that work
    with executors.make(None if alone else f"processes:{settings.processes}") as pool:
        study.over_arms(tasks, pool, show)
    _decide(study, level)
    _note(study, level)
    captions = _draw(study, level, seeds[0])
    summary = study.finish()
    write_report(folder, "freespace-uda: where is the road?", captions)
    headers, rows = arm_rows(study, list(tasks), ["F1", "MaxF", "AP", "precision", "recall"])
    sys.stdout.write(table(headers, rows) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def _tables(study: Study, arms: Sequence[str]) -> list[np.ndarray]:
    """Hits, false alarms and misses of each arm, (seeds, scenes, 3)."""
    return [np.stack([study.arrays(arm, seed)["scenes"] for seed in study.seeds]) for arm in arms]


def _claim(
    study: Study,
    id: str,
    text: str,
    kind: Any,
    arms: Sequence[str],
    statistic: Any,
    required: str,
    *,
    main: bool = False,
) -> None:
    tables = _tables(study, arms)
    estimate, ci95 = bootstrap(tables, statistic)
    seeds, scenes = tables[0].shape[:2]
    method = f"bootstrap over {scenes} test scenes" + (
        f" and {seeds} seeds" if seeds > 2 else f", {seeds} seed" + "s" * (seeds > 1)
    )
    study.claim(id, text, kind, estimate, ci95, method=method, required=required, main=main)


def _decide(study: Study, level: str) -> None:
    def over_best(ours: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return 100 * (ours - np.stack(others).max(0))

    def closed(ours: np.ndarray, oracle: np.ndarray, *bases: np.ndarray) -> np.ndarray:
        best = np.stack(bases).max(0)
        return (ours - best) / np.maximum(oracle - best, 1e-6)

    def ratio(ours: np.ndarray, oracle: np.ndarray) -> np.ndarray:
        return ours / np.maximum(oracle, 1e-6)

    text = "F1 on the target, ccg-sfa - the best of three source-only arms"
    _claim(study, "over_source", text, "difference", ("ccg-sfa", *BASES), over_best, ">= 3", main=True)
    text = "share of the gap from that arm to the oracle that is closed"
    _claim(study, "gap", text, "ratio", ("ccg-sfa", "oracle", *BASES), closed, ">= 0.3", main=True)
    if level == "full":
        text = "F1, ccg-sfa - ccg (guidance alone)"
        _claim(study, "over_ccg", text, "difference", ("ccg-sfa", "ccg"), over_best, ">= 0")
        text = "F1, ccg-sfa - the best of minent, advent, adaptsegnet, fada, self-training"
        _claim(study, "over_general", text, "difference", ("ccg-sfa", *GENERAL), over_best, ">= 0")
        text = "F1, ccg-sfa - the same with everything aligned"
        _claim(study, "over_all", text, "difference", ("ccg-sfa", "ccg-sfa-all"), over_best, ">= 0")
        for other in OTHERS:
            text = f"F1 from {other}, ccg-sfa - source-only (both)"
            arms = (f"{other}-ccg-sfa", f"{other}-both")
            _claim(study, f"over_source_{other.partition('-')[2]}", text, "difference", arms, over_best, ">= 0")
    text = "F1, ccg-sfa / oracle (the paper: 93.08 / 97.50)"
    _claim(study, "of_oracle", text, "ratio", ("ccg-sfa", "oracle"), ratio, ">= 0.95")
    regret = study.values(("ccg-sfa", "F1")) - study.values(("ccg-sfa", "F1 of the best candidate"))
    estimate, ci95 = mean_ci95(regret.tolist())
    text = "choice without labels: F1 of the chosen checkpoint - F1 of the best"
    count = len(study.seeds)
    method = f"t over {count} seeds" if ci95 else f"mean of {count} seed" + "s" * (count > 1)
    study.claim("choice", text, "difference", estimate, ci95, method=method, required=">= -2")


def _note(study: Study, level: str) -> None:
    arms = [a for a in ARMS[level] if "mask precision rgb" in study.arms[a]]
    for arm in arms:
        numbers = [
            study.values((arm, f"mask {what} {stream}")).mean()
            for stream in ("rgb", "normal")
            for what in ("precision", "recall")
        ]
        study.note(
            f"Alignment mask of {arm} at the end, on test scenes: RGB stream precision {numbers[0]:.1f} %, "
            f"recall {numbers[1]:.1f} %; normal stream {numbers[2]:.1f} %, {numbers[3]:.1f} %."
        )
    best = max(BASES, key=lambda a: study.values((a, "F1")).mean())
    study.note(f"The best of the source-only arms is '{best}'.")


def _draw(study: Study, level: str, seed: int) -> dict[str, str]:
    """Pictures of the first seed."""
    folder = study.run
    test = scenes_of(folder.path, level, TARGET, "test", seed)
    shown = [a for a in (*BASES, "ccg", "ccg-sfa", "oracle") if a in ARMS[level]]
    masks = {a: study.arrays(a, seed)["masks"] for a in shown}
    rows = []
    aligned = study.arrays("ccg-sfa", seed)["aligned"]
    for k, i in enumerate(shown_rows(test)):
        item, label = test.item(i), test.label(i)
        rgb = _pictures.shown_rgb(item)
        assert item.depth is not None
        normals = normals_of(item.depth, item.intrinsics, NormalSettings())[0][0].numpy()
        seen = [rgb, _pictures.shown_depth(item.depth, item.size), _pictures.shown_normals(normals, item.size)]
        scale = (rgb.shape[0] // aligned.shape[1], rgb.shape[1] // aligned.shape[2])
        where = np.kron(aligned[k], np.ones(scale, np.bool_))
        row = [*seen, _pictures.overlay(rgb, where), *(_pictures.outline(rgb, masks[a][k], label) for a in shown)]
        rows.append(row)
    _pictures.draw_strip(
        folder, "scenes", rows, ["picture", "depth", "normals", "aligned (RGB)", *(f"arm {a}" for a in shown)]
    )
    meters: dict[str, FreespaceMeter] = {}
    for arm in shown:
        meters[arm] = FreespaceMeter()
        meters[arm].counts = sum(study.arrays(arm, s)["counts"] for s in study.seeds)  # type: ignore[assignment]
    _pictures.draw_distance(folder, meters)
    arrays = study.arrays("ccg-sfa", seed)
    curve = Curve(arrays["steps"].tolist(), arrays["course"].tolist())
    health = {
        name: Curve(arrays["steps"][there].tolist(), column[there].tolist())
        for name, column in zip(HEALTH, arrays["health"].T, strict=True)
        if (there := np.isfinite(column)).any()
    }
    panels = [Panel("ccg-sfa, first seed", "step", "F1 on the target (%)", {"ccg-sfa": curve})]
    panels += [Panel("health of the alignment", "step", "share", health)] if health else []
    line_chart(folder.figure("course"), panels)
    size = settings_of(level)
    return {
        "scenes": (
            "Test scenes of the target: picture, depth (black: none), normals, and each arm: hits green, "
            "false alarms red, misses blue."
        ),
        "distance": "F1 at threshold 1/2 by distance, all seeds.",
        "course": f"F1 at the candidates for the choice, which sees no label, and the health line; {size.steps} steps.",
    }  # fmt: skip
