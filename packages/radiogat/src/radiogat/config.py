"""Every setting of `radiogat`, and the one home of each default. Imports no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tenfold.config
from tenfold.config import (
    Count,
    Device,
    Distinct,
    Ge,
    Interval,
    Length,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Seeds,
    SettingError,
    Settings,
    Share,
)

Method = Literal[
    "stack", "radiogatx", "radiogat", "trees", "kriging", "pooled_kriging", "idw", "pooled_idw", "rbf", "shift"
]
METHODS: tuple[str, ...] = get_args(Method)
Arm = Literal["stack", "radiogatx", "trees", "kriging", "pooled_kriging", "idw", "pooled_idw", "rbf", "shift"]
"""What runs on measurements alone: all but the faithful network, which needs buildings and masts."""
ProtocolArm = Literal[Method, "radiogatx-nodepth", "radiogat-2025"]
"""What the authors' protocol compares: also RadioGATx without buildings, and RadioGAT as released."""
Task = Literal["S", "M", "U", "D"]
Format = Literal["auto", "geotiff", "netcdf", "csv"]
PredictFormat = Literal["auto", "geotiff", "cog", "netcdf", "zarr", "csv"]
"""What ``predict`` writes; cog is a cloud-optimized GeoTIFF."""
Backend = Literal["csr", "stencil", "dense", "pyg"]
Megahertz = Annotated[float, Interval(ge=10, le=1e6)]
Bands = Annotated[tuple[Megahertz, ...], Length(1), Distinct()]
Rate = Annotated[float, Interval(gt=0, le=1)]
"""A share of the cells, perhaps all of them."""


@dataclass(frozen=True, kw_only=True)
class GraphConfig(Settings):
    """Which cells are joined.

    Args:
        kind: depth (line-of-sight fractions alike, the method's default), distance (the authors' variant that is switched
            off: fractions over distance), power (radio depth of PIRM3D, in dB), around (all within the radius),
            obstruction (no building between), transmitter (same strongest transmitter). The last three are named by the
            authors' script, which does not have them; these are ours.
        radius: distance in cells below which two cells are joined; default: 4.5 (the authors' code), or 6 for the kind
            obstruction (their file names).
        delta: threshold over log10 of the frequency in MHz (0.1 in the authors' code); 0 joins only cells of equal depth.
        gate: abs (absolute difference, symmetric), signed (a cell also listens to any brighter one: the authors' code)
            or none. With a radius of 4.5 cells the gate changes little; it is worth having for wide neighborhoods.
        block: side in cells of the blocks of the authors' protocol.
        compat: "2025" repeats the released code's use of the map's top left corner for every block.
        band_range: lowest and highest frequency in MHz that the kind distance normalizes over.
    """

    kind: Literal["depth", "distance", "power", "around", "obstruction", "transmitter"] = "depth"
    radius: Positive | None = None
    delta: NonNegative = 0.1
    gate: Literal["abs", "signed", "none"] = "abs"
    block: Count = 40
    compat: Literal["2025"] | None = None
    band_range: tuple[Megahertz, Megahertz] = (1750.0, 5750.0)

    @property
    def reach(self) -> float:
        """The radius in cells that holds for this kind."""
        return self.radius or (6.0 if self.kind == "obstruction" else 4.5)


@dataclass(frozen=True, kw_only=True)
class GATSettings(Settings):
    """The faithful network.

    Args:
        widths: channels after the first and the second layer (80 and 320 in the authors' code).
        dropout: share of the channels dropped after the first and the second layer (0.5 in the authors' code).
        slope: slope of LeakyReLU below zero (0.01 in the authors' code).
        backend: way of computing the attention layers: csr, stencil, dense or pyg.
        spectral: predict level and slope, so that any frequency can be asked for, in place of one number.
    """

    widths: tuple[Count, Count] = (80, 320)
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    slope: NonNegative = 0.01
    backend: Backend = "csr"
    spectral: bool = False


@dataclass(frozen=True, kw_only=True)
class LabeledGATSettings(GATSettings):
    """The faithful network, and what it sees and is told.

    Args:
        observed_flag: whether a sixth input says if a node was measured; without it 0 dBm and "not measured" look alike.
        labels: observed (the labels are the inputs: the authors' single-band default, which learns the identity), heldout
            (each step blanks a random part of the measurements and predicts it) or full (all cells of the output band,
            for training areas whose truth is known).
    """

    observed_flag: bool = True
    labels: Literal["observed", "heldout", "full"] = "heldout"


@dataclass(frozen=True, kw_only=True)
class RadioGATConfig(LabeledGATSettings):
    """The faithful network and its training.

    Args:
        lr: learning rate of Adam (5e-4 in the authors' code).
        epochs: passes over the training blocks (250 in the authors' code).
        steps: training steps, in place of the epochs.
        seed: seed of weights, dropout and label sampling.
    """

    lr: Positive = 5e-4
    epochs: Count = 250
    steps: Count | None = None
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Settings):
    """The network over measured neighbors. All of it is ours; see docs/radiogat.md.

    Args:
        neighbors: number of measurements that a place attends to, the nearest ones of all bands.
        width: channels of the hidden layers.
        depth: use line-of-sight fractions and distances of the transmitters, where the scene has them.
        head: direct (the network sees the frequency that is asked for; only measured bands can be asked for) or spectral
            (it predicts level and slope in dB per decade, and any frequency can be asked for).
        batch_size: targets per step.
        weight_decay: weight decay of AdamW.
    """

    neighbors: Count = 16
    width: Count = 40
    depth: bool = True
    head: Literal["direct", "spectral"] = "spectral"
    batch_size: Count = 768
    weight_decay: NonNegative = 1e-3


@dataclass(frozen=True, kw_only=True)
class RadioGATxConfig(NetworkSettings):
    """The network over measured neighbors, and its training.

    Args:
        lr: learning rate of AdamW at the start; it falls to 1e-5 along a cosine.
        steps: number of training steps.
        seed: seed of weights and batches.
    """

    lr: Positive = 4e-3
    steps: Count = 900
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class TreesConfig(Settings):
    """Gradient-boosted trees on the same features as the network.

    Args:
        engine: sklearn (HistGradientBoostingRegressor) or lightgbm (the extra of that name).
        iterations: number of trees of an ensemble.
        lr: learning rate.
        leaves: leaves per tree.
        neighbors: number of nearest measurements whose values and offsets are features.
        ensemble: number of ensembles that are averaged, each of another seed; in the stack at least 3.
    """

    engine: Literal["sklearn", "lightgbm"] = "sklearn"
    iterations: Count = 300
    lr: Positive = 0.06
    leaves: Annotated[int, Ge(2)] = 31
    neighbors: Count = 16
    ensemble: Count = 1


@dataclass(frozen=True, kw_only=True)
class CityConfig(Settings):
    """A procedural city.

    Args:
        size: cells along each side.
        cell_m: side of a cell in meters.
        n_tx: number of masts.
        built: share of cells that are built over before the streets are cut.
        freq_mhz: bands in MHz.
        power_dbm: power that a mast sends, antenna gain included.
        shadowing_db: standard deviation of the shadowing that all bands share.
        shadowing_cells: correlation length of the shadowing in cells.
        seed: seed of streets, buildings and shadowing.
    """

    size: Annotated[int, Ge(40)] = 200
    cell_m: Positive = 4.0
    n_tx: Count = 3
    built: Annotated[float, Interval(ge=0, lt=0.6)] = 0.14
    freq_mhz: Bands = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0)
    power_dbm: float = 43.0
    shadowing_db: NonNegative = 2.0
    shadowing_cells: Positive = 8.0
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class RaytraceConfig(Settings):
    """A ray-traced scene of sionna-rt.

    Args:
        scene: name of a scene in its wheel: munich, etoile, florence, san_francisco, simple_street_canyon ...
        freq_mhz: bands in MHz.
        n_tx: number of masts, on free cells near fixed parts of the area.
        mast_m: height of the masts above the ground in meters.
        cell_m: side of a cell in meters.
        extent_m: longest side of the map in meters, around the scene's middle.
        samples_per_tx: number of rays from each mast.
        max_depth: largest number of interactions of a ray.
        diffraction: also trace first-order diffraction, which reaches into streets that no reflection does.
        power_dbm: power that a mast sends.
        pattern: antenna of the masts: iso, dipole, hw_dipole, tr38901.
        floor_dbm: power below which a cell has no value: it rests on few rays, and no receiver hears it.
        seed: seed of the rays, the same for all bands.
    """

    scene: str = "munich"
    freq_mhz: Bands = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0)
    n_tx: Count = 3
    mast_m: Positive = 30.0
    cell_m: Positive = 5.0
    extent_m: Positive = 1500.0
    samples_per_tx: Count = 4_000_000
    max_depth: Natural = 5
    diffraction: bool = True
    power_dbm: float = 43.0
    pattern: str = "iso"
    floor_dbm: float = -120.0
    seed: Seed = 1


@dataclass(frozen=True, kw_only=True)
class FileSettings(Settings):
    """What every reader of measurements and scenes is told.

    Args:
        data: csv:FILE or parquet:FILE of measurements, geotiff:FILE or netcdf:FILE of a map, npz:FILE or official:FOLDER of
            complete maps.
        area: number of the area, in files that hold several.
        buildings: raster (nonzero = building), or footprints: GeoJSON, shapefile, GeoPackage (FILE:LAYER if several).
        transmitters: CSV of the masts, columns x and y or lat and lon.
        columns: names of columns that differ from the usual ones, as role=name, or role=#10 for the tenth column:
            rss_dbm=Signal,freq_mhz=Band; roles are x, y, lon, lat, freq_mhz, channel, band, radio, rss_dbm, cell, time.
        crs: plane of x and y (EPSG:25832 for example), or that lat and lon are projected to; default: UTM.
        freq_mhz: frequency in MHz of files without a column of frequencies.
        sign: sign of the powers in the file; -1 where they are given as positive losses.
        missing: rows without a value: refuse the file, or drop them (their number is said).
        range: lowest and highest power in the file that is a measurement; others mark missing ones; default: all but 0,
            from -200 to 40 dBm.
        radio: what channel and band numbers belong to, where the file does not say: lte, nr, umts, gsm (512 to 885 DCS 1800),
            pcs (512 to 810 PCS 1900) or wifi.
        by: column of the cell's identity, pci for example; where several cells were measured at one place, the strongest
            counts.
        only: values of that column whose rows are taken, separated by commas; one value maps one cell.
        track: file with times and positions, for measurements that have times alone (rtl_power).
        at: latitude and longitude of all measurements of a file without positions.
        cell: side of a map's cell in meters; default: the raster's, or half of the measurements' spacing.
    """

    data: str
    area: Count = 1
    buildings: str | None = None
    transmitters: str | None = None
    columns: list[str] = field(default_factory=list)
    crs: str | None = None
    freq_mhz: Megahertz | None = None
    sign: Literal[1, -1] = 1
    missing: Literal["refuse", "drop"] = "refuse"
    range: tuple[float, float] | None = None
    radio: Literal["lte", "nr", "umts", "gsm", "pcs", "wifi"] | None = None
    by: str | None = None
    only: str | None = None
    track: str | None = None
    at: tuple[float, float] | None = None
    cell: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.range is not None and not self.range[0] < self.range[1]:
            raise SettingError(
                "range", f"expected LOW,HIGH, the lower one first, got {self.range[0]:g},{self.range[1]:g}"
            )
        if self.only and self.by is None:
            raise SettingError("only", "expected with --by, the column that the values are of")
        for pair in self.columns:
            if "=" not in pair:
                raise SettingError("columns", f"expected role=name, got '{pair}'")


@dataclass(frozen=True, kw_only=True)
class InputSettings(FileSettings):
    """Measurements from a file, or drawn from complete maps.

    Args:
        data: csv:FILE or parquet:FILE of measurements, geotiff:FILE or netcdf:FILE whose cells are measurements, npz:FILE or
            official:FOLDER of complete maps, of which a share is taken as measured, or city (a procedural one).
        rate: share of the cells that is measured, of complete maps.
    """

    rate: Rate = 0.05


@dataclass(frozen=True, kw_only=True)
class Optimizer(Settings):
    """The optimizer of a network; AdamW of radiogatx, Adam of radiogat.

    Args:
        lr: learning rate at the start; default: the network's own, 4e-3 of radiogatx and 5e-4 of radiogat.
    """

    lr: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class LearningSettings(Settings):
    """How a network learns.

    Args:
        steps: number of training steps of each network; default: the network's own, 900 of radiogatx and 250 passes over
            the training blocks of radiogat.
        network: settings of radiogatx.
        trees: settings of the trees.
        optimizer: settings of the optimizer.
    """

    steps: Count | None = None
    network: NetworkSettings = field(default_factory=NetworkSettings)
    trees: TreesConfig = field(default_factory=TreesConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def radiogatx(self, seed: int) -> RadioGATxConfig:
        """The network over measured neighbors and its training, for one seed."""
        return RadioGATxConfig(**vars(self.network), **self._given(), seed=seed)

    def _given(self) -> dict[str, Any]:
        """Length and learning rate, as far as they are not left to the network."""
        given = {"steps": self.steps, "lr": self.optimizer.lr}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LearningSettings, InputSettings):
    """Learn an area from measurements, and map it with error bars.

    Args:
        method: stack (radiogatx, trees and kriging, weighted by held-out places), one of its parts, radiogat, or a baseline.
        gat: settings of radiogat.
        graph: settings of the edges of radiogat.
        fallback: take what is best on the held-out places, at the map's distances: the method, the network, trees or kriging.
        interval: level of the error bars.
        map: file format of the map; auto is GeoTIFF where rasterio is installed, else CSV; none makes no map.
        seed: seed of the held-out blocks, of the networks, and of the choice of measured cells of complete maps.
        checkpoint_every: steps between two checkpoints.
        device: where a network is trained; auto takes a GPU when there is one.
    """

    method: Method = "stack"
    gat: LabeledGATSettings = field(default_factory=LabeledGATSettings)
    graph: GraphConfig = field(default_factory=GraphConfig)
    fallback: bool = True
    interval: Share = 0.9
    map: Literal[Format, "none"] = "auto"
    seed: Seed = 0
    checkpoint_every: Count = 200
    device: Device = "cpu"

    def radiogat(self) -> RadioGATConfig:
        """The faithful network and its training."""
        return RadioGATConfig(**vars(self.gat), **self._given(), seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class PredictSettings(Settings):
    """Map a learned area at any cell size and frequency, or predict at given places.

    Args:
        run: folder of a `radiogat train`.
        freq_mhz: frequencies in MHz; default: the measured bands. The spectral head answers for any.
        points: CSV of places (x, y or lat, lon) to predict in place of a map.
        cell: side of a map's cell in meters; default: the scene's, or half of the measurements' spacing.
        interval: level of the error bars.
        format: file format of the map; auto is GeoTIFF where rasterio is installed, else CSV, and cog (a cloud-optimized
            GeoTIFF) on a cluster.
        dask: address of the scheduler of a dask cluster that predicts the map in tiles; its workers see the run's folder.
        tile: cells along the sides of a tile; default: 256.
    """

    run: str
    freq_mhz: Annotated[list[Megahertz], Length(1), Distinct()] | None = None
    points: str | None = None
    cell: Positive | None = None
    interval: Share = 0.9
    format: PredictFormat = "auto"
    dask: str | None = None
    tile: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dask is not None and self.points is not None:
            raise SettingError("dask", "expected a map: --points predicts at given places, here")
        if self.dask is not None and self.format not in {"auto", "cog", "zarr"}:
            raise SettingError("format", f"expected cog or zarr with --dask, got {self.format}")
        if self.dask is None and self.tile is not None:
            raise SettingError("tile", "expected with --dask, whose workers predict tiles")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(LearningSettings, InputSettings):
    """Cross-validate all methods on your measurements.

    Args:
        holdout: places (each with what lies about as near as the map is read; weighted such that their distances to the
            measurements are the map's: how good is the map?) or blocks (whole squares: how good is it where nobody was?).
        folds: number of parts that are held out in turn.
        block: side of the squares in meters; default: a tenth of the area.
        arms: methods to compare.
        interval: level of the error bars.
        seed: seed of the folds, of the network, and of the choice of measured cells of complete maps.
    """

    holdout: Literal["places", "blocks"] = "places"
    folds: Annotated[int, Ge(2)] = 5
    block: Positive | None = None
    arms: Annotated[list[Arm], Length(1), Distinct()] = field(
        default_factory=lambda: ["idw", "kriging", "rbf", "pooled_kriging", "trees", "radiogatx", "stack"]
    )
    interval: Share = 0.9
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class CompareSettings(LearningSettings, InputSettings):
    """Compare methods over several random splits of the measured places, with paired intervals.

    Args:
        arms: methods to compare; ratios are of the stack, or without it of radiogatx, to each other one.
        seeds: seeds of the splits and of the network; of complete maps the first one also draws the measured cells.
        share: share of the places that is held out in each split.
        executor: where arms are measured: processes:N of this machine, or dask:ADDRESS; default: here, one after another.
    """

    arms: Annotated[list[Arm], Length(1), Distinct()] = field(
        default_factory=lambda: ["idw", "kriging", "pooled_kriging", "trees", "radiogatx", "stack"]
    )
    seeds: Seeds = field(default_factory=lambda: [0, 1, 2])
    share: Share = 0.2
    executor: str | None = None


@dataclass(frozen=True, kw_only=True)
class SimulateSettings(Settings):
    """Make complete maps of an area: a procedural city, or ray tracing.

    Args:
        backend: city (procedural, seconds) or sionna (ray tracing; needs the extra raytrace and, on a CPU, LLVM).
        city: settings of the procedural city.
        sionna: settings of the ray tracing.
        rate: share of the cells that is written as measured into samples.csv.
        seed: seed of the choice of these cells.
    """

    backend: Literal["city", "sionna"] = "city"
    city: CityConfig = field(default_factory=CityConfig)
    sionna: RaytraceConfig = field(default_factory=RaytraceConfig)
    rate: Rate = 0.05
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """Draw maps, error bars, spectral slopes and errors.

    Args:
        map: GeoTIFF or netCDF of a predicted map, or npz:FILE of complete maps.
        truth: npz:FILE of complete maps on the same grid, to draw the error.
        area: number of the area in such files.
    """

    map: str
    truth: str | None = None
    area: Count = 1


@dataclass(frozen=True, kw_only=True)
class SuggestSettings(Settings):
    """Say where to measure next.

    Args:
        run: folder of a `radiogat train`.
        count: number of places.
        reach: distance in meters over which a measurement informs; default: the range of the measurements' variogram.
        cell: side of a cell in meters; default: the scene's, or half of the measurements' spacing.
    """

    run: str
    count: Count = 10
    reach: Positive | None = None
    cell: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(FileSettings):
    """Turn measurements or maps into another format.

    Args:
        to: csv (measurements), geotiff, netcdf or npz (maps).
    """

    to: Literal["csv", "geotiff", "netcdf", "npz"] = "csv"


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(LearningSettings):
    """Run the authors' protocol on complete maps: blocks of 40 cells, half of them for testing.

    Args:
        data: npz:FILE or official:FOLDER.
        areas: numbers of the areas.
        rates: shares of the cells that are measured.
        tasks: S (one band, its own samples), M (all bands are sampled at independent places), U (the target band is not
            measured in the test blocks), D (one band is dense).
        seeds: seeds of split, masks and networks; 0 has the protocol's split.
        target: number of the band that is predicted, from 0; -1 is the last.
        arms: methods; radiogatx-nodepth is without buildings, radiogat is the faithful network, radiogat-2025 as released.
        gat: settings of radiogat.
        device: where networks are trained; auto takes a GPU when there is one.
        interval: level of the error bars.
    """

    data: str
    areas: Annotated[list[Count], Length(1), Distinct()] = field(default_factory=lambda: [1])
    rates: Annotated[list[Rate], Length(1), Distinct()] = field(default_factory=lambda: [0.05])
    tasks: Annotated[list[Task], Length(1), Distinct()] = field(default_factory=lambda: ["S"])
    seeds: Seeds = field(default_factory=lambda: [0])
    target: int = -1
    arms: Annotated[list[ProtocolArm], Length(1), Distinct()] = field(
        default_factory=lambda: ["idw", "kriging", "pooled_kriging", "trees", "radiogatx", "stack"]
    )
    gat: GATSettings = field(default_factory=GATSettings)
    device: Device = "cpu"
    interval: Share = 0.9

    def radiogat(self, seed: int) -> RadioGATConfig:
        """The faithful network and its training, for one seed."""
        return RadioGATConfig(**vars(self.gat), **self._given(), seed=seed)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Map procedural cities from a twentieth of their cells, and compare all methods.

    Args:
        seeds: cities; default: 0, or 0 to 4 at the full level.
        size: cells along each side of a city; default: 200, or 80 at the quick level.
        rate: share of the cells that is measured in each band.
    """

    size: Annotated[int, Ge(40)] | None = None
    rate: Rate = 0.05
