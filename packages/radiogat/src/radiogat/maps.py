"""Predicted maps: in memory, or written tile by tile into GeoTIFF and netCDF; and read back."""

import contextlib
import csv
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radiogat.pictures import map_picture
from radiogat.roles import UNITS
from radiogat.samples import Grid, RadioSamples
from radiogat.suggest import reach_of, suggest_places
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
        building: (H, W) where buildings stand; None: not known. A cell without a value need not be one.
    """

    grid: Grid
    freq_mhz: tuple[float, ...]
    level: float | None = None
    crs: str | None = None
    building: Bools | None = dataclasses.field(default=None, compare=False, repr=False)

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
        layout: grid, bands, level of the error bars, plane, buildings.
        layers: rss_dbm, and with error bars rss_lo and rss_hi: (F, H, W) dBm, NaN in buildings and where there is no value.
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

    def to_cog(self, path: str | Path) -> None:
        """The same as a cloud-optimized GeoTIFF."""
        write_cog(path, self.layout, self.tiles())

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
        building = self.layout.building
        return dataset_of(self.layout, self.layers, None if building is None else building.astype(np.int8))

    def plot(self, path: str | Path, *, building: Bools | None = None, samples: RadioSamples | None = None) -> None:
        """A PNG with one map per band, one color bar for all, buildings gray; with the samples on it where given."""
        building = self.layout.building if building is None else building
        map_picture(path, self.layout.grid, self.layout.freq_mhz, self.rss_dbm, building=building, samples=samples)

    def suggest(self, count: int, reach: float | None = None) -> Floats:
        """(count, 2) places that are best measured next: where the error bars are widest, and not beside each other.

        Args:
            count: places.
            reach: distance over which a measurement informs; default: the range of the variogram of the map's own powers.
        """
        return suggest_places(self.layout.grid, self.error_bar.mean(axis=0), count, reach or self._reach())

    def _reach(self) -> float:
        known = np.argwhere(np.isfinite(self.rss_dbm))
        some = known[np.random.default_rng(0).permutation(len(known))[:_CELLS]]
        centers = self.layout.grid.centers().reshape(*self.layout.grid.shape, 2)
        freq = np.array(self.layout.freq_mhz)[some[:, 0]]
        return reach_of(RadioSamples(centers[some[:, 1], some[:, 2]], freq, self.rss_dbm[tuple(some.T)]))


_BUILDING = {"long_name": "building", "flag_values": np.array([0, 1], np.int8), "flag_meanings": "free building"}
"""Attributes of the layer building in netCDF."""
_CELLS = 2000
"""Cells of a map that its variogram is of."""
_TILE = 256
"""Cells along the sides of a GeoTIFF's tiles."""
DBM = frozenset({"", "dbm", "dbmw", "dbm/re", "dbm_re"})
"""Units of values that are received powers."""
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


class GeoTiffWriter:
    """An open GeoTIFF that a map is written into, window by window.

    Bands are named ``1750 MHz rss_dbm`` and so on; where buildings are known, the last one is ``building``.

    Args:
        file: as rasterio opened it for writing.
        layout: what is known of the map.
    """

    def __init__(self, file: Any, layout: MapLayout) -> None:
        self.file, self.layout = file, layout
        names = [(freq, name) for freq in layout.freq_mhz for name in layout.layers]
        for band, (freq, name) in enumerate(names, 1):
            file.set_band_description(band, f"{freq:g} MHz {name}")
            file.set_band_unit(band, "dBm")
            file.update_tags(band, freq_mhz=repr(freq), layer=name, units="dBm")
        if layout.level is not None:
            file.update_tags(interval=repr(layout.level))
        if file.count > len(names):
            file.set_band_description(file.count, "building")
            file.update_tags(file.count, layer="building")

    def write(self, rows: slice, columns: slice, values: Mapping[str, NDArray[Any]], building: Bools | None) -> None:
        """Write a window: by layer (F, rows, columns), and the buildings (rows, columns) where they are known."""
        from rasterio.windows import Window

        shape = columns.stop - columns.start, rows.stop - rows.start
        window = Window(columns.start, rows.start, *shape)  # type: ignore[call-arg, unused-ignore]
        layers = self.layout.layers
        for f in range(len(self.layout.freq_mhz)):
            for n, name in enumerate(layers):
                self.file.write(values[name][f].astype(np.float32), f * len(layers) + n + 1, window=window)
        if building is not None:
            self.file.write(building.astype(np.float32), self.file.count, window=window)


@contextlib.contextmanager
def geotiff_writer(path: str | Path, layout: MapLayout, *, built: bool) -> Iterator[GeoTiffWriter]:
    """Yield a writer of a new GeoTIFF, which gets its overviews when the block ends; ``built``: it has a band of buildings.

    Raises:
        MissingExtraError: rasterio is not installed.
        UserError: the file could not be written whole.
    """
    needs("rasterio", "geo", "radiogat", why="GeoTIFF")
    import rasterio

    grid = layout.grid
    profile = {
        "driver": "GTiff",
        "height": grid.height,
        "width": grid.width,
        "count": len(layout.layers) * len(layout.freq_mhz) + built,
        "dtype": "float32",
        "nodata": float("nan"),
        "crs": layout.crs,
        "transform": grid.transform,
        "compress": "deflate",
        "interleave": "band",
        "BIGTIFF": "IF_SAFER",
    }
    if min(grid.shape) >= _TILE:
        profile |= {"tiled": True, "blockxsize": _TILE, "blockysize": _TILE}
    with _whole(path), rasterio.open(path, "w", **profile) as file:
        yield GeoTiffWriter(file, layout)
        factors = [2**k for k in range(1, 12) if max(grid.shape) // 2**k >= _TILE // 2]
        if factors:
            file.build_overviews(factors, rasterio.enums.Resampling.average)


@contextlib.contextmanager
def _whole(path: str | Path) -> Iterator[None]:
    """Read a raster back that the block writes: GDAL says nothing of a disk that is full when it closes a file."""
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with rasterio.Env():  # else libtiff writes lines of its own to stderr
            yield
            with rasterio.open(path) as file:
                for _, window in file.block_windows(1):
                    file.read(window=window)
    except RasterioIOError as error:
        raise UserError(
            f"cannot write {path}: GDAL could not write or read back all of it; is the disk full?"
        ) from error


def write_geotiff(path: str | Path, layout: MapLayout, tiles: Tiles) -> None:
    """Write a map into a GeoTIFF as its tiles come."""
    building = layout.building
    whole = slice(0, layout.grid.width)
    with replacing(path) as temporary, geotiff_writer(temporary, layout, built=building is not None) as writer:
        for rows, values in tiles:
            writer.write(rows, whole, values, None if building is None else building[rows])


def write_cog(path: str | Path, layout: MapLayout, tiles: Tiles) -> None:
    """Write a map into a cloud-optimized GeoTIFF: a tiled one comes first, in its folder."""
    with replacing(path) as temporary, beside(temporary) as plain:
        write_geotiff(plain, layout, tiles)
        cog_of(plain, temporary)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield the path of a file that is deleted when the block ends."""
    plain = path.with_name(path.name + ".plain.tif")
    try:
        yield plain
    finally:
        plain.unlink(missing_ok=True)


def cog_of(source: Path, out: Path) -> None:
    """Write a GeoTIFF again as a cloud-optimized one."""
    from rasterio.shutil import copy

    with _whole(out):
        copy(source, out, driver="COG", compress="deflate", blocksize=_TILE, bigtiff="IF_SAFER", overviews="AUTO")


def dataset_of(layout: MapLayout, layers: Mapping[str, Any], building: Any) -> "xarray.Dataset":
    """A dataset of xarray over (freq, y, x) with units and CF grid mapping.

    Args:
        layout: what is known of the map.
        layers: by name (F, H, W), of NumPy or lazy ones of dask.
        building: (H, W) 0 or 1, or None.

    Raises:
        MissingExtraError: xarray is not installed.
    """
    needs("xarray", "geo", "radiogat", why="to_xarray")
    import xarray

    variables = {
        name: (("freq", "y", "x"), layer, {"units": "dBm", "long_name": _LONG[name]}) for name, layer in layers.items()
    }
    x, y = _axes(layout.grid)
    coordinates = {"freq": ("freq", list(layout.freq_mhz), {"units": "MHz"}), "y": y, "x": x}
    attributes = {"crs": layout.crs or "", "interval": layout.level or 0.0, "Conventions": "CF-1.11"}
    found = xarray.Dataset(variables, coordinates, attributes)
    found["x"].attrs |= {"units": "m", "standard_name": "projection_x_coordinate"}
    found["y"].attrs |= {"units": "m", "standard_name": "projection_y_coordinate"}
    mapping = cf_mapping(layout)
    if mapping:
        found = found.assign_coords(spatial_ref=((), 0, mapping))
        for name in layers:
            found[name].attrs["grid_mapping"] = "spatial_ref"
    if building is not None:
        found["building"] = (("y", "x"), building, dict(_BUILDING))
    return found


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
        if layout.building is not None:
            variable = file.createVariable("building", "i1", ("y", "x"), zlib=True)
            variable.setncatts(_BUILDING)
            variable[:] = layout.building
        for rows, values in tiles:
            for name in layout.layers:
                file[name][:, rows, :] = values[name]


def read_netcdf(path: str | Path) -> RadioMap:
    """A map over (freq, y, x) with the variable rss_dbm, and rss_lo, rss_hi and building where they are known.

    Scale and offset are applied, y may rise or fall, the units of freq and a CF grid mapping are read.

    Raises:
        UserError: not such a file, its grid is not regular, or its cells are not square.
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
            unit = str(getattr(file["freq"], "units", "MHz")).strip()
            if unit.lower() not in UNITS:
                raise UserError(f"{path}: freq is in {unit}, expected MHz, GHz, kHz or Hz")
            freq = freq * UNITS[unit.lower()]
            names = [n for n in ("rss_dbm", "rss_lo", "rss_hi") if n in file.variables]
            for name in [*names, "x", "y"]:
                _check_unit(path, file, name)
            layers: dict[str, Floats] = {str(n): _in_order(path, file[n], ("freq", "y", "x")) for n in names}
            has = "building" in file.variables
            building = np.nan_to_num(_in_order(path, file["building"], ("y", "x"))) != 0 if has else None
            level = float(getattr(file, "interval", 0.0)) or None
            crs = _plane_of(file)
    except OSError as error:
        raise UserError(f"{path}: not a netCDF file ({error})") from error
    if len(np.unique(freq)) < len(freq):
        raise UserError(f"{path}: a frequency stands twice in freq: keep one of them")
    order = np.argsort(freq)
    freq, layers = freq[order], {name: values[order] for name, values in layers.items()}
    if len(y) > 1 and y[1] > y[0]:
        y, layers = y[::-1], {name: values[:, ::-1] for name, values in layers.items()}
        building = None if building is None else building[::-1]
    cell = float(x[1] - x[0]) if len(x) > 1 else float(y[0] - y[-1]) / max(1, len(y) - 1) or 1.0
    steps = np.concatenate([np.diff(x) - cell, np.diff(y) + cell])
    if cell <= 0 or (np.abs(steps) > 1e-6 * cell).any():
        raise UserError(f"{path}: expected equal steps, x to the east, and square cells")
    grid = Grid(float(x[0] - cell / 2), float(y[0] + cell / 2), cell, len(y), len(x))
    return RadioMap(MapLayout(grid, tuple(map(float, freq)), level, crs, building), layers)


def _in_order(path: str | Path, variable: Any, order: tuple[str, ...]) -> Floats:
    """Values of a variable with its dimensions in this order, NaN where there are none.

    Raises:
        UserError: it has other dimensions.
    """
    if set(variable.dimensions) != set(order):
        found = ", ".join(variable.dimensions)
        raise UserError(f"{path}: {variable.name} is over ({found}), expected ({', '.join(order)})")
    values = np.ma.filled(variable[:].astype(np.float64), np.nan)
    return np.asarray(values.transpose([variable.dimensions.index(name) for name in order]))


def _check_unit(path: str | Path, file: Any, name: str) -> None:
    """Refuse a variable in another unit than dBm or meters.

    Raises:
        UserError: so.
    """
    unit = str(getattr(file[name], "units", "")).strip()
    wanted = "meters" if name in {"x", "y"} else "dBm"
    known = re.fullmatch(r"m?|met(er|re)s?", unit.lower()) if wanted == "meters" else unit.lower() in DBM
    if not known:
        raise UserError(f"{path}: {name} is in {unit}, expected {wanted}: convert it")


def _plane_of(file: Any) -> str | None:
    """The plane of an open netCDF file: its attribute crs, or the grid mapping of rss_dbm."""
    if named := getattr(file, "crs", ""):
        return str(named)
    mapping = getattr(file["rss_dbm"], "grid_mapping", "")
    if not mapping or mapping not in file.variables:
        return None
    needs("pyproj", "geo", "radiogat", why="the grid mapping of netCDF")
    import pyproj

    attributes = {name: getattr(file[mapping], name) for name in file[mapping].ncattrs()}
    found = pyproj.CRS.from_cf(attributes)
    code = found.to_epsg()
    return f"EPSG:{code}" if code else found.to_wkt()


def samples_of(radio_map: RadioMap) -> RadioSamples:
    """The cells of a map that have a value, as measurements at their centers."""
    grid, layout = radio_map.layout.grid, radio_map.layout
    keep = np.isfinite(radio_map.rss_dbm)
    band, row, column = np.nonzero(keep)
    centers = grid.centers().reshape(*grid.shape, 2)
    freq = np.array(layout.freq_mhz)[band]
    return RadioSamples(centers[row, column], freq, radio_map.rss_dbm[keep], layout.crs)
