"""`corda truncate`: the model without the smallest components of its layers."""

import sys
from typing import Any

from corda.commands._calibrating import collect, layers_of
from corda.commands._files import STATS, TRUNCATION, check_stats, load_stats
from corda.commands._models import check_name, load_model, load_tokenizer
from corda.commands._reports import truncation_text
from corda.config import CordaInit, TruncateSettings
from corda.data import Batches, calibration_batches
from corda.fingerprints import fingerprint
from corda.records import read_records
from corda.targets import resolve_targets, weight_of
from corda.truncation import output_error, truncate_model
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device


def run(settings: TruncateSettings, invocation: Invocation) -> None:
    """Calibrate or take statistics, truncate, write the model."""
    out = invocation.folder
    check_name(settings.model)
    device = choose_device(settings.device)
    paths = None if settings.stats is None else [settings.stats]
    candidates = load_stats(paths)
    if len(candidates) > 1:
        raise UserError(f"--stats {settings.stats} holds {len(candidates)} parts; name one file")
    records = None
    if settings.data is not None:
        records = read_records(settings.data, settings.calibration, pairs=settings.task == "seq2seq")
    tokenizer = load_tokenizer(settings.model)
    parts: list[Batches] = []
    if records is not None:
        parts = calibration_batches(records, settings.calibration, tokenizer, seed=settings.seed)
    model = load_model(settings.model, device, settings.task)
    report: dict[str, Any] = {"model": settings.model, "fingerprint": fingerprint(model)}
    check_stats(paths, candidates, settings.model, report["fingerprint"])
    lora_config = layers_of(settings)
    if parts:
        candidates.append(collect(model, parts, 0, lora_config, CordaInit(), quiet=invocation.quiet))
        candidates[0].save(out.own(STATS))
    stats = candidates[0] if candidates else None
    targets = list(resolve_targets(model, lora_config))
    before = {name: weight_of(model, name).clone() for name in targets}
    drop = int(settings.drop) if settings.drop >= 1 else settings.drop
    dropped = truncate_model(model, stats, drop, targets=targets, method=settings.method, power=settings.power)
    layers: dict[str, dict[str, Any]] = {}
    for name, weight in before.items():
        error = output_error(weight, weight_of(model, name), stats.covariance(name)) if stats else None
        kept = min(weight.shape) - dropped[name]
        layers[name] = {"shape": list(weight.shape), "dropped": dropped[name], "kept": kept, "output_error": error}
    with out.replacing_folder("model") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    report |= {"method": settings.method, "power": settings.power, "drop": drop, "layers": layers}
    out.write_json(TRUNCATION, report)
    sys.stdout.write(truncation_text(report))
