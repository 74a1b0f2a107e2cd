"""`handmstn enroll`: pictures of known people -> vectors in a gallery; pictures without a hand are left out and named."""

import dataclasses
import sys
import warnings
from pathlib import Path

import numpy as np

from handmstn.commands._files import embedded, first_of, left_out, nothing_left, read, trained, wanted
from handmstn.config import EnrollSettings
from handmstn.data import with_ids
from handmstn.gallery import Enrolled, Gallery
from handmstn.models import head_of
from handmstn.naming import numbered
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: EnrollSettings, invocation: Invocation) -> None:
    """Enroll, and write ``enrolled.json``."""
    model, card, _ = trained(settings.run)
    read_hands = with_ids(read(settings, card, model), settings.data)
    hands = wanted(settings.reading, read_hands, settings.split, "gallery")
    names, counts = np.unique(hands.persons, return_counts=True)
    if counts.min() < settings.images_each:
        name = names[int(counts.argmin())]
        raise UserError(
            f"'{name}' has {numbered(int(counts.min()))}, --images_each asks for {settings.images_each}: add pictures or"
            " lower it"
        )
    head = head_of(model, card)
    gallery = Gallery(head, path=Path(settings.gallery).expanduser())
    found = embedded(settings, model, hands)
    _warn_of_mixed_sides(found.hands.persons, found.hands.sides, found.right)
    kept = found.part(found.shown)
    if not len(kept.hands):
        raise nothing_left(settings.data, found)
    held = kept.enrolled
    if kept.hands.files:  # so that a sheet can show the picture as long as it is there
        held = dataclasses.replace(held, names=np.asarray([str(f.resolve()) for f in kept.hands.files], dtype=np.str_))
    added = gallery.enroll(held, purpose=settings.purpose, image_source=settings.data)
    _warn_of_shared_pictures(held, gallery.enrolled)
    people = sorted(set(kept.hands.persons.tolist()))
    hidden = left_out(found)
    answer = {
        "added": added,
        "already there": len(kept.hands) - added,
        "not assessable": hidden,
        "people": people,
        "guessed": {n: g for n, g in zip(kept.hands.names.tolist(), kept.hands.guessed.tolist(), strict=True) if g},
    }
    invocation.folder.write_json("enrolled.json", answer)
    rows = [[name, int((kept.hands.persons == name).sum())] for name in people[:20]]
    sys.stdout.write(table(["person", "pictures"], rows) + "\n")
    sys.stdout.write(
        f"{numbered(added)} added to {settings.gallery} ({answer['already there']} were there already), now {len(gallery)}\n"
    )
    if hidden:
        sys.stdout.write(f"not assessable, not enrolled: {first_of(hidden)}\n")


def _warn_of_shared_pictures(added: Enrolled, everyone: Enrolled) -> None:
    """Warn of pictures that are enrolled for two people, today or earlier, under whatever names of files."""
    owners: dict[str, set[str]] = {}
    for digest, person in zip(everyone.digests.tolist(), everyone.persons.tolist(), strict=True):
        owners.setdefault(digest, set()).add(person)
    shared = [row for row, digest in enumerate(added.digests.tolist()) if digest and len(owners[digest]) > 1]
    if shared:
        people = " and ".join(f"'{person}'" for person in sorted(owners[str(added.digests[shared[0]])]))
        warnings.warn(
            f"enrolled for several people now: {numbered(len(shared))}, the first, {added.names[shared[0]]}, for {people}",
            stacklevel=2,
        )


def _warn_of_mixed_sides(persons: object, sides: object, right: object) -> None:
    """Warn of pictures whose told side does not look like it."""
    told = np.asarray(sides) != "unknown"
    odd = told & (np.asarray(right) < 0.1)
    if odd.any():
        name = np.asarray(persons)[odd][0]
        warnings.warn(
            f"{numbered(int(odd.sum()))} {'looks' if odd.sum() == 1 else 'look'} like the other side than listed (guessed), the"
            f" first of '{name}':"
            " are left and right mixed up, or are they mirrored (--reading.mirrored true)?",
            stacklevel=2,
        )
