"""`radiogat plot`: pictures of a predicted map, or of complete maps."""

import sys
from pathlib import Path

import numpy as np

from radiogat import pictures
from radiogat.config import PlotSettings
from radiogat.data import read_maps
from radiogat.maps import RadioMap, read_netcdf
from radiogat.rasters import read_geotiff
from radiogat.samples import RadioMaps
from radiogat.spectral import fit_spectrum
from tenfold import UserError
from tenfold.cli import Invocation


def run(settings: PlotSettings, invocation: Invocation) -> None:
    """Draw powers, error bars, spectral slope, and errors where the truth is given; print the pictures' paths."""
    folder = invocation.folder
    building, level = None, None
    found: RadioMap | None = None
    if settings.map.startswith("npz:"):
        complete = read_maps(settings.map, settings.area)
        grid, freqs, power, building = complete.scene.grid, complete.freq_mhz, complete.rss_dbm, complete.building
    else:
        path = Path(settings.map)
        if not path.is_file():
            raise UserError(f"--map {path}: no such file")
        found = read_netcdf(path) if path.suffix == ".nc" else read_geotiff(path, need_crs=False)
        grid, freqs, power, level = found.layout.grid, found.layout.freq_mhz, found.rss_dbm, found.layout.level
        building = found.layout.building
    errors = None
    if settings.truth is not None:
        errors = errors_of(freqs, power, read_maps(settings.truth, settings.area))
    pictures.map_picture(folder.figure("map"), grid, freqs, power, building=building)
    drawn = ["map"]
    if level is not None and found is not None and np.isfinite(found.error_bar).any():
        pictures.error_bar_picture(folder.figure("error-bars"), grid, freqs, found.error_bar, level, building)
        drawn.append("error-bars")
    if len(freqs) > 1:
        pictures.slope_picture(folder.figure("spectral-slope"), grid, fit_spectrum(freqs, power)[1], building)
        drawn.append("spectral-slope")
    if errors is not None:
        pictures.error_picture(folder.figure("error"), grid, errors, building)
        drawn.append("error")
    sys.stdout.write("".join(f"{folder.path / 'figures' / name}.png\n" for name in drawn))


def errors_of(freqs: tuple[float, ...], power: pictures.Floats, truth: RadioMaps) -> dict[str, pictures.Floats]:
    """Predicted minus true power of each band that both have.

    Raises:
        UserError: the grids disagree, or there is no such band.
    """
    if truth.rss_dbm.shape[1:] != power.shape[1:]:
        raise UserError(f"--truth has {truth.rss_dbm.shape[1:]} cells, the map {power.shape[1:]}: the grids disagree")
    both = [f for f in freqs if f in truth.freq_mhz]
    if not both:
        raise UserError(f"--truth has no band of the map: {', '.join(f'{f:g}' for f in truth.freq_mhz)}")
    return {f"{f:g} MHz": power[freqs.index(f)] - truth.rss_dbm[truth.freq_mhz.index(f)] for f in both}
