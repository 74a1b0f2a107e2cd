"""CorDA++ as far as the options ask for it: statistics and rank of each layer."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from corda.config import AllocateSettings, CordaInit, InitSettings
from corda.context import ContextStats
from corda.plus import allocate_by_energy, allocate_ranks, allocate_uniform, select_context, uniform_budget
from corda.spectra import component_energies, layer_spectra
from corda.targets import resolve_targets, weight_of, with_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def select_and_allocate(
    model: "PreTrainedModel",
    candidates: Sequence[ContextStats],
    lora_config: LoraConfig,
    settings: InitSettings | AllocateSettings,
    report: dict[str, Any],
) -> tuple[ContextStats | None, LoraConfig]:
    """Statistics and LoRA configuration with each layer's choice; the decisions go into the report."""
    if not candidates:
        return None, lora_config
    init = CordaInit(mode=settings.init.mode, power=settings.init.power, damping=settings.init.damping)
    stats = candidates[0]
    if len(candidates) > 1:
        found = select_context(model, lora_config, candidates, init, per=settings.select_per)
        stats = found.stats
        report["selection"] = {"per": settings.select_per, **dataclasses.asdict(found.selection)}
    if settings.allocation == "uniform" and settings.budget is None:
        return stats, lora_config
    weights = {name: weight_of(model, name) for name in resolve_targets(model, lora_config)}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    uniform, _, number = (settings.budget or f"uniform:{settings.r}").rpartition(":")
    budget = uniform_budget(shapes, int(number)) if uniform else int(number)
    if settings.allocation == "corda++":
        spectra = layer_spectra(model, stats, lora_config, init)
        ranks = allocate_ranks(spectra.spectra, spectra.compactness, shapes, budget, init.mode)
    elif settings.allocation == "energy":
        energies = {
            name: component_energies(weight, stats.covariance(name), power=init.power, damping=init.damping)
            for name, weight in weights.items()
        }
        ranks = allocate_by_energy(energies, shapes, budget, init.mode)
    else:
        ranks = allocate_uniform(shapes, budget)
    parameters = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    decided = {"by": settings.allocation, "mode": init.mode, "budget": budget, "parameters": parameters}
    report["allocation"] = {**decided, "ranks": ranks, "shapes": shapes}
    return stats, with_ranks(model, lora_config, ranks)
