"""Complete maps by ray tracing: sionna-rt on a CPU or GPU, in the city scenes that travel in its wheel.

On a CPU Dr.Jit wants an LLVM library. Debian's LLVM 14 and 15 crash on processors with AVX-512; LLVM 19 works
(``apt-get install libllvm19``, and ``DRJIT_LIBLLVM_PATH`` when it is not found).
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radiogat.config import RaytraceConfig
from radiogat.samples import RadioMaps
from tenfold import UserError
from tenfold.errors import did_you_mean, needs

Floats = NDArray[np.float64]
_LIBRARIES = ("/usr/lib/x86_64-linux-gnu/libLLVM.so.19.1", "/usr/lib/aarch64-linux-gnu/libLLVM.so.19.1")


def trace(
    config: RaytraceConfig,
    cached: Callable[[str, Callable[[], dict[str, Floats]]], dict[str, Floats]] | None = None,
    track: Callable[[Iterable[float]], Iterable[float]] = lambda bands: bands,
) -> RadioMaps:
    """Trace a scene band by band, with the same random rays in each, so that noise does not hide the spectrum.

    Power is summed over the masts in watts. A cell below the floor of what a receiver hears is NaN, and so are buildings:
    cells over which a ray from above hits something higher than two meters above the ground.

    Args:
        config: scene, bands, cell, rays.
        cached: function of a name and of what computes its arrays, which returns the arrays, perhaps from an earlier run.
        track: function that shows progress over the bands.

    Raises:
        MissingExtraError: sionna-rt is not installed.
        UserError: no such scene, or Dr.Jit finds no LLVM.
    """
    rt = _sionna()
    if not hasattr(rt.scene, config.scene):
        known = [
            name for name in dir(rt.scene) if not name.startswith("_") and isinstance(getattr(rt.scene, name), str)
        ]
        raise UserError(f"sionna-rt has no scene '{config.scene}': {did_you_mean(config.scene, known)}")
    cached = cached or (lambda name, compute: compute())
    state: dict[str, Any] = {}

    def scene() -> Any:
        if not state:
            state["scene"] = rt.load_scene(getattr(rt.scene, config.scene))
        return state["scene"]

    ground = cached("ground", lambda: _ground(scene(), config))
    building = ground["building"].astype(bool)
    masts = _masts(building, config.n_tx)
    maps = []
    for freq in track(config.freq_mhz):
        found = cached(f"{freq:g}MHz", lambda freq=freq: _band(rt, scene(), config, ground, masts, freq))  # type: ignore[misc]
        power = found["watts"]
        with np.errstate(divide="ignore"):
            dbm = 10 * np.log10(1000 * power)
        dbm[dbm < config.floor_dbm] = np.nan
        maps.append(np.where(building, np.nan, dbm))
    return RadioMaps(
        np.stack(maps), tuple(map(float, config.freq_mhz)), masts, config.scene, config.cell_m, building.copy()
    )


def _sionna() -> Any:
    if "DRJIT_LIBLLVM_PATH" not in os.environ:
        library = next((path for path in _LIBRARIES if Path(path).exists()), None)
        if library:
            os.environ["DRJIT_LIBLLVM_PATH"] = library
    for module in ("drjit", "mitsuba", "sionna"):
        needs(module, "raytrace", "radiogat", why="ray tracing")
    import drjit
    import mitsuba
    import sionna.rt

    if "cuda" not in str(mitsuba.variant()) and not drjit.has_backend(drjit.JitBackend.LLVM):
        raise UserError(
            "Dr.Jit finds no LLVM: apt-get install libllvm19, or set DRJIT_LIBLLVM_PATH to a libLLVM of 16 or later"
        )
    return sionna.rt


def _ground(scene: Any, config: RaytraceConfig) -> dict[str, Floats]:
    """The raster over the scene, the height above the ground of each cell, and which cells are built up."""
    import drjit
    import mitsuba

    box = scene.mi_scene.bbox()
    low, high = np.array(box.min).ravel(), np.array(box.max).ravel()
    middle = (low[:2] + high[:2]) / 2
    side = np.minimum(high[:2] - low[:2], config.extent_m) // config.cell_m * config.cell_m
    width, height = (round(s / config.cell_m) for s in side)
    x = middle[0] - side[0] / 2 + (np.arange(width) + 0.5) * config.cell_m
    y = middle[1] + side[1] / 2 - (np.arange(height) + 0.5) * config.cell_m
    xs, ys = np.tile(x, height), np.repeat(y, width)
    origin = mitsuba.Point3f(
        mitsuba.Float(xs.astype(np.float32)), mitsuba.Float(ys.astype(np.float32)), float(high[2] + 10)
    )
    hit = scene.mi_scene.ray_intersect(mitsuba.Ray3f(origin, mitsuba.Vector3f(0, 0, -1)))
    z = np.where(np.array(hit.is_valid()), np.array(hit.p.z), low[2]).reshape(height, width)
    drjit.sync_thread()
    ground = float(np.percentile(z, 5))
    return {
        "building": (z > ground + 2).astype(np.float64),
        "height": z - ground,
        "center": np.array([*middle, ground]),
        "size": side,
    }


def _masts(building: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Free cells near (1/4, 1/4), (1/4, 3/4), (3/4, 1/2) of the area and so on, as in the authors' data."""
    spots = np.array([[0.25, 0.25], [0.25, 0.75], [0.75, 0.5], [0.75, 0.9], [0.5, 0.1], [0.9, 0.2]])
    free = np.argwhere(~building)
    wanted = spots[np.arange(count) % len(spots)] * np.array(building.shape)
    return np.asarray(free[[np.abs(free - spot).sum(axis=1).argmin() for spot in wanted]])


def _band(
    rt: Any, scene: Any, config: RaytraceConfig, ground: dict[str, Floats], masts: NDArray[np.int64], freq: float
) -> dict[str, Floats]:
    import mitsuba

    (cx, cy, z0), (sx, sy) = ground["center"], ground["size"]
    for name in list(scene.transmitters):
        scene.remove(name)
    scene.frequency = freq * 1e6
    scene.tx_array = rt.PlanarArray(num_rows=1, num_cols=1, pattern=config.pattern, polarization="V")
    scene.rx_array = rt.PlanarArray(num_rows=1, num_cols=1, pattern="iso", polarization="V")
    roof = float(ground["height"].max())
    for number, (row, column) in enumerate(masts):
        x = cx - sx / 2 + (column + 0.5) * config.cell_m
        y = cy + sy / 2 - (row + 0.5) * config.cell_m
        height = min(config.mast_m, roof + 5) if roof > 0 else config.mast_m
        where = mitsuba.Point3f(float(x), float(y), float(z0 + height))
        scene.add(rt.Transmitter(name=f"tx{number}", position=where, power_dbm=config.power_dbm))
    found = rt.RadioMapSolver()(
        scene,
        center=mitsuba.Point3f(float(cx), float(cy), float(z0 + 1.5)),
        orientation=mitsuba.Point3f(0, 0, 0),
        size=mitsuba.Point2f(float(sx), float(sy)),
        cell_size=mitsuba.Point2f(config.cell_m, config.cell_m),
        samples_per_tx=config.samples_per_tx,
        max_depth=config.max_depth,
        diffraction=config.diffraction,
        seed=config.seed,
    )
    watts = np.array(found.rss, dtype=np.float64).sum(axis=0)
    return {"watts": watts[::-1]}  # its first row is in the south
