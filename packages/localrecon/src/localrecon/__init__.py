"""Train a network block by block with local losses: the activation memory of one block, not of all."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BPFreeConv2d": "bpfree",
    "BPFreeLinear": "bpfree",
    "BPFreeNet": "bpfree",
    "EarlyExit": "net",
    "HeadSpec": "config",
    "ListAdapter": "chain",
    "LocalNet": "net",
    "LocalReconModule": "training",
    "LocalTrainer": "training",
    "MemoryMonitor": "training",
    "MemoryProbe": "memory",
    "NoSecondDerivativeError": "errors",
    "NonFiniteLossError": "errors",
    "PipelineTrainer": "pipeline",
    "PlanMismatchError": "errors",
    "ReconReport": "diagnosis",
    "SGRConfig": "config",
    "SharedParameterError": "errors",
    "SplitPlan": "plan",
    "StepReport": "step",
    "UnsplittableModelError": "errors",
    "build_chain": "chain",
    "detach_tied": "chain",
    "diagnose": "diagnosis",
    "local_step": "step",
    "plan_split": "planning",
    "register_adapter": "chain",
    "untie": "chain",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from localrecon.bpfree import BPFreeConv2d, BPFreeLinear, BPFreeNet
    from localrecon.chain import ListAdapter, build_chain, detach_tied, register_adapter, untie
    from localrecon.config import HeadSpec, SGRConfig
    from localrecon.diagnosis import ReconReport, diagnose
    from localrecon.errors import (
        NonFiniteLossError,
        NoSecondDerivativeError,
        PlanMismatchError,
        SharedParameterError,
        UnsplittableModelError,
    )
    from localrecon.memory import MemoryProbe
    from localrecon.net import EarlyExit, LocalNet
    from localrecon.pipeline import PipelineTrainer
    from localrecon.plan import SplitPlan
    from localrecon.planning import plan_split
    from localrecon.step import StepReport, local_step
    from localrecon.training import LocalReconModule, LocalTrainer, MemoryMonitor


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"localrecon.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'localrecon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
