"""A model as a chain of blocks between which exactly one tensor crosses; the model and its key names stay as they are.

An adapter takes one kind of model apart. Blocks call the user's own submodules, so what is trained is the user's model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from localrecon.errors import SharedParameterError, UnsplittableModelError
from tenfold import UserError
from tenfold.errors import did_you_mean

Inputs = Any
"""What the model takes: a tensor, or for transformers also a dict of tensors."""
Context = Any
"""What all blocks share and no gradient passes: masks, positions."""
Task = Literal["classify", "lm"]


def _no_context(inputs: Inputs) -> Context:
    return None


@dataclass(frozen=True)
class Block:
    """One link of a chain.

    Attributes:
        name: for people.
        run: (input, context) -> output.
        owns: names of the submodules and loose parameters of the model that it uses.
    """

    name: str
    run: Callable[[Any, Context], Tensor]
    owns: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """``model(inputs) == tail(blocks(inputs))``.

    Attributes:
        model: the user's.
        blocks: b_1 .. b_N, in order.
        tail: the model's own classifier, which is the head of the last module.
        adapter: name of what took the model apart.
        context: inputs -> what all blocks are given besides their input.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    tail: Block
    adapter: str
    context: Callable[[Inputs], Context] = field(default=_no_context)

    def parameters_of(self, *blocks: Block) -> dict[str, nn.Parameter]:
        """Parameters of some blocks by their names in the model, each once."""
        names: dict[str, nn.Parameter] = {}
        for owned in (name for block in blocks for name in block.owns):
            part = _get(self.model, owned)
            if isinstance(part, nn.Parameter):
                names[owned] = part
            elif isinstance(part, nn.Module):
                names.update({f"{owned}.{name}" if owned else name: p for name, p in part.named_parameters()})
        return names

    def modules_of(self, *blocks: Block) -> list[nn.Module]:
        """The submodules that some blocks use."""
        parts = [_get(self.model, name) for block in blocks for name in block.owns]
        return [part for part in parts if isinstance(part, nn.Module)]


def _get(model: nn.Module, name: str) -> Any:
    part: Any = model
    for step in filter(None, name.split(".")):
        part = getattr(part, step)
    return part


Adapter = Callable[[nn.Module], "Chain | None"]
_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(name: str) -> Callable[[Adapter], Adapter]:
    """Decorator: a function that takes a model apart, or returns None where the model is of another kind.

    Adapters that were registered later are asked first, and before all of ours.
    """

    def register(adapter: Adapter) -> Adapter:
        _ADAPTERS[name] = adapter
        return adapter

    return register


def build_chain(model: nn.Module, adapter: str = "auto") -> Chain:
    """Take a model apart.

    Args:
        model: any.
        adapter: name of an adapter, or auto: the first that takes the model.

    Raises:
        UnsplittableModelError: no adapter takes it; the message says why.
        UserError: an unknown adapter.
    """
    if adapter != "auto" and adapter not in _ADAPTERS:
        raise UserError(f"unknown adapter '{adapter}': {did_you_mean(adapter, ['auto', *_ADAPTERS])}")
    for name in reversed(_ADAPTERS) if adapter == "auto" else [adapter]:
        chain = _ADAPTERS[name](model)
        if chain is not None:
            _check_ownership(chain)
            return chain
    raise UnsplittableModelError(f"adapter '{adapter}' does not take a {type(model).__name__}")


def _check_ownership(chain: Chain) -> None:
    """Every trained parameter is in exactly one block."""
    owner: dict[int, tuple[str, str]] = {}
    for block in (*chain.blocks, chain.tail):
        for name, parameter in chain.parameters_of(block).items():
            known = owner.setdefault(id(parameter), (block.name, name))
            if known[0] != block.name:
                raise SharedParameterError(
                    f"{known[1]} (block {known[0]}) and {name} (block {block.name}) are one parameter, which two modules"
                    " would train: call localrecon.untie(model), or localrecon.detach_tied(model) to train it in the first"
                    " block alone"
                )
    lost = [name for name, p in chain.model.named_parameters() if p.requires_grad and id(p) not in owner]
    if lost:
        raise UnsplittableModelError(f"no block of the {chain.adapter} adapter holds {', '.join(lost[:3])}")


def untie(model: nn.Module) -> nn.Module:
    """Give every module its own copy of a parameter that several share; returns the model, changed in place."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(getattr(module, name)))
    if hasattr(model, "config") and hasattr(model.config, "tie_word_embeddings"):
        model.config.tie_word_embeddings = False
    return model


class _DetachedLinear(nn.Module):
    """A linear layer that borrows a weight, and passes no gradient to it."""

    bias: nn.Parameter | None

    def __init__(self, owner: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.borrowed = (owner,)  # a tuple, so that it is not registered here
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The owner's, without gradient."""
        weight: Any = self.borrowed[0].weight
        return torch.as_tensor(weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.linear(x, self.weight, self.bias)


def detach_tied(model: nn.Module) -> nn.Module:
    """Let output layers that share the embedding's weight use it without training it; returns the model, changed in place.

    The weight is then trained by the first module alone. ``state_dict`` loses the second name of the weight.
    """
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child.weight) in embeddings:
                setattr(parent, name, _DetachedLinear(embeddings[id(child.weight)], child.bias))
    return model


# Adapters, the most general first


@register_adapter("fx")
def fx_adapter(model: nn.Module) -> Chain:
    """Any model that torch.fx can trace: cuts wherever exactly one live tensor crosses."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:
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
    merged = _merge_without_parameters(model, blocks)
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


def _merge_without_parameters(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """Blocks without parameters join the block before them (at the beginning: the one after)."""
    chain = Chain(model, (), blocks[0], "")
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and (not chain.parameters_of(block) or not chain.parameters_of(*groups[-1])):
            groups[-1].append(block)
        else:
            groups.append([block])
    return [_join(group) for group in groups]


def _join(group: Sequence[Block]) -> Block:
    if len(group) == 1:
        return group[0]

    def run(x: Any, context: Context) -> Tensor:
        for block in group:
            x = block.run(x, context)
        return torch.as_tensor(x)

    return Block(group[0].name, run, tuple(name for block in group for name in block.owns))


class ListAdapter(nn.Module):
    """Modules and plain functions, called one after another, as a model.

    Args:
        steps: each takes what the one before returned. The last one with parameters is the classifier.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Tensor]]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.parts = nn.ModuleDict({str(i): step for i, step in enumerate(steps) if isinstance(step, nn.Module)})

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for step in self.steps:
            x = step(x)
        return x


@register_adapter("list")
def list_adapter(model: nn.Module) -> Chain | None:
    """A ``ListAdapter``."""
    if not isinstance(model, ListAdapter):
        return None
    blocks = [
        Block(getattr(step, "__name__", str(i)), _plain(step), (f"parts.{i}",) if str(i) in model.parts else ())
        for i, step in enumerate(model.steps)
    ]
    return _sequence(model, blocks, "list")


@register_adapter("sequential")
def sequential_adapter(model: nn.Module) -> Chain | None:
    """An ``nn.Sequential``: each child is a block; the last one with parameters is the classifier."""
    if not isinstance(model, nn.Sequential):
        return None
    blocks = [Block(name, _plain(child), (name,)) for name, child in model.named_children()]
    return _sequence(model, blocks, "sequential")


def _sequence(model: nn.Module, blocks: Sequence[Block], adapter: str) -> Chain:
    merged = _merge_without_parameters(model, blocks) if blocks else []
    if len(merged) < 2:
        raise UnsplittableModelError(
            f"{type(model).__name__} has {len(merged)} parts with parameters; expected two or more, the last a classifier"
        )
    return Chain(model, tuple(merged[:-1]), merged[-1], adapter)


def _plain(call: Callable[[Any], Tensor]) -> Callable[[Any, Context], Tensor]:
    def run(x: Any, context: Context) -> Tensor:
        return call(x)

    return run


@register_adapter("resnet")
def resnet_adapter(model: nn.Module) -> Chain | None:
    """ResNets of torchvision and timm, and what is built like them: stem, layer1 .. layerN, pooling, fc."""
    if not all(hasattr(model, name) for name in ("conv1", "bn1", "layer1", "fc")):
        return None
    net: Any = model
    early = [name for name in ("conv1", "bn1", "act1", "relu", "maxpool") if hasattr(net, name)]

    def stem(x: Any, context: Context) -> Tensor:
        for name in early:
            x = getattr(net, name)(x)
        return torch.as_tensor(x)

    def tail(x: Tensor, context: Context) -> Tensor:
        if hasattr(net, "forward_head"):
            return torch.as_tensor(net.forward_head(x))
        return torch.as_tensor(net.fc(torch.flatten(net.avgpool(x), 1)))

    blocks = [Block("stem", stem, tuple(early))]
    for stage in (f"layer{i}" for i in range(1, 10) if hasattr(net, f"layer{i}")):
        blocks += [
            Block(f"{stage}.{name}", _plain(child), (f"{stage}.{name}",))
            for name, child in getattr(net, stage).named_children()
        ]
    return Chain(model, tuple(blocks), Block("fc", tail, ("fc",)), "resnet")


@register_adapter("timm_vit")
def timm_vit_adapter(model: nn.Module) -> Chain | None:
    """ViT and DeiT of timm: patches with positions, blocks, norm with pooling and classifier."""
    if not all(hasattr(model, name) for name in ("patch_embed", "_pos_embed", "blocks", "forward_head")):
        return None
    net: Any = model

    def embed(x: Any, context: Context) -> Tensor:
        return torch.as_tensor(net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x)))))

    def tail(x: Tensor, context: Context) -> Tensor:
        return torch.as_tensor(net.forward_head(net.norm(x)))

    blocks = [
        Block(f"blocks.{name}", _plain(child), (f"blocks.{name}",)) for name, child in net.blocks.named_children()
    ]
    late = tuple(n for n in ("norm", "fc_norm", "head_drop", "head", "head_dist", "attn_pool") if _is_part(net, n))
    early = _rest(model, [*(block.owns[0] for block in blocks), *late])
    return Chain(model, (Block("embed", embed, early), *blocks), Block("head", tail, late), "timm_vit")


def _is_part(model: Any, name: str) -> bool:
    return isinstance(getattr(model, name, None), nn.Module)


def _rest(model: nn.Module, taken: Sequence[str]) -> tuple[str, ...]:
    """Names of the parameters that no name of ``taken`` covers, and of the modules that hold only such ones."""
    ours = tuple(f"{name}." for name in taken)
    loose = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(ours)]
    whole: list[str] = []
    for name, module in model.named_modules():
        inside = [n for n, _ in model.named_parameters(remove_duplicate=False) if n.startswith(f"{name}.")]
        covered = any(name.startswith(f"{w}.") for w in whole)
        free = not name.startswith(ours) and name not in taken and not any(t.startswith(f"{name}.") for t in taken)
        if name and free and not covered and (inside or not list(module.children())):
            whole.append(name)
    loose = [name for name in loose if not any(name.startswith(f"{w}.") for w in whole)]
    return (*whole, *loose)


class _Reached(Exception):
    """Ends a forward pass where the first layer would begin."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments = args, kwargs


@contextlib.contextmanager
def _stopping_at(layer: nn.Module) -> Iterator[None]:
    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Family:
    """Where a kind of model of transformers keeps its layers and what comes after them."""

    layers: tuple[str, ...]  # of several names, the one that is there: it changes between versions
    before_head: str
    head: tuple[str, ...]
    pick: Callable[[Tensor], Tensor] = field(default=lambda x: x)


_FAMILIES = (
    _Family(("transformer.h",), "transformer.ln_f", ("lm_head",)),
    _Family(("model.layers",), "model.norm", ("lm_head",)),
    _Family(("bert.encoder.layer",), "bert.pooler", ("dropout", "classifier")),
    _Family(("vit.layers", "vit.encoder.layer"), "vit.layernorm", ("classifier",), lambda x: x[:, 0]),
)


def _has(model: nn.Module, name: str) -> bool:
    try:
        return _get(model, name) is not None
    except AttributeError:
        return False


@register_adapter("transformers")
def transformers_adapter(model: nn.Module) -> Chain | None:
    """GPT-2, Llama and its likes, BERT and ViT of transformers; masks and positions are computed once."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    found = [
        (family, layers)
        for family in _FAMILIES
        for layers in family.layers
        if all(_has(model, name) for name in (layers, family.before_head, *family.head))
    ]
    if not found:
        raise UnsplittableModelError(
            f"{type(model).__name__}: of transformers, GPT-2, Llama-like, BERT and ViT models with a head are known;"
            " register an adapter for another kind"
        )
    family, layers = found[0]
    net: Any = model
    first: nn.Module = _get(model, layers)[0]

    def reach(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(inputs) if isinstance(inputs, Mapping) else {net.main_input_name: inputs}
        if "lm_head" in family.head:
            given["use_cache"] = False
        try:
            with _stopping_at(first):
                net(**given)
        except _Reached as reached:
            return reached.arguments
        raise UnsplittableModelError(f"{type(model).__name__} did not call its first layer")

    def context(inputs: Inputs) -> Context:
        with torch.no_grad():
            args, kwargs = reach(inputs)
        kwargs.pop("hidden_states", None)
        return args[1:], kwargs

    def embed(x: Any, context: Context) -> Tensor:
        args, kwargs = reach(x)
        return torch.as_tensor(args[0] if args else kwargs["hidden_states"])

    def layer(module: nn.Module) -> Callable[[Any, Context], Tensor]:
        def run(x: Any, context: Context) -> Tensor:
            args, kwargs = context
            out = module(x, *args, **kwargs)
            return torch.as_tensor(out[0] if isinstance(out, tuple) else out)  # a tuple before transformers 5

        return run

    def tail(x: Tensor, context: Context) -> Tensor:
        x = family.pick(_get(model, family.before_head)(x))
        for name in family.head:
            x = getattr(net, name)(x)
        return x

    blocks = [
        Block(f"{layers}.{name}", layer(child), (f"{layers}.{name}",))
        for name, child in _get(model, layers).named_children()
    ]
    late = (family.before_head, *family.head)
    early = _rest(model, [*(block.owns[0] for block in blocks), *late])
    return Chain(
        model, (Block("embeddings", embed, early), *blocks), Block("head", tail, late), "transformers", context
    )
