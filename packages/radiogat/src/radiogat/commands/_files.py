"""What a command reads: measurements, scenes and complete maps, the raster of a map, a finished training."""

import warnings
from pathlib import Path
from typing import Any

from radiogat.config import FileSettings, InputSettings, TrainSettings
from radiogat.data import read_maps, read_samples, read_scene
from radiogat.estimator import RadioMapEstimator
from radiogat.maps import read_netcdf, samples_of
from radiogat.planes import check_plane, moved, same_plane
from radiogat.rasters import read_cells
from radiogat.samples import Grid, RadioMaps, RadioSamples, RadioScene
from radiogat.simulate import city
from tenfold import UserError, runs
from tenfold.errors import did_you_mean

KINDS = ("csv", "parquet", "geotiff", "netcdf", "npz", "official")
_MOST_CELLS = 50_000_000


def read_measured(settings: FileSettings) -> tuple[RadioSamples, RadioScene | None]:
    """Measurements of a file that holds such, or the cells of a map, and the scene around them.

    Raises:
        UserError: another kind of file, or one that cannot be read.
    """
    kind, _, path = settings.data.partition(":")
    if settings.crs is not None:
        check_plane(settings.crs)
    if kind == "geotiff" and path:
        how: dict[str, Any] = {name: getattr(settings, name) for name in ("freq_mhz", "sign", "missing", "range")}
        samples = read_cells(path, settings.crs, **how)
    elif kind == "netcdf" and path:
        samples = _in_plane(samples_of(read_netcdf(path)), settings)
    elif kind in {"csv", "parquet"} and path:
        columns = dict(pair.split("=", 1) for pair in settings.columns)
        names = ("crs", "sign", "freq_mhz", "missing", "radio", "by", "track", "at", "range")
        only = settings.only.split(",") if settings.only else ()
        samples = read_samples(path, columns=columns, only=only, **{name: getattr(settings, name) for name in names})
    else:
        raise unknown(settings)
    return samples, read_scene(settings.buildings, settings.transmitters, samples, settings.cell)


def _in_plane(samples: RadioSamples, settings: FileSettings) -> RadioSamples:
    """The measurements in the plane that ``--crs`` names, with ``--sign``."""
    crs, xy = settings.crs or samples.crs, samples.xy
    if samples.crs is not None and crs is not None and not same_plane(samples.crs, crs):
        warnings.warn(f"{settings.data}: moved from {samples.crs} to {crs}", stacklevel=3)
        xy = moved(xy, samples.crs, crs)
    return RadioSamples(xy, samples.freq_mhz, settings.sign * samples.rss_dbm, crs)


def unknown(settings: FileSettings) -> UserError:
    """The error about ``--data`` of an unknown kind."""
    known = (*KINDS, "city") if isinstance(settings, InputSettings) else KINDS
    expected = "KIND:PATH or city" if isinstance(settings, InputSettings) else "KIND:PATH"
    kind = settings.data.partition(":")[0]
    return UserError(f"--data {settings.data}: expected {expected}, {did_you_mean(kind, known)}")


def read_input(settings: InputSettings, seed: int) -> tuple[RadioSamples, RadioScene | None, RadioMaps | None]:
    """Measurements, the scene, and the complete maps where the measurements were drawn from such.

    Raises:
        UserError: an unknown kind of file, or one that cannot be read.
    """
    if settings.crs is not None:
        check_plane(settings.crs)
    if settings.data == "city":
        maps = city()
    elif settings.data.partition(":")[0] in {"npz", "official"}:
        maps = read_maps(settings.data, settings.area)
    else:
        return *read_measured(settings), None
    return maps.samples(maps.draw(settings.rate, seed)), maps.scene, maps


def grid_for(samples: RadioSamples, scene: RadioScene | None, cell: float | None, most: int = _MOST_CELLS) -> Grid:
    """The raster of a map: the scene's, unless another cell is asked for.

    Raises:
        UserError: more cells than a map can have.
    """
    if scene is not None and (cell is None or cell == scene.grid.cell):
        return scene.grid
    side = cell or samples.spacing / 2
    if scene is None:
        grid = Grid.around(samples.xy, side, margin=side)
    else:
        g = scene.grid
        height, width = (max(1, round(n * g.cell / side)) for n in g.shape)
        grid = Grid(g.x0, g.y0, side, height, width)
    if grid.height * grid.width > most:
        raise UserError(f"a map of {grid.height} x {grid.width} cells: give a larger --cell (meters, now {side:.3g})")
    return grid


def model_file(run: str) -> Path:
    """The file of the learned area of the finished `radiogat train` that ``--run`` names, as others may open it."""
    return (runs.read(run, TrainSettings, package="radiogat", verb="train").path / "model.safetensors").resolve()


def learned(run: str) -> RadioMapEstimator:
    """The estimator of the finished `radiogat train` that ``--run`` names.

    Raises:
        UserError: no such run, an unfinished one, or its file cannot be read.
    """
    return RadioMapEstimator.load(runs.read(run, TrainSettings, package="radiogat", verb="train").path)
