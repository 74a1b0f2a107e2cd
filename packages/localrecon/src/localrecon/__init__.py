"""Train a network block by block with local losses: the activation memory of one block, not of all.

Read in this order: ``chain`` and ``adapters`` (a model as blocks between which one tensor crosses), ``plan`` (which blocks
form which module), ``losses`` and ``heads`` (the local classifiers), ``stage`` and ``net`` (modules with heads),
``reconcile`` (the term and its estimators, as pure functions), ``boundary``, ``passes`` and ``step`` (one training step),
``profiling`` (choosing where to cut), ``trainer`` (a loop of its own) and ``training`` (Lightning). Beside the way:
``bpfree`` (closed form, no graph), ``pipeline`` (several processes), ``diagnosis`` (do modules agree?), ``evaluation``
(every head, early exits), ``memory`` (counted bytes).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BPFreeConv2d": "bpfree",
    "BPFreeLinear": "bpfree",
    "BPFreeNet": "bpfree",
    "EarlyExit": "evaluation",
    "HeadSpec": "config",
    "ListAdapter": "adapters",
    "LocalNet": "net",
    "LocalReconModule": "training",
    "LocalTrainer": "trainer",
    "MemoryMonitor": "training",
    "MemoryProbe": "memory",
    "PipelineTrainer": "pipeline",
    "SGRConfig": "config",
    "SplitPlan": "plan",
    "StepOptions": "boundary",
    "detach_tied": "tying",
    "diagnose": "diagnosis",
    "local_step": "step",
    "plan_split": "profiling",
    "register_adapter": "adapters",
    "untie": "tying",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from localrecon.adapters import ListAdapter, register_adapter
    from localrecon.boundary import StepOptions
    from localrecon.bpfree import BPFreeConv2d, BPFreeLinear, BPFreeNet
    from localrecon.config import HeadSpec, SGRConfig
    from localrecon.diagnosis import diagnose
    from localrecon.evaluation import EarlyExit
    from localrecon.memory import MemoryProbe
    from localrecon.net import LocalNet
    from localrecon.pipeline import PipelineTrainer
    from localrecon.plan import SplitPlan
    from localrecon.profiling import plan_split
    from localrecon.step import local_step
    from localrecon.trainer import LocalTrainer
    from localrecon.training import LocalReconModule, MemoryMonitor
    from localrecon.tying import detach_tied, untie


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"localrecon.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'localrecon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
