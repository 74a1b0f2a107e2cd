"""A city made of random blocks and streets, with masts and bands: complete maps whose truth is known.

Every choice is ours, modeled on the statistics of the authors' ray-traced areas: free space in sight, up to 25 dB of loss
behind buildings, a flatter spectrum in shadow, three-sector antennas, shadowing of 2 dB that the bands share.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from radiogat.config import CityConfig
from radiogat.depth import mast_distance, radio_depth
from radiogat.samples import RadioMaps

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def city(config: CityConfig | None = None) -> RadioMaps:
    """Complete maps of a procedural city.

        P_t(f) = P_0 + G(angle) - 32.4 - 20 log10 f_GHz - 20 log10 d_m - 25 (1 - e^(-6 (1 - T_t))) + relief_t(f) + S

    relief_t(f) = 8 (1 - e^(-6 (1 - T_t))) log10(f / f_1) flattens the spectrum in shadow, S is shadowing, the same in all
    bands; the masts' powers add in watts.

    Args:
        config: size, cell, masts, bands, shadowing and seed.
    """
    config = config or CityConfig()
    rng = np.random.default_rng(config.seed)
    building = _buildings(config, rng)
    masts = _masts(config, building, rng)
    depth = radio_depth(building, masts)
    distance = np.maximum(mast_distance(building.shape, masts) * config.cell_m, config.cell_m)
    shadow = 1 - np.exp(-6 * (1 - depth))
    rows, columns = np.mgrid[: config.size, : config.size]
    rss = np.zeros((len(config.freq_mhz), config.size, config.size))
    shadowing = _shadowing(config, rng)
    for t, (row, column) in enumerate(masts):
        angle = np.arctan2(rows - row, columns - column) - rng.uniform(0, 2 * np.pi / 3)
        gain = 6 * (np.cos(3 * angle) - 1)  # three sectors, 12 dB between them
        for f, freq in enumerate(config.freq_mhz):
            loss = 32.4 + 20 * np.log10(freq / 1000) + 20 * np.log10(distance[t]) + 25 * shadow[t]
            relief = 8 * shadow[t] * np.log10(freq / config.freq_mhz[0])
            rss[f] += 10 ** ((config.power_dbm + gain - loss + relief) / 10)
    rss = 10 * np.log10(rss) + shadowing
    rss[:, building] = np.nan
    return RadioMaps(rss, tuple(map(float, config.freq_mhz)), masts, f"city {config.seed}", config.cell_m, building)


def _buildings(config: CityConfig, rng: np.random.Generator) -> Bools:
    mask = np.zeros((config.size, config.size), dtype=bool)
    while mask.mean() < config.built:
        height, width = rng.integers(4, 16, size=2)
        row, column = rng.integers(0, config.size - np.array([height, width]))
        mask[row : row + height, column : column + width] = True
    streets = np.arange(rng.integers(8, 16), config.size, rng.integers(18, 28))
    for street in streets:  # none of them is built over
        mask[street : street + 3] = False
        mask[:, street : street + 3] = False
    return mask


def _masts(config: CityConfig, building: Bools, rng: np.random.Generator) -> NDArray[np.int64]:
    near = np.array([[0.25, 0.25], [0.25, 0.75], [0.75, 0.5], [0.75, 0.9], [0.5, 0.1], [0.9, 0.2]])
    wanted = np.concatenate([near, rng.uniform(0.1, 0.9, (max(0, config.n_tx - len(near)), 2))])[: config.n_tx]
    free = np.argwhere(~building)
    picked = [np.abs(free - spot * config.size).sum(axis=1).argmin() for spot in wanted]
    return np.asarray(free[picked])


def _shadowing(config: CityConfig, rng: np.random.Generator) -> Floats:
    """A field of given deviation whose correlation falls about exponentially: a sum over three lengths."""
    shape = (config.size, config.size)
    field = np.zeros(shape)
    for part, weight in ((0.35, 0.4), (0.8, 0.4), (2.0, 0.2)):
        layer = gaussian_filter(rng.standard_normal(shape), part * config.shadowing_cells, mode="wrap")
        field += np.sqrt(weight) * layer / layer.std()
    return np.asarray(config.shadowing_db * field / field.std())


def along_streets(maps: RadioMaps, apart: int, every: int = 1, bands: int | None = None) -> Bools:
    """(F, H, W) cells that a drive test measures: every so many cells along rows and columns so far apart, buildings left out.

    Args:
        maps: the area.
        apart: cells between two streets that are driven.
        every: cells between two measurements on a street.
        bands: number of bands that are measured, from the first; default: all.
    """
    height, width = maps.rss_dbm.shape[1:]
    driven = np.zeros((height, width), dtype=bool)
    driven[apart // 2 :: apart, ::every] = True
    driven[::every, apart // 2 :: apart] = True
    observed = np.isfinite(maps.rss_dbm) & driven
    if bands is not None:
        observed[bands:] = False
    return np.asarray(observed)


def at_places(maps: RadioMaps, count: int, seed: int) -> Bools:
    """(F, H, W) random cells at each of which all bands are measured.

    Args:
        maps: the area.
        count: number of cells.
        seed: seed of the draw.
    """
    free = np.flatnonzero(np.isfinite(maps.rss_dbm).all(axis=0))
    mask = np.zeros(maps.rss_dbm.shape[1:], dtype=bool)
    mask.flat[np.random.default_rng(seed).permutation(free)[:count]] = True
    return np.broadcast_to(mask, maps.rss_dbm.shape).copy()


def semivariogram(power_dbm: Floats, lags: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)) -> dict[int, float]:
    """Half of the mean squared difference in dB^2 between cells so many columns apart, of one map (H, W)."""
    return {
        lag: float(np.nanmean((power_dbm[:, lag:] - power_dbm[:, :-lag]) ** 2) / 2)
        for lag in lags
        if lag < power_dbm.shape[1]
    }
