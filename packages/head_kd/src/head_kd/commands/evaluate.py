"""`head-kd evaluate`: COCO's AP of a plain student."""

import sys

from head_kd.checkpoints import read_weights, student_weights
from head_kd.commands._files import student_config, trained
from head_kd.config import EvaluateSettings
from head_kd.configs import innermost, stated_classes
from head_kd.stack import build, start, use_device
from head_kd.training.runner import evaluate
from tenfold import UserError
from tenfold.checkpoints import check_shapes
from tenfold.cli import Invocation
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure, write ``evaluation.json``, print the table."""
    run = invocation.folder
    use_device(settings.device)
    file, student = trained(settings.run, settings.student, "student.safetensors")
    read = read_weights(file, option="--run")
    weights = student_weights(read.state_dict)
    cfg = student_config(
        student, settings.data, run, split=[settings.split], skip_bad=settings.skip_bad, order=read.classes
    )
    known = stated_classes(innermost(cfg.test_dataloader.dataset))
    if read.classes is not None and known is not None and known != read.classes:
        raise UserError(
            f"{file} was trained on the classes {', '.join(read.classes[:5])}, the data's are {', '.join(known[:5])}: its"
            " labels would be misread"
        )
    start()
    expected = {k: tuple(v.shape) for k, v in build(cfg.model).state_dict().items()}
    check_shapes(file, expected, weights)
    found = evaluate(cfg, weights)
    percent = {k: 100 * v for k, v in found.items() if k.startswith("bbox_")}
    run.write_json("evaluation.json", percent)
    rows = [[k.removeprefix("bbox_"), f"{v:.1f}"] for k, v in percent.items()]
    sys.stdout.write(table(["metric", "percent"], rows) + "\n")
