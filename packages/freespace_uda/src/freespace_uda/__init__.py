"""Drivable area on real roads, trained with labels from a simulator only: RGB and surface normals, adapted where it matters.

Read in this order: ``normals`` (depth -> normals and validity), ``guidance`` (one modality guides the other), ``network`` (two
encoders, three heads), ``alignment`` (the road alone is made alike in both domains), ``objectives`` (what other methods do),
``selection`` (which checkpoint to trust, without labels), ``metrics`` and ``birdseye`` (how good it is), ``world``
(rendered roads),
``depth``, ``calibration`` and ``labels`` (what people have on disk), ``training`` (the glue).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from freespace_uda.alignment import SelectiveAlignment as SelectiveAlignment
    from freespace_uda.alignment import mask_quality as mask_quality
    from freespace_uda.birdseye import BirdsEye as BirdsEye
    from freespace_uda.birdseye import to_birdseye as to_birdseye
    from freespace_uda.calibration import read_calibration as read_calibration
    from freespace_uda.data import load_scenes as load_scenes
    from freespace_uda.depth import DepthCode as DepthCode
    from freespace_uda.encoders import Encoder as Encoder
    from freespace_uda.guidance import CrossGuidance as CrossGuidance
    from freespace_uda.metrics import FreespaceMeter as FreespaceMeter
    from freespace_uda.metrics import bootstrap as bootstrap
    from freespace_uda.metrics import gap_closed as gap_closed
    from freespace_uda.models import load_model as load_model
    from freespace_uda.models import save_model as save_model
    from freespace_uda.network import FreespaceNet as FreespaceNet
    from freespace_uda.normal_cache import NormalCache as NormalCache
    from freespace_uda.normals import SurfaceNormals as SurfaceNormals
    from freespace_uda.normals import depth_to_normals as depth_to_normals
    from freespace_uda.predictor import Predictor as Predictor
    from freespace_uda.selection import Signals as Signals
    from freespace_uda.training import AdaptTask as AdaptTask
    from freespace_uda.training import train as train
    from freespace_uda.world import RoadWorld as RoadWorld

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
