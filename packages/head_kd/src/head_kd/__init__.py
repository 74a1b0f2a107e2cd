"""Distill a detector into one of another kind: assistant heads (HEAD and TF-HEAD) for mmdet 3.x.

Read in this order: ``losses`` (what is minimized), ``proposals`` and ``regions`` (where), ``signals`` (which activations
of mmdet's heads), ``teacher`` and ``student`` (their parts of a step), ``assistants`` with ``roi_assistant`` and
``dense_assistant`` (the terms), ``neck`` (the plain alternative), ``balance``, ``detector`` (all of it as one mmdet
model), ``compose`` with ``heads`` (two configs become one), ``cache``, ``export``; then ``training`` (mmengine's runner).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from head_kd.cache import TargetCache as TargetCache
    from head_kd.cache import write_cache as write_cache
    from head_kd.coco import check_coco as check_coco
    from head_kd.compose import pair as pair
    from head_kd.config import AssistantSettings as AssistantSettings
    from head_kd.config import Distillation as Distillation
    from head_kd.config import NeckMimic as NeckMimic
    from head_kd.config import Schedule as Schedule
    from head_kd.detector import HEADDetector as HEADDetector
    from head_kd.export import export_student as export_student
    from head_kd.losses import PerAnchorLinear as PerAnchorLinear
    from head_kd.losses import gap_r2 as gap_r2
    from head_kd.losses import mimic_loss as mimic_loss
    from head_kd.losses import pkd_loss as pkd_loss
    from head_kd.losses import ramp as ramp
    from head_kd.ops_fallback import install_ops_fallback as install_ops_fallback
    from head_kd.proposals import Proposals as Proposals
    from head_kd.proposals import Provenance as Provenance
    from head_kd.proposals import dense_proposals as dense_proposals
    from head_kd.proposals import gather_at as gather_at
    from head_kd.teacher import TeacherView as TeacherView

__version__ = "0.1.0"
_MM = ("cache", "compose", "detector", "export", "ops_fallback", "teacher")
__all__, __getattr__, __dir__ = attach(__name__, needs=dict.fromkeys(_MM, "mmdet"))
