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
    bound = Bound.parse(required)
    close = 0.9 < bound.value < 1.1
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
        holds=None if close and pairs < 21 else bound.decide(ratio, (float(low), float(high))),
        equal=agreement,
    )


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
