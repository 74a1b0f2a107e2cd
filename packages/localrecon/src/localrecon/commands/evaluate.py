"""``localrecon evaluate``: a training on its test data, or on others, with early exits if wanted."""

import dataclasses
import sys
import time

from torch.utils.data import DataLoader

from localrecon.commands import _files
from localrecon.commands._training import on_test_data
from localrecon.config import EvaluateSettings
from localrecon.data import load_data
from localrecon.evaluation import EarlyExit, early_exit
from localrecon.net import LocalNet
from tenfold import UserError
from tenfold.claims import Study
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Print accuracy and loss of every head, and write ``summary.json``."""
    start = time.perf_counter()
    device = choose_device(settings.device)
    trained = _files.load(settings.run)
    net, training = trained.net, trained.settings
    leave = None
    if settings.threshold is not None:
        if not isinstance(net, LocalNet):
            raise UserError("--threshold: early exits need a run of another method than bpfree")
        leave = EarlyExit(net, settings.threshold)
    data = load_data(dataclasses.replace(training, data=settings.data or training.data))
    trained.check(data.form, settings.data or training.data)
    found = on_test_data(net, data, training.batch_size, device)
    if leave is not None:
        found |= early_exit(leave, DataLoader(data.test, batch_size=128), device)
    study = Study(invocation.folder, data=data.source, seeds=[training.seed])
    study.record(training.method, found)
    study.finish(time.perf_counter() - start)
    sys.stdout.write(table(["measure", "value"], [[name, f"{value:.4g}"] for name, value in found.items()]) + "\n")
