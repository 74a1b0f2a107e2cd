"""Attach factors to a model as a peft adapter, and save what was trained so that plain peft loads it."""

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.context import Data, collect_context
from corda.factors import FactorSet, build_factors
from corda.targets import linear, resolve_targets
from tenfold import UserError
from tenfold.runs import replacing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "default"


def get_corda_model(
    model: nn.Module, lora_config: "LoraConfig", data: Data | None, init: CordaInit | None = None
) -> "PeftModel":
    """Calibrate, solve and attach: from a base model to a ``PeftModel`` that starts at the base model's function.

    Args:
        model: the base model; its targeted weights are replaced by the residual W - s B A.
        lora_config: as for ``peft.get_peft_model``; ``init_lora_weights`` is ours.
        data: as for ``collect_context``; None with ``power=0``.
        init: default ``CordaInit()``.

    Returns:
        The ``PeftModel``; train it as any LoRA. Its attribute-free state is peft's own. To save the outcome for the
        untouched base model, keep the factors: ``build_factors``, ``apply_corda`` and ``to_lora``.
    """
    init = init or CordaInit()
    stats = None
    if init.power:
        if data is None:
            raise UserError(f"power {init.power} needs calibration data")
        stats = collect_context(model, data, list(resolve_targets(model, lora_config)), init)
    return apply_corda(model, build_factors(model, stats, lora_config, init), lora_config)


def apply_corda(model: nn.Module, factors: FactorSet, lora_config: "LoraConfig") -> "PeftModel":
    """Wrap the model by peft with A and B as the adapter and the residual W' = W - s B A as the frozen weight.

    W' is computed in fp64 from A and B as they are stored, so W' + s B A differs from W by the one rounding of W' to
    its own dtype (exact zero difference cannot be had in floating point).

    Raises:
        UserError: the model has an adapter already, is not the one that the factors were made for, or is targeted
            otherwise.
    """
    from peft import get_peft_model

    targets = resolve_targets(model, lora_config)
    if targets != factors.targets:
        raise UserError("the LoRA configuration targets other layers or ranks than the factors were built for")
    for name in targets:
        if linear(model, name).weight.shape != factors.layers[name].shape:
            raise UserError(f"layer {name} has another shape than the factors were built for")
    plain = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    wrapped = get_peft_model(model, plain)
    with torch.no_grad():
        for name, layer in lora_layers(wrapped).items():
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            A.copy_(factors.factors[name].A)
            B.copy_(factors.factors[name].B)
            weight = layer.get_base_layer().weight
            weight.copy_(weight.double() - layer.scaling[ADAPTER] * (B.double() @ A.double()))
    return wrapped


def lora_layers(wrapped: "PeftModel") -> dict[str, Any]:
    """LoRA layers of a wrapped model, by the name of the layer that each wraps."""
    from peft.tuners.lora import LoraLayer

    layers = ((path, module) for path, module in wrapped.named_modules() if isinstance(module, LoraLayer))
    return {path.removeprefix("base_model.model."): module for path, module in layers}


def residual_state(wrapped: "PeftModel") -> dict[str, Tensor]:
    """The weights of the wrapped model without its adapter, under the base model's own names."""
    state = wrapped.get_base_model().state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def save_initial(wrapped: "PeftModel", folder: str | os.PathLike[str]) -> None:
    """Save the adapter as it is; it belongs to the residual model, not to the original one.

    The folder loads by ``PeftModel.from_pretrained(residual_model, folder, is_trainable=True)``: its configuration
    carries ``init_lora_weights: true``, so nothing is initialised again.

    Raises:
        UserError: the model is anchored, so that there is no residual model.
    """
    tensors = {}
    for name, layer in lora_layers(wrapped).items():
        if hasattr(layer.lora_A[ADAPTER], "anchor"):
            raise UserError("an anchored model has no residual model; save it by save_pretrained or to_lora")
        tensors[f"{name}.lora_A"] = layer.lora_A[ADAPTER].weight
        tensors[f"{name}.lora_B"] = layer.lora_B[ADAPTER].weight
    config: Any = wrapped.peft_config[ADAPTER]
    _save(config, tensors, folder)


def _save(config: Any, tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    from safetensors.torch import save_file

    folder = Path(folder)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.inference_mode = True
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    named = {f"base_model.model.{name}.weight": t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(named, temporary, metadata={"format": "pt"})
    with replacing(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
