"""Parameters that two modules would both train: give each its own copy, or let one borrow without training."""

from typing import Any

import torch
from torch import Tensor, nn


def untie(model: nn.Module) -> nn.Module:
    """Give every module its own copy of a parameter that several share.

    Args:
        model: the model; changed in place.

    Returns:
        The model.
    """
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
        """The linear map by the borrowed weight."""
        return nn.functional.linear(x, self.weight, self.bias)


def detach_tied(model: nn.Module) -> nn.Module:
    """Let output layers that share the embedding's weight use it without training it.

    The weight is then trained by the first module alone. ``state_dict`` loses the second name of the weight.

    Args:
        model: the model; changed in place.

    Returns:
        The model.
    """
    embeddings = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and id(child.weight) in embeddings:
                setattr(parent, name, _DetachedLinear(embeddings[id(child.weight)], child.bias))
    return model
