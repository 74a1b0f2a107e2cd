"""Whole-area, multi-band radio maps with error bars from a few measurements (RadioGAT)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Adjacency": "graph",
    "BlockTask": "tasks",
    "CityConfig": "config",
    "FreeSpaceShift": "baselines",
    "GraphAttention": "attention",
    "GraphConfig": "config",
    "Grid": "samples",
    "HeldoutLabelSampler": "tasks",
    "IDW": "baselines",
    "LocalKriging": "baselines",
    "MapLayout": "maps",
    "NeighborTask": "tasks",
    "PooledIDW": "baselines",
    "PooledKriging": "baselines",
    "RBF": "baselines",
    "RadioGAT": "networks",
    "RadioGATConfig": "config",
    "RadioGATModule": "training",
    "RadioGATx": "networks",
    "RadioGATxConfig": "config",
    "RadioGraph": "graph",
    "RadioMap": "maps",
    "RadioMapDataModule": "training",
    "RadioMapEstimator": "estimator",
    "RadioMaps": "samples",
    "RadioSamples": "samples",
    "RadioScene": "samples",
    "RaytraceConfig": "config",
    "SpatialConformal": "conformal",
    "Variogram": "baselines",
    "block_graphs": "graph",
    "block_rmse": "metrics",
    "build_graph": "graph",
    "city": "simulate",
    "coverage": "metrics",
    "cross_validate": "evaluation",
    "fit_spectrum": "spectral",
    "interval_score": "metrics",
    "mae": "metrics",
    "radio_depth": "depth",
    "read_geotiff": "maps",
    "read_maps": "data",
    "read_netcdf": "maps",
    "read_samples": "data",
    "read_scene": "data",
    "rmse": "metrics",
    "run_task": "tasks",
    "suggest_places": "suggest",
    "tiled_radiogat": "networks",
    "trace": "raytrace",
}
__all__ = [*sorted(_HOMES), "__version__"]

if TYPE_CHECKING:
    from radiogat.attention import GraphAttention
    from radiogat.baselines import IDW, RBF, FreeSpaceShift, LocalKriging, PooledIDW, PooledKriging, Variogram
    from radiogat.config import CityConfig, GraphConfig, RadioGATConfig, RadioGATxConfig, RaytraceConfig
    from radiogat.conformal import SpatialConformal
    from radiogat.data import read_maps, read_samples, read_scene
    from radiogat.depth import radio_depth
    from radiogat.estimator import RadioMapEstimator
    from radiogat.evaluation import cross_validate
    from radiogat.graph import Adjacency, RadioGraph, block_graphs, build_graph
    from radiogat.maps import MapLayout, RadioMap, read_geotiff, read_netcdf
    from radiogat.metrics import block_rmse, coverage, interval_score, mae, rmse
    from radiogat.networks import RadioGAT, RadioGATx, tiled_radiogat
    from radiogat.raytrace import trace
    from radiogat.samples import Grid, RadioMaps, RadioSamples, RadioScene
    from radiogat.simulate import city
    from radiogat.spectral import fit_spectrum
    from radiogat.suggest import suggest_places
    from radiogat.tasks import BlockTask, HeldoutLabelSampler, NeighborTask, run_task
    from radiogat.training import RadioGATModule, RadioMapDataModule


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"radiogat.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'radiogat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
