"""`corda verify`: does an initialization start at the base model?"""

import sys
from typing import Any

from peft import PeftModel

from corda.anchor import load_anchor
from corda.commands._files import INITIAL, REPORT, RESIDUAL, VERIFICATION, check_base, read_json
from corda.commands._models import check_name, load_model, load_tokenizer
from corda.commands._reports import verification_text
from corda.config import InitSettings, VerifySettings
from corda.data import calibration_batches, on_model
from corda.fingerprints import fingerprint
from corda.records import read_records
from corda.verify import verify_init
from tenfold import UserError, runs
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import track


def run(settings: VerifySettings, invocation: Invocation) -> int:
    """Compare logits and weights; 1 with ``--strict`` if they differ by more than rounding."""
    check_name(settings.model)
    device = choose_device(settings.device)
    start = runs.read(settings.run, InitSettings, package="corda", verb="init")
    recorded = read_json(start.path / REPORT)
    if start.settings.attach == "residual" and not start.settings.residual:
        raise UserError(f"--run {settings.run} holds no residual model to verify (--residual false)")
    records = read_records(settings.data, settings.calibration)
    tokenizer = load_tokenizer(settings.model)
    (batches,) = calibration_batches(records, settings.calibration, tokenizer, seed=settings.seed)
    base = load_model(settings.model, device, start.settings.task)
    check_base(settings.model, fingerprint(base), recorded, start.path)
    wrapped = _initialized(start, settings.model, device)
    data = on_model(batches, base)
    if start.settings.task == "seq2seq":
        data = ({**batch, "decoder_input_ids": batch["input_ids"]} for batch in data)
    reports = [
        verify_init(base, wrapped, batch) for batch in track(data, "verifying", len(batches), quiet=invocation.quiet)
    ]
    weights = [int(batch["attention_mask"].sum()) for batch in batches]
    report: dict[str, Any] = {
        "model": settings.model,
        "run": settings.run,
        "attach": start.settings.attach,
        "tokens": sum(weights),
        "max_difference": max(found.max_difference for found in reports),
        "mean_difference": sum(w * r.mean_difference for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "kl": sum(w * r.kl for w, r in zip(weights, reports, strict=True)) / sum(weights),
        "layers": {name: {"units": layer.units, "holds": layer.holds} for name, layer in reports[0].layers.items()},
    }
    exact = start.settings.attach != "anchor" or report["max_difference"] == 0
    report["holds"] = exact and not reports[0].wrong
    invocation.folder.write_json(VERIFICATION, report)
    sys.stdout.write(verification_text(report))
    return int(invocation.strict and not report["holds"])


def _initialized(start: runs.Finished[InitSettings], model: str, device: str) -> Any:
    """The model that `corda init` made, loaded as for a training."""
    if start.settings.attach == "anchor":
        return load_anchor(load_model(model, device, start.settings.task), start.path / INITIAL)
    residual = load_model(f"hf:{start.path / RESIDUAL}", device, start.settings.task)
    return PeftModel.from_pretrained(residual, str(start.path / INITIAL))
