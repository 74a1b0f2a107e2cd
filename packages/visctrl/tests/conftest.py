"""Fixtures, and the folder of the tests on the path, for the tiny networks that they share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))
import visctrl_tiny


@pytest.fixture(scope="session")
def unet():
    return visctrl_tiny.tiny_unet()


@pytest.fixture
def text():
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(9))
