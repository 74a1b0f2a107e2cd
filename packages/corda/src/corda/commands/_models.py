"""Models of transformers and their tokenizers, by name and task."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from corda.config import Task
from tenfold import UserError, models
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = ("hf:PATH", "packaged:smollm2", "py:MODULE:FUNCTION")
KINDS = [form.partition(":")[0] for form in FORMS]


def check_name(spec: str) -> tuple[str, str]:
    """Kind and rest of a model's name.

    Raises:
        UserError: none of ``FORMS``.
    """
    kind, colon, name = spec.partition(":")
    if kind == "packaged" and name in models.PACKAGED and models.PACKAGED[name].architecture:
        raise UserError(f"--model {spec} is not a language model, expected {_listed()}")
    if kind in KINDS and name:
        return kind, name
    if colon and name and not Path(spec).exists():
        raise UserError(f"--model {spec}: unknown kind '{kind}', expected {_listed()}: {did_you_mean(kind, KINDS)}")
    raise UserError(f"--model {spec}: expected {_listed()}; a folder or a name on the hub is hf:{spec}")


def _listed() -> str:
    return f"{', '.join(FORMS[:-1])} or {FORMS[-1]}"


def base_name(spec: str) -> str:
    """What peft calls the base model of an adapter: a folder or a name on the hub, where it is one."""
    kind, name = check_name(spec)
    return name if kind == "hf" else spec


def load_tokenizer(spec: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a model; None where it has none that can be loaded.

    Args:
        spec: one of ``FORMS``.

    Raises:
        UserError: no model there.
    """
    kind, name = check_name(spec)
    where: dict[str, Any] = {"pretrained_model_name_or_path": name}
    if kind == "py":
        return None
    if kind == "packaged":
        file = models.packaged_file(name)
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    else:
        if Path(name).is_file():
            raise UserError(f"--model {spec}: expected the folder of a model, found a file")
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {spec}: cannot be loaded as a causal language model ({_line(error)})") from error
    try:
        return AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, ImportError):  # the last by older transformers, for want of what reads other formats
        return None


AUTO: dict[Task, str] = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-text": "AutoModelForImageTextToText",
}
"""Task -> class of transformers that loads its models."""


def load_model(spec: str, device: str, task: Task = "causal") -> PreTrainedModel:
    """A model of transformers, in the dtype that it is stored in.

    Args:
        spec: one of ``FORMS``; no code that comes with a model is run.
        device: a device of ``tenfold.devices.choose_device``.
        task: kind of the model.

    Raises:
        UserError: nothing there that can be loaded, or another kind of model.
    """
    check_name(spec)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = models.build(spec, auto=AUTO[task])
    speaks = task in ("causal", "seq2seq")
    if not isinstance(model, PreTrainedModel) or (speaks and model.get_output_embeddings() is None):  # type: ignore[no-untyped-call]
        kind = "causal language model" if task == "causal" else f"model for --task {task}"
        raise UserError(f"--model {spec}: expected a {kind} of transformers, got {type(model).__name__}")
    return model.to(device).eval()  # type: ignore[arg-type]


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
