"""Where to measure next: where the error bars are widest, one place after the other."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from radiogat.samples import Grid, RadioSamples
from tenfold import UserError

Floats = NDArray[np.float64]


def suggest_places(grid: Grid, error_bar: ArrayLike, count: int, reach: float) -> Floats:
    """Greedy choice of places whose measurement takes the most variance.

    The errors of two cells are taken as correlated by r = exp(-3 d / reach); a measurement at c leaves
    var(p) (1 - r(p, c)^2) at p, and the next place is where the most variance is left.

    Args:
        grid: grid of the map.
        error_bar: (H, W) in dB, NaN where no measurement is possible.
        count: number of places.
        reach: distance at which the correlation has fallen to 5 %; see ``reach_of``.

    Returns:
        (count, 2) positions, the most useful first.

    Raises:
        UserError: there are fewer cells than that.
    """
    if np.isinf(error_bar).any():
        raise UserError(
            "the error bars are infinite, since too few measurements were held out: measure more places first"
        )
    variance = np.where(np.isfinite(error_bar), np.asarray(error_bar, dtype=np.float64), 0.0) ** 2
    if count < 1 or count > int((variance > 0).sum()):
        raise UserError(f"{count} places were asked for, of {int((variance > 0).sum())} that could be measured")
    centers = grid.centers().reshape(*grid.shape, 2)
    radius = int(np.ceil(2 * reach / grid.cell))
    chosen = np.empty((count, 2))
    for number in range(count):
        row, column = np.unravel_index(int(variance.argmax()), variance.shape)
        chosen[number] = centers[row, column]
        rows = slice(max(0, row - radius), row + radius + 1)
        columns = slice(max(0, column - radius), column + radius + 1)
        apart = np.sqrt(((centers[rows, columns] - chosen[number]) ** 2).sum(axis=2))
        variance[rows, columns] *= 1 - np.exp(-6 * apart / reach)
        variance[row, column] = 0.0
    return chosen


def reach_of(samples: RadioSamples) -> float:
    """Distance over which a measurement informs: the range of the measurements' variogram, within the area.

    The bands are fitted together, each without its mean; the range is at least the distance between neighboring places and at
    most a third of the area's diagonal.
    """
    from radiogat.baselines import Variogram

    values = samples.rss_dbm.copy()
    for f in samples.bands:
        values[samples.freq_mhz == f] -= values[samples.freq_mhz == f].mean()
    places, label = np.unique(samples.xy, axis=0, return_inverse=True)
    mean = np.bincount(label.ravel(), values) / np.bincount(label.ravel())
    diagonal = float(np.hypot(*np.ptp(samples.xy, axis=0)))
    far = float(np.clip(10 * samples.spacing, diagonal / 20, diagonal / 3))
    found = Variogram.fit(places, mean, max(far, 1e-9)).range
    return float(np.clip(found, samples.spacing, max(samples.spacing, diagonal / 3)))
