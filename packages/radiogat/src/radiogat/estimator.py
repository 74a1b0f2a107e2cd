"""The estimator: measurements in, maps with error bars out, with scikit-learn's conventions."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator

from radiogat import predictors
from radiogat.config import METHODS, GraphConfig, RadioGATConfig, RadioGATxConfig
from radiogat.conformal import SpatialConformal, spatial_blocks
from radiogat.graph import check_frequency
from radiogat.maps import MapLayout, RadioMap
from radiogat.metrics import rmse
from radiogat.predictors import Predictor, Trainer
from radiogat.samples import Grid, RadioSamples, RadioScene, check_same_plane
from radiogat.tasks import run_task
from tenfold import UserError, checkpoints
from tenfold.errors import did_you_mean
from tenfold.runs import from_plain, plain

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

KIND = "radiogat.estimator"
"""What the header of a saved file says."""
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
        method: radiogatx (the default), radiogat (the faithful network; needs a scene with buildings and masts), or a
            baseline: kriging, pooled_kriging, idw, pooled_idw, rbf, shift.
        network: settings of RadioGATx.
        gat: settings of RadioGAT.
        graph: edges of RadioGAT.
        fallback: take kriging (pooled over the bands where there are several) when it is better on the held-out blocks.
        calibration: interpolate (a held-out measurement is predicted from all others: right for maps between the
            measurements) or extrapolate (also without the others of its block: wider, right for unvisited quarters).
        blocks_across: blocks along the area's longer side.
        seed: seed of the choice of blocks; networks have their own.
        device: where a network is trained: cpu, cuda or mps.

    Attributes:
        chosen_: the model that predicts, after the fallback.
        heldout_: model -> RMSE in dB on the held-out blocks.
        conformal_: the calibrated intervals.

    Raises:
        UserError: on ``fit``: too few measurements, planes that disagree, a model without its scene.
    """

    def __init__(
        self,
        method: str = "radiogatx",
        network: RadioGATxConfig | None = None,
        gat: RadioGATConfig | None = None,
        graph: GraphConfig | None = None,
        fallback: bool = True,
        calibration: Literal["interpolate", "extrapolate"] = "interpolate",
        blocks_across: int = 10,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.method = method
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
        if self.method not in METHODS:
            raise UserError(f"unknown method '{self.method}': {did_you_mean(self.method, METHODS)}")
        if len(samples) < 3:
            raise UserError(f"{len(samples)} measurements are too few for a map: measure at least 3 places")
        check_same_plane(samples, scene)
        self.samples_, self.scene_ = samples, scene
        held = self._held_out()
        truth = samples.rss_dbm[held]
        fitted: dict[str, Predictor] = {}
        found: dict[str, tuple[Floats, Floats]] = {}
        for name in dict.fromkeys([self.method, *self._fallbacks()]):
            fitted[name], found[name] = self._fit_one(name, held, train)
        self.heldout_ = {name: rmse(truth, power) for name, (power, _) in found.items()}
        self.chosen_ = min(self.heldout_, key=lambda name: self.heldout_[name])
        self.predictor_ = fitted[self.chosen_]
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
        if not self.fallback or self.method not in {"radiogatx", "radiogat"}:
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

    def _make(self, name: str, samples: RadioSamples, targets: Bools | None = None) -> Predictor:
        """The model of this name over some of the measurements, not yet trained."""
        scene = self.scene_
        return predictors.make(
            name,
            samples,
            scene,
            network=self.network,
            gat=self.gat,
            graph=self.graph,
            targets=targets,
            unit=self.samples_.spacing / 2 if scene is None else scene.grid.cell,
            device=self.device,
        )

    def _fit_one(self, name: str, held: NDArray[np.int64], train: Trainer) -> tuple[Predictor, tuple[Floats, Floats]]:
        samples = self.samples_
        targets = np.ones(len(samples), dtype=bool)
        targets[held] = False
        if self.calibration == "extrapolate" or name in {"rbf", "radiogat"}:
            # predicted by a model that never saw them
            rest = self._make(name, samples.take(targets))
            rest.train(train)
            found = rest.predict(samples.xy[held], samples.freq_mhz[held])
            predictor = self._make(name, samples)
            if name == "radiogatx":
                predictor.restore(Path(), rest.state())  # trained once; all measurements are donors from now on
            else:
                predictor.train(train)
            return predictor, found
        predictor = self._make(name, samples, targets)
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
        freqs = self.frequencies(freq_mhz)
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
        """The map of a grid, some rows at a time, for the writers of ``radiogat.maps``; buildings are NaN."""
        freqs = self.frequencies(freq_mhz)
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
        """(n) whether a position is outside every building."""
        scene = self.scene_
        if scene is None or scene.building is None:
            return np.ones(len(xy), dtype=bool)
        at = np.clip(scene.grid.rowcol(xy), 0, np.array(scene.grid.shape) - 1)
        return np.asarray(~(scene.building[at[:, 0], at[:, 1]] & scene.grid.inside(xy)))

    def frequencies(self, freq_mhz: float | Sequence[float] | None) -> tuple[float, ...]:
        """The frequencies that are asked for, or the measured bands.

        Raises:
            UserError: one of them was not measured, and the model cannot answer for it.
        """
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
        """Share of other measurements inside the intervals of each level, in the bands that were fitted.

        Only measurements that ``fit`` has not seen are a test.
        """
        power, scale = self.predictor_.predict(samples.xy, samples.freq_mhz)
        bands = np.searchsorted(self.samples_.bands, samples.freq_mhz)
        return self.conformal_.coverage(np.abs(samples.rss_dbm - power) / scale, bands, levels)

    def cross_coverage(self, levels: ArrayLike, folds: int = 5) -> Floats:
        """(folds, levels) shares of some blocks' held-out measurements inside intervals that the other blocks calibrated.

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
        checkpoints.save(path, {**arrays, **state}, method=KIND, config=about)

    @classmethod
    def load(cls, path: str | Path) -> "RadioMapEstimator":
        """What ``save`` wrote; predictions are equal bit for bit.

        Raises:
            UserError: not such a file.
        """
        path = Path(path)
        path = path / "model.safetensors" if path.is_dir() else path
        found = checkpoints.load(path, method=KIND)
        about = copy.deepcopy(found.config)
        array = {k: v.numpy() for k, v in found.tensors.items() if not k.startswith("network.")}
        kinds: dict[str, type[Any]] = {"network": RadioGATxConfig, "gat": RadioGATConfig, "graph": GraphConfig}
        settings = {
            k: from_plain(kinds[k], v) if k in kinds and v is not None else v for k, v in about["settings"].items()
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
        self.predictor_ = self._make(self.chosen_, self.samples_)
        weights = {k.removeprefix("network."): v for k, v in found.tensors.items() if k.startswith("network.")}
        self.predictor_.restore(path, weights)
        return self


def describe(estimator: RadioMapEstimator) -> str:
    """What was fitted, in a few lines."""
    held = ", ".join(f"{name} {value:.2f} dB" for name, value in estimator.heldout_.items())
    s = estimator.samples_
    lines = [
        f"{len(s)} measurements at {', '.join(f'{f:g}' for f in s.bands)} MHz",
        f"RMSE on {len(estimator.calibration_['truth'])} measurements in held-out blocks: {held}",
        f"chosen: {estimator.chosen_}"
        + (f" (it is better here than {estimator.method})" if estimator.chosen_ != estimator.method else ""),
    ]
    return "\n".join(lines) + "\n"
