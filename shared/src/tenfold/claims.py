"""Arms x seeds -> statistics -> claims: the one way in which a package says that its method does what it should.

A ``Study`` measures arms over seeds, here or by an executor, saves each measurement whole (so that a killed study goes on
where it was), decides its claims from these numbers alone, and writes ``summary.json``.
"""

import concurrent.futures
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tenfold.config import Level
from tenfold.errors import NonFiniteError, did_you_mean
from tenfold.runs import Run

Measurement = tuple[str, str]
"""An arm and one of its metrics, for example ("kd", "top1")."""
TUNING_SEEDS = 100
"""Settings are tuned on seeds from here on; reports use those below."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a measurement gives besides its numbers.

    Attributes:
        values: metric -> value.
        arrays: name -> array, saved beside the values; ``Study.arrays`` gives them back, also after a resume.
    """

    values: Mapping[str, float]
    arrays: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)


Arm = TypeVar("Arm", bound=str)
Show = Callable[[Any], Iterable[str]]
"""Passes names of measurements through; ``iter`` shows nothing."""
Values = Mapping[str, float] | Measured
"""What one arm's measurement returns."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a claim requires of its estimate: ``>= 4`` or ``<= 0.333``."""

    sign: Literal[">=", "<="]
    value: float

    @classmethod
    def parse(cls, text: str) -> "Bound":
        """Read ``">= 4"``; a ratio may be written ``"<= 1/3"``."""
        match = re.fullmatch(r"(>=|<=) (-?[\d.]+)(?:/([\d.]+))?", text)
        assert match, f"a bound reads '>= 4' or '<= 1/3', not {text!r}"
        return cls(">=" if match[1] == ">=" else "<=", float(match[2]) / float(match[3] or 1))

    def met_by(self, value: float) -> bool:
        """Whether ``value`` satisfies the bound."""
        return value >= self.value if self.sign == ">=" else value <= self.value

    def decide(self, estimate: float, ci95: tuple[float, float] | None) -> bool | None:
        """True when the estimate and its whole interval meet the bound, False when the estimate does not, else None."""
        if not self.met_by(estimate):
            return False
        if ci95 is None or (self.met_by(ci95[0]) and self.met_by(ci95[1])):
            return True
        return None


def mean_ci95(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and Student's t interval; no interval for fewer than three values."""
    from scipy.stats import t

    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if sample.size < 3:
        return mean, None
    half = float(t.ppf(0.975, sample.size - 1) * sample.std(ddof=1) / math.sqrt(sample.size))
    return mean, (mean - half, mean + half)


class Study:
    """Measurements of arms over seeds, and the claims that they decide.

    Package, version and command are the run's.

    Args:
        run: output folder; measurements go to ``results/``, the outcome to ``summary.json``.
        data: what the data is, and whether it is real (which library ships it) or rendered.
        seeds: seeds of the report; a note says which of them settings were tuned on (100 and up).
        level: ``quick`` decides nothing, ``default`` the main claims, ``full`` every claim; None, for a command that has
            no levels, decides every claim.
        unit: what is paired. Where nothing is drawn at random, the seeds are the numbers of the items that arms are compared
            on, such as "pair".
    """

    def __init__(
        self, run: Run, *, data: str, seeds: Sequence[int], level: Level | None = None, unit: str = "seed"
    ) -> None:
        self.run = run
        self.seeds = list(seeds)
        self.level = level
        self.unit = unit
        self._head = {"package": run.package, "version": run.version, "command": run.verb, "level": level, "data": data}
        self._values: dict[str, dict[str, list[float]]] = {}
        self._claims: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._seconds = 0.0
        if unit == "seed" and (tuned := [seed for seed in self.seeds if seed >= TUNING_SEEDS]):
            self.note(
                f"{_plural(len(tuned), 'seed')} of this report ({', '.join(map(str, tuned))}) may be among those that"
                f" settings were tuned on ({TUNING_SEEDS} and up)."
            )

    def over_seeds(
        self,
        measure: Callable[[int], Mapping[str, Mapping[str, float]]],
        executor: concurrent.futures.Executor | None = None,
        show: Show = iter,
    ) -> None:
        """Measure all arms together, seed by seed: ``measure(seed)`` returns ``{arm: {metric: value}}``.

        Args:
            measure: the measurement; with an executor of other processes, one that can be pickled.
            executor: where it runs, one call per seed; None is here, one after another.
            show: passes the measurements through and shows how far they are, such as ``terminal.track`` with a description.
        """
        self._measure({f"seed-{seed}": (measure, seed, "") for seed in self.seeds}, executor, show)
        for seed in self.seeds:
            for arm, metrics in self._saved(f"seed-{seed}").items():
                self._add(arm, seed, metrics)

    def over_arms(
        self,
        arms: Mapping[Arm, Callable[[int], Values]],
        executor: concurrent.futures.Executor | None = None,
        show: Show = iter,
    ) -> None:
        """Measure each arm on each seed: ``arms[name](seed)`` returns ``{metric: value}`` or a ``Measured``.

        Seeds are the outer loop, so that a study that is cut off has compared all arms on the seeds that it reached.

        Args:
            arms: name -> measurement; with an executor of other processes, one that can be pickled (a module's function,
                ``functools.partial`` of one).
            executor: where they run, one call per arm and seed; None is here, one after another.
            show: passes the measurements through and shows how far they are, such as ``terminal.track`` with a description.
        """
        tasks = {f"{arm}-seed-{seed}": (measure, seed, arm) for seed in self.seeds for arm, measure in arms.items()}
        self._measure(tasks, executor, show)
        for seed in self.seeds:
            for arm in arms:
                self._add(arm, seed, self._saved(f"{arm}-seed-{seed}")[arm])

    def record(self, arm: str, values: Mapping[str, float], seed: int | None = None) -> None:
        """Add what is already known of an arm, without a measurement of its own.

        Args:
            arm: name of the arm.
            values: metric -> value.
            seed: which seed they belong to; default: the study's next one for this arm.
        """
        known = self._values.get(arm, {})
        taken = max((len(column) for column in known.values()), default=0)
        self._add(arm, self.seeds[taken] if seed is None else seed, _finite(arm, {arm: values})[arm])

    def _measure(
        self,
        tasks: Mapping[str, tuple[Callable[[int], Any], int, str]],
        executor: concurrent.futures.Executor | None,
        show: Show,
    ) -> None:
        """Make and save every measurement that is not there yet; a fault of one ends the study, the others are kept."""
        waiting = {name: task for name, task in tasks.items() if not self._path(name).exists()}
        if executor is None:
            for name in show(list(waiting)):
                self._save(name, _timed(*waiting[name]))
            return
        futures = {executor.submit(_timed, *task): name for name, task in waiting.items()}
        try:
            for name in show(_Done(futures)):
                self._save(name, next(future for future, other in futures.items() if other == name).result())
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _path(self, name: str) -> Path:
        return self.run.path / "results" / f"{name}.json"

    def _save(self, name: str, found: tuple[float, Mapping[str, Mapping[str, float]], Mapping[str, Any]]) -> None:
        seconds, values, arrays = found
        if arrays:
            with self.run.replacing(f"results/{name}.npz") as temporary:
                np.savez_compressed(temporary, **arrays)
        self.run.write_json(f"results/{name}.json", {"seconds": seconds, "values": _finite(name, values)})

    def _saved(self, name: str) -> dict[str, dict[str, float]]:
        saved = json.loads(self._path(name).read_text(encoding="utf-8"))
        self._seconds += saved["seconds"]
        return dict(saved["values"])

    def arrays(self, arm: str, seed: int) -> dict[str, NDArray[Any]]:
        """The arrays that a measurement of ``over_arms`` gave besides its numbers."""
        with np.load(self.run.path / "results" / f"{arm}-seed-{seed}.npz", allow_pickle=False) as file:
            return dict(file)

    def _add(self, arm: str, seed: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            values = self._values.setdefault(arm, {}).setdefault(key, [])
            assert len(values) == self.seeds.index(seed), f"{arm} did not measure {key} on every seed"
            values.append(value)

    @property
    def arms(self) -> Mapping[str, Mapping[str, Sequence[float]]]:
        """Arm -> metric -> its values, in the order of the seeds."""
        return self._values

    def values(self, measurement: Measurement) -> np.ndarray:
        """The values of one metric of one arm, in the order of the seeds."""
        arm, metric = measurement
        if metric not in self._values.get(arm, {}):
            known = [f"{a}.{m}" for a, metrics in self._values.items() for m in metrics]
            raise KeyError(f"nothing measured as {arm}.{metric}: {did_you_mean(f'{arm}.{metric}', known)}")
        return np.asarray(self._values[arm][metric])

    def difference(
        self, id: str, text: str, better: Measurement, worse: Measurement, *, required: str, main: bool = False
    ) -> None:
        """Claim about the mean of ``better - worse``, paired by seed, with Student's t interval.

        Where every claim is decided, fewer than three seeds, which give no interval, decide none; nor do they for ``ratio``.
        """
        estimate, ci95 = mean_ci95(self.values(better) - self.values(worse))
        units = _plural(len(self.seeds), self.unit)
        method = f"paired t over {units}" if ci95 else f"mean of {units}"
        self._over_the_seeds(id, text, "difference", estimate, ci95, method, required, main)

    def against(
        self,
        reference: Arm,
        arms: Iterable[Arm],
        metric: str,
        *,
        text: str = "{metric} of {arm} - {metric} of {reference}",
        required: str = ">= 0",
        main: bool = True,
        names: Mapping[Arm, str] | None = None,
    ) -> None:
        """Claim one paired ``difference`` to a reference for each other arm, as ``ARM_over_REFERENCE``.

        Args:
            reference: arm that the others are compared with; among ``arms`` it is passed over.
            arms: arms that are compared.
            metric: metric of which more is better.
            text: sentence of each claim, with ``{arm}``, ``{reference}`` and ``{metric}``.
            required: bound on each difference.
            main: whether the level ``default`` decides them.
            names: what an arm is called in the sentence; default: as it is.
        """
        shown = names or {}
        for arm in arms:
            if arm != reference:
                sentence = text.format(
                    arm=shown.get(arm, arm), reference=shown.get(reference, reference), metric=metric
                )
                id = f"{arm}_over_{reference}".replace("-", "_")
                self.difference(id, sentence, (arm, metric), (reference, metric), required=required, main=main)

    def ratio(
        self, id: str, text: str, top: Measurement, bottom: Measurement, *, required: str, main: bool = False
    ) -> None:
        """Claim about the geometric mean of ``top / bottom``, paired by seed, with Student's t interval on the logs.

        Both measurements have to be positive on every seed; otherwise the claim stays undecided and says so.
        """
        above, below = self.values(top), self.values(bottom)
        if (above <= 0).any() or (below <= 0).any():
            estimate = float(above.mean() / below.mean()) if below.mean() else 0.0
            method = "ratio of means; a value is not positive, so no interval and no decision"
            self._append(id, text, "ratio", estimate, None, method, required, holds=None)
            return
        log, ci = mean_ci95(np.log(above / below))
        ci95 = (math.exp(ci[0]), math.exp(ci[1])) if ci else None
        method = f"geometric mean of {_plural(len(self.seeds), 'paired ratio')}" + (", t on logs" if ci else "")
        self._over_the_seeds(id, text, "ratio", math.exp(log), ci95, method, required, main)

    def _over_the_seeds(
        self,
        id: str,
        text: str,
        kind: Literal["difference", "ratio"],
        estimate: float,
        ci95: tuple[float, float] | None,
        method: str,
        required: str,
        main: bool,
    ) -> None:
        if ci95 is None and self.level in {"full", None}:
            self._append(id, text, kind, estimate, None, f"{method}; too few to decide", required, holds=None)
        else:
            self.claim(id, text, kind, estimate, ci95, method=method, required=required, main=main)

    def count(self, id: str, text: str, successes: int, total: int, *, required: str, main: bool = False) -> None:
        """Claim about how many of ``total`` cases succeeded."""
        self.claim(id, text, "count", successes, None, method=f"{successes} of {total}", required=required, main=main)

    def claim(
        self,
        id: str,
        text: str,
        kind: Literal["difference", "ratio", "count"],
        estimate: float,
        ci95: tuple[float, float] | None,
        *,
        method: str,
        required: str,
        main: bool = False,
    ) -> None:
        """Add a claim with an estimate from elsewhere (a bootstrap over many items); decided here, by ``required``."""
        decided = self.level in {"full", None} or (self.level == "default" and main)
        holds = Bound.parse(required).decide(estimate, ci95) if decided else None
        self._append(id, text, kind, estimate, ci95, method, required, holds)

    def _append(
        self,
        id: str,
        text: str,
        kind: str,
        estimate: float,
        ci95: tuple[float, float] | None,
        method: str,
        required: str,
        holds: bool | None,
    ) -> None:
        assert all(claim["id"] != id for claim in self._claims), f"claim {id} is there already"
        claim = {"id": id, "text": text, "kind": kind, "estimate": estimate, "ci95": ci95, "method": method}
        self._claims.append({**claim, "required": required, "holds": holds})

    def note(self, text: str) -> None:
        """Add a sentence to the report: what was noticed and is not a claim."""
        self._notes.append(text)

    def finish(self, seconds: float | None = None) -> dict[str, Any]:
        """Write ``summary.json`` and return it.

        Args:
            seconds: the whole command's time; default: the sum over the measurements, also those before a resume.
        """
        body = {"arms": self._values, "claims": self._claims, "notes": self._notes}
        took = round(self._seconds if seconds is None else seconds, 1)
        summary = {**self._head, "seconds": took, "seeds": self.seeds, **body}
        self.run.write_json("summary.json", summary)
        return summary


class _Done:
    """Names of measurements as they end; of an executor whose futures are its own, in their order."""

    def __init__(self, futures: Mapping[Any, str]) -> None:
        self.futures = futures

    def __len__(self) -> int:
        return len(self.futures)

    def __iter__(self) -> Iterator[str]:
        standard = all(isinstance(future, concurrent.futures.Future) for future in self.futures)
        for future in concurrent.futures.as_completed(self.futures) if standard else self.futures:
            yield self.futures[future]


def _timed(
    measure: Callable[[int], Any], seed: int, arm: str
) -> tuple[float, Mapping[str, Mapping[str, float]], Mapping[str, NDArray[Any]]]:
    """Seconds, values of each arm, and arrays of one measurement; ``arm`` is empty where it measures all of them."""
    start = time.perf_counter()
    found = measure(seed)
    seconds = time.perf_counter() - start
    if isinstance(found, Measured):
        return seconds, {arm: dict(found.values)}, dict(found.arrays)
    return seconds, {arm: dict(found)} if arm else {name: dict(values) for name, values in found.items()}, {}


def _finite(name: str, values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The values as plain numbers.

    Raises:
        NonFiniteError: NaN or infinity.
    """
    plain = {arm: {key: float(value) for key, value in metrics.items()} for arm, metrics in values.items()}
    for arm, metrics in plain.items():
        for key, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name}: {key} of arm {arm} is {value}")
    return plain


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def interval(estimate: float, ci95: Sequence[float] | None) -> str:
    """``9.94 [9.6, 10.3]``; three significant digits, no fewer than the integer has."""
    return _number(estimate) + (f" [{_number(ci95[0])}, {_number(ci95[1])}]" if ci95 else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def arm_rows(
    study: Study, arms: Iterable[Arm], metrics: Sequence[str], names: Mapping[Arm, str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of arms: the mean of each metric over the seeds with its interval; - where there is none.

    Args:
        study: the study.
        arms: arms, one row each.
        metrics: metrics, one column each.
        names: what an arm is called; default: as it is.
    """

    def cell(arm: str, metric: str) -> str:
        values = study.arms[arm].get(metric)
        return interval(*mean_ci95(values)) if values else "-"

    rows = [[(names or {}).get(arm, arm), *(cell(arm, metric) for metric in metrics)] for arm in arms]
    return ["arm", *metrics], rows


def claim_rows(summaries: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of all claims of some summaries."""
    verdict = {True: "yes", False: "NO", None: "not decided"}
    rows = [
        [
            s["package"],
            s["level"] or "-",
            c["text"],
            interval(c["estimate"], c["ci95"]),
            c["required"],
            verdict[c["holds"]],
        ]
        for s in summaries
        for c in s["claims"]
    ]
    return ["package", "level", "claim", "estimate [95 % CI]", "required", "holds"], rows
