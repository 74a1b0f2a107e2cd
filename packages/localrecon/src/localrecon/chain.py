"""A model as a chain of blocks between which exactly one tensor crosses; the model and its key names stay as they are.

Blocks call the user's own submodules, so what is trained is the user's model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localrecon.inputs import Inputs
from tenfold import UserError

Context = Any
"""What all blocks share and no gradient passes."""
Task = Literal["classify", "lm", "custom"]
"""Cross-entropy per sample, cross-entropy per token, or a loss of the user's."""


class UnsplittableModelError(UserError):
    """The model has no point where exactly one tensor crosses; the message says what crosses where."""


class SharedParameterError(UserError):
    """A parameter belongs to two modules, which would then both train it."""


def _no_context(inputs: Inputs) -> Context:
    return None


@dataclass(frozen=True)
class Block:
    """One link of a chain.

    Attributes:
        name: name for people.
        run: (input, context) -> output.
        owns: names of the model's submodules and loose parameters that it uses.
    """

    name: str
    run: Callable[[Any, Context], Tensor]
    owns: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """``model(inputs) == tail(blocks(inputs))``.

    Attributes:
        model: the user's model.
        blocks: b_1 .. b_N, in order.
        tail: the model's own classifier, which is the head of the last module.
        adapter: name of what took the model apart.
        context: inputs -> what all blocks get besides their input.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    tail: Block
    adapter: str
    context: Callable[[Inputs], Context] = field(default=_no_context)

    def run(self, first: int, past: int, x: Any, context: Context) -> Tensor:
        """Blocks ``first`` to ``past - 1`` one after another; behind the last one comes the tail."""
        for block in (*self.blocks, self.tail)[first:past]:
            x = block.run(x, context)
        return torch.as_tensor(x)

    def select(self, context: Context, rows: Tensor) -> Context:
        """The context of some samples alone.

        Raises:
            UserError: the blocks share something of which that is not known.
        """
        if context is None:
            return None
        raise UserError(
            f"samples of a batch cannot be taken apart in a model that the adapter {self.adapter} took apart"
        )

    def parameters_of(self, *blocks: Block) -> dict[str, nn.Parameter]:
        """Parameters of some blocks by their names in the model, each once."""
        names: dict[str, nn.Parameter] = {}
        for owned in (name for block in blocks for name in block.owns):
            part = submodule(self.model, owned)
            if isinstance(part, nn.Parameter):
                names[owned] = part
            elif isinstance(part, nn.Module):
                names.update({f"{owned}.{name}" if owned else name: p for name, p in part.named_parameters()})
        return names

    def modules_of(self, *blocks: Block) -> list[nn.Module]:
        """The submodules that some blocks use."""
        parts = [submodule(self.model, name) for block in blocks for name in block.owns]
        return [part for part in parts if isinstance(part, nn.Module)]

    def check_ownership(self) -> None:
        """Refuse a chain in which a trained parameter is not in exactly one block.

        Raises:
            SharedParameterError: two blocks hold it; the message names both and the two remedies.
        """
        owner: dict[int, tuple[str, str]] = {}
        for block in (*self.blocks, self.tail):
            for name, parameter in self.parameters_of(block).items():
                known = owner.setdefault(id(parameter), (block.name, name))
                if known[0] != block.name:
                    raise SharedParameterError(
                        f"{known[1]} (block {known[0]}) and {name} (block {block.name}) are one parameter, which two modules"
                        " would train: call localrecon.untie(model), or localrecon.detach_tied(model) to train it in the first"
                        " block alone"
                    )

    def check_complete(self) -> None:
        """Refuse a chain that leaves out a trained parameter.

        Raises:
            UnsplittableModelError: no block holds it.
        """
        held = {id(p) for p in self.parameters_of(*self.blocks, self.tail).values()}
        lost = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lost:
            raise UnsplittableModelError(f"no block of the {self.adapter} adapter holds {', '.join(lost[:3])}")


def submodule(model: nn.Module, name: str) -> Any:
    """The submodule or parameter of that dotted name."""
    part: Any = model
    for step in filter(None, name.split(".")):
        part = getattr(part, step)
    return part


def merge_without_parameters(model: nn.Module, blocks: Sequence[Block]) -> list[Block]:
    """The blocks, where those without parameters have joined the one before (at the beginning: the one after)."""
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
