"""Context-oriented LoRA initialization: start an adapter from the weights and a few calibration samples.

Read in this order: ``solvers`` (the mathematics: weights and a covariance in, A and B out) on ``moments`` (what of the inputs
it takes) and ``algebra`` (in fp64 by SciPy); ``context`` (statistics of a model's layers), ``collecting`` and ``sums`` (how
they are gathered); ``targets`` and ``factors`` (all layers of a model); ``attach`` (the paper's way: a residual under the
adapter) and ``anchor`` (ours: beside an untouched base) on ``adapters`` (what peft keeps); ``convert`` (a plain LoRA from
what was trained) and ``verify`` (does it start at the base?); ``streaming`` and ``blocks`` (the same in little memory);
``one_call`` (all of it), ``start`` (inside a trainer). Beside these: ``interchange`` (peft's own CorDA), ``truncation``
(compression), ``plus`` and ``spectra`` (CorDA++, experimental: ``from corda.plus import select_context``), ``data``,
``records`` and ``texts`` (what calibrates).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ContextStats": "context",
    "CordaCallback": "lightning_callback",
    "CordaInit": "config",
    "CordaTrainerCallback": "training",
    "DampedCovariance": "moments",
    "FactorSet": "factors",
    "apply_anchor": "anchor",
    "apply_corda": "attach",
    "build_factors": "factors",
    "collect_context": "collecting",
    "convert_adapter": "convert",
    "factorize": "solvers",
    "get_corda_model": "one_call",
    "load_anchor": "anchor",
    "preprocess_corda": "interchange",
    "save_initial": "attach",
    "stream_factors": "streaming",
    "to_lora": "convert",
    "truncate_model": "truncation",
    "verify_init": "verify",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from corda.anchor import apply_anchor, load_anchor
    from corda.attach import apply_corda, save_initial
    from corda.collecting import collect_context
    from corda.config import CordaInit
    from corda.context import ContextStats
    from corda.convert import convert_adapter, to_lora
    from corda.factors import FactorSet, build_factors
    from corda.interchange import preprocess_corda
    from corda.lightning_callback import CordaCallback
    from corda.moments import DampedCovariance
    from corda.one_call import get_corda_model
    from corda.solvers import factorize
    from corda.streaming import stream_factors
    from corda.training import CordaTrainerCallback
    from corda.truncation import truncate_model
    from corda.verify import verify_init


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"corda.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'corda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
