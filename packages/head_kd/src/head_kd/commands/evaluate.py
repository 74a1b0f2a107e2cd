"""``head-kd evaluate``: COCO's AP of a plain student."""

import sys

from head_kd.checkpoints import read_weights, student_weights
from head_kd.commands._files import student_config
from head_kd.config import EvaluateSettings
from head_kd.stack import build, start
from head_kd.training.runner import evaluate
from tenfold.checkpoints import check_shapes
from tenfold.cli import Invocation, table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure, write ``evaluation.json``, print the table."""
    run = invocation.folder
    weights = student_weights(read_weights(settings.checkpoint).state_dict)
    cfg = student_config(settings.student, settings.data, run)
    start()
    expected = {k: tuple(v.shape) for k, v in build(cfg.model).state_dict().items()}
    check_shapes(settings.checkpoint, expected, weights)
    found = evaluate(cfg, weights)
    percent = {k: 100 * v for k, v in found.items() if k.startswith("bbox_")}
    run.write_json("evaluation.json", percent)
    rows = [[k.removeprefix("bbox_"), f"{v:.1f}"] for k, v in percent.items()]
    sys.stdout.write(table(["metric", "percent"], rows) + "\n")
