"""Context-oriented LoRA initialisation: start an adapter from the weights and a few calibration samples."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AnchoredLinear": "anchor",
    "ContextStats": "context",
    "ConversionReport": "convert",
    "CordaInit": "config",
    "DampedCovariance": "solvers",
    "FactorSet": "factors",
    "Factors": "solvers",
    "InitReport": "convert",
    "apply_anchor": "anchor",
    "apply_corda": "attach",
    "build_factors": "factors",
    "collect_context": "context",
    "factorize": "solvers",
    "get_corda_model": "attach",
    "load_anchor": "anchor",
    "output_energies": "factors",
    "resolve_targets": "targets",
    "save_initial": "attach",
    "to_lora": "convert",
    "truncate": "truncation",
    "truncate_model": "truncation",
    "verify_init": "convert",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from corda.anchor import AnchoredLinear, apply_anchor, load_anchor
    from corda.attach import apply_corda, get_corda_model, save_initial
    from corda.config import CordaInit
    from corda.context import ContextStats, collect_context
    from corda.convert import ConversionReport, InitReport, to_lora, verify_init
    from corda.factors import FactorSet, build_factors, output_energies
    from corda.solvers import DampedCovariance, Factors, factorize
    from corda.targets import resolve_targets
    from corda.truncation import truncate, truncate_model


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"corda.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'corda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
