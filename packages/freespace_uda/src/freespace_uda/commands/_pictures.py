"""The pictures of several commands."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from freespace_uda.metrics import FreespaceMeter
from freespace_uda.scenes import Item
from tenfold.figures import STYLE, Curve, Panel, line_chart
from tenfold.files import replacing
from tenfold.runs import Run, read_metrics

Pixels: TypeAlias = NDArray[np.uint8]
GREEN = np.array([40, 220, 90], np.float64)


def shown_rgb(item: Item) -> Pixels:
    """The picture, or gray where there is none."""
    return np.full((*item.size, 3), 128, np.uint8) if item.rgb is None else item.rgb


def shown_depth(depth: NDArray[Any] | None, size: tuple[int, int]) -> Pixels:
    """Depth by color on a logarithmic scale from 3 m (yellow) to 80 m (blue); holes are black."""
    if depth is None:
        return np.zeros((*size, 3), np.uint8)
    t = np.log(np.clip(depth, 3, 80) / 3) / np.log(80 / 3)
    stops = np.array([[253, 231, 37], [94, 201, 98], [33, 145, 140], [59, 82, 139], [68, 1, 84]], np.float64)
    at = t * (len(stops) - 1)
    low = np.clip(at.astype(int), 0, len(stops) - 2)
    part = (at - low)[..., None]
    colors = stops[low] * (1 - part) + stops[low + 1] * part
    colors[depth <= 0] = 0
    return colors.astype(np.uint8)


def shown_normals(normals: NDArray[Any] | None, size: tuple[int, int]) -> Pixels:
    """Normals as (n + 1) / 2; gray is unknown."""
    if normals is None:
        return np.full((*size, 3), 128, np.uint8)
    return ((np.moveaxis(normals, 0, -1) * 0.5 + 0.5) * 255).round().astype(np.uint8)


def overlay(rgb: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The picture with the road in green."""
    out = rgb.astype(np.float64)
    out[mask] = 0.45 * out[mask] + 0.55 * GREEN
    return out.round().astype(np.uint8)


def outline(rgb: Pixels, mask: NDArray[np.bool_], label: NDArray[np.uint8] | None) -> Pixels:
    """The picture with hits green, false alarms red and misses blue; without a label, an overlay."""
    if label is None:
        return overlay(rgb, mask)
    out = rgb.astype(np.float64)
    road, known = label == 1, label != 255
    for where, color in (
        (mask & road, (40, 220, 90)),
        (mask & ~road & known, (235, 50, 40)),
        (~mask & road, (50, 90, 250)),
    ):
        out[where] = 0.45 * out[where] + 0.55 * np.array(color, np.float64)
    return out.round().astype(np.uint8)


ACROSS = 5
"""Columns of scenes side by side, beyond which they go on below."""
DPI = 130


def draw_strip(run: Run, name: str, rows: Sequence[Sequence[Pixels]], titles: Sequence[str]) -> None:
    """Draw one scene per row, its pictures side by side without space around them, titles above the columns."""
    strip_file(run.figure(name), rows, titles)


def strip_file(path: str | Path, rows: Sequence[Sequence[Pixels]], titles: Sequence[str]) -> None:
    """Draw the strips of `draw_strip` into a PNG: 1600 pixels for the columns, but at most 480 for one."""
    from matplotlib import style
    from matplotlib.figure import Figure

    gap, above, between = 6, 34, 10  # pixels: between pictures, of a title, between blocks of columns
    across = min(ACROSS, len(titles))
    width = min(480, 1600 // across)
    heights = [max(round(width * p.shape[0] / p.shape[1]) for p in row) for row in rows]
    blocks = [range(i, min(i + across, len(titles))) for i in range(0, len(titles), across)]
    block = above + sum(heights) + gap * len(rows)
    wide, high = across * (width + gap) + gap, len(blocks) * (block + between) - between
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(wide / DPI, high / DPI))
        for number, columns in enumerate(blocks):
            top = number * (block + between)
            for place, column in enumerate(columns):
                left = gap + place * (width + gap)
                middle = ((left + width / 2) / wide, 1 - (top + above / 2) / high)
                figure.text(*middle, titles[column], ha="center", va="center")
                y = top + above
                for row, height in zip(rows, heights, strict=True):
                    picture = row[column]
                    own = round(width * picture.shape[0] / picture.shape[1])
                    axes = figure.add_axes((left / wide, 1 - (y + own) / high, width / wide, own / high))
                    axes.imshow(picture, aspect="auto")
                    axes.set_axis_off()
                    y += height + gap
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def draw_distance(run: Run, meters: Mapping[str, FreespaceMeter], name: str = "distance") -> None:
    """Draw F1 by ring, one curve per arm."""
    curves = {}
    for arm, meter in meters.items():
        rings = meter.by_distance()
        numbers = [i for i, ring in enumerate(_NAMES) if ring in rings]
        curves[arm] = Curve(numbers, [100 * rings[_NAMES[i]].f1 for i in numbers])
    label = "; ".join(f"{i}: {ring}" for i, ring in enumerate(_NAMES))
    line_chart(run.figure(name), [Panel("F1 by distance", label, "F1 (%)", curves)])


_NAMES = ("0-10 m", "10-20 m", "20-40 m", "> 40 m", "no depth")


def draw_course(run: Run, name: str = "course") -> bool:
    """Draw losses and health over the steps of a training; False where nothing was logged."""
    path = run.path / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    groups = {
        "losses": ("loss", "segmentation", "rgb head", "normal head", "adversarial"),
        "health": ("accuracy rgb", "accuracy normal", "discriminator accuracy", "mask rgb", "mask normal", "agreement",
                   "precision on source rgb", "precision on source normal"),
        "without labels": ("target agreement", "target entropy", "target road"),
    }  # fmt: skip
    panels = []
    for title, names in groups.items():
        curves = {}
        for column in names:
            points = [(step, values[column]) for step, values in rows if column in values]
            if points:
                curves[column] = Curve([s for s, _ in points], [v for _, v in points])
        if curves:
            panels.append(Panel(title, "step", "loss" if title == "losses" else "share", curves))
    if panels:
        line_chart(run.figure(name), panels)
    return bool(panels)
