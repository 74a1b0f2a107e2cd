"""`corda convert`: a trained adapter as a plain LoRA of the untouched base."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from corda.adapters import CONFIG
from corda.commands._files import CONVERSION, INITIAL, REPORT, check_base, read_json
from corda.commands._models import base_name, load_model
from corda.commands._reports import conversion_text
from corda.config import ConvertSettings, InitSettings
from corda.convert import convert_adapter, read_adapter
from corda.factors import FactorSet
from corda.fingerprints import differences, fingerprint
from tenfold import UserError, runs
from tenfold.cli import Invocation

LORA = "lora"


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Convert from folders alone; the model is read only where it is to be checked."""
    out = invocation.folder
    if settings.model is not None and settings.run is None:
        raise UserError(f"--model {settings.model} cannot be checked: give --run, the folder of `corda init`")
    base = base_name(settings.model) if settings.model is not None else None
    initial, recorded = _start(Path(settings.run)) if settings.run is not None else (None, {})
    read_adapter(settings.adapter)  # its faults show before a model is loaded
    if settings.model is not None:
        if not recorded:
            raise UserError(
                f"--model {settings.model} cannot be checked: {settings.run} does not say what it was made for"
            )
        found = fingerprint(load_model(settings.model, "cpu", recorded.get("task", "causal")))
        if differences(str(recorded.get("residual_fingerprint")), found):
            check_base(settings.model, found, recorded, Path(str(settings.run)))
        else:
            base = base_name(recorded["model"])
    elif "model" in recorded:
        base = base_name(recorded["model"])
    with out.replacing_folder(LORA) as folder:
        done = convert_adapter(settings.adapter, initial, folder, settings.rank, settings.tol, base)
    layers = {name: dataclasses.asdict(layer) for name, layer in done.layers.items()}
    report = {
        "adapter": settings.adapter,
        "base": base,
        "norm": done.norm,
        "discarded": done.discarded,
        "layers": layers,
    }
    out.write_json(CONVERSION, report)
    sys.stdout.write(conversion_text(report))
    sys.stdout.write(f"\nnext: PeftModel.from_pretrained(base, '{out.path / LORA}'), with the untouched base model\n")


def _start(path: Path) -> tuple[Path | FactorSet, dict[str, Any]]:
    """What the adapter was started from, and what is known of the model that this was made for."""
    if (path / CONFIG).is_file():  # the initial adapter, in its run or copied from it
        report = path.parent / REPORT
        return path, read_json(report) if report.is_file() else {}
    if path.is_file() and not any((parent / runs.MANIFEST).is_file() for parent in path.parents):
        factors = FactorSet.load(path)  # of a trainer's callback
        return factors, {"fingerprint": factors.fingerprint} if factors.fingerprint else {}
    folder = runs.read(path, InitSettings, package="corda", verb="init").path
    return folder / INITIAL, read_json(folder / REPORT)
