"""Predicted maps: in memory, or written tile by tile into GeoTIFF and netCDF; and read back."""

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radiogat.pictures import map_picture
from radiogat.samples import Grid, RadioSamples
from radiogat.suggest import suggest_places
from tenfold import UserError
from tenfold.errors import needs
from tenfold.files import replacing

if TYPE_CHECKING:
    import xarray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class MapLayout:
    """What is known of a map before it is computed.

    Args:
        grid: cells of the map.
        freq_mhz: bands in MHz.
        level: level of the error bars; None: there are none.
        crs: plane of the grid.
    """

    grid: Grid
    freq_mhz: tuple[float, ...]
    level: float | None = None
    crs: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """rss_dbm, and with error bars rss_lo and rss_hi."""
        return ("rss_dbm",) if self.level is None else ("rss_dbm", "rss_lo", "rss_hi")


Tiles = Iterable[tuple[slice, Mapping[str, Floats]]]
"""Rows of a map, and by layer their values (F, rows, W)."""


@dataclasses.dataclass(frozen=True)
class RadioMap:
    """A predicted map of one or several bands.

    Args:
        layout: grid, bands, level of the error bars, plane.
        layers: rss_dbm, and with error bars rss_lo and rss_hi: (F, H, W) dBm, NaN in buildings.
    """

    layout: MapLayout
    layers: dict[str, Floats]

    @classmethod
    def collect(cls, layout: MapLayout, tiles: Tiles) -> "RadioMap":
        """The whole map in memory."""
        shape = (len(layout.freq_mhz), *layout.grid.shape)
        layers = {name: np.full(shape, np.nan) for name in layout.layers}
        for rows, values in tiles:
            for name, layer in layers.items():
                layer[:, rows] = values[name]
        return cls(layout, layers)

    @property
    def rss_dbm(self) -> Floats:
        """(F, H, W)."""
        return self.layers["rss_dbm"]

    @property
    def error_bar(self) -> Floats:
        """(F, H, W) half of the interval's width in dB."""
        if self.layout.level is None:
            raise UserError("this map was made without error bars: predict with interval=0.9")
        return np.asarray((self.layers["rss_hi"] - self.layers["rss_lo"]) / 2)

    def tiles(self) -> Tiles:
        """All rows at once."""
        yield slice(0, self.layout.grid.height), self.layers

    def to_geotiff(self, path: str | Path) -> None:
        """One band for each layer and frequency, float32, NaN without data."""
        write_geotiff(path, self.layout, self.tiles())

    def to_netcdf(self, path: str | Path) -> None:
        """Variables rss_dbm (rss_lo, rss_hi) over (freq, y, x)."""
        write_netcdf(path, self.layout, self.tiles())

    def to_csv(self, path: str | Path) -> None:
        """One line for each cell that has a value and each band."""
        grid = self.layout.grid
        centers = grid.centers()
        names, columns = ["x", "y"], []
        keep = [np.isfinite(power.ravel()) for power in self.rss_dbm]
        columns = [np.concatenate([centers[k][:, i] for k in keep]) for i in range(2)]
        columns.append(np.concatenate([np.full(k.sum(), f) for k, f in zip(keep, self.layout.freq_mhz, strict=True)]))
        for layer in self.layers.values():
            columns.append(np.concatenate([v.ravel()[k] for v, k in zip(layer, keep, strict=True)]))
        write_csv(path, [*names, "freq_mhz", *self.layers], columns)

    def to_xarray(self) -> "xarray.Dataset":
        """A dataset over (freq, y, x) with units."""
        needs("xarray", "geo", "radiogat", why="to_xarray")
        import xarray

        variables = {
            name: (("freq", "y", "x"), layer, {"units": "dBm", "long_name": _LONG[name]})
            for name, layer in self.layers.items()
        }
        x, y = _axes(self.layout.grid)
        coordinates = {"freq": ("freq", list(self.layout.freq_mhz), {"units": "MHz"}), "y": y, "x": x}
        attributes = {"crs": self.layout.crs or "", "interval": self.layout.level or 0.0, "Conventions": "CF-1.11"}
        found = xarray.Dataset(variables, coordinates, attributes)
        found["x"].attrs |= {"units": "m", "standard_name": "projection_x_coordinate"}
        found["y"].attrs |= {"units": "m", "standard_name": "projection_y_coordinate"}
        mapping = cf_mapping(self.layout)
        if mapping:
            found = found.assign_coords(spatial_ref=((), 0, mapping))
            for name in self.layers:
                found[name].attrs["grid_mapping"] = "spatial_ref"
        return found

    def plot(self, path: str | Path, *, building: Bools | None = None, samples: RadioSamples | None = None) -> None:
        """A PNG with one map per band, one color bar for all, buildings gray; with the samples on it where given."""
        map_picture(path, self.layout.grid, self.layout.freq_mhz, self.rss_dbm, building=building, samples=samples)

    def suggest(self, count: int, reach: float | None = None) -> Floats:
        """(count, 2) places that are best measured next: where the error bars are widest, and not beside each other.

        Args:
            count: places.
            reach: distance over which a measurement informs; default: 10 cells.
        """
        return suggest_places(self.layout.grid, self.error_bar.mean(axis=0), count, reach or 10 * self.layout.grid.cell)


_TILE = 256
"""Cells along the sides of a GeoTIFF's tiles."""
_LONG = {
    "rss_dbm": "received power",
    "rss_lo": "lower bound of the received power",
    "rss_hi": "upper bound of the received power",
}


def _axes(grid: Grid) -> tuple[Floats, Floats]:
    x = np.arange(grid.width, dtype=np.float64) + 0.5
    y = np.arange(grid.height, dtype=np.float64) + 0.5
    return np.asarray(grid.x0 + x * grid.cell), np.asarray(grid.y0 - y * grid.cell)


def write_csv(path: str | Path, names: Sequence[str], columns: Sequence[NDArray[Any]]) -> None:
    """Named columns as CSV, numbers in full precision."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(zip(*(np.asarray(column).tolist() for column in columns), strict=True))


def grid_of(path: Path, file: Any, need_crs: bool = True) -> tuple[Grid, str | None]:
    """Grid and coordinate system of an open raster.

    Raises:
        UserError: it has none, is in degrees, not north-up, or its cells are not square.
    """
    if file.crs is None and need_crs:
        raise UserError(f"{path} has no coordinate system: assign one (gdal_edit.py -a_srs EPSG:... FILE)")
    if file.crs is not None and file.crs.is_geographic:
        raise UserError(f"{path} is in degrees: reproject it to a plane in meters (gdalwarp -t_srs EPSG:... FILE OUT)")
    t = file.transform
    if t.b or t.d or t.a <= 0 or t.e >= 0 or abs(t.a + t.e) > 1e-6 * t.a:
        raise UserError(f"{path}: expected a north-up raster with square cells, found the transform {tuple(t)[:6]}")
    grid = Grid(t.c, t.f, t.a, file.height, file.width)
    if file.crs is None:
        return grid, None
    code = file.crs.to_epsg()
    return grid, f"EPSG:{code}" if code else file.crs.to_wkt()


def write_geotiff(path: str | Path, layout: MapLayout, tiles: Tiles) -> None:
    """Write a map into a GeoTIFF as its tiles come; bands are named ``1750 MHz rss_dbm`` and so on."""
    needs("rasterio", "geo", "radiogat", why="GeoTIFF")
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    grid, layers = layout.grid, layout.layers
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": len(layers) * len(layout.freq_mhz),
        "dtype": "float32",
        "nodata": float("nan"),
        "crs": layout.crs,
        "transform": from_origin(grid.x0, grid.y0, grid.cell, grid.cell),
        "compress": "deflate",
        "interleave": "band",
        "BIGTIFF": "IF_SAFER",
    }
    if min(grid.shape) >= _TILE:
        profile |= {"tiled": True, "blockxsize": _TILE, "blockysize": _TILE}
    with replacing(path) as temporary, rasterio.open(temporary, "w", **profile) as file:
        for f, freq in enumerate(layout.freq_mhz):
            for n, name in enumerate(layers):
                band = f * len(layers) + n + 1
                file.set_band_description(band, f"{freq:g} MHz {name}")
                file.set_band_unit(band, "dBm")
                file.update_tags(band, freq_mhz=repr(freq), layer=name, units="dBm")
        if layout.level is not None:
            file.update_tags(interval=repr(layout.level))
        for rows, values in tiles:
            window = Window(0, rows.start, grid.width, rows.stop - rows.start)  # type: ignore[call-arg, unused-ignore]
            for f in range(len(layout.freq_mhz)):
                for n, name in enumerate(layers):
                    file.write(values[name][f].astype(np.float32), f * len(layers) + n + 1, window=window)
        factors = [2**k for k in range(1, 12) if max(grid.shape) // 2**k >= _TILE // 2]
        if factors:
            file.build_overviews(factors, rasterio.enums.Resampling.average)


def read_geotiff(path: str | Path, need_crs: bool = True) -> RadioMap:
    """A map that ``write_geotiff`` wrote, or any GeoTIFF whose bands say their MHz in a tag or description.

    Args:
        path: the file.
        need_crs: refuse a file without a coordinate system; a map of measurements without one has none.

    Raises:
        UserError: not a raster that can be placed, or a band does not say its frequency.
    """
    needs("rasterio", "geo", "radiogat", why="GeoTIFF")
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.open(path) as file:
            grid, crs = grid_of(Path(path), file, need_crs)
            found: dict[str, dict[float, Floats]] = {}
            for band in range(1, file.count + 1):
                tags, said = file.tags(band), file.descriptions[band - 1] or ""
                text = tags.get("freq_mhz") or said.partition("MHz")[0].strip()
                try:
                    freq = float(text)
                except ValueError:
                    raise UserError(f"{path}, band {band}: no frequency; describe it as '1750 MHz'") from None
                values = file.read(band, masked=True).astype(np.float64).filled(np.nan)
                found.setdefault(tags.get("layer", "rss_dbm"), {})[freq] = values
            level = file.tags().get("interval")
    except RasterioIOError as error:
        raise UserError(f"{path}: not a raster that can be read ({error})") from error
    freqs = tuple(sorted(found["rss_dbm"]))
    layout = MapLayout(grid, freqs, float(level) if level else None, crs)
    return RadioMap(layout, {name: np.stack([by[f] for f in freqs]) for name, by in found.items()})


def cf_mapping(layout: MapLayout) -> dict[str, Any]:
    """Attributes of a CF grid mapping of the map's plane, with GDAL's transform; nothing where no plane is named.

    Raises:
        MissingExtraError: pyproj is not installed.
    """
    if not layout.crs:
        return {}
    needs("pyproj", "geo", "radiogat", why="the grid mapping of netCDF")
    import pyproj

    grid = layout.grid
    attributes = pyproj.CRS.from_user_input(layout.crs).to_cf()
    return {**attributes, "GeoTransform": f"{grid.x0!r} {grid.cell!r} 0.0 {grid.y0!r} 0.0 {-grid.cell!r}"}


def write_netcdf(path: str | Path, layout: MapLayout, tiles: Tiles) -> None:
    """Write a map into netCDF as its tiles come."""
    needs("netCDF4", "geo", "radiogat", why="netCDF")
    import netCDF4

    with replacing(path) as temporary, netCDF4.Dataset(temporary, "w") as file:
        x, y = _axes(layout.grid)
        for name, axis, units in (("freq", np.array(layout.freq_mhz), "MHz"), ("y", y, "m"), ("x", x, "m")):
            file.createDimension(name, len(axis))
            variable = file.createVariable(name, "f8", (name,))
            variable.units = units
            variable[:] = axis
        file["x"].standard_name, file["y"].standard_name = "projection_x_coordinate", "projection_y_coordinate"
        file["freq"].long_name = "frequency"
        file.Conventions = "CF-1.11"
        mapping = cf_mapping(layout)
        if mapping:
            variable = file.createVariable("spatial_ref", "i4")
            variable.setncatts(mapping)
        file.crs = layout.crs or ""
        file.interval = layout.level or 0.0
        for name in layout.layers:
            variable = file.createVariable(name, "f4", ("freq", "y", "x"), fill_value=np.nan, zlib=True)
            variable.units, variable.long_name = "dBm", _LONG[name]
            if mapping:
                variable.grid_mapping = "spatial_ref"
        for rows, values in tiles:
            for name in layout.layers:
                file[name][:, rows, :] = values[name]


def read_netcdf(path: str | Path) -> RadioMap:
    """A map over (freq, y, x) with the variable rss_dbm, and rss_lo and rss_hi where there are error bars.

    Raises:
        UserError: not such a file, or its grid is not regular and north-up.
    """
    needs("netCDF4", "geo", "radiogat", why="netCDF")
    import netCDF4

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with netCDF4.Dataset(path) as file:
            missing = {"freq", "y", "x", "rss_dbm"} - set(file.variables)
            if missing:
                raise UserError(f"{path}: no variable {', '.join(sorted(missing))}; expected rss_dbm over (freq, y, x)")
            freq, y, x = (np.ma.filled(file[name][:], np.nan).astype(np.float64) for name in ("freq", "y", "x"))
            names = [n for n in ("rss_dbm", "rss_lo", "rss_hi") if n in file.variables]
            layers: dict[str, Floats] = {str(n): np.ma.filled(file[n][:].astype(np.float64), np.nan) for n in names}
            crs, level = getattr(file, "crs", "") or None, float(getattr(file, "interval", 0.0)) or None
    except OSError as error:
        raise UserError(f"{path}: not a netCDF file ({error})") from error
    cell = float(x[1] - x[0]) if len(x) > 1 else float(y[0] - y[-1]) / max(1, len(y) - 1) or 1.0
    steps = np.concatenate([np.diff(x) - cell, np.diff(y) + cell])
    if cell <= 0 or (np.abs(steps) > 1e-6 * cell).any():
        raise UserError(f"{path}: expected equal steps, x to the east and y from north to south, with square cells")
    grid = Grid(float(x[0] - cell / 2), float(y[0] + cell / 2), cell, len(y), len(x))
    return RadioMap(MapLayout(grid, tuple(map(float, freq)), level, crs), layers)


def samples_of(radio_map: RadioMap) -> RadioSamples:
    """The cells of a map that have a value, as measurements at their centers."""
    grid, layout = radio_map.layout.grid, radio_map.layout
    keep = np.isfinite(radio_map.rss_dbm)
    band, row, column = np.nonzero(keep)
    centers = grid.centers().reshape(*grid.shape, 2)
    freq = np.array(layout.freq_mhz)[band]
    return RadioSamples(centers[row, column], freq, radio_map.rss_dbm[keep], layout.crs)
