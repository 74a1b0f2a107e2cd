"""`handmstn remove`: delete a person's vectors from a gallery; the log keeps that it was done."""

import sys

from handmstn.config import RemoveSettings
from handmstn.gallery import Gallery
from handmstn.naming import numbered
from tenfold.cli import Invocation


def run(settings: RemoveSettings, invocation: Invocation) -> None:
    """Remove, and say how many pictures' vectors are gone."""
    gallery = Gallery.open(settings.gallery)
    count = gallery.remove(settings.person, purpose=settings.purpose)
    sys.stdout.write(
        f"{numbered(count)} of '{settings.person}' removed from {settings.gallery}, {numbered(len(gallery))} left\n"
    )
