"""The bar: inverse distances, local kriging, radial basis functions, shifts between bands. All with ``fit`` and ``predict``.

Each takes ``RadioSamples``; ``predict(xy, freq_mhz)`` gives dBm at (n, 2) positions. Interpolators of one band see that
band's samples only; pooled ones see all, each shifted to the band that is asked for.

Legend: Q queries (q of them at once), K neighbors, n samples.
"""

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator

from radiogat.heldout import beyond
from radiogat.samples import RadioSamples, RadioScene
from radiogat.spectral import free_space_shift
from tenfold import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_CHUNK = 1000
"""Queries whose systems are solved side by side; few enough to stay in the processor's cache."""


def nearest(tree: cKDTree, xy: Floats, k: int, exclude: Ints | None = None) -> tuple[Floats, Ints]:
    """Distances and indices (Q, k) of the nearest points, ties in the order of the points.

    Args:
        tree: tree of the points.
        xy: (Q, 2) queries.
        k: number of neighbors.
        exclude: (Q) index of a point that must not be found for each query (leaving it out), or None.

    Raises:
        UserError: fewer points than that.
    """
    spare = 0 if exclude is None else 1
    if k < 1:
        raise UserError("one measurement alone cannot be predicted from others: measure more places")
    if tree.n < k + spare:
        raise UserError(f"{tree.n} measurements, but {k + spare} neighbors are asked for: lower 'neighbors'")
    found = k + spare

    def query(places: Floats, count: int) -> tuple[Floats, Ints]:
        there: tuple[Floats, Ints] = tree.query(places, k=list(range(1, min(tree.n, count) + 1)), workers=-1)
        return there

    distance, index = query(xy, found + 1)
    tied = (distance[:, 1:] == distance[:, :-1]).T
    cut = np.flatnonzero(tied[-1]) if tree.n > found else np.empty(0, dtype=np.int64)
    if len(cut):  # a tie at the last distance is broken among a few more
        more, which = query(xy[cut], found + 4)
        order = np.lexsort((which, more), axis=1)[:, : found + 1]
        distance[cut], index[cut] = np.take_along_axis(more, order, 1), np.take_along_axis(which, order, 1)
    some = np.flatnonzero(tied.any(axis=0))
    order = np.lexsort((index[some], distance[some]), axis=1)
    index[some] = np.take_along_axis(index[some], order, 1)  # their distances are sorted
    distance, index = distance[:, :found], index[:, :found]
    if exclude is not None:
        keep = index != exclude[:, None]
        keep[:, -1] &= ~keep.all(axis=1)  # where it is not among the nearest, the farthest goes
        distance, index = distance[keep].reshape(-1, k), index[keep].reshape(-1, k)
    return distance, index


def donors(tree: cKDTree, xy: Floats, neighbors: int, radius: Floats | None = None) -> tuple[Floats, Ints]:
    """The nearest points, or as many as there are; with a radius (Q), those that lie farther.

    Raises:
        UserError: there is none.
    """
    if radius is None:
        return nearest(tree, xy, min(neighbors, tree.n))
    most = int(np.max(tree.query_ball_point(xy, radius * (1 + 1e-12), return_length=True), initial=0))
    if most >= tree.n:
        raise UserError("one measurement alone cannot be predicted from others: measure more places")
    return beyond(tree, xy, min(neighbors, tree.n - most), radius)


class _Interpolator(BaseEstimator):  # type: ignore[misc]
    """Fits by remembering, and predicts each band on its own."""

    def fit(self, samples: RadioSamples, scene: RadioScene | None = None) -> "_Interpolator":
        """Remember the samples; the scene is not used."""
        self.samples_ = samples
        self.trees_ = {f: (cKDTree((band := samples.band(f)).xy), band) for f in samples.bands}
        return self

    def predict(self, xy: ArrayLike, freq_mhz: float) -> Floats:
        """dBm (Q) at positions (Q, 2).

        Raises:
            UserError: the band has no measurement, or fewer than there are neighbors.
        """
        return self._band(np.asarray(xy, dtype=np.float64), float(freq_mhz), None)

    def _source(self, freq_mhz: float) -> tuple[cKDTree, RadioSamples]:
        if freq_mhz not in self.trees_:
            self.samples_.band(freq_mhz)  # says what there is
        return self.trees_[freq_mhz]

    def leave_one_out(self, freq_mhz: float) -> Floats:
        """What it predicts at each measurement of a band from the other places."""
        tree, band = self._source(freq_mhz)
        return self._band(band.xy, freq_mhz, np.zeros(tree.n))

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        raise NotImplementedError


class IDW(_Interpolator):
    """Inverse distances: sum_k d_k^-p v_k / sum_k d_k^-p over the nearest measurements of the band.

    Args:
        neighbors: number K of neighbors; as many as there are, where there are fewer.
        power: exponent p; the defaults are our choice.
    """

    def __init__(self, neighbors: int = 12, power: float = 3.0) -> None:
        self.neighbors = neighbors
        self.power = power

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        tree, band = self._source(freq_mhz)
        return idw(tree, band.rss_dbm, xy, self.neighbors, self.power, radius)


def idw(
    tree: cKDTree, values: Floats, xy: Floats, neighbors: int, power: float, radius: Floats | None = None
) -> Floats:
    """Inverse distance weighting; a query on a measurement takes its value."""
    distance, index = donors(tree, xy, neighbors, radius)
    weight = np.maximum(distance, 1e-9) ** -power
    return np.asarray((weight * values[index]).sum(axis=1) / weight.sum(axis=1))


@dataclasses.dataclass(frozen=True)
class Variogram:
    """gamma(d) = nugget + sill (1 - exp(-3 d / range)) for d > 0, and 0 at 0: half the variance between two places.

    Args:
        sill: dB^2, the partial sill.
        range: distance at which 95 % of it is reached.
        nugget: dB^2 that two measurements at almost one place differ by.
    """

    sill: float
    range: float
    nugget: float = 0.0

    def __call__(self, distance: Floats) -> Floats:
        """gamma in dB^2."""
        gamma = np.exp(distance * (-3 / self.range))
        gamma *= -self.sill
        gamma += self.nugget + self.sill
        gamma *= distance > 0
        return np.asarray(gamma)

    @classmethod
    def fit(cls, xy: Floats, values: Floats, reach: float, seed: int = 0) -> "Variogram":
        """Least squares over the empirical semivariances of pairs closer than ``reach``, at most 4,000 places drawn."""
        from scipy.optimize import least_squares

        rng = np.random.default_rng(seed)
        if len(xy) > 4000:  # a compact part, so that there are near pairs, around a random place
            center = xy[rng.integers(len(xy))]
            chosen = np.argsort(((xy - center) ** 2).sum(axis=1), kind="stable")[:2000]
            chosen = np.unique(np.concatenate([chosen, rng.choice(len(xy), 2000, replace=False)]))
            xy, values = xy[chosen], values[chosen]
        pairs = cKDTree(xy).query_pairs(reach, output_type="ndarray")
        if len(pairs) < 10:
            return cls(max(float(values.var()), 1e-6), 3 * reach)
        distance = np.sqrt(((xy[pairs[:, 0]] - xy[pairs[:, 1]]) ** 2).sum(axis=1))
        half = (values[pairs[:, 0]] - values[pairs[:, 1]]) ** 2 / 2
        bins = np.minimum((distance / reach * 15).astype(int), 14)
        count = np.bincount(bins, minlength=15)
        full = count > 0
        lag = np.bincount(bins, distance, 15)[full] / count[full]
        gamma = np.bincount(bins, half, 15)[full] / count[full]
        scale = max(float(gamma.max()), 1e-6)

        def residuals(p: Floats) -> Floats:
            return np.asarray((p[2] + p[0] * (1 - np.exp(-3 * lag / p[1])) - gamma) * np.sqrt(count[full]))

        start = [scale, 2 * reach, 0.05 * scale]
        bounds = ([1e-9, reach / 100, 0.0], [100 * scale, 100 * reach, 2 * scale])
        found = least_squares(residuals, start, bounds=bounds, x_scale=[scale, reach, scale]).x
        return cls(float(found[0]), float(found[1]), float(found[2]))


def krige(points: Floats, values: Floats, index: Ints, distance: Floats, variogram: Variogram) -> tuple[Floats, Floats]:
    """Ordinary kriging of each query from its own neighbors.

        m = 1' C^-1 v / 1' C^-1 1,   value = m + c' C^-1 (v - m 1),
        variance = C(0) - c' C^-1 c + (1 - 1' C^-1 c)^2 / 1' C^-1 1

    with the covariances C between the neighbors and c to the query. All that is needed are products of the rows
    1' L^-T, v' L^-T and c' L^-T, where C = L L'. They come out as three further rows of the Cholesky factor; and the
    systems of many queries lie side by side along the last axis, so that each step is one vector operation over all.

    Args:
        points: (n, 2) measured places.
        values: (n).
        index: (Q, K) neighbors of each query.
        distance: (Q, K) to them.
        variogram: C(d) = sill + nugget - gamma(d).

    Returns:
        Values and variances (Q). At a measured place the value is the measurement and the variance is 0.
    """
    Q, K = index.shape
    value, variance = np.empty(Q), np.empty(Q)
    nugget = variogram.nugget / variogram.sill  # all covariances in units of the sill
    x, y = np.ascontiguousarray(points.T) * (3 / variogram.range)
    ends = np.cumsum(range(K - 1, -1, -1))
    pairs = [slice(end - (K - 1 - k), end) for k, end in enumerate(ends)]  # of neighbor k with the later ones
    chunk = min(Q, _CHUNK)
    differences, factors = np.empty((2, K * (K - 1) // 2, chunk)), np.empty((K, K + 3, chunk))
    for start in range(0, Q, _CHUNK):
        part = slice(start, start + _CHUNK)
        near_Kq, far_Kq = np.ascontiguousarray(index[part].T), np.ascontiguousarray(distance[part].T)
        q = near_Kq.shape[1]
        xy_2Kq = np.stack([x[near_Kq], y[near_Kq]])
        apart, factor = differences[..., :q], factors[..., :q]
        for k in range(K):
            np.subtract(xy_2Kq[:, k + 1 :], xy_2Kq[:, k, None], out=apart[:, pairs[k]])
        apart *= apart
        apart[0] += apart[1]
        apart = np.negative(np.sqrt(apart[0], out=apart[0]), out=apart[0])
        for k in range(K):
            np.exp(apart[pairs[k]], out=factor[k, k + 1 : K])
            factor[k, k] = 1 + nugget
        factor[:, K], factor[:, K + 1] = 1.0, values[near_Kq]
        factor[:, K + 2] = np.exp(far_Kq * (-3 / variogram.range)) + nugget * (far_Kq == 0)
        for k in range(K):
            column = factor[k, k:]
            if k:
                column -= np.einsum("kiq,kq->iq", factor[:k, k:], factor[:k, k])
            column *= 1 / np.sqrt(np.maximum(column[0], 1e-12))  # without a nugget, two at one place count as one
        one, v, c = factor[:, K], factor[:, K + 1], factor[:, K + 2]
        total = (one * one).sum(axis=0)
        mean = (one * v).sum(axis=0) / total
        value[part] = mean + (c * (v - mean * one)).sum(axis=0)
        variance[part] = 1 + nugget - (c * c).sum(axis=0) + (1 - (one * c).sum(axis=0)) ** 2 / total
    return value, np.maximum(variance, 0.0) * variogram.sill


class LocalKriging(_Interpolator):
    """Ordinary kriging from the nearest measurements of the band, with an exponential variogram.

    Args:
        neighbors: number K of neighbors, or as many as there are.
        variogram: one for all bands; None fits one to each.
    """

    def __init__(self, neighbors: int = 16, variogram: Variogram | None = None) -> None:
        self.neighbors = neighbors
        self.variogram = variogram

    def fit(self, samples: RadioSamples, scene: RadioScene | None = None) -> "LocalKriging":
        """Remember the samples and fit the variograms; the scene is not used."""
        super().fit(samples, scene)
        self.variograms_ = {f: self.variogram or _variogram(tree, band) for f, (tree, band) in self.trees_.items()}
        return self

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        return self.predict_with_std(xy, freq_mhz, radius)[0]

    def predict_with_std(self, xy: ArrayLike, freq_mhz: float, radius: Floats | None = None) -> tuple[Floats, Floats]:
        """Values and kriging standard deviations (Q); ``radius`` (Q) leaves out what lies within."""
        tree, band = self._source(float(freq_mhz))
        points = np.asarray(xy, dtype=np.float64)
        distance, index = donors(tree, points, self.neighbors, radius)
        value, variance = krige(band.xy, band.rss_dbm, index, distance, self.variograms_[float(freq_mhz)])
        return value, np.sqrt(variance)


def _variogram(tree: cKDTree, band: RadioSamples) -> Variogram:
    if tree.n < 3:
        return Variogram(1.0, 1.0)
    k = min(16, tree.n - 1)
    reach = 2 * float(np.median(nearest(tree, band.xy[:2000], k)[0][:, -1]))
    return Variogram.fit(band.xy, band.rss_dbm, max(reach, 1e-9))


class RBF(_Interpolator):
    """scipy's radial basis functions over the nearest measurements of the band.

    Args:
        neighbors: number K of neighbors, or as many as there are.
        kernel: linear or thin_plate_spline.
    """

    def __init__(self, neighbors: int = 30, kernel: Literal["linear", "thin_plate_spline"] = "linear") -> None:
        self.neighbors = neighbors
        self.kernel = kernel

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        from scipy.interpolate import RBFInterpolator

        tree, band = self._source(freq_mhz)
        if radius is not None:
            raise NotImplementedError("radial basis functions have no fast leave-one-out")
        if tree.n < 3:
            raise UserError(f"{tree.n} measurements at {freq_mhz:g} MHz; radial basis functions need 3")
        out = RBFInterpolator(band.xy, band.rss_dbm, neighbors=min(self.neighbors, tree.n), kernel=self.kernel)(xy)
        return np.asarray(out)


class FreeSpaceShift(_Interpolator):
    """Another band's interpolation, shifted by free space: 20 log10(f_source / f).

    Args:
        source_mhz: the band that is interpolated; default: the measured band that is nearest to the one asked for, but not
            that band itself unless it is the only one.
        neighbors: number of neighbors of the inverse distances.
        power: exponent of the inverse distances.
    """

    def __init__(self, source_mhz: float | None = None, neighbors: int = 12, power: float = 3.0) -> None:
        self.source_mhz = source_mhz
        self.neighbors = neighbors
        self.power = power

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        others = [f for f in self.samples_.bands if f != freq_mhz] or list(self.samples_.bands)
        source = self.source_mhz or min(others, key=lambda f: abs(np.log(f / freq_mhz)))
        tree, band = self._source(source)
        return idw(tree, band.rss_dbm, xy, self.neighbors, self.power, radius) + free_space_shift(source, freq_mhz)


class _Pooled(_Interpolator):
    """All bands' samples, each band shifted to the one that is asked for."""

    def fit(self, samples: RadioSamples, scene: RadioScene | None = None) -> "_Pooled":
        """Remember the samples, and how far each band lies from each other one: the median over the former's places.

        At the places of band g, the difference is taken to band f's inverse-distance interpolation. A band with fewer than
        ``least`` measurements, or one that was not measured, is shifted by free space.
        """
        super().fit(samples, scene)
        self.tree_ = cKDTree(samples.xy)
        self.shifts_ = {f: {g: self._shift(g, f) for g in samples.bands} for f in samples.bands}
        return self

    least = 30

    def _shift(self, source: float, target: float) -> float:
        if source == target:
            return 0.0
        (_, there), (tree, band) = self.trees_[source], self.trees_[target]
        if min(len(there), len(band)) < self.least:
            return float(free_space_shift(source, target))
        return float(np.median(idw(tree, band.rss_dbm, there.xy, 12, 3.0) - there.rss_dbm))

    def shifted(self, freq_mhz: float) -> Floats:
        """(n) all samples as if they had been measured at this frequency."""
        shifts = self.shifts_.get(freq_mhz) or {g: float(free_space_shift(g, freq_mhz)) for g in self.samples_.bands}
        _, label = np.unique(self.samples_.freq_mhz, return_inverse=True)
        return np.asarray(self.samples_.rss_dbm + np.array([shifts[g] for g in self.samples_.bands])[label])

    def leave_one_out(self, freq_mhz: float) -> Floats:
        """What it predicts at each measurement of a band from the other places, of all bands."""
        rows = np.flatnonzero(self.samples_.freq_mhz == freq_mhz)
        return self._band(self.samples_.xy[rows], freq_mhz, np.zeros(len(rows)))


class PooledIDW(_Pooled):
    """Inverse distances over all bands' measurements, each band shifted by its median difference.

    Args:
        neighbors: number K of neighbors, or as many as there are.
        power: exponent p.
    """

    def __init__(self, neighbors: int = 12, power: float = 3.0) -> None:
        self.neighbors = neighbors
        self.power = power

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        return idw(self.tree_, self.shifted(freq_mhz), xy, self.neighbors, self.power, radius)


class PooledKriging(_Pooled):
    """Local kriging over all bands' measurements, each band shifted by its median difference.

    Two bands measured at one place are two measurements of it, and the variogram has a nugget for what they differ by.

    Args:
        neighbors: number K of neighbors, or as many as there are.
    """

    def __init__(self, neighbors: int = 16) -> None:
        self.neighbors = neighbors

    def fit(self, samples: RadioSamples, scene: RadioScene | None = None) -> "PooledKriging":
        """Remember the samples, the shifts, and a variogram over the shifted values."""
        super().fit(samples, scene)
        rng = np.random.default_rng(0)
        moved = samples.xy + rng.uniform(-1, 1, samples.xy.shape) * 1e-4 * samples.spacing  # no two at one place
        self.moved_ = moved
        self.tree_ = cKDTree(moved)
        reference = samples.bands[len(samples.bands) // 2]
        k = min(16, len(samples) - 1)
        reach = 2 * float(np.median(nearest(self.tree_, moved[:2000], max(1, k))[0][:, -1])) if k else 1.0
        found = Variogram.fit(moved, self.shifted(reference), max(reach, 1e-9))
        self.variogram_ = dataclasses.replace(found, nugget=max(found.nugget, 1e-3 * found.sill))
        return self

    def _band(self, xy: Floats, freq_mhz: float, radius: Floats | None) -> Floats:
        return self.predict_with_std(xy, freq_mhz, radius)[0]

    def predict_with_std(self, xy: ArrayLike, freq_mhz: float, radius: Floats | None = None) -> tuple[Floats, Floats]:
        """Values and kriging standard deviations (Q)."""
        points = np.asarray(xy, dtype=np.float64)
        if radius is not None:
            radius = np.maximum(radius, 1e-3 * self.samples_.spacing)  # what was moved apart is one place
        distance, index = donors(self.tree_, points, self.neighbors, radius)
        value, variance = krige(self.moved_, self.shifted(float(freq_mhz)), index, distance, self.variogram_)
        return value, np.sqrt(variance)
