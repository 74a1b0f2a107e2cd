"""Measurements out of the files that scanners, phones and analyzers write: what is left out, and which cell it is of.

Nothing is assumed in silence: what is missing is refused or, with ``missing="drop"``, left out and counted; which of several
cells a value belongs to is said; all faults of a file come in one message.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radiogat.channels import RADIOS, band_mhz, channel_mhz, radio_of
from radiogat.planes import plane_for, project
from radiogat.roles import AS_NAME, UNITS, Missing, Reading, Roles, is_rtl_power, layout_of
from radiogat.samples import RSS_RANGE, RadioSamples
from radiogat.tables import Column, chunks, numbers, split, text_of
from tenfold import UserError

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]

_CHANNEL_RADIO = (
    ("earfcn", "lte"),
    ("nr_arfcn", "nr"),
    ("nrarfcn", "nr"),
    ("nr_dl", "nr"),
    ("ssb", "nr"),
    ("uarfcn", "umts"),
)
_SENTINELS = (2147483647.0, -2147483648.0, 9999.0, -9999.0)


@dataclasses.dataclass
class _Faults:
    """What is wrong with a file's rows, by kind, with the line of the first."""

    path: Path
    count: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    fatal: set[str] = dataclasses.field(default_factory=set)

    def note(self, lines: NDArray[np.int64], name: str, what: str, example: str = "", *, fatal: bool = False) -> None:
        if not len(lines):
            return
        kind = f"column {name}: {what}" if name else what
        self.first.setdefault(kind, f"line {lines[0]}, {kind}" + (f" ('{example}')" if example else ""))
        self.count[kind] = self.count.get(kind, 0) + len(lines)
        if fatal:
            self.fatal.add(kind)

    def said(self, kinds: Iterable[str]) -> str:
        parts = []
        for kind in kinds:
            more = self.count[kind] - 1
            parts.append(self.first[kind] + (f" (and {more} more rows)" if more else ""))
        return "; ".join(parts)

    def settle(self, missing: Missing, rows: int, left: int) -> None:
        """Refuse, or say what is left out.

        Raises:
            UserError: text that is no number; rows without a value, unless they are dropped; or nothing is left.
        """
        if not self.count:
            return
        if self.fatal:
            raise UserError(f"{self.path}, {self.said(self.count)}")
        if missing == "refuse" or not left:
            hint = "--missing drop leaves such rows out" if left else "no row is left"
            raise UserError(f"{self.path}, {self.said(self.count)}: {hint}")
        warnings.warn(f"{self.path}: {rows - left} of {rows} rows are left out: {self.said(self.count)}", stacklevel=4)


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
        self.sweep = is_rtl_power(self.layout.names) and not self.layout.skip
        self.roles = Roles(self.path, self.layout, how.columns)
        self.cells: dict[str, int] = {}
        self.faults = _Faults(self.path)
        self.notes: list[str] = []
        self._seen: dict[str, None] = {}

    # Which columns

    def _place(self) -> tuple[int, int, bool] | None:
        """Numbers of the columns of the position, and whether they are degrees; None for a file without."""
        x, y, lon, lat = (self.roles.find(role) for role in ("x", "y", "lon", "lat"))
        if x is not None and y is not None and not (lon is not None and lat is not None and self.how.crs is None):
            return x, y, False
        if x is not None and y is not None:
            return x, y, False
        if lon is not None and lat is not None:
            return lon, lat, True
        if self.how.track is None and self.how.at is None:
            raise UserError(
                f"{self.path}: no columns x and y, nor lat and lon; there are {', '.join(self.layout.names[:30])};"
                " --track FILE joins positions by time, --at LAT,LON gives the one place of all"
            )
        return None

    def _frequency(self) -> tuple[str, list[int]]:
        """How frequencies are known (freq, channel, band, wide, given), and the columns of them."""
        if (found := self.roles.find("freq_mhz")) is not None:
            return "freq", self.roles.family(found)
        if (found := self.roles.find("channel")) is not None and self.how.freq_mhz is None:
            return "channel", self.roles.family(found)
        if (found := self.roles.find("band")) is not None and self.how.freq_mhz is None:
            return "band", [found]
        if self.how.freq_mhz is not None:
            return "given", []
        raise UserError(
            f"{self.path}: no column of frequencies (freq_mhz, EARFCN, band ...): name it (--columns freq_mhz=NAME), or give"
            " one frequency for all (--freq_mhz)"
        )

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

    _count = 0
    _others = 0
    _degrees = True

    def _cells(self, xy: Floats, freq: Floats, rss: Floats, cell: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
        """The strongest of the cells at each place and frequency; a cell's own repeats count with their median."""
        import pandas

        names = list(self.cells)
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

    _cell: int | None = None

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
        powers = sorted(wide) if wide else roles.family(int(power or 0))
        kind, tuned = ("wide", []) if wide else self._frequency()
        if not wide and len(tuned) not in (0, 1, len(powers)):
            raise UserError(f"{self.path}: {len(tuned)} columns of frequencies for {len(powers)} of powers")
        self._cell = roles.named(how.by) if how.by is not None else roles.find("cell")
        if self._cell is not None and len(powers) > 1:
            self._cell = None  # the identity of the first of several values in a row
        if how.by is None and how.only:
            raise UserError("--only takes values of the column that --by names: give --by")
        radio = None if how.radio else roles.find("radio")
        when = self._times() if place is None and how.track is not None else []
        used = [*powers, *tuned, *(place[:2] if place else ()), *when]
        used += [i for i in (self._cell, radio) if i is not None]
        self._degrees = place is None or place[2]
        track = self._track() if place is None and how.track is not None else None
        for _, frame in chunks(self.path, self.layout, used):
            cell, mine = self._identity(frame)
            self._others += int((~mine).sum())
            frame, cell = frame[mine], cell[mine]
            self._count += len(frame) * (1 if len(powers) == 1 else 0)
            lines = frame.index.to_numpy(dtype=np.int64)
            if place is not None:
                a, b, ok = self._position(frame, lines, *place)
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
                    freq, tuned_in = self._tuned(frame, lines, kind, tune, radio, good)
                keep = ok & good & tuned_in
                if len(powers) > 1:
                    self._count += int(keep.sum())
                yield _Rows(a[keep], b[keep], freq[keep], rss[keep], cell[keep])

    def _wide(self) -> dict[int, float]:
        """Column number -> MHz, of a table with a column for each frequency: ``1842.5 MHz``."""
        if self.roles.find("freq_mhz") is not None or self.roles.find("channel") is not None:
            return {}
        if self.roles.find("rss_dbm") is not None:
            return {}
        found = {}
        for i, name in enumerate(self.layout.names):
            if (match := AS_NAME.search(name)) is not None:
                found[i] = float(match[1]) * UNITS[match[2].lower()]
        return found

    # Values of a frame

    def _position(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], a: int, b: int, degrees: bool
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        names = self.layout.names
        found = []
        ok = np.ones(len(frame), dtype=bool)
        for number in (a, b):
            values, odd = numbers(frame[number], comma=self.layout.comma, degrees=degrees)
            self._odd(frame, lines, number, odd)
            empty = np.isnan(values) & ~odd
            self.faults.note(lines[empty & ok], names[number], "is empty")
            ok &= ~empty
            found.append(values)
        if degrees:
            nowhere = ok & (
                ((found[0] == 0) & (found[1] == 0)) | np.isin(found[0], _SENTINELS) | (np.abs(found[0]) > 360)
            )
            self.faults.note(lines[nowhere], f"{names[a]}, {names[b]}", "no position (0, 0 or out of range)")
            ok &= ~nowhere
        return found[0], found[1], ok

    def _odd(self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, odd: NDArray[np.bool_]) -> None:
        if odd.any():
            text = str(frame[number].iloc[int(np.argmax(odd))]).strip()
            self.faults.note(lines[odd], self.layout.names[number], f"'{text}' is no number", fatal=True)

    def _power(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, *, quiet: bool
    ) -> tuple[Floats, NDArray[np.bool_]]:
        c: Column = self.roles.columns[number]
        if c.unit in {"dbuv", "dbuv/m", "dbµv", "mw", "w", "asu"}:
            raise UserError(f"{self.path}: column {c.name} is in {c.unit}, expected dBm: convert it")
        values, odd = numbers(frame[number], comma=self.layout.comma)
        self._odd(frame, lines, number, odd)
        values = values * self.how.sign
        empty = np.isnan(values) & ~odd
        if not quiet:
            self.faults.note(lines[empty], c.name, "is empty")
        outside = np.isfinite(values) & ((values == 0) | (values < RSS_RANGE[0]) | (values > RSS_RANGE[1]))
        if outside.any() and not outside.all():
            text = f"{self.how.sign * values[int(np.argmax(outside))]:g}"
            self.faults.note(lines[outside], c.name, "0 dBm or out of range, which marks missing values", text)
            return values, ~(empty | odd | outside)
        return values, ~(empty | odd)

    def _identity(self, frame: "pandas.DataFrame") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if self._cell is None:
            return np.zeros(len(frame), dtype=np.int64), np.ones(len(frame), dtype=bool)
        text = text_of(frame[self._cell])
        mine = text.isin(list(self.how.only)).to_numpy(dtype=bool) if self.how.only else np.ones(len(text), dtype=bool)
        if self.how.only:
            self._seen.update(dict.fromkeys(text.unique()))
        labels = {name: self.cells.setdefault(name, len(self.cells)) for name in text[mine].unique()}
        return text.map(labels).fillna(-1).to_numpy(dtype=np.int64), mine

    def _tuned(
        self,
        frame: "pandas.DataFrame",
        lines: NDArray[np.int64],
        kind: str,
        number: int | None,
        radio: int | None,
        needed: NDArray[np.bool_],
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """MHz of each row, and where they are known."""
        if number is None:
            return np.full(len(frame), float(self.how.freq_mhz or 0)), np.ones(len(frame), dtype=bool)
        name = self.layout.names[number]
        if kind == "band":
            return self._by_band(frame, lines, number, radio, needed)
        values, odd = numbers(frame[number], comma=self.layout.comma)
        self._odd(frame, lines, number, odd & needed)
        empty = np.isnan(values) & ~odd & needed
        if kind == "freq" and empty.any() and (other := self.roles.find("channel")) is not None and other in frame:
            return self._tuned(frame, lines, "channel", other, radio, needed)
        self.faults.note(lines[empty], name, "is empty")
        if kind == "freq":
            return self._megahertz(values, number), np.isfinite(values)
        if self.roles.columns[number].plain in {"channel", "ch"}:
            values = np.where(values == 0, np.nan, values)  # WiGLE's cells without a channel; no GSM carrier of 935 MHz
            self.faults.note(lines[np.isnan(values) & ~odd & needed & ~empty], name, "is 0, no channel")
            empty = np.isnan(values) & ~odd & needed
        mhz = np.full(len(values), np.nan)
        known = np.zeros(len(values), dtype=bool)
        for word, rows in self._radios(frame, lines, number, radio, needed & ~empty & ~odd):
            mhz[rows] = channel_mhz(values[rows], word)
            known[rows] = True
        bad = known & np.isnan(mhz)
        self.faults.note(lines[bad], name, "is no channel", f"{values[bad][0]:g}" if bad.any() else "")
        return mhz, known & ~bad

    def _radios(
        self,
        frame: "pandas.DataFrame",
        lines: NDArray[np.int64],
        number: int,
        radio: int | None,
        rows: NDArray[np.bool_],
    ) -> Iterable[tuple[str, NDArray[np.bool_]]]:
        plain = self.roles.columns[number].plain
        own = self.how.radio or next((r for part, r in _CHANNEL_RADIO if part in plain), None)
        if plain == "bcch" or (plain.endswith("scanned_arfcn") and own is None):
            own = "gsm"
        if own is None and radio is None and self.roles.find("cell") is not None:
            wifi = self.roles.columns[self.roles.find("cell") or 0].plain in {"bssid", "mac"}
            own = "wifi" if wifi and plain in {"channel", "ch"} else None
        if own is not None:
            yield own, rows
            return
        if radio is None:
            raise UserError(
                f"{self.path}: column {self.layout.names[number]} holds channels of an unknown radio: give --radio"
                f" {' | '.join(RADIOS)}, or --columns freq_mhz=NAME"
            )
        words = text_of(frame[radio])
        left = rows.copy()
        for word in words[rows].unique():
            of_it = rows & (words == word).to_numpy(dtype=bool)
            if (known := radio_of(word)) is not None:
                left &= ~of_it
                yield known, of_it
        if left.any():
            text = str(words.iloc[int(np.argmax(left))])
            self.faults.note(lines[left], self.layout.names[radio], "no radio whose channels are known", text)

    def _megahertz(self, values: Floats, number: int) -> Floats:
        c = self.roles.columns[number]
        if c.unit in UNITS:
            return values * UNITS[c.unit]
        top = np.nanmax(values) if np.isfinite(values).any() else 1.0
        unit = "mhz"
        if top < 10:
            unit = "ghz"
        elif top >= 3e7:
            unit = "hz"
        elif top > 1.2e5:
            unit = "khz"
        if unit != "mhz":
            if "mhz" in c.plain:
                return values
            shown = {"ghz": "GHz", "khz": "kHz", "hz": "Hz"}[unit]
            self.notes.append(f"column {c.name} is read as {shown}, by its range")
        return values * UNITS[unit]

    def _by_band(
        self,
        frame: "pandas.DataFrame",
        lines: NDArray[np.int64],
        number: int,
        radio: int | None,
        needed: NDArray[np.bool_],
    ) -> tuple[Floats, NDArray[np.bool_]]:
        name = self.layout.names[number]
        text = text_of(frame[number])
        words = text_of(frame[radio]) if radio is not None else None
        mhz = np.full(len(text), np.nan)
        for key in text.unique():
            rows = (text == key).to_numpy(dtype=bool)
            own = self.how.radio or (radio_of(str(words[rows].iloc[0])) if words is not None else None)
            mhz[rows] = band_mhz(str(key), own)
        bad = np.isnan(mhz) & needed
        example = str(text.iloc[int(np.argmax(bad))]) if bad.any() else ""
        self.faults.note(lines[bad], name, "no band that is known (for bare numbers give --radio lte or nr)", example)
        self.notes.append(f"column {name} says bands: the middle of each one's downlink is taken as its frequency")
        return mhz, np.isfinite(mhz)

    # Positions by time

    def _times(self) -> list[int]:
        date = [i for i, c in enumerate(self.roles.columns) if c.plain == "date"]
        time = self.roles.find("time")
        if time is None:
            raise UserError(f"{self.path}: no column of times to join --track by: name it (--columns time=NAME)")
        return [*date, time] if date and date[0] != time else [time]

    def _track(self) -> "pandas.DataFrame":
        """Times and positions of the track, in order."""
        import pandas

        path = Path(str(self.how.track))
        layout = layout_of(path)
        roles = Roles(path, layout, {})
        when, lon, lat = roles.find("time"), roles.find("lon"), roles.find("lat")
        if when is None or lon is None or lat is None:
            raise UserError(
                f"--track {path}: expected columns of time, lat and lon; there are {', '.join(layout.names)}"
            )
        parts = []
        for _, frame in chunks(path, layout, [when, lon, lat]):
            time = moments(text_of(frame[when]))
            values = [numbers(frame[i], comma=layout.comma, degrees=True)[0] for i in (lon, lat)]
            parts.append(pandas.DataFrame({"time": time, "lon": values[0], "lat": values[1]}))
        track = pandas.concat(parts).dropna().sort_values("time")
        if track.empty:
            raise UserError(f"--track {path}: no row has a time and a position")
        return track

    def _tracked(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], when: Sequence[int], track: "pandas.DataFrame"
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        import pandas

        text = text_of(frame[when[0]])
        for number in when[1:]:
            text = text + " " + text_of(frame[number])
        left = pandas.DataFrame({"time": moments(text).to_numpy(), "row": np.arange(len(frame))})
        bad = left["time"].isna().to_numpy()
        self.faults.note(lines[bad], self.layout.names[when[-1]], "is no time")
        left = left[~bad].sort_values("time")
        near = pandas.merge_asof(left, track, on="time", direction="nearest", tolerance=pandas.Timedelta(seconds=5))
        a, b = np.full(len(frame), np.nan), np.full(len(frame), np.nan)
        a[near["row"].to_numpy()], b[near["row"].to_numpy()] = near["lon"].to_numpy(), near["lat"].to_numpy()
        lost = np.isnan(a) & ~bad
        self.faults.note(lines[lost], "", "no position in the track within 5 seconds")
        return a, b, np.isfinite(a)

    def _sweeps(self) -> Iterable[_Rows]:
        """rtl_power: each line is a part of a sweep, whose bins begin at Hz low."""
        import pandas

        how = self.how
        if how.track is None and how.at is None:
            raise UserError(
                f"{self.path}: sweeps of rtl_power have no positions: --track FILE joins them by time, --at LAT,LON gives the"
                " one place of all"
            )
        self.notes.append("rtl_power's levels are relative to the receiver's full scale: differences hold, dBm do not")
        track = None if how.track is None else self._track()
        with self.path.open(encoding=self.layout.encoding, newline="") as file:
            kept = [(n, split(line, ",")) for n, line in enumerate(file, 1) if line.strip()]
        lines = np.array([n for n, _ in kept], dtype=np.int64)
        for n, fields in kept:
            if not is_rtl_power(fields):
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
        for i, (_, fields) in enumerate(kept):
            level = np.array([float(f) if f.lower() not in {"nan", ""} else np.nan for f in fields[6:]])
            mhz = (float(fields[2]) + np.arange(len(level)) * float(fields[4])) / 1e6
            good = np.isfinite(level) & ok[i]
            if how.freq_mhz is not None:
                step = float(fields[4]) / 1e6
                good &= np.abs(mhz - how.freq_mhz) <= step / 2
                mhz = np.full(len(mhz), how.freq_mhz)
            n = int(good.sum())
            yield _Rows(np.full(n, a[i]), np.full(n, b[i]), mhz[good], level[good], np.zeros(n, dtype=np.int64))


def moments(text: "pandas.Series[Any]") -> "pandas.Series[Any]":
    """Times of any usual notation, in UTC where they say no zone; seconds or milliseconds since 1970 where they are numbers."""
    import pandas

    count = pandas.to_numeric(text, errors="coerce")
    if count.notna().mean() > 0.9 and float(count.median()) > 1e8:
        unit: Any = "ms" if float(count.median()) > 1e11 else "s"
        return pandas.to_datetime(count, unit=unit, errors="coerce", utc=True).astype("datetime64[ns, UTC]")
    cleaned = text.str.replace("_", " ", regex=False).str.replace(r"^(\d{4})\.(\d\d)\.(\d\d)", r"\1-\2-\3", regex=True)
    return pandas.to_datetime(cleaned, errors="coerce", utc=True, format="mixed").astype("datetime64[ns, UTC]")


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
    faults = _Faults(path)
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
