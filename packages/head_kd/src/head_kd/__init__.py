"""Distill a detector into one of another kind: assistant heads (HEAD and TF-HEAD) for mmdet 3.x.

Read in this order: ``losses`` (what is minimized), ``proposals`` and ``regions`` (where), ``signals`` (which activations
of mmdet's heads), ``teacher`` and ``student`` (their parts of a step), ``assistants`` with ``roi_assistant`` and
``dense_assistant`` (the terms), ``neck`` (the plain alternative), ``balance``, ``detector`` (all of it as one mmdet
model), ``compose`` with ``heads`` (two configs become one), ``cache``, ``export``; then ``training`` (mmengine's runner).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AssistantSettings": "config",
    "Distillation": "config",
    "HEADDetector": "detector",
    "NeckMimic": "config",
    "PerAnchorLinear": "losses",
    "Proposals": "proposals",
    "Provenance": "proposals",
    "Schedule": "config",
    "TargetCache": "cache",
    "TeacherView": "teacher",
    "check_coco": "data",
    "dense_proposals": "proposals",
    "export_student": "export",
    "gap_r2": "losses",
    "gather_at": "proposals",
    "install_ops_fallback": "ops_fallback",
    "mimic_loss": "losses",
    "pair": "compose",
    "pkd_loss": "losses",
    "ramp": "losses",
    "write_cache": "cache",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from head_kd.cache import TargetCache, write_cache
    from head_kd.compose import pair
    from head_kd.config import AssistantSettings, Distillation, NeckMimic, Schedule
    from head_kd.data import check_coco
    from head_kd.detector import HEADDetector
    from head_kd.export import export_student
    from head_kd.losses import PerAnchorLinear, gap_r2, mimic_loss, pkd_loss, ramp
    from head_kd.ops_fallback import install_ops_fallback
    from head_kd.proposals import Proposals, Provenance, dense_proposals, gather_at
    from head_kd.teacher import TeacherView


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"head_kd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'head_kd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
