"""From settings to the LoRA configuration that they describe, and to statistics of a model's layers."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from corda.collecting import collect_context
from corda.config import AdapterSettings, CordaInit, LayerSettings, Task
from corda.context import ContextStats
from corda.data import Batches, on_model
from corda.targets import resolve_targets, with_ranks
from tenfold.terminal import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TASK_TYPES: dict[Task, str | None] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "image-text": None,
}
"""Task -> what peft calls it; of a classifier, peft then trains and saves the head too."""


def lora_config_of(settings: AdapterSettings) -> LoraConfig:
    """The configuration of peft that the options describe."""
    targets: Any = settings.targets[0] if settings.targets == ["all-linear"] else settings.targets
    alpha: Any = settings.alpha or settings.r
    left_out = list(settings.exclude or ())
    if settings.task == "token-classification" and settings.targets == ["all-linear"]:
        left_out += [
            "classifier",
            "score",
        ]  # the head, which peft trains whole; of other tasks, it leaves it out itself
    excluded = "|".join(map(re.escape, left_out))
    alphas: Any = dict(settings.alpha_pattern)
    return LoraConfig(
        r=settings.r,
        lora_alpha=alpha,
        use_rslora=settings.rslora,
        target_modules=targets,
        exclude_modules=rf"(.*\.)?({excluded})(\..*)?" if excluded else None,
        layers_to_transform=settings.layers,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=alphas,
        task_type=TASK_TYPES[settings.task],
    )


def layers_of(settings: LayerSettings) -> LoraConfig:
    """A configuration that covers the layers that the options name, whatever its ranks."""
    same = {name: getattr(settings, name) for name in ("model", "task", "targets", "exclude", "layers")}
    return lora_config_of(AdapterSettings(**same, r=1))


def check_ranks(model: "PreTrainedModel", lora_config: LoraConfig) -> None:
    """Raise ``UserError`` unless every targeted layer is large enough for its rank."""
    with_ranks(model, lora_config, {name: target.rank for name, target in resolve_targets(model, lora_config).items()})


def collect(
    model: "PreTrainedModel",
    parts: Sequence[Batches],
    number: int,
    lora_config: LoraConfig,
    init: CordaInit,
    *,
    quiet: bool,
) -> ContextStats:
    """Statistics of one of several parts of the text, with progress."""
    what = f"calibrating, part {number + 1} of {len(parts)}" if len(parts) > 1 else "calibrating"
    tracked = track(on_model(parts[number], model), what, len(parts[number]), quiet=quiet)
    return collect_context(model, tracked, list(resolve_targets(model, lora_config)), init)
