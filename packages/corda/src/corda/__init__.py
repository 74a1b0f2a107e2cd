"""Context-oriented LoRA initialisation: start an adapter from the weights and a few calibration samples."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AnchoredLinear": "anchor",
    "ContextStats": "context",
    "ConversionReport": "convert",
    "CordaCallback": "lightning_callback",
    "CordaInit": "config",
    "CordaTrainerCallback": "training",
    "CrossMoment": "solvers",
    "DampedCovariance": "solvers",
    "FactorSet": "factors",
    "Factors": "solvers",
    "InitReport": "convert",
    "allocate_by_energy": "plus",
    "allocate_ranks": "plus",
    "allocate_uniform": "plus",
    "apply_anchor": "anchor",
    "apply_corda": "attach",
    "build_factors": "factors",
    "collect_context": "context",
    "compactness": "plus",
    "component_energies": "plus",
    "convert_adapter": "convert",
    "factorize": "solvers",
    "get_corda_model": "attach",
    "layer_spectra": "plus",
    "load_anchor": "anchor",
    "output_energies": "factors",
    "preprocess_corda": "interchange",
    "resolve_targets": "targets",
    "save_initial": "attach",
    "select_context": "plus",
    "select_covariances": "plus",
    "spectrum": "plus",
    "stats_from_peft": "interchange",
    "stats_to_peft": "interchange",
    "stream_factors": "streaming",
    "to_lora": "convert",
    "truncate": "truncation",
    "truncate_model": "truncation",
    "uniform_budget": "plus",
    "verify_init": "convert",
    "with_ranks": "plus",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from corda.anchor import AnchoredLinear, apply_anchor, load_anchor
    from corda.attach import apply_corda, get_corda_model, save_initial
    from corda.config import CordaInit
    from corda.context import ContextStats, collect_context
    from corda.convert import ConversionReport, InitReport, convert_adapter, to_lora, verify_init
    from corda.factors import FactorSet, build_factors, output_energies
    from corda.interchange import preprocess_corda, stats_from_peft, stats_to_peft
    from corda.lightning_callback import CordaCallback
    from corda.plus import (
        allocate_by_energy,
        allocate_ranks,
        allocate_uniform,
        compactness,
        component_energies,
        layer_spectra,
        select_context,
        select_covariances,
        spectrum,
        uniform_budget,
        with_ranks,
    )
    from corda.solvers import CrossMoment, DampedCovariance, Factors, factorize
    from corda.streaming import stream_factors
    from corda.targets import resolve_targets
    from corda.training import CordaTrainerCallback
    from corda.truncation import truncate, truncate_model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"corda.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'corda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
