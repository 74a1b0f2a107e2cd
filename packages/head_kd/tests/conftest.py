"""Fixtures; what tests build themselves is in ``tiny_detectors``."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # pytest's importlib mode does not

import head_kd.ops_fallback  # noqa: F401, I001
from mmdet.utils import register_all_modules
from mmengine.config import Config
from tiny_detectors import build, teacher_config

from head_kd import rendered, training


@pytest.fixture(scope="session", autouse=True)
def registered():
    warnings.filterwarnings("ignore", module=r"mm(engine|det|cv)")
    training.quiet_stack()
    register_all_modules(init_default_scope=True)
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
