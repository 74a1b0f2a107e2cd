"""Attach factors to a model the paper's way: A and B as a peft adapter, the residual W - s B A as the frozen weight."""

import copy
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corda.adapters import ADAPTER, adapter_state, bring_back, lora_layers, save_adapter
from corda.algebra import STRIP
from corda.factors import FactorSet
from corda.targets import resolve_targets, writable_weights
from tenfold import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def apply_corda(model: nn.Module, factors: FactorSet, lora_config: "LoraConfig") -> "PeftModel":
    """Wrap the model by peft with A and B as the adapter and the residual W' = W - s B A as the frozen weight.

    W' is computed in fp64 from A and B as they are stored, so W' + s B A differs from W only by the one rounding of W' to
    its own dtype (floating point does not allow a difference of exactly zero). With ``use_dora``, the magnitudes are the
    norms of W' + s B A.

    Args:
        model: the base model; its targeted weights become W'.
        factors: factors of this model.
        lora_config: as for ``build_factors``.

    Returns:
        The ``PeftModel``; train it as any LoRA.

    Raises:
        UserError: the model already has an adapter, is not the one that the factors were made for, or the configuration
            has other targets; then no weight has changed.
        UnsupportedLayerError: a target is quantized, so that its weight cannot be replaced.
    """
    from peft import get_peft_model

    targets = resolve_targets(model, lora_config)
    if targets != factors.targets:
        raise UserError("the LoRA configuration targets other layers or ranks than the factors were built for")
    weights = writable_weights(model, targets)
    for name, W in weights.items():
        if W.shape != factors.layers[name].shape:
            raise UserError(f"layer {name} has another shape than the factors were built for")
    factors.check_model(model)
    plain = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    wrapped = get_peft_model(model, plain)
    bring_back(wrapped)
    with torch.no_grad():
        for name, layer in lora_layers(wrapped).items():
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            W, s = weights[name], layer.scaling[ADAPTER]
            A.copy_(factors.factors[name].A)
            B.copy_(factors.factors[name].B)
            A_double = A.double()
            for start in range(0, len(W), STRIP):  # no copy of W in fp64
                rows = slice(start, start + STRIP)
                W[rows] = W[rows].double() - s * (B[rows].double() @ A_double)
            if ADAPTER in layer.lora_magnitude_vector:  # peft has taken them of W, before it was rounded to W'
                dora = layer.lora_magnitude_vector[ADAPTER]
                stored = layer.get_base_layer().weight
                dora.weight.copy_(dora.get_weight_norm(weight=stored, lora_weight=B @ A, scaling=s))
    return wrapped


def residual_state(wrapped: "PeftModel") -> dict[str, Tensor]:
    """The weights of the wrapped model without its adapter, under the base model's own names."""
    state = wrapped.get_base_model().state_dict()
    added = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")
    inserted = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)(?=\.)")
    return {inserted.sub("", name): value for name, value in state.items() if not added.search(name)}


def save_initial(wrapped: "PeftModel", folder: str | os.PathLike[str]) -> None:
    """Save the adapter as it is; it belongs to the residual model, not to the original one.

    Everything that peft saves is included, also biases and ``modules_to_save``. The folder is loaded by
    ``PeftModel.from_pretrained(residual_model, folder, is_trainable=True)``: its configuration has
    ``init_lora_weights: true``, so nothing is initialized again.

    Args:
        wrapped: a model of ``apply_corda``.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UserError: the model is anchored, so that there is no residual model.
    """
    if any(hasattr(layer.lora_A[ADAPTER], "anchor") for layer in lora_layers(wrapped).values()):
        raise UserError("an anchored model has no residual model; save it by save_pretrained or to_lora")
    config: Any = wrapped.peft_config[ADAPTER]
    save_adapter(config, adapter_state(wrapped), folder)
