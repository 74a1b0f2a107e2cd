"""The models behind the estimator, with one interface: train, predict with a scale of the error, leave out, save, restore."""

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from radiogat import baselines
from radiogat.config import GraphConfig, RadioGATConfig, RadioGATxConfig, TreesConfig
from radiogat.graph import blocks
from radiogat.heldout import beyond
from radiogat.networks import RadioGAT, tiled_radiogat
from radiogat.samples import RadioSamples, RadioScene
from radiogat.spectral import fit_spectrum, reference_frequency
from radiogat.tasks import BlockTask, NeighborTask, Task
from radiogat.trees import BoostedTrees, TreeFeatures
from tenfold import UserError, checkpoints

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Trainer = Callable[[Task], None]

BASELINES: dict[str, type[Any]] = {
    "kriging": baselines.LocalKriging,
    "pooled_kriging": baselines.PooledKriging,
    "idw": baselines.IDW,
    "pooled_idw": baselines.PooledIDW,
    "rbf": baselines.RBF,
    "shift": baselines.FreeSpaceShift,
}


_FEW = 4000
"""Training rows below which a third of the trees are grown, at twice the rate."""


class Predictor(ABC):
    """One model behind the estimator: powers in dBm, and scales of their errors."""

    any_frequency = False
    """Whether it answers for frequencies that were not measured."""

    @abstractmethod
    def train(self, run: Trainer) -> None:
        """Train, where there is something to train; ``run`` runs a task."""

    @abstractmethod
    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers and scales (n) at positions (n, 2), each at its own frequency."""

    def left_out(self, rows: NDArray[np.int64], radius: Floats) -> tuple[Floats, Floats]:
        """Powers and scales (n) at some of the measurements, each predicted without what lies within a radius.

        Raises:
            NotImplementedError: the model has no fast way.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fast way of leaving out")

    def state(self) -> dict[str, torch.Tensor]:
        """What was learned, by name; nothing, for a model that only remembers its measurements."""
        return {}

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Take what ``state`` gave.

        Args:
            path: file that it comes from, for messages.
            state: tensors by name.

        Raises:
            UserError: names or shapes differ.
        """
        checkpoints.check_shapes(path, {}, state)


def make(
    method: str,
    samples: RadioSamples,
    scene: RadioScene | None,
    *,
    network: RadioGATxConfig | None = None,
    gat: RadioGATConfig | None = None,
    graph: GraphConfig | None = None,
    trees: TreesConfig | None = None,
    targets: Bools | None = None,
    levels: Sequence[float] = (0.0,),
    unit: float | None = None,
    device: str = "cpu",
) -> Predictor:
    """The model of this name over some measurements, not yet trained.

    Args:
        method: one of ``radiogat.config.METHODS`` without stack, or rich_trees, the trees that the stack has.
        samples: the measurements that it predicts from.
        scene: buildings and masts, or None.
        network: settings of radiogatx.
        gat: settings of radiogat.
        graph: settings of the edges of radiogat.
        trees: settings of the trees.
        targets: (n) mask of the measurements that radiogatx and trees are trained on; default: all.
        levels: radii that they are trained with, see ``radiogat.heldout``.
        unit: length that counts as a cell for radiogatx.
        device: where a network is trained.

    Raises:
        UserError: the method lacks its scene, or has too few measurements.
    """
    if method == "radiogatx":
        return _Neighbors(NeighborTask(samples, scene, network or RadioGATxConfig(), targets, unit, levels), device)
    if method in {"trees", "rich_trees"}:
        config = trees or TreesConfig()
        rich = method == "rich_trees"
        if rich:
            config = dataclasses.replace(config, ensemble=max(3, config.ensemble))
        return _Trees(samples, scene, config, targets, levels, rich)
    if method == "radiogat":
        return _Cells(samples, scene, gat or RadioGATConfig(), graph or GraphConfig(), device)
    return _Baseline(BASELINES[method]().fit(samples, scene))


class _Network(Predictor):
    """A network with its task."""

    def __init__(self, task: Task, device: str) -> None:
        self.network = task.network.to(device)

    def state(self) -> dict[str, torch.Tensor]:
        """The network's weights and buffers."""
        return self.network.state_dict()

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Load weights and buffers; the network is then in evaluation mode.

        Raises:
            UserError: names or shapes differ.
        """
        checkpoints.check_shapes(path, {k: v.shape for k, v in self.network.state_dict().items()}, state)
        self.network.load_state_dict(dict(state))
        self.network.eval()


class _Neighbors(_Network):
    """RadioGATx."""

    def __init__(self, task: NeighborTask, device: str) -> None:
        super().__init__(task, device)
        self.task = task
        self.any_frequency = task.config.head == "spectral"

    def train(self, run: Trainer) -> None:
        """Train the network."""
        run(self.task)

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers and scales from the nearest measurements."""
        return self.task.predict(xy, freq_mhz)

    def left_out(self, rows: NDArray[np.int64], radius: Floats) -> tuple[Floats, Floats]:
        """Powers and scales at some of the measurements, without donors within a radius."""
        samples = self.task.samples
        return self.task.predict(samples.xy[rows], samples.freq_mhz[rows], self.task.donors(rows, radius))


class _Trees(Predictor):
    """Gradient-boosted trees on the features of ``TreeFeatures``; all scales are 1.

    They are trained again when a file is loaded: trees have no format that is safe to read.
    """

    any_frequency = True

    def __init__(
        self,
        samples: RadioSamples,
        scene: RadioScene | None,
        config: TreesConfig,
        targets: Bools | None,
        levels: Sequence[float],
        relative: bool,
    ) -> None:
        self.samples = samples
        self.config = config
        self.features = TreeFeatures(samples.xy, samples.freq_mhz, samples.rss_dbm, scene, relative)
        self.model = BoostedTrees(
            config.engine, config.iterations, config.lr, config.leaves, tuple(range(config.ensemble))
        )
        self.tree = cKDTree(samples.xy)
        self.targets = np.ones(len(samples), dtype=bool) if targets is None else np.asarray(targets, dtype=bool)
        self.levels = tuple(levels)
        self.neighbors = 0
        self._wanted = config.neighbors

    def train(self, run: Trainer) -> None:
        """Grow the trees: each target once for each radius, from what lies farther."""
        rows = np.flatnonzero(self.targets)
        radius = np.repeat(np.asarray(self.levels, dtype=np.float64), len(rows))
        cases = np.tile(rows, len(self.levels))
        inside = self.tree.query_ball_point(self.samples.xy[cases], radius, return_length=True)
        keep = (radius == radius.min()) | (len(self.samples) - inside >= max(2, len(self.samples) // 3))
        cases, radius, inside = cases[keep], radius[keep], inside[keep]
        self.neighbors = min(self._wanted, len(self.samples) - int(np.max(inside, initial=0)))
        near = beyond(self.tree, self.samples.xy[cases], self.neighbors, radius)
        at = self.samples.xy[cases], self.samples.freq_mhz[cases]
        base = self.features.base(at[1], *near) if self.features.relative else 0.0
        if len(cases) < _FEW:  # time is that of the trees' number here
            self.model.iterations, self.model.rate = -(-self.config.iterations // 3), 2 * self.config.lr
        self.model.fit(self.features.rows(*at, *near), self.samples.rss_dbm[cases] - base)

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers from the nearest measurements; of frequencies that were not measured, on a line over log f."""
        bands = np.array(self.samples.bands)
        new = ~np.isin(freq_mhz, bands)
        if not new.any():
            return self._from(xy, freq_mhz, None)
        of_bands = np.stack([self._from(xy, np.full(len(xy), f), None)[0] for f in bands])
        level, slope = fit_spectrum(bands, of_bands)
        power = level + slope * np.log10(freq_mhz / reference_frequency(bands))
        for f, own in zip(bands, of_bands, strict=True):
            power = np.where(freq_mhz == f, own, power)
        return power, np.ones(len(xy))

    def left_out(self, rows: NDArray[np.int64], radius: Floats) -> tuple[Floats, Floats]:
        """Powers at some of the measurements, without donors within a radius."""
        return self._from(self.samples.xy[rows], self.samples.freq_mhz[rows], radius)

    def _from(self, xy: Floats, freq_mhz: Floats, radius: Floats | None) -> tuple[Floats, Floats]:
        power = np.empty(len(xy))
        for start in range(0, len(xy), 16384):
            part = slice(start, start + 16384)
            if radius is None:
                near = baselines.nearest(self.tree, xy[part], self.neighbors)
            else:
                near = beyond(self.tree, xy[part], self.neighbors, radius[part])
            power[part] = self.model.predict(self.features.rows(xy[part], freq_mhz[part], *near))
            if self.features.relative:
                power[part] += self.features.base(freq_mhz[part], *near)
        return power, np.ones(len(xy))

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Take which measurements were targets, and grow the same trees.

        Raises:
            UserError: names or shapes differ.
        """
        checkpoints.check_shapes(
            path, {"targets": self.targets.shape, "levels": (len(state.get("levels", ())),)}, state
        )
        self.targets = state["targets"].numpy().astype(bool)
        self.levels = tuple(state["levels"].tolist())
        self.train(lambda task: None)

    def state(self) -> dict[str, torch.Tensor]:
        """Which measurements are targets, and the radii."""
        return {
            "targets": torch.from_numpy(self.targets.copy()),
            "levels": torch.tensor(self.levels, dtype=torch.float64),
        }


class _Baseline(Predictor):
    """An interpolator; its scale is the kriging standard deviation, or 1."""

    def __init__(self, fitted: Any) -> None:
        self.fitted = fitted
        self.any_frequency = isinstance(
            fitted, baselines.PooledIDW | baselines.PooledKriging | baselines.FreeSpaceShift
        )

    def train(self, run: Trainer) -> None:
        """Nothing: it has remembered its measurements."""

    def _by_band(self, freq_mhz: Floats, one: Callable[[float, Bools], tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        power, scale = np.empty(len(freq_mhz)), np.ones(len(freq_mhz))
        for f in np.unique(freq_mhz):
            rows = freq_mhz == f
            power[rows], scale[rows] = one(float(f), rows)
        return power, np.maximum(scale, 1e-3)

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers and scales, band by band."""

        def one(f: float, rows: Bools) -> tuple[Floats, Floats]:
            if hasattr(self.fitted, "predict_with_std"):
                return self.fitted.predict_with_std(xy[rows], f)
            return self.fitted.predict(xy[rows], f), np.ones(int(rows.sum()))

        return self._by_band(freq_mhz, one)

    def left_out(self, rows: NDArray[np.int64], radius: Floats) -> tuple[Floats, Floats]:
        """Powers and scales at some of the measurements, each from those of its band, or of all bands, that lie farther."""
        samples: RadioSamples = self.fitted.samples_

        def one(f: float, chosen: Bools) -> tuple[Floats, Floats]:
            xy, free = samples.xy[rows[chosen]], radius[chosen]
            if hasattr(self.fitted, "predict_with_std"):
                return self.fitted.predict_with_std(xy, f, free)
            return self.fitted._band(xy, f, free), np.ones(1)

        return self._by_band(samples.freq_mhz[rows], one)


class _Cells(_Network):
    """RadioGAT on the scene's raster: measurements of a cell and band become their median."""

    def __init__(
        self, samples: RadioSamples, scene: RadioScene | None, config: RadioGATConfig, graph: GraphConfig, device: str
    ) -> None:
        if scene is None or scene.depth is None or scene.building is None:
            raise UserError("radiogat needs a scene with buildings and transmitters; radiogatx does not")
        self.scene, self.graph = scene, graph
        self.bands = samples.bands
        shape = (len(self.bands), *scene.grid.shape)
        at = scene.grid.rowcol(samples.xy)
        keep = scene.grid.inside(samples.xy)
        band = np.searchsorted(self.bands, samples.freq_mhz)[keep]
        flat = np.ravel_multi_index((band, at[keep, 0], at[keep, 1]), shape)
        order = np.lexsort((samples.rss_dbm[keep], flat))
        cells, first, counts = np.unique(flat[order], return_index=True, return_counts=True)
        rss = np.full(int(np.prod(shape)), np.nan)
        rss[cells] = samples.rss_dbm[keep][order][first + counts // 2]
        self.rss = rss.reshape(shape)
        self.observed = np.isfinite(self.rss) & ~scene.building
        side = min(graph.block, *scene.grid.shape)
        windows = blocks(scene.grid.shape, side)
        pairs = [(b, b) for b in range(len(self.bands))]
        self.task = BlockTask(
            scene.building, scene.depth, self.rss, self.observed, self.bands, pairs, windows, config, graph
        )
        super().__init__(self.task, device)
        self._maps: dict[float, Floats] = {}

    def train(self, run: Trainer) -> None:
        """Train the network; maps that were predicted before are forgotten."""
        run(self.task)
        self._maps.clear()

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers of the cells that the positions lie in, with a scale of 1."""
        power = np.empty(len(xy))
        at = np.clip(self.scene.grid.rowcol(xy), 0, np.array(self.scene.grid.shape) - 1)
        for f in np.unique(freq_mhz):
            if f not in self._maps:
                self._maps[f] = self._map(float(f))
            rows = freq_mhz == f
            power[rows] = self._maps[f][at[rows, 0], at[rows, 1]]
        return power, np.ones(len(xy))

    def _map(self, f: float) -> Floats:
        band = self.bands.index(f)
        network: RadioGAT = copy.deepcopy(self.task.network).cpu().eval()
        building, depth = self.scene.building, self.scene.depth
        assert building is not None
        assert depth is not None
        seen, rss = self.observed[band], np.nan_to_num(self.rss[band])
        shift = float(np.log10(f / self.task.reference))
        found = tiled_radiogat(network, building, depth, seen, rss, f, f, self.graph, log_frequency=shift)
        return np.where(np.isnan(found), np.nanmean(found), found)  # a position may fall into a building
