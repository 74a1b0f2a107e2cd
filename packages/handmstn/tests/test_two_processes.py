"""Two processes: the metrics of one, and batches of different people at each step."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from handmstn.cli import main

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


def test_the_command_on_two_processes_has_the_schedule_of_one(tmp_path):
    """Started by torchrun, both stages: as many steps, the same rates, one model; too few people are refused in one line."""
    hands = ["simulate", "--people", "8", "--views", "4", "--size", "64", "--quiet", "--out", str(tmp_path / "hands")]
    assert main(hands) == 0
    words = ["train", "--data", f"csv:{tmp_path}/hands/hands.csv", "--config", "recipe:small", "--aligner.steps", "4"]
    words += ["--epochs", "3", "--views", "2", "--reading.size", "64", "--device", "cpu", "--log_every", "1", "--quiet"]
    one = ["--people", "4", "--aligner.batch_size", "8", "--out", str(tmp_path / "one")]
    assert main([*words, *one]) == 0
    (tmp_path / "run.py").write_text("import sys\nfrom handmstn.cli import main\nsys.exit(main())\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [str(tmp_path / "run.py"), *words, "--aligner.batch_size", "4", "--devices", "2"]
    how = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "timeout": 300, "capture_output": True, "text": True}
    done = subprocess.run([*line, "--people", "2", "--out", str(tmp_path / "two")], **how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("model in") == 1
    for stage, steps in (("align", 4), ("identity", 6)):
        tables = [list(csv.DictReader((tmp_path / n / f"metrics.{stage}.csv").open())) for n in ("one", "two")]
        rates = [[row["lr"] for row in table] for table in tables]
        assert rates[0] == rates[1]
        assert len(rates[0]) == steps
    done = subprocess.run([*line, "--people", "5", "--out", str(tmp_path / "three")], **how)
    assert "8 identities do not fill a batch of --people 5 on each of 2 devices: lower --people" in done.stderr
