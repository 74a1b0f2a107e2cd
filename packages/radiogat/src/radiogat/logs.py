"""Measurements out of the files that scanners, phones and analyzers write: what is left out, and which cell it is of.

Nothing is assumed in silence: what is missing is refused or, with ``missing="drop"``, left out and counted; which of several
cells a value belongs to is said; all faults of a file come in one message.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radiogat.faults import Faults, apart
from radiogat.planes import plane_for, project
from radiogat.roles import Reading, Roles, frequencies_in, is_sweep, layout_of
from radiogat.samples import RSS_RANGE, RadioSamples
from radiogat.tables import Column, chunks, numbers, split, text_of
from radiogat.tracks import joined, read_track
from radiogat.tuning import Tuner
from tenfold import UserError

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_SENTINELS = (2147483647.0, -2147483648.0, 9999.0, -9999.0)
_HEMISPHERE = frozenset(
    {
        *("n_s", "ns", "e_w", "ew", "hemisphere", "lat_hemisphere", "lon_hemisphere", "lat_dir", "lon_dir", "lat_ns"),
        *(
            "lon_ew",
            "latitude_direction",
            "longitude_direction",
            "lat_direction",
            "lon_direction",
            "lat_ref",
            "lon_ref",
        ),
        *("latitude_ref", "longitude_ref", "latitude_hemisphere", "longitude_hemisphere", "latdir", "londir"),
    }
)
"""Names of the column behind a position that says N, S, E or W."""


_NR_POWER = frozenset({"ss_rsrp", "ssrsrp", "nr_rsrp", "nrrsrp", "nr_ss_rsrp", "nrssrsrp"})
"""Names of powers of NR."""


@dataclasses.dataclass
class _Rows:
    """The values of the rows that are kept."""

    a: Floats
    b: Floats
    freq: Floats
    rss: Floats
    cell: NDArray[np.int64]


class LogReader:
    """Reads one file of measurements.

    Args:
        path: the file.
        how: what the user said about it.

    Raises:
        UserError: the columns that are needed are not there.
    """

    def __init__(self, path: str | Path, how: Reading) -> None:
        self.path, self.how = Path(path), how
        self.layout = layout_of(self.path, how.columns)
        self.sweep = is_sweep(self.layout.names) and not self.layout.skip
        self.roles = Roles(self.path, self.layout, how.columns)
        self.cells: dict[str, int] = {}
        self.faults = Faults(self.path)
        self.notes: list[str] = []
        self.tuner = Tuner(self.path, self.layout, self.roles, how, self.faults, self.notes)
        self._seen: dict[str, None] = {}
        self._cell: int | None = None
        self._powers: list[int] = []
        self._count = 0
        self._others = 0
        self._degrees = True

    # Which columns

    def _place(self) -> tuple[int, int, bool] | None:
        """Numbers of the columns of the position, and whether they are degrees; None for a file without.

        Where a file has both, x and y count if their plane is named: they may be anything else, as a phone's acceleration.
        """
        x, y, lon, lat = (self.roles.find(role) for role in ("x", "y", "lon", "lat"))
        if lon is not None and lat is not None and (self.how.crs is None or x is None or y is None):
            if "lat" not in self.how.columns and (more := self.roles.also("lat", lat)):
                used = f"{self.layout.names[lat]}, {self.layout.names[lon]}"
                self.notes.append(
                    f"positions are {used}; {more[0]} is there, too: --columns lat=NAME,lon=NAME says which counts"
                )
            return lon, lat, True
        if x is not None and y is not None:
            return x, y, False
        if self.how.track is None and self.how.at is None:
            raise UserError(
                f"{self.path}: no columns x and y, nor lat and lon; there are {', '.join(self.layout.names[:30])};"
                " --columns lat=NAME,lon=NAME names them, --track FILE joins positions by time, --at LAT,LON gives the one"
                " place of all"
            )
        return None

    # Reading

    def read(self) -> RadioSamples:
        """The measurements.

        Raises:
            UserError: a column is missing, or values cannot be read (all faults with their lines).
        """
        parts = list(self._sweeps() if self.sweep else self._frames())
        rows = (
            _Rows(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(_Rows)))
            if parts
            else None
        )
        parts.clear()
        if rows is None or not len(rows.rss):
            if self._others and not self.faults.count:
                name, seen = self.layout.names[self._cell or 0], list(self._seen)
                there = ", ".join(seen[:8]) + (" ..." if len(seen) > 8 else "")
                asked = ", ".join(self.how.only)
                raise UserError(f"{self.path}: no row has {asked} in column {name}; there are {there}")
            if not self.faults.count:
                raise UserError(f"{self.path}: expected a line of column names and a line for each measurement")
            self.faults.settle(self.how.missing, self._count, 0)
        assert rows is not None
        self.faults.settle(self.how.missing, self._count, len(rows.rss))
        if self._others:
            self.notes.append(f"{self._others} rows are of other cells than {', '.join(self.how.only)}")
        self._say_apart(rows.rss)
        if (rows.rss > 0).any() and (rows.rss < 0).any():
            self.notes.append(
                f"{int((rows.rss > 0).sum())} powers are above 0 dBm, up to {rows.rss.max():g}: --range LOW,HIGH limits them"
            )
        if not self._degrees:
            self._check_meters(rows)
        for note in dict.fromkeys(self.notes):
            warnings.warn(f"{self.path}: {note}", stacklevel=3)
        crs = self.how.crs
        if self._degrees:
            crs = crs or plane_for(rows.a, rows.b, str(self.path))
            xy = project(rows.a, rows.b, crs)
        else:
            xy = np.stack([rows.a, rows.b], axis=1)
        freq, rss = rows.freq, rows.rss
        if len(self.cells) > 1 and (rows.cell != rows.cell[0]).any():
            xy, freq, rss = self._cells(xy, freq, rss, rows.cell)
        try:
            return RadioSamples(xy, freq, rss, crs)
        except UserError as error:
            raise type(error)(f"{self.path}: {error}") from error

    def _say_apart(self, rss: Floats) -> None:
        """Say that the lowest or the highest power may mark missing values."""
        name = self.layout.names[self._powers[0]] if self._powers else "level"
        self.notes += [f"column {name}: {text}" for text in apart(rss, self.how.sign)]

    def _check_meters(self, rows: _Rows) -> None:
        """Refuse, or doubt, x and y that are degrees.

        Raises:
            UserError: all lie within one meter, if they are meters.
        """
        x, y = rows.a, rows.b
        size = max(float(np.ptp(x)), float(np.ptp(y)))
        if (np.abs(x) > 180).any() or (np.abs(y) > 90).any() or size > 0.25 * max(abs(x.mean()), abs(y.mean())):
            return
        if len(x) < 2 or not size:
            return
        names = [self.layout.names[self.roles.find(role) or 0] for role in ("x", "y")]
        hint = f"--columns lon={names[0]},lat={names[1]}"
        if size < 1:
            raise UserError(
                f"{self.path}: x and y are meters, and all measurements would lie within {size:.2g} m; if degrees, {hint}"
            )
        self.notes.append(f"x and y are taken as meters, {size:.3g} m across; if they are degrees, {hint}")

    def _cells(self, xy: Floats, freq: Floats, rss: Floats, cell: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """The strongest of the cells at each place and frequency; a cell's own repeats count with their median."""
        import pandas

        names = [name or "(none)" for name in self.cells]
        frame = pandas.DataFrame({"x": xy[:, 0], "y": xy[:, 1], "f": freq, "c": cell, "p": rss})
        counts = frame["c"].value_counts()
        per = frame.groupby(["x", "y", "f", "c"], sort=False, as_index=False)["p"].median()
        best = per.groupby(["x", "y", "f"], sort=False, as_index=False)["p"].max()
        shown = ", ".join(f"{names[c]} ({n})" for c, n in list(counts.items())[:5])
        name = self.layout.names[self._cell or 0]
        warnings.warn(
            f"{self.path}: {len(counts)} cells by {name}, {shown}{' ...' if len(counts) > 5 else ''}: at each place and"
            f" frequency the strongest counts, {len(best)} values of {len(frame)} rows; --by {name} --only"
            f" {names[int(counts.index[0])]} maps one cell",
            stacklevel=4,
        )
        return best[["x", "y"]].to_numpy(), best["f"].to_numpy(), best["p"].to_numpy()

    def _frames(self) -> Iterable[_Rows]:
        how, roles = self.how, self.roles
        place = self._place()
        wide = self._wide()
        power = None if wide else roles.find("rss_dbm")
        if power is None and not wide:
            raise UserError(
                f"{self.path}: no column of received power (rss_dbm, rsrp ...); there are {', '.join(self.layout.names[:30])};"
                " name it: --columns rss_dbm=NAME"
            )
        powers = self._powers = sorted(wide) if wide else roles.family(int(power or 0))
        self._say_nr(powers)
        kind, tuned = ("wide", []) if wide else self.tuner.source()
        if not wide and len(tuned) not in (0, 1, len(powers)):
            raise UserError(f"{self.path}: {len(tuned)} columns of frequencies for {len(powers)} of powers")
        self._cell = roles.named(how.by) if how.by is not None else roles.find("cell")
        if self._cell is not None and len(powers) > 1:
            self._cell = None  # the identity of the first of several values in a row
        if how.by is None and how.only:
            raise UserError("--only takes values of the column that --by names: give --by")
        when = self._times() if place is None and how.track is not None else []
        sides = [self._side(number) for number in place[:2]] if place is not None and place[2] else [None, None]
        used = [*powers, *tuned, *(place[:2] if place else ()), *when, *self.tuner.others(kind)]
        used += [i for i in (self._cell, *sides) if i is not None]
        self._degrees = place is None or place[2]
        track = read_track(str(how.track)) if place is None and how.track is not None else None
        for _, frame in chunks(self.path, self.layout, used):
            cell, mine = self._identity(frame)
            self._others += int((~mine).sum())
            frame, cell = frame[mine], cell[mine]
            self._count += len(frame) * (1 if len(powers) == 1 else 0)
            lines = frame.index.to_numpy(dtype=np.int64)
            if place is not None:
                a, b, ok = self._position(frame, lines, *place, sides)
            elif track is not None:
                a, b, ok = self._tracked(frame, lines, when, track)
            else:
                lat, lon = how.at or (np.nan, np.nan)
                a, b, ok = np.full(len(frame), lon), np.full(len(frame), lat), np.ones(len(frame), dtype=bool)
            for n, number in enumerate(powers):
                rss, good = self._power(frame, lines, number, quiet=len(powers) > 1)
                if kind == "wide":
                    freq, tuned_in = np.full(len(frame), wide[number]), np.ones(len(frame), dtype=bool)
                else:
                    tune = tuned[n if len(tuned) > 1 else 0] if tuned else None
                    freq, tuned_in = self.tuner.tuned(frame, lines, kind, tune, good)
                keep = ok & good & tuned_in
                if len(powers) > 1:
                    self._count += int(keep.sum())
                yield _Rows(a[keep], b[keep], freq[keep], rss[keep], cell[keep])

    def _say_nr(self, powers: Sequence[int]) -> None:
        """Say that a row also holds powers of NR, which are not read: phones log them beside those of LTE."""
        columns = self.roles.columns
        left = [
            c.name for i, c in enumerate(columns) if i not in powers and c.keys & _NR_POWER and c.index in (None, 0)
        ]
        if left and not any(columns[i].keys & _NR_POWER for i in powers):
            self.notes.append(
                f"column {left[0]} is not read; --columns rss_dbm={left[0]}, with its channel=NAME, maps NR"
            )

    def _wide(self) -> dict[int, float]:
        """Column number -> MHz, of a table with a column for each frequency: ``1842.5 MHz``."""
        if self.roles.find("freq_mhz") is not None or self.roles.find("channel") is not None:
            return {}
        if self.roles.find("rss_dbm") is not None:
            return {}
        found = {}
        for i, name in enumerate(self.layout.names):
            freqs = frequencies_in(name)
            if len(freqs) > 1:
                raise UserError(f"{self.path}: column {name} says several frequencies: rename it, as in 1842.5 MHz")
            if freqs:
                found[i] = freqs.pop()
        return found

    def _side(self, number: int) -> int | None:
        """Number of the column right behind a coordinate, where that says on which hemisphere it lies."""
        behind = number + 1
        there = behind < len(self.layout.names) and self.roles.columns[behind].plain in _HEMISPHERE
        return behind if there else None

    # Values of a frame

    def _position(
        self,
        frame: "pandas.DataFrame",
        lines: NDArray[np.int64],
        a: int,
        b: int,
        degrees: bool,
        sides: Sequence[int | None],
    ) -> tuple[Floats, Floats, Bools]:
        names = self.layout.names
        found = []
        ok = np.ones(len(frame), dtype=bool)
        for number, side in zip((a, b), sides, strict=True):
            values, odd = numbers(frame[number], comma=self.layout.comma, degrees=degrees)
            self._odd(frame, lines, number, odd)
            empty = np.isnan(values) & ~odd
            self.faults.note(lines[empty & ok], names[number], "is empty")
            ok &= ~empty & ~odd
            if side is not None:
                word = text_of(frame[side]).str.upper().str[:1]
                values = np.where(word.isin(["S", "W"]).to_numpy(dtype=bool), -np.abs(values), values)
                unsaid = ok & ~word.isin(["N", "S", "E", "W"]).to_numpy(dtype=bool)
                self.faults.note(lines[unsaid], names[side], "is none of N, S, E, W")
                ok &= ~unsaid
            elif self.roles.columns[number].unit in {"w", "°w", "deg w", "s", "°s", "deg s"}:
                values = -values
            found.append(values)
        if degrees:
            out = (np.abs(found[0]) > 180) | (np.abs(found[1]) > 90)
            out &= out.sum() * 2 < ok.sum()  # where most are, something else is wrong, and is said
            nowhere = ((found[0] == 0) & (found[1] == 0)) | np.isin(found[0], _SENTINELS) | (np.abs(found[0]) > 360)
            nowhere = ok & (nowhere | out)
            self.faults.note(lines[nowhere], f"{names[a]}, {names[b]}", "no position (0, 0 or out of range)")
            ok &= ~nowhere
        return found[0], found[1], ok

    def _odd(self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, odd: Bools) -> None:
        """Note text that is no number: it stops the reading, but for lines that hold nothing else, as a summary at the end."""
        if not odd.any():
            return
        rest = frame[[i for i in frame.columns if i != number]]
        alone = odd & (rest.fillna("").astype(str).apply(lambda c: c.str.strip()) == "").all(axis=1).to_numpy(
            dtype=bool
        )
        alone &= len(rest.columns) > 0
        for rows, fatal in ((odd & ~alone, True), (alone, False)):
            if rows.any():
                text = str(frame[number].iloc[int(np.argmax(rows))]).strip()
                what = f"'{text}' is no number" if fatal else "a line of text"
                self.faults.note(lines[rows], self.layout.names[number], what, "" if fatal else text, fatal=fatal)

    def _power(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, *, quiet: bool
    ) -> tuple[Floats, Bools]:
        c: Column = self.roles.columns[number]
        if _other_unit(c.unit):
            raise UserError(f"{self.path}: column {c.name} is in {c.unit}, expected dBm: convert it")
        values, odd = numbers(frame[number], comma=self.layout.comma)
        self._odd(frame, lines, number, odd)
        given, values = values, values * self.how.sign
        empty = np.isnan(values) & ~odd
        if not quiet:
            self.faults.note(lines[empty], c.name, "is empty")
        outside = np.isfinite(values) & ((values == 0) | (values < RSS_RANGE[0]) | (values > RSS_RANGE[1]))
        asked = self.how.range
        beyond = np.isfinite(values) & ((given < asked[0]) | (given > asked[1])) if asked else np.zeros_like(outside)
        if beyond.any():
            self.faults.note(lines[beyond], c.name, "outside of --range", f"{given[int(np.argmax(beyond))]:g}")
            outside &= ~beyond
        if outside.any() and not outside.all():
            text = f"{given[int(np.argmax(outside))]:g}"
            self.faults.note(lines[outside], c.name, "0 dBm or out of range, which marks missing values", text)
            return values, ~(empty | odd | outside | beyond)
        return values, ~(empty | odd | beyond)

    def _identity(self, frame: "pandas.DataFrame") -> tuple[NDArray[np.int64], Bools]:
        if self._cell is None:
            return np.zeros(len(frame), dtype=np.int64), np.ones(len(frame), dtype=bool)
        text = text_of(frame[self._cell]).str.replace(r"^(\d+)\.0+$", r"\1", regex=True)  # 101.0, as pandas writes 101
        mine = text.isin(list(self.how.only)).to_numpy(dtype=bool) if self.how.only else np.ones(len(text), dtype=bool)
        if self.how.only:
            self._seen.update(dict.fromkeys(text.unique()))
        labels = {name: self.cells.setdefault(name, len(self.cells)) for name in text[mine].unique()}
        return text.map(labels).fillna(-1).to_numpy(dtype=np.int64), mine

    # Positions by time

    def _times(self) -> list[int]:
        date = [i for i, c in enumerate(self.roles.columns) if c.plain == "date"]
        time = self.roles.find("time")
        if time is None:
            raise UserError(f"{self.path}: no column of times to join --track by: name it (--columns time=NAME)")
        return [*date, time] if date and date[0] != time else [time]

    def _tracked(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], when: Sequence[int], track: "pandas.DataFrame"
    ) -> tuple[Floats, Floats, Bools]:
        a, b, bad = joined(frame, when, track)
        self.faults.note(lines[bad], self.layout.names[when[-1]], "is no time")
        lost = np.isnan(a) & ~bad
        self.faults.note(lines[lost], "", "no position in the track within 5 seconds")
        return a, b, np.isfinite(a)

    def _sweeps(self) -> Iterable[_Rows]:
        """rtl_power and hackrf_sweep: each line is a part of a sweep, whose bins begin at Hz low."""
        import pandas

        how = self.how
        if how.track is None and how.at is None:
            raise UserError(
                f"{self.path}: sweeps of rtl_power have no positions: --track FILE joins them by time, --at LAT,LON gives the"
                " one place of all"
            )
        self.notes.append("rtl_power's levels are relative to the receiver's full scale: differences hold, dBm do not")
        track = None if how.track is None else read_track(how.track)
        with self.path.open(encoding=self.layout.encoding, newline="") as file:
            kept = [(n, split(line, ",")) for n, line in enumerate(file, 1) if line.strip()]
        lines = np.array([n for n, _ in kept], dtype=np.int64)
        for n, fields in kept:
            if not is_sweep(fields):
                raise UserError(
                    f"{self.path}, line {n}: expected date, time, Hz low, Hz high, Hz step, samples, dB ..."
                )
        frame = pandas.DataFrame({0: [f[0] for _, f in kept], 1: [f[1] for _, f in kept]})
        if track is not None:
            a, b, ok = self._tracked(frame, lines, [0, 1], track)
        else:
            lat, lon = how.at or (np.nan, np.nan)
            a, b, ok = np.full(len(kept), lon), np.full(len(kept), lat), np.ones(len(kept), dtype=bool)
        self._count = len(kept)
        for i, (n, fields) in enumerate(kept):
            level, odd = numbers(pandas.Series(fields[6:], dtype=str), comma=False)
            self.faults.note(np.array([n] if odd.any() else [], dtype=np.int64), "dB", "text that is no number")
            mhz = (float(fields[2]) + np.arange(len(level)) * float(fields[4])) / 1e6
            good = np.isfinite(level) & ok[i] & ~odd.any()
            if how.freq_mhz is not None:
                step = float(fields[4]) / 1e6
                good &= np.abs(mhz - how.freq_mhz) <= step / 2
                mhz = np.full(len(mhz), how.freq_mhz)
            count = int(good.sum())
            yield _Rows(
                np.full(count, a[i]), np.full(count, b[i]), mhz[good], level[good], np.zeros(count, dtype=np.int64)
            )


def _other_unit(unit: str) -> bool:
    """Whether what stands in brackets behind a power is a unit, and not dBm."""
    if re.fullmatch(r"dbm(w|0)?(/.*| .*)?", unit):
        return False
    return unit.startswith("db") or unit in {
        "mw",
        "w",
        "uw",
        "µw",
        "μw",
        "nw",
        "pw",
        "asu",
        "v",
        "mv",
        "uv",
        "%",
        "v/m",
    }


def read_positions(path: str | Path, crs: str | None) -> tuple[Floats, str | None]:
    """(n, 2) positions of a file with x and y, or lat and lon, and their plane.

    Raises:
        UserError: no such columns, or a row without a position (all of them in one message).
    """
    path = Path(path)
    layout = layout_of(path)
    roles = Roles(path, layout, {})
    x, y, lon, lat = (roles.find(role) for role in ("x", "y", "lon", "lat"))
    degrees = x is None or y is None
    pair = (lon, lat) if degrees else (x, y)
    if pair[0] is None or pair[1] is None:
        raise UserError(f"{path}: no columns x and y, nor lat and lon; there are {', '.join(layout.names)}")
    faults = Faults(path)
    parts = []
    for _, frame in chunks(path, layout, [pair[0], pair[1]]):
        values = []
        for number in pair:
            assert number is not None
            found, odd = numbers(frame[number], comma=layout.comma, degrees=degrees)
            lines = frame.index.to_numpy(dtype=np.int64)
            if odd.any():
                text = str(frame[number].iloc[int(np.argmax(odd))])
                faults.note(lines[odd], layout.names[number], f"'{text}' is no number", fatal=True)
            faults.note(lines[np.isnan(found) & ~odd], layout.names[number], "is empty", fatal=True)
            values.append(found)
        parts.append(np.stack(values, axis=1))
    faults.settle("refuse", 0, 0)
    if not parts or not sum(map(len, parts)):
        raise UserError(f"{path}: expected a line of column names and a line for each place")
    points = np.concatenate(parts)
    if not degrees:
        return points, crs
    crs = crs or plane_for(points[:, 0], points[:, 1], str(path))
    return project(points[:, 0], points[:, 1], crs), crs
