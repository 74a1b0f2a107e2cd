"""Context-oriented LoRA initialization: start an adapter from the weights and a few calibration samples.

Read in this order: ``solvers`` (the mathematics: weights and a covariance in, A and B out) on ``moments`` (what of the inputs
it takes) and ``algebra`` (in fp64 by SciPy); ``context`` (statistics of a model's layers), ``collecting`` and ``sums`` (how
they are gathered), ``streams`` (which tokens count) and ``batches`` (what people give); ``fingerprints`` (which model it is),
``targets`` and ``factors`` (all layers of a model); ``attach`` (the paper's way: a residual under the adapter) and ``anchor``
(ours: beside an untouched base) on ``adapters`` (what peft keeps); ``convert`` (a plain LoRA from what was trained) and
``verify`` (does it start at the base?); ``streaming`` and ``blocks`` (the same in little memory); ``one_call`` (all of it),
``start`` (inside a trainer: ``training`` and ``lightning_callback``). Beside these: ``interchange`` (peft's own CorDA),
``truncation`` (compression), ``plus`` and ``spectra`` (CorDA++, experimental: ``from corda.plus import select_context``),
``data``, ``records`` and ``texts`` (what calibrates).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from corda.anchor import apply_anchor as apply_anchor
    from corda.anchor import load_anchor as load_anchor
    from corda.attach import apply_corda as apply_corda
    from corda.attach import save_initial as save_initial
    from corda.collecting import collect_context as collect_context
    from corda.config import CordaInit as CordaInit
    from corda.context import ContextStats as ContextStats
    from corda.convert import convert_adapter as convert_adapter
    from corda.convert import to_lora as to_lora
    from corda.factors import FactorSet as FactorSet
    from corda.factors import build_factors as build_factors
    from corda.interchange import preprocess_corda as preprocess_corda
    from corda.lightning_callback import CordaCallback as CordaCallback
    from corda.moments import DampedCovariance as DampedCovariance
    from corda.one_call import get_corda_model as get_corda_model
    from corda.solvers import factorize as factorize
    from corda.streaming import stream_factors as stream_factors
    from corda.training import CordaTrainerCallback as CordaTrainerCallback
    from corda.truncation import truncate_model as truncate_model
    from corda.verify import verify_init as verify_init

__all__, __getattr__, __dir__ = attach(__name__, needs={"lightning_callback": "lightning"})
