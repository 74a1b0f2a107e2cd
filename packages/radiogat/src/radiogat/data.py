"""Files: measurements, buildings, transmitters and complete maps; positions in degrees become meters (``planes``)."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radiogat.logs import LogReader, read_positions
from radiogat.maps import write_csv
from radiogat.planes import unproject
from radiogat.rasters import read_buildings
from radiogat.roles import Missing, Reading
from radiogat.samples import Grid, RadioMaps, RadioSamples, RadioScene
from radiogat.shapes import is_shapes, polygons_on
from tenfold import UserError
from tenfold.files import replacing
from tenfold.readers import BROKEN_ARRAYS

Floats = NDArray[np.float64]
_MOST_GB = 4.0
"""Gigabytes that the rasters of a scene may take."""
_INSIDE = 0.2
"""Share of the measurements in buildings from which on it is said: fewer lie there by the error of a GPS."""


# Measurements


def read_samples(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    crs: str | None = None,
    sign: int = 1,
    freq_mhz: float | None = None,
    missing: Missing = "refuse",
    radio: str | None = None,
    by: str | None = None,
    only: Sequence[str] = (),
    track: str | Path | None = None,
    at: tuple[float, float] | None = None,
    range: tuple[float, float] | None = None,
) -> RadioSamples:
    """Measurements from a text table or parquet: a position, a frequency (or channel, or band), a power in dBm.

    Encoding, separator, decimal comma, preamble and the tool's names of the columns (``radiogat.roles.COLUMNS``) are found.

    Args:
        path: the file.
        columns: role (a key of ``COLUMNS``) -> name, where a file calls it otherwise.
        crs: plane of x and y; or the plane that lat and lon go to, in place of UTM.
        sign: -1 where the column holds path loss or other negated values.
        freq_mhz: frequency of files without a column of it.
        missing: refuse a file with rows that lack a value, or drop these rows, with a warning that counts them.
        radio: lte, nr, umts, gsm, pcs or wifi: what channel numbers belong to, where the file does not say.
        by: column of the cell's identity (pci); default: the usual ones. Of several cells at a place the strongest counts.
        only: values of that column whose rows are taken: one cell's map.
        track: file of positions over time, for files with times and no positions.
        at: (lat, lon) of all measurements of a file that has neither.
        range: lowest and highest power that is a measurement, as the file has them: others mark missing ones.

    Raises:
        UserError: a column is missing, values cannot be read (all faults, with lines), or are not what they are called.
    """
    how = Reading(columns or {}, crs, sign, freq_mhz, missing, radio, by, only, track, at, range)
    return LogReader(path, how).read()


def write_samples(path: str | Path, samples: RadioSamples) -> None:
    """CSV with x, y, freq_mhz, rss_dbm, in full precision; lon and lat too where the plane is known."""
    names, columns = ["x", "y"], [samples.xy[:, 0], samples.xy[:, 1]]
    if samples.crs:
        lonlat = unproject(samples.xy, samples.crs)
        names, columns = [*names, "lon", "lat"], [*columns, lonlat[:, 0], lonlat[:, 1]]
    write_csv(path, [*names, "freq_mhz", "rss_dbm"], [*columns, samples.freq_mhz, samples.rss_dbm])


# Scenes


def read_scene(
    buildings: str | Path | None,
    transmitters: str | Path | None,
    samples: RadioSamples,
    cell: float | None = None,
) -> RadioScene | None:
    """The scene around some samples: buildings from a raster or from footprints, masts from a CSV (x, y or lat, lon).

    Args:
        buildings: raster (nonzero = building), footprints (``radiogat.shapes``), or None; what lies in another coordinate
            system is moved to the samples' plane, with a warning that says so.
        transmitters: CSV, or None.
        samples: measurements, which decide the plane, and the grid where no raster does.
        cell: side of a cell for footprints, for rasters in another plane, and without buildings; default: half of the samples'
            spacing, or the raster's.

    Raises:
        UserError: a file cannot be read, has no coordinate system, covers nothing of the map, or the scene would not fit.
    """
    if buildings is None and transmitters is None:
        return None
    side = cell or samples.spacing / 2
    masts = None
    if transmitters is not None:
        masts, _ = read_positions(transmitters, samples.crs)
        _say_far(transmitters, masts, samples)
    count = 0 if masts is None else len(masts)
    if buildings is None or is_shapes(buildings):
        around = samples.xy if masts is None else np.concatenate([samples.xy, masts])
        grid = Grid.around(around, side, margin=side)
        _bounded(grid, count)
        building = None if buildings is None else polygons_on(buildings, grid, samples.crs)
        scene = RadioScene(grid, building, masts, samples.crs)
        if buildings is not None:
            _say_inside(buildings, scene, samples)
        return scene
    found = read_buildings(buildings, samples.crs, cell, lambda grid: _bounded(grid, count))
    outside = ~found.grid.inside(samples.xy)
    if outside.mean() > 0.5:
        raise UserError(f"{buildings}: {outside.mean():.0%} of the samples lie outside this raster")
    if not found.mask.any():
        raise UserError(
            f"{buildings}: no cell is built up, so that it would have no effect: expected nonzero values where buildings stand"
        )
    text = f"{buildings}: {int(found.mask.sum())} of {found.mask.size} cells are built up"
    text += f", {found.unknown} have no value and count as free" if found.unknown else ""
    text += f"; {int(outside.sum())} of {len(samples)} samples lie outside of it" if outside.any() else ""
    warnings.warn(text, stacklevel=2)
    scene = RadioScene(found.grid, found.mask, masts, samples.crs or found.crs)
    _say_inside(buildings, scene, samples)
    return scene


def _say_inside(path: str | Path, scene: RadioScene, samples: RadioSamples) -> None:
    """Say where many measurements lie in buildings: footprints of another place or plane look like that."""
    inside = scene.built_at(samples.xy)
    if inside.mean() > _INSIDE:
        warnings.warn(
            f"{path}: {int(inside.sum())} of {len(samples)} measurements lie in buildings: are both of one place and plane?",
            stacklevel=3,
        )


def _say_far(path: str | Path, masts: Floats, samples: RadioSamples) -> None:
    """Say which masts lie far from the measurements: swapped or foreign coordinates look like that."""
    low, high = samples.xy.min(axis=0), samples.xy.max(axis=0)
    away = np.sqrt((np.maximum(np.maximum(low - masts, masts - high), 0.0) ** 2).sum(axis=1))
    diagonal = float(np.hypot(*(high - low)))
    far = away > diagonal
    if far.any():
        warnings.warn(
            f"{path}: {int(far.sum())} of {len(masts)} masts lie farther from the measurements than these extend, up to"
            f" {away.max():.3g} m away; the map reaches there",
            stacklevel=3,
        )


def _bounded(grid: Grid, masts: int) -> None:
    """Refuse a scene whose rasters would not fit.

    Raises:
        UserError: more than a few gigabytes; the message says how many, and which cell would do.
    """
    size = grid.height * grid.width * (1 + 8 * (masts + 1)) / 2**30
    if size > _MOST_GB:
        enough = grid.cell * (size / _MOST_GB) ** 0.5
        raise UserError(
            f"a scene of {grid.height} x {grid.width} cells of {grid.cell:.3g} m takes {size:.1f} GB with {masts} masts,"
            f" more than {_MOST_GB:g}: give --cell {enough * 1.05:.2g} or more"
        )


# Complete maps


def read_maps(source: str, area: int = 1) -> RadioMaps:
    """Complete maps of one area.

    Args:
        source: ``npz:FILE`` (what ``radiogat simulate`` writes, or a file with ``areaNN_rss_cdbm``, ``freq_mhz`` and
            ``tx_rowcol_1based``), or ``official:FOLDER``, the tree of the authors' repository.
        area: number of the area, from 1, in files that hold several.

    Raises:
        UserError: no such file or area, or a band is missing.
    """
    kind, _, name = source.partition(":")
    path = Path(name)
    if kind == "official":
        try:
            return _official(path, area)
        except UserError:
            raise
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{path}: not the authors' tree of radio maps ({' '.join(str(error).split())})") from error
    if kind != "npz" or not name:
        raise UserError(f"'{source}': expected npz:FILE or official:FOLDER")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "rss_dbm" in file:
                names = ("rss_dbm", "freq_mhz", "transmitters_rowcol", "cell", "building")
                rss, freq, masts, cell, building = (file[name] for name in names)
                return RadioMaps(rss, tuple(map(float, freq)), masts, path.stem, float(cell), building.astype(bool))
            key = f"area{area:02d}_rss_cdbm"
            if key not in file:
                areas = [int(name[4:6]) for name in file.files if name.endswith("_rss_cdbm")]
                raise UserError(f"{path}: no area {area}; there are {', '.join(map(str, areas)) or 'none'}")
            raw = file[key]
            rss = np.where(raw == 0, np.nan, raw / 100.0)
            freq = tuple(float(f) for f in file["freq_mhz"])
            return RadioMaps(rss, freq, file["tx_rowcol_1based"][area - 1].astype(np.int64) - 1, f"area {area}")
    except (*BROKEN_ARRAYS, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a file of radio maps ({error})") from error


def _official(root: Path, area: int) -> RadioMaps:
    tree = "Strength/AREA/FREQUENCY.txt and stations_position.txt"
    stations, folder = root / "stations_position.txt", root / "Strength" / str(area)
    if not stations.is_file() or not folder.is_dir():
        missing = stations if not stations.is_file() else folder
        raise UserError(f"{missing}: no such file or folder; expected the tree {tree}")
    freq = (1750, 2750, 3750, 4750, 5750)
    maps = []
    for f in freq:
        if not (folder / f"{f}.txt").is_file():
            raise UserError(f"{folder / f'{f}.txt'}: this band is missing; expected the tree {tree}")
        text = (folder / f"{f}.txt").read_text(encoding="utf-8").replace(",", " ")
        maps.append(np.loadtxt(text.splitlines(), ndmin=2))
    rss = np.stack(maps)
    rows = np.loadtxt(stations.read_text(encoding="utf-8").replace(",", " ").splitlines(), ndmin=2)
    masts = rows[area - 1].reshape(-1, 2).astype(np.int64) - 1
    return RadioMaps(np.where(rss == 0, np.nan, rss), tuple(map(float, freq)), masts, f"area {area}")


def write_maps(path: str | Path, maps: RadioMaps) -> None:
    """An ``npz`` that ``read_maps`` takes back."""
    with replacing(path) as temporary:
        np.savez_compressed(
            temporary,
            rss_dbm=maps.rss_dbm.astype(np.float32),
            freq_mhz=np.array(maps.freq_mhz),
            transmitters_rowcol=np.asarray(maps.transmitters, dtype=np.int64),
            cell=np.float64(maps.cell),
            building=np.asarray(maps.building, dtype=bool),
        )


def read_points(path: str | Path, crs: str | None) -> Floats:
    """(n, 2) positions in a plane, from a CSV or parquet file with x and y, or lat and lon."""
    return read_positions(path, crs)[0]
