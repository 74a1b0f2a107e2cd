"""Generated positive views for self-supervised learning, weighted by their quality (GenView).

Read in this order: ``foreground`` (where the object is), ``levels`` (how much noise), ``generators`` (pretrained generators
behind one protocol), ``quality`` (how good a pair is), ``weights`` (from quality to weight), ``contrast`` and ``losses``
(weighted losses), ``networks`` (the methods as plain modules), ``plans`` and ``store`` (what is generated, and where it
lies), ``runner`` (one worker), ``neighbors`` and ``probes`` (evaluation), ``training`` (the glue to Lightning).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from genview.captions import guidance_of as guidance_of
    from genview.data import PairedViewDataset as PairedViewDataset
    from genview.encoders import build_encoder as build_encoder
    from genview.foreground import ForegroundModel as ForegroundModel
    from genview.foreground import StreamingPCA as StreamingPCA
    from genview.generators import Img2ImgGenerator as Img2ImgGenerator
    from genview.generators import IPAdapterGenerator as IPAdapterGenerator
    from genview.generators import UnCLIPGenerator as UnCLIPGenerator
    from genview.generators import ViewGenerator as ViewGenerator
    from genview.levels import AdaptivePolicy as AdaptivePolicy
    from genview.levels import ConstantPolicy as ConstantPolicy
    from genview.levels import RandomPolicy as RandomPolicy
    from genview.losses import QDMoCoLoss as QDMoCoLoss
    from genview.losses import QDMoCoV3Loss as QDMoCoV3Loss
    from genview.losses import QDMultiPositiveLoss as QDMultiPositiveLoss
    from genview.losses import QDNegativeCosine as QDNegativeCosine
    from genview.losses import QDNTXentLoss as QDNTXentLoss
    from genview.losses import QDSwAVLoss as QDSwAVLoss
    from genview.losses import image_text_qd_loss as image_text_qd_loss
    from genview.neighbors import knn_accuracy as knn_accuracy
    from genview.quality import PairQuality as PairQuality
    from genview.quality import QualityScorer as QualityScorer
    from genview.quality import pair_quality as pair_quality
    from genview.training import GenViewModule as GenViewModule
    from genview.weights import pair_weights as pair_weights

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
