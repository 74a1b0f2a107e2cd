"""`genview status`: how far the workers are."""

import sys

from genview import runner
from genview.config import StatusSettings
from genview.plans import Plan
from genview.store import ViewStore
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import table, track

SHOWN = 5
"""Faults that are printed."""


def run(settings: StatusSettings, invocation: Invocation) -> None:
    """Print progress, rate and what failed; with --verify, read every file."""
    plan = Plan.read(settings.plan)
    store = ViewStore.open(settings.views)
    if store.head["plan"] != plan.id:
        raise UserError(f"--views {settings.views} was made by another plan ({store.head['plan']}, this is {plan.id})")
    rows = store.rows()
    lost = [row for row in rows.values() if row.status == "ok" and not store.is_there(row)]
    gone = {row.name for row in lost}
    found = runner.progress(plan, {name: row for name, row in rows.items() if name not in gone})
    workers = [[name, count, f"{rate:.3g}"] for name, (count, rate) in found.workers.items()]
    if workers:
        sys.stdout.write(table(["worker", "views", "views per second"], workers) + "\n\n")
    share = 100 * found.done / max(1, found.planned)
    left = "nothing is left" if found.done + found.errors >= found.planned else "nobody has worked for five minutes"
    if found.seconds is not None and found.done + found.errors < found.planned:
        left = f"{found.seconds / 60:.1f} minutes left at {found.rate:.3g} views per second"
    sys.stdout.write(
        f"{found.done} of {found.planned} views are there ({share:.1f} %), {found.errors} failed; {left}\n"
    )
    for row in [row for row in rows.values() if row.status != "ok"][:SHOWN]:
        sys.stdout.write(f"failed: {row.key}: {row.error}\n")
    if lost:
        names = ", ".join(row.path for row in lost[:SHOWN])
        sys.stdout.write(
            f"{len(lost)} views were written and are gone or cut short: {names}; generate makes them again\n"
        )
    if settings.verify:
        good = [row for row in rows.values() if row.status == "ok"]
        faults = [fault for row in track(good, "files", quiet=invocation.quiet) if (fault := store.fault(row))]
        if faults:
            more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise UserError(
                f"--views {settings.views}: {len(faults)} of {len(good)} files are not as they were written, delete them and"
                f" generate again: {'; '.join(faults[:SHOWN])}{more}"
            )
        sys.stdout.write(f"all {len(good)} files are as they were written\n")
