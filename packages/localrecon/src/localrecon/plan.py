"""A split: which blocks form which module, and how it was chosen."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from localrecon.routes import Route
from tenfold import UserError

Balance = Literal["memory", "flops", "params", "blocks"]


class PlanMismatchError(UserError):
    """A plan, or a checkpoint, was made for another model or another split."""


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """Which blocks form which module. Plain data: ``to_json`` and ``from_json``.

    Attributes:
        adapter: name of the adapter that took the model apart.
        blocks: names of the blocks, in order.
        cuts: number of blocks before the end of each module but the last, rising.
        task: classify, lm, or custom (a loss of the user's).
        classes: number of classes, or size of the vocabulary.
        output: shape of the model's output, without the batch.
        route: how the model's forward goes, where it is cut along that; else None.
        by_token: whether the tail gives a token's logits from that token alone, so that they can be computed in chunks.
        shapes: shape of each block's output, without the batch.
        channels_last: whether each block's output has its channels last; None where it has no three dimensions, or where that
            cannot be told.
        saved_bytes: bytes that each block saves for backward, on the sample (its output included, its input not).
        flops: operations of each block's forward on the sample.
        parameters: number of parameters of each block.
        predicted_peak: bytes of live tensors at the peak of a training step on the sample: parameters, buffers, heads,
            gradients, optimizer states, batch and activations. Measured by a step without an update; None if that was not
            asked for.
        module_peaks: the same for each module's turn.
    """

    adapter: str
    blocks: tuple[str, ...]
    cuts: tuple[int, ...]
    task: Literal["classify", "lm", "custom"]
    classes: int
    shapes: tuple[tuple[int, ...], ...]
    saved_bytes: tuple[int, ...]
    flops: tuple[int, ...]
    parameters: tuple[int, ...]
    predicted_peak: int | None = None
    module_peaks: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    route: Route | None = None
    by_token: bool = True
    channels_last: tuple[bool | None, ...] = ()

    @property
    def k(self) -> int:
        """Number of modules."""
        return len(self.cuts) + 1

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First and one past the last block of each module."""
        edges = [0, *self.cuts, len(self.blocks)]
        return list(itertools.pairwise(edges))

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SplitPlan":
        """What ``to_json`` wrote.

        Raises:
            UserError: it is no plan.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            known = {f.name for f in dataclasses.fields(cls)}
            values = {key: _tuples(value) for key, value in values.items()}
            if set(values) - known:
                raise ValueError(f"unknown {', '.join(sorted(set(values) - known))}")
            if values.get("route") is not None:
                values["route"] = Route(**{key: _tuples(value) for key, value in values["route"].items()})
            plan = cls(**values)
            edges = [0, *plan.cuts, len(plan.blocks)]
            if sorted(set(edges)) != edges:
                raise ValueError("cuts do not rise")
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"not a split plan: {error}") from error
        return plan

    def check(self, blocks: Sequence[str]) -> None:
        """Refuse a model whose blocks have other names.

        Raises:
            PlanMismatchError: with the first difference.
        """
        if tuple(blocks) != self.blocks:
            pairs = zip([*blocks, *[None] * len(self.blocks)], [*self.blocks, *[None] * len(blocks)], strict=False)
            i, (found, planned) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise PlanMismatchError(
                f"the plan is for {len(self.blocks)} blocks, the model has {len(blocks)}; first difference at block"
                f" {i + 1}: {planned} in the plan, {found} in the model"
            )

    def check_names(self, names: Sequence[str]) -> None:
        """Refuse a model without the submodules that the plan's route calls.

        Raises:
            PlanMismatchError: with the first one that is missing.
        """
        if self.route is None:
            return
        known = set(names)
        missing = [name for name, *_ in (*self.route.train, *self.route.eval) if name not in known]
        if missing:
            raise PlanMismatchError(f"the plan is for another model: this one has no submodule {missing[0]}")

    def difference(self, other: "SplitPlan") -> str:
        """What differs between two splits of a model, in one line; empty where nothing does."""
        fields = ("adapter", "blocks", "cuts", "task", "classes")
        changed = [name for name in fields if getattr(self, name) != getattr(other, name)]
        return "; ".join(f"{name}: {getattr(self, name)} -> {getattr(other, name)}" for name in changed)

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Headers and rows of a table, one row per module."""
        rows: list[list[Any]] = []
        for k, (a, b) in enumerate(self.ranges):
            names = self.blocks[a] if b - a == 1 else f"{self.blocks[a]} .. {self.blocks[b - 1]}"
            peak = f"{self.module_peaks[k] / 2**20:.1f}" if self.module_peaks else "-"
            shape = " x ".join(map(str, self.shapes[b - 1]))
            sums = [sum(values[a:b]) for values in (self.saved_bytes, self.parameters, self.flops)]
            rows.append(
                [k + 1, names, b - a, shape, f"{sums[0] / 2**20:.1f}", f"{sums[1]:,}", f"{sums[2] / 1e6:.1f}", peak]
            )
        headers = ["module", "blocks", "n", "output", "saved MiB", "parameters", "MFLOP", "peak MiB"]
        return headers, rows


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def partition(count: int, modules: int, cost: Callable[[int, int], float]) -> tuple[int, ...]:
    """Cut ``count`` blocks into contiguous modules so that the largest ``cost(first, past)`` is smallest; exact.

    Of several such splits it takes the one whose cuts are latest from the end backwards.

    Raises:
        UserError: fewer than one module, or more modules than blocks.
    """
    if not 1 <= modules <= count:
        raise UserError(f"k must be 1 to {count}, the number of blocks of this model, got {modules}")
    best: list[dict[int, tuple[float, int]]] = [{b: (cost(0, b), 0) for b in range(1, count + 1)}]
    for m in range(1, modules):
        row: dict[int, tuple[float, int]] = {}
        for b in range(m + 1, count + 1):
            row[b] = min((max(best[m - 1][a][0], cost(a, b)), -a) for a in range(m, b))
            row[b] = (row[b][0], -row[b][1])
        best.append(row)
    cuts: list[int] = []
    b = count
    for m in range(modules - 1, 0, -1):
        b = best[m][b][1]
        cuts.append(b)
    return tuple(reversed(cuts))
