"""Attach factors to a model as a peft adapter, and save what was trained so that plain peft loads it."""

import copy
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.context import Data, collect_context
from corda.factors import FactorSet, build_factors
from corda.solvers import STRIP
from corda.streaming import stream_factors
from corda.targets import resolve_targets, writable_weight
from tenfold import UserError
from tenfold.distributed import world_size
from tenfold.errors import did_you_mean
from tenfold.runs import replacing

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "default"
PREFIX = "base_model.model."
"""In front of a layer's name in a wrapped model and in a saved adapter."""

Attach = Literal["residual", "anchor"]


def get_corda_model(
    model: nn.Module,
    lora_config: "LoraConfig",
    data: Data | None,
    init: CordaInit | None = None,
    *,
    attach: Attach = "residual",
    memory_budget: str | int | None = None,
) -> "PeftModel":
    """Calibrate, solve and attach: from a base model to a ``PeftModel`` that starts at the base model's function.

    Args:
        model: the base model; ``residual`` replaces its targeted weights by W - s B A.
        lora_config: as for ``peft.get_peft_model``; ``init_lora_weights`` is ours.
        data: as for ``collect_context``; None with ``power=0``.
        init: default ``CordaInit()``.
        attach: residual (the paper's and peft's way, see ``apply_corda``), or anchor (the base stays untouched and may be
            quantised, and the start is exact; see ``apply_anchor``).
        memory_budget: the most that statistics may take at once, such as ``"6GB"`` (see ``stream_factors``). Default: those
            of one decoder block at a time; of all layers where the data are a generator, which is used up by one pass.

    Returns:
        The ``PeftModel``; train it as any LoRA. ``to_lora`` then saves the outcome for the untouched base model: from an
        anchored model alone; from a residual one with the factors, so keep them (``build_factors``, ``apply_corda``).

    Raises:
        UserError: ``attach`` is none of the choices, or as for ``collect_context``, ``build_factors``, ``apply_corda``.
        UnsupportedLayerError: a target is quantised, and ``attach`` is residual; before any work is done.
    """
    if attach not in get_args(Attach):
        raise UserError(f"unknown attach '{attach}': {did_you_mean(str(attach), get_args(Attach))}")
    if attach == "residual":
        for name in resolve_targets(model, lora_config):
            writable_weight(model, name)
    factors = calibrated_factors(model, lora_config, data, init or CordaInit(), memory_budget=memory_budget)
    if attach == "residual":
        return apply_corda(model, factors, lora_config)
    from corda.anchor import apply_anchor  # it imports this module

    return apply_anchor(model, factors, lora_config)


def calibrated_factors(
    model: nn.Module,
    lora_config: "LoraConfig",
    data: Data | None,
    init: CordaInit,
    *,
    memory_budget: str | int | None = None,
) -> FactorSet:
    """From a base model, which stays untouched, and calibration data to the factors; ``get_corda_model`` less the attaching.

    Raises:
        UserError: ``init.power`` needs data and there is none.
    """
    if not init.power:
        return build_factors(model, None, lora_config, init)
    if data is None:
        raise UserError(f"power {init.power} needs calibration data")
    if memory_budget is not None or not isinstance(data, Iterator):
        return stream_factors(model, data, lora_config, init, memory_budget=memory_budget)
    targets = list(resolve_targets(model, lora_config))
    stats = collect_context(model, data, targets, init, reusable=False, complete=world_size() == 1).reduce()
    return build_factors(model, stats, lora_config, init)


def apply_corda(model: nn.Module, factors: FactorSet, lora_config: "LoraConfig") -> "PeftModel":
    """Wrap the model by peft with A and B as the adapter and the residual W' = W - s B A as the frozen weight.

    W' is computed in fp64 from A and B as they are stored, so W' + s B A differs from W by the one rounding of W' to
    its own dtype (exact zero difference cannot be had in floating point). With ``use_dora``, the magnitudes are the norms
    of W' + s B A.

    Raises:
        UserError: the model has an adapter already, is not the one that the factors were made for, or is targeted
            otherwise; then no weight has changed.
        UnsupportedLayerError: a target is quantised, so that its weight cannot be replaced.
    """
    from peft import get_peft_model

    targets = resolve_targets(model, lora_config)
    if targets != factors.targets:
        raise UserError("the LoRA configuration targets other layers or ranks than the factors were built for")
    weights = {name: writable_weight(model, name) for name in targets}
    for name, W in weights.items():
        if W.shape != factors.layers[name].shape:
            raise UserError(f"layer {name} has another shape than the factors were built for")
    plain = copy.deepcopy(lora_config)
    plain.init_lora_weights = True
    wrapped = get_peft_model(model, plain)
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


def lora_layers(wrapped: nn.Module) -> dict[str, Any]:
    """LoRA layers of a wrapped model, by the name of the layer that each wraps."""
    from peft.tuners.lora import LoraLayer

    layers = ((path, module) for path, module in wrapped.named_modules() if isinstance(module, LoraLayer))
    return {path.removeprefix(PREFIX): module for path, module in layers}


def residual_state(wrapped: "PeftModel") -> dict[str, Tensor]:
    """The weights of the wrapped model without its adapter, under the base model's own names."""
    state = wrapped.get_base_model().state_dict()
    added = re.compile(r"\.(lora_|modules_to_save\.|trainable_tokens_)")
    inserted = re.compile(r"\.(token_adapter\.)?(base_layer|original_module)(?=\.)")
    return {inserted.sub("", name): value for name, value in state.items() if not added.search(name)}


def save_initial(wrapped: "PeftModel", folder: str | os.PathLike[str]) -> None:
    """Save the adapter as it is; it belongs to the residual model, not to the original one.

    All that peft saves is there, biases and ``modules_to_save`` included. The folder loads by
    ``PeftModel.from_pretrained(residual_model, folder, is_trainable=True)``: its configuration carries
    ``init_lora_weights: true``, so nothing is initialised again.

    Raises:
        UserError: the model is anchored, so that there is no residual model.
    """
    if any(hasattr(layer.lora_A[ADAPTER], "anchor") for layer in lora_layers(wrapped).values()):
        raise UserError("an anchored model has no residual model; save it by save_pretrained or to_lora")
    config: Any = wrapped.peft_config[ADAPTER]
    _save(config, adapter_state(wrapped), folder)


def adapter_state(wrapped: "PeftModel") -> dict[str, Tensor]:
    """The tensors that peft saves of the adapter, under the names that it gives them in the file."""
    from peft import get_peft_model_state_dict

    whole = wrapped.state_dict()  # given, peft does not take the one dimension of a lora_bias for a shard
    state: dict[str, Tensor] = get_peft_model_state_dict(wrapped, whole, ADAPTER, save_embedding_layers=False)
    config: Any = wrapped.peft_config[ADAPTER]
    if config.bias == "lora_only":  # older versions of peft look for them under another name
        biases = [f"{PREFIX}{name}.base_layer.bias" for name in lora_layers(wrapped)]
        state |= {key: whole[key] for key in biases if key in whole}
    return state


def _save(config: Any, tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    from safetensors.torch import save_file

    folder = Path(folder)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.inference_mode = True
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(own, temporary, metadata={"format": "pt"})
    with replacing(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
