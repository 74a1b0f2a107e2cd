"""What is held out, and what it is asked: places, at the distances from the measurements at which the map is read.

Measurements along streets lie a meter apart, the map between the streets is read fifty meters from any of them. Leaving out one
measurement then asks an easier question than the map does. So a held-out place is predicted without what lies within a radius,
several radii in turn, and the errors are weighted such that the distances to the nearest measurement that is left are those of
the map's cells.

Legend: S samples, N held-out cases (a measurement and a radius), C cells of the map.
"""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from radiogat.samples import Grid, RadioSamples, RadioScene
from tenfold import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_CELLS = 4000
"""Cells of the map whose distances are looked at."""
_CASES = 6000
"""Held-out cases at most."""
_LEVELS = (0.15, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Quantiles of the map's distances that become radii."""
_DISCS = 16
"""Discs in a fifth of the places from which on one round is enough; with fewer, each place is held out in one of several."""
_ROUNDS = 4
_FARTHER = 2.5
"""A radius is tried from this many times the distance between neighboring places on; random places need none."""
_LEAST = 12
"""Cases that a stratum of distances has at least, or it is merged with the next one."""


def places_of(xy: ArrayLike) -> tuple[Floats, Ints]:
    """The different places (P, 2), and the number of each measurement's place (S)."""
    points = np.asarray(xy, dtype=np.float64)
    places, label = np.unique(points, axis=0, return_inverse=True)
    return places, label.ravel().astype(np.int64)


def map_distances(
    samples: RadioSamples, scene: RadioScene | None = None, where: Grid | ArrayLike | None = None, seed: int = 0
) -> Floats:
    """(C) distances to the nearest measurement, of free cells of the map, drawn.

    Args:
        samples: the measurements.
        scene: its grid and buildings, where they are known.
        where: the map's grid or places; default: the scene's grid, or the rectangle around the measurements.
        seed: seed of the draw.
    """
    rng = np.random.default_rng([seed, 7])
    if where is not None and not isinstance(where, Grid):
        cells = np.asarray(where, dtype=np.float64).reshape(-1, 2)
    else:
        grid = where if where is not None else None if scene is None else scene.grid
        if grid is None:
            low, high = samples.xy.min(axis=0), samples.xy.max(axis=0)
            cells = low + rng.random((_CELLS, 2)) * (high - low)
        else:
            count = grid.height * grid.width
            flat = rng.integers(count, size=4 * _CELLS) if count > 4 * _CELLS else np.arange(count)
            row, column = flat // grid.width, flat % grid.width
            cells = np.stack([grid.x0 + (column + 0.5) * grid.cell, grid.y0 - (row + 0.5) * grid.cell], axis=1)
            if scene is not None and scene.building is not None:
                at = scene.grid.rowcol(cells)
                inside = scene.grid.inside(cells)
                at = np.clip(at, 0, np.array(scene.grid.shape) - 1)
                free = ~(scene.building[at[:, 0], at[:, 1]] & inside)
                cells = cells[free] if free.any() else cells
    if len(cells) > _CELLS:
        cells = cells[rng.permutation(len(cells))[:_CELLS]]
    distance = cKDTree(samples.xy).query(cells)[0]
    apart = distance[distance > 0]  # a cell that was measured is not asked
    return np.sort(apart if len(apart) else distance)


def place_groups(xy: ArrayLike, distances: Floats) -> Ints:
    """(S) label of the group that a measurement is held out with: what lies in a square of twice the map's median distance."""
    points = np.asarray(xy, dtype=np.float64)
    side = max(2 * float(np.median(distances)), 1e-9)
    at = np.floor((points - points.min(axis=0)) / side).astype(np.int64)
    return places_of(at)[1]


def beyond(tree: cKDTree, xy: Floats, k: int, radius: Floats) -> tuple[Floats, Ints]:
    """Distances and indices (Q, k) of the nearest points that lie farther than a radius (Q), ties in the order of the points.

    Raises:
        UserError: there are fewer for one of the queries.
    """
    if k < 1 or tree.n < k:
        raise UserError("too few places were measured: a measurement has no neighbor at another place")
    distance, index = np.full((len(xy), k), np.inf), np.zeros((len(xy), k), dtype=np.int64)
    left, more = np.arange(len(xy)), min(tree.n, 2 * k + 2)
    while len(left):
        waiting = []
        for start in range(0, len(left), max(1, (1 << 22) // more)):
            rows = left[start : start + max(1, (1 << 22) // more)]
            near, which = tree.query(xy[rows], k=list(range(1, more + 1)), workers=-1)
            near = np.where(near > radius[rows, None] * (1 + 1e-12), near, np.inf)
            order = np.lexsort((which, near), axis=1)[:, :k]
            near, which = np.take_along_axis(near, order, 1), np.take_along_axis(which, order, 1)
            done = np.isfinite(near).all(axis=1)
            distance[rows[done]], index[rows[done]] = near[done], which[done]
            waiting.append(rows[~done])
        left = np.concatenate(waiting)
        if len(left) and more == tree.n:
            raise UserError("too few places were measured: a measurement has no neighbor at another place")
        more = min(tree.n, 3 * more)
    return distance, index


def strata_weights(achieved: Floats, asked: Floats, strata: int = 10) -> tuple[Floats, float]:
    """Weights (N), of sum one, under which the held-out cases' distances are spread as the map's; and the share beyond all.

    Args:
        achieved: (N) distances of the cases to the nearest measurement that they are predicted from.
        asked: (C) distances of the map's cells to the nearest measurement.
        strata: number of parts, of equal shares of the map, that the distances are cut into; those with few cases are merged.
    """
    edges = np.unique(np.quantile(asked, np.linspace(0, 1, strata + 1)[1:-1]))
    of_case, of_cell = np.searchsorted(edges, achieved), np.searchsorted(edges, asked)
    cases = np.bincount(of_case, minlength=len(edges) + 1)
    cells = np.bincount(of_cell, minlength=len(edges) + 1) / len(asked)
    least = min(_LEAST, max(1, len(achieved) // 2))
    merged = np.zeros(len(cases), dtype=np.int64)
    group, held = 0, 0
    for i, count in enumerate(cases):
        merged[i] = group
        held += count
        if held >= least and cases[i + 1 :].sum() >= least:
            group, held = group + 1, 0
    total = np.bincount(merged, cases, minlength=group + 1)
    share = np.bincount(merged, cells, minlength=group + 1)
    weight = (share / np.maximum(total, 1))[merged[of_case]]
    return weight / weight.sum(), float((asked > achieved.max() * (1 + 1e-9)).mean())


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Cases on which models are judged, chosen between and calibrated.

    Args:
        targets: (R, S) measurements that a model may be trained to predict, in each round.
        round: (N) round of each case.
        rows: (N) measurement of each case.
        radius: (N) what lies within it is no donor.
        distance: (N) from the nearest measurement that is left.
        weight: (N) of sum one, see ``strata_weights``.
        place: (N) number of the case's place.
        disc: (N) number of its disc: errors within one are alike.
        beyond: share of the map that lies farther from all measurements than any case.
        levels: the radii that a model should be trained with.
    """

    targets: Bools
    round: Ints
    rows: Ints
    radius: Floats
    distance: Floats
    weight: Floats
    place: Ints
    disc: Ints
    beyond: float
    levels: tuple[float, ...]

    @property
    def effective(self) -> float:
        """Number of places that the weights amount to."""
        total = np.bincount(self.place, self.weight)
        return float(1 / (total**2).sum())

    def said(self) -> str:
        """In words, how far the check reaches."""
        places = len(np.unique(self.place))
        text = f"{len(self.rows)} held-out cases at {places} places, {self.distance.min():.3g} to"
        text += f" {self.distance.max():.3g} from the nearest measurement, weighted as the map's cells are"
        if self.beyond >= 0.001:
            text += f"; {self.beyond:.1%} of the map lies farther from any measurement than all that was checked"
        return text


def hold_out(samples: RadioSamples, asked: Floats, share: float = 0.2, enough: int = 60, seed: int = 0) -> HeldOut:
    """Discs of places that train nothing, and in them the cases: every place at radius 0, and at those that the disc allows.

    A case's radius reaches no farther than the nearest place outside of the discs, so that no model is trained on what the case
    may not be predicted from. Where a fifth of the places holds few discs, there are several rounds, which together hold out
    every place once: along streets few discs say little.

    Args:
        samples: the measurements.
        asked: the map's distances, of ``map_distances``.
        share: share of the places in the discs, about, where one round is enough.
        enough: places that are wanted in them, up to half of all.
        seed: seed of the draw.

    Raises:
        UserError: there is one place alone.

    Source: matching the distances of the held-out cases to those of the map is nearest neighbor distance matching (Mila et al.,
    Methods in Ecology and Evolution 13, 2022); discs, radii and weights are ours.
    """
    rng = np.random.default_rng([seed, 11])
    places, label = places_of(samples.xy)
    count = len(places)
    if count < 2:
        raise UserError("all measurements are at one place: measure more places")
    near = cKDTree(places).query(places[rng.permutation(count)[:500]], k=2)[0][:, 1] if count > 1 else np.ones(1)
    own = float(np.median(near))
    reach = max(1.4 * float(np.quantile(asked, 0.95)), own)
    disc = _discs(places, reach, rng)
    discs = int(disc.max()) + 1
    wanted = min(0.5, max(share, enough / count))
    if discs < 3:
        turn = np.arange(count) % min(5, count)  # one disc would hold out all
        rounds = 1
    elif discs * wanted >= _DISCS or min(enough, 0.5 * count) > wanted * count:
        turn = np.where(rng.permutation(discs) < max(1, round(discs * wanted)), 0, 1)[disc]
        rounds = 1
    else:
        rounds = min(_ROUNDS, discs)
        turn = (rng.permutation(discs) % rounds)[disc]
    levels = [0.0, *(float(q) for q in np.quantile(asked, _LEVELS) if q > 1.5 * own)]
    parts: list[tuple[Ints, Floats, Ints]] = []
    targets = np.stack([(turn != number)[label] for number in range(rounds)])
    for number in range(rounds):
        held = np.flatnonzero(turn == number)
        edge = np.full(count, -np.inf)
        edge[held] = cKDTree(places[turn != number]).query(places[held])[0]
        rows = np.flatnonzero(~targets[number])
        for level in levels:
            good = rows[edge[label[rows]] > level]
            parts.append((good, np.full(len(good), level), np.full(len(good), number)))
    rows, radius, turns = (np.concatenate(each) for each in zip(*parts, strict=True))
    if len(rows) > _CASES:
        some = np.sort(rng.permutation(len(rows))[:_CASES])
        rows, radius, turns = rows[some], radius[some], turns[some]
    left = count - cKDTree(places).query_ball_point(samples.xy[rows], radius, return_length=True)
    keep = left >= max(1, min(count - 1, count // 3))
    rows, radius, turns = rows[keep], radius[keep], turns[keep]
    distance = beyond(cKDTree(places), samples.xy[rows], 1, radius)[0][:, 0]
    weight, far = strata_weights(distance, asked)
    which = label[rows]
    return HeldOut(targets, turns, rows, radius, distance, weight, which, disc[which], far, tuple(levels))


def _discs(places: Floats, reach: float, rng: np.random.Generator) -> Ints:
    """(P) number of the disc that each place belongs to: of the nearest center, where centers are no nearer than ``reach``."""
    tree = cKDTree(places)
    free = np.ones(len(places), dtype=bool)
    centers = []
    for center in rng.permutation(len(places)):
        if free[center]:
            centers.append(center)
            free[tree.query_ball_point(places[center], reach)] = False
    return np.asarray(cKDTree(places[centers]).query(places)[1], dtype=np.int64)
