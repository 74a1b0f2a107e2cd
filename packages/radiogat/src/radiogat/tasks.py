"""What a network is trained on, step by step: a task knows its network, its optimizer and the loss of each step.

The loss of a step is a function of the step's number alone, so any loop can run a task (``run_task`` here, Lightning in
``training``) and a run that was cut off goes on to the same weights.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor, nn

from radiogat.baselines import nearest
from radiogat.config import GraphConfig, RadioGATConfig, RadioGATxConfig
from radiogat.graph import Adjacency, RadioGraph, Window, build_graph
from radiogat.heldout import beyond
from radiogat.networks import POWER_SCALE, Neighborhoods, RadioGAT, RadioGATx, node_features
from radiogat.samples import RadioSamples, RadioScene
from tenfold import NonFiniteError, UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
_KEPT = 1 << 24
"""Numbers of edge features that are computed once and kept (64 MB); with more, each batch computes its own."""
DEGREES_OF_FREEDOM = 4.0
"""Of the Student t that the scale of the errors is trained under: errors of radio maps are heavy-tailed."""


class Task(Protocol):
    """Something to be trained."""

    steps: int

    @property
    def network(self) -> nn.Module:
        """What is trained."""
        ...

    def loss(self, step: int) -> Tensor:
        """The loss of one step."""
        ...

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer over the network."""
        ...

    def rate_factor(self, step: int) -> float:
        """The learning rate of a step over that of the start."""
        ...


def run_task(task: Task, track: Callable[[range], Iterable[int]] = lambda steps: steps) -> None:
    """Train in a plain loop; the network ends in evaluation mode.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the message gives the step.
    """
    optimizer = task.optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, task.rate_factor)
    task.network.train()
    for step in track(range(task.steps)):
        loss = task.loss(step)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"{type(task.network).__name__}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    task.network.eval()


def student_nll(error: Tensor, scale: Tensor) -> Tensor:
    """Mean negative log-likelihood of errors under Student's t with 4 degrees of freedom, up to a constant."""
    nu = DEGREES_OF_FREEDOM
    return (scale.log() + (nu + 1) / 2 * torch.log1p(error.square() / (nu * scale.square()))).mean()


class NeighborTask:
    """RadioGATx on measurements: each is predicted from the others.

    Squared error for the power, and Student's t likelihood of the error's scale, which does not reach the power's weights.

    Args:
        samples: the measurements; all are donors.
        scene: buildings and masts, or None.
        config: network and training.
        targets: (S) mask of the measurements that are predicted in training; default: all.
        unit: length that counts as a cell; default: the scene's cell, or half of the samples' spacing.
        levels: radii; each target is predicted once for each, without what lies within. 0 leaves out its place.
    """

    def __init__(
        self,
        samples: RadioSamples,
        scene: RadioScene | None,
        config: RadioGATxConfig,
        targets: Bools | None = None,
        unit: float | None = None,
        levels: Sequence[float] = (0.0,),
    ) -> None:
        self.config = config
        self.steps = config.steps
        self.samples = samples
        if len(samples) < 2:
            raise UserError("one measurement alone cannot be learned from: measure more places")
        unit = unit or (samples.spacing / 2 if scene is None else scene.grid.cell)
        self.hoods = Neighborhoods(samples.xy, samples.freq_mhz, samples.rss_dbm, scene, unit, config)
        self.tree = cKDTree(samples.xy)
        rows = np.flatnonzero(np.ones(len(samples), bool) if targets is None else targets)
        self.targets, radius = self._cases(rows, levels)
        self.neighbors = min(config.neighbors, self._left(self.targets, radius))
        if self.neighbors < 1:
            raise UserError("too few places were measured: a measurement has no neighbor at another place")
        self._distance, self._index = self.donors(self.targets, radius)
        self._features: tuple[Tensor, ...] | None = None
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(config.seed)
        shown = self._batch(np.arange(len(self.targets))[:: max(1, len(self.targets) // 4096)])
        self.network = RadioGATx(shown[0].shape[2], shown[1].shape[1], config)
        torch.random.set_rng_state(torch_state)
        truth = samples.rss_dbm[self.targets] - 20 * np.log10(self.hoods.reference_mhz / samples.freq_mhz[self.targets])
        limit = float(np.max(np.abs(truth - self.hoods.values()[self._index].mean(axis=1)), initial=1.0))
        self.network.standardize(shown[0], shown[1], limit)
        if len(self.targets) * shown[0][0].numel() <= _KEPT:
            self._features = self._batch(np.arange(len(self.targets)))

    def _left(self, rows: NDArray[np.int64], radius: Floats) -> int:
        """Measurements that lie farther than the radius, of the case that has the fewest."""
        inside = self.tree.query_ball_point(self.samples.xy[rows], radius, return_length=True)
        return len(self.samples) - int(np.max(inside, initial=0))

    def _cases(self, rows: NDArray[np.int64], levels: Sequence[float]) -> tuple[NDArray[np.int64], Floats]:
        """Targets and radii, without those whose radius leaves too little."""
        radius = np.repeat(np.asarray(levels, dtype=np.float64), len(rows))
        cases = np.tile(rows, len(levels))
        if len(levels) == 1:
            return cases, radius
        inside = self.tree.query_ball_point(self.samples.xy[cases], radius, return_length=True)
        keep = (radius == radius.min()) | (len(self.samples) - inside >= max(2, len(self.samples) // 3))
        return cases[keep], radius[keep]

    def donors(self, rows: NDArray[np.int64], radius: Floats | None = None) -> tuple[Floats, NDArray[np.int64]]:
        """Distances and indices (n, K) of the nearest measurements outside of a radius (n), by default at other places."""
        radius = np.zeros(len(rows)) if radius is None else radius
        return beyond(self.tree, self.samples.xy[rows], self.neighbors, radius)

    def _batch(self, chosen: NDArray[np.int64]) -> tuple[Tensor, ...]:
        if self._features is not None:
            at_once = torch.from_numpy(chosen)
            return tuple(each[at_once] for each in self._features)
        rows = self.targets[chosen]
        at = self.samples.xy[rows], self.samples.freq_mhz[rows]
        return self.hoods.features(*at, self._distance[chosen], self._index[chosen])

    def loss(self, step: int) -> Tensor:
        """Of ``config.batch_size`` targets that are drawn from (seed, step)."""
        rng = np.random.default_rng([self.config.seed, step])
        chosen = rng.integers(len(self.targets), size=self.config.batch_size)
        device = next(self.network.parameters()).device
        power, scale = self.network(*(each.to(device) for each in self._batch(chosen)))
        truth = torch.from_numpy(self.samples.rss_dbm[self.targets[chosen]]).to(power)
        error = power - truth
        return error.square().mean() + student_nll(error.detach(), scale)

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay)

    def rate_factor(self, step: int) -> float:
        """Half a cosine, down to 1e-5."""
        least = min(1.0, 1e-5 / self.config.lr)
        return least + (1 - least) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2

    @torch.no_grad()
    def predict(
        self, xy: Floats, freq_mhz: Floats, donors: tuple[Floats, NDArray[np.int64]] | None = None
    ) -> tuple[Floats, Floats]:
        """Powers in dBm and scales of their errors in dB (Q), from the nearest measurements or from given donors."""
        power, scale = np.empty(len(xy)), np.empty(len(xy))
        device = next(self.network.parameters()).device
        self.network.eval()
        for start in range(0, len(xy), 16384):
            part = slice(start, start + 16384)
            near = (
                nearest(self.tree, xy[part], self.neighbors) if donors is None else (donors[0][part], donors[1][part])
            )
            features = self.hoods.features(xy[part], freq_mhz[part], *near)
            found = self.network(*(each.to(device) for each in features))
            power[part], scale[part] = (each.cpu().double().numpy() for each in found)
        return power, scale


class HeldoutLabelSampler:
    """Splits observed nodes for one step: a part, drawn between 30 and 70 %, becomes targets that the input must not hold.

    Args:
        observed: (N) bool, or any shape.
        seed: seed that with the step decides the draw.
    """

    def __init__(self, observed: Bools, seed: int = 0) -> None:
        self.observed = np.asarray(observed, dtype=bool)
        self.seed = seed

    def draw(self, step: int) -> tuple[Bools, Bools]:
        """(visible, targets): disjoint, and together what was observed."""
        rng = np.random.default_rng([self.seed, step])
        share = rng.uniform(0.3, 0.7)
        targets = self.observed & (rng.random(self.observed.shape) < share)
        return self.observed & ~targets, targets


@dataclasses.dataclass
class BlockTask:
    """RadioGAT on the blocks of an area.

    Args:
        building: (H, W).
        depth: (T, H, W).
        rss_dbm: (F, H, W), NaN where not known.
        observed: (F, H, W) cells whose power may be seen.
        freq_mhz: (F).
        pairs: (input band, output band) numbers, trained in turn.
        windows: the training blocks.
        config: network and training.
        graph: rule of the edges.
    """

    building: Bools
    depth: Floats
    rss_dbm: Floats
    observed: Bools
    freq_mhz: Sequence[float]
    pairs: Sequence[tuple[int, int]]
    windows: Sequence[Window]
    config: RadioGATConfig
    graph: GraphConfig = dataclasses.field(default_factory=GraphConfig)

    def __post_init__(self) -> None:
        state = torch.random.get_rng_state()
        torch.manual_seed(self.config.seed)
        self.network = RadioGAT(self.config)
        torch.random.set_rng_state(state)
        self.windows = [w for w in self.windows if not self.building[w].all() and self.observed[:, *w].any()]
        if not self.windows:
            raise UserError("no training block holds a measurement")
        self.steps = self.config.steps or self.config.epochs * len(self.windows)
        self._adjacencies: dict[tuple[int, float], Adjacency] = {}
        self._graphs: dict[int, RadioGraph] = {}

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.conv1.weight.device

    @cached_property
    def reference(self) -> float:
        """Geometric mean of the bands in MHz."""
        return float(np.exp(np.mean(np.log(self.freq_mhz))))

    def block_graph(self, window: Window) -> RadioGraph:
        """The graph of one block; with ``compat`` its depth is that of the map's top left corner."""
        depth = self.depth[:, *window]
        if self.graph.compat == "2025":
            depth = self.depth[:, : depth.shape[1], : depth.shape[2]]
        return build_graph(self.building[window], depth, self.graph)

    def _adjacency(self, number: int, band: int) -> Adjacency:
        key = number, self.freq_mhz[band]
        if key not in self._adjacencies:
            if number not in self._graphs:
                self._graphs[number] = self.block_graph(self.windows[number])
            self._adjacencies[key] = self._graphs[number].adjacency(self.freq_mhz[band]).to(self.device)
        return self._adjacencies[key]

    def forward(
        self, window: Window, visible: Bools, pair: tuple[int, int], adjacencies: Sequence[Adjacency]
    ) -> Tensor:
        """dBm (N) of a block's nodes."""
        into, to = pair
        x = node_features(
            ~self.building[window],
            visible,
            np.nan_to_num(self.rss_dbm[into][window]),
            self.freq_mhz[into],
            self.freq_mhz[to],
            origin=(window[0].start, window[1].start),
            whole=self.building.shape,
            flag=self.config.observed_flag,
        )
        out: Tensor = self.network(x.to(self.device), *adjacencies, math.log10(self.freq_mhz[to] / self.reference))
        return out

    def loss(self, step: int) -> Tensor:
        """Mean squared error, in units of 100 dB, of one block and one pair of bands."""
        number = step % len(self.windows)
        epoch = step // len(self.windows)
        into, to = pair = self.pairs[epoch % len(self.pairs)]
        window = self.windows[number]
        street = ~self.building[window]
        truth = self.rss_dbm[to][window][street]
        visible = self.observed[into][window]
        if self.config.labels == "full":
            targets = np.isfinite(truth)
        elif self.config.labels == "observed":
            targets = self.observed[to][window][street] & np.isfinite(truth)
        else:
            kept, drawn = HeldoutLabelSampler(self.observed[to][window], self.config.seed).draw(step)
            targets = drawn[street]
            visible = kept if into == to else visible & ~drawn
        with torch.random.fork_rng(devices=[]):  # dropout depends on the step alone
            torch.manual_seed(self.config.seed * 1_000_003 + step)
            power = self.forward(window, visible, pair, [self._adjacency(number, into), self._adjacency(number, to)])
        if not targets.any():
            return power.sum() * 0
        goal = torch.from_numpy(truth[targets]).to(power)
        return ((power[torch.from_numpy(targets)] - goal) / POWER_SCALE).square().mean()

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.network.parameters(), lr=self.config.lr)

    def rate_factor(self, step: int) -> float:
        """Constant, as in the authors' code."""
        return 1.0

    @torch.no_grad()
    def predict(self, window: Window, pair: tuple[int, int]) -> Floats:
        """(h, w) dBm of one block from what is observed there; NaN in buildings."""
        self.network.eval()
        graph = self.block_graph(window)
        near = [graph.adjacency(self.freq_mhz[band]).to(self.device) for band in pair]
        out = np.full(graph.street.shape, np.nan)
        out[graph.street] = self.forward(window, self.observed[pair[0]][window], pair, near).cpu().double().numpy()
        return out
