"""One worker of a generation: its share of the units, in batches of one level, each picture followed by its row."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genview.generators import ViewGenerator
from genview.plans import Plan, PlanRow
from genview.store import Stored, ViewStore, now
from tenfold import UserError, distributed

Conditions = Callable[[Sequence[PlanRow]], tuple[Tensor, dict[int, str]]]
"""Rows -> conditions of those that can be read, and why the others (by place) cannot."""
BLACK = "black all over: blanked by the pipeline's safety checker, or its number format has overflowed (--dtype bf16)"
RECENT = 300.0
"""Seconds over which the rate of workers is measured."""


def shard_of(text: str) -> tuple[int, int]:
    """Number and count of a worker, of ``I/N`` or, for auto, of the variables of torchrun and Slurm.

    Raises:
        UserError: auto where no launcher has set them.
    """
    if text != "auto":
        first, _, last = text.partition("/")
        return int(first), int(last)
    for number, count, start in (
        ("RANK", "WORLD_SIZE", 0),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", int(os.environ.get("SLURM_ARRAY_TASK_MIN") or 0)),
        ("SLURM_PROCID", "SLURM_NTASKS", 0),
    ):
        if number in os.environ and count in os.environ:
            found = int(os.environ[number]) - start, int(os.environ[count])
            if not 0 <= found[0] < found[1]:
                raise UserError(
                    f"--shard auto: {number} and {count} give {found[0]}/{found[1]}: number tasks in steps of 1"
                )
            return found
    raise UserError("--shard auto: neither torchrun nor Slurm has set RANK, SLURM_ARRAY_TASK_ID or SLURM_PROCID")


def embeddings_or_pictures(plan: Plan, generator: ViewGenerator, read: Callable[[int], Tensor]) -> Conditions:
    """Conditions for a generator: kept embeddings where the plan has them, else of pictures that are read now.

    Args:
        plan: the plan.
        generator: the generator.
        read: number of a picture -> (3, H, W) in [0, 1]; raises UserError where it cannot be decoded.
    """

    def conditions(rows: Sequence[PlanRow]) -> tuple[Tensor, dict[int, str]]:
        if generator.needs == "embedding" and plan.embeddings is not None:
            return plan.embedding(rows), {}
        found, faults = [], {}
        for place, row in enumerate(rows):
            try:
                found.append(generator.embed(read(row.picture)[None]))
            except UserError as error:
                faults[place] = str(error)
        return torch.cat(found) if found else torch.empty(0), faults

    return conditions


def make_batch(
    rows: Sequence[PlanRow], store: ViewStore, generator: ViewGenerator, conditions: Conditions
) -> tuple[int, int]:
    """Generate and store one batch of rows of one level; returns how many were made and how many failed.

    A picture that cannot be read becomes a row with status error, and so does a view that is black all over.
    """
    start = time.perf_counter()
    found, faults = conditions(rows)
    good = [row for place, row in enumerate(rows) if place not in faults]
    for place, fault in faults.items():
        store.fail(rows[place], fault)
    if good:
        pixels = generator.generate(
            found,
            good[0].level,
            [row.seed for row in good],
            guidance=good[0].guidance,
            prompts=[row.prompt for row in good],
        )
        ms = 1000 * (time.perf_counter() - start) / len(good)
        for row, image in zip(good, pixels, strict=True):
            if image.any():
                store.add(row, image, ms=ms)
            else:
                store.fail(row, BLACK)
    black = sum(not image.any() for image in pixels) if good else 0
    return len(good) - black, len(faults) + black


def batches(units: Iterable[Sequence[PlanRow]], done: set[tuple[str, int]], size: int) -> list[list[PlanRow]]:
    """What is left of the units, in batches of one level."""
    out = []
    for unit in units:
        left = [row for row in unit if row.name not in done]
        out += [left[start : start + size] for start in range(0, len(left), size)]
    return out


def run_shard(
    plan: Plan,
    store: ViewStore,
    generator: ViewGenerator,
    conditions: Conditions,
    *,
    shard: tuple[int, int] = (0, 1),
    batch_size: int = 16,
    show: Callable[[list[list[PlanRow]]], Iterable[list[PlanRow]]] = iter,
) -> tuple[int, int]:
    """Do a worker's share; returns how many views were made and how many failed. What is there is never made again.

    Args:
        plan: the plan.
        store: the folder, opened for this worker's part.
        generator: the generator.
        conditions: what it is conditioned on.
        shard: number and count of the workers.
        batch_size: pictures at once.
        show: passes batches through and shows how far they are.
    """
    made = failed = 0
    mine = distributed.split(plan.units(), *shard)
    for batch in show(batches(mine, store.done(), batch_size)):
        one, other = make_batch(batch, store, generator, conditions)
        made, failed = made + one, failed + other
    return made, failed + (record_errors(plan, store) if shard[0] == 0 else 0)


def record_errors(plan: Plan, store: ViewStore) -> int:
    """Write rows for the pictures that the plan could not read; returns how many are new."""
    known = store.rows()
    broken = [row for row in plan.rows if row.error and row.name not in known]
    for row in broken:
        store.fail(row, row.error)
    return len(broken)


@dataclass(frozen=True)
class Progress:
    """How far a generation is.

    Attributes:
        planned: rows of the plan.
        done: views that are there.
        errors: rows that failed.
        rate: views per second of all workers together, over the last minutes.
        seconds: seconds that are left at this rate; None where nobody works.
        workers: views and rate of each part.
    """

    planned: int
    done: int
    errors: int
    rate: float
    seconds: float | None
    workers: Mapping[str, tuple[int, float]]


def progress(plan: Plan, rows: Mapping[tuple[str, int], Stored], *, at: float | None = None) -> Progress:
    """How far the workers are, from their rows."""
    at = now() if at is None else at
    wanted = {row.name for row in plan.rows}
    mine = [row for name, row in rows.items() if name in wanted]
    good = [row for row in mine if row.status == "ok"]
    parts: dict[str, list[float]] = {}
    for row in good:
        parts.setdefault(row.worker, []).append(row.at)
    workers = {name: (len(times), _rate(times, at)) for name, times in sorted(parts.items())}
    rate = sum(part[1] for part in workers.values())
    left = len(wanted) - len(mine)
    return Progress(len(wanted), len(good), len(mine) - len(good), rate, left / rate if rate > 0 else None, workers)


def _rate(times: Sequence[float], at: float) -> float:
    """Views per second of a worker over the last minutes; 0 where it has stopped."""
    recent = [t for t in times if at - t <= RECENT]
    span = at - min(recent) if recent else 0.0
    return len(recent) / span if span > 0 else 0.0


def head_of(plan: Plan, generator: ViewGenerator, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for all views of a folder; a change of any of it is refused."""
    return {"plan": plan.id, "generator": generator.id, **settings}
