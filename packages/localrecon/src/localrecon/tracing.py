"""The chain of any model that torch.fx can trace, cut wherever exactly one live tensor crosses."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from localrecon.chain import Block, Chain, Context, UnsplittableModelError, merge_without_parameters

_UNTRACEABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises where it is given a proxy in place of a tensor."""


def traced_chain(model: nn.Module) -> Chain:
    """The chain of any model that torch.fx can trace.

    Raises:
        UnsplittableModelError: it cannot be traced, takes or returns several values, or has no such cut; the message says
            which tensors cross at the best place.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except _UNTRACEABLE as error:
        raise UnsplittableModelError(
            f"no adapter knows {type(model).__name__}, and torch.fx cannot trace it ({' '.join(str(error).split())[:200]}):"
            " give the blocks as an nn.Sequential or ListAdapter, or register an adapter"
        ) from error
    nodes = [node for node in graph.nodes if node.op not in {"placeholder", "output"}]
    inputs = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    if len(inputs) != 1 or not isinstance(outputs, fx.Node):
        raise UnsplittableModelError(
            f"{type(model).__name__} takes {len(inputs)} inputs and returns "
            f"{'one value' if isinstance(outputs, fx.Node) else 'several values'}; expected one tensor in, one out"
        )
    place = {node: i for i, node in enumerate(nodes)}
    last = {node: max((place.get(user, len(nodes)) for user in node.users), default=-1) for node in [*inputs, *nodes]}
    crossing: list[list[fx.Node]] = []  # what is alive after node i
    for i in range(len(nodes)):
        alive = [n for n in (*inputs, *nodes[: i + 1]) if last[n] > i and n.op != "get_attr"]
        crossing.append(alive)
    groups: list[tuple[int, int]] = []
    start = 0
    for i, alive in enumerate(crossing[:-1]):
        if len(alive) == 1 and alive[0] in place:
            groups.append((start, i + 1))
            start = i + 1
    groups.append((start, len(nodes)))
    entries = [inputs[0], *(crossing[stop - 1][0] for _, stop in groups[:-1])]
    blocks = [
        _NodeRange(model, graph, nodes[a:b], entry).block() for (a, b), entry in zip(groups, entries, strict=True)
    ]
    merged = merge_without_parameters(model, blocks)
    if len(merged) < 2:
        i = min(range(len(crossing) - 1), key=lambda i: len(crossing[i]), default=0)
        fewest = [n.name for n in crossing[i]] if crossing else []
        raise UnsplittableModelError(
            f"{type(model).__name__} has no point where exactly one tensor crosses between layers with parameters; the best"
            f" is after {nodes[i].name}, where {len(fewest)} cross: {', '.join(fewest)}"
        )
    return Chain(model, tuple(merged[:-1]), merged[-1], "fx")


class _NodeRange:
    """Nodes of a traced graph, run one by one; each value is dropped after its last use."""

    def __init__(self, model: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node], entry: fx.Node) -> None:
        self.interpreter = fx.Interpreter(model, graph=graph)
        self.nodes = nodes
        self.entry = entry
        inside = set(nodes)
        self.drops: dict[fx.Node, list[fx.Node]] = {}
        for value in (entry, *nodes[:-1]):
            users = [user for user in value.users if user in inside]
            if users:
                self.drops.setdefault(max(users, key=nodes.index), []).append(value)

    def block(self) -> Block:
        owns = [n.target for n in self.nodes if n.op in {"call_module", "get_attr"} and isinstance(n.target, str)]
        return Block(self.nodes[-1].name, self.run, tuple(dict.fromkeys(owns)))

    def run(self, x: Tensor, context: Context) -> Tensor:
        values: dict[fx.Node, Any] = {self.entry: x}
        del x
        for node in self.nodes:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            values[node] = getattr(self.interpreter, node.op)(node.target, args, kwargs)
            del args, kwargs
            for value in self.drops.get(node, ()):
                del values[value]
        result: Tensor = values[self.nodes[-1]]
        return result
