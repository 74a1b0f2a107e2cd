"""What is measured and where: samples, the grid of a map, and the scene with its buildings and transmitters.

Positions are (x, y) in the units of a projected coordinate system, y to the north; rasters have row 0 in the north.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radiogat.depth import Bools, Floats, radio_depth
from radiogat.graph import check_frequency
from tenfold import NonFiniteError, UserError

RSS_RANGE = (-200.0, 40.0)
"""dBm that a received power can have."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A raster on the plane: square cells, row 0 in the north.

    Args:
        x0: x of the left edge.
        y0: y of the upper edge.
        cell: side of a cell in the units of the plane.
        height: rows.
        width: columns.
    """

    x0: float
    y0: float
    cell: float
    height: int
    width: int

    def __post_init__(self) -> None:
        if not self.cell > 0:
            raise UserError(f"a cell of {self.cell} has no size")
        if self.height < 1 or self.width < 1:
            raise UserError(f"a grid of {self.height} x {self.width} cells is empty")

    @classmethod
    def around(cls, xy: ArrayLike, cell: float, margin: float = 0.0) -> "Grid":
        """The smallest grid with that cell over all positions, and a margin around them."""
        points = np.asarray(xy, dtype=np.float64)
        if not cell > 0:
            raise UserError(f"a cell of {cell} has no size")
        left, low = np.floor((points.min(axis=0) - margin) / cell) * cell
        right, high = points.max(axis=0) + margin
        return cls(float(left), float(np.floor(high / cell + 1) * cell), cell, *_extent(left, low, right, high, cell))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def transform(self) -> Any:
        """From column and row to x and y, as rasterio has it (an ``Affine``)."""
        from rasterio.transform import Affine

        return Affine(self.cell, 0.0, self.x0, 0.0, -self.cell, self.y0)

    def centers(self, rows: slice = slice(None)) -> Floats:
        """(cells, 2) positions of the cells' centers, row by row."""
        y = self.y0 - (np.arange(self.height)[rows] + 0.5) * self.cell
        x = self.x0 + (np.arange(self.width) + 0.5) * self.cell
        return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], axis=1)

    def rowcol(self, xy: ArrayLike) -> NDArray[np.int64]:
        """(n, 2) row and column of the cell that holds each position; outside positions give indices outside."""
        points = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
        return np.floor(
            np.stack([(self.y0 - points[:, 1]) / self.cell, (points[:, 0] - self.x0) / self.cell], axis=1)
        ).astype(np.int64)

    def inside(self, xy: ArrayLike) -> Bools:
        """(n) whether each position lies on the grid."""
        at = self.rowcol(xy)
        return np.asarray(((at >= 0) & (at < np.array(self.shape))).all(axis=1))


def _extent(left: float, low: float, right: float, high: float, cell: float) -> tuple[int, int]:
    top = math.floor(high / cell + 1) * cell
    return max(1, round((top - low) / cell)), max(1, math.floor((right - left) / cell) + 1)


@dataclasses.dataclass(frozen=True)
class RadioSamples:
    """Measurements of received power.

    Args:
        xy: (n, 2) positions in the plane of ``crs``.
        freq_mhz: (n) frequencies, or one for all.
        rss_dbm: (n) received powers.
        crs: the plane: EPSG code, PROJ string or WKT; None where it does not matter.

    Several measurements of one frequency at one place become their median, with a warning that counts them, and those that
    differ by more than ``conflict`` dB, as a drive test's fading easily does.

    Raises:
        UserError: shapes disagree, a value is missing or cannot be what it is called; the message says which and what to do.
    """

    xy: Floats
    freq_mhz: Floats
    rss_dbm: Floats
    crs: str | None = None
    conflict: dataclasses.InitVar[float] = 6.0

    def __post_init__(self, conflict: float) -> None:
        xy = np.array(self.xy, dtype=np.float64)
        rss = np.array(self.rss_dbm, dtype=np.float64).ravel()
        if xy.ndim != 2 or xy.shape[1] != 2 or len(xy) != len(rss):
            raise UserError(f"xy has shape {xy.shape}, expected ({len(rss)}, 2), a position for each of rss_dbm")
        if not len(rss):
            raise UserError("rss_dbm: there is no measurement")
        freq = np.broadcast_to(np.asarray(self.freq_mhz, dtype=np.float64), rss.shape).copy()
        for name, values in (("xy", xy), ("freq_mhz", freq), ("rss_dbm", rss)):
            if not np.isfinite(values).all():
                first = int(np.argwhere(~np.isfinite(values))[0][0])
                raise NonFiniteError(f"{name} of measurement {first} is not finite: drop rows without a value")
        for f in np.unique(freq):
            check_frequency(float(f))
        if len(np.unique(freq)) > 64:
            raise UserError(
                f"freq_mhz: {len(np.unique(freq))} different frequencies; round them to the bands that were measured"
            )
        if (rss == 0).any():
            raise UserError(
                f"rss_dbm: {int((rss == 0).sum())} values are 0 dBm, which usually marks missing ones: drop these rows"
            )
        if (rss > 0).all():
            raise UserError(
                "rss_dbm: all values are positive, which looks like path loss: give its negative (--sign -1)"
            )
        if not ((rss >= RSS_RANGE[0]) & (rss <= RSS_RANGE[1])).all():
            first = int(np.argmax((rss < RSS_RANGE[0]) | (rss > RSS_RANGE[1])))
            raise UserError(
                f"rss_dbm of measurement {first} is {rss[first]:g}, expected dBm between {RSS_RANGE[0]:g} and {RSS_RANGE[1]:g}"
            )
        xy, freq, rss = _merged(xy, freq, rss, conflict)
        object.__setattr__(self, "xy", xy)
        object.__setattr__(self, "freq_mhz", freq)
        object.__setattr__(self, "rss_dbm", rss)

    def __len__(self) -> int:
        return len(self.rss_dbm)

    @cached_property
    def bands(self) -> tuple[float, ...]:
        """The frequencies that were measured, ascending."""
        return tuple(float(f) for f in np.unique(self.freq_mhz))

    def take(self, which: ArrayLike) -> "RadioSamples":
        """The samples of a mask or of indices."""
        rows = np.asarray(which)
        return RadioSamples(self.xy[rows], self.freq_mhz[rows], self.rss_dbm[rows], self.crs)

    def band(self, freq_mhz: float) -> "RadioSamples":
        """The samples of one band.

        Raises:
            UserError: it was not measured.
        """
        rows = self.freq_mhz == freq_mhz
        if not rows.any():
            raise UserError(f"no measurement at {freq_mhz:g} MHz; there are {', '.join(f'{f:g}' for f in self.bands)}")
        return self.take(rows)

    @cached_property
    def spacing(self) -> float:
        """Median distance to the nearest other place."""
        from scipy.spatial import cKDTree

        places = np.unique(self.xy, axis=0)
        if len(places) < 2:
            return 1.0
        return float(np.median(cKDTree(places).query(places, k=2)[0][:, 1]))


def _merged(xy: Floats, freq: Floats, rss: Floats, conflict: float) -> tuple[Floats, Floats, Floats]:
    order = np.lexsort((rss, freq, xy[:, 1], xy[:, 0]))
    new = np.ones(len(order), dtype=bool)
    new[1:] = False
    for values in (xy[:, 0], xy[:, 1], freq):
        values = values[order]
        new[1:] |= values[1:] != values[:-1]
    if new.all():
        return xy, freq, rss
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(order))
    sorted_rss = rss[order]
    median = (sorted_rss[(starts + ends - 1) // 2] + sorted_rss[(starts + ends) // 2]) / 2
    spread = sorted_rss[ends - 1] - sorted_rss[starts]
    first = np.minimum.reduceat(order, starts)
    text = f"{int((ends - starts > 1).sum())} places were measured several times at one frequency: their medians are taken,"
    text += f" {len(starts)} values of {len(order)} measurements"
    if (spread > conflict).any():
        worst = first[int(spread.argmax())]
        text += f"; {int((spread > conflict).sum())} have values up to {spread.max():.1f} dB apart"
        text += f" (first at x {xy[worst, 0]:g}, y {xy[worst, 1]:g})"
    warnings.warn(text, stacklevel=4)
    keep = np.sort(first)  # in the order of the file
    return xy[keep], freq[keep], median[np.argsort(first)]


@dataclasses.dataclass(frozen=True)
class RadioScene:
    """What is known of the area besides the measurements.

    Args:
        grid: the raster that buildings, and by default the map, lie on.
        building: (H, W), nonzero where a building stands; None: not known.
        transmitters: (T, 2) positions of the masts in the plane; None: not known.
        crs: the plane, as of ``RadioSamples``.

    Raises:
        UserError: the raster's shape is not the grid's, everything is built up, or a mast lies outside the raster.
    """

    grid: Grid
    building: Bools | None = None
    transmitters: Floats | None = None
    crs: str | None = None

    def __post_init__(self) -> None:
        if self.building is not None:
            building = np.asarray(self.building)
            if building.shape != self.grid.shape:
                raise UserError(f"building has {building.shape} cells, its grid {self.grid.shape}: the two must agree")
            building = building.astype(bool)
            if building.all():
                raise UserError("building: every cell is built up, so there is nothing to predict")
            object.__setattr__(self, "building", building)
        if self.transmitters is not None:
            masts = np.array(self.transmitters, dtype=np.float64).reshape(-1, 2)
            if not np.isfinite(masts).all():
                raise NonFiniteError("transmitters: a position is not finite")
            outside = np.flatnonzero(~self.grid.inside(masts))
            if len(outside):
                x, y = masts[outside[0]]
                raise UserError(f"transmitter {outside[0]} at x {x:g}, y {y:g} lies outside the raster")
            object.__setattr__(self, "transmitters", masts if len(masts) else None)

    @property
    def street(self) -> Bools:
        """(H, W), the cells without a building."""
        return np.ones(self.grid.shape, dtype=bool) if self.building is None else ~self.building

    @cached_property
    def depth(self) -> Floats | None:
        """(T, H, W) line-of-sight fractions, where buildings and masts are known."""
        if self.building is None or self.transmitters is None:
            return None
        return radio_depth(self.building, self.grid.rowcol(self.transmitters))

    def built_at(self, xy: ArrayLike) -> Bools:
        """(n) whether a position lies in a building; outside of the raster none is known."""
        points = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
        if self.building is None:
            return np.zeros(len(points), dtype=bool)
        at = np.clip(self.grid.rowcol(points), 0, np.array(self.grid.shape) - 1)
        return np.asarray(self.building[at[:, 0], at[:, 1]] & self.grid.inside(points))

    def building_on(self, grid: Grid) -> Bools | None:
        """(H, W) buildings on another grid, by its cells' centers; None where they are not known."""
        if self.building is None or grid == self.grid:
            return self.building
        rows = (slice(row, row + 1) for row in range(grid.height))
        return np.stack([self.built_at(grid.centers(row)) for row in rows])

    def depth_at(self, xy: ArrayLike) -> Floats | None:
        """(n, T) fractions at positions; those outside the raster take the nearest cell's."""
        if self.depth is None:
            return None
        at = np.clip(self.grid.rowcol(xy), 0, np.array(self.grid.shape) - 1)
        return np.asarray(self.depth[:, at[:, 0], at[:, 1]].T)


@dataclasses.dataclass(frozen=True)
class RadioMaps:
    """Complete maps of one area: what a simulator or a ray tracer gives, and what a prediction is compared with.

    Args:
        rss_dbm: (F, H, W) received power; NaN where there is none, as in buildings.
        freq_mhz: (F) bands, ascending.
        transmitters: (T, 2) row and column, from 0.
        name: name of the area.
        cell: side of a cell (meters, or 1 where it is not known).
        building: (H, W); default: where no band has a value.
    """

    rss_dbm: Floats
    freq_mhz: tuple[float, ...]
    transmitters: NDArray[np.int64]
    name: str = "area"
    cell: float = 1.0
    building: Bools | None = None

    def __post_init__(self) -> None:
        rss = np.asarray(self.rss_dbm, dtype=np.float64)
        if rss.ndim != 3 or rss.shape[0] != len(self.freq_mhz):
            raise UserError(f"rss_dbm has shape {rss.shape}, expected ({len(self.freq_mhz)}, rows, columns)")
        if (rss == 0).any():
            raise UserError("rss_dbm: a value is 0 dBm: mark missing ones by NaN")
        object.__setattr__(self, "rss_dbm", rss)
        if self.building is None:
            object.__setattr__(self, "building", np.isnan(rss).all(axis=0))

    @cached_property
    def scene(self) -> RadioScene:
        """Grid (x to the east from 0, y to the north from -H), buildings and masts."""
        height, width = self.rss_dbm.shape[1:]
        grid = Grid(0.0, 0.0, self.cell, height, width)
        centers = grid.centers().reshape(height, width, 2)
        masts = np.asarray(self.transmitters, dtype=np.int64).reshape(-1, 2)
        return RadioScene(grid, self.building, centers[masts[:, 0], masts[:, 1]])

    def samples(self, observed: ArrayLike) -> RadioSamples:
        """The measurements of a mask (F, H, W)."""
        mask = np.asarray(observed, dtype=bool) & ~np.isnan(self.rss_dbm)
        band, row, column = np.nonzero(mask)
        centers = self.scene.grid.centers().reshape(*self.rss_dbm.shape[1:], 2)
        return RadioSamples(centers[row, column], np.array(self.freq_mhz)[band], self.rss_dbm[mask])

    def draw(self, rate: float, seed: int, bands: Sequence[int] | None = None) -> Bools:
        """A random mask (F, H, W) of this share of the cells, drawn for each band on its own.

        Raises:
            UserError: the rate is not in (0, 1].
        """
        if not 0 < rate <= 1:
            raise UserError(f"rate must be in (0, 1], got {rate}")
        rng = np.random.default_rng(seed)
        observed = np.zeros(self.rss_dbm.shape, dtype=bool)
        for f, rss in enumerate(self.rss_dbm):
            cells = np.flatnonzero(~np.isnan(rss))
            chosen = rng.permutation(cells)[: max(1, round(rate * len(cells)))]
            if bands is None or f in bands:
                observed[f].flat[chosen] = True
        return observed


def check_same_plane(samples: RadioSamples, scene: Any) -> None:
    """Refuse samples and a scene of different planes.

    Raises:
        UserError: both name one, and the names differ.
    """
    if scene is not None and samples.crs and scene.crs and samples.crs != scene.crs:
        raise UserError(f"the samples lie in {samples.crs}, the scene in {scene.crs}: reproject one of them")
