"""One reference picture into another picture, with no training, on diffusers (VisCtrl).

Read in this order: ``steppers`` (noise levels and the step between two), ``inversion`` (from a picture to the noise that
gives it back), ``layers`` (which self-attention a network has), ``banks`` (features of a reference), ``selection`` (which
keys a query sees), ``control`` (record and inject), ``joint`` (attention over picture and text), ``provenance``.
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from visctrl.banks import FeatureBank as FeatureBank
    from visctrl.config import VisCtrlConfig as VisCtrlConfig
    from visctrl.control import SelfAttentionController as SelfAttentionController
    from visctrl.control import Source as Source
    from visctrl.inversion import Trajectory as Trajectory
    from visctrl.inversion import invert as invert
    from visctrl.layers import self_attention_layers as self_attention_layers
    from visctrl.steppers import DDIMStepper as DDIMStepper
    from visctrl.steppers import FlowStepper as FlowStepper
    from visctrl.steppers import stepper_of as stepper_of

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
