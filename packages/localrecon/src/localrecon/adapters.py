"""Taking a model apart: an adapter for models that are a sequence already; all others along their own forward pass.

An adapter returns the model's ``Chain``, or None where the model is of another kind.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from localrecon.chain import Block, Chain, Context, UnsplittableModelError, merge_without_parameters
from localrecon.equality import leaking_cuts
from localrecon.inputs import Inputs
from localrecon.routes import Route
from localrecon.segments import NAME, SegmentChain, segmented
from tenfold import UserError
from tenfold.errors import did_you_mean

Adapter = Callable[[nn.Module], "Chain | None"]


class ListAdapter(nn.Module):
    """Modules and plain functions, called one after another, as a model.

    Args:
        steps: each takes what the one before returned. The last one with parameters is the classifier.

    Example:
        >>> model = ListAdapter([nn.Linear(8, 4), torch.relu, nn.Linear(4, 3)])
        >>> model(torch.randn(2, 8)).shape
        torch.Size([2, 3])
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
    """The chain of an ``nn.Sequential``: each child is a block; the last one with parameters is the classifier.

    One with a ``forward`` or hooks of its own is more than a sequence.
    """
    if not isinstance(model, nn.Sequential) or type(model).forward is not nn.Sequential.forward:
        return None
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    # not ``named_children``, which leaves out an object that comes again
    blocks = [Block(name, _plain(child), (name,)) for name, child in model._modules.items() if child is not None]
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


# Asked from the last to the first; a model that none takes is cut along its own forward pass
_ADAPTERS: dict[str, Adapter] = {"list": list_adapter, "sequential": sequential_adapter}


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


def build_chain(
    model: nn.Module, adapter: str = "auto", sample: Inputs | None = None, route: Route | None = None
) -> Chain:
    """The chain of a model.

    Args:
        model: the model.
        adapter: name of an adapter, or auto: the first that takes the model, or else its own forward pass ("segments").
        sample: one batch, which the model is run on where no adapter takes it.
        route: what an earlier run has found, in place of a sample.

    Raises:
        UnsplittableModelError: the model cannot be cut; the message says why.
        SharedParameterError: two blocks hold one parameter.
        UserError: an unknown adapter.
    """
    names = [*_ADAPTERS, NAME]
    if adapter != "auto" and adapter not in names:
        raise UserError(f"unknown adapter '{adapter}': {did_you_mean(adapter, ['auto', *names])}")
    chain = None if adapter == NAME else _adapted(model, adapter)
    if chain is None:
        chain = _along_forward(model, sample, route)
    chain.check_ownership()
    return chain


def _adapted(model: nn.Module, adapter: str) -> Chain | None:
    for name in reversed(_ADAPTERS) if adapter == "auto" else [adapter]:
        chain = _ADAPTERS[name](model)
        if chain is not None:
            chain.check_complete()
            return chain
    if adapter != "auto":
        raise UnsplittableModelError(f"adapter '{adapter}' does not take a {type(model).__name__}")
    return None


def _along_forward(model: nn.Module, sample: Inputs | None, route: Route | None) -> Chain:
    if route is not None:
        return SegmentChain(model, route)
    if sample is None:
        raise UserError(
            f"a {type(model).__name__} is cut along its own forward pass, which needs a batch: give a sample"
        )
    chain, unused = segmented(model, sample)
    if leaking := leaking_cuts(chain, sample):
        chain, unused = segmented(model, sample, leaking)
    if unused:
        warnings.warn(
            f"the output of {type(model).__name__} does not depend on {len(unused)} trained parameters, which stay as they"
            f" are: {', '.join(unused[:3])}",
            stacklevel=4,
        )
    return chain
