"""All in one call: from a base model and calibration data to the factors, or to the adapted model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from corda.anchor import apply_anchor
from corda.attach import apply_corda
from corda.batches import Data
from corda.collecting import collect_context
from corda.config import Attach, CordaInit
from corda.factors import FactorSet, build_factors
from corda.streaming import stream_factors
from corda.streams import TokenChoice
from corda.targets import resolve_targets, writable_weights
from tenfold import UserError
from tenfold.distributed import world_size
from tenfold.errors import did_you_mean

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def get_corda_model(
    model: nn.Module,
    lora_config: "LoraConfig",
    data: Data | None,
    init: CordaInit | None = None,
    *,
    attach: Attach = "residual",
    tokens: TokenChoice = "all",
    memory_budget: str | int | None = None,
) -> "PeftModel":
    """Calibrate, solve and attach: from a base model to a ``PeftModel`` that starts at the base model's function.

    Args:
        model: the base model; ``residual`` replaces its targeted weights by W - s B A.
        lora_config: as for ``peft.get_peft_model``; ``init_lora_weights`` is ours.
        data: as for ``collect_context``; None with ``power=0``.
        init: default ``CordaInit()``.
        attach: residual (the paper's and peft's way, see ``apply_corda``), or anchor (the base stays untouched and may be
            quantized, and the start is exact; see ``apply_anchor``).
        tokens: which tokens count, as for ``collect_context``.
        memory_budget: the most memory that statistics may take at once, such as ``"6GB"`` (see ``stream_factors``). Default:
            those of one decoder block at a time, or of all layers where the data are a generator, which one pass uses up.

    Returns:
        The ``PeftModel``; train it as any LoRA. ``to_lora`` then saves the outcome for the untouched base model. From an
        anchored model it needs nothing else, from a residual one also the factors; to have them, call ``build_factors`` and
        ``apply_corda``.

    Raises:
        UserError: ``attach`` is none of the choices, or as for ``collect_context``, ``build_factors``, ``apply_corda``.
        UnsupportedLayerError: a target is quantized and ``attach`` is residual; raised before any work is done.
    """
    if attach not in get_args(Attach):
        raise UserError(f"unknown attach '{attach}': {did_you_mean(str(attach), get_args(Attach))}")
    if attach == "residual":
        writable_weights(model, resolve_targets(model, lora_config))
    factors = calibrated_factors(model, lora_config, data, init or CordaInit(), tokens, memory_budget=memory_budget)
    if attach == "residual":
        return apply_corda(model, factors, lora_config)
    return apply_anchor(model, factors, lora_config)


def calibrated_factors(
    model: nn.Module,
    lora_config: "LoraConfig",
    data: Data | None,
    init: CordaInit,
    tokens: TokenChoice = "all",
    *,
    memory_budget: str | int | None = None,
) -> FactorSet:
    """Calibrate and solve, as ``get_corda_model`` does before it attaches; the base model stays untouched.

    Args:
        model: the base model.
        lora_config: as for ``get_corda_model``.
        data: as for ``get_corda_model``.
        init: the settings.
        tokens: as for ``get_corda_model``.
        memory_budget: as for ``get_corda_model``.

    Raises:
        UserError: ``init.power`` needs data and there is none.
    """
    if not init.power:
        return build_factors(model, None, lora_config, init)
    if data is None:
        raise UserError(f"power {init.power} needs calibration data")
    if memory_budget is not None or not isinstance(data, Iterator):
        return stream_factors(model, data, lora_config, init, tokens=tokens, memory_budget=memory_budget)
    targets = list(resolve_targets(model, lora_config))
    how: Any = {"tokens": tokens, "reusable": False, "complete": world_size() == 1}
    stats = collect_context(model, data, targets, init, **how).reduce()
    return build_factors(model, stats, lora_config, init)
