"""Batches of P identities with K pictures each, as an order for ``tenfold.loading.KeyedLoader``."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from handmstn.naming import numbered
from tenfold import UserError, distributed


def people_and_views(
    classes: Sequence[str] | NDArray[np.str_],
    people: int,
    views: int,
    batches: int | None = None,
    *,
    devices: int | None = None,
) -> Callable[[torch.Generator], list[list[int]]]:
    """An order of P x K batches.

    Each pass draws the identities without repetition and takes P at a time; on several devices, the batches of one step hold
    different people. Of an identity with more than K pictures, K are drawn.

    Args:
        classes: class of each picture.
        people: P.
        views: K.
        batches: batches per epoch over all devices; default: one pass.
        devices: number of devices that share the batches; default: the processes of the process group.

    Raises:
        UserError: an identity has fewer than K pictures (the message names it), or there are fewer than P.
    """
    ids = np.asarray(classes)
    found, index, counts = np.unique(ids, return_inverse=True, return_counts=True)
    if counts.min() < views:
        name = found[int(counts.argmin())]
        raise UserError(
            f"'{name}' has {numbered(int(counts.min()))}, batches of --views {views} need {views} of each identity: lower"
            " --views"
        )
    world = devices or distributed.world_size()
    if len(found) < people * world:
        each = f" on each of {world} devices" if world > 1 else ""
        raise UserError(f"{len(found)} identities do not fill a batch of --people {people}{each}: lower --people")
    rows = [np.flatnonzero(index == number) for number in range(len(found))]

    def order(generator: torch.Generator) -> list[list[int]]:
        per_pass = len(found) // people // world * world
        wanted = batches or per_pass
        made: list[list[int]] = []
        while len(made) < wanted:
            shuffled = torch.randperm(len(found), generator=generator).tolist()
            for number in range(per_pass):
                batch = []
                for person in shuffled[number * people : (number + 1) * people]:
                    chosen = torch.randperm(len(rows[person]), generator=generator)[:views].tolist()
                    batch += [int(rows[person][i]) for i in chosen]
                made.append(batch)
        return made[:wanted]

    return order
