"""Two processes: counts of masks and labels are summed, so that the mean of their gradients is that of one."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from freespace_uda.cli import main
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def roads(tmp_path_factory):
    """The words of a small training on two rendered worlds of twelve scenes."""
    root = tmp_path_factory.mktemp("roads")
    for domain in ("roads-flat", "roads-real"):
        words = ["simulate", "--domain", domain, "--scenes", "12", "--test", "3", "--size", "64,32"]
        assert main([*words, "--out", str(root / domain), "--quiet"]) == 0
    words = ["train", "--data", f"manifest:{root}/roads-flat/manifest.csv", "--rgb_encoder", "freespace:tiny"]
    words += ["--target", f"manifest:{root}/roads-real/manifest.csv", "--width", "8", "--size", "64,32"]
    return [*words, "--watched", "2", "--device", "cpu", "--quiet", "--log_every", "1"]


@pytest.mark.parametrize("devices", [["--devices", "2"], ["--devices", "2", "--strategy", "ddp"]])
def test_the_command_on_two_processes_trains_what_one_does(roads, tmp_path, devices):
    """Started by torchrun, both steps of an epoch, alignment and discriminator included; the weights agree to 1e-6."""
    words = [*roads, "--epochs", "2", "--align.start", "0", "--align.min_pixels", "1"]
    assert main([*words, "--batch_size", "4", "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "run.py").write_text("import sys\nfrom freespace_uda.cli import main\nsys.exit(main())\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [str(tmp_path / "run.py"), *words, "--batch_size", "2", *devices, "--out", str(tmp_path / "two")]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("one", "two")]
    one, two = ([row["lr"] for row in each] for each in rows)
    assert one == two
    assert len(one) == 6
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in ours.items():
        assert torch.allclose(value.double(), theirs[name].double(), atol=1e-6), name


@pytest.mark.parametrize(("given", "steps"), [(["--epochs", "1"], 3), (["--steps", "2", "--epochs", "9"], 2)])
def test_steps_or_passes_whichever_is_reached_first_ends_the_training(roads, tmp_path, given, steps):
    """`--epochs 1` beside the default of 40,000 steps is one pass over twelve scenes in batches of four."""
    assert main([*roads, *given, "--batch_size", "4", "--out", str(tmp_path / "out")]) == 0
    assert len((tmp_path / "out/metrics.csv").read_text().splitlines()) == 1 + steps
