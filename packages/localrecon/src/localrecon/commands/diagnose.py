"""``localrecon diagnose``: what the modules of a training want of each other."""

import dataclasses
import sys

from localrecon.arms import first_batch
from localrecon.commands import _files
from localrecon.config import DiagnoseSettings
from localrecon.data import load_data
from localrecon.diagnosis import diagnose
from localrecon.net import LocalNet
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table


def run(settings: DiagnoseSettings, invocation: Invocation) -> None:
    """Write ``report.md`` and ``diagnosis.json``, and print them."""
    device = choose_device(settings.device)
    trained = _files.load(settings.run)
    net, training = trained.net, trained.settings
    if not isinstance(net, LocalNet):
        raise UserError(f"--run {settings.run}: diagnose needs a run of another method than bpfree")
    data = load_data(dataclasses.replace(training, data=settings.data or training.data))
    trained.check(data.form, settings.data or training.data)
    inputs, labels = first_batch(data.plain, settings.samples)
    report = diagnose(net.to(device), inputs.to(device), labels.to(device), training.seed)
    invocation.folder.write_text("report.md", report.to_markdown())
    invocation.folder.write_json("diagnosis.json", dataclasses.asdict(report))
    sys.stdout.write(table(*report.rows()) + "\n\n" + report.to_markdown().partition("\n\n")[2])
