"""What the error bars say and what is true, where measurements are taken as people take them; on procedural cities.

    python packages/radiogat/studies/drive_tests.py --seeds 0,1,2 --out drive-tests

Cases: five bands at each of 600 places; two bands along streets; one band along streets, with and without buildings.
For each: the RMSE that `heldout_` says and the true one on 8,000 of the free unmeasured cells, the coverage of the 90 % bars
there, and the true RMSE of the chosen method over that of the best part.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from radiogat.config import CityConfig, RadioGATxConfig
from radiogat.estimator import RadioMapEstimator
from radiogat.metrics import coverage, rmse
from radiogat.samples import RadioScene
from radiogat.simulate import along_streets, at_places, city

from tenfold.terminal import table

CELLS = 8000
CASES = (
    "five bands at 600 places",
    "two bands along streets",
    "one band along streets, with buildings",
    "one band along streets",
)


def measure(case: str, seed: int, size: int, steps: int) -> dict[str, float | str]:
    """One case on one city."""
    freqs = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0) if case.startswith("five") else (1750.0, 3500.0)
    maps = city(CityConfig(size=size, seed=seed, freq_mhz=freqs if not case.startswith("one") else freqs[:1]))
    five = case.startswith("five")
    observed = at_places(maps, 600 * size**2 // 200**2, seed) if five else along_streets(maps, 40)
    samples = maps.samples(observed)
    scene = maps.scene if case != CASES[3] else RadioScene(maps.scene.grid)
    free = np.isfinite(maps.rss_dbm) & ~observed.any(axis=0)
    start = time.process_time()
    estimator = RadioMapEstimator(network=RadioGATxConfig(steps=steps, seed=seed), seed=seed)
    where = maps.scene.grid.centers()[free[0].ravel()]
    estimator.fit(samples, scene, where=where)
    some = np.random.default_rng(seed).permutation(len(where))[:CELLS]
    where = where[some]
    true, inside, single = [], [], {name: [] for name in estimator.parts_}
    for b, f in enumerate(maps.freq_mhz):
        truth = maps.rss_dbm[b][free[b]][some]
        power, low, high = estimator.predict(where, f, 0.9)
        true.append(rmse(truth, power))
        inside.append(coverage(truth, low, high))
        for name, errors in single.items():
            model = estimator.fitted_.get(name)
            if model is not None:
                errors.append(rmse(truth, model.predict(where, np.full(len(where), f))[0]))
    said = estimator.heldout_[estimator.chosen_]
    best = min(float(np.sqrt(np.mean(np.square(v)))) for v in single.values() if v)
    truth_rmse = float(np.sqrt(np.mean(np.square(true))))
    row = {"case": case, "seed": seed, "measurements": len(samples), "chosen": estimator.chosen_, "said": said}
    row |= {"true": truth_rmse, "said / true": said / truth_rmse, "coverage": float(np.mean(inside))}
    row |= {"true / best part": truth_rmse / min(best, truth_rmse) if best > truth_rmse else truth_rmse / best}
    return row | {"beyond": estimator.held_.beyond, "seconds": time.process_time() - start}


def main() -> int:
    """Measure every case on every city that has no row yet; write rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--cases", default="0,1,2,3", help="numbers of the cases, from 0")
    parser.add_argument("--size", type=int, default=200, help="cells along each side of a city")
    parser.add_argument("--steps", type=int, default=900, help="training steps of the network")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in map(int, given.seeds.split(",")):
        for number in map(int, given.cases.split(",")):
            path = given.out / f"case{number}-seed{seed}-{given.size}-{given.steps}.json"
            if not path.exists():
                row = measure(CASES[number], seed, given.size, given.steps)
                path.write_text(json.dumps(row, indent=1), encoding="utf-8")
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    rows.sort(key=lambda row: (CASES.index(row["case"]), row["seed"]))
    (given.out / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    names = list(rows[0])
    shown = [[f"{row[n]:.3g}" if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]
    sys.stdout.write(table(names, shown) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
