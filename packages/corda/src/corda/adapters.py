"""Adapters as peft keeps them: the LoRA layers of a wrapped model, and the folder that an adapter is saved in."""

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tenfold import UserError
from tenfold.files import replacing

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""Name that ``peft.get_peft_model`` gives an adapter."""
PREFIX = "base_model.model."
"""In front of a layer's name in a wrapped model and in a saved adapter."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def lora_layers(wrapped: nn.Module) -> dict[str, Any]:
    """LoRA layers of a wrapped model, by the name of the layer that each wraps."""
    from peft.tuners.lora import LoraLayer

    layers = ((path, module) for path, module in wrapped.named_modules() if isinstance(module, LoraLayer))
    return {path.removeprefix(PREFIX): module for path, module in layers}


def bring_back(wrapped: nn.Module) -> None:
    """Put adapters that peft has made on the meta device, beside weights that accelerate keeps elsewhere, where they are used.

    They hold no values afterwards: whoever starts them gives them theirs.
    """
    for layer in lora_layers(wrapped).values():
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)
        for part in (parts[ADAPTER] for parts in (layer.lora_A, layer.lora_B) if ADAPTER in parts):
            if part.weight.device.type == "meta":
                part.to_empty(device=getattr(hook, "execution_device", None) or "cpu")


def adapter_state(wrapped: "PeftModel") -> dict[str, Tensor]:
    """The adapter's tensors that peft saves, under the names that it gives them in the file."""
    from peft import get_peft_model_state_dict

    whole = wrapped.state_dict()  # given, peft does not take the one dimension of a lora_bias for a shard
    state: dict[str, Tensor] = get_peft_model_state_dict(wrapped, whole, ADAPTER, save_embedding_layers=False)
    config: Any = wrapped.peft_config[ADAPTER]
    if config.bias == "lora_only":  # older versions of peft look for them under another name
        biases = [f"{PREFIX}{name}.base_layer.bias" for name in lora_layers(wrapped)]
        state |= {key: whole[key] for key in biases if key in whole}
    return state


def save_adapter(config: Any, tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Write an adapter's folder as peft does, its configuration saying ``init_lora_weights: true``.

    Args:
        config: peft's ``LoraConfig``; stays as it is.
        tensors: under the names that peft gives them in the file.
        folder: gets ``adapter_model.safetensors`` and ``adapter_config.json``, each whole or not at all.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    config.inference_mode = True
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(own, temporary, metadata={"format": "pt"})
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_folder(folder: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """peft's configuration of a saved adapter, and its tensors by their names in the file.

    Raises:
        UserError: no adapter there, or a file of it that is damaged.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"no {file} in {folder}; expected a LoRA adapter that save_pretrained wrote")
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / CONFIG} is no configuration of peft: {error}") from error
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged or no safetensors file: {error}") from error
