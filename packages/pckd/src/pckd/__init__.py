"""Distill any image classifier into a smaller one: category contrast with preview weights (PCKD), and its baselines.

Read in this order: ``contrast`` (the category contrast), ``losses`` (the terms and their sum), ``tap`` (features of a model
that is not edited), ``distiller`` (student, teacher and loss as one module), ``views`` (augmented views), ``teacher`` (a
frozen teacher and what it was trained for), ``cache`` (a teacher's outputs on disk), ``training`` (the glue to Lightning),
``task`` (a training task of timm).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from pckd.cache import CacheMismatchError as CacheMismatchError
    from pckd.cache import TeacherCache as TeacherCache
    from pckd.config import Losses as Losses
    from pckd.config import Optimizer as Optimizer
    from pckd.config import PCKDConfig as PCKDConfig
    from pckd.config import Preview as Preview
    from pckd.config import Views as Views
    from pckd.contrast import category_contrast as category_contrast
    from pckd.distiller import Distiller as Distiller
    from pckd.losses import CategoryContrastLoss as CategoryContrastLoss
    from pckd.losses import CenterAlignLoss as CenterAlignLoss
    from pckd.losses import FeatureAlignLoss as FeatureAlignLoss
    from pckd.losses import LossOutput as LossOutput
    from pckd.losses import Outputs as Outputs
    from pckd.losses import PCKDLoss as PCKDLoss
    from pckd.losses import dkd_per_sample as dkd_per_sample
    from pckd.losses import kd_per_sample as kd_per_sample
    from pckd.losses import preview_weights as preview_weights
    from pckd.tap import ClassifierNotFound as ClassifierNotFound
    from pckd.tap import ClassifierTap as ClassifierTap
    from pckd.task import PCKDTask as PCKDTask
    from pckd.teacher import Teacher as Teacher
    from pckd.teacher import load_teacher as load_teacher
    from pckd.training import PCKDLightning as PCKDLightning
    from pckd.training import PreviewMonitor as PreviewMonitor
    from pckd.views import MultiView as MultiView

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__, needs={"task": "timm"})
