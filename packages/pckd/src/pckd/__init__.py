"""Distill any image classifier into a smaller one: category contrast with preview weights (PCKD), and its baselines."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CacheMismatchError": "cache",
    "CategoryContrastLoss": "losses",
    "CenterAlignLoss": "losses",
    "ClassifierNotFound": "tap",
    "ClassifierTap": "tap",
    "DataError": "data",
    "Distiller": "distiller",
    "FeatureAlignLoss": "losses",
    "LossOutput": "losses",
    "Losses": "config",
    "MultiView": "views",
    "Optimizer": "config",
    "Outputs": "losses",
    "PCKDConfig": "config",
    "PCKDLightning": "training",
    "PCKDLoss": "losses",
    "PCKDTask": "distiller",
    "Preview": "config",
    "PreviewMonitor": "training",
    "TeacherCache": "cache",
    "Views": "config",
    "category_contrast": "contrast",
    "dkd_per_sample": "losses",
    "kd_per_sample": "losses",
    "preview_weights": "losses",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from pckd.cache import CacheMismatchError, TeacherCache
    from pckd.config import Losses, Optimizer, PCKDConfig, Preview, Views
    from pckd.contrast import category_contrast
    from pckd.data import DataError
    from pckd.distiller import Distiller, PCKDTask
    from pckd.losses import (
        CategoryContrastLoss,
        CenterAlignLoss,
        FeatureAlignLoss,
        LossOutput,
        Outputs,
        PCKDLoss,
        dkd_per_sample,
        kd_per_sample,
        preview_weights,
    )
    from pckd.tap import ClassifierNotFound, ClassifierTap
    from pckd.training import PCKDLightning, PreviewMonitor
    from pckd.views import MultiView


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"pckd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pckd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
