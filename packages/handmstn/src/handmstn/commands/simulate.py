"""`handmstn simulate`: rendered hands as PNG files, with a list that the other commands take."""

import csv
import io
import sys

from PIL import Image

from handmstn.config import SimulateSettings
from handmstn.lists import as_rows
from handmstn.records import hands_of
from handmstn.rendering import SyntheticHands
from tenfold.cli import Invocation


def run(settings: SimulateSettings, invocation: Invocation) -> None:
    """Write ``pictures/ID/NN.png`` and ``hands.csv``."""
    made = SyntheticHands(
        settings.people, settings.views, settings.size, settings.seed, 0, settings.domain, upright=settings.upright
    )
    persons = [f"{settings.seed}-{label:04d}" for label in made.labels.tolist()]  # other seeds are other people
    names = [f"pictures/{person}/{i % settings.views:02d}.png" for i, person in enumerate(persons)]
    folder = invocation.folder
    for name, image in zip(names, made.rendered.images, strict=True):
        with folder.replacing(name) as path:
            Image.fromarray(image.transpose(1, 2, 0)).save(path, "PNG")
    each = settings.gallery_each
    splits = [("gallery" if i % settings.views < each else "probe") if each else "" for i in range(len(made))]
    hands = hands_of(
        names, persons, "rendered", sides=["right"] * len(made), views=["palmar"] * len(made), splits=splits,
        points=made.rendered.points,
    )  # fmt: skip
    headers, rows = as_rows(hands, [(settings.size, settings.size)] * len(made))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([headers, *rows])
    folder.write_text("hands.csv", text.getvalue())
    sys.stdout.write(
        f"{len(made)} rendered hands of {settings.people} people in {folder.path}; they are read by"
        f" --data csv:{folder.path / 'hands.csv'} (with the points of hand6) or imagefolder:{folder.path / 'pictures'}\n"
    )
