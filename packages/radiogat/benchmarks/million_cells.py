"""Memory of a map of a million cells from 200,000 measurements, in five bands with error bars, written tile by tile."""

import importlib.metadata
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from radiogat.config import RadioGATxConfig
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import MapLayout, write_netcdf
from radiogat.samples import Grid, RadioSamples

from tenfold import bench

BANDS = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0)
LIMIT = 2048.0
"""MB."""


def measure() -> list[bench.Comparison]:
    """One row: the limit over the process's peak, libraries included."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1000, (200_000, 2))
    freq = np.resize(BANDS, len(xy))
    rss = -60 + 10 * np.sin(xy[:, 0] / 50) + 10 * np.cos(xy[:, 1] / 70) - 20 * np.log10(freq / BANDS[0])
    estimator = RadioMapEstimator(network=RadioGATxConfig(steps=100)).fit(RadioSamples(xy, freq, rss))
    grid = Grid(0.0, 1000.0, 1.0, 1000, 1000)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.nc"
        write_netcdf(path, MapLayout(grid, BANDS, 0.9), estimator.tiles(grid, BANDS, 0.9))
        size = path.stat().st_size / 2**20
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = bench.counted(
        "million_cells",
        peak,
        LIMIT,
        shape=f"200,000 measurements, 1000x1000 cells x 5 bands with bounds, {seconds:.0f} s, file {size:.0f} MB",
        unit="MB",
        required=">= 1",
        equal=f"chosen: {estimator.chosen_}",
        statistic="peak resident memory of the whole process, against a limit",
    )
    return [row]


if __name__ == "__main__":
    peers = {"limit of 2 GB": "", "torch": importlib.metadata.version("torch")}
    raise SystemExit(bench.main("radiogat", peers, measure))
