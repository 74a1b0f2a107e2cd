"""Taking a model apart: an adapter for each kind of model, and the choice of one.

An adapter returns the model's ``Chain``, or None where the model is of another kind.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.chain import (
    Block,
    Chain,
    Context,
    Inputs,
    UnsplittableModelError,
    merge_without_parameters,
    submodule,
)
from localrecon.tracing import traced_chain
from tenfold import UserError
from tenfold.errors import did_you_mean

Adapter = Callable[[nn.Module], "Chain | None"]


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
        """What the last step returns."""
        for step in self.steps:
            x = step(x)
        return x


def list_adapter(model: nn.Module) -> Chain | None:
    """The chain of a ``ListAdapter``."""
    if not isinstance(model, ListAdapter):
        return None
    blocks = [
        Block(getattr(step, "__name__", str(i)), _plain(step), (f"parts.{i}",) if str(i) in model.parts else ())
        for i, step in enumerate(model.steps)
    ]
    return _sequence(model, blocks, "list")


def sequential_adapter(model: nn.Module) -> Chain | None:
    """The chain of an ``nn.Sequential``: each child is a block; the last one with parameters is the classifier."""
    if not isinstance(model, nn.Sequential):
        return None
    blocks = [Block(name, _plain(child), (name,)) for name, child in model.named_children()]
    return _sequence(model, blocks, "sequential")


def _sequence(model: nn.Module, blocks: Sequence[Block], adapter: str) -> Chain:
    merged = merge_without_parameters(model, blocks) if blocks else []
    if len(merged) < 2:
        raise UnsplittableModelError(
            f"{type(model).__name__} has {len(merged)} parts with parameters; expected two or more, the last a classifier"
        )
    return Chain(model, tuple(merged[:-1]), merged[-1], adapter)


def _plain(call: Callable[[Any], Tensor]) -> Callable[[Any, Context], Tensor]:
    def run(x: Any, context: Context) -> Tensor:
        return call(x)

    return run


def resnet_adapter(model: nn.Module) -> Chain | None:
    """The chain of a ResNet of torchvision or timm, or of what is built like it: stem, layer1 .. layerN, pooling, fc."""
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


def timm_vit_adapter(model: nn.Module) -> Chain | None:
    """The chain of a ViT or DeiT of timm: patches with positions, blocks, norm with pooling and classifier."""
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

    layers: tuple[str, ...]  # the name differs between versions: the first that is there
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
        return submodule(model, name) is not None
    except AttributeError:
        return False


def transformers_adapter(model: nn.Module) -> Chain | None:
    """The chain of a GPT-2, Llama-like, BERT or ViT model of transformers; masks and positions are computed once.

    Raises:
        UnsplittableModelError: a model of transformers of another kind.
    """
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
    first: nn.Module = submodule(model, layers)[0]

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
        x = family.pick(submodule(model, family.before_head)(x))
        for name in family.head:
            x = getattr(net, name)(x)
        return x

    blocks = [
        Block(f"{layers}.{name}", layer(child), (f"{layers}.{name}",))
        for name, child in submodule(model, layers).named_children()
    ]
    late = (family.before_head, *family.head)
    early = _rest(model, [*(block.owns[0] for block in blocks), *late])
    return Chain(
        model, (Block("embeddings", embed, early), *blocks), Block("head", tail, late), "transformers", context
    )


# Asked from the last to the first: the most general one first
_ADAPTERS: dict[str, Adapter] = {
    "fx": traced_chain,
    "list": list_adapter,
    "sequential": sequential_adapter,
    "resnet": resnet_adapter,
    "timm_vit": timm_vit_adapter,
    "transformers": transformers_adapter,
}


def register_adapter(name: str) -> Callable[[Adapter], Adapter]:
    """Decorator that registers a function as an adapter: it returns a model's chain, or None for a model of another kind.

    Adapters that were registered later are asked first, and before all built-in ones.

    Args:
        name: name of the adapter; one of the same name is replaced.
    """

    def register(adapter: Adapter) -> Adapter:
        _ADAPTERS[name] = adapter
        return adapter

    return register


def build_chain(model: nn.Module, adapter: str = "auto") -> Chain:
    """The chain of a model.

    Args:
        model: the model.
        adapter: name of an adapter, or auto: the first that takes the model.

    Raises:
        UnsplittableModelError: no adapter takes it; the message says why.
        SharedParameterError: two blocks hold one parameter.
        UserError: an unknown adapter.
    """
    if adapter != "auto" and adapter not in _ADAPTERS:
        raise UserError(f"unknown adapter '{adapter}': {did_you_mean(adapter, ['auto', *_ADAPTERS])}")
    for name in reversed(_ADAPTERS) if adapter == "auto" else [adapter]:
        chain = _ADAPTERS[name](model)
        if chain is not None:
            chain.check_ownership()
            return chain
    raise UnsplittableModelError(f"adapter '{adapter}' does not take a {type(model).__name__}")
