"""Pictures for an engineer's slide: maps with one color bar, error bars, errors, samples, slopes, calibration, suggestions."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radiogat.samples import Grid, RadioSamples
from tenfold.figures import COLORS, STYLE
from tenfold.files import replacing

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
LEVELS = np.linspace(0.05, 0.95, 19)
"""At which error bars are judged."""
_BUILDING = "#9a9a9a"


@contextlib.contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(width, height), layout="compressed")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None}, bbox_inches="tight")


def _columns(count: int) -> int:
    """Panels side by side: at most three, and four make a square."""
    return 2 if count == 4 else min(count, 3)


def _panels(figure: Any, grid: Grid, count: int) -> list[Any]:
    """Axes of maps; labels stand at the left and below, also above a place that stays free."""
    columns = _columns(count)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.set_axis_off()
    unit = "km" if _unit(grid) == 1000 else "m"
    for number, panel in enumerate(axes[:count]):
        left, low = number % columns == 0, number + columns >= count
        panel.tick_params(labelleft=left, labelbottom=low)
        panel.set(xlabel=f"east ({unit})" if low else "", ylabel=f"north ({unit})" if left else "")
    return list(axes[:count])


def _unit(grid: Grid) -> int:
    """Meters of the unit that a map's axes are labeled in."""
    return 1000 if grid.cell * max(grid.shape) >= 2000 else 1


def _size(grid: Grid, count: int) -> tuple[float, float]:
    columns = _columns(count)
    wide = 3.9
    return wide * columns + 0.9, -(-count // columns) * (wide * grid.height / grid.width * 0.9 + 0.75)


def _show(axes: Any, grid: Grid, values: Floats, building: Bools | None, **kind: Any) -> Any:
    """One raster in kilometers or meters, buildings gray."""
    unit = _unit(grid)
    extent = (0.0, grid.width * grid.cell / unit, 0.0, grid.height * grid.cell / unit)
    axes.set_facecolor("#ffffff")
    if building is not None:
        from matplotlib.colors import ListedColormap

        shade = np.where(building, 1.0, np.nan)
        axes.imshow(shade, extent=extent, cmap=ListedColormap([_BUILDING]), interpolation="nearest")
    return axes.imshow(values, extent=extent, interpolation="nearest", **kind)


def _place(grid: Grid, xy: Floats) -> Floats:
    return np.asarray((xy - np.array([grid.x0, grid.y0 - grid.height * grid.cell])) / _unit(grid))


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
    """One map per band, or with its own title, under one color bar; dots are measurements, triangles masts."""
    finite = power_dbm[np.isfinite(power_dbm)]
    low, high = np.floor(np.percentile(finite, 0.5) / 5) * 5, np.ceil(np.percentile(finite, 99.8) / 5) * 5
    with _figure(path, *_size(grid, len(freq_mhz))) as figure:
        panels = _panels(figure, grid, len(freq_mhz))
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
    """Half of the interval's width, one map per band."""
    top = float(np.nanpercentile(half_width[np.isfinite(half_width)], 99))
    with _figure(path, *_size(grid, len(freq_mhz))) as figure:
        panels = _panels(figure, grid, len(freq_mhz))
        for axes, freq, values in zip(panels, freq_mhz, half_width, strict=True):
            image = _show(axes, grid, values, building, cmap="YlOrBr", vmin=0, vmax=top)
            axes.set_title(f"{freq:g} MHz")
        figure.colorbar(image, ax=panels, label=f"± dB that hold {level:.0%}", shrink=0.9, extend="max")


def error_picture(path: str | Path, grid: Grid, errors: dict[str, Floats], building: Bools | None = None) -> None:
    """Predicted minus true power, one map per method."""
    top = max(1.0, float(np.nanpercentile(np.abs(np.stack(list(errors.values()))), 98)))
    with _figure(path, *_size(grid, len(errors))) as figure:
        panels = _panels(figure, grid, len(errors))
        for axes, (name, values) in zip(panels, errors.items(), strict=True):
            image = _show(axes, grid, values, building, cmap="RdBu_r", vmin=-top, vmax=top)
            axes.set_title(f"{name}: RMSE {np.sqrt(np.nanmean(values**2)):.2f} dB")
        figure.colorbar(image, ax=panels, label="predicted - true (dB)", shrink=0.9, extend="both")


def slope_picture(path: str | Path, grid: Grid, slope: Floats, building: Bools | None = None) -> None:
    """dB per decade: -20 is free space, flatter is shadow."""
    with _figure(path, *_size(grid, 1)) as figure:
        (axes,) = _panels(figure, grid, 1)
        low, high = np.nanpercentile(slope, [2, 98])
        image = _show(axes, grid, slope, building, cmap="plasma", vmin=low, vmax=high)
        axes.set_title("spectral slope (free space: -20)")
        figure.colorbar(image, ax=axes, label="dB per decade of frequency", shrink=0.9, extend="both")


def calibration_picture(path: str | Path, curves: dict[str, Floats], judged: str) -> None:
    """Share of what was ``judged`` inside the intervals of ``LEVELS``, against the level that was asked for.

    A curve is one line (L), or several (folds, L) that are drawn thin.
    """
    with _figure(path, 4.6, 4.4) as figure:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], "--", color="#777777", linewidth=1, label="as asked for")
        for color, (name, shares) in zip(COLORS, curves.items(), strict=False):
            if shares.ndim == 1:
                axes.plot(100 * LEVELS, 100 * shares, "o-", color=color, markersize=3.5, label=name)
            else:
                axes.plot(
                    100 * LEVELS, 100 * shares.T, color=color, linewidth=0.9, label=[name] + [None] * (len(shares) - 1)
                )
        axes.set(xlabel="level of the interval (%)", ylabel=f"{judged} inside (%)", title="error bars")
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
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="#ffffff")]
    with _figure(path, *_size(grid, 1)) as figure:
        (axes,) = _panels(figure, grid, 1)
        top = float(np.nanpercentile(half_width, 99))
        image = _show(axes, grid, half_width, building, cmap="YlOrBr", vmin=0, vmax=top)
        if samples is not None:
            at = _place(grid, np.unique(samples.xy, axis=0))
            axes.scatter(*at.T, s=float(np.clip(1500 / len(at), 0.2, 8)), c="#0072b2", linewidths=0)
        spots = _place(grid, np.asarray(places))
        ring = {"markerfacecolor": "none", "markeredgecolor": "#000000", "markersize": 9, "markeredgewidth": 1.4}
        axes.plot(*spots.T, "o", path_effects=halo, **ring)
        middle = np.array(axes.get_xlim()).mean(), np.array(axes.get_ylim()).mean()
        for number, (x, y) in enumerate(spots[:20], 1):  # written towards the middle, so that none leaves the map
            right, up = x < middle[0], y < middle[1]
            side = {"ha": "left" if right else "right", "va": "bottom" if up else "top"}
            offset = (5 if right else -5, 4 if up else -4)
            text = axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=9, **side)
            text.set_path_effects(halo)
        axes.set_title(f"{len(spots)} places to measure next" + ("" if samples is None else " (dots: measured)"))
        figure.colorbar(image, ax=axes, label="± dB", shrink=0.9, extend="max")
