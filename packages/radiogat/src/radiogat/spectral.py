"""Power over frequency as a straight line in log10 f: level and slope of every place, and from them any frequency."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radiogat.graph import check_frequency
from tenfold import UserError

Floats = NDArray[np.float64]

FREE_SPACE = -20.0
"""dB per decade: how received power falls with frequency in free space between antennas of constant gain."""


def reference_frequency(freq_mhz: ArrayLike) -> float:
    """f_0, the geometric mean of the bands."""
    return float(np.exp(np.mean(np.log(np.unique(np.asarray(freq_mhz, dtype=np.float64))))))


def free_space_shift(from_mhz: ArrayLike, to_mhz: ArrayLike) -> Floats:
    """dB that free space adds to a power on the way from one frequency to another: 20 log10(from / to)."""
    ratio = np.asarray(to_mhz, dtype=np.float64) / np.asarray(from_mhz, dtype=np.float64)
    return np.asarray(FREE_SPACE * np.log10(ratio))


def fit_spectrum(freq_mhz: ArrayLike, power_dbm: ArrayLike) -> tuple[Floats, Floats]:
    """Least squares of P(f) = a + b log10(f / f_0) at every place.

    Args:
        freq_mhz: (F) bands; with one band the slope is that of free space.
        power_dbm: (F, ...) in dBm; NaN stays NaN.

    Returns:
        level a (...) in dBm at ``reference_frequency(freq_mhz)``, and slope b (...) in dB per decade.
    """
    f = np.array([check_frequency(float(each)) for each in np.atleast_1d(np.asarray(freq_mhz))])
    P = np.asarray(power_dbm, dtype=np.float64)
    if P.shape[0] != len(f):
        raise UserError(f"{len(f)} frequencies, but {P.shape[0]} maps of power")
    u = np.log10(f / reference_frequency(f))
    level = P.mean(axis=0)
    if len(np.unique(f)) < 2:
        return level, np.full(P.shape[1:], FREE_SPACE)
    centered = u - u.mean()
    slope = np.tensordot(centered, P, axes=1) / (centered**2).sum()
    return level - slope * u.mean(), slope


def spectrum_at(level: ArrayLike, slope: ArrayLike, reference_mhz: float, freq_mhz: float) -> Floats:
    """a + b log10(f / f_0) in dBm."""
    octaves = np.log10(check_frequency(freq_mhz) / reference_mhz)
    return np.asarray(np.asarray(level) + np.asarray(slope) * octaves)
