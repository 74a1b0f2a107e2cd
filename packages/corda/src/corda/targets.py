"""Which layers of a model an adapter covers, with which rank and scaling: peft itself is asked."""

import copy
import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from tenfold import UserError
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig


class UnsupportedLayerError(UserError, TypeError):
    """A target that is no linear layer with floating-point weights of its own."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer that an adapter covers: its rank r and LoRA's scaling s in front of B A."""

    name: str
    rank: int
    scaling: float


def linear_targets(model: nn.Module) -> list[str]:
    """Full names of all ``nn.Linear`` modules but the output head, in the model's order."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name, with floating-point weights that no other layer shares.

    Raises:
        UserError: no such layer, or its weight is tied to another one (a change would reach that one too).
        UnsupportedLayerError: not an ``nn.Linear``, or quantised.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        raise UserError(f"no layer {name} in the model: {did_you_mean(name, modules)}")
    module = modules[name]
    if not isinstance(module, nn.Linear):
        raise UnsupportedLayerError(f"layer {name} is a {type(module).__name__}; expected nn.Linear")
    if not module.weight.is_floating_point():
        raise UnsupportedLayerError(f"layer {name} has {module.weight.dtype} weights; expected floating point")
    uses = Counter(id(weight) for other in modules.values() for weight in other.parameters(recurse=False))
    if uses[id(module.weight)] > 1:
        raise UserError(f"layer {name} shares its weight with another layer; leave it out of the targets")
    return module


def resolve_targets(model: nn.Module, lora_config: "LoraConfig") -> dict[str, Target]:
    """The layers, ranks and scalings that ``peft.get_peft_model(model, lora_config)`` would give, by full name.

    A copy of the model without storage is wrapped, so every option of the configuration counts (``"all-linear"``,
    patterns, layers to transform, rsLoRA) and the model itself stays untouched.

    Raises:
        UserError: no layer is targeted, or the model is wrapped by peft already.
    """
    from peft import PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    if isinstance(model, PeftModel):
        raise UserError("the model has an adapter already; give the plain base model")
    plain = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(tensor): _without_storage(tensor) for tensor in tensors}
    try:
        wrapped = get_peft_model(copy.deepcopy(model, empty), plain)
    except ValueError as error:
        raise UserError(f"peft cannot apply this LoRA configuration: {error}") from error
    found = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            name = path.removeprefix("base_model.model.")
            found[name] = Target(name, module.r["default"], module.scaling["default"])
    if not found:
        raise UserError(f"no layer of the model is targeted by {sorted(lora_config.target_modules or [])}")
    return found


def _without_storage(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
