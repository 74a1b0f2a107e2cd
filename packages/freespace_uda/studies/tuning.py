"""The trials behind the weights of the demonstration: as many for every arm, on world seeds 100 and 101 (reports use 0 and up).

    python tuning.py --out DIR

Every arm that learns from the target is tried with three weights; the best is that of the highest mean F1 over both seeds, on
the test scenes of those worlds. ``--second`` then tries two more settings at that weight: two values of the arm's second
constant (``ccg-sfa``: tau; ``fada``: temperature; ``self-training``: threshold) or, where it has none, the weights half a
decade above and below. A trial is a JSON file in DIR, and those that are there are not run again. ``--level quick`` is for a
look at the mechanics; the numbers of docs/freespace-uda.md are of ``--level full``.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from freespace_uda.commands._arms import measure
from freespace_uda.commands._world import TARGET, scenes_of, settings_of
from freespace_uda.config import Arm, RunSettings

from tenfold.files import replacing

Scores = dict[tuple[float, float], float]
"""Mean F1 by weight and second constant."""
SEEDS = (100, 101)
SOURCE = "roads-flat"


@dataclasses.dataclass(frozen=True)
class Search:
    """What an arm's trials are.

    Args:
        weights: the three weights.
        second: name of the second constant; empty where there is none.
        usual: its value while the weights are tried.
        others: two more values of it.
    """

    weights: tuple[float, float, float] = (1e-2, 1e-1, 1.0)
    second: str = ""
    usual: float = 0.0
    others: tuple[float, float] = (0.0, 0.0)


SEARCHES: dict[Arm, Search] = {
    "ccg-sfa": Search(second="tau", usual=0.8, others=(0.6, 0.9)),
    "fada": Search(second="temperature", usual=1.8, others=(1.0, 3.0)),
    "adaptsegnet": Search(),
    "advent": Search(),
    "self-training": Search((1.0, 3.0, 10.0), "threshold", 0.968, (0.9, 0.99)),
    "minent": Search((1e-3, 1e-2, 1e-1)),
    "ccg-sfa-all": Search(),
}


def changed(settings: RunSettings, arm: Arm, weight: float, second: float) -> RunSettings:
    """The demonstration's settings with those of the trial."""
    name = SEARCHES[arm].second
    more = {name: second} if name else {}
    if arm.startswith("ccg-sfa"):
        return dataclasses.replace(settings, align=dataclasses.replace(settings.align, weight=weight, **more))
    own = {arm.replace("-", "_"): weight, **more}
    return dataclasses.replace(settings, general=dataclasses.replace(settings.general, **own))


def trial(folder: Path, level: str, arm: Arm, weight: float, second: float) -> float:
    """Mean F1 over the seeds; each of them is measured once and kept."""
    scores = []
    for seed in SEEDS:
        path = folder / f"{level}-{arm}-{weight:g}-{second:g}-{seed}.json"
        if not path.exists():
            start = time.process_time()
            parts = [
                scenes_of(folder, level, domain, part, seed)
                for domain, part in ((SOURCE, "train"), (TARGET, "train"), (TARGET, "test"))
            ]
            settings = changed(settings_of(level, SOURCE, seed), arm, weight, second)
            found = {"steps": settings.steps, **measure(settings, arm, seed, *parts).values}
            found["seconds"] = round(time.process_time() - start, 1)
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        scores.append(float(json.loads(path.read_text(encoding="utf-8"))["F1"]))
    mean = sum(scores) / len(scores)
    constant = f", {SEARCHES[arm].second} {second:g}" if SEARCHES[arm].second else ""
    each = ", ".join(f"{score:.1f}" for score in scores)
    sys.stdout.write(f"| `{arm}` | {weight:g}{constant} | {each} | {mean:.1f} |\n")
    sys.stdout.flush()
    return mean


def first(folder: Path, level: str, arms: Sequence[Arm]) -> dict[Arm, Scores]:
    """The weights of every arm; a weight of all arms, then the next one."""
    found: dict[Arm, Scores] = {arm: {} for arm in arms}
    for row in range(3):
        for arm in arms:
            setting = (SEARCHES[arm].weights[row], SEARCHES[arm].usual)
            found[arm][setting] = trial(folder, level, arm, *setting)
    return found


def then(folder: Path, level: str, arm: Arm, found: Scores) -> Scores:
    """Two more settings at the best weight."""
    s, weight = SEARCHES[arm], best(found)[0]
    more = [(weight, v) for v in s.others] if s.second else [(weight * f, s.usual) for f in (0.3, 3.0)]
    return {setting: trial(folder, level, arm, *setting) for setting in more}


def best(found: Scores) -> tuple[float, float]:
    """Weight and second constant of the highest mean F1."""
    return max(found, key=lambda setting: found[setting])


def main() -> int:
    """Run what is missing and print all trials and what they choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--level", default="full", choices=["quick", "default", "full"])
    parser.add_argument("--arms", default=",".join(SEARCHES), help="default: %(default)s")
    parser.add_argument("--second", action="store_true", help="also try two more settings at the best weight")
    words = parser.parse_args()
    if unknown := set(words.arms.split(",")) - set(SEARCHES):
        parser.error(f"--arms: expected some of {', '.join(SEARCHES)}, got {min(unknown)}")
    torch.set_num_threads(1)
    (words.out / "worlds").mkdir(parents=True, exist_ok=True)
    arms: list[Arm] = words.arms.split(",")
    found = first(words.out, words.level, arms)
    if words.second:
        for arm in arms:
            found[arm] |= then(words.out, words.level, arm, found[arm])
    for arm in arms:
        weight, second = best(found[arm])
        name = SEARCHES[arm].second
        sys.stdout.write(f"chosen for {arm}: weight {weight:g}" + (f", {name} {second:g}" if name else "") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
