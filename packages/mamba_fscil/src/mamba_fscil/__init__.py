"""Teach an image classifier new classes from a handful of pictures, session after session, and keep the old ones.

Read in this order: ``scan`` (the selective scan), ``blocks`` (Mamba and SS2D), ``projector`` (from a map to an embedding),
``head`` (fixed class vectors), ``losses`` (silent on old classes, different on new ones), ``session`` (how a session learns),
``memory`` and ``baselines`` (class means), ``training.learner`` (the classifier that grows), ``training.base`` (the glue to
Lightning).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from mamba_fscil.backbones import MapBackbone as MapBackbone
    from mamba_fscil.backbones import ResNet12 as ResNet12
    from mamba_fscil.baselines import NearestClassMean as NearestClassMean
    from mamba_fscil.blocks import SS2D as SS2D
    from mamba_fscil.blocks import MambaBlock as MambaBlock
    from mamba_fscil.config import ProjectorConfig as ProjectorConfig
    from mamba_fscil.config import SessionConfig as SessionConfig
    from mamba_fscil.head import ETFHead as ETFHead
    from mamba_fscil.head import dot_regression_loss as dot_regression_loss
    from mamba_fscil.losses import ClassSensitiveLoss as ClassSensitiveLoss
    from mamba_fscil.memory import FeatureBank as FeatureBank
    from mamba_fscil.memory import FeatureMemory as FeatureMemory
    from mamba_fscil.projector import DualSSMProjector as DualSSMProjector
    from mamba_fscil.projector import MLPProjector as MLPProjector
    from mamba_fscil.projector import ProjectorOutput as ProjectorOutput
    from mamba_fscil.projector import SSMProjector as SSMProjector
    from mamba_fscil.scan import selective_scan as selective_scan
    from mamba_fscil.scan import selective_scan_reference as selective_scan_reference
    from mamba_fscil.training.base import BaseSessionModule as BaseSessionModule
    from mamba_fscil.training.learner import IncrementalLearner as IncrementalLearner

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
