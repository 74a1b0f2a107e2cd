"""What is wrong with the rows of a file, collected, and said in one message."""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radiogat.roles import Missing
from tenfold import UserError

Floats = NDArray[np.float64]
_GAP = 10.0
"""dB that a value must lie apart from all others to look like a mark of missing ones."""
_OFTEN = 3
"""Times that such a value stands in a file at least."""


def apart(rss: Floats, sign: int = 1) -> list[str]:
    """What is to be said of a lowest or highest power that stands often and far from all others, as marks of missing ones do.

    Args:
        rss: powers.
        sign: -1 where the file has their negatives.
    """
    levels, times = np.unique(rss, return_counts=True)
    said: list[str] = []
    if len(levels) < 2:
        return said
    low, high = float(levels[0]), float(levels[-1])
    for level, count, gap in ((low, times[0], levels[1] - low), (high, times[-1], high - levels[-2])):
        if count >= _OFTEN and gap >= _GAP:
            ends = (low + gap / 2, high) if level == low else (low, high - gap / 2)
            first, last = sorted(sign * end for end in ends)
            said.append(
                f"{sign * level:g} stands {count} times, {gap:.3g} dB from every other value; if it marks missing ones,"
                f" --range {first:.4g},{last:.4g} leaves it out"
            )
    return said


@dataclasses.dataclass
class Faults:
    """What is wrong with a file's rows, by kind, with the line of the first.

    Args:
        path: the file, for messages.
    """

    path: Path
    count: dict[str, int] = dataclasses.field(default_factory=dict)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    fatal: set[str] = dataclasses.field(default_factory=set)

    def note(self, lines: NDArray[np.int64], name: str, what: str, example: str = "", *, fatal: bool = False) -> None:
        """Count rows of one fault; a fatal one cannot be left out."""
        if not len(lines):
            return
        kind = f"column {name}: {what}" if name else what
        self.first.setdefault(kind, f"line {lines[0]}, {kind}" + (f" ('{example}')" if example else ""))
        self.count[kind] = self.count.get(kind, 0) + len(lines)
        if fatal:
            self.fatal.add(kind)

    def said(self, kinds: Iterable[str]) -> str:
        """Faults of some kinds in words."""
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
