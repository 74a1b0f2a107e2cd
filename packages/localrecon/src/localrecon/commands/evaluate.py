"""``localrecon evaluate``: a training on its test data, or on others, with early exits if wanted."""

import sys

from torch.utils.data import DataLoader

from localrecon import __version__
from localrecon.commands import _files
from localrecon.commands._training import on_test_data
from localrecon.config import EvaluateSettings
from localrecon.evaluation import early_exit
from localrecon.net import LocalNet
from tenfold import UserError
from tenfold.claims import Study
from tenfold.cli import Invocation, table
from tenfold.training import choose_device


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Print accuracy and loss of every head, and write ``summary.json``."""
    device = choose_device(settings.device)
    trained = _files.load(settings)
    net, training, data = trained.net, trained.settings, trained.data
    found = on_test_data(net, data, training.batch_size, device)
    if settings.threshold is not None:
        if not isinstance(net, LocalNet):
            raise UserError("early exits need a run of another method than bpfree")
        found |= early_exit(net, settings.threshold, DataLoader(data.test, batch_size=128), device)
    study = Study(
        invocation.folder,
        package="localrecon",
        version=__version__,
        command="evaluate",
        level="default",
        data=data.source,
        seeds=[training.seed],
    )
    study.over_arms({training.method: lambda seed: found})
    study.finish()
    rows = [[name, f"{value:.4g}"] for name, value in found.items()]
    sys.stdout.write(table(["measure", "value"], rows) + "\n")
