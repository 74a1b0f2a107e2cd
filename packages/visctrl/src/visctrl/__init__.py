"""One reference picture into another picture, with no training, on diffusers (VisCtrl).

Read in this order: ``steppers`` (noise levels and the step between two), ``inversion`` (from a picture to the noise that
gives it back), ``layers`` (which self-attention a network has), ``banks`` (features of a reference), ``selection`` (which
keys a query sees), ``control`` (record and inject), ``joint`` (attention over picture and text), ``families`` (pretrained
models behind one interface), ``guard`` (when to stop), ``outcome`` and ``engine`` (the method), ``provenance``, ``masks``,
``pipelines`` (for users of diffusers), ``tap`` (other transformers, experimental), ``metrics``; ``video`` (all frames from
one bank) and ``clips`` (frames of files); ``sampling`` and ``views`` (many views of one thing), ``ranks`` (in several
processes), ``viewset``, ``nerfstudio``, ``colmap`` and ``scenes`` (scenes in files); ``blobs``, ``points`` and ``toy`` are
the demonstration's world.
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from visctrl.banks import FeatureBank as FeatureBank
    from visctrl.config import SamplingConfig as SamplingConfig
    from visctrl.config import VisCtrlConfig as VisCtrlConfig
    from visctrl.control import SelfAttentionController as SelfAttentionController
    from visctrl.control import Source as Source
    from visctrl.engine import Reference as Reference
    from visctrl.engine import VisCtrl as VisCtrl
    from visctrl.families import ModelAdapter as ModelAdapter
    from visctrl.families import register_adapter as register_adapter
    from visctrl.guard import DriftGuard as DriftGuard
    from visctrl.inversion import Trajectory as Trajectory
    from visctrl.inversion import invert as invert
    from visctrl.layers import self_attention_layers as self_attention_layers
    from visctrl.masks import crop_subject as crop_subject
    from visctrl.masks import paste_back as paste_back
    from visctrl.outcome import EditOutput as EditOutput
    from visctrl.pipelines import VisCtrlCallback as VisCtrlCallback
    from visctrl.pipelines import VisCtrlStableDiffusionPipeline as VisCtrlStableDiffusionPipeline
    from visctrl.scenes import read_scene as read_scene
    from visctrl.steppers import DDIMStepper as DDIMStepper
    from visctrl.steppers import FlowStepper as FlowStepper
    from visctrl.steppers import stepper_of as stepper_of
    from visctrl.tap import KeyTap as KeyTap
    from visctrl.video import edit_video as edit_video
    from visctrl.views import edit_views as edit_views
    from visctrl.views import update_dataset as update_dataset

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
