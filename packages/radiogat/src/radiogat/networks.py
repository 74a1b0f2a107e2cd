"""The two networks: RadioGAT over the cells of an area, and RadioGATx over the measurements around a place.

Legend: N nodes, Q queries, K neighbors, C channels, S samples, T transmitters.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from radiogat.attention import GraphAttention
from radiogat.config import GraphConfig, RadioGATConfig, RadioGATxConfig
from radiogat.graph import Adjacency, build_graph, check_frequency
from radiogat.samples import RadioScene
from radiogat.spectral import reference_frequency
from tenfold import UserError

POWER_SCALE = -100.0
"""dBm that stand for 1 in the network; the authors' code."""
FREQUENCY_SCALE = 5750.0
"""MHz that stand for 1; the authors' code."""

Floats = NDArray[np.float64]


class RadioGAT(nn.Module):
    """Three graph attention layers over the cells: the first on the input band's graph, the others on the output band's.

        x -> ReLU(L1(x; A_in)) -> dropout -> ReLU(L2(.; A_out)) -> dropout -> L3(.; A_out) -> power / -100 dBm

    Args:
        config: widths, dropout, backend, inputs and outputs.

    Shapes: ``x`` (N, 5) or, with ``observed_flag``, (N, 6), see ``node_features``; two ``Adjacency`` -> (N) dBm.
    Source: X. Li et al., IEEE Trans. Wireless Communications 23(11), 2024, as the authors' code has it (widths 80, 320, 1;
    LeakyReLU 0.01; dropout 0.5). The flag and the spectral output are ours; switch them off for the original.

    Example:
        >>> from radiogat import build_graph, radio_depth
        >>> building = [[0] * 5] * 4
        >>> graph = build_graph(building, radio_depth(building, [(0, 0)]))
        >>> network = RadioGAT(RadioGATConfig(observed_flag=False)).eval()
        >>> network(torch.randn(20, 5), graph.adjacency(1750.0), graph.adjacency(2600.0)).shape
        torch.Size([20])
    """

    def __init__(self, config: RadioGATConfig | None = None) -> None:
        super().__init__()
        self.config = config or RadioGATConfig()
        inputs = 6 if self.config.observed_flag else 5
        one, two = self.config.widths
        kind: dict[str, Any] = {"slope": self.config.slope, "backend": self.config.backend}
        self.conv1 = GraphAttention(inputs, one, **kind)
        self.conv2 = GraphAttention(one, two, **kind)
        self.conv3 = GraphAttention(two, 2 if self.config.spectral else 1, **kind)

    def forward(self, x: Tensor, into: Adjacency, out: Adjacency, log_frequency: float = 0.0) -> Tensor:
        """dBm (N); ``log_frequency`` is log10(f / f_0) of the output, for the spectral head."""
        x = F.dropout(F.relu(self.conv1(x, into)), self.config.dropout, self.training)
        x = F.dropout(F.relu(self.conv2(x, out)), self.config.dropout, self.training)
        x = self.conv3(x, out)
        level = x[:, 0] * POWER_SCALE
        return level + (x[:, 1] * 10 - 20) * log_frequency if self.config.spectral else level

    @classmethod
    def from_official(cls, state: Mapping[str, Tensor], config: RadioGATConfig | None = None) -> "RadioGAT":
        """The network with weights of the authors' code: ``conv1`` to ``conv3`` with ``weight_w``, ``weight_a``, ``bias``.

        Their unused ``conv4`` is ignored. Read the file with ``torch.load(path, weights_only=True)``.

        Raises:
            UserError: a name is missing or a shape is another one.
        """
        config = dataclasses.replace(config or RadioGATConfig(), observed_flag=False, spectral=False)
        network = cls(config)
        for name in ("conv1", "conv2", "conv3"):
            layer: GraphAttention = getattr(network, name)
            missing = [f"{name}.{part}" for part in ("weight_w", "weight_a", "bias") if f"{name}.{part}" not in state]
            if missing:
                raise UserError(f"not a checkpoint of the authors' code: no {', '.join(missing)}")
            weight, attention, bias = (state[f"{name}.{part}"] for part in ("weight_w", "weight_a", "bias"))
            width = layer.weight.shape[1]
            if weight.shape != layer.weight.shape or attention.numel() != 2 * width or bias.numel() != width:
                raise UserError(
                    f"{name}: weight_w {tuple(weight.shape)}, weight_a {tuple(attention.shape)}, bias {tuple(bias.shape)}"
                    f" do not fit a layer of {tuple(layer.weight.shape)}"
                )
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.target.copy_(attention.reshape(-1, 1)[:width])
                layer.source.copy_(attention.reshape(-1, 1)[width:])
                layer.bias.copy_(bias.reshape(-1))
        return network


def node_features(
    street: NDArray[np.bool_],
    observed: NDArray[np.bool_],
    rss_dbm: Floats,
    f_in: float,
    f_out: float,
    *,
    origin: tuple[int, int] = (0, 0),
    whole: tuple[int, int] | None = None,
    flag: bool = True,
) -> Tensor:
    """(N, 5 or 6) inputs of RadioGAT: row and column over the area's size, both frequencies / 5750, power / -100, flag.

    Args:
        street: (H, W) cells that are nodes.
        observed: (H, W) cells whose power may be seen.
        rss_dbm: (H, W) powers of the input band; only observed ones are read.
        f_in: MHz of these powers.
        f_out: MHz to predict.
        origin: row and column of this window in the area.
        whole: rows and columns of the area; default: the window is all of it.
        flag: add the sixth column, 1 where observed.
    """
    height, width = whole or street.shape
    cells = np.argwhere(street) + np.array(origin)
    seen = observed[street]
    power = np.where(seen, rss_dbm[street] / POWER_SCALE, 0.0)
    columns = [
        cells[:, 0] / height,
        cells[:, 1] / width,
        np.full(len(cells), check_frequency(f_in) / FREQUENCY_SCALE),
        np.full(len(cells), check_frequency(f_out) / FREQUENCY_SCALE),
        power,
    ]
    return torch.from_numpy(np.stack([*columns, *([seen] if flag else [])], axis=1).astype(np.float32))


@torch.no_grad()
def tiled_radiogat(
    network: RadioGAT,
    building: NDArray[np.bool_],
    depth: Floats,
    observed: NDArray[np.bool_],
    rss_dbm: Floats,
    f_in: float,
    f_out: float,
    graph: GraphConfig | None = None,
    *,
    tile: int = 256,
    halo: int | None = None,
    log_frequency: float = 0.0,
) -> Floats:
    """The network over a whole area by tiles, equal to one pass over the whole graph; memory is that of one tile.

    Each tile is computed with a margin that three layers can reach over, 3 R cells, and the margin is dropped.

    Args:
        network: network in evaluation mode.
        building: (H, W).
        depth: (T, H, W).
        observed: (H, W) cells whose power may be seen.
        rss_dbm: (H, W) powers of the input band.
        f_in: frequency in MHz of these powers.
        f_out: frequency in MHz to predict.
        graph: rule of the edges.
        tile: side of a tile in cells.
        halo: margin in cells; default: 3 R, rounded up.
        log_frequency: log10(f / f_0) of the output, for the spectral head.

    Returns:
        (H, W) dBm, NaN in buildings.
    """
    graph = graph or GraphConfig()
    margin = int(np.ceil(3 * graph.reach)) if halo is None else halo
    height, width = building.shape
    out = np.full((height, width), np.nan)
    dtype = network.conv1.weight.dtype
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            rows = slice(max(0, y - margin), min(height, y + tile + margin))
            columns = slice(max(0, x - margin), min(width, x + tile + margin))
            if building[y : y + tile, x : x + tile].all():
                continue
            part = build_graph(building[rows, columns], depth[:, rows, columns], graph)
            features = node_features(
                part.street,
                observed[rows, columns],
                rss_dbm[rows, columns],
                f_in,
                f_out,
                origin=(rows.start, columns.start),
                whole=(height, width),
                flag=network.config.observed_flag,
            )
            into, to = part.adjacency(f_in), part.adjacency(f_out)
            values = np.full(part.street.shape, np.nan)
            values[part.street] = network(features.to(dtype), into, to, log_frequency).double().numpy()
            inner = values[y - rows.start : y - rows.start + tile, x - columns.start : x - columns.start + tile]
            out[y : y + tile, x : x + tile] = inner
    return out


_STEEPEST = 40.0
"""dB per decade that a learned spectrum differs from free space at most."""


class RadioGATx(nn.Module):
    """Attention of a place over its nearest measurements of all bands, starting exactly at inverse distance weighting.

        h_j = MLP(edge_j),  alpha = softmax_j(w . h_j - 2 ln(d_j + 1/2)),  c = MLP(sum_j alpha_j h_j, node)
        direct:    P(p, f) = sum_j alpha_j (v_j + delta . h_j) + c - 20 log10(f / f_0)
        spectral:  P(p, f) = sum_j alpha_j (v_j + delta . h_j) + c_0 + (c_1 - 20) log10(f / f_0)

    The features are held within the range of the training queries, and what is learned within the largest difference between a
    training target and the mean of its neighbors, so that the correction is bounded where nothing like it was trained.

    v_j are the measurements with free space taken off, v_j = P_j + 20 log10(f_j / f_0); w, delta and c start at zero. The
    features see values only relative to their mean over the neighbors, so adding a constant to all measurements adds it to
    the prediction. A further output is the scale of the error, trained on the errors without touching the prediction.

    Args:
        edge_features: number of features per edge, see ``Neighborhoods.features``.
        node_features: number of features per place.
        config: width and head.

    Shapes: ``edge`` (Q, K, E), ``node`` (Q, V), ``log_distance`` (Q, K), ``values`` (Q, K), ``log_frequency`` (Q)
    -> powers (Q) in dBm, scales (Q) in dB.
    Source: ours; the idea of a classical interpolator corrected by attention over bounded neighborhoods is in arXiv
    2604.17414.

    Example:
        >>> values = torch.tensor([[-80.0, -90.0]])
        >>> network = RadioGATx(edge_features=5, node_features=3)
        >>> power, scale = network(torch.zeros(1, 2, 5), torch.zeros(1, 3), torch.zeros(1, 2), values, torch.zeros(1))
        >>> float(power.detach())  # before training, two places as near weigh the same
        -85.0
    """

    def __init__(self, edge_features: int, node_features: int, config: RadioGATxConfig | None = None) -> None:
        super().__init__()
        self.config = config or RadioGATxConfig()
        width = self.config.width
        self.register_buffer("edge_mean", torch.zeros(edge_features))
        self.register_buffer("edge_std", torch.ones(edge_features))
        self.register_buffer("node_mean", torch.zeros(node_features))
        self.register_buffer("node_std", torch.ones(node_features))
        self.register_buffer("edge_range", torch.tensor([[-torch.inf], [torch.inf]]).repeat(1, edge_features))
        self.register_buffer("node_range", torch.tensor([[-torch.inf], [torch.inf]]).repeat(1, node_features))
        self.register_buffer("limit", torch.tensor(torch.inf))
        self.edge = nn.Sequential(nn.Linear(edge_features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.attention = nn.Linear(width, 1, bias=False)
        self.delta = nn.Linear(width, 1)
        self.context = nn.Sequential(nn.Linear(width + node_features, width), nn.SiLU())
        self.correction = nn.Linear(width, 2 if self.config.head == "spectral" else 1)
        self.scale = nn.Sequential(nn.Linear(width + node_features + 2, width), nn.SiLU(), nn.Linear(width, 1))
        for layer in (self.attention, self.delta, self.correction, self.scale[2]):
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def standardize(self, edge: Tensor, node: Tensor, limit: float = math.inf) -> None:
        """Take means, deviations and ranges of the features from training queries.

        Args:
            edge: (Q, K, E) features.
            node: (Q, V) features.
            limit: dB that the correction of the weighted mean never exceeds.
        """
        self.get_buffer("limit").fill_(limit)
        for name, features in (("edge", edge.flatten(0, 1)), ("node", node)):
            std = features.std(dim=0, correction=0)
            self.get_buffer(f"{name}_mean").copy_(features.mean(dim=0))
            self.get_buffer(f"{name}_std").copy_(torch.where(std > 1e-6, std, 1.0))
            if len(features):
                self.get_buffer(f"{name}_range").copy_(torch.stack([features.amin(dim=0), features.amax(dim=0)]))

    def forward(
        self, edge: Tensor, node: Tensor, log_distance: Tensor, values: Tensor, log_frequency: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Powers and scales (Q)."""
        # outside of what it was trained on, the network sees the nearest that it was trained on
        edge, node = (x.clamp(*self.get_buffer(f"{n}_range")) for n, x in (("edge", edge), ("node", node)))
        edge = (edge - self.get_buffer("edge_mean")) / self.get_buffer("edge_std")
        node = (node - self.get_buffer("node_mean")) / self.get_buffer("node_std")
        h = self.edge(edge)
        alpha = (self.attention(h).squeeze(2) - 2 * log_distance).softmax(dim=1)
        gathered = torch.einsum("qk,qkc->qc", alpha, h)
        moved = 4 * self.delta(h).squeeze(2)
        correction = 4 * self.correction(self.context(torch.cat([gathered, node], dim=1)))
        slope = -20 * log_frequency
        if self.config.head == "spectral":
            slope = slope + correction[:, 1].clamp(-_STEEPEST, _STEEPEST) * log_frequency
        limit = self.get_buffer("limit")
        own = ((alpha * moved).sum(dim=1) + correction[:, 0]).clamp(-limit, limit)
        power = (alpha * values).sum(dim=1) + own + slope
        spread = (values - values.mean(dim=1, keepdim=True)).square().mean(dim=1).add(1e-2).log() / 2
        about = torch.cat([gathered, node, spread[:, None], log_distance[:, :1]], dim=1).detach()
        return power, (self.scale(about).squeeze(1) + spread.detach() - 1).clamp(-5, 5).exp()


@dataclasses.dataclass(frozen=True)
class Neighborhoods:
    """Turns places and frequencies into what RadioGATx sees, from measurements and a scene.

    Args:
        xy: (S, 2) places of the measurements.
        freq_mhz: (S).
        rss_dbm: (S).
        scene: source of depths and distances of the transmitters; None: neither.
        unit: length in the units of ``xy`` that counts as one cell.
        config: neighbors, depth, head.
    """

    xy: Floats
    freq_mhz: Floats
    rss_dbm: Floats
    scene: RadioScene | None
    unit: float
    config: RadioGATxConfig
    reference_mhz: float = dataclasses.field(init=False)
    _static: Floats = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference_mhz", reference_frequency(self.freq_mhz))
        object.__setattr__(self, "_static", self._places(self.xy))

    def _places(self, xy: Floats) -> Floats:
        """(n, 2 T or T) log10(d_t + 3) and T_t of each mast, as far as they are known."""
        scene = self.scene
        if scene is None or scene.transmitters is None or not self.config.depth:
            return np.empty((len(xy), 0))
        apart = np.sqrt(((xy[:, None] - scene.transmitters) ** 2).sum(axis=2)) / self.unit
        depth = scene.depth_at(xy)
        return np.concatenate([np.log10(apart + 3), *([] if depth is None else [depth])], axis=1)

    def values(self) -> Floats:
        """(S) measurements with free space taken off: P + 20 log10(f / f_0)."""
        return self.rss_dbm + 20 * np.log10(self.freq_mhz / self.reference_mhz)

    def features(
        self, xy: Floats, freq_mhz: Floats, distance: Floats, index: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The inputs of ``RadioGATx.forward`` for queries (Q) with their neighbors (Q, K)."""
        value = self.values()[index]
        mean = value.mean(axis=1, keepdims=True)
        d = distance / self.unit
        offset = (self.xy[index] - xy[:, None]) / self.unit
        spectral = self.config.head == "spectral"
        # the spectral head must not see the frequency that is asked for: only then is its answer a line in log f
        asked = np.full_like(freq_mhz, self.reference_mhz) if spectral else freq_mhz
        ratio = 20 * np.log10(self.freq_mhz[index] / asked[:, None]) / 10
        own = self._places(xy)
        apart = self._static[index] - own[:, None]
        per_edge = [offset[..., 1:] / 10, offset[..., :1] / 10, np.log(d + 0.5)[..., None], d[..., None] / 10]
        per_edge += [ratio[..., None], np.abs(ratio)[..., None], apart, np.abs(apart), (value - mean)[..., None] / 6]
        log_frequency = np.log10(freq_mhz / self.reference_mhz)
        node = np.concatenate([own, 2 * np.log10(asked / self.reference_mhz)[:, None]], axis=1)
        arrays = (np.concatenate(per_edge, axis=2), node, np.log(d + 0.5), value, log_frequency)
        edge, nodes, log_d, v, log_f = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in arrays)
        return edge, nodes, log_d, v, log_f
