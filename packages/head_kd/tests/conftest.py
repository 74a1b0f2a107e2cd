"""Fixtures; what tests build themselves is in ``tiny_detectors``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode does not

from head_kd import rendered, stack
from mmengine.config import Config
from tiny_detectors import build, teacher_config


@pytest.fixture(scope="session", autouse=True)
def registered():
    stack.start()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """Weights of a random teacher; half of its classifier is large, so that it is sure of something."""
    file = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    model = build(teacher_config())
    torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": rendered.CLASSES}}}, file)
    return file


@pytest.fixture(scope="session")
def teacher(teacher_file):
    return {"config": Config({"model": teacher_config()}), "checkpoint": str(teacher_file)}
