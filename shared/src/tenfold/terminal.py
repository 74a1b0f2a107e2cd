"""What people see at a terminal: progress, tables, claims."""

import re
import sys
import textwrap
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None, *, quiet: bool = False) -> Iterator[T]:
    """Pass ``items`` through and show on stderr how far they are.

    On a terminal a bar with rate and remaining time; elsewhere a plain line every five seconds at most; nothing when
    ``quiet`` or when all is over sooner.
    """
    if total is None and isinstance(items, typing.Sized):
        total = len(items)
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(f"{task.speed:.3g}/s" if task.speed else "")

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=description)
    else:
        start = shown = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - shown >= 5:
                shown, rate_per_second = now, done / (now - start)
                left = f"/{total}, {(total - done) / rate_per_second:.0f} s left" if total and done else ""
                sys.stderr.write(f"{description}: {done}{left} ({rate_per_second:.3g}/s)\n")
            yield item


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Plain text table: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [
        all(re.fullmatch(r"[-+]?[\d.,]+(e[-+]?\d+)?|-|nan|", row[i]) for row in cells) for i in range(len(headers))
    ]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def claims_table(summary: dict[str, Any]) -> str:
    """The claims of one summary under a line that says what was run; long claims are broken to fit a terminal."""
    from tenfold.claims import claim_rows

    headers, rows = claim_rows([summary])
    start = headers.index("claim")  # what stands before is the same in all rows
    broken = []
    for row in rows:
        first, *more = textwrap.wrap(row[start], 64)
        broken.append([first, *row[start + 1 :]])
        broken += [[line, *[""] * (len(headers) - start - 1)] for line in more]
    seeds = ", ".join(map(str, summary["seeds"]))
    level = f", level {summary['level']}" if summary["level"] else ""
    head = f"{summary['package']} {summary['command']}{level}, seeds {seeds}: {summary['seconds']:.0f} s"
    return f"{head}\n\n{table(headers[start:], broken)}\n" if rows else f"{head}, no claims\n"


def show_claims(summary: dict[str, Any], *, strict: bool = False) -> int:
    """Print a summary's claims and notes to stdout; the exit code is 1 when one fails under ``strict``."""
    sys.stdout.write(claims_table(summary) + "\n" * bool(summary["notes"]))
    for note in summary["notes"]:
        sys.stdout.write(textwrap.fill(note, 110, initial_indent="note: ", subsequent_indent="      ") + "\n")
    return int(strict and any(claim["holds"] is False for claim in summary["claims"]))
