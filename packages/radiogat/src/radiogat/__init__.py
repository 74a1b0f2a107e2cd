"""Whole-area, multi-band radio maps with error bars from a few measurements (RadioGAT).

Read in this order: ``samples`` (measurements, scenes, complete maps), ``depth`` (line-of-sight fractions), ``graph`` (which
cells are alike, at any frequency), ``attention`` (the layer, four backends), ``networks`` (RadioGAT over cells, RadioGATx over
measurements), ``tasks`` (what they are trained on), ``baselines`` (the bar), ``conformal`` (the error bars), ``estimator`` (all
of it behind ``fit`` and ``predict``), ``suggest`` (where to measure next), ``evaluation`` (the protocols), ``tiling`` (maps of
a country on a cluster), ``training`` (the glue to Lightning).
"""

from typing import TYPE_CHECKING

from tenfold.lazy import attach

if TYPE_CHECKING:
    from radiogat.attention import GraphAttention as GraphAttention
    from radiogat.config import CityConfig as CityConfig
    from radiogat.config import GraphConfig as GraphConfig
    from radiogat.config import RadioGATConfig as RadioGATConfig
    from radiogat.config import RadioGATxConfig as RadioGATxConfig
    from radiogat.data import read_maps as read_maps
    from radiogat.data import read_samples as read_samples
    from radiogat.data import read_scene as read_scene
    from radiogat.depth import radio_depth as radio_depth
    from radiogat.estimator import RadioMapEstimator as RadioMapEstimator
    from radiogat.evaluation import cross_validate as cross_validate
    from radiogat.graph import build_graph as build_graph
    from radiogat.maps import RadioMap as RadioMap
    from radiogat.networks import RadioGAT as RadioGAT
    from radiogat.networks import RadioGATx as RadioGATx
    from radiogat.networks import tiled_radiogat as tiled_radiogat
    from radiogat.samples import Grid as Grid
    from radiogat.samples import RadioMaps as RadioMaps
    from radiogat.samples import RadioSamples as RadioSamples
    from radiogat.samples import RadioScene as RadioScene
    from radiogat.simulate import city as city
    from radiogat.suggest import suggest_places as suggest_places
    from radiogat.training import RadioGATModule as RadioGATModule
    from radiogat.training import RadioMapDataModule as RadioMapDataModule

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = attach(__name__)
