"""`radiogat predict`: another map of a learned area, or powers at given places."""

import sys

import numpy as np

from radiogat.commands._files import grid_for, learned
from radiogat.commands._maps import map_format, write_map
from radiogat.config import PredictSettings
from radiogat.data import read_points
from radiogat.maps import write_csv
from tenfold.cli import Invocation


def run(settings: PredictSettings, invocation: Invocation) -> None:
    """Write the map with its pictures, or ``points.csv``."""
    folder = invocation.folder
    kind = map_format(settings.format) if settings.points is None else "csv"
    estimator = learned(settings.run)
    freqs = estimator.frequencies(settings.freq_mhz)
    if settings.points is None:
        grid = grid_for(estimator.samples_, estimator.scene_, settings.cell)
        written = write_map(folder, estimator, grid, freqs, settings.interval, kind)
        sys.stdout.write(f"map: {folder.path / written}\n")
        return
    xy = read_points(settings.points, estimator.samples_.crs)
    values = estimator.predict(xy, freqs, settings.interval)
    columns = [np.tile(xy[:, 0], len(freqs)), np.tile(xy[:, 1], len(freqs)), np.repeat(freqs, len(xy))]
    names = ["x", "y", "freq_mhz", "rss_dbm", "rss_lo", "rss_hi"]
    write_csv(folder.own("points.csv"), names, [*columns, *(layer.ravel() for layer in values)])
    sys.stdout.write(f"{len(xy)} places x {len(freqs)} frequencies: {folder.path / 'points.csv'}\n")
