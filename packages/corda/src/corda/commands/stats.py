"""`corda stats`: what the layers of a model see of a text."""

import sys

from corda.commands._calibrating import collect, layers_of
from corda.commands._files import CANDIDATES, STATS
from corda.commands._models import check_name, load_model, load_tokenizer
from corda.commands._reports import stats_text
from corda.config import CordaInit, StatsSettings
from corda.data import calibration_batches
from corda.records import read_records
from tenfold.cli import Invocation
from tenfold.devices import choose_device


def run(settings: StatsSettings, invocation: Invocation) -> None:
    """Write the statistics, one file for each part of the text."""
    check_name(settings.model)
    device = choose_device(settings.device)
    records = read_records(settings.data, settings.calibration, pairs=settings.task == "seq2seq")
    tokenizer = load_tokenizer(settings.model)
    count = max(1, settings.candidates)
    parts = calibration_batches(records, settings.calibration, tokenizer, count, seed=settings.seed)
    model = load_model(settings.model, device, settings.task)
    init = CordaInit(scale=settings.scale, skip_first=settings.skip_first, accumulate=settings.accumulate)
    lora_config = layers_of(settings)
    for number in range(count):
        stats = collect(model, parts, number, lora_config, init, quiet=invocation.quiet)
        name = CANDIDATES.replace("*", str(number + 1)) if settings.candidates else STATS
        stats.save(invocation.folder.own(name))
        more = f"windows dealt out to {count} files, {CANDIDATES}\n" if settings.candidates else ""
        sys.stdout.write(stats_text(stats) + more if number == 0 else "")
