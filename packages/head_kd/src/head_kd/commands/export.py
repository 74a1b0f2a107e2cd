"""`head-kd export`: the plain student of a checkpoint."""

import sys

from head_kd.commands._files import export, trained
from head_kd.config import ExportSettings
from head_kd.configs import resolve_config
from head_kd.training.runner import LAST
from tenfold.cli import Invocation


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write both files, the student's config, and ``export.json``, which says what was left out and checked."""
    run = invocation.folder
    file, student = trained(settings.run, settings.student, LAST)
    plain = resolve_config(student)
    report = export(run, file, plain, verify=settings.verify)
    run.write_text("student.py", plain.pretty_text)
    run.write_json("export.json", report)
    checked = "outputs equal the checkpoint's bit for bit" if report["verified"] else "not verified"
    sys.stdout.write(
        f"{run.path / 'student.safetensors'} and .pth, with student.py: {report['kept']} tensors of the plain student,"
        f" {report['left_out']} of training left out; {checked}\n"
    )
