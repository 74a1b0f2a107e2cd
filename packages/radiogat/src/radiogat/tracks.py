"""Positions by time, for files that have times alone: a track that a GPS wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radiogat.roles import Roles, layout_of
from radiogat.tables import chunks, numbers, text_of
from tenfold import UserError

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
_SECONDS = 5
"""A measurement takes the position of the nearest moment of the track that is no farther."""


def read_track(path: str | Path) -> "pandas.DataFrame":
    """Times and positions (time, lon, lat) of a track, in order.

    Raises:
        UserError: a column is missing, or no row has a time and a position.
    """
    import pandas

    path = Path(path)
    layout = layout_of(path)
    roles = Roles(path, layout, {})
    when, lon, lat = roles.find("time"), roles.find("lon"), roles.find("lat")
    if when is None or lon is None or lat is None:
        raise UserError(f"--track {path}: expected columns of time, lat and lon; there are {', '.join(layout.names)}")
    parts = []
    for _, frame in chunks(path, layout, [when, lon, lat]):
        time = moments(text_of(frame[when]))
        values = [numbers(frame[i], comma=layout.comma, degrees=True)[0] for i in (lon, lat)]
        parts.append(pandas.DataFrame({"time": time, "lon": values[0], "lat": values[1]}))
    track = pandas.concat(parts).dropna().sort_values("time")
    if track.empty:
        raise UserError(f"--track {path}: no row has a time and a position")
    return track


def joined(frame: "pandas.DataFrame", when: Sequence[int], track: "pandas.DataFrame") -> tuple[Floats, Floats, Any]:
    """Longitudes and latitudes (n) at the times of rows, NaN where the track has none, and which rows have no time.

    Args:
        frame: the rows.
        when: columns of date and time, or of the time alone.
        track: of ``read_track``.
    """
    import pandas

    text = text_of(frame[when[0]])
    for number in when[1:]:
        text = text + " " + text_of(frame[number])
    left = pandas.DataFrame({"time": moments(text).to_numpy(), "row": np.arange(len(frame))})
    bad = left["time"].isna().to_numpy()
    left = left[~bad].sort_values("time")
    near = pandas.merge_asof(left, track, on="time", direction="nearest", tolerance=pandas.Timedelta(seconds=_SECONDS))
    a, b = np.full(len(frame), np.nan), np.full(len(frame), np.nan)
    a[near["row"].to_numpy()], b[near["row"].to_numpy()] = near["lon"].to_numpy(), near["lat"].to_numpy()
    return a, b, bad


def moments(text: "pandas.Series[Any]") -> "pandas.Series[Any]":
    """Times of any usual notation, in UTC where they say no zone; seconds or milliseconds since 1970 where they are numbers."""
    import pandas

    count = pandas.to_numeric(text, errors="coerce")
    if count.notna().mean() > 0.9 and float(count.median()) > 1e8:
        unit: Any = "ms" if float(count.median()) > 1e11 else "s"
        return pandas.to_datetime(count, unit=unit, errors="coerce", utc=True).astype("datetime64[ns, UTC]")
    cleaned = text.str.replace("_", " ", regex=False).str.replace(r"^(\d{4})\.(\d\d)\.(\d\d)", r"\1-\2-\3", regex=True)
    return pandas.to_datetime(cleaned, errors="coerce", utc=True, format="mixed").astype("datetime64[ns, UTC]")
