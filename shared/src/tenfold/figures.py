"""Pictures in one style, as PNG files that appear whole: curves with bands, arms with intervals, grids of images.

Equal input gives equal bytes with the same matplotlib: no date and no version is written into the file, and neither
pyplot's state nor the user's matplotlibrc has a part in it. A run's pictures go to ``run.own("figures/NAME.png")``.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from tenfold.errors import needs
from tenfold.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of color vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
_CROWDED = 25
"""Points of a curve beyond which markers hide the line."""

Scale = Literal["linear", "log"]
Arm = TypeVar("Arm", bound=str)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One named line: x, the mean over seeds at each x, and optionally the interval around it."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One pair of axes; labels carry their units."""

    title: str
    xlabel: str
    ylabel: str
    curves: Mapping[str, Curve]
    xscale: Scale = "linear"
    yscale: Scale = "linear"


def line_chart(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Draw panels side by side; a name has the same color in all of them, and one legend below serves all."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    handles: dict[str, Any] = {}
    with _saved(path, 4.6 * len(panels), 4.0) as figure:
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for name, curve in panel.curves.items():
                number = names.index(name)
                color, line = COLORS[number % len(COLORS)], LINES[number // len(COLORS) % len(LINES)]
                marker = MARKERS[number % len(MARKERS)] if len(curve.x) <= _CROWDED else ""
                (handles[name],) = axes.plot(curve.x, curve.mean, color=color, linestyle=line, marker=marker)
                if curve.low is not None and curve.high is not None:
                    axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
            axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
            axes.set(xscale=panel.xscale, yscale=panel.yscale)
            places = [float(x) for curve in panel.curves.values() for x in curve.x]
            if panel.xscale == "linear" and places and all(x.is_integer() for x in places):
                _count(axes.xaxis, min(places))
            for axis, scale in ((axes.xaxis, panel.xscale), (axes.yaxis, panel.yscale)):
                if scale == "log":
                    _plain(axis)
        if len(names) > 1:
            columns = max(1, int(4.6 * len(panels) / (0.07 * max(map(len, names)) + 0.55)))  # inches that a name takes
            figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns)


def _count(axis: Any, least: float) -> None:
    """Ticks at whole numbers (there is no half of an epoch), and at 1 where counting begins there (there is no rank 0)."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    locator = MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True)
    axis.set_major_locator(locator)
    if least == 1:
        ticks = np.asarray(axis.get_majorticklocs())
        low, high = axis.get_view_interval()
        step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
        kept = [1.0, *(t for t in ticks.tolist() if t > 1 and t <= high and t - 1 >= step / 2)]
        axis.set_major_locator(FixedLocator(kept))
        axis.set_view_interval(low, high, ignore=True)


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, 1, 2 and 5 of each decade, or each decade where there are many."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=20))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())


def arm_chart(
    path: str | os.PathLike[str], values: Mapping[Arm, Sequence[float]], *, xlabel: str, title: str = ""
) -> None:
    """Draw one row per arm: its mean with Student's 95 % interval (from three seeds on), below it a faint dot for each seed.

    Args:
        path: the PNG.
        values: arm -> its values over the seeds, in the order of the rows from top to bottom.
        xlabel: the metric and its unit.
        title: above the axes.
    """
    from tenfold.claims import interval, mean_ci95

    needs("scipy", "demo")
    with _saved(path, 6.4, 1.1 + 0.5 * len(values)) as figure:
        axes = figure.add_subplot()
        for row, sample in enumerate(values.values()):
            color = COLORS[row % len(COLORS)]
            mean, ci95 = mean_ci95(sample)
            if len(sample) > 1:
                axes.plot(
                    sample, [row + 0.22] * len(sample), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0
                )
            axes.plot(ci95 or (mean, mean), [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot([mean], [row], "o", color=color, markersize=7)
            text = interval(mean, ci95)
            axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
        axes.set_yticks(range(len(values)), list(values))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set(xlabel=xlabel, title=title, ylim=(len(values) - 0.5, -0.5))


def image_grid(
    path: str | os.PathLike[str],
    images: Sequence[Sequence[ArrayLike]],
    *,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    titles: Sequence[Sequence[str]] = (),
    cell: float = 1.2,
) -> None:
    """Rows of images on a white page, each fitted into a square; titles above the columns, beside the rows, below images.

    Args:
        path: the PNG.
        images: rows of uint8 arrays, (H, W) gray or (H, W, 3) RGB; rows may differ in length, images in size.
        row_titles: one per row, or none.
        column_titles: one per column, or none.
        titles: words below each image, in lines; rows as in ``images``.
        cell: side of a square in inches, at 130 pixels an inch.

    Raises:
        ValueError: an image of another dtype or shape; the message names its place.
    """
    columns = max(map(len, images))
    widest = max(map(len, row_titles), default=0)
    lines = max((text.count("\n") + 1 for row in titles for text in row), default=0)
    below = 0.14 * lines / cell  # in cells
    height_of_row = 1 + below
    with _saved(path, cell * columns + 0.08 * widest + 0.2, cell * height_of_row * len(images) + 0.3) as figure:
        axes = figure.add_subplot()
        for r, row in enumerate(images):
            for c, given in enumerate(row):
                image = np.asarray(given)
                if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
                    raise ValueError(
                        f"image in row {r}, column {c}: expected uint8 (H, W) or (H, W, 3), got {image.dtype} {image.shape}"
                    )
                height, width = 0.47 * np.asarray(image.shape[:2]) / max(image.shape[:2])
                middle = r * height_of_row
                place = (c - width, c + width, middle + height, middle - height)
                rgb = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)  # a color map would round the levels
                axes.imshow(rgb, extent=place)
                if titles:
                    axes.text(c, middle + 0.5, titles[r][c], ha="center", va="top", fontsize=7)
        axes.set_xticks(range(len(column_titles)), column_titles)
        axes.set_yticks([r * height_of_row for r in range(len(row_titles))], row_titles)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.set(xlim=(-0.5, columns - 0.5), ylim=(len(images) * height_of_row - 0.5, -0.5))


@contextlib.contextmanager
def _saved(path: str | os.PathLike[str], width: float, height: float) -> Iterator["Figure"]:
    """A figure in our style, saved when the block ends; the style has to hold while axes are made."""
    needs("matplotlib", "demo")
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None}, bbox_inches="tight")
