"""The estimator: measurements in, maps with error bars out, with scikit-learn's conventions."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted

from radiogat import predictors
from radiogat.config import METHODS, GraphConfig, RadioGATConfig, RadioGATxConfig, TreesConfig
from radiogat.conformal import SpatialConformal
from radiogat.graph import check_frequency
from radiogat.heldout import HeldOut, hold_out, map_distances
from radiogat.maps import MapLayout, RadioMap
from radiogat.predictors import Predictor, Trainer
from radiogat.samples import Grid, RadioSamples, RadioScene, check_same_plane
from radiogat.stacking import Spread, Weights, cross_fitted
from radiogat.tasks import run_task
from tenfold import UserError, checkpoints
from tenfold.errors import did_you_mean
from tenfold.runs import from_plain, plain

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

KIND = "radiogat.estimator"
"""What the header of a saved file says."""
_ENOUGH = 60
"""Places that are wanted in the discs at least."""
_CELLS = 65536
"""Cells of a map that are predicted at once."""
_PULL = 20.0
"""Cases that speak for equal weights that do not change with the distance, in the stack."""
_KINDS: dict[str, Any] = {
    "network": RadioGATxConfig,
    "gat": RadioGATConfig,
    "graph": GraphConfig,
    "trees": TreesConfig,
}
"""Settings that are groups."""
_SCALED = ("radiogatx", "kriging", "pooled_kriging")
"""Models that say how large their errors are."""
_HELD = ("targets", "round", "rows", "radius", "distance", "weight", "place", "disc", "levels")
NAMES = {"rich_trees": "trees (ensemble)"}
"""What people are shown of a model's name."""
_APART = ("rbf", "radiogat")
"""Models without a fast way of leaving out: judged by another that was fitted without the discs."""


class RadioMapEstimator(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Learns an area from its measurements and predicts power with error bars, at any place.

    Discs of places train nothing. In them measurements are predicted without what lies within a radius, several radii in
    turn, and weighted such that the distances to the nearest measurement are those of the map (``radiogat.heldout``). These
    errors give the weights of the stack, choose between the stack and its parts, and calibrate the error bars.

    Args:
        method: stack (the default: network, trees and kriging, weighted), radiogatx (the network), trees, radiogat (the
            faithful network; needs a scene with buildings and masts), or a baseline: kriging, pooled_kriging, idw,
            pooled_idw, rbf, shift.
        network: settings of RadioGATx.
        gat: settings of RadioGAT.
        graph: edges of RadioGAT.
        trees: settings of the trees.
        fallback: take the network, the trees or kriging where it is better than the method on the held-out cases.
        share: share of the places in the discs, about.
        seed: seed of the choice of discs; networks have their own.
        device: where a network is trained: cpu, cuda or mps.

    Attributes:
        chosen_: the model that predicts, after the fallback.
        heldout_: model -> RMSE in dB on the held-out cases, weighted as the map.
        held_: the cases.
        weights_: of the stack's parts.
        conformal_: the calibrated intervals.

    Raises:
        UserError: on ``fit``: too few measurements, planes that disagree, a model without its scene.

    Example:
        >>> from radiogat import CityConfig, city
        >>> truth = city(CityConfig(size=40, freq_mhz=(1750.0,)))
        >>> samples = truth.samples(truth.draw(rate=0.2, seed=0))
        >>> power = RadioMapEstimator("idw").fit(samples).predict(samples.xy[:3], 1750.0)
        >>> power.shape
        (3,)
    """

    def __init__(
        self,
        method: str = "stack",
        network: RadioGATxConfig | None = None,
        gat: RadioGATConfig | None = None,
        graph: GraphConfig | None = None,
        trees: TreesConfig | None = None,
        fallback: bool = True,
        share: float = 0.2,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.network = network
        self.gat = gat
        self.graph = graph
        self.trees = trees
        self.fallback = fallback
        self.share = share
        self.seed = seed
        self.device = device

    # Fitting

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Settings by name; deep ones too, as ``network__steps``."""
        own: dict[str, Any] = super().get_params(deep=False)
        if deep:
            for name, kind in _KINDS.items():
                inner = own[name] if isinstance(own[name], kind) else kind()
                own |= {f"{name}__{f.name}": getattr(inner, f.name) for f in dataclasses.fields(inner)}
        return own

    def set_params(self, **params: Any) -> "RadioMapEstimator":
        """Change settings; ``network__steps=200`` changes one of the network's.

        Raises:
            ValueError: there is no such setting.
        """
        plain_ones = {name: value for name, value in params.items() if "__" not in name}
        super().set_params(**plain_ones)
        for name, value in params.items():
            outer, _, inner = name.partition("__")
            if not inner:
                continue
            if outer not in _KINDS or inner not in {f.name for f in dataclasses.fields(_KINDS[outer])}:
                raise ValueError(f"invalid parameter '{name}'; valid ones: {sorted(self.get_params())}")
            settings = getattr(self, outer)
            settings = _KINDS[outer]() if settings is None else settings
            setattr(self, outer, dataclasses.replace(settings, **{inner: value}))
        return self

    def fit(
        self,
        X: RadioSamples | ArrayLike,
        y: RadioScene | ArrayLike | None = None,
        train: Trainer = run_task,
        where: Grid | ArrayLike | None = None,
        scene: RadioScene | None = None,
    ) -> "RadioMapEstimator":
        """Train, choose and calibrate.

        Args:
            X: the measurements; or (n, 3) x, y and frequency in MHz, an array or a data frame with these columns.
            y: (n) received powers in dBm, where X is an array; where X are measurements, the scene may stand here.
            train: runs a task; the command line gives one that shows progress and can be resumed.
            where: grid or places at which the map will be read, whose distances to the measurements decide what is checked;
                default: the scene's grid, or the rectangle around the measurements.
            scene: buildings and masts, where they are known.
        """
        if isinstance(X, RadioSamples):
            scene, samples = (y if isinstance(y, RadioScene) else scene), X
        else:
            if y is None or isinstance(y, RadioScene):
                raise UserError("requires y to be passed, but the target y is None: the received powers in dBm")
            xy, freq = _rows(X)
            power = np.asarray(y, dtype=np.float64)
            if power.shape != (len(xy),):
                raise UserError(f"y has shape {power.shape}, expected ({len(xy)},), a power for each row of X")
            samples = RadioSamples(xy, freq, power, None if scene is None else scene.crs)
            self.n_features_in_ = 3
        if self.method not in METHODS:
            raise UserError(f"unknown method '{self.method}': {did_you_mean(self.method, METHODS)}")
        if len(samples) < 3:
            raise UserError(f"{len(samples)} measurements are too few for a map: measure at least 3 places")
        check_same_plane(samples, scene)
        self.samples_, self.scene_ = samples, scene
        asked = map_distances(samples, scene, where, self.seed)
        self.knots_ = np.quantile(asked, np.linspace(0, 1, 21))
        held = self.held_ = hold_out(samples, asked, self.share, _ENOUGH, self.seed)
        truth = samples.rss_dbm[held.rows]
        self.parts_ = self._parts() if self.method == "stack" else []
        fitted: dict[str, Predictor] = {}
        found: dict[str, tuple[Floats, Floats]] = {}
        for name in dict.fromkeys(
            [*self.parts_, *([] if self.method == "stack" else [self.method]), *self._fallbacks()]
        ):
            fitted[name], found[name] = self._fit_one(name, train)
        self.heldout_ = {name: self._rmse(truth - power) for name, (power, _) in found.items()}
        powers = {name: power for name, (power, _) in found.items()}
        self.weights_: Weights | None = None
        if self.method == "stack":
            together = np.stack([powers[name] for name in self.parts_], axis=1)
            cases = (together, truth, held.distance, held.weight)
            self.weights_ = Weights.fit(*cases, self.knots_, _PULL)
            powers["stack"] = cross_fitted(*cases, held.disc, self.knots_, _PULL)
            self.heldout_["stack"] = self._rmse(truth - powers["stack"])
        names = list(self.heldout_) if self.fallback else [self.method]
        self.chosen_ = min(names, key=lambda name: self.heldout_[name])
        self.fitted_ = {name: fitted[name] for name in self._used()}
        scales = {name: found[name] for name in self._used()}
        features = self._features(scales, held.distance)
        residual = truth - powers[self.chosen_]
        self.spread_ = Spread.fit(features, residual, held.weight)
        bands = np.searchsorted(samples.bands, samples.freq_mhz[held.rows])
        self.calibration_: dict[str, Floats] = {
            "truth": truth,
            "power": powers[self.chosen_],
            "scale": self.spread_(features),
            "band": bands.astype(np.float64),
            "place": held.place.astype(np.float64),
            "disc": held.disc.astype(np.float64),
            "weight": held.weight,
            "distance": held.distance,
        }
        self.conformal_ = self._conformal()
        return self

    def _final(self) -> Bools | None:
        """(S) what the models that predict were trained on; None for all."""
        return self.held_.targets[0].astype(bool) if len(self.held_.targets) == 1 else None

    def _rmse(self, error: Floats) -> float:
        return float(np.sqrt((self.held_.weight * error**2).sum()))

    def _conformal(self, which: Bools | None = None) -> SpatialConformal:
        c = self.calibration_ if which is None else {name: values[which] for name, values in self.calibration_.items()}
        scores = np.abs(c["truth"] - c["power"]) / c["scale"]
        return SpatialConformal(scores, c["band"], weights=c["weight"], places=c["place"], clusters=c["disc"])

    def _kriging(self) -> str:
        """The kriging that answers for every frequency that the network does: of all bands, where there are several."""
        return "pooled_kriging" if len(self.samples_.bands) > 1 else "kriging"

    def _parts(self) -> list[str]:
        """The models that the stack is made of."""
        return ["radiogatx", "rich_trees", self._kriging()]

    def _fallbacks(self) -> list[str]:
        if not self.fallback or self.method not in {"radiogatx", "radiogat", "trees"}:
            return []
        return [self._kriging(), *([] if self.method == "trees" else ["trees"])]

    def _used(self) -> list[str]:
        """The models that the chosen one predicts with."""
        return self.parts_ if self.chosen_ == "stack" else [self.chosen_]

    def _features(self, found: Mapping[str, tuple[Floats, Floats]], distance: Floats) -> Floats:
        """(n, K) logarithms of the distance, the models' own scales, and how far they disagree: what errors depend on."""
        unit = max(float(self.knots_[len(self.knots_) // 2]), 1e-9)
        columns = [np.log(distance / unit + 0.2)]
        columns += [np.log(scale) for name, (_, scale) in found.items() if name in _SCALED]
        if len(found) > 1:
            columns.append(np.log(np.std([power for power, _ in found.values()], axis=0) + 0.1))
        return np.stack(columns, axis=1)

    def _make(self, name: str, samples: RadioSamples, targets: Bools | None = None, shorter: bool = False) -> Predictor:
        """The model of this name over some of the measurements, not yet trained; a shorter training takes half the steps."""
        scene, network = self.scene_, self.network or RadioGATxConfig()
        if shorter:
            network = dataclasses.replace(network, steps=-(-network.steps // 2))
        return predictors.make(
            name,
            samples,
            scene,
            network=network,
            gat=self.gat,
            graph=self.graph,
            trees=self.trees,
            targets=targets,
            levels=self.held_.levels,
            unit=self.samples_.spacing / 2 if scene is None else scene.grid.cell,
            device=self.device,
        )

    def _fit_one(self, name: str, train: Trainer) -> tuple[Predictor, tuple[Floats, Floats]]:
        samples, held = self.samples_, self.held_
        if name in _APART:  # judged by a model that never saw the discs
            power, scale = np.empty(len(held.rows)), np.empty(len(held.rows))
            for number, targets in enumerate(held.targets):
                cases = held.round == number
                rest = self._make(name, samples.take(targets))
                rest.train(train)
                power[cases], scale[cases] = rest.predict(
                    samples.xy[held.rows[cases]], samples.freq_mhz[held.rows[cases]]
                )
            found = (power, scale)
            predictor = self._make(name, samples)
            predictor.train(train)
            return predictor, found
        power, scale = np.empty(len(held.rows)), np.empty(len(held.rows))
        if name in predictors.BASELINES:  # nothing is trained
            predictor = self._make(name, samples)
            return predictor, predictor.left_out(held.rows, held.radius)
        for number, targets in enumerate(held.targets):
            predictor = self._make(name, samples, targets, len(held.targets) > 1)
            predictor.train(train)
            cases = held.round == number
            power[cases], scale[cases] = predictor.left_out(held.rows[cases], held.radius[cases])
        if len(held.targets) > 1:
            predictor = self._make(name, samples)
            predictor.train(train)
        return predictor, (power, scale)

    # Predicting

    def predict(
        self, where: ArrayLike | Grid, freq_mhz: float | Sequence[float] | None = None, interval: float | None = None
    ) -> Any:
        """Received power in dBm.

        Args:
            where: a grid, or positions (n, 2); or (n, 3), positions each with its frequency.
            freq_mhz: one or several; default: the measured bands.
            interval: level of the error bars, 0.9 for example.

        Returns:
            For a grid, a ``RadioMap``. For positions (F, n) powers, without the first axis where one frequency is given;
            with ``interval`` the tuple (power, low, high). For (n, 3) always (n).

        Raises:
            NotFittedError: before ``fit``.
            UserError: a shape is another, or a band was not measured, and the model cannot answer for other frequencies.
        """
        check_is_fitted(self, "fitted_")
        if not isinstance(where, Grid) and np.ndim(where) == 2 and np.shape(where)[1] == 3 and freq_mhz is None:
            xy, freq = _rows(where)
            self.frequencies(tuple(np.unique(freq)))
            found = np.empty((1 if interval is None else 3, len(xy)))
            for f in np.unique(freq):
                rows = freq == f
                found[:, rows] = [v[0] for v in self._at(xy[rows], (float(f),), interval).values()]
            return found[0] if interval is None else tuple(found)
        freqs = self.frequencies(freq_mhz)
        if isinstance(where, Grid):
            return RadioMap.collect(self.layout(where, freqs, interval), self.tiles(where, freqs, interval))
        xy = np.asarray(where, dtype=np.float64)
        if xy.ndim != 2 or xy.shape[1] != 2:
            raise UserError(f"positions have shape {xy.shape}, expected (n, 2), or (n, 3) with frequencies")
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
            found = self.at_centers(centers, freqs, interval)
            shape = (len(freqs), rows.stop - rows.start, grid.width)
            yield rows, {name: values.reshape(shape) for name, values in found.items()}

    def at_centers(self, xy: Floats, freq_mhz: Sequence[float], interval: float | None) -> dict[str, Floats]:
        """Layer -> (F, n) values at the centers of cells (n, 2), NaN in buildings."""
        free = np.ones(len(xy), dtype=bool) if self.scene_ is None else ~self.scene_.built_at(xy)
        layers = {}
        for name, values in self._at(xy[free], freq_mhz, interval).items():
            layers[name] = np.full((len(freq_mhz), len(xy)), np.nan)
            layers[name][:, free] = values
        return layers

    def layout(self, grid: Grid, freq_mhz: float | Sequence[float] | None, interval: float | None) -> MapLayout:
        """What is known of the map of a grid before it is computed, with the scene's buildings."""
        building = None if self.scene_ is None else self.scene_.building_on(grid)
        return MapLayout(grid, self.frequencies(freq_mhz), interval, self.samples_.crs, building)

    def frequencies(self, freq_mhz: float | Sequence[float] | None) -> tuple[float, ...]:
        """The frequencies that are asked for, or the measured bands.

        Raises:
            UserError: one of them was not measured, and the model cannot answer for it.
        """
        check_is_fitted(self, "fitted_")
        bands = self.samples_.bands
        asked = bands if freq_mhz is None else tuple(float(f) for f in np.atleast_1d(np.asarray(freq_mhz)))
        freqs = tuple(min(bands, key=lambda b: abs(b - f)) if _measured(f, bands) else f for f in asked)
        for f in freqs:
            check_frequency(f)
            if f not in bands and not all(model.any_frequency for model in self.fitted_.values()):
                known = ", ".join(f"{band:g}" for band in bands)
                raise UserError(
                    f"no measurement at {f:g} MHz; there are {known}. For other frequencies fit"
                    " method='radiogatx' with head='spectral' (--method radiogatx --network.head spectral)"
                )
        return freqs

    def _estimate(self, xy: Floats, freq_mhz: Floats) -> tuple[Floats, Floats]:
        """Powers and scales (n) at positions (n, 2), each at its own frequency."""
        found = {name: model.predict(xy, freq_mhz) for name, model in self.fitted_.items()}
        distance = self._tree.query(xy)[0] if len(xy) else np.empty(0)
        if self.chosen_ == "stack":
            assert self.weights_ is not None
            power = self.weights_.combine(np.stack([found[name][0] for name in self.parts_], axis=1), distance)
        else:
            power = found[self.chosen_][0]
        return power, self.spread_(self._features(found, distance))

    @property
    def _tree(self) -> cKDTree:
        if getattr(self, "_tree_of", None) is not self.samples_:
            self._tree_of, self._tree_found = self.samples_, cKDTree(self.samples_.xy)
        return self._tree_found

    def _at(self, xy: Floats, freqs: Sequence[float], interval: float | None) -> dict[str, Floats]:
        layers: dict[str, list[Floats]] = {"rss_dbm": [], "rss_lo": [], "rss_hi": []}
        for f in freqs:
            power, scale = self._estimate(xy, np.full(len(xy), f))
            layers["rss_dbm"].append(power)
            if interval is not None:
                group = self.samples_.bands.index(f) if f in self.samples_.bands else None
                low, high = self.conformal_.interval(power, scale, interval, group)
                layers["rss_lo"].append(low)
                layers["rss_hi"].append(high)
        return {name: np.stack(values) for name, values in layers.items() if values}

    def score(self, X: RadioSamples | ArrayLike, y: ArrayLike | None = None) -> float:
        """R squared on other measurements, or on rows (n, 3) and their powers."""
        if isinstance(X, RadioSamples):
            return self.score(np.column_stack([X.xy, X.freq_mhz]), X.rss_dbm)
        truth = np.asarray(y, dtype=np.float64)
        residual = ((truth - self.predict(X)) ** 2).sum()
        return float(1 - residual / ((truth - truth.mean()) ** 2).sum())

    # Judging the error bars

    def coverage(self, samples: RadioSamples, levels: ArrayLike) -> Floats:
        """Share of other measurements inside the intervals of each level, in the bands that were fitted.

        Only measurements that ``fit`` has not seen are a test.
        """
        power, scale = self._estimate(samples.xy, samples.freq_mhz)
        bands = np.searchsorted(self.samples_.bands, samples.freq_mhz)
        return self.conformal_.coverage(np.abs(samples.rss_dbm - power) / scale, bands, levels)

    def cross_coverage(self, levels: ArrayLike, folds: int = 5) -> Floats:
        """(folds, levels) shares of some places' held-out cases inside intervals that the other places calibrated.

        The mean over the folds is close to the level by construction; how far they lie apart says how much the
        calibration depends on which places were held out.
        """
        c = self.calibration_
        scores, band = np.abs(c["truth"] - c["power"]) / c["scale"], c["band"].astype(np.int64)
        places = np.unique(c["disc"])
        order = np.random.default_rng(self.seed).permutation(len(places)) % min(folds, len(places))
        fold = order[np.searchsorted(places, c["disc"])]
        shares = []
        for number in range(min(folds, len(places))):
            out = fold == number
            if out.all():
                break
            shares.append(self._conformal(~out).coverage(scores[out], band[out], levels, c["weight"][out]))
        return np.array(shares).reshape(-1, len(np.atleast_1d(levels)))

    # Files

    def save(self, path: str | Path) -> None:
        """One safetensors file with everything that predicting needs: measurements, scene, weights, calibration."""
        s, scene = self.samples_, self.scene_
        tensors: dict[str, NDArray[Any]] = {"xy": s.xy, "freq_mhz": s.freq_mhz, "rss_dbm": s.rss_dbm}
        tensors |= {f"calibration.{name}": values for name, values in self.calibration_.items()}
        tensors |= {f"heldout.{name}": np.asarray(getattr(self.held_, name)) for name in _HELD}
        tensors |= {f"spread.{f.name}": np.asarray(getattr(self.spread_, f.name)) for f in dataclasses.fields(Spread)}
        tensors["knots"] = self.knots_
        if self.weights_ is not None:
            tensors |= {"weights.near": self.weights_.near, "weights.far": self.weights_.far}
        about: dict[str, Any] = {"crs": s.crs, "chosen": self.chosen_, "heldout": self.heldout_, "scene": None}
        about |= {"parts": self.parts_, "beyond": self.held_.beyond}
        if scene is not None:
            about["scene"] = {"grid": plain(scene.grid), "crs": scene.crs}
            if scene.building is not None:
                tensors["building"] = scene.building.astype(np.uint8)
            if scene.transmitters is not None:
                tensors["transmitters"] = scene.transmitters
        about["settings"] = {name: plain(value) for name, value in self.get_params(deep=False).items()}
        state = {f"part.{name}.{k}": v for name, model in self.fitted_.items() for k, v in model.state().items()}
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
        array = {k: v.numpy() for k, v in found.tensors.items() if not k.startswith("part.")}
        settings = {
            k: from_plain(_KINDS[k], v) if k in _KINDS and v is not None else v for k, v in about["settings"].items()
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
        held: dict[str, Any] = {name: array[f"heldout.{name}"] for name in _HELD}
        held["levels"] = tuple(held["levels"].tolist())
        self.held_ = HeldOut(**held, beyond=float(about["beyond"]))
        spread: dict[str, Any] = {f.name: array[f"spread.{f.name}"] for f in dataclasses.fields(Spread)}
        self.spread_ = Spread(**spread | {"level": float(spread["level"].item())})
        self.knots_, self.parts_ = array["knots"], list(about["parts"])
        self.weights_ = Weights(array["weights.near"], array["weights.far"], self.knots_) if self.parts_ else None
        self.conformal_ = self._conformal()
        self.fitted_ = {}
        for name in self._used():
            model = self.fitted_[name] = self._make(name, self.samples_, self._final())
            start = f"part.{name}."
            model.restore(path, {k.removeprefix(start): v for k, v in found.tensors.items() if k.startswith(start)})
        return self


def _measured(freq_mhz: float, bands: Sequence[float]) -> bool:
    """Whether this is one of the bands, up to rounding: a millionth."""
    return any(abs(freq_mhz - band) <= 1e-6 * band for band in bands)


def _rows(X: Any) -> tuple[Floats, Floats]:
    """Positions and frequencies of rows x, y, freq_mhz.

    Raises:
        UserError: another shape, or a data frame without these columns.
    """
    if hasattr(X, "columns"):
        missing = [name for name in ("x", "y", "freq_mhz") if name not in X.columns]
        if missing:
            raise UserError(f"X has no column {', '.join(missing)}; expected x, y, freq_mhz")
        X = X[["x", "y", "freq_mhz"]]
    if np.ndim(X) != 2 and not issparse(X):
        raise UserError(f"X has shape {np.shape(X)}, expected (n, 3): x, y, frequency in MHz")
    try:
        rows = check_array(X, dtype=np.float64, ensure_min_features=3)
    except ValueError as error:
        raise UserError(f"X, expected (n, 3), x, y, frequency in MHz: {error}") from error
    if rows.shape[1] != 3:
        raise UserError(f"X has shape {rows.shape}, expected (n, 3): x, y, frequency in MHz")
    return rows[:, :2], rows[:, 2]


def describe(estimator: RadioMapEstimator) -> str:
    """What was fitted, in a few lines."""
    held = ", ".join(f"{NAMES.get(name, name)} {value:.2f} dB" for name, value in estimator.heldout_.items())
    s = estimator.samples_
    lines = [
        f"{len(s)} measurements at {', '.join(f'{f:g}' for f in s.bands)} MHz",
        f"judged on {estimator.held_.said()}",
        f"RMSE, as of the map: {held}",
        f"chosen: {NAMES.get(estimator.chosen_, estimator.chosen_)}"
        + (f" (it is better here than {estimator.method})" if estimator.chosen_ != estimator.method else ""),
    ]
    if estimator.chosen_ == "stack" and estimator.weights_ is not None:
        ends = zip(estimator.parts_, estimator.weights_.near, estimator.weights_.far, strict=True)
        shares = ", ".join(f"{NAMES.get(name, name)} {near:.0%} to {far:.0%}" for name, near, far in ends)
        lines.append(f"its parts, beside the measurements to farthest from them: {shares}")
    return "\n".join(lines) + "\n"
