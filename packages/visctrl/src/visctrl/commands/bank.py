"""`visctrl bank`: a reference's features as files, for `visctrl edit --run`."""

import sys
from pathlib import Path

from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import table
from visctrl.commands import _banks, _work
from visctrl.config import BankSettings
from visctrl.data import load_model, read_picture
from visctrl.engine import VisCtrl


def run(settings: BankSettings, invocation: Invocation) -> None:
    """Invert the reference, record it, write both."""
    path = Path(settings.reference)
    read_picture(path)
    engine = VisCtrl(load_model(settings), settings.control)
    shown = _work.prepare(engine, path, settings.reference_mask, settings.size, False, "--reference_mask")
    reference = _work.reference_of(engine, shown, settings.reference_prompt)
    features = engine.features(reference)
    if features.bank is None:
        raise UserError(f"--control.max_bank {settings.control.max_bank}: the features of this reference need more")
    _banks.write(invocation.folder, reference, features, shown)
    about = _banks.summary(features)
    invocation.folder.write_json("bank.json", about)
    rows: list[list[object]] = [
        ["levels", len(about["timesteps"])],
        ["layers", len(about["layers"])],
        ["megabytes", f"{about['bytes'] / 1e6:.2f}"],
        ["residual of the inversion", f"{about['residual']:.3g}"],
        ["levels that fell back to a plain step", about["fallen_back"]],
    ]
    sys.stdout.write(table(["bank", "value"], rows) + "\n")
