"""A calibration as a file, and back."""

import json
from pathlib import Path

from handmstn.calibration import Calibration
from handmstn.config import CalibrateSettings
from tenfold import UserError, runs

FILE = "calibration.json"


def calibration_of(run: str, model: str) -> Calibration:
    """The calibration of a finished `handmstn calibrate`.

    Raises:
        UserError: no such run, or one of another model.
    """
    try:
        finished = runs.read(run, CalibrateSettings, package="handmstn", verb="calibrate")
    except UserError as error:
        raise UserError(str(error).replace("--run", "--calibration", 1)) from error
    content = json.loads((Path(finished.path) / FILE).read_text(encoding="utf-8"))
    if content["model"] != model:
        raise UserError(
            f"--calibration {run}: made with the model {content['model']}, this one is {model}: calibrate again"
        )
    return Calibration(tuple(content["edges"]), tuple(content["slopes"]), tuple(content["offsets"]))
