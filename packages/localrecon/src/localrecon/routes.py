"""Where any model can be cut: the calls of its submodules in one pass, and the moments at which one tensor crosses.

The user's own ``forward`` runs once per mode on a sample, with nothing saved for backward. The graph that autograd makes
tells which tensors are alive at each moment; where nothing crosses but what one submodule has just returned, a cut is
possible, whatever lies on either side.
"""

import bisect
import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localrecon.chain import UnsplittableModelError
from localrecon.inputs import Inputs, call, logits_of

Calls = tuple[tuple[str, int, int, bool], ...]
"""(name of a submodule, when it was entered, when it was left, whether its output depends on a parameter), as left."""


@dataclass(frozen=True)
class Route:
    """How a model's ``forward`` goes through its submodules. Plain data.

    Attributes:
        cuts: names of the submodules behind which a cut is possible, in order; those are the ends of the blocks.
        mains: of each, the number of the tensor that crosses among those that it returns (the others are constants).
        owns: names of submodules and loose parameters of each block, and at the end of the tail.
        train: calls in training mode.
        eval: calls in evaluation mode.
        dense: whether what stands for a skipped output has to have memory of its own, since the model writes into it.
    """

    cuts: tuple[str, ...]
    mains: tuple[int, ...]
    owns: tuple[tuple[str, ...], ...]
    train: Calls
    eval: Calls
    dense: bool = False


@contextlib.contextmanager
def calling(model: nn.Module, calls: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Within the block, a call of the submodule NAME is ``calls[NAME](what it would have been)``, hooks included."""
    changed: list[tuple[nn.Module, Any]] = []
    modules = dict(model.named_modules())
    try:
        for name, make in calls.items():
            module = modules[name]
            own = module.__dict__.get("_compiled_call_impl")
            changed.append((module, own))
            # what nn.Module looks up first, before hooks and forward
            module.__dict__["_compiled_call_impl"] = make(own or module._call_impl)
        yield
    finally:
        for module, own in changed:
            if own is None:
                del module.__dict__["_compiled_call_impl"]
            else:
                module.__dict__["_compiled_call_impl"] = own


def _now() -> int:
    """The number that autograd gives to the next node."""
    with torch.enable_grad():  # a model may be within no_grad here
        probe: Any = torch.zeros((), requires_grad=True).view(())
    return int(probe.grad_fn._sequence_nr())


@dataclass(frozen=True)
class _Exit:
    """A submodule's only call: what it returned, and when."""

    name: str
    kind: type
    nodes: tuple[Any, ...]  # grad_fn of each tensor that it returned, None where there is none
    began: int
    at: int


@dataclass(frozen=True)
class _Trace:
    """One pass."""

    calls: Calls
    exits: dict[str, _Exit]
    possible: dict[str, int]  # name of a submodule behind which a cut is possible -> number of the tensor that crosses
    uses: dict[str, list[int]]  # parameter -> moments of its uses
    fewest: tuple[str, list[str]]  # where the fewest tensors cross, and what made them


def _trace(model: nn.Module, inputs: Inputs, options: dict[str, Any]) -> _Trace:
    calls: list[tuple[str, int, int, bool]] = []
    exits: dict[str, _Exit] = {}
    counts: Counter[str] = Counter()
    clock = iter(range(1 << 60))

    def watch(name: str, kind: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(inner: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                entered, began = next(clock), _now()
                out = inner(*args, **kwargs)
                counts[name] += 1
                nodes = tuple(t.grad_fn if isinstance(t, Tensor) else None for t in tree_leaves(out))
                calls.append((name, entered, next(clock), any(node is not None for node in nodes)))
                exits[name] = _Exit(name, kind, nodes, began, _now())
                return out

            return watched

        return make

    watched = {name: watch(name, type(module)) for name, module in model.named_modules() if name}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        for parameter in frozen:  # a frozen parameter belongs to a block as well
            parameter.requires_grad_(True)
        with (
            calling(model, watched),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing),
        ):
            output = logits_of(call(model, inputs, **options))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if output.grad_fn is None:
        raise UnsplittableModelError(f"the output of {type(model).__name__} does not depend on its parameters")
    once = {name: found for name, found in exits.items() if counts[name] == 1}
    last, uses = _graph(model, output)
    # a tensor is alive from the moment it was made to the last moment at which something used it
    made, dropped = sorted(node._sequence_nr() for node in last), sorted(last.values())
    possible: dict[str, int] = {}
    fewest: tuple[int, str, list[str]] = (1 << 60, "", [])
    for name, found in once.items():
        alive = bisect.bisect_left(made, found.at) - bisect.bisect_left(dropped, found.at)
        own = [i for i, node in enumerate(found.nodes) if node in last and last[node] >= found.at]
        others = {found.nodes[i] for i in own} - {found.nodes[own[0]]} if own else set()
        if (
            own
            and alive == len(others) + 1
            and (not others or _learned_from(others) <= _learned_from({found.nodes[own[0]]}))
        ):
            possible[name] = own[0]
        elif found.nodes and 0 < alive < fewest[0]:
            crossing = [n.name() for n in last if n._sequence_nr() < found.at <= last[n]]
            fewest = (alive, name, crossing)
    return _Trace(tuple(calls), once, possible, uses, (fewest[1], fewest[2]))


def _learned_from(nodes: set[Any]) -> set[int]:
    """The parameters that tensors made by these nodes depend on.

    Behind a cut the other tensors are constants. What they alone depend on (the second scale of a network of two) would not
    learn in front of it, so there is no cut then; a position bias that is used at once as well may go on.
    """
    if not nodes:
        return set()
    seen, waiting, found = set(nodes), list(nodes), set()
    while waiting:
        for before, _ in waiting.pop().next_functions:
            if before is None or before in seen:
                continue
            seen.add(before)
            if hasattr(before, "variable"):
                found.add(id(before.variable))
            else:
                waiting.append(before)
    return found


def _graph(model: nn.Module, output: Tensor) -> tuple[dict[Any, int], dict[str, list[int]]]:
    """Of each node that the output depends on, the last moment of its use; and the moments at which parameters are used.

    Raises:
        UnsplittableModelError: the model uses reentrant checkpoints, which hide what is within them.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    last: dict[Any, int] = {output.grad_fn: 1 << 60}
    uses: dict[str, list[int]] = defaultdict(list)
    waiting = [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise UnsplittableModelError(
                f"{type(model).__name__} uses reentrant activation checkpoints, which hide its layers: checkpoint with"
                " use_reentrant=False (transformers: gradient_checkpointing_kwargs), or turn them off"
            )
        number = node._sequence_nr()
        for before, _ in node.next_functions:
            if before is None:
                continue
            if hasattr(before, "variable"):
                if name := names.get(id(before.variable)):
                    uses[name].append(number)
                continue
            if before not in last:
                waiting.append(before)
            last[before] = max(last.get(before, 0), number)
    return last, dict(uses)


def find_route(
    model: nn.Module, inputs: Inputs, options: dict[str, Any], without: Collection[str] = ()
) -> tuple[Route, list[str]]:
    """Where a model can be cut, in both modes; and the names of the trained parameters that its output does not use.

    Args:
        model: in training mode, as the user has set its submodules.
        inputs: one batch.
        options: further arguments of the model.
        without: submodules behind which there is to be no cut.

    Raises:
        UnsplittableModelError: there are fewer than two blocks with parameters; the message says what crosses where.
    """
    modes = [(module, module.training) for module in model.modules()]
    train = _trace(model, inputs, options)
    try:
        model.eval()
        test = _trace(model, inputs, options)
    finally:
        for module, training in modes:
            module.training = training
    both = {n: main for n, main in train.possible.items() if test.possible.get(n) == main and n not in without}
    names = _chosen(model, train, both)
    groups = _grouped(model, train, names)
    if len(groups) < 2:
        where, crossing = train.fewest
        best = f"; the best is after {where}, where {len(crossing)} cross: {', '.join(crossing[:6])}" if where else ""
        raise UnsplittableModelError(
            f"{type(model).__name__} has no point where exactly one tensor crosses between layers with parameters{best}"
        )
    cuts = tuple(end for _, end in groups[:-1])
    ends = [train.exits[name].at for name in cuts]
    owners = {
        name: sorted({bisect.bisect_left(ends, moment + 1) for moment in moments})
        for name, moments in train.uses.items()
    }
    owns = _compact(model, owners, train, cuts)
    unused = [name for name, p in model.named_parameters() if p.requires_grad and name not in train.uses]
    return Route(cuts, tuple(both[name] for name in cuts), owns, train.calls, test.calls), unused


def _chosen(model: nn.Module, trace: _Trace, possible: dict[str, int]) -> list[str]:
    """Possible cuts in order: one per moment, and none within a block whose class is a residual block elsewhere."""
    found = sorted((trace.exits[name] for name in possible), key=lambda e: e.at)
    by_node: dict[Any, list[_Exit]] = {}
    for one in found:
        by_node.setdefault(one.nodes[possible[one.name]], []).append(one)

    def rank(one: _Exit) -> tuple[bool, int]:  # the outermost that is no mere sequence
        return issubclass(one.kind, nn.Sequential), one.name.count(".")

    kept = [min(same, key=rank) for same in by_node.values()]
    moments = sorted(one.at for one in kept)
    whole: list[_Exit] = [one for one in found if not issubclass(one.kind, nn.Sequential)]

    def inside(one: _Exit) -> int:
        return bisect.bisect_left(moments, one.at) - bisect.bisect_right(moments, one.began)

    has_parts = {name.rpartition(".")[0] for name, _ in model.named_modules()}
    solid = {one.kind for one in whole if one.name in has_parts and inside(one) == 0}
    spans = [(one.began, one.at) for one in whole if one.kind in solid]
    kept = [one for one in kept if not any(began < one.at < at for began, at in spans)]
    return [one.name for one in sorted(kept, key=lambda e: e.at)]


def _grouped(model: nn.Module, trace: _Trace, names: Sequence[str]) -> list[tuple[set[str], str]]:
    """(parameters, name of the end) of each block; what has no matrices (norms, biases, loose ones) joins the one before."""
    ends = [trace.exits[name].at for name in names]
    held: list[set[str]] = [set() for _ in range(len(names) + 1)]
    for parameter, moments in trace.uses.items():
        for moment in moments:
            held[bisect.bisect_left(ends, moment + 1)].add(parameter)
    called = {name for name, *_ in trace.calls}
    shapes = {name: p.ndim if name.rpartition(".")[0] in called else 0 for name, p in model.named_parameters()}
    groups: list[tuple[set[str], str]] = []
    for own, end in zip(held, [*names, ""], strict=True):
        heavy = any(shapes[name] > 1 for name in own)
        if groups and (not heavy or not any(shapes[name] > 1 for name in groups[-1][0])):
            groups[-1] = (groups[-1][0] | own, end)
        else:
            groups.append((own, end))
    return groups


def _compact(
    model: nn.Module, owners: dict[str, list[int]], trace: _Trace, cuts: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Of each block, the largest submodules that lie in it whole, and what is left as loose parameters.

    Submodules with buffers alone (a BatchNorm without weights) belong where they are called first.
    """
    left = {name: moment for name, _, moment, _ in trace.calls}
    edges = [left[name] for name in cuts]
    called: dict[str, list[int]] = defaultdict(list)  # the blocks that a submodule is called in
    for name, moment, *_ in sorted(trace.calls, key=lambda one: one[1]):
        called[name].append(bisect.bisect_left(edges, moment))
    known = {id(p): name for name, p in model.named_parameters()}

    def blocks_of(name: str, parameter: nn.Parameter) -> set[int]:
        """Where it is used; of a tied parameter, under this name."""
        blocks = set(owners.get(known[id(parameter)], []))
        return blocks & set(called.get(name, ())) or blocks

    place: dict[str, set[int]] = defaultdict(set)  # of each submodule: the blocks that something in it belongs to
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        blocks = {block for parameter in own for block in blocks_of(name, parameter)}
        if not own and name in called and list(module.buffers(recurse=False)):
            blocks = {called[name][0]}
        path = name
        while True:
            place[path] |= blocks
            if not path:
                break
            path = path.rpartition(".")[0]
    unused = {key for key, name in known.items() if name not in owners}
    owns: list[list[str]] = [[] for _ in range(len(cuts) + 1)]

    def descend(name: str, module: nn.Module) -> None:
        if len(place[name]) == 1 and name and not any(id(p) in unused for p in module.parameters()):
            owns[min(place[name])].append(name)
            return
        for p, parameter in module.named_parameters(recurse=False):
            for block in sorted(blocks_of(name, parameter)):
                owns[block].append(f"{name}.{p}" if name else p)
        for child, part in module.named_children():
            path = f"{name}.{child}" if name else child
            if place[path]:
                descend(path, part)

    descend("", model)
    return tuple(tuple(dict.fromkeys(names)) for names in owns)
