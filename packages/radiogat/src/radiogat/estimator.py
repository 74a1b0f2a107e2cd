"""The estimator: measurements in, maps with error bars out, with scikit-learn's conventions."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from radiogat import baselines
from radiogat.config import MODELS, GraphConfig, RadioGATConfig, RadioGATxConfig
from radiogat.conformal import SpatialConformal, spatial_blocks
from radiogat.graph import blocks, check_frequency
from radiogat.maps import MapLayout, RadioMap
from radiogat.metrics import rmse
from radiogat.networks import RadioGAT, tiled_radiogat
from radiogat.samples import Grid, RadioSamples, RadioScene, check_same_plane
from radiogat.tasks import BlockTask, NeighborTask, Task, run_task
from tenfold import UserError, checkpoints
from tenfold.errors import did_you_mean
from tenfold.runs import plain

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Trainer = Callable[[Task], None]

METHOD = "radiogat.estimator"
BASELINES: dict[str, type[Any]] = {
    "kriging": baselines.LocalKriging,
    "pooled_kriging": baselines.PooledKriging,
    "idw": baselines.IDW,
    "pooled_idw": baselines.PooledIDW,
    "rbf": baselines.RBF,
    "shift": baselines.FreeSpaceShift,
}
_ENOUGH = 50
"""Held-out measurements that are wanted at least."""
_CELLS = 65536
"""Cells of a map that are predicted at once."""


class RadioMapEstimator(BaseEstimator):  # type: ignore[misc]
    """Learns an area from its measurements and predicts power with error bars, at any place.

    A fifth of the area's blocks (more where measurements are few) is set apart: their measurements are no training
    targets, and each of them is then predicted from the others. These errors choose between the network and kriging
    (``fallback``), and calibrate the error bars.

    Args:
        model: radiogatx (the default), radiogat (the faithful network; needs a scene with buildings and masts), or a
            baseline: kriging, pooled_kriging, idw, pooled_idw, rbf, shift.
        network: settings of RadioGATx.
        gat: settings of RadioGAT.
        graph: edges of RadioGAT.
        fallback: take kriging (pooled over the bands where there are several) when it is better on the held-out blocks.
        calibration: interpolate (a held-out measurement is predicted from all others: right for maps between the
            measurements) or extrapolate (also without the others of its block: wider, right for unvisited quarters).
        blocks_across: blocks along the area's longer side.
        seed: of the choice of blocks; networks have their own.
        device: where a network is trained: cpu or cuda.

    Attributes:
        chosen_: the model that predicts, after the fallback.
        heldout_: model -> RMSE in dB on the held-out blocks.
        conformal_: the calibrated intervals.

    Raises:
        UserError: on ``fit``: too few measurements, planes that disagree, a model without its scene.
    """

    def __init__(
        self,
        model: str = "radiogatx",
        network: RadioGATxConfig | None = None,
        gat: RadioGATConfig | None = None,
        graph: GraphConfig | None = None,
        fallback: bool = True,
        calibration: Literal["interpolate", "extrapolate"] = "interpolate",
        blocks_across: int = 10,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.network = network
        self.gat = gat
        self.graph = graph
        self.fallback = fallback
        self.calibration = calibration
        self.blocks_across = blocks_across
        self.seed = seed
        self.device = device

    # Fitting

    def fit(
        self, samples: RadioSamples, scene: RadioScene | None = None, train: Trainer = run_task
    ) -> "RadioMapEstimator":
        """Train, choose and calibrate.

        Args:
            samples: the measurements.
            scene: buildings and masts, where they are known.
            train: runs a task; the command line gives one that shows progress and can be resumed.
        """
        if self.model not in MODELS:
            raise UserError(f"unknown model '{self.model}': {did_you_mean(self.model, MODELS)}")
        if len(samples) < 3:
            raise UserError(f"{len(samples)} measurements are too few for a map: measure at least 3 places")
        check_same_plane(samples, scene)
        self.samples_, self.scene_ = samples, scene
        held = self._held_out()
        truth = samples.rss_dbm[held]
        predictors: dict[str, Any] = {}
        found: dict[str, tuple[Floats, Floats]] = {}
        for name in dict.fromkeys([self.model, *self._fallbacks()]):
            predictors[name], found[name] = self._fit_one(name, held, train)
        self.heldout_ = {name: rmse(truth, power) for name, (power, _) in found.items()}
        self.chosen_ = min(self.heldout_, key=lambda name: self.heldout_[name])
        self.predictor_ = predictors[self.chosen_]
        power, scale = found[self.chosen_]
        bands = np.searchsorted(samples.bands, samples.freq_mhz[held])
        self.conformal_ = SpatialConformal(np.abs(truth - power) / scale, bands)
        self.calibration_: dict[str, Floats] = {
            "truth": truth,
            "power": power,
            "scale": scale,
            "band": bands.astype(np.float64),
            "block": self._blocks()[held].astype(np.float64),
        }
        return self

    def _fallbacks(self) -> list[str]:
        if not self.fallback or self.model not in {"radiogatx", "radiogat"}:
            return []
        if len(self.samples_.bands) > 1:
            return ["pooled_kriging"]
        return ["kriging"]

    def _blocks(self) -> NDArray[np.int64]:
        xy = self.samples_.xy
        return spatial_blocks(xy, max(float(np.ptp(xy, axis=0).max()), 1e-9) / self.blocks_across)

    def _held_out(self) -> NDArray[np.int64]:
        """Indices of the measurements in about a fifth of the blocks; of few measurements up to half, for finite bars."""
        label = self._blocks()
        counts = np.bincount(label)
        order = np.random.default_rng(self.seed).permutation(len(counts))
        enough = np.cumsum(counts[order]) >= max(1, len(label) // 5, min(len(label) // 2, _ENOUGH))
        chosen = order[: int(enough.argmax()) + 1] if len(order) > 1 else order
        held = np.isin(label, chosen)
        return np.flatnonzero(held if not held.all() else np.arange(len(label)) % 5 == 0)

    def _fit_one(self, name: str, held: NDArray[np.int64], train: Trainer) -> tuple[Any, tuple[Floats, Floats]]:
        samples, scene = self.samples_, self.scene_
        targets = np.ones(len(samples), dtype=bool)
        targets[held] = False
        if self.calibration == "extrapolate" or name in {"rbf", "radiogat"}:
            # predicted by a model that never saw them
            rest = _Predictor.make(name, self, samples.take(targets), scene)
            rest.train(train)
            found = rest.predict(samples.xy[held], samples.freq_mhz[held])
            predictor = _Predictor.make(name, self, samples, scene)
            if name == "radiogatx":
                predictor.restore(Path(), rest.state())  # trained once; all measurements are donors from now on
            else:
                predictor.train(train)
            return predictor, found
        predictor = _Predictor.make(name, self, samples, scene, targets)
        predictor.train(train)
        return predictor, predictor.leave_one_out(held)

    # Predicting

    def predict(
        self, where: ArrayLike | Grid, freq_mhz: float | Sequence[float] | None = None, interval: float | None = None
    ) -> Any:
        """Received power in dBm.

        Args:
            where: a grid, or positions (n, 2).
            freq_mhz: one or several; default: the measured bands.
            interval: level of the error bars, 0.9 for example.

        Returns:
            For a grid, a ``RadioMap``. For positions (F, n) powers, without the first axis where one frequency is given;
            with ``interval`` the tuple (power, low, high).

        Raises:
            UserError: a band was not measured, and the model cannot answer for other frequencies.
        """
        freqs = self._frequencies(freq_mhz)
        if isinstance(where, Grid):
            layout = MapLayout(where, freqs, interval, self.samples_.crs)
            return RadioMap.collect(layout, self.tiles(where, freqs, interval))
        xy = np.asarray(where, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(xy).all():
            raise UserError(f"position {int(np.argwhere(~np.isfinite(xy))[0][0])} is not finite")
        values = self._at(xy, freqs, interval)
        scalar = freq_mhz is not None and np.ndim(freq_mhz) == 0
        arrays = [v[0] if scalar else v for v in values.values()]
        return arrays[0] if interval is None else tuple(arrays)

    def tiles(
        self, grid: Grid, freq_mhz: float | Sequence[float] | None = None, interval: float | None = None
    ) -> Iterator[tuple[slice, Mapping[str, Floats]]]:
        """The map of a grid, some rows at a time, for the writers of ``radiogat.data``; buildings are NaN."""
        freqs = self._frequencies(freq_mhz)
        step = max(1, _CELLS // grid.width)
        for start in range(0, grid.height, step):
            rows = slice(start, min(grid.height, start + step))
            centers = grid.centers(rows)
            free = self._free(centers)
            shape = (len(freqs), rows.stop - rows.start, grid.width)
            layers = {}
            for name, values in self._at(centers[free], freqs, interval).items():
                layer = np.full((len(freqs), len(centers)), np.nan)
                layer[:, free] = values
                layers[name] = layer.reshape(shape)
            yield rows, layers

    def _free(self, xy: Floats) -> Bools:
        """(n) whether a position is outside of every building."""
        scene = self.scene_
        if scene is None or scene.building is None:
            return np.ones(len(xy), dtype=bool)
        at = np.clip(scene.grid.rowcol(xy), 0, np.array(scene.grid.shape) - 1)
        return np.asarray(~(scene.building[at[:, 0], at[:, 1]] & scene.grid.inside(xy)))

    def _frequencies(self, freq_mhz: float | Sequence[float] | None) -> tuple[float, ...]:
        freqs = self.samples_.bands if freq_mhz is None else tuple(float(f) for f in np.atleast_1d(freq_mhz))
        for f in freqs:
            check_frequency(f)
            if f not in self.samples_.bands and not self.predictor_.any_frequency:
                known = ", ".join(f"{band:g}" for band in self.samples_.bands)
                raise UserError(
                    f"no measurement at {f:g} MHz; there are {known}. For other frequencies fit radiogatx with"
                    " head='spectral' (--network.head spectral)"
                )
        return freqs

    def _at(self, xy: Floats, freqs: Sequence[float], interval: float | None) -> dict[str, Floats]:
        layers: dict[str, list[Floats]] = {"rss_dbm": [], "rss_lo": [], "rss_hi": []}
        for f in freqs:
            power, scale = self.predictor_.predict(xy, np.full(len(xy), f))
            layers["rss_dbm"].append(power)
            if interval is not None:
                group = self.samples_.bands.index(f) if f in self.samples_.bands else None
                low, high = self.conformal_.interval(power, scale, interval, group)
                layers["rss_lo"].append(low)
                layers["rss_hi"].append(high)
        return {name: np.stack(values) for name, values in layers.items() if values}

    def score(self, samples: RadioSamples) -> float:
        """R squared on other measurements."""
        power = np.empty(len(samples))
        for f in samples.bands:
            rows = samples.freq_mhz == f
            power[rows] = self.predict(samples.xy[rows], f)
        residual = ((samples.rss_dbm - power) ** 2).sum()
        return float(1 - residual / ((samples.rss_dbm - samples.rss_dbm.mean()) ** 2).sum())

    # Judging the error bars

    def coverage(self, samples: RadioSamples, levels: ArrayLike) -> Floats:
        """Share of other measurements inside of the intervals of each level, in the bands that were fitted.

        Only measurements that ``fit`` has not seen are a test.
        """
        power, scale = self.predictor_.predict(samples.xy, samples.freq_mhz)
        bands = np.searchsorted(self.samples_.bands, samples.freq_mhz)
        return self.conformal_.coverage(np.abs(samples.rss_dbm - power) / scale, bands, levels)

    def cross_coverage(self, levels: ArrayLike, folds: int = 5) -> Floats:
        """(folds, levels) shares of some blocks' held-out measurements inside of intervals that the other blocks calibrated.

        The mean over the folds is close to the level by construction; how far they lie apart says how much the
        calibration depends on which blocks were held out.
        """
        c = self.calibration_
        scores, band = np.abs(c["truth"] - c["power"]) / c["scale"], c["band"].astype(np.int64)
        blocks = np.unique(c["block"])
        order = np.random.default_rng(self.seed).permutation(len(blocks)) % min(folds, len(blocks))
        fold = order[np.searchsorted(blocks, c["block"])]
        shares = []
        for number in range(min(folds, len(blocks))):
            out = fold == number
            if out.all():
                break
            shares.append(SpatialConformal(scores[~out], band[~out]).coverage(scores[out], band[out], levels))
        return np.array(shares).reshape(-1, len(np.atleast_1d(levels)))

    # Files

    def save(self, path: str | Path) -> None:
        """One safetensors file with everything that predicting needs: measurements, scene, weights, calibration."""
        s, scene = self.samples_, self.scene_
        tensors: dict[str, NDArray[Any]] = {"xy": s.xy, "freq_mhz": s.freq_mhz, "rss_dbm": s.rss_dbm}
        tensors |= {f"calibration.{name}": values for name, values in self.calibration_.items()}
        about: dict[str, Any] = {"crs": s.crs, "chosen": self.chosen_, "heldout": self.heldout_, "scene": None}
        if scene is not None:
            about["scene"] = {"grid": plain(scene.grid), "crs": scene.crs}
            if scene.building is not None:
                tensors["building"] = scene.building.astype(np.uint8)
            if scene.transmitters is not None:
                tensors["transmitters"] = scene.transmitters
        about["settings"] = {name: plain(value) for name, value in self.get_params(deep=False).items()}
        state = {f"network.{k}": v for k, v in self.predictor_.state().items()}
        arrays = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in tensors.items()}
        from radiogat import __version__

        checkpoints.save(path, {**arrays, **state}, method=METHOD, version=__version__, config=about)

    @classmethod
    def load(cls, path: str | Path) -> "RadioMapEstimator":
        """What ``save`` wrote; predictions are equal bit for bit.

        Raises:
            UserError: not such a file.
        """
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        found = checkpoints.load(path, method=METHOD)
        about = copy.deepcopy(found.config)
        array = {k: v.numpy() for k, v in found.tensors.items() if not k.startswith("network.")}
        kinds = {"network": RadioGATxConfig, "gat": RadioGATConfig, "graph": GraphConfig}
        settings = {
            k: _config(kinds[k], v) if k in kinds and v is not None else v for k, v in about["settings"].items()
        }
        self = cls(**settings)
        self.samples_ = RadioSamples(array["xy"], array["freq_mhz"], array["rss_dbm"], about["crs"])
        self.scene_ = None
        if about["scene"] is not None:
            building = array["building"].astype(bool) if "building" in array else None
            grid = Grid(**about["scene"]["grid"])
            self.scene_ = RadioScene(grid, building, array.get("transmitters"), about["scene"]["crs"])
        self.chosen_, self.heldout_ = about["chosen"], about["heldout"]
        self.calibration_ = {k.partition(".")[2]: v for k, v in array.items() if k.startswith("calibration.")}
        c = self.calibration_
        self.conformal_ = SpatialConformal(np.abs(c["truth"] - c["power"]) / c["scale"], c["band"])
        self.predictor_ = _Predictor.make(self.chosen_, self, self.samples_, self.scene_)
        weights = {k.removeprefix("network."): v for k, v in found.tensors.items() if k.startswith("network.")}
        self.predictor_.restore(path, weights)
        return self


def _config(kind: type[Any], values: Mapping[str, Any]) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class _Predictor:
    """One model behind the estimator: powers, and scales of their errors."""

    any_frequency = False

    @staticmethod
    def make(
        name: str,
        of: RadioMapEstimator,
        samples: RadioSamples,
        scene: RadioScene | None,
        targets: Bools | None = None,
    ) -> "_Predictor":
        if name == "radiogatx":
            unit = of.samples_.spacing / 2 if scene is None else scene.grid.cell
            return _Neighbors(NeighborTask(samples, scene, of.network or RadioGATxConfig(), targets, unit), of.device)
        if name == "radiogat":
            return _Cells(samples, scene, of.gat or RadioGATConfig(), of.graph or GraphConfig(), of.device)
        return _Baseline(BASELINES[name]().fit(samples, scene))

    def train(self, run: Trainer) -> None:
        """Nothing to train."""

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        raise NotImplementedError

    def leave_one_out(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        raise NotImplementedError

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing to restore."""


class _Neighbors(_Predictor):
    def __init__(self, task: NeighborTask, device: str) -> None:
        self.task = task
        task.network.to(device)
        self.any_frequency = task.config.head == "spectral"

    def train(self, run: Trainer) -> None:
        run(self.task)

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        return self.task.predict(xy, freq_mhz)

    def leave_one_out(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        samples = self.task.samples
        return self.task.predict(samples.xy[rows], samples.freq_mhz[rows], self.task.donors(rows))

    def state(self) -> dict[str, torch.Tensor]:
        return self.task.network.state_dict()

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        _restore(self.task.network, path, state)


def _restore(network: torch.nn.Module, path: Path, state: Mapping[str, torch.Tensor]) -> None:
    checkpoints.check_shapes(path, {k: v.shape for k, v in network.state_dict().items()}, state)
    network.load_state_dict(dict(state))
    network.eval()


class _Baseline(_Predictor):
    def __init__(self, fitted: Any) -> None:
        self.fitted = fitted
        self.any_frequency = isinstance(
            fitted, baselines.PooledIDW | baselines.PooledKriging | baselines.FreeSpaceShift
        )

    def _by_band(self, freq_mhz: Floats, one: Callable[[float, Bools], tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
        power, scale = np.empty(len(freq_mhz)), np.ones(len(freq_mhz))
        for f in np.unique(freq_mhz):
            rows = freq_mhz == f
            power[rows], scale[rows] = one(float(f), rows)
        return power, np.maximum(scale, 1e-3)

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        def one(f: float, rows: Bools) -> tuple[Floats, Floats]:
            if hasattr(self.fitted, "predict_with_std"):
                return self.fitted.predict_with_std(xy[rows], f)
            return self.fitted.predict(xy[rows], f), np.ones(int(rows.sum()))

        return self._by_band(freq_mhz, one)

    def leave_one_out(self, rows: NDArray[np.int64]) -> tuple[Floats, Floats]:
        samples: RadioSamples = self.fitted.samples_
        freq = samples.freq_mhz
        pooled = isinstance(self.fitted, baselines.PooledKriging)

        def one(f: float, chosen: Bools) -> tuple[Floats, Floats]:
            numbers = rows[chosen]
            if not pooled:  # its trees hold one band each
                of_band = np.flatnonzero(freq == f)
                numbers = np.searchsorted(of_band, numbers)
            if hasattr(self.fitted, "predict_with_std"):
                return self.fitted.predict_with_std(samples.xy[rows[chosen]], f, numbers)
            return self.fitted.leave_one_out(f)[np.searchsorted(np.flatnonzero(freq == f), rows[chosen])], np.ones(1)

        return self._by_band(freq[rows], one)


class _Cells(_Predictor):
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
        self.task.network.to(device)
        self._maps: dict[float, Floats] = {}

    def train(self, run: Trainer) -> None:
        run(self.task)
        self._maps.clear()

    def predict(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
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

    def state(self) -> dict[str, torch.Tensor]:
        return self.task.network.state_dict()

    def restore(self, path: Path, state: Mapping[str, torch.Tensor]) -> None:
        _restore(self.task.network, path, state)


def describe(estimator: RadioMapEstimator) -> str:
    """What was fitted, in a few lines."""
    held = ", ".join(f"{name} {value:.2f} dB" for name, value in estimator.heldout_.items())
    s = estimator.samples_
    lines = [
        f"{len(s)} measurements at {', '.join(f'{f:g}' for f in s.bands)} MHz",
        f"RMSE on {len(estimator.calibration_['truth'])} measurements in held-out blocks: {held}",
        f"chosen: {estimator.chosen_}"
        + (f" (it is better here than {estimator.model})" if estimator.chosen_ != estimator.model else ""),
    ]
    return "\n".join(lines) + "\n"
