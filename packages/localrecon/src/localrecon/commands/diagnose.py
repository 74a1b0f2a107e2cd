"""``localrecon diagnose``: what the modules of a training want of each other."""

import sys
from dataclasses import asdict

from localrecon.arms import first_batch
from localrecon.commands import _files
from localrecon.config import DiagnoseSettings
from localrecon.diagnosis import diagnose
from localrecon.net import LocalNet
from tenfold import UserError
from tenfold.cli import Invocation, table
from tenfold.training import choose_device


def run(settings: DiagnoseSettings, invocation: Invocation) -> None:
    """Write ``report.md`` and ``diagnosis.json``, and print them."""
    device = choose_device(settings.device)
    trained = _files.load(settings)
    net = trained.net
    if not isinstance(net, LocalNet):
        raise UserError("diagnose needs a run of another method than bpfree")
    inputs, labels = first_batch(trained.data.plain, settings.samples)
    report = diagnose(net.to(device), inputs.to(device), labels.to(device), trained.settings.seed)
    invocation.folder.write_text("report.md", report.to_markdown())
    invocation.folder.write_json("diagnosis.json", asdict(report))
    sys.stdout.write(table(*report.rows()) + "\n\n" + report.to_markdown().partition("\n\n")[2])
