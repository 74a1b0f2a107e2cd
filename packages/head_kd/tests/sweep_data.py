"""What `nox -s sweep` tries head-kd with: a small student and a teacher with random weights, on drawn images."""

from pathlib import Path

import torch
from head_kd import rendered, small, stack
from head_kd.data import write_drawn
from mmengine.config import Config
from tiny_detectors import STUDENTS, build, teacher_config


def write(folder: Path) -> None:
    """``drawn`` (COCO), ``student.py``, ``teacher.py``, ``teacher.pth``."""
    stack.start()
    train, val = write_drawn(folder / "drawn", "train", 0, 8), write_drawn(folder / "drawn", "val", 900, 4)
    for name, model in (("student", STUDENTS["retinanet"]), ("teacher", teacher_config())):
        Config(small.experiment(model, train, val, steps=6, batch=2, rate=1e-3)).dump(str(folder / f"{name}.py"))
    weights = {
        "state_dict": build(teacher_config()).state_dict(),
        "meta": {"dataset_meta": {"classes": rendered.CLASSES}},
    }
    torch.save(weights, folder / "teacher.pth")
