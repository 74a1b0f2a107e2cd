import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("localrecon_test_nets", Path(__file__).parent / "nets.py")
nets_module = importlib.util.module_from_spec(_spec)
sys.modules["localrecon_test_nets"] = nets_module
_spec.loader.exec_module(nets_module)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
