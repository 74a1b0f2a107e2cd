"""Pictures for an engineer's slide: maps with one color bar, error bars, errors, samples, slopes, calibration, suggestions."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radiogat.conformal import SpatialConformal
from radiogat.samples import Grid, RadioSamples
from tenfold.figures import COLORS, STYLE
from tenfold.runs import replacing

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_BUILDING = "#9a9a9a"


@contextlib.contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None}, bbox_inches="tight")


def _columns(count: int) -> int:
    """Panels side by side: at most three, and four make a square."""
    return 2 if count == 4 else min(count, 3)


def _panels(figure: Any, count: int) -> list[Any]:
    columns = _columns(count)
    rows = -(-count // columns)
    axes = figure.subplots(rows, columns, squeeze=False)
    for spare in axes.ravel()[count:]:
        spare.set_axis_off()
    return list(axes.ravel()[:count])


def _size(grid: Grid, count: int) -> tuple[float, float]:
    columns = _columns(count)
    wide = 3.9
    return wide * columns + 0.9, -(-count // columns) * (wide * grid.height / grid.width * 0.9 + 0.75)


def _show(axes: Any, grid: Grid, values: Floats, building: Bools | None, **kind: Any) -> Any:
    """One raster in kilometres or metres, buildings gray."""
    large = grid.cell * max(grid.shape) >= 2000
    unit = 1000 if large else 1
    right, low = grid.x0 + grid.width * grid.cell, grid.y0 - grid.height * grid.cell
    extent = ((grid.x0 - grid.x0) / unit, (right - grid.x0) / unit, (low - low) / unit, (grid.y0 - low) / unit)
    axes.set_facecolor("#ffffff")
    if building is not None:
        from matplotlib.colors import ListedColormap

        shade = np.where(building, 1.0, np.nan)
        axes.imshow(shade, extent=extent, cmap=ListedColormap([_BUILDING]), interpolation="nearest")
    image = axes.imshow(values, extent=extent, interpolation="nearest", **kind)
    axes.set(xlabel=f"east ({'km' if large else 'm'})", ylabel=f"north ({'km' if large else 'm'})")
    axes.label_outer()
    return image


def _place(grid: Grid, xy: Floats) -> Floats:
    unit = 1000 if grid.cell * max(grid.shape) >= 2000 else 1
    return np.asarray((xy - np.array([grid.x0, grid.y0 - grid.height * grid.cell])) / unit)


def map_picture(
    path: str | Path,
    grid: Grid,
    freq_mhz: Sequence[float | str],
    power_dbm: Floats,
    *,
    building: Bools | None = None,
    samples: RadioSamples | None = None,
    transmitters: Floats | None = None,
) -> None:
    """One map a band, or with its own title, under one color bar; dots are measurements, triangles masts."""
    finite = power_dbm[np.isfinite(power_dbm)]
    low, high = np.floor(np.percentile(finite, 0.5) / 5) * 5, np.ceil(np.percentile(finite, 99.8) / 5) * 5
    with _figure(path, *_size(grid, len(freq_mhz))) as figure:
        panels = _panels(figure, len(freq_mhz))
        for axes, freq, power in zip(panels, freq_mhz, power_dbm, strict=True):
            image = _show(axes, grid, power, building, cmap="viridis", vmin=low, vmax=high)
            axes.set_title(freq if isinstance(freq, str) else f"{freq:g} MHz")
            if samples is not None and not isinstance(freq, str) and freq in samples.bands:
                at = _place(grid, samples.band(freq).xy)
                size = float(np.clip(2000 / len(at), 0.15, 14))
                axes.scatter(*at.T, s=size, c="#ffffff", edgecolors="#000000", linewidths=0.4 if size > 3 else 0)
            if transmitters is not None:
                axes.plot(*_place(grid, transmitters).T, "^", color=COLORS[1], markeredgecolor="#ffffff", markersize=8)
        figure.colorbar(image, ax=panels, label="received power (dBm)", shrink=0.9, extend="both")


def error_bar_picture(
    path: str | Path,
    grid: Grid,
    freq_mhz: Sequence[float],
    half_width: Floats,
    level: float,
    building: Bools | None = None,
) -> None:
    """Half of the interval's width, one map a band."""
    top = float(np.nanpercentile(half_width[np.isfinite(half_width)], 99))
    with _figure(path, *_size(grid, len(freq_mhz))) as figure:
        panels = _panels(figure, len(freq_mhz))
        for axes, freq, values in zip(panels, freq_mhz, half_width, strict=True):
            image = _show(axes, grid, values, building, cmap="magma", vmin=0, vmax=top)
            axes.set_title(f"{freq:g} MHz")
        figure.colorbar(image, ax=panels, label=f"± dB that hold {level:.0%}", shrink=0.9, extend="max")


def error_picture(path: str | Path, grid: Grid, errors: dict[str, Floats], building: Bools | None = None) -> None:
    """Predicted minus true power, one map a method."""
    top = max(1.0, float(np.nanpercentile(np.abs(np.stack(list(errors.values()))), 98)))
    with _figure(path, *_size(grid, len(errors))) as figure:
        panels = _panels(figure, len(errors))
        for axes, (name, values) in zip(panels, errors.items(), strict=True):
            image = _show(axes, grid, values, building, cmap="RdBu_r", vmin=-top, vmax=top)
            axes.set_title(f"{name}: RMSE {np.sqrt(np.nanmean(values**2)):.2f} dB")
        figure.colorbar(image, ax=panels, label="predicted - true (dB)", shrink=0.9, extend="both")


def slope_picture(path: str | Path, grid: Grid, slope: Floats, building: Bools | None = None) -> None:
    """dB a decade: -20 is free space, flatter is shadow."""
    with _figure(path, *_size(grid, 1)) as figure:
        (axes,) = _panels(figure, 1)
        low, high = np.nanpercentile(slope, [1, 99])
        image = _show(axes, grid, slope, building, cmap="cividis", vmin=low, vmax=high)
        axes.set_title("spectral slope (free space: -20)")
        figure.colorbar(image, ax=axes, label="dB a decade of frequency", shrink=0.9)


def calibration_picture(
    path: str | Path, conformal: SpatialConformal, truth: Floats, power: Floats, scale: Floats
) -> None:
    """Share of held-out measurements inside of intervals, halves calibrated on each other, against the level asked for."""
    half = np.arange(len(truth)) % 2 == 0
    levels = np.linspace(0.05, 0.95, 19)
    levels = levels[np.ceil(((~half).sum() + 1) * levels) <= (~half).sum()]  # higher ones would be infinite
    scores = np.abs(truth - power) / scale
    found = np.zeros(len(levels))
    for one in (half, ~half):
        other = SpatialConformal(scores[one])
        found += [float((scores[~one] <= other.quantile(float(level))).mean()) / 2 for level in levels]
    with _figure(path, 4.4, 4.2) as figure:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], "--", color="#777777", linewidth=1, label="as asked for")
        axes.plot(100 * levels, 100 * found, "o-", color=COLORS[0], label="as found")
        axes.set(xlabel="level of the interval (%)", ylabel="held-out measurements inside (%)", title="error bars")
        axes.set_aspect("equal")
        axes.legend(loc="lower right")


def suggestion_picture(
    path: str | Path,
    grid: Grid,
    half_width: Floats,
    places: ArrayLike,
    samples: RadioSamples | None = None,
    building: Bools | None = None,
) -> None:
    """The places that are best measured next, numbered, over the error bars."""
    with _figure(path, *_size(grid, 1)) as figure:
        (axes,) = _panels(figure, 1)
        image = _show(
            axes, grid, half_width, building, cmap="magma", vmin=0, vmax=float(np.nanpercentile(half_width, 99))
        )
        if samples is not None:
            at = _place(grid, np.unique(samples.xy, axis=0))
            axes.scatter(*at.T, s=float(np.clip(1500 / len(at), 0.2, 8)), c="#9fd8ff", linewidths=0, label="measured")
        spots = _place(grid, np.asarray(places))
        axes.plot(*spots.T, "o", markerfacecolor="none", markeredgecolor="#35e07c", markersize=9, markeredgewidth=1.6)
        for number, (x, y) in enumerate(spots[:20], 1):
            axes.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", color="#35e07c", fontsize=9)
        axes.set_title(f"{len(spots)} places to measure next")
        figure.colorbar(image, ax=axes, label="± dB", shrink=0.9, extend="max")
