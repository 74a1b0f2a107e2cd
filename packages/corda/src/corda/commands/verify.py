"""`corda verify`: does an initialization start at the base model?"""

import sys
from pathlib import Path
from typing import Any

from peft import PeftModel

from corda.anchor import load_anchor
from corda.commands._files import INITIAL, REPORT, RESIDUAL, VERIFICATION, check_base, read_json
from corda.commands._models import load_model, load_tokenizer
from corda.commands._reports import verification_text
from corda.config import VerifySettings
from corda.context import fingerprint
from corda.data import calibration_batches, on_model
from corda.records import read_records
from corda.verify import verify_init
from tenfold import UserError
from tenfold.cli import Invocation, track


def run(settings: VerifySettings, invocation: Invocation) -> int:
    """Compare logits and weights; 1 with ``--strict`` if they differ by more than rounding."""
    initial = Path(settings.initial)
    recorded = read_json(initial / REPORT)
    records = read_records(settings.data, settings.calibration)
    (batches,) = calibration_batches(records, settings.calibration, load_tokenizer(settings.model))
    base = load_model(settings.model, settings.device)
    check_base(settings.model, fingerprint(base), recorded, initial)
    wrapped = _initialized(initial, recorded, settings)
    data = on_model(batches, base)
    reports = [
        verify_init(base, wrapped, batch) for batch in track(data, "verifying", len(batches), quiet=invocation.quiet)
    ]
    weights = [int(batch["attention_mask"].sum()) for batch in batches]
    report: dict[str, Any] = {
        "model": settings.model,
        "initial": settings.initial,
        "attach": recorded["attach"],
        "tokens": sum(weights),
        "max_difference": max(found.max_difference for found in reports),
        "mean_difference": sum(w * r.mean_difference for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "kl": sum(w * r.kl for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "layers": {name: {"units": layer.units, "holds": layer.holds} for name, layer in reports[0].layers.items()},
    }
    exact = recorded["attach"] != "anchor" or report["max_difference"] == 0
    report["holds"] = exact and not reports[0].wrong
    invocation.folder.write_json(VERIFICATION, report)
    sys.stdout.write(verification_text(report))
    return int(invocation.strict and not report["holds"])


def _initialized(initial: Path, recorded: dict[str, Any], settings: VerifySettings) -> Any:
    """The model that `corda init` made, as somebody who trains it loads it."""
    residual = initial / RESIDUAL
    if recorded.get("attach") == "anchor":
        return load_anchor(load_model(settings.model, settings.device), initial / INITIAL)
    if not residual.is_dir():
        raise UserError(f"{initial} holds no residual model to verify (--residual false)")
    return PeftModel.from_pretrained(load_model(str(residual), settings.device), str(initial / INITIAL))
