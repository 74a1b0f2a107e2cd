"""Arms x seeds -> statistics -> claims: the one way in which a package says that its method does what it should.

A ``Study`` measures arms over seeds, saves each measurement whole (so that a killed study goes on where it was),
decides its claims from these numbers alone, and writes ``summary.json``.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from tenfold.errors import NonFiniteError, did_you_mean
from tenfold.runs import Run

Level = Literal["quick", "default", "full"]
Measurement = tuple[str, str]
"""An arm and one of its metrics, for example ("kd", "top1")."""


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

    Args:
        run: the output folder; measurements go to ``results/``, the outcome to ``summary.json``.
        package: distribution name.
        version: its version.
        command: the verb.
        level: ``quick`` decides nothing, ``default`` the main claims, ``full`` every claim.
        data: what the data is, and whether it is real (which library ships it) or rendered.
        seeds: the seeds of the report; settings are tuned on seeds from 100 on, never on these.
    """

    def __init__(
        self, run: Run, *, package: str, version: str, command: str, level: Level, data: str, seeds: Sequence[int]
    ) -> None:
        self.run = run
        self.seeds = list(seeds)
        self.level = level
        self._head = {"package": package, "version": version, "command": command, "level": level, "data": data}
        self._values: dict[str, dict[str, list[float]]] = {}
        self._claims: list[dict[str, Any]] = []
        self._notes: list[str] = []
        self._seconds = 0.0

    def over_seeds(self, measure: Callable[[int], Mapping[str, Mapping[str, float]]]) -> None:
        """Measure all arms together, seed by seed: ``measure(seed)`` returns ``{arm: {metric: value}}``."""
        for seed in self.seeds:
            for arm, metrics in self._once(f"seed-{seed}", partial(measure, seed)).items():
                self._add(arm, seed, metrics)

    def over_arms(self, arms: Mapping[str, Callable[[int], Mapping[str, float]]]) -> None:
        """Measure each arm on each seed: ``arms[name](seed)`` returns ``{metric: value}``.

        Seeds are the outer loop, so that a study that is cut off has compared all arms on the seeds that it reached.
        """
        for seed in self.seeds:
            for arm, measure in arms.items():
                result = self._once(f"{arm}-seed-{seed}", partial(_measure_arm, arm, measure, seed))
                self._add(arm, seed, result[arm])

    def _once(self, name: str, measure: Callable[[], Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
        """The saved measurement of this name, or a new one, saved whole, with the seconds that it took."""
        path = self.run.path / "results" / f"{name}.json"
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
        else:
            start = time.perf_counter()
            values = {arm: {key: float(v) for key, v in metrics.items()} for arm, metrics in measure().items()}
            for arm, metrics in values.items():
                for key, value in metrics.items():
                    if not math.isfinite(value):
                        raise NonFiniteError(f"{name}: {key} of arm {arm} is {value}")
            saved = {"seconds": time.perf_counter() - start, "values": values}
            self.run.write_json(f"results/{name}.json", saved)
        self._seconds += saved["seconds"]
        return dict(saved["values"])

    def _add(self, arm: str, seed: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            values = self._values.setdefault(arm, {}).setdefault(key, [])
            assert len(values) == self.seeds.index(seed), f"{arm} did not measure {key} on every seed"
            values.append(value)

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

        At the level ``full`` fewer than three seeds, which give no interval, decide nothing; nor do they for ``ratio``.
        """
        estimate, ci95 = mean_ci95(self.values(better) - self.values(worse))
        method = f"paired t over {len(self.seeds)} seeds" if ci95 else f"mean of {_plural(len(self.seeds), 'seed')}"
        self._over_the_seeds(id, text, "difference", estimate, ci95, method, required, main)

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
        if ci95 is None and self.level == "full":
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
        decided = self.level == "full" or (self.level == "default" and main)
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


def _measure_arm(
    arm: str, measure: Callable[[int], Mapping[str, float]], seed: int
) -> Mapping[str, Mapping[str, float]]:
    return {arm: measure(seed)}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def interval(estimate: float, ci95: Sequence[float] | None) -> str:
    """``9.94 [9.6, 10.3]``; three significant digits, no fewer than the integer has."""
    return _number(estimate) + (f" [{_number(ci95[0])}, {_number(ci95[1])}]" if ci95 else "")


def _number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def claim_rows(summaries: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a table of all claims of some summaries."""
    verdict = {True: "yes", False: "NO", None: "not decided"}
    rows = [
        [s["package"], s["level"], c["text"], interval(c["estimate"], c["ci95"]), c["required"], verdict[c["holds"]]]
        for s in summaries
        for c in s["claims"]
    ]
    return ["package", "level", "claim", "estimate [95 % CI]", "required", "holds"], rows
