"""The stack against gradient-boosted trees, kriging and PyKrige on ray-traced areas: two areas, two rates, one band and all.

    python packages/radiogat/studies/eight_cells.py --data npz:FILE --areas 1,2 --seeds 0,1,2 --out eight-cells

The test blocks of `radiogat.evaluation.Protocol` at 5750 MHz, on at most 15,000 of their unmeasured free cells. Trees see
what the network sees (`radiogat.trees`); PyKrige has one band, an exponential variogram fitted by it to 1,500
measurements, and 16 neighbors, as ours. The stack's parts are listed with their own errors and their weights.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from radiogat.config import RadioGATxConfig, TreesConfig
from radiogat.data import read_maps
from radiogat.estimator import RadioMapEstimator
from radiogat.evaluation import Protocol, crop
from radiogat.metrics import coverage, rmse
from radiogat.predictors import make
from radiogat.samples import RadioSamples

from tenfold.terminal import table

CELLS = 15_000


def pykrige(samples: RadioSamples, xy: np.ndarray, freq_mhz: float) -> np.ndarray:
    """Ordinary kriging of one band by PyKrige."""
    from pykrige.ok import OrdinaryKriging

    band = samples.band(freq_mhz)
    some = np.random.default_rng(0).permutation(len(band))[:1500]
    fitted = OrdinaryKriging(*band.xy[some].T, band.rss_dbm[some], variogram_model="exponential")
    parameters = list(fitted.variogram_model_parameters)
    whole = OrdinaryKriging(*band.xy.T, band.rss_dbm, variogram_model="exponential", variogram_parameters=parameters)
    return np.asarray(whole.execute("points", *xy.T, n_closest_points=16, backend="C")[0])


def measure(data: str, area: int, rate: float, task: str, seed: int) -> dict[str, object]:
    """One cell of the table, for one seed."""
    maps = crop(read_maps(data, area))
    protocol = Protocol(maps, task, rate, seed, len(maps.freq_mhz) - 1)
    f = maps.freq_mhz[protocol.target]
    samples, scene = maps.samples(protocol.observed), maps.scene
    xy = scene.grid.centers()[protocol.where.ravel()]
    truth = maps.rss_dbm[protocol.target][protocol.where]
    some = np.random.default_rng(seed).permutation(len(xy))[:CELLS]
    xy, truth = xy[some], truth[some]
    freq = np.full(len(xy), f)
    start = time.process_time()
    peers = {"kriging": "kriging", "trees": "trees"} | ({"pooled kriging": "pooled_kriging"} if task == "M" else {})
    errors = {}
    for shown, name in peers.items():
        model = make(name, samples, scene, trees=TreesConfig())
        model.train(lambda task: None)
        errors[shown] = rmse(truth, model.predict(xy, freq)[0])
    errors["PyKrige"] = rmse(truth, pykrige(samples, xy, f))
    peers_s = time.process_time() - start
    start = time.process_time()
    estimator = RadioMapEstimator("stack", RadioGATxConfig(seed=seed), fallback=False, seed=seed).fit(samples, scene)
    power, low, high = estimator.predict(xy, f, 0.9)
    assert estimator.weights_ is not None
    ours = rmse(truth, power)
    parts = {}
    for name, near, far in zip(estimator.parts_, estimator.weights_.near, estimator.weights_.far, strict=True):
        parts[name] = {
            "rmse": rmse(truth, estimator.fitted_[name].predict(xy, freq)[0]),
            "near": float(near),
            "far": float(far),
        }
    row = {"area": area, "rate": rate, "task": task, "seed": seed, "measurements": len(samples), "stack": ours}
    row |= {
        "said": estimator.heldout_["stack"],
        "coverage": coverage(truth, low, high),
        "peers": errors,
        "parts": parts,
    }
    row |= {"ratio": ours / min(errors.values()), "peers_s": peers_s, "stack_s": time.process_time() - start}
    return row


def main() -> int:
    """Measure each cell that has no row yet; print the table of all rows in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--areas", default="1,2")
    parser.add_argument("--rates", default="0.01,0.05")
    parser.add_argument("--tasks", default="S,M")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    cases = [
        (int(area), float(rate), task, int(seed))
        for seed in given.seeds.split(",")
        for area in given.areas.split(",")
        for rate in given.rates.split(",")
        for task in given.tasks.split(",")
    ]
    rows = []
    for area, rate, task, seed in cases:
        path = given.out / f"area{area}-{rate:g}-{task}-seed{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(given.data, area, rate, task, seed), indent=1))
        rows.append(json.loads(path.read_text()))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    sys.stdout.write(report(rows) + "\n")
    return 0


def report(rows: list[dict]) -> str:
    """Means over the seeds, cell by cell."""
    body = []
    for key in dict.fromkeys((row["area"], row["rate"], row["task"]) for row in rows):
        own = [row for row in rows if (row["area"], row["rate"], row["task"]) == key]

        def mean(values: list[float]) -> str:
            return f"{np.mean(values):.3f}"

        peers = {name: mean([row["peers"][name] for row in own if name in row["peers"]]) for name in own[0]["peers"]}
        best = min(float(value) for value in peers.values())
        parts = ", ".join(
            f"{name} {mean([r['parts'][name]['rmse'] for r in own])} ({np.mean([r['parts'][name]['near'] for r in own]):.0%} to"
            f" {np.mean([r['parts'][name]['far'] for r in own]):.0%})"
            for name in own[0]["parts"]
        )
        ours = float(np.mean([row["stack"] for row in own]))
        cells = [str(part) for part in key]
        shown = [peers["trees"], peers["kriging"], peers.get("pooled kriging", "-"), peers["PyKrige"]]
        body.append(
            [*cells, f"{ours:.3f}", *shown, f"{ours / best:.3f}", mean([row["coverage"] for row in own]), parts]
        )
    head = [
        "area",
        "rate",
        "task",
        "stack",
        "trees",
        "kriging",
        "pooled kriging",
        "PyKrige",
        "stack / best",
        "coverage",
        "parts",
    ]
    pooled = float(np.mean([row["coverage"] for row in rows]))
    return f"{table(head, body)}\n\ncoverage of all: {pooled:.3f}"


if __name__ == "__main__":
    sys.exit(main())
