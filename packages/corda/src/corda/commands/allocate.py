"""`corda allocate`: the rank of each layer under one budget."""

import dataclasses
import sys
from typing import Any

from corda.commands._calibrating import lora_config_of
from corda.commands._files import RANKS, check_stats, load_stats
from corda.commands._models import check_name, load_model
from corda.commands._plus import select_and_allocate
from corda.commands._reports import ranks_text
from corda.config import AllocateSettings
from corda.fingerprints import fingerprint
from tenfold.cli import Invocation
from tenfold.devices import choose_device


def run(settings: AllocateSettings, invocation: Invocation) -> None:
    """Write the ranks, and the patterns by which peft takes them."""
    check_name(settings.model)
    device = choose_device(settings.device)
    candidates = load_stats(settings.stats)
    model = load_model(settings.model, device, settings.task)
    report: dict[str, Any] = {"model": settings.model, "fingerprint": fingerprint(model)}
    check_stats(settings.stats, candidates, settings.model, report["fingerprint"])
    settings = dataclasses.replace(settings, budget=settings.budget or f"uniform:{settings.r}")
    _, lora_config = select_and_allocate(model, candidates, lora_config_of(settings), settings, report)
    report |= {**report.pop("allocation"), "r": settings.r, "lora_alpha": lora_config.lora_alpha}
    report |= {"rank_pattern": lora_config.rank_pattern, "alpha_pattern": lora_config.alpha_pattern}
    invocation.folder.write_json(RANKS, report)
    sys.stdout.write(ranks_text(report))
