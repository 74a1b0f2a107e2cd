"""`radiogat predict`: another map of a learned area, here or in tiles on a cluster, or powers at given places."""

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from radiogat import tiling
from radiogat.commands._files import grid_for, learned, model_file
from radiogat.commands._maps import map_format, write_map
from radiogat.config import PredictSettings
from radiogat.data import read_points
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import MapLayout, write_csv
from tenfold.cli import Invocation
from tenfold.errors import needs
from tenfold.terminal import track

_MOST_CELLS = 20_000_000_000
"""Cells of a map that workers predict."""


def run(settings: PredictSettings, invocation: Invocation) -> None:
    """Write the map, with its pictures where it fits into memory, or ``points.csv``."""
    if settings.dask is not None:
        on_cluster(settings, invocation)
        return
    folder = invocation.folder
    kind = "csv" if settings.points is not None else map_format(settings.format)
    estimator = learned(settings.run)
    freqs = estimator.frequencies(settings.freq_mhz)
    if settings.points is not None:
        at_points(settings, invocation, estimator, freqs)
        return
    grid = grid_for(estimator.samples_, estimator.scene_, settings.cell)
    written = write_map(folder, estimator, grid, freqs, settings.interval, kind)
    sys.stdout.write(f"map: {folder.path / written}\n")


def at_points(
    settings: PredictSettings, invocation: Invocation, estimator: RadioMapEstimator, freqs: Sequence[float]
) -> None:
    """Write ``points.csv``."""
    assert settings.points is not None
    xy = read_points(settings.points, estimator.samples_.crs)
    values = estimator.predict(xy, freqs, settings.interval)
    columns = [np.tile(xy[:, 0], len(freqs)), np.tile(xy[:, 1], len(freqs)), np.repeat(freqs, len(xy))]
    names = ["x", "y", "freq_mhz", "rss_dbm", "rss_lo", "rss_hi"]
    write_csv(invocation.folder.own("points.csv"), names, [*columns, *(layer.ravel() for layer in values)])
    sys.stdout.write(f"{len(xy)} places x {len(freqs)} frequencies: {invocation.folder.path / 'points.csv'}\n")


def on_cluster(settings: PredictSettings, invocation: Invocation) -> None:
    """Write the map that the workers of a dask cluster predict in tiles."""
    assert settings.dask is not None
    folder, zarr = invocation.folder, settings.format == "zarr"
    needs("distributed", "dask", "radiogat", why="--dask")
    if zarr:
        needs("zarr", "dask", "radiogat", why="--format zarr")
    else:
        map_format("cog")
    model = model_file(settings.run)
    estimator = learned(settings.run)
    tile = settings.tile or tiling.TILE
    freqs = estimator.frequencies(settings.freq_mhz)
    grid = grid_for(estimator.samples_, estimator.scene_, settings.cell, _MOST_CELLS)
    layout = MapLayout(grid, freqs, settings.interval, estimator.samples_.crs)
    with tiling.cluster(settings.dask) as client:
        sys.stdout.write(tiling.check_memory(client, layout, tile) + "\n")
        sys.stdout.flush()
        if zarr:
            with folder.replacing_folder("map.zarr") as out:
                tiling.write_zarr(client, model, Path(out), layout, tile)
        else:
            count = sum(1 for _ in tiling.windows(grid.shape, tile))
            progress = partial(_shown, count=count, quiet=invocation.quiet)
            tiling.write_cog(client, model, folder.own("map.tif"), layout, tile, progress)
    sys.stdout.write(f"map: {folder.path / ('map.zarr' if zarr else 'map.tif')}\n")


def _shown(tiles: Iterable[Any], *, count: int, quiet: bool) -> Iterable[Any]:
    coming = iter(tiles)
    for _ in track(range(count), "predicting tiles", quiet=quiet):
        yield next(coming)
