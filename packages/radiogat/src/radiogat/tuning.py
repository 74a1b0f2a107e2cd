"""Frequencies of the rows of a log: given in some unit, as channel numbers of some radio, or as bands."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radiogat.channels import RADIOS, band_mhz, channel_mhz, radio_of
from radiogat.faults import Faults
from radiogat.roles import UNITS, Reading, Roles, frequency_in
from radiogat.tables import Layout, numbers, text_of
from tenfold import UserError

if TYPE_CHECKING:
    import pandas

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_CHANNEL_RADIO = (
    ("earfcn", "lte"),
    ("nr_arfcn", "nr"),
    ("nrarfcn", "nr"),
    ("nr_dl", "nr"),
    ("ssb", "nr"),
    ("uarfcn", "umts"),
)


class Tuner:
    """Megahertz of a file's rows.

    Args:
        path: the file, for messages.
        layout: how it is written.
        roles: which column means what.
        how: what the user said about the file.
        faults: where rows without a frequency are noted.
        notes: where it is noted what was made of the numbers.
    """

    def __init__(
        self, path: Path, layout: Layout, roles: Roles, how: Reading, faults: Faults, notes: list[str]
    ) -> None:
        self.path, self.layout, self.roles, self.how = path, layout, roles, how
        self.faults, self.notes = faults, notes
        self.radio = None if how.radio else roles.find("radio")
        self._units: dict[int, str] = {}

    def source(self) -> tuple[str, list[int]]:
        """How frequencies are known (freq, channel, band, given), and the columns of them.

        Raises:
            UserError: they are not.
        """
        kinds = (("freq", "freq_mhz"), ("channel", "channel"), ("band", "band"))
        found = next(((kind, number) for kind, role in kinds if (number := self.roles.find(role)) is not None), None)
        if self.how.freq_mhz is not None:
            if found is not None:
                name = self.layout.names[found[1]]
                self.notes.append(f"all values are taken as of {self.how.freq_mhz:g} MHz: column {name} is not read")
            return "given", []
        if found is not None:
            return found[0], [found[1]] if found[0] == "band" else self.roles.family(found[1])
        raise UserError(
            f"{self.path}: no column of frequencies (freq_mhz, EARFCN, band ...): name it (--columns freq_mhz=NAME), or give"
            " one frequency for all (--freq_mhz)"
        )

    def others(self, kind: str) -> list[int]:
        """Columns that are read besides those of ``source``: the radio, and channels for rows that have no frequency."""
        spare = self.roles.find("channel") if kind == "freq" else None
        return [number for number in (self.radio, spare) if number is not None]

    def tuned(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], kind: str, number: int | None, needed: Bools
    ) -> tuple[Floats, Bools]:
        """MHz of each row, and where they are known.

        Args:
            frame: some rows.
            lines: their line numbers.
            kind: of ``source``.
            number: the column; None for the one given frequency.
            needed: rows whose power is known.
        """
        if number is None:
            return np.full(len(frame), float(self.how.freq_mhz or 0)), np.ones(len(frame), dtype=bool)
        if kind == "band":
            return self._by_band(frame, lines, number, needed)
        if kind == "channel":
            return self._by_channel(frame, lines, number, needed)
        name = self.layout.names[number]
        values, odd, given = self._frequencies(frame, number)
        if (odd & needed).any():
            text = str(frame[number].iloc[int(np.argmax(odd & needed))]).strip()
            self.faults.note(lines[odd & needed], name, f"'{text}' is no number", fatal=True)
        values[values == 0] = np.nan  # what a phone writes for a cell whose frequency it does not know
        empty = np.isnan(values) & ~odd & needed
        mhz = np.where(given, values, self._megahertz(np.where(given, np.nan, values), number))
        known = np.isfinite(values)
        spare = self.roles.find("channel")
        if empty.any() and spare is not None and spare in frame and self._can_tell(spare):
            also = numbers(frame[spare], comma=self.layout.comma)[0]
            has = empty & np.isfinite(also) & (also != 0)
            if has.any():
                of_channel, found = self._by_channel(frame, lines, spare, has)
                mhz, known, empty = np.where(has, of_channel, mhz), known | found, empty & ~has
        self.faults.note(lines[empty], name, "is empty")
        return mhz, known

    def _frequencies(self, frame: "pandas.DataFrame", number: int) -> tuple[Floats, Bools, Bools]:
        """Numbers, which hold text that is none, and which said their unit (1.8 GHz) and are MHz."""
        values, odd = numbers(frame[number], comma=self.layout.comma)
        given = np.zeros(len(values), dtype=bool)
        if odd.any():
            for i in np.flatnonzero(odd):
                if (mhz := frequency_in(str(frame[number].iloc[i]))) is not None:
                    values[i], given[i], odd[i] = mhz, True, False
        return values, odd, given

    def _megahertz(self, values: Floats, number: int) -> Floats:
        """Values in the unit of their column, or the one that their range says.

        Raises:
            UserError: one part of the file looks like another unit than an earlier one.
        """
        c = self.roles.columns[number]
        if c.unit in UNITS:
            return values * UNITS[c.unit]
        if "mhz" in c.plain or not np.isfinite(values).any():
            return values
        top = float(np.nanmax(values))
        unit = "ghz" if top < 10 else "hz" if top >= 3e7 else "khz" if top > 1.2e5 else "mhz"
        if self._units.setdefault(number, unit) != unit:
            raise UserError(
                f"{self.path}: column {c.name} is {top:g} in one part and looks like {_UNIT[self._units[number]]} in another:"
                " say its unit in its name, as in freq_mhz"
            )
        if unit != "mhz":
            self.notes.append(f"column {c.name} is read as {_UNIT[unit]}, by its range")
        elif top < 100 or top > 72000:
            other = "GHz" if top < 100 else "kHz"
            self.notes.append(f"column {c.name} is read as MHz, up to {top:g}; if it is {other}, say so in its name")
        return values * UNITS[unit]

    def _can_tell(self, number: int) -> bool:
        """Whether it is known what radio a column of channels belongs to."""
        return self._own_radio(number) is not None or self.radio is not None

    def _own_radio(self, number: int) -> str | None:
        """The radio that is given, or that the column's name says."""
        plain = self.roles.columns[number].plain
        own = self.how.radio or next((r for part, r in _CHANNEL_RADIO if part in plain), None)
        if plain == "bcch" or (plain.endswith("scanned_arfcn") and own is None):
            own = "gsm"
        if own is None and self.radio is None and (cell := self.roles.find("cell")) is not None:
            wifi = self.roles.columns[cell].plain in {"bssid", "mac"} and plain in {"channel", "ch"}
            own = "wifi" if wifi else None
        return own

    def _by_channel(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, needed: Bools
    ) -> tuple[Floats, Bools]:
        name = self.layout.names[number]
        values, odd = numbers(frame[number], comma=self.layout.comma)
        if (odd & needed).any():
            text = str(frame[number].iloc[int(np.argmax(odd & needed))]).strip()
            self.faults.note(lines[odd & needed], name, f"'{text}' is no number", fatal=True)
        empty = np.isnan(values) & ~odd & needed
        self.faults.note(lines[empty], name, "is empty")
        if self.roles.columns[number].plain in {"channel", "ch"}:
            zero = (values == 0) & needed  # WiGLE's cells without a channel; no GSM carrier of 935 MHz
            self.faults.note(lines[zero], name, "is 0, no channel")
            values = np.where(values == 0, np.nan, values)
        asked = needed & np.isfinite(values)
        mhz, known = np.full(len(values), np.nan), np.zeros(len(values), dtype=bool)
        for word, rows in self._radios(frame, lines, number, asked):
            mhz[rows] = channel_mhz(values[rows], word)
            known[rows] = True
            if word == "gsm" and ((values[rows] >= 512) & (values[rows] <= 810)).any():
                self.notes.append(
                    f"column {name}: GSM's channels 512 to 810 are read as DCS 1800; in the Americas they are PCS 1900"
                    " (--radio pcs)"
                )
        bad = known & np.isnan(mhz)
        self.faults.note(lines[bad], name, "is no channel", f"{values[bad][0]:g}" if bad.any() else "")
        return mhz, known & ~bad

    def _radios(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, rows: Bools
    ) -> Iterable[tuple[str, Bools]]:
        """Radios, each with its rows.

        Raises:
            UserError: nothing says which radio the channels belong to.
        """
        if (own := self._own_radio(number)) is not None:
            yield own, rows
            return
        if self.radio is None:
            raise UserError(
                f"{self.path}: column {self.layout.names[number]} holds channels of an unknown radio: give --radio"
                f" {' | '.join(RADIOS)}, or --columns freq_mhz=NAME"
            )
        words = text_of(frame[self.radio])
        left = rows.copy()
        for word in words[rows].unique():
            of_it = rows & (words == word).to_numpy(dtype=bool)
            if (known := radio_of(word)) is not None:
                left &= ~of_it
                yield known, of_it
        if left.any():
            text = str(words.iloc[int(np.argmax(left))])
            self.faults.note(lines[left], self.layout.names[self.radio], "no radio whose channels are known", text)

    def _by_band(
        self, frame: "pandas.DataFrame", lines: NDArray[np.int64], number: int, needed: Bools
    ) -> tuple[Floats, Bools]:
        name = self.layout.names[number]
        text = text_of(frame[number])
        words = text_of(frame[self.radio]) if self.radio is not None else None
        mhz = np.full(len(text), np.nan)
        for key in text.unique():
            own = (text == key).to_numpy(dtype=bool)
            for word in [None] if words is None else words[own].unique():
                rows = own if words is None else own & (words == word).to_numpy(dtype=bool)
                radio = self.how.radio or (None if word is None else radio_of(str(word)))
                mhz[rows] = band_mhz(str(key), radio)
        bad = np.isnan(mhz) & needed
        example = str(text.iloc[int(np.argmax(bad))]) if bad.any() else ""
        self.faults.note(lines[bad], name, "no band that is known (for bare numbers give --radio lte or nr)", example)
        self.notes.append(f"column {name} says bands: the middle of each one's downlink is taken as its frequency")
        return mhz, np.isfinite(mhz)


_UNIT = {"hz": "Hz", "khz": "kHz", "mhz": "MHz", "ghz": "GHz"}
