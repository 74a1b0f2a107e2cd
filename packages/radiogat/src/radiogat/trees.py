"""Gradient-boosted trees on what the network sees: the strong simple method, and a part of the stack.

Each row is a place and a frequency with its nearest measurements of all bands: position, log frequency, distances and angles of
the masts, line-of-sight fractions, and of each neighbor its value, offset and frequency.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from radiogat.samples import RadioScene
from radiogat.spectral import reference_frequency
from tenfold.errors import needs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Engine = Literal["sklearn", "lightgbm"]


@dataclasses.dataclass(frozen=True)
class TreeFeatures:
    """Rows of numbers for trees.

    Args:
        xy: (S, 2) places of the measurements.
        freq_mhz: (S).
        rss_dbm: (S).
        scene: masts and line-of-sight fractions, where they are known.
        relative: give the neighbors' values relative to their mean over distance, and that mean beside them.
    """

    xy: Floats
    freq_mhz: Floats
    rss_dbm: Floats
    scene: RadioScene | None
    relative: bool = False

    def place(self, xy: Floats) -> Floats:
        """(Q, V) position, and of each mast log distance, angle and line-of-sight fraction."""
        parts = [xy]
        if self.scene is not None and self.scene.transmitters is not None:
            apart = xy[:, None] - self.scene.transmitters
            distance = np.sqrt((apart**2).sum(axis=2))
            parts.append(np.log10(distance + 3 * self.scene.grid.cell))
            parts.append(apart[..., 0] / np.maximum(distance, 1e-9))
            parts.append(apart[..., 1] / np.maximum(distance, 1e-9))
            depth = self.scene.depth_at(xy)
            if depth is not None:
                parts.append(depth)
        return np.concatenate(parts, axis=1)

    def base(self, freq_mhz: Floats, distance: Floats, index: Ints) -> Floats:
        """(Q) mean of the neighbors by inverse squared distance, shifted by free space to the frequency that is asked for."""
        value = self.rss_dbm[index] + 20 * np.log10(self.freq_mhz[index] / freq_mhz[:, None])
        weight = 1 / np.maximum(distance, 1e-9) ** 2
        return np.asarray((weight * value).sum(axis=1) / weight.sum(axis=1))

    def rows(self, xy: Floats, freq_mhz: Floats, distance: Floats, index: Ints) -> Floats:
        """(Q, V) of queries with their neighbors (Q, K)."""
        reference = reference_frequency(self.freq_mhz)
        value = self.rss_dbm[index] + 20 * np.log10(self.freq_mhz[index] / freq_mhz[:, None])
        ratio = np.log10(self.freq_mhz[index] / freq_mhz[:, None])
        offset = self.xy[index] - xy[:, None]
        parts = [self.place(xy), np.log10(freq_mhz / reference)[:, None]]
        if self.relative:
            base = self.base(freq_mhz, distance, index)[:, None]
            parts += [base, value - base, value.std(axis=1, keepdims=True)]
            there = self.place(self.xy[index].reshape(-1, 2)).reshape(*index.shape, -1)[..., 2:]
            parts += list(np.moveaxis(there[:, :4] - self.place(xy)[:, None, 2:], 2, 0)) if there.shape[2] else []
        else:
            parts.append(value)
        parts += [offset[..., 0], offset[..., 1], distance]
        if len(np.unique(self.freq_mhz)) > 1:
            parts.append(ratio)
        return np.concatenate(parts, axis=1).astype(np.float32)


class BoostedTrees:
    """The mean of boosted ensembles over several seeds.

    Args:
        engine: sklearn (``HistGradientBoostingRegressor``) or lightgbm (the extra of that name).
        iterations: number of trees of an ensemble.
        rate: learning rate.
        leaves: leaves per tree.
        seeds: seeds of the ensembles; each draws its own half of the features for each node.
    """

    def __init__(
        self,
        engine: Engine = "sklearn",
        iterations: int = 300,
        rate: float = 0.06,
        leaves: int = 31,
        seeds: tuple[int, ...] = (0,),
    ) -> None:
        self.engine = engine
        self.iterations = iterations
        self.rate = rate
        self.leaves = leaves
        self.seeds = seeds
        self.models: list[Any] = []

    def fit(self, X: NDArray[Any], y: Floats) -> "BoostedTrees":
        """Train every ensemble."""
        self.models = [self._one(seed).fit(X, y) for seed in self.seeds]
        return self

    def _one(self, seed: int) -> Any:
        share = 0.5 if len(self.seeds) > 1 else 1.0
        if self.engine == "lightgbm":
            needs("lightgbm", "lightgbm", "radiogat", why="trees of LightGBM")
            import lightgbm

            return lightgbm.LGBMRegressor(
                n_estimators=self.iterations,
                learning_rate=self.rate,
                num_leaves=self.leaves,
                feature_fraction_bynode=share,
                reg_lambda=1.0,
                random_state=seed,
                n_jobs=1,
                deterministic=True,
                verbose=-1,
            )
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            max_iter=self.iterations,
            learning_rate=self.rate,
            max_leaf_nodes=self.leaves,
            l2_regularization=1.0,
            max_features=share,
            early_stopping=False,
            random_state=seed,
        )

    def predict(self, X: NDArray[Any]) -> Floats:
        """(Q) mean over the ensembles."""
        return np.mean([np.asarray(model.predict(X), dtype=np.float64) for model in self.models], axis=0)
