"""How good each method is: on complete maps by the authors' protocol, and on anybody's measurements by cross-validation."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from radiogat.config import GraphConfig, RadioGATConfig, RadioGATxConfig, TreesConfig
from radiogat.conformal import spatial_blocks
from radiogat.estimator import RadioMapEstimator
from radiogat.graph import Window, blocks
from radiogat.heldout import map_distances, place_groups, strata_weights
from radiogat.metrics import block_rmse, coverage, interval_score, mae, rmse
from radiogat.predictors import BASELINES, Trainer
from radiogat.samples import RadioMaps, RadioSamples, RadioScene
from radiogat.tasks import BlockTask, run_task
from tenfold import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Row = dict[str, float]
NEURAL = ("radiogat", "radiogat-2025")


def protocol_split(count: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and test blocks: all shuffled by NumPy's legacy generator, the first half trains (the authors' code)."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return order[: count // 2], order[count // 2 :]


def protocol_mask(
    maps: RadioMaps, windows: Sequence[Window], order: Iterable[int], rate: float, seed: int = 0
) -> Bools:
    """(F, H, W) measured cells: in each block and band N - int(N (1 - rate)) of its N free cells.

    The generator starts from the seed again and goes through the blocks in shuffled order, the bands inside. Which cells a
    draw takes is our choice, since it depends on a call of the authors' code of which only the counts are known.
    """
    generator = np.random.RandomState(seed)
    observed = np.zeros(maps.rss_dbm.shape, dtype=bool)
    for number in order:
        window = windows[number]
        for f in range(len(maps.freq_mhz)):
            cells = np.flatnonzero(np.isfinite(maps.rss_dbm[f][window]))
            kept = len(cells) - int(len(cells) * (1 - rate))
            part = observed[f][window]
            part[np.unravel_index(generator.permutation(cells)[:kept], part.shape)] = True
    return observed


def crop(maps: RadioMaps, side: int = 40) -> RadioMaps:
    """The area without the rows and columns at its end that fill no block."""
    height, width = (n // side * side for n in maps.rss_dbm.shape[1:])
    if not height or not width:
        raise UserError(f"{maps.name}: {maps.rss_dbm.shape[1]} x {maps.rss_dbm.shape[2]} cells hold no block of {side}")
    inside = (maps.transmitters < np.array([height, width])).all(axis=1)
    assert maps.building is not None
    building = maps.building[:height, :width]
    return dataclasses.replace(
        maps, rss_dbm=maps.rss_dbm[:, :height, :width], transmitters=maps.transmitters[inside], building=building
    )


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One area, task, rate and seed of the authors' protocol.

    Args:
        maps: the complete maps, cropped.
        task: S, M, U or D.
        rate: share that is measured.
        seed: seed of split, masks and networks.
        target: number of the band that is predicted.
    """

    maps: RadioMaps
    task: str
    rate: float
    seed: int
    target: int

    def __post_init__(self) -> None:
        windows = blocks(self.maps.rss_dbm.shape[1:], 40)
        train, test = protocol_split(len(windows), self.seed)
        observed = protocol_mask(self.maps, windows, [*train, *test], self.rate, self.seed)
        in_test = np.zeros(self.maps.rss_dbm.shape[1:], dtype=bool)
        label = np.zeros(in_test.shape, dtype=np.int64)
        for number in test:
            in_test[windows[number]] = True
            label[windows[number]] = number
        others = [f for f in range(len(observed)) if f != self.target]
        source = 0 if self.target != 0 else len(observed) - 1
        if self.task == "S":
            observed[others] = False
        elif self.task == "U":  # a target band without a measurement in the test blocks
            observed[self.target][in_test] = False
            observed[[f for f in others if f != source]] = False
        elif self.task == "D":
            observed[source] = np.isfinite(self.maps.rss_dbm[source])
            observed[[f for f in others if f != source]] = False
        free = np.isfinite(self.maps.rss_dbm[self.target]) & in_test & ~observed[self.target]
        for name, value in (("observed", observed), ("where", free), ("label", label), ("source", source)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "windows", ([windows[i] for i in train], [windows[i] for i in test]))

    observed: Bools = dataclasses.field(init=False)
    where: Bools = dataclasses.field(init=False)
    label: NDArray[np.int64] = dataclasses.field(init=False)
    source: int = dataclasses.field(init=False)
    windows: tuple[list[Window], list[Window]] = dataclasses.field(init=False)

    def measure(
        self, arm: str, network: RadioGATxConfig, gat: RadioGATConfig, level: float, device: str = "cpu"
    ) -> tuple[Row, Floats]:
        """Metrics of a method at the unmeasured free cells of the test blocks, and the map (H, W) that it predicts there."""
        truth = self.maps.rss_dbm[self.target][self.where]
        if arm in NEURAL:
            predicted, bounds = self._gat(arm, gat, device), None
        else:
            predicted, bounds = self._estimate(arm, network, level, device)
        row = {"rmse": rmse(truth, predicted), "block_rmse": block_rmse(truth, predicted, self.label[self.where])}
        row["mae"] = mae(truth, predicted)
        if bounds is not None:
            row["coverage"] = coverage(truth, *bounds)
            row["width"] = float(np.mean(bounds[1] - bounds[0]))
        shown = np.full(self.where.shape, np.nan)
        shown[self.where] = predicted
        return row, shown

    def _estimate(
        self, arm: str, network: RadioGATxConfig, level: float, device: str
    ) -> tuple[Floats, tuple[Floats, Floats]]:
        samples = self.maps.samples(self.observed)
        network = dataclasses.replace(network, seed=self.seed, depth=network.depth and not arm.endswith("-nodepth"))
        estimator = RadioMapEstimator(
            arm.removesuffix("-nodepth"), network, fallback=False, seed=self.seed, device=device
        ).fit(samples, self.maps.scene)
        where = self.maps.scene.grid.centers()[self.where.ravel()]
        power, low, high = estimator.predict(where, self.maps.freq_mhz[self.target], level)
        return power, (low, high)

    def _gat(self, arm: str, gat: RadioGATConfig, device: str) -> Floats:
        """The faithful network; ``radiogat-2025`` with what the released code does."""
        official = arm == "radiogat-2025"
        graph = GraphConfig(gate="signed", compat="2025") if official else GraphConfig()
        into = self.target if self.task in {"S", "M"} else self.source
        labels = ("observed" if official else "heldout") if into == self.target else "full"
        gat = dataclasses.replace(gat, seed=self.seed, labels=labels, observed_flag=not official)  # type: ignore[arg-type]
        depth = self.maps.scene.depth
        assert depth is not None
        assert self.maps.building is not None
        train, test = self.windows
        pair = [(into, self.target)]
        known = (self.maps.building, depth, self.maps.rss_dbm, self.observed, self.maps.freq_mhz)
        task = BlockTask(*known, pair, train, gat, graph)
        task.network.to(device)
        run_task(task)
        out = np.full(self.where.shape, np.nan)
        for window in test:
            if not self.maps.building[window].all():
                out[window] = task.predict(window, pair[0])
        return np.asarray(out[self.where])


def cross_validate(
    samples: RadioSamples,
    scene: RadioScene | None,
    arms: Sequence[str],
    *,
    folds: int = 5,
    side: float | None = None,
    network: RadioGATxConfig | None = None,
    trees: TreesConfig | None = None,
    level: float = 0.9,
    seed: int = 0,
    track: Callable[[list[Any]], Iterable[Any]] = lambda cases: cases,
) -> tuple[dict[str, Row], float]:
    """RMSE, MAE, coverage, mean width and interval score of each method on places that are held out in turn.

    Args:
        samples: the measurements.
        scene: buildings and masts, or None.
        arms: methods, of ``radiogat.config.METHODS``.
        folds: number of parts.
        side: side of the squares that are held out together; None holds out places, with what lies about as near as the map
            is read, and weights them such that their distances to the measurements are the map's.
        network: settings of radiogatx.
        trees: settings of the trees.
        level: level of the error bars.
        seed: seed of the folds.
        track: shows progress over the pairs of a part and a method.

    Returns:
        Method -> metric -> value in dB, the coverage as a share; and the share of the map that lies farther from any
        measurement than every held-out place did (0 for squares).

    Raises:
        UserError: fewer squares or places than folds.
    """
    from sklearn.model_selection import GroupKFold

    asked = map_distances(samples, scene)
    groups = place_groups(samples.xy, asked) if side is None else spatial_blocks(samples.xy, side)
    if len(np.unique(groups)) < folds:
        what = "places" if side is None else f"squares of {side:g}"
        raise UserError(f"{len(np.unique(groups))} {what} do not make {folds} folds: lower block or folds")
    shuffled = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups]
    parts = list(GroupKFold(folds).split(samples.xy, groups=shuffled))
    found: dict[str, list[Floats]] = {arm: [] for arm in arms}
    truth: list[Floats] = []
    distance: list[Floats] = []
    for (train, test), arm in track([(part, arm) for part in parts for arm in arms]):
        estimator = RadioMapEstimator(arm, network, trees=trees, fallback=False, seed=seed)
        held = samples.take(test)
        estimator.fit(samples.take(train), scene, where=held.xy)
        values = np.empty((3, len(held)))
        for f in held.bands:
            rows = held.freq_mhz == f
            values[:, rows] = estimator.predict(held.xy[rows], f, level)
        found[arm].append(values)
        if arm == arms[0]:
            truth.append(held.rss_dbm)
            distance.append(cKDTree(samples.xy[train]).query(held.xy)[0])
    y, d = np.concatenate(truth), np.concatenate(distance)
    weight, beyond = strata_weights(d, asked) if side is None else (np.full(len(y), 1 / len(y)), 0.0)
    table = {}
    for arm, parts_of in found.items():
        power, low, high = np.concatenate(parts_of, axis=1)
        table[arm] = {
            "rmse": float(np.sqrt((weight * (y - power) ** 2).sum())),
            "mae": float((weight * np.abs(y - power)).sum()),
            "coverage": float((weight * ((y >= low) & (y <= high))).sum()),
            "width": float((weight * (high - low)).sum()),
            "interval_score": interval_score(y, low, high, level, weight),
        }
    return table, beyond


def split_errors(
    samples: RadioSamples,
    scene: RadioScene | None,
    arm: str,
    share: float,
    seed: int,
    network: RadioGATxConfig | None = None,
    train: Trainer = run_task,
    trees: TreesConfig | None = None,
) -> Row:
    """RMSE and MAE in dB of a method on a random share of the places, predicted from the others, weighted as the map.

    Args:
        samples: the measurements.
        scene: buildings and masts, or None.
        arm: method, of ``radiogat.config.METHODS``.
        share: share of the places that is held out, each with what lies about as near as the map is read.
        seed: seed of the split and of the network.
        network: settings of radiogatx.
        train: runs the task of a network.
        trees: settings of the trees.
    """
    asked = map_distances(samples, scene)
    groups = place_groups(samples.xy, asked)
    count = int(groups.max()) + 1
    if count < 2:
        raise UserError("all measurements are at one place: nothing can be held out")
    order = np.random.default_rng([seed, 1]).permutation(count)
    out = np.isin(groups, order[: min(count - 1, max(1, round(share * count)))])
    held, rest = samples.take(out), samples.take(~out)
    estimator: Any
    if arm in BASELINES:
        estimator = BASELINES[arm]().fit(rest, scene)
    else:
        chosen = dataclasses.replace(network or RadioGATxConfig(), seed=seed)
        estimator = RadioMapEstimator(arm, chosen, trees=trees, fallback=False, seed=seed)
        estimator.fit(rest, scene, train, held.xy)
    power = np.empty(len(held))
    for f in held.bands:
        rows = held.freq_mhz == f
        power[rows] = estimator.predict(held.xy[rows], f)
    weight, _ = strata_weights(cKDTree(rest.xy).query(held.xy)[0], asked)
    error = held.rss_dbm - power
    return {"rmse": float(np.sqrt((weight * error**2).sum())), "mae": float((weight * np.abs(error)).sum())}
