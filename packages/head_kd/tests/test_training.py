"""The loop, through the command line: killed and resumed, exported, cached, compared; with real processes where it matters."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from head_kd import rendered, small
from head_kd.checkpoints import read_weights
from head_kd.cli import main
from head_kd.data import write_drawn
from mmengine.config import Config
from tiny_detectors import STUDENTS, build, teacher_config

from tenfold import UserError
from tenfold.testing import assert_user_error


@pytest.fixture(scope="module")
def project(tmp_path_factory, teacher_file):
    """Two stock configs on a COCO folder: ``student.py``, ``teacher.py``, ``teacher.pth``, ``data``."""
    folder = tmp_path_factory.mktemp("project")
    data = folder / "data"
    train, val = write_drawn(data, "train", 0, 8), write_drawn(data, "val", 900, 4)
    student = small.experiment(STUDENTS["retinanet"], train, val, steps=6, batch=2, rate=1e-3)
    student["train_dataloader"]["dataset"]["pipeline"].insert(3, {"type": "RandomFlip", "prob": 0.5})
    Config(student).dump(str(folder / "student.py"))
    Config(small.experiment(teacher_config(), train, val, steps=6, batch=2, rate=1e-3)).dump(str(folder / "teacher.py"))
    (folder / "teacher.pth").write_bytes(teacher_file.read_bytes())
    return folder


def train_words(project, out, *more):
    return [
        "train",
        "--student",
        str(project / "student.py"),
        "--teacher",
        str(project / "teacher.py"),
        "--teacher_weights",
        str(project / "teacher.pth"),
        "--out",
        str(out),
        "--distill.warmup",
        "2",
        "--checkpoint_every",
        "1",
        "--log_every",
        "1",
        "--quiet",
        "--device",
        "cpu",
        "--guard",
        "-1",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(project):
    """An unbroken run of six steps, which is an epoch and a half."""
    out = project / "unbroken"
    assert main(train_words(project, out, "--guard", "2")) == 0
    return out


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
    """Property 18: kill -9 of the process between two steps; the same weights and metrics, bit for bit."""
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


def test_stock_mmdet_loads_what_was_exported(project, trained):
    """Property 2: the exported files fill a plain student strictly, and evaluation agrees with the run's."""
    plain = build(STUDENTS["retinanet"])
    for suffix in ("pth", "safetensors"):
        plain.load_state_dict(read_weights(trained / f"student.{suffix}").state_dict, strict=True)
    stock = torch.load(trained / "student.pth", weights_only=True)
    assert stock["meta"]["dataset_meta"]["classes"] == rendered.CLASSES
    assert set(stock["state_dict"]) == set(plain.state_dict())
    out = project / "evaluated"
    words = [
        "evaluate",
        "--student",
        str(project / "student.py"),
        "--checkpoint",
        str(trained / "student.safetensors"),
        "--out",
        str(out),
    ]
    assert main(words) == 0
    found = json.loads((out / "evaluation.json").read_text())
    told = json.loads((trained / "summary.json").read_text())["arms"]["own"]
    assert found["bbox_mAP"] == told["bbox_mAP"][0]


def test_export_checks_what_it_writes(project, trained, capsys):
    words = [
        "export",
        "--student",
        str(project / "student.py"),
        "--checkpoint",
        str(trained / "checkpoints/last.ckpt"),
        "--out",
        str(project / "exported"),
    ]
    assert main(words) == 0
    assert "bit for bit" in capsys.readouterr().out
    report = json.loads((project / "exported/export.json").read_text())
    assert report["verified"] is True
    assert report["left_out"] > 0
    assert (project / "exported/student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()
    words[2] = str(project / "teacher.py")
    assert_user_error(main, [*words[:-1], str(project / "e2")], capsys, "no rpn_head", "last.ckpt")


def test_mmdets_own_runner_takes_the_composed_config(trained, tmp_path):
    """What ``tools/train.py`` does with ``config.py``: train, save, resume, with mmengine's loop and checkpoints."""
    from head_kd.stack import said_nothing
    from mmengine.runner import Runner

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


def test_a_cache_trains_without_the_teacher(project, capsys):
    cache, out = project / "cached", project / "from_cache"
    pair = [
        "--student",
        str(project / "student.py"),
        "--teacher",
        str(project / "teacher.py"),
        "--teacher_weights",
        str(project / "teacher.pth"),
    ]
    assert main(["cache", *pair, "--boxes", "16", "--out", str(cache), "--quiet"]) == 0
    assert "8 images, 16 boxes each, fc1, fc2" in capsys.readouterr().out
    assert main([*train_words(project, out), "--cache", str(cache / "cache"), "--steps", "2"]) == 0
    assert float(list(csv.DictReader((out / "metrics.csv").open()))[-1]["akd0.loss_fc1"]) > 0


def test_inspect_shows_signals_cost_gradients_and_gap(project, capsys):
    pair = ["--student", str(project / "student.py"), "--teacher", str(project / "teacher.py")]
    words = [
        "inspect",
        *pair,
        "--teacher_weights",
        str(project / "teacher.pth"),
        "--images",
        "4",
        "--size",
        "128,128",
    ]
    assert main(words) == 0
    out = capsys.readouterr().out
    for part in (
        "akd0.s0_fc1",
        "student cls_tower 16",
        "the same in the same order",
        "teacher, backbone and neck",
        "semantic gap",
        "ckd0",
    ):
        assert part in out, part
    assert main(["inspect", *pair, "--images", "0", "--size", "128,128"]) == 0
    assert "no --teacher_weights" in capsys.readouterr().out


def test_arms_are_compared_with_statistics(project, capsys):
    words = train_words(project, project / "compared", "--steps", "1", "--arms", "plain,assist", "--seeds", "0,1")
    assert main(["compare", *words[1:]]) == 0
    assert "assistant on labels has a higher AP" in capsys.readouterr().out
    summary = json.loads((project / "compared/summary.json").read_text())
    assert set(summary["arms"]) == {"plain", "assist"}


def test_the_data_can_be_given_by_folder(project, capsys):
    words = train_words(
        project,
        project / "other",
        "--data",
        f"coco:{project / 'data'}",
        "--steps",
        "1",
        "--distill.preset",
        "plain",
    )
    assert main(words) == 0
    assert "1 steps" in capsys.readouterr().out


def test_bad_input_is_one_line(project, tmp_path, capsys, teacher_file):
    def refused(*more, expect, base=None):
        words = base or train_words(project, tmp_path / "out", "--overwrite")
        return assert_user_error(main, [*words, *more], capsys, *expect)

    refused("--teacher_weights", "none.pth", expect=["none.pth: no such checkpoint file"])
    refused("--teacher", str(project / "student.py"), expect=["fills", "of the configured RetinaNet", "no bbox_head"])
    refused(
        "--student",
        "mmdet::retinanet/retinanet_r18_fpn_1x_cocoo.py",
        expect=["did you mean retinanet_r18_fpn_1x_coco.py"],
    )
    refused("--student", str(teacher_file), expect=["is not a config"])
    refused("--distill.preset", "ouwn", expect=["own"])
    refused("--distill.preset", "own", "--lr", "-1", expect=["lr must be above 0"])
    refused("--data", f"coco:{tmp_path}", expect=["no annotations of the split 'train'"])
    refused("--data", "coco:", expect=["expected a path"])
    refused("--cache", str(tmp_path), expect=["holds no finished cache"])
    state = torch.load(teacher_file, weights_only=True)
    state["meta"]["dataset_meta"]["classes"] = ("square", *rendered.CLASSES[:1], *rendered.CLASSES[2:])
    torch.save(state, tmp_path / "swapped.pth")
    refused(
        "--teacher_weights",
        str(tmp_path / "swapped.pth"),
        "--guard",
        "0",
        expect=["in another order: class 0 is 'disc' in the data and 'square'"],
    )
    state["meta"]["dataset_meta"]["classes"] = ("cat",)
    torch.save(state, tmp_path / "cat.pth")
    refused(
        "--teacher_weights",
        str(tmp_path / "cat.pth"),
        "--guard",
        "0",
        expect=["6 of the data are unknown", "other_classes"],
    )
    refused("--guard", "2", "--min_teacher_ap", "90", expect=["the teacher has AP", "wrong checkpoint"])
    refused("--distill.akd_weight", "1e39", expect=["akd0.loss_fc1 is not finite at step 0"])


def test_without_a_teacher_the_message_names_the_way_out(project, capsys, tmp_path):
    words = ["train", "--student", str(project / "student.py"), "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "needs --teacher CONFIG and --teacher_weights FILE", "tf_head")


def test_a_pickle_is_not_run(tmp_path, capsys, project):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
    words = train_words(project, tmp_path / "o", "--teacher_weights", str(tmp_path / "evil.pth"))
    assert_user_error(main, words, capsys, "is not read; if you trust the file")
    assert not (tmp_path / "ran").exists()


def test_checkpoints_of_mmengine_are_read_over_their_log_buffers(tmp_path):
    import numpy as np
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer()
    buffer.update(1.5)
    content = {
        "state_dict": {"module.w": torch.ones(2)},
        "message_hub": {"log": {"loss": buffer}, "n": np.float64(3)},
        "meta": {"dataset_meta": {"CLASSES": ("a", "b")}},
    }
    torch.save(content, tmp_path / "zoo.pth")
    weights = read_weights(tmp_path / "zoo.pth")
    assert list(weights.state_dict) == ["w"]
    assert weights.classes == ("a", "b")
    for text in (b"", b"hello"):
        (tmp_path / "bad.pth").write_bytes(text)
        with pytest.raises(UserError, match=r"bad.pth (is not a checkpoint|holds)"):
            read_weights(tmp_path / "bad.pth")


def test_two_ranks_agree_and_do_not_wait(project, tmp_path):
    """Property 14: gloo with find_unused_parameters=False, one rank with images without objects; the same weights after."""
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
    from head_kd.training.loop import MemoryDataset
    from mmdet.registry import DATASETS

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
