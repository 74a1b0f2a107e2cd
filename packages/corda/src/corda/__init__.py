"""Context-oriented LoRA initialisation: start an adapter from the weights and a few calibration samples."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ContextStats": "context",
    "CordaInit": "config",
    "DampedCovariance": "solvers",
    "FactorSet": "factors",
    "Factors": "solvers",
    "apply_corda": "attach",
    "build_factors": "factors",
    "collect_context": "context",
    "factorize": "solvers",
    "get_corda_model": "attach",
    "output_energies": "factors",
    "resolve_targets": "targets",
    "save_adapter": "attach",
    "save_initial": "attach",
    "truncate": "truncation",
    "truncate_model": "truncation",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from corda.attach import apply_corda, get_corda_model, save_adapter, save_initial
    from corda.config import CordaInit
    from corda.context import ContextStats, collect_context
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
