"""`corda convert`: a trained adapter as a plain LoRA of the untouched base."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from corda.commands._files import CONVERSION, INITIAL, REPORT, check_base, read_json
from corda.commands._models import load_model
from corda.commands._reports import conversion_text
from corda.config import ConvertSettings
from corda.context import fingerprint
from corda.convert import convert_adapter
from corda.factors import FactorSet
from tenfold import UserError
from tenfold.cli import Invocation


def run(settings: ConvertSettings, invocation: Invocation) -> None:
    """Convert from folders alone; the model is read only where it is to be checked."""
    out = invocation.folder
    initial: Any = None
    recorded: dict[str, Any] = {}
    if settings.initial is not None:
        path = Path(settings.initial)
        folder = path / INITIAL if (path / INITIAL).is_dir() else path
        initial = FactorSet.load(path) if path.is_file() else folder
        if (folder.parent / REPORT).is_file():
            recorded = read_json(folder.parent / REPORT)
    base = settings.model or recorded.get("model")
    if settings.model is not None:
        found = fingerprint(load_model(settings.model, "cpu"))
        if isinstance(initial, FactorSet) and initial.fingerprint:
            recorded = {"fingerprint": initial.fingerprint, "model": settings.initial}
        if not recorded:
            raise UserError(f"--model {settings.model} cannot be checked: give --initial, the folder of `corda init`")
        if found == recorded.get("residual_fingerprint"):
            base = recorded["model"]
        else:
            check_base(settings.model, found, recorded, path)
    with out.replacing_folder("lora") as folder:
        done = convert_adapter(settings.adapter, initial, folder, settings.rank, settings.tol, base)
    report = {"adapter": settings.adapter, "base": base, "norm": done.norm, "discarded": done.discarded}
    report["layers"] = {name: dataclasses.asdict(layer) for name, layer in done.layers.items()}
    out.write_json(CONVERSION, report)
    sys.stdout.write(conversion_text(report))
    sys.stdout.write(f"\nnext: PeftModel.from_pretrained(base, '{out.path / 'lora'}'), with the untouched base model\n")
