"""Two processes by the command line, and timm's own training loop."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pckd import Distiller, Losses, PCKDConfig
from pckd.cli import main
from pckd.models import build
from safetensors.torch import load_file
from torch import nn

MODEL = """
from torch import nn

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, num_classes))
"""


def test_two_processes_train_what_one_does(tmp_path, monkeypatch):
    """41 images, so that the last step has fewer; the command, started by torchrun, reports once.

    Losses are means over the images of all processes, and the gradients' mean over two batches of 4 is that over one of 8, so
    the weights agree to rounding (1e-5 here) for models without batch norm, whose statistics are those of one process.
    """
    (tmp_path / "own_plain.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 255, (52, 8, 8, 3), dtype=np.uint8), y=np.arange(52) % 4)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)).state_dict(), "teacher.pth")
    words = ["train", "--data", "npz:a.npz", "--student", "py:own_plain:plain", "--epochs", "2", "--device", "cpu"]
    words += ["--teacher", "py:own_plain:plain", "--teacher_weights", "teacher.pth", "--method", "ckd"]
    words += ["--losses.pckd.f", "0", "--views.kind", "none", "--quiet", "--optimizer.lr", "0.01"]
    assert main([*words, "--batch_size", "8", "--out", "one"]) == 0
    (tmp_path / "run.py").write_text("import sys\nfrom pckd.cli import main\nsys.exit(main())\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "run.py", *words]
    line += ["--batch_size", "4", "--devices", "2", "--out", "two"]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("of the test images right") == 1
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name
    one, two = (json.loads((tmp_path / name / "summary.json").read_text())["arms"] for name in ("one", "two"))
    assert one == two


def test_timms_training_loop_takes_the_task(tmp_path):
    """Task, average, evaluator and checkpoint as timm's own script uses them."""
    pytest.importorskip("timm.task")
    from pckd import PCKDTask

    torch.manual_seed(0)
    student, teacher = build("timm:resnet10t", 3), build("cifar:plain8", 3)
    images, labels = torch.randn(8, 3, 32, 32), torch.tensor([1, 0, 2, 1])
    losses = Losses(pckd=PCKDConfig(align_hidden="16"))
    task = PCKDTask(Distiller(student, teacher, losses=losses, example=images), epochs=5)
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    heads = task.distiller.objective.contrast.to_student.weight
    before = heads.detach().clone()
    for epoch in range(2):
        task.set_epoch(epoch)
        task.train()
        with task.no_sync():
            found = task(images, labels)
        assert found["output"].shape == (4, 3)
        optimizer.zero_grad()
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        task.update_ema(step=epoch)
    assert not torch.equal(heads, before)  # the heads of the loss are trained
    assert task.get_eval_model() is student
    if hasattr(task, "create_evaluator"):  # from 1.0.31 on
        assert task.create_evaluator() is not None
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    assert set(state["state_dict"]) == set(student.state_dict()) == set(state["state_dict_ema"])
    torch.save(state, tmp_path / "checkpoint.pth")
    plain = build("timm:resnet10t", 3, str(tmp_path / "checkpoint.pth"))  # the student alone, as timm saves it
    assert torch.equal(plain.conv1[0].weight, student.conv1[0].weight)
    other = PCKDTask(Distiller(build("timm:resnet10t", 3), teacher, losses=losses, example=images), epochs=5)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert other.epoch == 1
    assert torch.equal(other.distiller.objective.contrast.to_student.weight, heads)
