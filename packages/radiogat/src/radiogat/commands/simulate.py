"""`radiogat simulate`: complete maps of a procedural city or of a ray-traced one, and measurements drawn from them."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radiogat.config import SimulateSettings
from radiogat.data import write_maps, write_samples
from radiogat.maps import write_csv
from radiogat.pictures import map_picture, slope_picture
from radiogat.raytrace import trace
from radiogat.samples import RadioMaps
from radiogat.simulate import city, semivariogram
from radiogat.spectral import fit_spectrum
from tenfold.cli import Invocation
from tenfold.runs import Run
from tenfold.terminal import track

Arrays = dict[str, NDArray[Any]]


def run(settings: SimulateSettings, invocation: Invocation) -> None:
    """Write ``maps.npz``, ``samples.csv``, ``transmitters.csv`` and pictures, and print what the maps are like."""
    folder = invocation.folder
    maps = city(settings.city) if settings.backend == "city" else traced(settings, folder, quiet=invocation.quiet)
    write_maps(folder.own("maps.npz"), maps)
    samples = maps.samples(maps.draw(settings.rate, settings.seed))
    write_samples(folder.own("samples.csv"), samples)
    scene, building = maps.scene, maps.building
    assert building is not None
    assert scene.transmitters is not None
    write_csv(folder.own("transmitters.csv"), ["x", "y"], list(scene.transmitters.T))
    path = folder.figure("maps")
    map_picture(path, scene.grid, maps.freq_mhz, maps.rss_dbm, building=building, transmitters=scene.transmitters)
    unheard = float(np.isnan(maps.rss_dbm[:, ~building]).mean())
    gamma = ", ".join(f"{lag}: {value:.1f}" for lag, value in semivariogram(maps.rss_dbm[0]).items())
    lines = [
        f"{maps.name}: {maps.rss_dbm.shape[1]} x {maps.rss_dbm.shape[2]} cells of {maps.cell:g} m",
        f"built up {building.mean():.1%}; free cells without power {unheard:.1%}",
        f"semivariance (dB^2) by lag in cells at {maps.freq_mhz[0]:g} MHz: {gamma}",
    ]
    if len(maps.freq_mhz) > 1:
        _, slope = fit_spectrum(maps.freq_mhz, maps.rss_dbm)
        slope_picture(folder.figure("spectral-slope"), scene.grid, slope, building)
        low, middle, high = np.nanpercentile(slope, [1, 50, 99])
        lines.append(f"spectral slope (dB per decade), 1 %, median, 99 %: {low:.1f}, {middle:.1f}, {high:.1f}")
    lines.append(
        f"{len(samples)} measurements: {folder.path / 'samples.csv'}; complete maps: {folder.path / 'maps.npz'}"
    )
    sys.stdout.write("\n".join(lines) + "\n")


def traced(settings: SimulateSettings, folder: Run, *, quiet: bool) -> RadioMaps:
    """The maps of a ray-traced scene; bands that an earlier attempt has traced are taken from its files."""

    def cached(name: str, compute: Callable[[], Arrays]) -> Arrays:
        path = folder.path / "cache" / f"{name}.npz"
        if not path.exists():
            values = compute()
            with folder.replacing(f"cache/{name}.npz") as temporary:
                np.savez_compressed(temporary, **values)  # type: ignore[arg-type]
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    return trace(settings.sionna, cached, lambda bands: track(bands, "tracing bands", quiet=quiet))
