"""`radiogat convert`: measurements or maps in another format."""

import sys
import warnings

import numpy as np

from radiogat.commands._files import grid_for, read_measured, unknown
from radiogat.commands._maps import map_format
from radiogat.config import ConvertSettings
from radiogat.data import read_maps, write_maps, write_samples
from radiogat.maps import MapLayout, RadioMap, read_netcdf
from radiogat.planes import check_plane
from radiogat.rasters import read_geotiff
from radiogat.samples import RadioMaps, RadioSamples
from tenfold.cli import Invocation


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Write ``samples.csv``, ``maps.npz``, ``map.tif`` or ``map.nc``."""
    folder = invocation.folder
    if settings.crs is not None:
        check_plane(settings.crs)
    if settings.to == "csv":
        samples = samples_in(settings)
        write_samples(folder.own("samples.csv"), samples)
        sys.stdout.write(f"{len(samples)} measurements: {folder.path / 'samples.csv'}\n")
    elif settings.to == "npz":
        write_maps(folder.own("maps.npz"), complete_in(settings))
        sys.stdout.write(f"maps: {folder.path / 'maps.npz'}\n")
    else:
        map_format(settings.to)
        found = map_in(settings)
        name = "map.tif" if settings.to == "geotiff" else "map.nc"
        (found.to_geotiff if settings.to == "geotiff" else found.to_netcdf)(folder.own(name))
        sys.stdout.write(f"map: {folder.path / name}\n")


def kind_of(settings: ConvertSettings) -> str:
    """The kind of ``--data``."""
    return settings.data.partition(":")[0]


def samples_in(settings: ConvertSettings) -> RadioSamples:
    """The measurements, or all cells that have a value."""
    if kind_of(settings) in {"npz", "official"}:
        maps = read_maps(settings.data, settings.area)
        return maps.samples(np.isfinite(maps.rss_dbm))
    return read_measured(settings)[0]


def map_in(settings: ConvertSettings) -> RadioMap:
    """The map; measurements are laid on a raster, whose other cells have no value."""
    kind, _, path = settings.data.partition(":")
    if kind in {"csv", "parquet"}:
        samples, scene = read_measured(settings)
        grid = grid_for(samples, scene, settings.cell)
        if not (inside := grid.inside(samples.xy)).all():
            warnings.warn(
                f"{int((~inside).sum())} of {len(samples)} measurements lie outside of the buildings' raster and are left out",
                stacklevel=2,
            )
            samples = samples.take(inside)
        power = np.full((len(samples.bands), *grid.shape), np.nan)
        at = grid.rowcol(samples.xy)
        flat = np.ravel_multi_index((np.searchsorted(samples.bands, samples.freq_mhz), at[:, 0], at[:, 1]), power.shape)
        order = np.lexsort((samples.rss_dbm, flat))
        cells, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
        value = samples.rss_dbm[order]
        power.flat[cells] = (value[first + (counts - 1) // 2] + value[first + counts // 2]) / 2
        if len(cells) < len(samples):
            warnings.warn(
                f"{len(samples)} measurements became {len(cells)} cells, by their medians: a smaller --cell keeps more",
                stacklevel=2,
            )
        building = None if scene is None else scene.building_on(grid)
        return RadioMap(MapLayout(grid, samples.bands, None, samples.crs, building), {"rss_dbm": power})
    if kind in {"npz", "official"}:
        maps = read_maps(settings.data, settings.area)
        layout = MapLayout(maps.scene.grid, maps.freq_mhz, None, settings.crs, maps.building)
        return RadioMap(layout, {"rss_dbm": maps.rss_dbm})
    if kind == "geotiff":
        return read_geotiff(path, crs=settings.crs, freq_mhz=settings.freq_mhz, sign=settings.sign)
    if kind == "netcdf":
        return read_netcdf(path)
    raise unknown(settings)


def complete_in(settings: ConvertSettings) -> RadioMaps:
    """The complete maps, with the buildings that the map or ``--buildings`` says: a cell without a value need not be one."""
    if kind_of(settings) in {"npz", "official"}:
        return read_maps(settings.data, settings.area)
    found, path = map_in(settings), settings.data.partition(":")[2]
    grid, building = found.layout.grid, found.layout.building
    if building is None and settings.buildings is not None:
        _, scene = read_measured(settings)
        assert scene is not None
        building = scene.building_on(grid)
    if building is None:
        empty = int(np.isnan(found.rss_dbm).all(axis=0).sum())
        warnings.warn(
            f"{path} does not say where buildings are: its {empty} cells without a value count as unmeasured; --buildings FILE"
            " says where they are",
            stacklevel=2,
        )
        building = np.zeros(grid.shape, dtype=bool)
    masts = np.empty((0, 2), dtype=np.int64)
    layers = set(found.layers) - {"rss_dbm"}
    if layers:
        warnings.warn(
            f"{path}: {', '.join(sorted(layers))} are left out: complete maps have powers alone", stacklevel=2
        )
    return RadioMaps(found.rss_dbm, found.layout.freq_mhz, masts, path, grid.cell, building)
