"""Side by side with a peer in one run: equality first, then alternating timings, as ratios with an interval."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tenfold.claims import Bound, interval
from tenfold.files import replacing

T = TypeVar("T")
_ENOUGH_PAIRS = 21
"""Pairs from which on an interval decides a bound within 10 % of 1."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of ``bench.json``: ``ratio`` is peer / ours, so above 1 is better."""

    id: str
    shape: str
    ours: float
    peer: float
    unit: str
    statistic: str
    ratio: float
    ci95: tuple[float, float] | None
    required: str
    holds: bool | None
    equal: str


def compare(
    id: str,
    ours: Callable[[], T],
    peer: Callable[[], T],
    equal: Callable[[T, T], str],
    *,
    shape: str,
    required: str,
    pairs: int = 9,
    warm_up: int = 1,
    common: Callable[[], object] | None = None,
) -> Comparison:
    """Check that both compute the same, then time them in turn: ours, peer, ours, peer ...

    Args:
        id: name of the row.
        ours: our computation, without arguments.
        peer: the peer's, at its fastest documented setting, same dtype and threads.
        equal: takes both results; raises ``AssertionError`` when they differ, else says in which sense they agree.
        shape: the size of the problem, for the table.
        required: bound on the ratio, ``">= 2.5"``. A bound within 10 % of 1 is decided from 21 pairs or more only.
        pairs: number of alternating pairs.
        warm_up: uncounted pairs before them.
        common: work that both contain and that is not compared; timed in each pair, too, and its time taken off both.

    Returns:
        Median seconds of both, the median of the pairwise ratios and its bootstrap interval.
    """
    agreement = equal(ours(), peer())
    seconds = np.zeros((warm_up + pairs, 3))
    for pair in seconds:
        for column, function in enumerate((ours, peer, common)):
            if function is not None:
                start = time.perf_counter()
                function()
                pair[column] = time.perf_counter() - start
    seconds = seconds[warm_up:, :2] - seconds[warm_up:, 2:]
    ratios = seconds[:, 1] / seconds[:, 0]
    drawn = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    ratio = float(np.median(ratios))
    return Comparison(
        id=id,
        shape=shape,
        ours=float(np.median(seconds[:, 0])),
        peer=float(np.median(seconds[:, 1])),
        unit="s",
        statistic=f"median of {pairs} alternating pairs" + (", without what both contain" if common else ""),
        ratio=ratio,
        ci95=(float(low), float(high)),
        required=required,
        holds=decide(required, ratio, (float(low), float(high)), pairs=pairs),
        equal=agreement,
    )


def decide(
    required: str, ratio: float, ci95: tuple[float, float] | None = None, *, pairs: int = 0, counted: bool = False
) -> bool | None:
    """Whether a ratio meets its bound: the one rule of all rows.

    A bound within 10 % of 1 is decided from what was counted (rows, bytes of tensors, operations), or from 21 pairs or
    more; otherwise it stays open (None), since the machine's scatter is as large.

    Args:
        required: ``">= 2.5"``.
        ratio: peer / ours.
        ci95: its interval, where there is one; all of it has to meet the bound.
        pairs: number of pairs behind the interval.
        counted: whether the numbers are counts, the same in every run.
    """
    bound = Bound.parse(required)
    if 0.9 < bound.value < 1.1 and not counted and pairs < _ENOUGH_PAIRS:
        return None
    return bound.decide(ratio, ci95)


def counted(
    id: str,
    ours: float,
    peer: float,
    *,
    shape: str,
    unit: str,
    required: str,
    equal: str,
    statistic: str = "counted; the same in every run",
    ratio: float | None = None,
) -> Comparison:
    """A row of what was counted: bytes of tensors, operations, rows.

    Args:
        id: name of the row.
        ours: our count.
        peer: the peer's.
        shape: the size of the problem.
        unit: unit of both.
        required: bound on the ratio.
        equal: in which sense both compute the same.
        statistic: what was counted, and how.
        ratio: what the bound is about, where it is not peer / ours.
    """
    found = peer / ours if ratio is None else ratio
    holds = decide(required, found, counted=True)
    return Comparison(id, shape, ours, peer, unit, statistic, found, None, required, holds, equal)


def resident(
    id: str,
    ours: Sequence[str],
    peer: Sequence[str],
    idle: Sequence[str],
    *,
    shape: str,
    required: str,
    equal: str,
    runs: int = 3,
    environment: Mapping[str, str] | None = None,
) -> Comparison:
    """A row of resident memory: the peak of processes that compute, less that of one that does all but the computation.

    Args:
        id: name of the row.
        ours: command of our computation: the executable's path and its arguments.
        peer: command of the peer's.
        idle: command that imports and prepares the same, and computes nothing.
        shape: the size of the problem.
        required: bound on the ratio.
        equal: in which sense both compute the same.
        runs: processes of each command, in turn; their medians are compared.
        environment: variables on top of this process's, such as settings of the allocator.

    Raises:
        CalledProcessError: a command failed.
    """
    peaks = np.asarray([[peak_rss(command, environment) for command in (ours, peer, idle)] for _ in range(runs)])
    a, b, nothing = np.median(peaks, axis=0)
    mine, theirs = max(float(a - nothing), 1.0), float(b - nothing)
    statistic = f"peak resident size of a process, less one that computes nothing; median of {runs}"
    holds = decide(required, theirs / mine)
    return Comparison(id, shape, mine, theirs, "MB", statistic, theirs / mine, None, required, holds, equal)


_LAUNCHER = """
import os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def peak_rss(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """Peak resident size in MB (10^6 bytes) of a process that runs ``command``.

    A process inherits the peak of the one that starts it, so a benchmark that has grown large would measure itself; a
    small one in between starts the command.

    Args:
        command: the executable's path and its arguments.
        environment: variables on top of this process's, such as settings of the allocator.

    Raises:
        CalledProcessError: the command failed; what it wrote to stderr has been shown.
    """
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *command]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(launcher, check=True, stdout=subprocess.PIPE, text=True, env=variables)  # noqa: S603
    return float(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024) / 1e6


def machine() -> dict[str, Any]:
    """The processor's name and the number of threads that torch (or numpy) uses."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    torch = sys.modules.get("torch")
    return {"cpu": cpu, "threads": torch.get_num_threads() if torch else None, "python": platform.python_version()}


def write(path: str | Path, package: str, peers: dict[str, str], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Write ``bench.json`` whole or not at all, and return what it holds."""
    rows = [dataclasses.asdict(row) for row in comparisons]
    bench = {"package": package, "machine": machine(), "peers": peers, "comparisons": rows}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(bench, indent=1) + "\n", encoding="utf-8")
    return bench


def rows(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of a benchmark's comparisons."""
    verdict = {True: "yes", False: "NO", None: "not decided"}
    headers = ["comparison", "shape", "ours", "peer", "peer / ours [95 % CI]", "required", "holds", "equality"]
    body = [
        [
            row["id"],
            row["shape"],
            f"{row['ours']:.3g} {row['unit']}",
            f"{row['peer']:.3g} {row['unit']}",
            interval(row["ratio"], row["ci95"]),
            row["required"],
            verdict[row["holds"]],
            row["equal"],
        ]
        for row in bench["comparisons"]
    ]
    return headers, body


def main(package: str, peers: dict[str, str], measure: Callable[[], Sequence[Comparison]]) -> int:
    """The command line of a benchmark script: ``python NAME.py --out FILE``; prints the table and writes the JSON."""
    from tenfold.terminal import table

    parser = argparse.ArgumentParser(description=f"benchmarks of {package} against {', '.join(peers)}")
    parser.add_argument("--out", required=True, metavar="FILE", help="where bench.json goes")
    out = Path(parser.parse_args().out)
    bench = write(out, package, peers, measure())
    sys.stdout.write(table(*rows(bench)) + f"\n\n{bench['machine']}, peers {peers}; written to {out}\n")
    return 0
