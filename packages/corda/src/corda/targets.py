"""Which layers of a model an adapter covers, with which rank and scaling (as peft itself resolves them), and their weights.

Shapes: m outputs, n inputs. The weight of any layer is given as W (m, n) in floating point, as in ``nn.Linear``:
transposed for transformers' ``Conv1D``, dequantized for a quantized layer.
"""

import contextlib
import copy
import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tenfold import UserError
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that hold a weight itself; a float of one byte means nothing without its scale."""


class UnsupportedLayerError(UserError, TypeError):
    """A target that is not a linear layer, or whose weight cannot be read or changed as needed."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One layer that an adapter covers: its rank r and LoRA's scaling s in front of B A."""

    name: str
    rank: int
    scaling: float


def linear_targets(model: nn.Module) -> list[str]:
    """Full names of all linear layers except the output head and those that share their weight, in the model's order.

    Linear are ``nn.Linear``, transformers' ``Conv1D`` and, as quantized layers are, any other module without children
    that has ``in_features`` and ``out_features``.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    uses = _uses(model)
    modules = model.named_modules()
    return [name for name, m in modules if is_linear(m) and m is not head and not _is_shared(m, uses)]


def linear(model: nn.Module, name: str) -> nn.Module:
    """The linear layer of this name, whose weight no other layer shares.

    Raises:
        UserError: as for ``linears``.
        UnsupportedLayerError: not a linear layer.
    """
    return linears(model, [name])[name]


def linears(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers of these names, none of whose weights is shared with another layer.

    Raises:
        UserError: no such layer, or its weight is tied to another one (a change would reach that one too).
        UnsupportedLayerError: not a linear layer.
    """
    modules, uses = dict(model.named_modules()), _uses(model)
    found = {}
    for name in names:
        if name not in modules:
            raise UserError(f"no layer {name} in the model: {did_you_mean(name, modules)}")
        found[name] = modules[name]
        shape_of(found[name], name)
        if _is_shared(found[name], uses):
            raise UserError(
                f"layer {name} shares its weight with another layer; leave it out of target_modules or put it into "
                f"exclude_modules=['{name}']"
            )
    return found


def shape_of(layer: nn.Module, name: str) -> tuple[int, int]:
    """(m, n) of a linear layer, however it keeps its weight.

    Raises:
        UnsupportedLayerError: not a linear layer.
    """
    if not is_linear(layer):
        kinds = "nn.Linear, Conv1D or a quantized linear layer"
        raise UnsupportedLayerError(
            f"layer {name} is a {type(layer).__name__}; expected {kinds}; leave it out of target_modules or put it into "
            f"exclude_modules=['{name}']"
        )
    if isinstance(layer, Conv1D):
        return (layer.weight.shape[1], layer.weight.shape[0])
    found: Any = layer
    return (found.out_features, found.in_features)


def weight_of(model: nn.Module, name: str) -> Tensor:
    """W (m, n) of the linear layer of this name, whether or not another layer shares it.

    Raises:
        UnsupportedLayerError: as for ``layer_weight``.
    """
    return layer_weight(model.get_submodule(name), name)


def layer_weight(layer: nn.Module, name: str) -> Tensor:
    """W (m, n) of a linear layer: the layer's own memory if it is kept in floating point, else dequantized.

    bitsandbytes' layers are dequantized by peft; any other class (HQQ, torchao, quanto ...) through ``dequantize()``, of
    the layer or of its weight tensor.

    Raises:
        UnsupportedLayerError: not a linear layer, or one that cannot be dequantized.
    """
    shape = shape_of(layer, name)
    kept = _kept(layer)
    if kept is not None:
        return kept.detach().T if isinstance(layer, Conv1D) else kept.detach()
    W = _dequantized(layer)
    if not isinstance(W, Tensor) or W.dtype not in FLOATS or W.shape != shape:
        raise UnsupportedLayerError(
            f"layer {name} is a {type(layer).__name__} whose weight cannot be dequantized; "
            "build the factors on the unquantized model and attach them by apply_anchor"
        )
    return W.detach()


def writable_weight(model: nn.Module, name: str) -> Tensor:
    """W (m, n) of the linear layer of this name, as a view through which the layer's own weight is changed.

    Raises:
        UserError: as for ``linear``.
        UnsupportedLayerError: not a linear layer, a quantized one, or one that is offloaded to disk.
    """
    return writable_weights(model, [name])[name]


def writable_weights(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """``writable_weight`` of several layers.

    Raises:
        UserError: as for ``writable_weight``.
        UnsupportedLayerError: as for ``writable_weight``.
    """
    return {name: _writable(layer, name) for name, layer in linears(model, names).items()}


def _writable(layer: nn.Module, name: str) -> Tensor:
    if is_quantized(layer):
        raise UnsupportedLayerError(
            f"layer {name} is a {type(layer).__name__} whose weight is quantized, or no parameter of its own, and "
            "cannot be replaced; apply_anchor (attach='anchor') leaves it as it is"
        )
    W = layer_weight(layer, name)
    own: Any = layer.weight
    other = offloaded(layer, "weight") if own.device.type == "meta" else None
    if other is not None and other.data_ptr() != W.data_ptr():  # read from a file anew each time
        raise UnsupportedLayerError(
            f"layer {name} is offloaded to disk, where its weight cannot be replaced; apply_anchor (attach='anchor') "
            "leaves it as it is"
        )
    return W


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as anything but a floating-point parameter of that shape."""
    kept = _kept(layer)
    own = layer._parameters.get("weight")
    return kept is None or (own is not kept and (own is None or own.device.type != "meta"))


def dequantizes(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that holds quantized values behind a floating-point dtype (torchao, quanto)."""
    return type(tensor).dequantize is not Tensor.dequantize


def resolve_targets(model: nn.Module, lora_config: "LoraConfig") -> dict[str, Target]:
    """The layers, ranks and scalings that ``peft.get_peft_model(model, lora_config)`` would give, by full name.

    A skeleton of the model without storage is wrapped, so every option of the configuration counts (``"all-linear"``,
    patterns, layers to transform, rsLoRA) and the model itself stays untouched. Plain layers stand in for quantized
    ones, so none of their packages is needed.

    Raises:
        UserError: no layer is targeted, the model is wrapped by peft already, or the configuration repeats layers.
    """
    from peft import PeftModel, get_peft_model
    from peft.tuners import lora

    if isinstance(model, PeftModel):
        raise UserError("the model has an adapter already; give the plain base model")
    plain: Any = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    plain._register_custom_module({_StandIn: lora.Linear})
    if getattr(lora_config, "layer_replication", None):
        raise UserError(
            "layer_replication repeats layers, which then share one weight: leave it out, or build the model so"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says the same of the model itself, once it is wrapped
            wrapped = get_peft_model(_skeleton(model), plain)
    except (ValueError, TypeError) as error:
        raise UserError(f"peft cannot apply this LoRA configuration: {error}") from error
    found = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, lora.LoraLayer):
            name = path.removeprefix("base_model.model.")
            found[name] = Target(name, module.r["default"], module.scaling["default"])
    if not found:
        raise UserError(f"no layer of the model is targeted by {sorted(lora_config.target_modules or [])}")
    return found


def with_ranks(model: nn.Module, lora_config: "LoraConfig", ranks: Mapping[str, int]) -> "LoraConfig":
    """A copy of ``lora_config`` that gives each layer its rank and keeps its scaling.

    ``rank_pattern`` and ``alpha_pattern`` are replaced. peft matches their keys as regular expressions against the end of a
    layer's name, so each key is the full name, escaped, and anchored by ``^`` (else ``fc`` would also match
    ``block.fc``).

    Args:
        model: the plain base model; stays untouched.
        lora_config: targets, and the scaling of each layer by r, alpha and rsLoRA.
        ranks: layer -> rank, for exactly the layers that the configuration targets.

    Raises:
        UserError: ``ranks`` names other layers than the configuration targets, or a rank that a layer cannot have.
    """
    targets = resolve_targets(model, lora_config)
    check_same_layers("targets", targets, "ranks", ranks)
    config = copy.deepcopy(lora_config)
    config.rank_pattern, config.alpha_pattern = {}, {}
    layers = linears(model, targets)
    for name, target in targets.items():
        rank, size = ranks[name], min(shape_of(layers[name], name))
        if not 1 <= rank <= size:
            raise UserError(f"layer {name}: {rank_hint(rank, size, name)}")
        key = f"^{re.escape(name)}"
        config.rank_pattern[key] = rank
        config.alpha_pattern[key] = target.scaling * (math.sqrt(rank) if config.use_rslora else rank)
    return config


def rank_hint(rank: int, size: int, name: str) -> str:
    """That a layer has fewer components than its rank asks for, and what to do about it."""
    pattern = f"rank_pattern={{'{name}': {size}}} or exclude_modules=['{name}']"
    return f"rank {rank}, expected 1 to {size}, its number of components; give {pattern}"


def check_same_layers(first: str, expected: Iterable[str], second: str, given: Iterable[str]) -> None:
    """Raise ``UserError`` unless both hold the same layers.

    Args:
        first: name of ``expected`` in the message.
        expected: layers.
        second: name of ``given``.
        given: layers.
    """
    for here, names, there, others in ((first, expected, second, given), (second, given, first, expected)):
        known = set(others)
        lost = next((name for name in names if name not in known), None)
        if lost is not None:
            raise UserError(f"layer {lost} is in the {here} but not in the {there}: {did_you_mean(lost, known)}")


class _StandIn(nn.Module):
    """A linear layer that is not an ``nn.Linear``, like those of GPTQ and HQQ."""

    def __init__(self, in_features: int, out_features: int, device: str) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))


def _skeleton(module: nn.Module, made: dict[int, Any] | None = None) -> Any:
    """The modules of a model without their weights; whatever else they hold is shared, not copied.

    So nothing of the user's has to be copyable (locks, generators, tensors of an old weight norm), and layers that are
    shared stay shared.
    """
    root = made is None
    made = {} if made is None else made
    if id(module) in made:
        return made[id(module)]
    if is_linear(module) and is_quantized(module):
        m, n = shape_of(module, "")
        kind = nn.Linear if isinstance(module, nn.Linear) else _StandIn  # "all-linear" takes the former only
        made[id(module)] = kind(n, m, device="meta")
        return made[id(module)]
    clone = module.__class__.__new__(module.__class__)
    made[id(module)] = clone
    content = dict(vars(module))
    for name, value in content.items():
        if name.startswith("_") and isinstance(value, dict):
            content[name] = value.copy()
    if root and "config" in content:
        content["config"] = copy.copy(content["config"])  # peft writes into it
    content.pop("_hf_hook", None)
    content.pop("forward", None)  # of accelerate, bound to the module itself
    content["_parameters"] = {name: _emptied(p, made) for name, p in module._parameters.items()}
    content["_buffers"] = {name: _emptied(b, made) for name, b in module._buffers.items()}
    content["_modules"] = {
        name: None if child is None else _skeleton(child, made) for name, child in module._modules.items()
    }
    vars(clone).update(content)
    return clone


def _emptied(tensor: Tensor | None, made: dict[int, Any]) -> Any:
    """The tensor without storage, the same one for each use."""
    if tensor is None:
        return None
    return made.setdefault(id(tensor), _without_storage(tensor))


def _without_storage(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # empty_like asks a tensor's own class
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, however it keeps its weight."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and not any(module.children())


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def _is_shared(layer: nn.Module, uses: Counter[int]) -> bool:
    return any(uses[id(p)] > 1 for name, p in layer.named_parameters(recurse=False) if name != "bias")


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A weight that accelerate keeps elsewhere and brings for each call of the module; None if it does not."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        weights: Any = getattr(part, "weights_map", None)
        if weights is not None:
            with contextlib.suppress(KeyError):
                found: Tensor = weights[name]
                return found
    return None


def _kept(layer: nn.Module) -> Tensor | None:
    """The weight of a layer in its own layout; None if it is not kept in floating point."""
    weight = None if hasattr(layer, "dequantize") else getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        weight = offloaded(layer, "weight")
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or dequantizes(weight):
        return None
    m, n = shape_of(layer, "")
    fits = weight.shape == ((n, m) if isinstance(layer, Conv1D) else (m, n))  # packed into floats, it does not
    return weight if fits else None


def _dequantized(layer: Any) -> Any:
    from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type

    weight: Any = getattr(layer, "weight", None)
    if get_bnb_param_type(weight):
        # not through peft's dequantize_module_weight, after which an 8-bit layer on a CPU has lost its scales
        return dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    if hasattr(layer, "dequantize"):
        return layer.dequantize()
    return weight.dequantize() if isinstance(weight, Tensor) and dequantizes(weight) else None
