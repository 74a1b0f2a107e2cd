"""Fixtures; what tests build themselves is in ``tiny_detectors``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode does not

from head_kd import rendered, small, stack
from head_kd.cli import main
from head_kd.data import write_drawn
from mmengine.config import Config
from tiny_detectors import STUDENTS, build, teacher_config, train_words


@pytest.fixture(scope="session", autouse=True)
def registered():
    stack.start()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """Weights of a random teacher."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = build(teacher_config())
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": rendered.CLASSES}}}, file)
    return file


@pytest.fixture(scope="session")
def teacher(teacher_file):
    return {"config": Config({"model": teacher_config()}), "checkpoint": str(teacher_file)}


@pytest.fixture(scope="session")
def project(tmp_path_factory, teacher_file):
    """Two stock configs on a COCO folder: ``student.py``, ``teacher.py``, ``teacher.pth``, ``data``."""
    folder = tmp_path_factory.mktemp("project")
    data = folder / "data"
    train, val = write_drawn(data, "train", 0, 8), write_drawn(data, "val", 900, 4)
    student = small.experiment(STUDENTS["retinanet"], train, val, steps=6, batch=2, rate=1e-3)
    student["train_dataloader"]["dataset"]["pipeline"].insert(3, {"type": "RandomFlip", "prob": 0.5})
    Config(student).dump(str(folder / "student.py"))
    Config(small.experiment(teacher_config(), train, val, steps=6, batch=2, rate=1e-3)).dump(str(folder / "teacher.py"))
    (folder / "teacher.pth").write_bytes(teacher_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def trained(project):
    """An unbroken run of six steps, which is an epoch and a half."""
    out = project / "unbroken"
    assert main(train_words(project, out, "--guard", "2")) == 0
    return out
