"""The verbs besides training, and what all of them refuse in one line."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from head_kd import rendered
from head_kd.checkpoints import read_weights
from head_kd.cli import main
from head_kd.config import CompareSettings, TrainSettings
from mmdet.apis import DetInferencer
from mmengine.config import Config
from PIL import Image
from tiny_detectors import STUDENTS, build, pair_words, train_words

from tenfold import UserError
from tenfold.testing import assert_user_error


def test_stock_mmdet_loads_what_was_exported_and_evaluate_agrees_with_the_run(project, trained):
    """The exported files fill a plain student strictly."""
    plain = build(STUDENTS["retinanet"])
    for suffix in ("pth", "safetensors"):
        plain.load_state_dict(read_weights(trained / f"student.{suffix}").state_dict, strict=True)
    stock = torch.load(trained / "student.pth", weights_only=True)
    assert stock["meta"]["dataset_meta"]["classes"] == rendered.CLASSES
    assert set(stock["state_dict"]) == set(plain.state_dict())
    out = project / "evaluated"
    assert main(["evaluate", "--run", str(trained), "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    told = json.loads((trained / "summary.json").read_text())["arms"]["own"]
    assert found["bbox_mAP"] == told["bbox_mAP"][0]


def test_a_file_in_a_run_and_one_from_elsewhere_are_measured_alike(project, trained, tmp_path, capsys):
    """The checkpoint's student needs no ``--student`` in its run; the same file elsewhere does."""
    lone = tmp_path / "student.pth"
    shutil.copy(trained / "student.pth", lone)
    given = ["--student", str(project / "student.py")]
    ways = [["--run", str(trained / "checkpoints/last.ckpt")], ["--run", str(lone), *given]]
    found = []
    for number, words in enumerate(ways):
        assert main(["evaluate", *words, "--device", "cpu", "--out", str(tmp_path / str(number))]) == 0
        found.append((tmp_path / str(number) / "evaluation.json").read_text())
    assert found[0] == found[1]
    out = ["--out", str(tmp_path / "no")]
    capsys.readouterr()
    assert_user_error(main, ["evaluate", "--run", str(lone), *out], capsys, "in no run", "give --student CONFIG")
    assert_user_error(main, ["export", "--run", str(tmp_path / "0"), *out], capsys, "head-kd evaluate", "head-kd train")
    assert_user_error(main, ["evaluate", "--run", str(tmp_path / "none"), *out], capsys, "no such folder")
    assert not (tmp_path / "no").exists()


def test_export_checks_what_it_writes(project, trained, capsys):
    assert main(["export", "--run", str(trained), "--out", str(project / "exported")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    report = json.loads((project / "exported/export.json").read_text())
    assert report["verified"] is True
    assert report["left_out"] > 0
    assert (project / "exported/student.safetensors").read_bytes() == (trained / "student.safetensors").read_bytes()
    cfg = Config.fromfile(project / "exported/student.py")
    cfg.visualizer = {"type": "DetLocalVisualizer"}  # of mmdet's default_runtime.py, which stock configs begin with
    inferencer = DetInferencer(cfg, str(project / "exported/student.pth"), device="cpu", show_progress=False)
    (found,) = inferencer(np.zeros((128, 128, 3), np.uint8), pred_score_thr=0.0, no_save_pred=True)["predictions"]
    assert set(found["labels"]) <= set(range(6))
    assert inferencer.model.dataset_meta["classes"] == rendered.CLASSES
    other = ["--run", str(trained / "checkpoints/last.ckpt"), "--student", str(project / "teacher.py")]
    out = project / "refused"
    assert_user_error(main, ["export", *other, "--out", str(out)], capsys, "no rpn_head", "last.ckpt")
    assert not out.exists()


def test_a_cache_trains_without_the_teacher(project, capsys):
    cache, out = project / "cached", project / "from_cache"
    words = ["cache", *pair_words(project), "--boxes", "16", "--device", "cpu", "--out", str(cache), "--quiet"]
    assert main(words) == 0
    assert "8 images, 16 boxes each, fc1, fc2" in capsys.readouterr().out
    assert main([*train_words(project, out), "--cache", str(cache), "--steps", "2"]) == 0
    assert float(list(csv.DictReader((out / "metrics.csv").open()))[-1]["akd0.loss_fc1"]) > 0


def test_a_cache_for_a_pipeline_that_no_cached_box_can_follow_is_refused_before_it_is_made(project, tmp_path, capsys):
    cfg = Config.fromfile(project / "student.py")
    cfg.train_dataloader.dataset.pipeline[0:0] = [{"type": "CachedMosaic", "img_scale": (64, 64)}]
    cfg.dump(tmp_path / "student.py")
    words = ["cache", *pair_words(project), "--student", str(tmp_path / "student.py"), "--out", str(tmp_path / "cache")]
    assert_user_error(main, words, capsys, "cached boxes cannot follow CachedMosaic")
    assert not (tmp_path / "cache").exists()


def test_inspect_shows_signals_cost_gradients_and_gap_the_same_each_time(project, capsys):
    words = ["inspect", *pair_words(project), "--images", "4", "--size", "128,128"]
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
    assert "mmengine" not in out
    assert main(words) == 0
    assert capsys.readouterr().out == out


def test_inspect_without_weights_shows_what_depends_on_shapes(project, capsys):
    assert main(["inspect", *pair_words(project)[:4], "--images", "0", "--size", "128,128"]) == 0
    assert "no --teacher_weights" in capsys.readouterr().out


def test_arms_are_compared_with_statistics(project, capsys):
    out = ["--out", str(project / "compared"), "--quiet", "--device", "cpu"]
    words = ["compare", *pair_words(project), "--steps", "1", "--arms", "plain,assist", "--seeds", "0,1", *out]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "AP of assistant on labels - AP of student alone" in printed
    summary = json.loads((project / "compared/summary.json").read_text())
    assert set(summary["arms"]) == {"plain", "assist"}
    assert summary["level"] is None
    assert [claim["id"] for claim in summary["claims"]] == ["assist_over_plain"]


def test_the_data_can_be_given_by_folder(project, capsys):
    more = ["--data", f"coco:{project / 'data'}", "--steps", "1", "--method", "plain"]
    assert main(train_words(project, project / "other", *more)) == 0
    assert "1 steps" in capsys.readouterr().out


@pytest.fixture
def refused(project, tmp_path, capsys):
    """Checks that training with other words is refused in one line, and that nothing is left behind."""

    def check(*more, expect):
        out = tmp_path / "refused"
        line = assert_user_error(main, train_words(project, out, *more), capsys, *expect)
        assert not out.exists(), line

    return check


def test_what_is_not_there_is_refused_before_anything_is_computed(project, refused, tmp_path, teacher_file):
    refused("--teacher_weights", "none.pth", expect=["--teacher_weights none.pth: no such file"])
    refused(
        "--student",
        "mmdet::retinanet/retinanet_r18_fpn_1x_cocoo.py",
        expect=["did you mean retinanet_r18_fpn_1x_coco.py"],
    )
    refused("--student", str(teacher_file), expect=["is not a config"])
    refused("--data", f"coco:{tmp_path}", expect=["no annotations of the split 'train'"])
    refused("--data", "coco:", expect=["expected a path"])
    refused("--cache", str(tmp_path), expect=["holds no finished cache"])
    refused("--device", "mps", expect=["--device mps", "take cpu or cuda"])
    refused("--precision", "16", expect=["--precision 16 needs a GPU"])


def test_settings_out_of_their_range_are_refused_with_their_whole_path(refused):
    refused("--method", "ouwn", expect=["--method: expected one of own,", "did you mean own"])
    refused("--optimizer.lr", "-1", expect=["--optimizer.lr: expected more than 0, got -1"])
    refused("--guard", "-2", expect=["--guard: expected -1 or more, got -2"])
    refused("--distill.akd_weight", "-1", expect=["--distill.akd_weight: expected 0 or more"])


def test_a_teacher_that_does_not_fit_is_refused(project, refused, tmp_path, teacher_file):
    refused("--teacher", str(project / "student.py"), expect=["fills", "of the configured RetinaNet", "no bbox_head"])
    state = torch.load(teacher_file, weights_only=True)
    for name, classes, expect in (
        (
            "swapped.pth",
            ("square", *rendered.CLASSES[:1], *rendered.CLASSES[2:]),
            ["in another order: class 0 is 'disc' in the data and 'square'"],
        ),
        ("cat.pth", ("cat",), ["6 of the data are unknown", "--other_classes"]),
    ):
        state["meta"]["dataset_meta"]["classes"] = classes
        torch.save(state, tmp_path / name)
        refused("--teacher_weights", str(tmp_path / name), "--guard", "0", expect=expect)
    refused("--guard", "2", "--min_teacher_ap", "90", expect=["the teacher has AP", "wrong weights"])


def test_a_loss_that_is_not_finite_stops_the_run_with_its_name(project, tmp_path, capsys):
    words = train_words(project, tmp_path / "out", "--distill.akd_weight", "1e39", "--distill.warmup", "0")
    assert_user_error(main, words, capsys, "akd0.loss_fc1 is not finite at step 0")


def test_without_a_teacher_the_message_names_the_way_out(project, capsys, tmp_path):
    words = ["train", "--student", str(project / "student.py"), "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "needs --teacher CONFIG and --teacher_weights FILE", "--method tf_head")


def test_settings_are_checked_from_python_alike():
    with pytest.raises(UserError, match="--method assist copies the teacher's head: it needs --teacher CONFIG"):
        TrainSettings(student="s.py", method="assist")
    with pytest.raises(UserError, match="--arms own needs --teacher CONFIG"):
        CompareSettings(student="s.py", arms=["plain", "own"])
    with pytest.raises(UserError, match="arms: expected at least 2, got plain"):
        CompareSettings(student="s.py", arms=["plain"])
    with pytest.raises(UserError, match="--method tf_head reads no teacher at regions"):
        TrainSettings(student="s.py", method="tf_head", cache="c")


def test_damaged_voc_data_leaves_no_folder_behind(project, tmp_path, capsys):
    """The first split converts, the second is missing."""
    root = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    Image.new("RGB", (10, 8)).save(root / "JPEGImages/a.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox>"
    size = "<size><width>10</width><height>8</height></size>"
    text = f"<annotation>{size}<object><name>dog</name>{box}</object></annotation>"
    (root / "Annotations/a.xml").write_text(text)
    out = tmp_path / "out"
    words = train_words(project, out, "--data", f"voc:{root}")
    assert_user_error(main, words, capsys, "no objects in the split 'train' of the classes", "it has dog")
    (root / "Annotations/a.xml").write_text(text.replace("dog", "disc"))
    assert_user_error(main, words, capsys, "val.txt: No such file")
    assert not out.exists()
