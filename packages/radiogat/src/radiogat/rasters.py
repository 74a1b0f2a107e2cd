"""GeoTIFFs as people have them: scale, offset and unit, either way up, cells without data, in any coordinate system.

Legend: H rows, W columns, F bands.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radiogat.faults import apart
from radiogat.maps import DBM, MapLayout, RadioMap
from radiogat.planes import moved, plane_for, same_plane
from radiogat.roles import Missing, frequency_in
from radiogat.samples import RSS_RANGE, Grid, RadioSamples
from tenfold import UserError
from tenfold.errors import needs

Floats = NDArray[np.float64]


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Yield a raster as rasterio opens it.

    Raises:
        UserError: no such file, or not a raster.
        MissingExtraError: rasterio is not installed.
    """
    needs("rasterio", "geo", "radiogat", why="GeoTIFF")
    import rasterio
    from rasterio.errors import RasterioIOError

    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    try:
        with rasterio.open(path) as file:
            yield file
    except RasterioIOError as error:
        raise UserError(f"{path}: not a raster that can be read ({error})") from error


@dataclasses.dataclass(frozen=True)
class Placed:
    """An open raster and where its values lie: square cells in a plane in meters, row 0 in the north.

    Args:
        path: the file.
        file: as rasterio opened it.
        grid: where its values are laid.
        crs: the plane; None where the file names none.
        flipped: the file's rows go from south to north.
        moved: it lies in another coordinate system, and each cell takes the value of the nearest of the file's cells.
    """

    path: Path
    file: Any
    grid: Grid
    crs: str | None
    flipped: bool = False
    moved: bool = False

    def band(self, number: int) -> Floats:
        """(H, W) values of a band (from 1) in its unit: scale and offset are applied, cells without data are NaN."""
        values = values_of(self.file, number)
        if not self.moved:
            return values[::-1] if self.flipped else values
        from rasterio.warp import Resampling, reproject

        out = np.full(self.grid.shape, np.nan)
        reproject(
            values,
            out,
            src_transform=self.file.transform,
            src_crs=self.file.crs,
            dst_transform=self.grid.transform,
            dst_crs=self.crs,
            src_nodata=np.nan,
            dst_nodata=np.nan,
            resampling=Resampling.nearest,
        )
        return out


def values_of(file: Any, number: int) -> Floats:
    """(H, W) values of a band as they lie in the file, in the band's unit: raw times scale plus offset, NaN without data."""
    raw = file.read(number, masked=True).astype(np.float64)
    return np.asarray((raw * file.scales[number - 1] + file.offsets[number - 1]).filled(np.nan))


def name_of(crs: Any) -> str:
    """A coordinate system of rasterio by its EPSG code, or as WKT."""
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else str(crs.to_wkt())


def placed(
    path: str | Path, file: Any, crs: str | None = None, *, need_crs: bool = True, cell: float | None = None
) -> Placed:
    """Where an open raster lies, on a grid of square cells in meters; nothing is read yet.

    Args:
        path: the file, for messages.
        file: as rasterio opened it.
        crs: plane that it is wanted in; default: its own where that is one in meters, else UTM.
        need_crs: refuse a file without a coordinate system.
        cell: side of a cell in meters, where it has to be laid on another grid.

    Raises:
        UserError: it has no coordinate system, or it is rotated.
    """
    t, name = file.transform, Path(path)
    if t.b or t.d:
        raise UserError(f"{path} is rotated: turn it north-up (gdalwarp IN OUT does)")
    if t.a < 0:
        raise UserError(f"{path}: its columns go from east to west: turn it (gdalwarp IN OUT does)")
    square = t.a > 0 and t.e != 0 and abs(abs(t.e) - t.a) <= 1e-6 * t.a
    if file.crs is None:
        if need_crs:
            raise UserError(f"{path} has no coordinate system: assign one (gdal_edit.py -a_srs EPSG:... FILE)")
        if not square:
            raise UserError(f"{path} has no coordinate system, and its cells are not square: {tuple(t)[:6]}")
    own = None if file.crs is None else name_of(file.crs)
    meters = file.crs is None or (not file.crs.is_geographic and abs(file.crs.linear_units_factor[1] - 1) < 1e-9)
    same = crs is None or own is None or same_plane(own, crs)
    if square and meters and same:
        north = t.f if t.e < 0 else t.f + t.e * file.height
        return Placed(name, file, Grid(t.c, north, t.a, file.height, file.width), crs or own, flipped=t.e > 0)
    from rasterio.warp import calculate_default_transform

    left, bottom, right, top = file.bounds
    bottom, top = min(bottom, top), max(bottom, top)
    assert own is not None
    goal = crs or (own if meters else _utm(str(path), own, (left, bottom, right, top)))
    extent = (left, bottom, right, top)
    to, width, height = calculate_default_transform(
        file.crs, goal, file.width, file.height, *extent, resolution=cell or _side(file, goal, extent)
    )
    grid = Grid(to.c, to.f, to.a, height, width)
    why = own if not same_plane(own, goal) else "cells that are not square"
    warnings.warn(
        f"{path} lies in {why}: laid on {height} x {width} cells of {grid.cell:.3g} m in {goal}, each with the value of the"
        f" nearest of the {file.height} x {file.width}",
        stacklevel=4,
    )
    return Placed(name, file, grid, goal, moved=True)


def _utm(name: str, own: str, extent: tuple[float, float, float, float]) -> str:
    left, bottom, right, top = extent
    corners = np.array([[left, bottom], [right, top], [left, top], [right, bottom]])
    lonlat = moved(corners, own, "EPSG:4326")
    return plane_for(lonlat[:, 0], lonlat[:, 1], name)


def _side(file: Any, goal: str, extent: tuple[float, float, float, float]) -> float:
    """The shorter side in meters of the cell in the raster's middle, to three digits."""
    left, bottom, right, top = extent
    x, y, dx, dy = (left + right) / 2, (bottom + top) / 2, file.transform.a, abs(file.transform.e)
    at = moved(np.array([[x, y], [x + dx, y], [x, y + dy]]), name_of(file.crs), goal)
    side = float(np.sqrt(((at[1:] - at[0]) ** 2).sum(axis=1)).min())
    return float(f"{side:.3g}")


def frequency_of(path: str | Path, file: Any, number: int, freq_mhz: float | None) -> float:
    """MHz of a band, by its tag ``freq_mhz`` or its description (1750 MHz, 1.8 GHz), or else as given.

    Raises:
        UserError: neither says it.
    """
    tags, said = file.tags(number), file.descriptions[number - 1] or ""
    with contextlib.suppress(KeyError, ValueError):
        return float(tags["freq_mhz"])
    if (found := frequency_in(said)) is not None:
        return found
    if freq_mhz is not None:
        return freq_mhz
    raise UserError(f"{path}, band {number}: no frequency; describe it as '1750 MHz', or give --freq_mhz")


def powers_in(path: str | Path, file: Any, freq_mhz: float | None) -> dict[str, dict[float, int]]:
    """Layer -> frequency -> number of the band; the layer building has the frequency 0.

    Raises:
        UserError: two bands of one frequency, a band of another unit, or one that does not say its frequency.
    """
    found: dict[str, dict[float, int]] = {}
    for number in range(1, file.count + 1):
        layer = file.tags(number).get("layer", "rss_dbm")
        freq = 0.0 if layer == "building" else frequency_of(path, file, number, freq_mhz)
        unit = (file.units[number - 1] or "").strip().lower()
        if layer != "building" and unit not in DBM:
            raise UserError(f"{path}, band {number} is in {file.units[number - 1]}, expected dBm: convert it")
        first = found.setdefault(layer, {}).setdefault(freq, number)
        if first != number:
            raise UserError(
                f"{path}: bands {first} and {number} are both {freq:g} MHz: keep one of them"
                f" (gdal_translate -b {number} IN OUT)"
            )
    if "rss_dbm" not in found:
        raise UserError(f"{path}: no band of received power")
    return found


def read_geotiff(
    path: str | Path,
    need_crs: bool = True,
    crs: str | None = None,
    freq_mhz: float | None = None,
    sign: int = 1,
) -> RadioMap:
    """A map that ``write_geotiff`` wrote, or any GeoTIFF whose bands say their frequency in a tag or description.

    Args:
        path: the file.
        need_crs: refuse a file without a coordinate system; a map of measurements without one has none.
        crs: plane that the map is wanted in; default: its own, or UTM for degrees.
        freq_mhz: frequency of a file that says none.
        sign: -1 where the values are given as positive losses.

    Raises:
        UserError: not a raster that can be placed, two bands of one frequency, another unit, or no frequency.
    """
    with opened(path) as file:
        bands = powers_in(path, file, freq_mhz)
        at = placed(path, file, crs, need_crs=need_crs)
        building = at.band(bands.pop("building")[0.0]) if "building" in bands else None
        layers = {layer: {freq: sign * at.band(number) for freq, number in by.items()} for layer, by in bands.items()}
        level = file.tags().get("interval")
    freqs = tuple(sorted(layers["rss_dbm"]))
    mask = None if building is None else np.nan_to_num(building) != 0
    layout = MapLayout(at.grid, freqs, float(level) if level else None, at.crs, mask)
    return RadioMap(layout, {name: np.stack([by[f] for f in freqs]) for name, by in layers.items()})


def read_cells(
    path: str | Path,
    crs: str | None = None,
    *,
    freq_mhz: float | None = None,
    sign: int = 1,
    missing: Missing = "refuse",
    range: tuple[float, float] | None = None,
) -> RadioSamples:
    """The cells of a GeoTIFF that have a value, as measurements at their own centers; nothing is resampled.

    Args:
        path: the file.
        crs: plane of the measurements; default: the file's own, or UTM for degrees.
        freq_mhz: frequency of a file that says none.
        sign: -1 where the values are given as positive losses.
        missing: refuse values that no power has (0 dBm, or out of range), or drop these cells, with a count.
        range: lowest and highest value of the file that is a measurement; others are as those that no power has.

    Raises:
        UserError: not such a raster, or as ``missing`` says.
    """
    with opened(path) as file:
        bands = powers_in(path, file, freq_mhz)["rss_dbm"]
        if file.crs is None:
            raise UserError(f"{path} has no coordinate system: assign one (gdal_edit.py -a_srs EPSG:... FILE)")
        own, t = name_of(file.crs), file.transform
        meters = not file.crs.is_geographic and abs(file.crs.linear_units_factor[1] - 1) < 1e-9
        extent = (*np.minimum(file.bounds[:2], file.bounds[2:]), *np.maximum(file.bounds[:2], file.bounds[2:]))
        goal = crs or (own if meters else _utm(str(path), own, extent))
        parts: list[tuple[Floats, Floats, Floats]] = []
        odd, example = 0, 0.0
        for freq, number in sorted(bands.items()):
            values = sign * values_of(file, number)
            row, column = np.nonzero(np.isfinite(values))
            power = values[row, column]
            no_power = (power == 0) | (power < RSS_RANGE[0]) | (power > RSS_RANGE[1])
            if range is not None:
                no_power |= (sign * power < range[0]) | (sign * power > range[1])
            if no_power.any() and not (power > 0).all():
                odd, example = odd + int(no_power.sum()), float(power[np.argmax(no_power)])
                row, column, power = row[~no_power], column[~no_power], power[~no_power]
            x = t.a * (column + 0.5) + t.b * (row + 0.5) + t.c
            y = t.d * (column + 0.5) + t.e * (row + 0.5) + t.f
            parts.append((np.stack([x, y], axis=1), np.full(len(power), freq), power))
    xy, freqs, powers = (np.concatenate(each) for each in zip(*parts, strict=True))
    if odd and (missing == "refuse" or not len(powers)):
        raise UserError(
            f"{path}: {odd} cells hold values that no power has ({example:g}): --missing drop leaves them out, or name the"
            " value that marks missing ones (gdal_edit.py -a_nodata)"
        )
    if odd:
        warnings.warn(f"{path}: {odd} cells are left out, whose values no power has ({example:g})", stacklevel=2)
    if not len(powers):
        raise UserError(f"{path}: no cell has a value")
    for text in apart(powers, sign):
        warnings.warn(f"{path}: {text}", stacklevel=2)
    if not same_plane(own, goal):
        warnings.warn(f"{path} lies in {own}: the centers of its cells are moved to {goal}", stacklevel=2)
        xy = moved(xy, own, goal)
    try:
        return RadioSamples(xy, freqs, powers, goal)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class BuildingRaster:
    """What a raster says of buildings.

    Args:
        mask: (H, W) nonzero cells.
        grid: of the mask.
        crs: its plane.
        unknown: number of cells without a value, which count as free.
    """

    mask: NDArray[np.bool_]
    grid: Grid
    crs: str
    unknown: int


def read_buildings(
    path: str | Path, crs: str | None = None, cell: float | None = None, check: Any = None
) -> BuildingRaster:
    """The first band of a raster, nonzero where a building stands, in a plane in meters.

    Args:
        path: the file.
        crs: plane that it is wanted in.
        cell: side of a cell, where it has to be laid on another grid.
        check: called with the grid before anything is read; raises where it is too large.

    Raises:
        UserError: not a raster, or one that cannot be placed.
    """
    with opened(path) as file:
        at = placed(path, file, crs, cell=cell)
        if check is not None:
            check(at.grid)
        if file.count > 1:
            warnings.warn(f"{path}: the first of its {file.count} bands says where buildings are", stacklevel=3)
        values = at.band(1)
    assert at.crs is not None
    unknown = np.isnan(values)
    return BuildingRaster((values != 0) & ~unknown, at.grid, at.crs, int(unknown.sum()))
