"""The chain of any model along a route: a block is the user's own ``forward`` between two of its submodules.

To run a block, ``forward`` is called with the batch as it is. Submodules that are done before the block are not computed
again: in their place stands something of the shape that they returned in this batch. The submodule behind which the block
begins returns the tensor that was handed on; what the one at its end returns is the block's output, and there ``forward``
is left. So masks, positions, modes, caps and whatever else happens between submodules are the model's own.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from localrecon.chain import Block, Chain, Context
from localrecon.inputs import Inputs, call, logits_of, rows_of, samples_in
from localrecon.routes import Calls, Route, calling, find_route

NAME = "segments"


@dataclass(frozen=True)
class Shape:
    """What a skipped submodule returned, without the numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _stand_in(value: Any, fill: float, *, dense: bool) -> Any:
    """For a shape, a tensor of it, of one number; it takes no memory unless ``dense``."""
    if not isinstance(value, Shape):
        return value
    shape = value.shape if dense else ()
    return torch.full(shape, fill, dtype=value.dtype, device=value.device).expand(value.shape)


class _Left(BaseException):
    """Ends a forward pass behind the end of a block."""


@dataclass(frozen=True)
class _Way:
    """What a pass from one cut to another does with the submodules."""

    skipped: dict[str, int]  # calls that are not computed
    wanted: frozenset[str]  # whose shapes later passes need
    stops: str | None  # the submodule that is called next behind the end


def _way(calls: Calls, cuts: tuple[str, ...], start: str | None, end: str | None) -> _Way:
    left = {name: moment for name, _, moment, _ in calls}

    def outermost(moment: int) -> list[str]:
        """The calls that are over by then; but for what depends on the batch alone, which is computed again."""
        names, covered = [], moment + 1
        for name, entered, gone, learned in sorted(calls, key=lambda one: -one[2]):
            if learned and gone <= moment and entered < covered:
                names.append(name)
                covered = entered
        return names

    skipped = Counter(outermost(left[start])) if start else Counter[str]()
    # a call that lies within a skipped one is not made
    wanted = {name for cut in cuts for name in outermost(left[cut])}
    stops = None
    if end is not None:
        later = [(entered, name) for name, entered, *_ in calls if entered > left[end]]
        stops = min(later)[1] if later else None
    return _Way(dict(skipped), frozenset(wanted), stops)


class SegmentChain(Chain):
    """A chain whose blocks are parts of the model's own forward pass."""

    def __init__(self, model: nn.Module, route: Route) -> None:
        names = (*route.cuts, "")
        made = [self._block(i, name or _last(route), route.owns[i]) for i, name in enumerate(names)]
        super().__init__(model, tuple(made[:-1]), made[-1], NAME, self._context)
        self.route = route
        self.options = options_of(model)
        self.fill = 0.0  # of what stands for skipped outputs; the check of a chain takes NaN
        self.at_start: Callable[[int], None] | None = None  # called where a block begins
        self._ways: dict[tuple[bool, str | None, str | None], _Way] = {}

    def _block(self, index: int, name: str, owns: tuple[str, ...]) -> Block:
        def run(x: Any, context: Context) -> Tensor:
            return self.run(index, index + 1, x, context)

        return Block(name, run, owns)

    @staticmethod
    def _context(inputs: Inputs) -> Context:
        return {"inputs": inputs, "shapes": {}, "constants": {}}

    def select(self, context: Context, rows: Tensor) -> Context:
        """The context of some samples alone."""
        samples = samples_in(context["inputs"])
        count = int(rows.sum()) if rows.dtype == torch.bool else len(rows)

        def fewer(value: Any) -> Any:
            if not isinstance(value, Shape) or not value.shape or value.shape[0] % samples:
                return value
            return Shape((value.shape[0] // samples * count, *value.shape[1:]), value.dtype, value.device)

        shapes = {key: tree_map(fewer, value) for key, value in context["shapes"].items()}
        return {
            "inputs": rows_of(context["inputs"], rows, samples),
            "shapes": shapes,
            "constants": rows_of(context["constants"], rows, samples),
        }

    def run(self, first: int, past: int, x: Any, context: Context) -> Tensor:
        """Blocks ``first`` to ``past - 1`` in one pass; with ``past`` beyond the last one, the logits."""
        route = self.route
        start = route.cuts[first - 1] if first else None
        end = route.cuts[past - 1] if past <= len(route.cuts) else None
        key = (self.model.training, start, end)
        if key not in self._ways:
            calls = route.train if self.model.training else route.eval
            self._ways[key] = _way(calls, route.cuts, start, end)
        if self.at_start is not None and start is None:
            self.at_start(0)
        return _Pass(self, self._ways[key], first, start, end, x, context).run()


def _last(route: Route) -> str:
    """Name of the tail: of the last submodule that is called in it."""
    return route.train[-1][0] if route.train else "tail"


def options_of(model: nn.Module) -> dict[str, Any]:
    """Further arguments of the model's forward: no cache of keys and values where a language model has one."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known and hasattr(model, "config") else {}


@dataclass
class _Pass:
    """One pass through the model's forward, from a cut to a cut."""

    chain: SegmentChain
    way: _Way
    first: int
    start: str | None
    end: str | None
    x: Any
    context: Context
    counts: Counter[str] = field(default_factory=Counter)
    gradients: bool = field(default_factory=torch.is_grad_enabled)
    result: Tensor | None = None
    begun: bool = False

    def run(self) -> Tensor:
        chain = self.chain
        names = {*self.way.skipped, *self.way.wanted, self.start, self.end, self.way.stops}
        self.begun = self.start is None
        inputs = self.context["inputs"]
        if self.begun:
            inputs, self.x = self.x, None
        try:
            with calling(chain.model, {name: self._watched(name) for name in names if name}):
                torch.set_grad_enabled(self.gradients and self.begun)
                output = call(chain.model, inputs, **chain.options)
                if self.end is None:
                    return logits_of(output)
        except _Left:
            pass
        except (
            Exception
        ):  # behind the end of the block, the model's code works on stand-ins and may fail; the result is whole
            if self.result is None:
                raise
        finally:
            torch.set_grad_enabled(self.gradients)
        if self.result is None:
            raise RuntimeError(f"the model did not call {self.end} in this pass, behind which it is cut")
        return self.result

    def _watched(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                if self.result is not None:
                    raise _Left
                number = self.counts[name]
                self.counts[name] += 1
                if not self.begun:
                    if name == self.start:
                        return self._begin()
                    if number < self.way.skipped.get(name, 0):
                        return self._stand_ins(name, number)
                out = inner(*args, **kwargs)
                if name in self.way.wanted and self.begun:
                    self.context["shapes"][name, number] = tree_map(_shape, out)
                return self._finish(out) if name == self.end and self.result is None else out

            return watched

        return make

    def _stand_ins(self, name: str, number: int) -> Any:
        fill, dense = self.chain.fill, self.chain.route.dense
        shapes = self.context["shapes"][name, number]
        return tree_map(lambda value: _stand_in(value, fill, dense=dense), shapes)

    def _begin(self) -> Any:
        """What the submodule before the block returned: the tensor that was handed on, and constants."""
        x, self.x, self.begun = self.x, None, True
        torch.set_grad_enabled(self.gradients)
        if self.chain.at_start is not None:
            self.chain.at_start(self.first)
        constants = self.context["constants"].get(self.start)
        if constants is None:
            return x
        leaves, structure = constants
        main = self.chain.route.mains[self.first - 1]
        return tree_unflatten([x if i == main else leaf for i, leaf in enumerate(leaves)], structure)

    def _finish(self, out: Any) -> Any:
        cuts = self.chain.route.cuts
        place = cuts.index(self.end or "")
        leaves, structure = tree_flatten(out)
        self.result = leaves[self.chain.route.mains[place]]
        if not isinstance(out, Tensor):
            rest = [
                None if i == self.chain.route.mains[place] else leaf.detach() if isinstance(leaf, Tensor) else leaf
                for i, leaf in enumerate(leaves)
            ]
            self.context["constants"][self.end] = (rest, structure)
        torch.set_grad_enabled(False)
        # what follows up to the next submodule is not needed, and must not write into the output
        return tree_map(lambda leaf: _stand_in(_shape(leaf), 0.0, dense=False), out)


def _shape(value: Any) -> Any:
    """Of real numbers the shape; masks and indices stay as they are, since code may look into them."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value.detach()
    return Shape(tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


def segmented(model: nn.Module, inputs: Inputs, without: Collection[str] = ()) -> tuple[SegmentChain, list[str]]:
    """The chain of any model, found by running it on a batch; and the trained parameters that its output does not use.

    Raises:
        UnsplittableModelError: there is no cut.
    """
    route, unused = find_route(model, inputs, options_of(model), without)
    return SegmentChain(model, route), unused
