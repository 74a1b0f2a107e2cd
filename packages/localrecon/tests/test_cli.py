import json

import numpy as np
import pytest
import torch
import yaml
from localrecon.cli import main
from PIL import Image
from safetensors.torch import load_file

from tenfold.testing import assert_user_error

SMALL = [
    "--depth",
    "3",
    "--width",
    "8",
    "--k",
    "2",
    "--epochs",
    "1",
    "--batch_size",
    "128",
    "--device",
    "cpu",
    "--quiet",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert (
        main(["train", "--model", "convnet", "--data", "digits", *SMALL, "--log_every", "2", "--out", str(folder)]) == 0
    )
    return folder


def test_a_training_writes_what_the_readme_says(trained):
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {
        "backbone.safetensors",
        "heads.safetensors",
        "plan.json",
        "config.yaml",
        "config.json",
        "metrics.csv",
        "summary.json",
        "report.html",
        "environment.json",
        "checkpoints/last.ckpt",
        "figures/losses.png",
    } <= names
    assert "m2/loss" in (trained / "metrics.csv").read_text().splitlines()[0]
    assert json.loads((trained / "summary.json").read_text())["arms"]["sgr"]["accuracy"][0] > 9


def test_trained_models_are_evaluated_diagnosed_and_exported(trained, tmp_path, capsys):
    run = ["--run", str(trained), "--device", "cpu"]
    assert main(["evaluate", *run, "--threshold", "0.5", "--out", str(tmp_path / "e")]) == 0
    assert "share of the computation" in capsys.readouterr().out
    known = json.loads((trained / "summary.json").read_text())["arms"]["sgr"]
    again = json.loads((tmp_path / "e/summary.json").read_text())["arms"]["sgr"]
    assert again["accuracy"] == known["accuracy"]
    assert main(["diagnose", *run, "--samples", "64", "--out", str(tmp_path / "d")]) == 0
    assert "certificate" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "d/diagnosis.json").read_text())["boundaries"]) == 1
    assert main(["export", *run, "--heads", "true", "--out", str(tmp_path / "x")]) == 0
    from localrecon.models import convnet

    model = convnet(1, 10, width=8, depth=3)
    model.load_state_dict(load_file(tmp_path / "x/model.safetensors"))
    assert (tmp_path / "x/heads.safetensors").exists()


def test_plans_are_printed_and_written(tmp_path, capsys):
    assert (
        main(
            [
                "plan",
                "--model",
                "resnet20",
                "--data",
                "digits",
                "--k",
                "3",
                "--batch_size",
                "8",
                "--out",
                str(tmp_path / "p"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "predicted peak" in out
    assert json.loads((tmp_path / "p/plan.json").read_text())["cuts"]


def test_methods_are_compared(tmp_path, capsys):
    words = [
        "compare",
        "--model",
        "mlp",
        "--data",
        "digits",
        *SMALL,
        "--arms",
        "bp,local,sgr",
        "--ks",
        "2,3",
        "--seeds",
        "0",
    ]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    for arm in ("bp", "local-k2", "sgr-k2", "sgr-k3"):
        assert arm in out
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert {claim["id"] for claim in summary["claims"]} == {
        "sgr-k2_accuracy",
        "sgr-k2_bp_peak",
        "sgr-k3_accuracy",
        "sgr-k3_bp_peak",
    }
    for claim in summary["claims"]:  # one seed gives no interval: differences are not decided, counted bytes are
        assert (claim["holds"] is None) == claim["id"].endswith("accuracy")
    assert main([*words, "--resume", "--out", str(tmp_path / "c")]) == 0


def test_bpfree_is_trained_and_saved(tmp_path):
    words = ["train", "--model", "mlp", "--data", "digits", "--method", "bpfree", "--feedback", "fa", *SMALL]
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "b"), "--device", "cpu", "--out", str(tmp_path / "e")]) == 0


def test_folders_of_images_train_a_model_of_timm(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{i}.png")
    words = [
        "train",
        "--data",
        f"imagefolder:{tmp_path / 'data'}",
        "--image_size",
        "32",
        "--batch_size",
        "4",
        "--epochs",
        "1",
    ]
    more = ["--augment", "timm", "--mixup", "0.8", "--cutmix", "1", "--k", "2", "--device", "cpu", "--quiet"]
    assert main([*words, "--model", "timm:resnet10t", *more, "--out", str(tmp_path / "run")]) == 0
    assert "backbone.safetensors" in {path.name for path in (tmp_path / "run").iterdir()}
    assert_user_error(
        main, [*words, "--model", "timm:resnet1", "--out", str(tmp_path / "no")], capsys, "resnet1", "did you mean"
    )


def test_npz_in_both_layouts_and_text_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (64, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 64)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    names = np.array(["a", "b", "c"])
    np.savez(
        tmp_path / "b.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        classes=names,
    )
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    short = ["--epochs", "1", "--k", "2", "--batch_size", "16", "--device", "cpu", "--quiet"]
    for name in ("a", "b"):
        words = ["train", "--model", "mlp", "--depth", "3", "--data", f"npz:{tmp_path / name}.npz", *short]
        assert main([*words, "--validation", "0.25", "--out", str(tmp_path / name)]) == 0
        assert "val/acc" in (tmp_path / name / "metrics.csv").read_text()
    words = [
        "train",
        "--model",
        "gpt",
        "--depth",
        "2",
        "--width",
        "16",
        "--window",
        "32",
        "--data",
        f"text:{tmp_path / 't.txt'}",
    ]
    assert main([*words, *short, "--out", str(tmp_path / "t")]) == 0
    np.savez(tmp_path / "bad.npz", x_train=images[..., 0].astype(np.int8), y_train=labels, x_test=images, y_test=labels)
    words = ["train", "--model", "mlp", "--out", str(tmp_path / "no"), "--data"]
    assert_user_error(main, [*words, f"npz:{tmp_path / 'bad.npz'}"], capsys, "bad.npz", "'x_train' is")
    (tmp_path / "short.txt").write_text("short")
    words = ["train", "--model", "gpt", "--out", str(tmp_path / "no2"), "--data"]
    assert_user_error(main, [*words, f"text:{tmp_path / 'short.txt'}"], capsys, "do not fill two windows")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "resnet21"], "did you mean resnet32 or resnet20"),
        (["--model", "gpt"], "does not go with --data digits"),
        (["--model", "tim:resnet18"], "unknown kind 'tim'; did you mean timm"),
        (["--model", "py:no_such_module_at_all:f"], "py:MODULE:FUNCTION"),
        (["--model", "mlp", "--k", "11"], "k must be 1 to 10, the number of blocks"),
        (["--model", "mlp", "--budget", "1KB"], "the least is"),
        (["--model", "mlp", "--budget", "lots"], "no number of bytes"),
        (["--model", "mlp", "--head.kind", "conv_gap"], "head conv_gap of module 1 does not fit"),
        (["--model", "mlp", "--sgr.lam", "-1"], "lam must be 0 or more"),
        (["--model", "mlp", "--sgr.estimater", "exact"], "did you mean --sgr.estimator"),
        (["--model", "resnet20", "--method", "bpfree"], "bpfree takes --model mlp or convnet"),
        (["--model", "mlp", "--augment", "timm"], "imagefolder"),
    ],
)
def test_what_users_can_mend_is_one_line(words, expected, capsys, tmp_path):
    assert_user_error(
        main, ["train", "--data", "digits", *words, "--quiet", "--out", str(tmp_path / "o")], capsys, expected
    )


def test_folders_that_are_no_training_are_refused(tmp_path, capsys):
    words = ["evaluate", "--run", str(tmp_path), "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "expected the folder of a finished `localrecon train`")


def test_recipes_are_whole(capsys):
    from importlib.resources import files

    recipes = sorted(path.name for path in files("localrecon").joinpath("recipes").iterdir())
    assert len(recipes) == 5
    for name in recipes:
        assert (
            main(["train", "--config", f"recipe:{name.removesuffix('.yaml')}", "--data", "digits", "--print_config"])
            == 0
        )
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["epochs"] >= 1
    assert torch.get_num_threads() >= 1


def test_the_quick_demo_runs_whole(tmp_path, capsys):
    assert main(["demo", "--quick", "--quiet", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: real: handwritten digits")
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert len(list((tmp_path / "demo/figures").glob("*.png"))) == 3
