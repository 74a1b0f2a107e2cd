"""Two processes: counts of masks and labels are summed, so that the mean of their gradients is that of one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_the_mean_gradient_of_two_processes_is_that_of_one(tmp_path):
    words = [sys.executable, str(SCRIPT), str(tmp_path / "meeting")]
    both = [subprocess.Popen([*words, str(rank), str(tmp_path / "g.pt")]) for rank in range(2)]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    spec = importlib.util.spec_from_file_location("two_processes_of_freespace", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one, two = module.gradients([0, 1, 2, 3]), torch.load(tmp_path / "g.pt", weights_only=True)
    assert set(one) == set(two)
    for name, grad in one.items():
        assert torch.allclose(grad, two[name], atol=1e-12, rtol=1e-9), name
