"""Every setting of `radiogat`, and the one home of each default. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from tenfold import UserError
from tenfold.errors import did_you_mean


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} '{value}': {did_you_mean(value, known)}")


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Which cells are joined.

    Args:
        kind: depth (line-of-sight fractions alike, the method's default), distance (the authors' variant that is switched
            off: fractions over distance), power (radio depth of PIRM3D, in dB), around (all within the radius),
            obstruction (no building between), transmitter (same strongest transmitter). The last three are named by the
            authors' script, which does not have them; these are ours.
        radius: cells are joined when they are closer than this many cells; default 4.5 (the authors' code), or 6 for the
            kind obstruction (their file names).
        delta: threshold over log10 of the frequency in MHz (0.1 in the authors' code).
        gate: abs (absolute difference, symmetric), signed (a cell also listens to any brighter one: the authors' code)
            or none. With a radius of 4.5 cells the gate changes little; it is worth having for wide neighborhoods.
        block: side in cells of the blocks of the authors' protocol.
        compat: "2025" repeats the released code's use of the map's top left corner for every block.
        band_range: lowest and highest frequency in MHz that the kind distance normalizes over.

    Raises:
        UserError: a value is out of its range.
    """

    kind: Literal["depth", "distance", "power", "around", "obstruction", "transmitter"] = "depth"
    radius: float | None = None
    delta: float = 0.1
    gate: Literal["abs", "signed", "none"] = "abs"
    block: int = 40
    compat: Literal["2025"] | None = None
    band_range: tuple[float, float] = (1750.0, 5750.0)

    def __post_init__(self) -> None:
        _choice("kind", self.kind, ("depth", "distance", "power", "around", "obstruction", "transmitter"))
        _choice("gate", self.gate, ("abs", "signed", "none"))
        if self.radius is not None and not self.radius > 0:
            raise UserError(f"radius must be above 0 cells, got {self.radius}")
        if self.delta < 0:
            raise UserError(f"delta must be at least 0, got {self.delta}: 0 joins only cells with equal depth")
        if self.block < 1:
            raise UserError(f"block must be at least 1 cell, got {self.block}")

    @property
    def reach(self) -> float:
        """The radius in cells that holds for this kind."""
        return self.radius or (6.0 if self.kind == "obstruction" else 4.5)


@dataclass(frozen=True, kw_only=True)
class RadioGATConfig:
    """The faithful network and its training.

    Args:
        widths: channels after the first and the second layer (80 and 320 in the authors' code).
        dropout: after the first and the second layer (0.5 in the authors' code).
        slope: of LeakyReLU (0.01 in the authors' code).
        backend: of the attention layers: csr, stencil, dense or pyg.
        observed_flag: a sixth input says whether a node was measured; without it 0 dBm and "not measured" look alike.
        spectral: predict level and slope, so that any frequency can be asked, in place of one number.
        labels: observed (the labels are the inputs: the authors' single-band default, which learns the identity), heldout
            (each step blanks a random part of the measurements and predicts it) or full (all cells of the output band,
            for training areas whose truth is known).
        learning_rate: of Adam (5e-4 in the authors' code).
        epochs: passes over the training blocks (250 in the authors' code).
        seed: of weights, dropout and label sampling.
    """

    widths: tuple[int, int] = (80, 320)
    dropout: float = 0.5
    slope: float = 0.01
    backend: Literal["csr", "stencil", "dense", "pyg"] = "csr"
    observed_flag: bool = True
    spectral: bool = False
    labels: Literal["observed", "heldout", "full"] = "heldout"
    learning_rate: float = 5e-4
    epochs: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("backend", self.backend, ("csr", "stencil", "dense", "pyg"))
        _choice("labels", self.labels, ("observed", "heldout", "full"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.epochs < 1:
            raise UserError(f"epochs must be at least 1, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class RadioGATxConfig:
    """The network over measured neighbors, and its training. All of it is ours; see docs/radiogat.md.

    Args:
        neighbors: measurements that a place attends to, the nearest ones of all bands.
        width: channels of the hidden layers.
        depth: use line-of-sight fractions and distances of the transmitters, where the scene has them.
        head: direct (the network sees the frequency that is asked for; only measured bands can be asked) or spectral (it
            predicts level and slope in dB a decade, and any frequency can be asked).
        leave_out: what a training target must not see: sample (itself), place (all measurements at its place, also of
            other bands) or auto (place, when most places were measured in several bands).
        steps: of training.
        batch: targets a step.
        learning_rate: of AdamW at the start; it falls to 1e-5 along a cosine.
        weight_decay: of AdamW.
        seed: of weights and batches.
    """

    neighbors: int = 16
    width: int = 40
    depth: bool = True
    head: Literal["direct", "spectral"] = "spectral"
    leave_out: Literal["auto", "sample", "place"] = "auto"
    steps: int = 900
    batch: int = 768
    learning_rate: float = 4e-3
    weight_decay: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("head", self.head, ("direct", "spectral"))
        _choice("leave_out", self.leave_out, ("auto", "sample", "place"))
        for name in ("neighbors", "width", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


MODELS = ("radiogatx", "radiogat", "kriging", "pooled_kriging", "idw", "pooled_idw", "rbf", "shift")


@dataclass(frozen=True, kw_only=True)
class CityConfig:
    """A procedural city.

    Args:
        size: cells along each side.
        cell_m: metres a cell.
        n_tx: masts.
        built: share of cells that are built over before the streets are cut.
        freq_mhz: bands.
        power_dbm: what a mast sends, antenna gain included.
        shadowing_db: standard deviation of the shadowing that all bands share.
        shadowing_cells: its correlation length.
        seed: of streets, buildings and shadowing.
    """

    size: int = 200
    cell_m: float = 4.0
    n_tx: int = 3
    built: float = 0.14
    freq_mhz: tuple[float, ...] = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0)
    power_dbm: float = 43.0
    shadowing_db: float = 2.0
    shadowing_cells: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 40:
            raise UserError(f"size must be at least 40 cells, got {self.size}")
        if self.n_tx < 1:
            raise UserError(f"n_tx must be at least 1, got {self.n_tx}")
        if not 0 <= self.built < 0.6:
            raise UserError(f"built must be a share in [0, 0.6), got {self.built}")
        _check_bands(self.freq_mhz)


@dataclass(frozen=True, kw_only=True)
class RaytraceConfig:
    """A ray-traced scene of sionna-rt.

    Args:
        scene: name of a scene in its wheel: munich, etoile, florence, san_francisco, simple_street_canyon ...
        freq_mhz: bands.
        n_tx: masts, on free cells near fixed parts of the area.
        mast_m: height of the masts above the ground in metres.
        cell_m: metres a cell.
        extent_m: longest side of the map in metres, around the scene's middle.
        samples_per_tx: rays from each mast.
        max_depth: interactions of a ray.
        diffraction: also first-order diffraction, which reaches into streets that no reflection does.
        power_dbm: what a mast sends.
        pattern: antenna of the masts: iso, dipole, hw_dipole, tr38901.
        floor_dbm: weaker powers, which rest on few rays and no receiver hears, have no value.
        seed: of the rays, the same for all bands.
    """

    scene: str = "munich"
    freq_mhz: tuple[float, ...] = (1750.0, 2750.0, 3750.0, 4750.0, 5750.0)
    n_tx: int = 3
    mast_m: float = 30.0
    cell_m: float = 5.0
    extent_m: float = 1500.0
    samples_per_tx: int = 4_000_000
    max_depth: int = 5
    diffraction: bool = True
    power_dbm: float = 43.0
    pattern: str = "iso"
    floor_dbm: float = -120.0
    seed: int = 1

    def __post_init__(self) -> None:
        _check_bands(self.freq_mhz)
        if not self.cell_m > 0:
            raise UserError(f"cell_m must be above 0, got {self.cell_m}")


def _check_bands(freq_mhz: tuple[float, ...]) -> None:
    if not freq_mhz:
        raise UserError("freq_mhz names no band")
    for f in freq_mhz:
        if not 10 <= f <= 1e6:
            raise UserError(f"freq_mhz {f:g}: expected MHz between 10 and 1,000,000")


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """Where measurements and the scene come from.

    Args:
        data: csv:FILE or parquet:FILE of measurements, npz:FILE or official:FOLDER of complete maps, of which a share is
            taken as measured, or city (a procedural one).
        area: number of the area, in files that hold several.
        rate: share of the cells that is measured, of complete maps.
        buildings: GeoTIFF (nonzero = building) or GeoJSON polygons.
        transmitters: CSV of the masts, columns x and y or lat and lon.
        columns: where the file calls its columns otherwise, as role=name: rss_dbm=Signal,freq_mhz=Band; roles are x, y, lon,
            lat, freq_mhz, rss_dbm.
        crs: plane of x and y (EPSG:25832 for example), or that lat and lon are projected to; default UTM.
        freq_mhz: for files without a column of frequencies.
        sign: -1 where powers are given as positive losses.
        cell: side of a map's cell in metres; default: the raster's, or half of the measurements' spacing.
        seed: of the choice of measured cells.
    """

    data: str
    area: int = 1
    rate: float = 0.05
    buildings: str | None = None
    transmitters: str | None = None
    columns: list[str] = field(default_factory=list)
    crs: str | None = None
    freq_mhz: float | None = None
    sign: Literal[1, -1] = 1
    cell: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(f"rate must be in (0, 1], got {self.rate}")
        if self.cell is not None and not self.cell > 0:
            raise UserError(f"cell must be above 0, got {self.cell}")
        for pair in self.columns:
            if "=" not in pair:
                raise UserError(f"columns: expected role=name, got '{pair}'")


Model = Literal["radiogatx", "radiogat", "kriging", "pooled_kriging", "idw", "pooled_idw", "rbf", "shift"]
Format = Literal["auto", "geotiff", "netcdf", "csv", "none"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(InputSettings):
    """Learn an area and, by default, map it at once.

    Args:
        model: radiogatx, radiogat, or a baseline.
        network: settings of radiogatx.
        gat: settings of radiogat.
        graph: edges of radiogat.
        fallback: take kriging where it is better on the held-out blocks.
        calibration: interpolate (error bars for places between measurements) or extrapolate (wider, for unvisited quarters).
        interval: level of the error bars.
        map: file format of the map; auto is GeoTIFF where rasterio is installed, else CSV; none makes no map.
        checkpoint_every: steps between two checkpoints.
        device: auto, cpu or cuda.
    """

    model: Model = "radiogatx"
    network: RadioGATxConfig = field(default_factory=RadioGATxConfig)
    gat: RadioGATConfig = field(default_factory=RadioGATConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    fallback: bool = True
    calibration: Literal["interpolate", "extrapolate"] = "interpolate"
    interval: float = 0.9
    map: Format = "auto"
    checkpoint_every: int = 200
    device: Literal["auto", "cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level(self.interval)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"interval must be between 0 and 1, got {level}")


@dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Map an area that was learned, or predict at given places.

    Args:
        model: folder that `radiogat train` wrote, or its model.safetensors.
        freq_mhz: frequencies; default: the measured bands. The spectral head answers for any.
        points: CSV of places (x, y or lat, lon) to predict in place of a map.
        cell: side of a map's cell in metres; default: the scene's, or half of the measurements' spacing.
        interval: level of the error bars.
        format: of the map; auto is GeoTIFF where rasterio is installed, else CSV.
    """

    model: str
    freq_mhz: list[float] | None = None
    points: str | None = None
    cell: float | None = None
    interval: float = 0.9
    format: Literal["auto", "geotiff", "netcdf", "csv"] = "auto"

    def __post_init__(self) -> None:
        _check_level(self.interval)


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(InputSettings):
    """Cross-validate all methods on measurements.

    Args:
        holdout: random (a held-out measurement keeps its neighbors: how good is the map between the measurements?) or
            blocks (whole squares are held out: how good is it where nobody was?).
        folds: parts that are held out in turn.
        block: side of the squares in metres; default: a tenth of the area.
        models: methods to compare.
        network: settings of radiogatx.
        interval: level of the error bars.
    """

    holdout: Literal["random", "blocks"] = "blocks"
    folds: int = 5
    block: float | None = None
    models: list[str] = field(
        default_factory=lambda: ["idw", "kriging", "rbf", "shift", "pooled_idw", "pooled_kriging", "radiogatx"]
    )
    network: RadioGATxConfig = field(default_factory=RadioGATxConfig)
    interval: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_level(self.interval)
        if self.folds < 2:
            raise UserError(f"folds must be at least 2, got {self.folds}")
        for name in self.models:
            _choice("model", name, tuple(m for m in MODELS if m != "radiogat"))


@dataclass(frozen=True, kw_only=True)
class CompareSettings(InputSettings):
    """Compare methods over several random splits of the measurements, with intervals.

    Args:
        seeds: of the splits and of the network.
        share: of the measurements that is held out in each split.
        models: methods to compare.
        network: settings of radiogatx.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    share: float = 0.2
    models: list[str] = field(default_factory=lambda: ["idw", "kriging", "pooled_idw", "pooled_kriging", "radiogatx"])
    network: RadioGATxConfig = field(default_factory=RadioGATxConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise UserError(f"share must be between 0 and 1, got {self.share}")
        for name in self.models:
            _choice("model", name, tuple(m for m in MODELS if m != "radiogat"))


@dataclass(frozen=True, kw_only=True)
class SimulateSettings:
    """Make complete maps of an area.

    Args:
        backend: city (procedural, seconds) or sionna (ray tracing; needs the extra raytrace and, on a CPU, LLVM).
        scene: of sionna, shorthand for sionna.scene.
        city: settings of the procedural city.
        sionna: settings of the ray tracing.
        rate: share of the cells that is written as measured into samples.csv.
        seed: of that choice.
    """

    backend: Literal["city", "sionna"] = "city"
    scene: str | None = None
    city: CityConfig = field(default_factory=CityConfig)
    sionna: RaytraceConfig = field(default_factory=RaytraceConfig)
    rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(f"rate must be in (0, 1], got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """Draw a map that was predicted, or complete maps.

    Args:
        map: GeoTIFF or netCDF of a predicted map, or npz:FILE of complete maps.
        truth: npz:FILE of complete maps on the same grid, to draw the error.
        area: number of the area in such files.
    """

    map: str
    truth: str | None = None
    area: int = 1


@dataclass(frozen=True, kw_only=True)
class SuggestSettings:
    """Where to measure next.

    Args:
        model: folder that `radiogat train` wrote.
        count: places.
        reach: distance in metres over which a measurement informs; default: 10 cells.
        cell: side of a cell in metres; default: the scene's, or half of the measurements' spacing.
    """

    model: str
    count: int = 10
    reach: float | None = None
    cell: float | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(InputSettings):
    """Turn measurements or maps into another format.

    Args:
        data: csv:FILE, parquet:FILE, geotiff:FILE, netcdf:FILE, npz:FILE or official:FOLDER.
        to: csv (measurements), geotiff, netcdf or npz (maps).
    """

    data: str
    to: Literal["csv", "geotiff", "netcdf", "npz"] = "csv"


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings:
    """The authors' protocol on complete maps: blocks of 40 cells, half of them test blocks, a share of the cells measured.

    Args:
        data: npz:FILE or official:FOLDER.
        areas: numbers of the areas.
        rates: shares of the cells that are measured.
        tasks: S (one band, its own samples), M (all bands are sampled at independent places), U (the target band is not
            measured in the test blocks), D (one band is dense).
        seeds: 0 is the protocol's split and masks; all seeds give their own.
        target: number of the band that is predicted, from 0; -1 is the last.
        models: methods; radiogatx-nodepth is without buildings, radiogat is the faithful network, radiogat-2025 as released.
        network: settings of radiogatx.
        gat: settings of radiogat.
        device: of radiogat's and radiogatx's training.
        interval: level of the error bars.
    """

    data: str
    areas: list[int] = field(default_factory=lambda: [1])
    rates: list[float] = field(default_factory=lambda: [0.05])
    tasks: list[str] = field(default_factory=lambda: ["S"])
    seeds: list[int] = field(default_factory=lambda: [0])
    target: int = -1
    models: list[str] = field(
        default_factory=lambda: ["idw", "kriging", "pooled_idw", "pooled_kriging", "radiogatx-nodepth", "radiogatx"]
    )
    network: RadioGATxConfig = field(default_factory=RadioGATxConfig)
    gat: RadioGATConfig = field(default_factory=RadioGATConfig)
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    interval: float = 0.9

    def __post_init__(self) -> None:
        _check_level(self.interval)
        for task in self.tasks:
            _choice("task", task, ("S", "M", "U", "D"))
        for model in self.models:
            _choice("model", model, (*MODELS, "radiogatx-nodepth", "radiogat-2025"))
        for rate in self.rates:
            if not 0 < rate <= 1:
                raise UserError(f"rates must be in (0, 1], got {rate}")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The demonstration.

    Args:
        level: quick (mechanics), default (main claims) or full (every claim).
        seeds: cities; default: 0, or 0 to 4 at the full level.
        size: cells along each side of a city; default: 200, or 80 at the quick level.
        rate: share of the cells that is measured in each band.
    """

    level: Literal["quick", "default", "full"] = "default"
    seeds: list[int] | None = None
    size: int | None = None
    rate: float = 0.05
