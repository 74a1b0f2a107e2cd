"""Who is in the gallery and who is searched for: the protocols of the data sets that people report on."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from handmstn.naming import numbered
from tenfold import UserError

Rows = NDArray[np.int64]
HALVES = {("dorsal", "right"): 1050, ("dorsal", "left"): 1037, ("palmar", "right"): 1051, ("palmar", "left"): 1042}
"""11k Hands: last id of the training half, by view and side."""


def odd_even(names: Sequence[str]) -> tuple[Rows, Rows]:
    """NTU-PI: pictures of odd index are the gallery, those of even index the probes; the index is the number after L or R.

    Raises:
        UserError: a name without an index.
    """
    numbers = []
    for name in names:
        match = re.search(r"-[LR](\d+)-", str(name), re.IGNORECASE)
        if match is None:
            raise UserError(f"{name}: expected <subject>-L<index>-Class<id> or -R<index>-")
        numbers.append(int(match[1]))
    odd = np.asarray(numbers) % 2 == 1
    return np.flatnonzero(odd), np.flatnonzero(~odd)


def drawn_galleries(classes: Sequence[str] | NDArray[np.str_], draws: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """11k and HD: one random picture of each class is the gallery, the rest are probes; ``draws`` times.

    Raises:
        UserError: a class has one picture only, so that it would have no probe; the message names the first.
    """
    ids = np.asarray(classes)
    found, counts = np.unique(ids, return_counts=True)
    if (counts < 2).all():
        raise UserError(f"'{found[0]}' has one picture: a gallery and a probe need two")
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        chosen = np.asarray([rng.choice(np.flatnonzero(ids == name)) for name in found])
        yield np.sort(chosen), np.setdiff1d(np.arange(len(ids)), chosen)


def first_each(classes: Sequence[str] | NDArray[np.str_], each: int) -> tuple[Rows, Rows]:
    """The first ``each`` pictures of every class are the gallery, the rest are probes.

    Raises:
        UserError: nothing is left to be searched for.
    """
    ids = np.asarray(classes)
    seen: dict[str, int] = {}
    inside = np.zeros(len(ids), np.bool_)
    for row, name in enumerate(ids.tolist()):
        seen[name] = seen.get(name, 0) + 1
        inside[row] = seen[name] <= each
    if inside.all():
        name = max(seen, key=lambda key: seen[key])
        raise UserError(
            f"no class has more than {numbered(each)} ('{name}' has {seen[name]}): nothing is left to search for;"
            " lower --gallery_each"
        )
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def strangers(persons: Sequence[str] | NDArray[np.str_], share: float, seed: int) -> NDArray[np.bool_]:
    """Whether each picture's person is kept out of the gallery, so that the set is open.

    Raises:
        UserError: fewer than two people.
    """
    ids = np.asarray(persons)
    found = np.unique(ids)
    if len(found) < 2:
        raise UserError(f"an open set needs two people or more, got {len(found)}")
    count = min(len(found) - 1, max(1, round(share * len(found))))
    out = np.random.default_rng((seed, 1)).permutation(found)[:count]
    return np.isin(ids, out)


def halves(persons: Sequence[str] | NDArray[np.str_], last: int | None = None) -> NDArray[np.bool_]:
    """Whether each picture belongs to the training half: ids up to ``last``, or the first half of the sorted people."""
    ids = np.asarray(persons)
    if last is not None and all(re.fullmatch(r"\d+", name) for name in ids.tolist()):
        return ids.astype(np.int64) <= last
    found = np.unique(ids)
    return np.isin(ids, found[: len(found) // 2])


def check_disjoint(train: Sequence[str] | NDArray[np.str_], test: Sequence[str] | NDArray[np.str_]) -> None:
    """Check that nobody who is tested was trained on.

    Raises:
        UserError: some were; the message lists the first of them.
    """
    shared = sorted(set(np.asarray(train).tolist()) & set(np.asarray(test).tolist()))
    if shared:
        more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(
            f"{len(shared)} identities are in the training data as well: {', '.join(shared[:5])}{more}; a cross-data"
            " evaluation needs other people (rename ids that only look alike)"
        )
