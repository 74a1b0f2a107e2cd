"""Two processes: the metrics of one, and batches of different people at each step."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_two_processes_count_what_one_counts_and_hold_different_people_at_each_step(tmp_path):
    words = [sys.executable, str(SCRIPT), str(tmp_path / "meeting")]
    both = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    found = [json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in both]
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    one, two = module.counted(np.arange(20))
    for answer in found:
        assert answer["cmc"] == one.compute().cmc.tolist()
        assert answer["map"] == pytest.approx(one.compute().map_step)
        assert answer["eer"] == two.compute().eer
        assert answer["counts"] == 600
    assert found[0]["held"]
    for a, b in zip(found[0]["held"], found[1]["held"], strict=True):
        assert len(a) == len(b) == 3
        assert not set(a) & set(b)
