"""A predicted map as a file, and its pictures."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from radiogat import maps, pictures
from radiogat.config import PredictFormat
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import RadioMap
from radiogat.samples import Grid
from radiogat.spectral import fit_spectrum
from tenfold.errors import installed, needs
from tenfold.runs import Run

_LARGE = 20_000_000
"""Values beyond which a map is written tile by tile and not drawn."""


Kind = Literal["geotiff", "cog", "netcdf", "zarr", "csv"]


def map_format(chosen: PredictFormat) -> Kind:
    """The file format of a map: GeoTIFF where it can be written, unless another one was chosen.

    Raises:
        MissingExtraError: what writes it is not installed.
    """
    if chosen == "auto":
        return "geotiff" if installed("rasterio") else "csv"
    if chosen in {"geotiff", "cog"}:
        needs("rasterio", "geo", "radiogat", why="GeoTIFF")
    if chosen == "netcdf":
        needs("netCDF4", "geo", "radiogat", why="netCDF")
    if chosen == "zarr":
        needs("zarr", "dask", "radiogat", why="zarr")
        needs("xarray", "geo", "radiogat", why="zarr")
    return chosen


def write_map(
    run: Run,
    estimator: RadioMapEstimator,
    grid: Grid,
    freq_mhz: Sequence[float] | None,
    interval: float,
    kind: Kind,
) -> str:
    """Write the map, draw it where it fits into memory, and return the file's name."""
    layout = estimator.layout(grid, freq_mhz, interval)
    name = {"geotiff": "map.tif", "cog": "map.tif", "netcdf": "map.nc", "zarr": "map.zarr", "csv": "map.csv"}[kind]
    tiles = estimator.tiles(grid, layout.freq_mhz, interval)
    if len(layout.freq_mhz) * grid.height * grid.width > _LARGE and kind in {"geotiff", "cog", "netcdf"}:
        write = {"geotiff": maps.write_geotiff, "cog": maps.write_cog, "netcdf": maps.write_netcdf}[kind]
        write(run.own(name), layout, tiles)
        return name
    found = RadioMap.collect(layout, tiles)
    if kind == "zarr":
        with run.replacing_folder(name) as folder:
            found.to_xarray().to_zarr(folder, mode="w", consolidated=False)
    else:
        write_one = {"geotiff": found.to_geotiff, "cog": found.to_cog, "netcdf": found.to_netcdf, "csv": found.to_csv}
        write_one[kind](run.own(name))
    draw_map(run, found, estimator)
    return name


def draw_map(run: Run, found: RadioMap, estimator: RadioMapEstimator) -> None:
    """Draw powers, error bars and spectral slope of a map."""
    scene, layout = estimator.scene_, found.layout
    building = layout.building
    masts = None if scene is None else scene.transmitters
    grid, freqs = layout.grid, layout.freq_mhz
    pictures.map_picture(
        run.figure("map"),
        grid,
        freqs,
        found.rss_dbm,
        building=building,
        samples=estimator.samples_,
        transmitters=masts,
    )
    if np.isfinite(found.error_bar).any():
        path = run.figure("error-bars")
        pictures.error_bar_picture(path, grid, freqs, found.error_bar, layout.level or 0.9, building)
    if len(freqs) > 1:
        _, slope = fit_spectrum(freqs, found.rss_dbm)
        pictures.slope_picture(run.figure("spectral-slope"), grid, slope, building)
