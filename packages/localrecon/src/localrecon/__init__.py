"""Train a network block by block with local losses: the activation memory of one block, not of all.

Read in this order: ``chain`` and ``adapters`` (a model as blocks between which one tensor crosses), ``routes`` and
``segments`` (any model, along its own forward pass), ``equality`` (is it still the model?), ``plan`` (which blocks form which
module), ``losses`` and ``heads`` (the local classifiers), ``stage`` and ``net`` (modules with heads),
``reconcile`` (the term and its estimators, as pure functions), ``boundary``, ``passes`` and ``step`` (one training step),
``profiling`` (choosing where to cut), ``choosing`` (choosing the method), ``trainer`` (a loop of its own) and ``training``
(Lightning). Beside the way: ``bpfree`` (closed form, no graph), ``pipeline`` (several processes), ``diagnosis`` (do modules
agree?), ``evaluation`` (every head, early exits), ``arms`` (the methods that are compared), ``allocation`` (the allocator's
account of a step), ``inputs`` (what batches are).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from localrecon.adapters import ListAdapter as ListAdapter
    from localrecon.adapters import register_adapter as register_adapter
    from localrecon.boundary import StepOptions as StepOptions
    from localrecon.bpfree import BPFreeConv2d as BPFreeConv2d
    from localrecon.bpfree import BPFreeLinear as BPFreeLinear
    from localrecon.bpfree import BPFreeNet as BPFreeNet
    from localrecon.config import HeadSpec as HeadSpec
    from localrecon.config import SGRConfig as SGRConfig
    from localrecon.diagnosis import diagnose as diagnose
    from localrecon.evaluation import EarlyExit as EarlyExit
    from localrecon.net import LocalNet as LocalNet
    from localrecon.pipeline import PipelineTrainer as PipelineTrainer
    from localrecon.plan import SplitPlan as SplitPlan
    from localrecon.profiling import plan_split as plan_split
    from localrecon.step import local_step as local_step
    from localrecon.trainer import LocalTrainer as LocalTrainer
    from localrecon.training import LocalReconModule as LocalReconModule
    from localrecon.training import MemoryMonitor as MemoryMonitor
    from localrecon.tying import detach_tied as detach_tied
    from localrecon.tying import untie as untie

__all__, __getattr__, __dir__ = attach(__name__, needs={"training": "lightning"})
