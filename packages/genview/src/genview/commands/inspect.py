"""`genview inspect`: a contact sheet of sources, foregrounds and views."""

import sys
from typing import Any

from genview.commands import _files, _pictures
from genview.config import InspectSettings
from genview.data import json_lines, load, read_manifest, squared
from tenfold import UserError, readers
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.figures import image_grid
from tenfold.report import write_report


def run(settings: InspectSettings, invocation: Invocation) -> None:
    """Draw and write the sheet."""
    folder, device = invocation.folder, choose_device(settings.device)
    pictures = load(settings.data).train
    number = {key: i for i, key in enumerate(pictures.keys)}
    rows: list[dict[str, Any]]
    views = None
    if settings.views is not None:
        views = read_manifest(settings.views)
        listed = [row for row in json_lines(views.path) if row.get("status") in {"ok", "dropped"}]
        rows = [row for row in listed if row["key"] in number and row["variation"] == 0 and row["key"] in views.files]
        if not rows:
            raise UserError(f"--views {settings.views}: no view of these data is there")
        rows.sort(key=lambda row: (-row.get("q", 0.0), row["key"]))
    else:
        rows = [{"key": key} for key in pictures.keys]
    half = settings.rows // 2
    scored = any("q" in row for row in rows)
    if len(rows) > settings.rows:
        step = len(rows) / settings.rows
        rows = (
            [*rows[:half], *rows[half - settings.rows :]]
            if scored
            else [rows[int(k * step)] for k in range(settings.rows)]
        )
    model = encoder = None
    if settings.foreground is not None:
        model, encoder = _files.foreground_of(settings.foreground, settings.encoder, settings.encoder_weights, device)
    side = _pictures.SHOWN if encoder is None else max(_pictures.SHOWN, encoder.size)
    shown, titles = [], []
    for row in rows:
        try:
            source = squared(pictures.read(number[row["key"]]), side)
        except UserError as error:
            sys.stderr.write(f"genview: left out: {error}\n")
            continue
        line: list[Any] = [source]
        if model is not None and encoder is not None:
            line.append(_pictures.masked(source, model, encoder))
        if views is not None:
            line.append(squared(readers.read_image(views.files[row["key"]][0]), side))
        shown.append(line)
        parts = [f"level {row['level']}"] if "level" in row else []
        parts += [f"fg {row['ratio']:.2f}"] if row.get("ratio", -1) >= 0 else []
        parts += [f"q {row['q']:+.3f}"] if "q" in row else []
        titles.append("\n".join(parts))
    if not shown:
        raise UserError(f"--data {settings.data}: none of the pictures can be decoded")
    heads = ["source", *(["foreground"] if model is not None else []), *(["view"] if views is not None else [])]
    image_grid(folder.figure("sheet"), shown, row_titles=titles, column_titles=heads)
    order = "the best pairs above, the worst below" if scored else "spread over the data"
    write_report(folder, "genview inspect", {"sheet": f"Sources, foregrounds and views; {order}."})
    sys.stdout.write(f"{len(shown)} pictures on {folder.path / 'figures/sheet.png'}\n")
