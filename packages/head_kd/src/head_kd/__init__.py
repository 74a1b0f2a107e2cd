"""Distil a detector into one of another kind: assistant heads (HEAD and TF-HEAD) for mmdet 3.x."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AssistantSettings": "config",
    "DenseAssistant": "dense_assistant",
    "Distillation": "config",
    "GuardHook": "training",
    "HEADDetector": "detector",
    "NeckMimic": "config",
    "PerAnchorLinear": "losses",
    "Proposals": "proposals",
    "Provenance": "proposals",
    "Renormalize": "teacher",
    "RoIAssistant": "roi_assistant",
    "Schedule": "config",
    "TargetCache": "cache",
    "TeacherView": "teacher",
    "center_locations": "proposals",
    "check_coco": "data",
    "dense_proposals": "proposals",
    "export_student": "training",
    "gap_r2": "losses",
    "gather_at": "proposals",
    "install_ops_fallback": "ops_fallback",
    "mimic_loss": "losses",
    "pair": "compose",
    "pkd_loss": "losses",
    "ramp": "losses",
    "write_cache": "cache",
}
_NEED_MMDET = {"cache", "detector", "teacher", "training", "dense_assistant", "roi_assistant"}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from head_kd.cache import TargetCache, write_cache
    from head_kd.compose import pair
    from head_kd.config import AssistantSettings, Distillation, NeckMimic, Schedule
    from head_kd.data import check_coco
    from head_kd.dense_assistant import DenseAssistant
    from head_kd.detector import HEADDetector
    from head_kd.losses import PerAnchorLinear, gap_r2, mimic_loss, pkd_loss, ramp
    from head_kd.ops_fallback import install_ops_fallback
    from head_kd.proposals import Proposals, Provenance, center_locations, dense_proposals, gather_at
    from head_kd.roi_assistant import RoIAssistant
    from head_kd.teacher import Renormalize, TeacherView
    from head_kd.training import GuardHook, export_student


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        if _HOMES[name] in _NEED_MMDET:
            import_module("head_kd.ops_fallback")  # before mmdet is imported
        return getattr(import_module(f"head_kd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'head_kd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
