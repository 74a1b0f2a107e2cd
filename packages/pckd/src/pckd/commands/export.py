"""`pckd export`: a trained student for elsewhere."""

import sys

import torch

from pckd.commands._files import finished, student_of
from pckd.config import ExportSettings
from pckd.models import STUDENT
from tenfold import export
from tenfold.cli import Invocation


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write the student in the format, and the card that says how to use it."""
    folder = invocation.folder
    model, card = student_of(finished(settings.run).path)
    example = torch.zeros(2, 3, card["size"], card["size"])
    name = STUDENT.removesuffix(".safetensors")
    done = export.save(model, example, folder, name, settings.format)
    folder.write_json("config.json", card)
    sys.stdout.write(
        f"{done.path}: {card['model']}, images (N, 3, {card['size']}, {card['size']}) as (x / 255 - mean) / std with"
        f" mean {card['mean']}, std {card['std']} -> logits of {len(card['classes'])} classes, named in config.json\n"
    )
