"""The loop, through the command line: whole, killed and resumed, on two ranks, and in mmengine's own runner."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from head_kd.checkpoints import read_weights
from head_kd.cli import main
from head_kd.stack import said_nothing
from head_kd.training.loop import KeyedDataset, KeyedSampler, MemoryDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner
from tiny_detectors import train_words


def test_a_run_folder_is_whole(trained, capsys):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "student.safetensors",
        "student.pth",
        "config.json",
        "summary.json",
        "report.html",
        "figures/losses.png",
        "guard.json",
        "config.py",
        "student.py",
    ):
        assert (trained / name).stat().st_size > 0, name
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_cls", "assist0.loss_cls", "akd0.loss_fc1", "ckd0.loss", "lr", "val_bbox_mAP"} <= set(rows[0])
    assert float(rows[0]["akd0.loss_fc1"]) == 0
    assert float(rows[3]["akd0.loss_fc1"]) > 0
    guard = json.loads((trained / "guard.json").read_text())
    assert set(guard["gradient_ratio"]) == {"akd0.loss_fc1", "akd0.loss_fc2", "ckd0.loss"}
    assert any("the same in the same order" in line for line in guard["lines"])
    assert "teacher_ap" in guard
    assert main([*train_words(trained.parent, trained, "--guard", "2"), "--resume"]) == 0
    assert "has finished" in capsys.readouterr().out


def test_killed_and_resumed_is_unbroken(project, trained):
    """Kill -9 of the process between two steps; the same weights and metrics, bit for bit."""
    out = project / "killed"
    words = train_words(project, out, "--guard", "2")
    code = f"import torch; torch.set_num_threads(1); from head_kd.cli import main; main({words!r})"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file = out / "metrics.csv"
    deadline = time.monotonic() + 300
    while not (out / "checkpoints/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert file.exists()
    assert main([*words, "--resume"]) == 0
    for name in ("student.safetensors", "metrics.csv"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    ours, theirs = (read_weights(f / "checkpoints/last.ckpt").state_dict for f in (out, trained))
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))
    assert list(ours) == list(theirs)


def test_mmdets_own_runner_takes_the_config_that_ran(trained, tmp_path):
    """What ``tools/train.py`` does with ``config.py``: train, save, resume, with mmengine's checkpoints."""
    cfg = Config.fromfile(trained / "config.py")
    cfg.work_dir, cfg.log_level = str(tmp_path), "ERROR"
    cfg.train_cfg.max_iters, cfg.val_cfg, cfg.val_dataloader, cfg.val_evaluator = 2, None, None, None
    cfg.default_hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": False}, "logger": None}
    cfg.visualizer = {"type": "Visualizer", "vis_backends": [], "name": "stock"}
    cfg.param_scheduler = None
    cfg.custom_hooks = [{"type": "PlainCheckpointHook"}]
    with said_nothing():
        Runner.from_cfg(cfg).train()
        assert (tmp_path / "iter_2.pth").exists()
        cfg.train_cfg.max_iters, cfg.resume = 3, True
        cfg.visualizer.name = "again"
        cfg.experiment_name = "again"
        runner = Runner.from_cfg(cfg)
        runner.train()
    assert runner.iter == 3
    assert int(runner.model.head_kd.step) == 3


def test_two_processes_of_a_launcher_train_on_a_cpu(project, tmp_path):
    """torchrun with gloo, through the command: mmengine's own start of processes wants CUDA."""
    words = train_words(project, tmp_path / "out", "--launcher", "pytorch", "--steps", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    port = str(20000 + (os.getpid() + 7) % 20000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m"]
    done = subprocess.run(
        [*launch, "head_kd.cli", *words], env=environment, timeout=280, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 steps" in done.stdout
    rows = list(csv.DictReader((tmp_path / "out/metrics.csv").open()))
    assert [int(r["step"]) for r in rows] == [1, 2]
    assert (tmp_path / "out/student.safetensors").exists()


def test_two_ranks_agree_and_do_not_wait(project, tmp_path):
    """gloo with find_unused_parameters=False, one rank with images without objects; the same weights after."""
    script = Path(__file__).parent / "ranks_run.py"
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(script), str(project), str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [r.wait(timeout=280) for r in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert all(
        torch.equal(first["state"][k], second["state"][k])
        for k in first["state"]
        if "running" not in k and "tracked" not in k
    )
    # one process with the mean of both ranks' gradients makes the same step
    for key, value in first["alone"].items():
        assert torch.allclose(first["grads"][key], value, atol=1e-5, rtol=1e-4), key


def test_items_are_kept_whole(project):
    """``MemoryDataset`` gives each time what its data set gave first, and reads no file again."""
    config = Config.fromfile(project / "student.py").train_dataloader.dataset
    config.pipeline = [t for t in config.pipeline if t["type"] != "RandomFlip"]
    plain, kept = DATASETS.build(config), MemoryDataset(config)
    first = [kept[i] for i in range(len(kept))]
    kept.dataset.pipeline = None
    for i in (3, 0, 3):
        again, expected = kept[i], plain[i]
        assert again is not first[i]
        assert torch.equal(again["inputs"], expected["inputs"])
        assert torch.equal(again["data_samples"].gt_instances.labels, expected["data_samples"].gt_instances.labels)
    assert len(kept) == len(plain)
    assert kept.metainfo == plain.metainfo


def test_order_and_augmentation_depend_on_seed_epoch_and_index_alone(project):
    """Each image once an epoch, another order in the next; an item is the same whenever it is asked for."""
    config = Config.fromfile(project / "student.py").train_dataloader.dataset
    data = KeyedDataset(DATASETS.build(config), seed=3)
    sampler = KeyedSampler(data, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2]
    assert sorted(orders[1]) == list(range(8, 16))
    assert [key - 8 for key in orders[1]] != orders[0]
    first = data[orders[0][0]]
    before = torch.get_rng_state()
    torch.rand(7)
    again = data[orders[0][0]]
    assert torch.equal(first["inputs"], again["inputs"])
    torch.set_rng_state(before)
    flipped = {bool(data[epoch * 8].get("data_samples").metainfo.get("flip")) for epoch in range(12)}
    assert flipped == {True, False}
