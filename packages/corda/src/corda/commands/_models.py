"""Causal language models and their tokenizers, by name."""

import sys
from typing import TYPE_CHECKING

import torch

from tenfold import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model, or None where there is none that loads.

    Args:
        name: a folder, or a name on the hub.

    Raises:
        UserError: no model there.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # the last by older transformers, for want of what reads other formats
        return None


def load_model(name: str, device: str = "auto") -> "PreTrainedModel":
    """A causal language model, in the dtype that it is stored in.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a name on the hub. Only safetensors weights are read, and no
            code that comes with a model is run.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1`` ...

    Raises:
        UserError: nothing there that can be loaded, or no such device.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(name, torch_dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise _no_model(name, error) from error
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"--device {device}: {str(error).strip().splitlines()[0]}") from error


def _no_model(name: str, error: Exception) -> UserError:
    return UserError(
        f"--model {name}: cannot be loaded as a causal language model ({str(error).strip().splitlines()[0]})"
    )
