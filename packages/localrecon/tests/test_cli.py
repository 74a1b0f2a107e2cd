import json

import numpy as np
import pytest
import torch
import yaml
from localrecon.cli import main
from localrecon.config import TrainSettings
from localrecon.models import convnet
from PIL import Image
from safetensors.torch import load_file

from tenfold import UserError
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
    words = ["train", "--model", "convnet", "--data", "digits", *SMALL, "--log_every", "2"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def bpfree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpfree") / "run"
    words = ["train", "--model", "mlp", "--data", "digits", "--method", "bpfree", "--feedback", "fa", *SMALL]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
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
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["level"] is None
    assert summary["arms"]["sgr"]["accuracy"][0] > 9


def test_trained_models_are_evaluated_and_diagnosed_by_their_folder_or_a_file_in_it(trained, tmp_path, capsys):
    run = ["--run", str(trained), "--device", "cpu"]
    assert main(["evaluate", *run, "--threshold", "0.5", "--out", str(tmp_path / "e")]) == 0
    assert "share of the computation" in capsys.readouterr().out
    known = json.loads((trained / "summary.json").read_text())["arms"]["sgr"]
    again = json.loads((tmp_path / "e/summary.json").read_text())["arms"]["sgr"]
    assert again["accuracy"] == known["accuracy"]
    file = ["--run", str(trained / "backbone.safetensors"), "--device", "cpu"]
    assert main(["diagnose", *file, "--samples", "64", "--out", str(tmp_path / "d")]) == 0
    assert "certificate" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "d/diagnosis.json").read_text())["boundaries"]) == 1


def test_exported_weights_have_the_models_own_names(trained, tmp_path, capsys):
    assert main(["export", "--run", str(trained), "--heads", "true", "--out", str(tmp_path / "x")]) == 0
    assert "takes images of 1 x 8 x 8 in 10 classes" in capsys.readouterr().out
    model = convnet(1, 10, width=8, depth=3)
    model.load_state_dict(load_file(tmp_path / "x/model.safetensors"))
    heads = load_file(tmp_path / "x/heads.safetensors")
    known = load_file(trained / "heads.safetensors")
    assert all(torch.equal(heads[name], known[name]) for name in known)
    about = json.loads((tmp_path / "x/config.json").read_text())
    assert (about["model"], about["shape"], about["names"]) == ("convnet", [1, 8, 8], list("0123456789"))


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_exported_graphs_give_the_models_logits(format, trained, tmp_path):
    assert main(["export", "--run", str(trained), "--format", format, "--out", str(tmp_path / "x")]) == 0
    model = convnet(1, 10, width=8, depth=3).eval()
    model.load_state_dict(load_file(trained / "backbone.safetensors"))
    x = torch.randn(5, 1, 8, 8)
    if format == "onnx":
        import onnxruntime

        found = torch.from_numpy(
            onnxruntime.InferenceSession(tmp_path / "x/model.onnx").run(None, {"images": x.numpy()})[0]
        )
    else:
        found = torch.export.load(tmp_path / "x/model.pt2").module()(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_plans_are_printed_and_written(tmp_path, capsys):
    words = [
        "plan",
        "--model",
        "resnet20",
        "--data",
        "digits",
        "--k",
        "3",
        "--batch_size",
        "8",
        "--optimizer.name",
        "sgd",
    ]
    assert main([*words, "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "predicted peak" in out
    plan = json.loads((tmp_path / "p/plan.json").read_text())
    assert plan["cuts"]
    assert main([*words[:-1], "adamw", "--out", str(tmp_path / "a")]) == 0
    assert json.loads((tmp_path / "a/plan.json").read_text())["predicted_peak"] > plan["predicted_peak"]


def test_methods_are_compared_here_or_in_processes_with_the_same_numbers(tmp_path, capsys):
    words = ["compare", "--model", "mlp", "--data", "digits", *SMALL, "--arms", "bp,local,sgr", "--ks", "2"]
    words += ["--seeds", "0"]
    assert main([*words, "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    for arm in ("bp", "local-k2", "sgr-k2"):
        assert arm in out
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert {claim["id"] for claim in summary["claims"]} == {
        "sgr_k2_over_local_k2",
        "sgr_k2_bp_peak",
    }
    for claim in summary["claims"]:  # one seed gives no interval: differences are not decided, counted bytes are
        assert (claim["holds"] is None) == ("over" in claim["id"])
    assert main([*words, "--resume", "--out", str(tmp_path / "c")]) == 0
    assert main([*words, "--executor", "processes:1", "--out", str(tmp_path / "p")]) == 0
    other = json.loads((tmp_path / "p/summary.json").read_text())["arms"]
    for arm, metrics in summary["arms"].items():
        for name, values in metrics.items():
            assert name == "seconds" or other[arm][name] == values, (arm, name)


def test_bpfree_is_evaluated_and_its_runs_have_neither_exits_nor_heads(bpfree, tmp_path, capsys):
    run = ["--run", str(bpfree)]
    assert main(["evaluate", *run, "--device", "cpu", "--out", str(tmp_path / "e")]) == 0
    assert main(["export", *run, "--out", str(tmp_path / "x")]) == 0
    out = ["--out", str(tmp_path / "no")]
    assert_user_error(main, ["evaluate", *run, "--threshold", "0.5", *out], capsys, "another method than bpfree")
    assert_user_error(main, ["diagnose", *run, *out], capsys, "another method than bpfree")
    assert_user_error(main, ["export", *run, "--heads", "true", *out], capsys, "no local heads")
    assert not (tmp_path / "no").exists()


def test_folders_of_images_train_a_model_of_timm(pictures, tmp_path, capsys):
    words = f"train --data imagefolder:{pictures} --image_size 32 --batch_size 4 --epochs 1".split()
    more = ["--augment", "timm", "--mixup", "0.8", "--cutmix", "1", "--k", "2", "--device", "cpu", "--quiet"]
    assert main([*words, "--model", "timm:resnet10t", *more, "--out", str(tmp_path / "run")]) == 0
    assert "backbone.safetensors" in {path.name for path in (tmp_path / "run").iterdir()}
    no = ["--out", str(tmp_path / "no")]
    assert_user_error(main, [*words, "--model", "timm:resnet1", *no], capsys, "resnet1", "did you mean")
    assert not (tmp_path / "no").exists()


def test_a_convnext_and_an_efficientnet_with_stochastic_depth_train_from_the_command_line(pictures, tmp_path):
    words = f"train --data imagefolder:{pictures} --image_size 64 --batch_size 4 --epochs 1 --k 3 --log_every 1"
    for model in ("timm:convnext_atto", "tv:efficientnet_b0"):
        out = tmp_path / model.partition(":")[2]
        assert main([*words.split(), "--model", model, "--device", "cpu", "--quiet", "--out", str(out)]) == 0
        assert (out / "backbone.safetensors").exists()
        assert "m3/loss" in (out / "metrics.csv").read_text()


def test_files_of_weights_start_a_model_and_their_classifier_gives_way(pictures, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=7)
    weights = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    words = f"train --model timm:test_resnet --data imagefolder:{pictures} --image_size 32 --batch_size 4 --k 2 --device cpu"
    small = ["--epochs", "1", "--optimizer.lr", "1e-30", "--optimizer.weight_decay", "0", "--quiet"]
    for file in ("w.safetensors", "w.pth"):
        out = tmp_path / file.replace(".", "-")
        assert main([*words.split(), *small, "--weights", str(tmp_path / file), "--out", str(out)]) == 0
        assert "is for 7 classes, and stays fresh" in capsys.readouterr().err
        found = load_file(out / "backbone.safetensors")
        for name, parameter in theirs.named_parameters():
            assert name.startswith("fc.") or torch.allclose(found[name], parameter, atol=1e-20), name
        (tmp_path / file).unlink()
        assert (
            main(["export", "--run", str(out), "--out", str(tmp_path / f"x{file[-1]}")]) == 0
        )  # they are not needed again
    no = [*words.split(), "--out", str(tmp_path / "no")]
    weights["odd"] = torch.zeros(1)
    save_file(weights, tmp_path / "odd.safetensors")
    assert_user_error(
        main, [*no, "--weights", str(tmp_path / "odd.safetensors")], capsys, "not the weights of this ResNet"
    )
    assert_user_error(main, [*no, "--weights", str(tmp_path / "none.pth")], capsys, "none.pth")


def test_models_of_fixed_size_are_told_the_size_of_the_images(pictures, tmp_path, capsys):
    words = f"plan --data imagefolder:{pictures} --batch_size 2 --k 2 --image_size 32"
    assert main([*words.split(), "--model", "timm:test_vit", "--out", str(tmp_path / "p")]) == 0
    no = [*words.split(), "--model", "timm:mixer_s32_224", "--out", str(tmp_path / "no")]
    assert_user_error(main, no, capsys, "takes images of 224 x 224, the data have 32 x 32", "--image_size 224")
    assert not (tmp_path / "no").exists()


def test_a_training_is_exported_without_its_data(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 255, (32, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(32) % 4 for part in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays)
    words = ["train", "--model", "timm:test_resnet", "--data", f"npz:{tmp_path / 'data.npz'}", "--batch_size", "16"]
    for method in ("sgr", "bp"):
        more = ["--method", method, "--epochs", "1", "--k", "2", "--device", "cpu", "--quiet"]
        assert main([*words, *more, "--out", str(tmp_path / method)]) == 0
    (tmp_path / "data.npz").unlink()
    for method in ("sgr", "bp"):
        assert main(["export", "--run", str(tmp_path / method), "--out", str(tmp_path / f"x{method}")]) == 0
        assert (tmp_path / f"x{method}/model.safetensors").exists()


def test_broken_pictures_are_named_or_left_out_and_counted(pictures, tmp_path, capsys):
    import shutil

    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data/train/cat/broken.png").write_bytes(b"no picture")
    words = f"train --model convnet --data imagefolder:{tmp_path / 'data'} --image_size 16 --quiet --epochs 1".split()
    words += ["--k", "2", "--depth", "2", "--batch_size", "4", "--device", "cpu"]
    out = ["--out", str(tmp_path / "o")]
    assert_user_error(main, [*words, "--reading.verify", "true", *out], capsys, "broken.png", "skip_bad")
    assert main([*words, "--reading.skip_bad", "true", *out]) == 0
    assert "without 1 broken pictures" in json.loads((tmp_path / "o/summary.json").read_text())["data"]


def test_models_of_torchvision_transformers_and_ones_own_are_trained(pictures, tmp_path, monkeypatch):
    words = f"train --data imagefolder:{pictures} --image_size 32 --batch_size 4 --epochs 1 --k 2 --device cpu".split()
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config |= {"intermediate_size": 24, "image_size": 32, "patch_size": 8}
    (tmp_path / "vit.json").write_text(json.dumps(config))
    (tmp_path / "mine_of_localrecon.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("tv:resnet18", "hf:vit.json", "py:mine_of_localrecon:net"):
        out = tmp_path / name.partition(":")[0]
        assert main([*words, "--model", name, "--quiet", "--out", str(out)]) == 0
        assert main(["evaluate", "--run", str(out), "--device", "cpu", "--out", f"{out}-e"]) == 0


def test_npz_in_both_layouts_and_text_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (64, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, 64)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    parts = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "b.npz", **parts, classes=np.array(["a", "b", "c"]))
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    short = ["--epochs", "1", "--k", "2", "--batch_size", "16", "--device", "cpu", "--quiet"]
    for name in ("a", "b"):
        words = ["train", "--model", "mlp", "--depth", "3", "--data", f"npz:{tmp_path / name}.npz", *short]
        more = ["--validation", "0.25", "--validate_every", "2"]
        assert main([*words, *more, "--out", str(tmp_path / name)]) == 0
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        assert "val/acc" in rows[0]
        assert rows[-1].startswith("2,")
    words = ["train", "--model", "gpt", "--depth", "2", "--width", "16", "--window", "32", *short]
    assert main([*words, "--data", f"text:{tmp_path / 't.txt'}", "--out", str(tmp_path / "t")]) == 0
    assert main(["export", "--run", str(tmp_path / "t"), "--format", "onnx", "--out", str(tmp_path / "x")]) == 0
    np.savez(tmp_path / "bad.npz", x_train=images[..., 0].astype(np.int8), y_train=labels, x_test=images, y_test=labels)
    words = ["train", "--model", "mlp", "--out", str(tmp_path / "no"), "--data"]
    assert_user_error(main, [*words, f"npz:{tmp_path / 'bad.npz'}"], capsys, "bad.npz", "'x_train' is")
    (tmp_path / "short.txt").write_text("short")
    words = ["train", "--model", "gpt", "--out", str(tmp_path / "no"), "--data"]
    assert_user_error(main, [*words, f"text:{tmp_path / 'short.txt'}"], capsys, "do not fill two windows")
    other = ["evaluate", "--run", str(tmp_path / "a"), "--data", "digits", "--out", str(tmp_path / "no")]
    assert_user_error(main, other, capsys, "images of 1 x 8 x 8 in 10 classes", "images of 3 x 8 x 8 in 3 classes")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model resnet21", "did you mean resnet32 or resnet20"),
        ("--model gpt", "does not go with --data digits"),
        ("--model tim:resnet18", "unknown kind 'tim': did you mean timm"),
        ("--model py:no_such_module_at_all:f", "no_such_module_at_all"),
        ("--model packaged:smollm2", "does not go with --data digits"),
        ("--model timm:resnet10t --width 8", "--width is for built-in models"),
        ("--model resnet20 --depth 8", "--depth is in the name"),
        ("--model mlp --k 11", "k must be 1 to 10, the number of blocks"),
        ("--model mlp --budget 1KB", "the least is"),
        ("--model mlp --budget lots", "--budget: expected a number of bytes"),
        ("--model mlp --head.kind conv_gap", "head conv_gap of module 1 does not fit"),
        ("--model mlp --head.kind conv_gapp", "--head.kind: expected one of auto, linear"),
        ("--model mlp --sgr.lam -1", "--sgr.lam: expected 0 or more, got -1"),
        ("--model mlp --optimizer.warmup 1", "--optimizer.warmup: expected 0 or more and less than 1, got 1"),
        ("--model mlp --sgr.estimater exact", "did you mean --sgr.estimator"),
        ("--model resnet20 --method bpfree", "bpfree takes --model mlp or convnet"),
        ("--model mlp --method sgrr", "--method: expected one of bp, ckpt, accum, local, sgr, bpfree, got 'sgrr'"),
        ("--model mlp --augment timm", "imagefolder"),
        ("--model mlp --precision 16 --device cpu", "--precision 16 needs a GPU"),
        ("--model mlp --validate_every 5", "--validate_every needs --validation"),
        ("--model mlp --batch_size 5000", "do not fill a batch of 5000"),
    ],
)
def test_what_users_can_mend_is_one_line_and_leaves_no_folder(words, expected, capsys, tmp_path):
    out = tmp_path / "o"
    assert_user_error(
        main, ["train", "--data", "digits", *words.split(), "--quiet", "--out", str(out)], capsys, expected
    )
    assert not out.exists()


@pytest.mark.parametrize("words", ["--augment crop", "--mixup 0.5"])
def test_what_is_for_images_is_refused_for_text(words, capsys, tmp_path):
    start = ["train", "--model", "gpt", "--data", "topics", *words.split(), "--out", str(tmp_path / "o")]
    assert_user_error(main, start, capsys, "for images")


def test_folders_that_are_no_training_are_refused(tmp_path, capsys):
    words = ["evaluate", "--run", str(tmp_path), "--out", str(tmp_path / "o")]
    assert_user_error(main, words, capsys, "expected the folder of a finished `localrecon train`")


def test_recipes_are_whole(capsys):
    from importlib.resources import files

    recipes = sorted(path.name for path in files("localrecon").joinpath("recipes").iterdir())
    assert len(recipes) == 5
    for name in recipes:
        words = ["train", "--config", f"recipe:{name.removesuffix('.yaml')}", "--data", "digits", "--print_config"]
        assert main(words) == 0
        assert yaml.safe_load(capsys.readouterr().out)["epochs"] >= 1


def test_the_quick_demo_runs_whole(tmp_path, capsys):
    assert main(["demo", "--quiet", "--quick", "--out", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("data: real: handwritten digits")
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["level"] == "quick"
    assert {claim["holds"] for claim in summary["claims"]} == {None}
    assert len(list((tmp_path / "demo/figures").glob("*.png"))) == 3


@pytest.mark.parametrize("method", ["bp", "ckpt", "accum", "bpfree"])
def test_checkpoints_within_modules_are_refused_for_methods_without_modules(method):
    with pytest.raises(UserError, match=f"--checkpointing is for local and sgr; --method {method}"):
        TrainSettings(data="digits", model="mlp", epochs=1, method=method, checkpointing=True)
