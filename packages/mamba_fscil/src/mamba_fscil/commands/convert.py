"""`mamba-fscil convert`: a checkpoint of the authors' code under our names."""

import sys

from mamba_fscil.config import ConvertSettings
from mamba_fscil.official import converted
from tenfold import UserError, checkpoints
from tenfold.cli import Invocation


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Write ``converted.safetensors``; say which names have no place here."""
    tensors = checkpoints.read_foreign(
        settings.weights, option="--weights", names=["backbone.", "neck.", "head."]
    ).tensors
    try:
        found, unknown = converted(tensors)
    except UserError as error:
        raise UserError(f"--weights {settings.weights}: {error}") from error
    folder = invocation.folder
    path = folder.own("converted.safetensors")
    checkpoints.save(path, found, method="mamba_fscil.converted", config={"from": settings.weights})
    folder.write_json("config.json", {"tensors": len(found), "left out": unknown})
    left = (
        f"; left out: {', '.join(unknown[:5])}" + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        if unknown
        else ""
    )
    sys.stdout.write(f"{path}: {len(found)} tensors{left}; for train --base_weights\n")
