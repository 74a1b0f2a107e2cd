"""A training that is killed at five moments, resumed each time, ends with the same model and map as an unbroken one."""

import os
import signal
import subprocess
import sys

import pytest
from radiogat.cli import main
from radiogat.config import CityConfig
from radiogat.data import write_samples
from radiogat.simulate import along_streets, city

SCRIPT = """
import os, signal, sys
from radiogat import maps, tasks, trees
from radiogat.cli import main

where, at = sys.argv[1].split(":")
owner, name = {"step": (tasks.NeighborTask, "loss"), "trees": (trees.BoostedTrees, "fit"),
               "map": (maps.GeoTiffWriter, "write")}[where]
plain, calls = getattr(owner, name), 0


def counted(*given, **named):
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*given, **named)


setattr(owner, name, counted)
sys.exit(main(sys.argv[2:]))
"""
MOMENTS = ("step:3", "step:9", "step:30", "trees:2", "map:1")
"""Before the first checkpoint, after it, in a later network, between two ensembles of trees, while the map is written."""


@pytest.mark.slow
def test_a_training_that_is_killed_at_five_moments_ends_with_the_same_model_and_map(tmp_path):
    maps = city(CityConfig(size=60, freq_mhz=(1800.0,), seed=4))
    write_samples(tmp_path / "s.csv", maps.samples(along_streets(maps, 20)))
    words = ["train", "--data", f"csv:{tmp_path / 's.csv'}", "--crs", "EPSG:32632", "--cell", "6", "--steps", "16"]
    words += ["--trees.iterations", "6", "--checkpoint_every", "5", "--map", "geotiff", "--quiet"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    cut = [*words, "--out", str(tmp_path / "cut")]
    environment = os.environ | {"OMP_NUM_THREADS": str(__import__("torch").get_num_threads())}
    for number, moment in enumerate(MOMENTS):
        again = ["--resume"] if number else []
        command = [sys.executable, "-c", SCRIPT, moment, *cut, *again]
        assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL, moment
        assert not (tmp_path / "cut/summary.json").exists()
    assert main([*cut, "--resume"]) == 0
    logs = [sorted(p.name for p in (tmp_path / place).glob("metrics*.csv")) for place in ("whole", "cut")]
    assert logs[0] == logs[1] != []
    for name in ("model.safetensors", "map.tif", "config.json", *logs[0]):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    left = [p.name for p in (tmp_path / "cut").rglob("*") if "tmp" in p.name or "plain" in p.name]
    assert not left
