"""The commands as a person types them, on folders of PNG files, and what they answer to mistakes."""

import csv
import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from pckd.cli import main
from pckd.models import build
from PIL import Image
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from tenfold.testing import assert_user_error

SMALL = ["--epochs", "1", "--batch_size", "8", "--device", "cpu", "--quiet", "--reading.size", "32"]
SMALL += ["--views.number", "2", "--losses.pckd.align_hidden", "32"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, images in (("train", 8), ("val", 4)):
        for name, color in (("blue", 2), ("green", 1), ("red", 0)):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 90, (36, 40, 3), dtype=np.uint8)
                pixels[..., color] += 120
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(pictures, tmp_path_factory):
    """A teacher that was trained by the command itself, as its folder."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert (
        main(["train", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain8", *SMALL, "--out", str(out)])
        == 0
    )
    return out


@pytest.fixture(scope="module")
def student(pictures, teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "run"
    words = ["--student", "cifar:plain4", "--teacher", "cifar:plain8", "--teacher_weights", str(teacher)]
    assert main(["train", "--data", f"imagefolder:{pictures}", *words, *SMALL, "--out", str(out)]) == 0
    return out


def test_train_leaves_what_the_contract_names(student, pictures):
    files = {path.relative_to(student).as_posix() for path in student.rglob("*") if path.is_file()}
    expected = {"config.yaml", "environment.json", "metrics.csv", "checkpoints/last.ckpt", "student.safetensors"}
    expected |= {"config.json", "report.html", "summary.json", "weights.npz", "previewed.csv"}
    expected |= {f"figures/{name}.png" for name in ("accuracy", "difficulty", "previewed")}
    assert expected <= files
    summary = json.loads((student / "summary.json").read_text())
    assert list(summary["arms"]) == ["pckd"]
    rows = list(csv.DictReader((student / "previewed.csv").open()))
    assert len(rows) == 24
    assert rows[0]["image"].startswith(str(pictures))
    assert [float(r["mean_weight"]) for r in rows] == sorted(float(r["mean_weight"]) for r in rows)


def test_a_finished_run_is_refused_or_passed_over(student, pictures, teacher, capsys):
    words = ["train", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_weights", str(teacher), *SMALL, "--out", str(student)]
    assert_user_error(main, words, capsys, "--resume", "--overwrite")
    assert main([*words, "--resume"]) == 0


def test_evaluate(student, teacher, pictures, tmp_path, capsys):
    words = ["evaluate", "--run", str(student), "--teacher", "cifar:plain8", "--teacher_weights", str(teacher)]
    assert main([*words, "--out", str(tmp_path / "e"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["top1"] == pytest.approx(json.loads((student / "config.json").read_text())["top1"])
    assert set(found["classes"]) == {"blue", "green", "red"}
    assert "center correlation" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    for part in ("train", "val"):
        (other / part / "red").rename(other / part / "rose")
    words = ["evaluate", "--run", str(student), "--data", f"imagefolder:{other}", "--out", str(tmp_path / "f")]
    assert_user_error(main, words, capsys, "differing: red, rose")


def test_a_student_that_began_with_weights_of_other_classes_is_read_again(pictures, tmp_path):
    """As a teacher, too: what its name brings (here a folder of two classes) is replaced by its own file."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic"}
    begun = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=2))
    begun.save_pretrained(tmp_path / "begun")
    words, data = ["--student", f"hf:{tmp_path / 'begun'}"], ["--data", f"imagefolder:{pictures}"]
    assert main(["train", *data, *words, *SMALL, "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "e"), "--device", "cpu"]) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--quiet"]) == 0
    words = ["--teacher", f"hf:{tmp_path / 'begun'}", "--student", "cifar:plain4", "--method", "kd"]
    words += ["--teacher_weights", str(tmp_path / "run")]
    assert main(["train", *data, *words, *SMALL, "--out", str(tmp_path / "taught")]) == 0


@pytest.mark.filterwarnings("always::UserWarning")
def test_batch_norms_too_slow_for_a_short_training_are_named(pictures, tmp_path, capsys):
    words = ["train", "--data", f"imagefolder:{pictures}", "--student", "tv:mobilenet_v3_small", *SMALL, "--steps", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "with a momentum of 0.01, too slowly for a training of 1 steps" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--ema", "0.5"], ["--reading.val_fraction", "0.25"]])
def test_a_training_that_ends_between_two_validations_reports_its_last_weights(pictures, tmp_path, more):
    words = ["train", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", *SMALL, "--epochs", "2", *more]
    assert main([*words, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "e"), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["top1"] == pytest.approx(json.loads((tmp_path / "run/config.json").read_text())["top1"])


@pytest.mark.parametrize("kind", ["safetensors", "torch-export", "onnx"])
def test_export_gives_the_students_logits(student, tmp_path, kind):
    """For ONNX as onnxruntime computes them, for another batch size than it was traced with."""
    assert main(["export", "--run", str(student), "--format", kind, "--out", str(tmp_path / "x"), "--quiet"]) == 0
    model = build("cifar:plain4", 3, str(student)).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    if kind == "safetensors":
        plain = build("cifar:plain4", 3).eval()
        plain.load_state_dict(load_file(tmp_path / "x/student.safetensors"))
        assert torch.equal(plain(images), expected)
    elif kind == "torch-export":
        found = torch.export.load(tmp_path / "x/student.pt2").module()(images)
        assert torch.allclose(found, expected, atol=1e-5)
    else:
        session = onnxruntime.InferenceSession(tmp_path / "x/student.onnx")
        (found,) = session.run(None, {"images": images.numpy()})
        assert np.allclose(found, expected.numpy(), atol=1e-4)


def test_compare(pictures, tmp_path, capsys):
    words = ["compare", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_epochs", "1", "--arms", "ce,kd,dkd,fitnet,pckd", "--seeds", "0,1,2", *SMALL]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "top-1 of pckd - top-1 of kd" in out
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert list(summary["arms"]) == ["ce", "kd", "dkd", "fitnet", "pckd"]
    assert all(claim["ci95"] is not None for claim in summary["claims"])
    assert len(summary["claims"]) == 4 + 3
    for name in ("methods", "accuracy", "difficulty", "previewed"):
        assert (tmp_path / f"c/figures/{name}.png").stat().st_size > 5000
    assert len((tmp_path / "c/previewed.csv").read_text().splitlines()) == 25
    settings = yaml.safe_load((tmp_path / "c/config.yaml").read_text())
    assert settings["arms"] == ["ce", "kd", "dkd", "fitnet", "pckd"]


def test_two_seeds_decide_nothing(pictures, teacher, tmp_path):
    words = ["compare", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_weights", str(teacher), "--arms", "ce,kd", "--seeds", "0,1", *SMALL]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert [claim["holds"] for claim in summary["claims"]] == [None]
    assert [claim["method"] for claim in summary["claims"]] == ["mean of 2 seeds; too few to decide"]


@pytest.mark.parametrize("method", ["pckd", "kd", "fitnet", "ce"])
def test_inspect(pictures, teacher, capsys, method):
    words = ["inspect", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_weights", str(teacher), "--method", method, "--batch_size", "8", "--reading.size", "32"]
    assert main([*words, "--views.number", "2", "--losses.pckd.align_hidden", "32"]) == 0
    out = capsys.readouterr().out
    assert "gradient norm" in out
    assert ("cannot fall below" in out) == (method == "pckd")


def test_streamed_folders_and_held_out_images(pictures, teacher, tmp_path):
    """Images that do not fit into memory, decoded by two workers; the best epoch by images held out."""
    words = ["train", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_weights", str(teacher), *SMALL, "--reading.resident_gb", "0", "--reading.val_fraction", "0.3"]
    assert main([*words, "--epochs", "2", "--out", str(tmp_path / "s")]) == 0
    header, *rows = (tmp_path / "s/metrics.csv").read_text().splitlines()
    assert "val_top1" in header
    assert rows


def test_mistakes_are_one_line(pictures, teacher, tmp_path, capsys):
    """An unknown method with the list, a teacher without weights, other classes, what is missing."""
    base = [
        "train",
        "--data",
        f"imagefolder:{pictures}",
        "--student",
        "cifar:plain4",
        "--out",
        str(tmp_path / "m"),
        "--overwrite",
        *SMALL,
    ]
    taught = [*base, "--teacher", "cifar:plain8", "--teacher_weights", str(teacher)]
    assert_user_error(main, [*base, "--method", "pkd"], capsys, "--method", "pckd-nokd")
    assert_user_error(main, [*base, "--method", "kd"], capsys, "--method kd needs --teacher")
    assert_user_error(main, [*base, "--teacher", "cifar:plain8"], capsys, "--teacher_weights is missing")
    assert_user_error(main, [*taught, "--tap", "features"], capsys, "'features' is no linear layer", "fc")
    assert_user_error(
        main, [*taught, "--views.number", "3"], capsys, "--views.number: expected one of 1, 2, 4, got '3'"
    )
    assert_user_error(main, [*taught, "--cache", str(tmp_path)], capsys, "pckd cache")
    assert_user_error(
        main,
        [
            *base,
            "--data",
            "digits",
            "--reading.size",
            "null",
            "--teacher",
            "cifar:plain8",
            "--teacher_weights",
            str(teacher),
        ],
        capsys,
        "it does not know 0, 1, 2, 3, 4; the data lack its blue, green, red",
    )
    assert_user_error(
        main,
        ["evaluate", "--run", str(tmp_path / "none"), "--out", str(tmp_path / "n")],
        capsys,
        "no such folder; expected the folder of a finished `pckd train`",
    )


def test_a_file_of_the_run_names_it_as_well(student, tmp_path, capsys):
    words = ["evaluate", "--run", str(student / "student.safetensors"), "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "e")]) == 0
    assert "top1" in capsys.readouterr().out


def test_arms_in_two_processes_equal_those_measured_here(pictures, teacher, tmp_path):
    words = ["compare", "--data", f"imagefolder:{pictures}", "--student", "cifar:plain4", "--teacher", "cifar:plain8"]
    words += ["--teacher_weights", str(teacher), "--arms", "ce,kd", "--seeds", "0,1", *SMALL]
    for name, more in (("here", []), ("there", ["--executor", "processes:2"])):
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
    here, there = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("here", "there"))
    assert here["arms"].keys() == there["arms"].keys()
    for arm, values in here["arms"].items():  # a worker has one thread: its sums are rounded in another order
        for name, seeds in values.items():
            assert there["arms"][arm][name] == pytest.approx(seeds, rel=1e-3, nan_ok=True), (arm, name)
    assert here["level"] is None
    assert (tmp_path / "there/figures/difficulty.png").exists()


def test_a_vision_transformer_learns_from_a_swin_by_adamw_with_mixtures_and_an_average(pictures, tmp_path, capsys):
    """On a folder of PNG files; the terms that ask for one class are refused before anything is trained."""
    words = ["compare", "--data", f"imagefolder:{pictures}", "--student", "timm:vit_tiny_patch16_224", *SMALL]
    words += ["--student_args", "{patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}", "--teacher_epochs", "1"]
    words += ["--teacher", "timm:swin_tiny_patch4_window7_224", "--seeds", "0", "--ema", "0.9"]
    words += ["--teacher_args", "{embed_dim: 12, depths: [1, 1], num_heads: [1, 2], window_size: 2}"]
    words += [
        "--optimizer.name",
        "adamw",
        "--optimizer.lr",
        "1e-3",
        "--optimizer.no_decay",
        "[1d]",
        "--mixing.mixup",
        "0.2",
    ]
    assert main([*words, "--arms", "ce,kd,pckd", "--out", str(tmp_path / "a")]) == 2
    assert "--mixing makes soft labels, which pckd cannot take" in capsys.readouterr().err
    assert main([*words, "--arms", "ce,kd,fitnet", "--out", str(tmp_path / "a")]) == 0
    assert set(json.loads((tmp_path / "a/summary.json").read_text())["arms"]) == {"ce", "kd", "fitnet"}
    card = json.loads((tmp_path / "a/teacher/config.json").read_text())
    assert card["args"]["embed_dim"] == 12
