"""Whose hand is this? Palm and fingers aligned by learned spatial transformers (MSTN), searched in a gallery, and judged.

Read in this order: ``parts`` (what a part is), ``warping`` (control points -> grids -> crops), ``aligner`` (where the
points lie), ``recognizer`` (crops -> embedding -> score), ``losses``, ``pls`` (one-vs-all matching), ``metrics`` and
``calibration`` (how good it is), ``rendering`` (hands with free labels), ``gallery`` and ``evidence`` (what a user works
with), ``training`` (the glue).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from handmstn.aligner import MultiSpatialTransformer as MultiSpatialTransformer
    from handmstn.calibration import Calibration as Calibration
    from handmstn.evidence import evidence_sheet as evidence_sheet
    from handmstn.gallery import Gallery as Gallery
    from handmstn.losses import ArcMarginHead as ArcMarginHead
    from handmstn.losses import BatchHardTriplet as BatchHardTriplet
    from handmstn.losses import CenterLoss as CenterLoss
    from handmstn.losses import IdentityLoss as IdentityLoss
    from handmstn.losses import SoftmaxHead as SoftmaxHead
    from handmstn.metrics import Identification as Identification
    from handmstn.metrics import OpenSet as OpenSet
    from handmstn.metrics import Verification as Verification
    from handmstn.metrics import bootstrap as bootstrap
    from handmstn.models import load_model as load_model
    from handmstn.models import save_model as save_model
    from handmstn.parts import PartSpec as PartSpec
    from handmstn.parts import preset as preset
    from handmstn.pls import OneVsAllPLS as OneVsAllPLS
    from handmstn.recognizer import HandMSTN as HandMSTN
    from handmstn.recognizer import match as match
    from handmstn.rendering import SyntheticHands as SyntheticHands
    from handmstn.sampling import people_and_views as people_and_views
    from handmstn.training import AlignTask as AlignTask
    from handmstn.training import IdentityTask as IdentityTask
    from handmstn.warping import ControlPointGrid as ControlPointGrid

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
