"""A torch module in evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluating(*models: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Within the block, evaluation mode; afterwards each submodule has its own mode again.

    ``model.train(mode)`` would give all submodules one mode; a frozen batch norm inside a training model keeps its own here.

    Args:
        models: modules with all their submodules.
        gradients: record gradients within the block. Else none are recorded (``torch.no_grad``, not inference mode,
            whose tensors cannot be used in a later backward pass).
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with contextlib.nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
