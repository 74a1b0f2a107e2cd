"""The commands, one after another as a user would call them; and what is refused."""

import csv
import json

import numpy as np
import onnxruntime
import pytest
import torch
from freespace_uda import Predictor, load_model
from freespace_uda.cli import main
from freespace_uda.predictor import Exported
from PIL import Image

from tenfold.testing import assert_user_error

SIZE = ["--reading.size", "64,32", "--reading.scenes", "4"]
TRAIN = [
    "train", "--data", "roads-flat", "--target", "roads-real", "--steps", "3", "--batch_size", "2", *SIZE,
    "--target_reading.size", "64,32", "--target_reading.scenes", "4", "--rgb_encoder", "freespace:tiny", "--width", "8",
    "--size", "64,32", "--watched", "2", "--log_every", "1", "--align.start", "0", "--align.min_pixels", "1", "--device", "cpu",
    "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert main([*TRAIN, "--out", str(folder / "run")]) == 0
    words = ["simulate", "--domain", "roads-real", "--scenes", "2", "--test", "2", "--size", "64,32"]
    assert main([*words, "--out", str(folder / "world")]) == 0
    return folder


def test_training_writes_its_files(trained):
    run = trained / "run"
    for name in ("config.yaml", "environment.json", "metrics.csv", "checkpoints/last.ckpt", "model.safetensors", "config.json",
                 "figures/target.png", "figures/course.png", "report.html"):  # fmt: skip
        assert (run / name).exists(), name
    card = json.loads((run / "config.json").read_text())
    assert card["method"] == "ccg-sfa"
    assert 1 <= card["chosen"]["step"] <= 3
    with (run / "metrics.csv").open() as file:
        columns = set(next(csv.reader(file)))
    assert {"loss", "segmentation", "adversarial", "mask rgb", "target agreement", "chosen step"} <= columns


def test_a_training_whose_mask_is_empty_says_so(tmp_path, capsys):
    assert main([*TRAIN, "--align.tau", "0.9999", "--out", str(tmp_path / "run")]) == 0
    assert "warning: the alignment mask of the rgb stream has 0 % of the target's pixels" in capsys.readouterr().out


def test_evaluate_prints_and_writes_rates_by_distance_and_from_above(trained, tmp_path, capsys):
    words = [
        "evaluate",
        "--run",
        str(trained / "run"),
        "--data",
        "roads-real",
        *SIZE,
        "--bev",
        "true",
        "--device",
        "cpu",
    ]
    assert main([*words, "--out", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["scenes"] == 4
    assert 0 <= found["perspective"]["f1"] <= 1
    assert {"perspective", "by distance", "bird's-eye view"} <= set(found)
    out = capsys.readouterr().out
    assert "from above" in out
    assert "MaxF" in out
    for missing in ("depth", "rgb"):
        assert main([*words, "--missing", missing, "--out", str(tmp_path / missing)]) == 0


def test_predict_on_one_picture_with_depth_and_without_either(trained, tmp_path, capsys):
    world = trained / "world"
    with (world / "manifest.csv").open() as file:
        row = next(csv.DictReader(file))
    (tmp_path / "k.txt").write_text(" ".join(row[c] for c in ("fx", "fy", "cx", "cy")))
    run = ["predict", "--run", str(trained / "run"), "--device", "cpu", "--quiet"]
    depth = [
        "--depth",
        str(world / row["depth"]),
        "--reading.depth_unit",
        "m",
        "--calibration",
        str(tmp_path / "k.txt"),
    ]
    rgb = ["--rgb", str(world / row["rgb"])]
    assert main([*run, *rgb, *depth, "--out", str(tmp_path / "both")]) == 0
    stem = "train_00000"
    for kind in ("mask", "overlay", "probability", "confidence", "normals"):
        assert Image.open(tmp_path / f"both/{kind}/{stem}.png").size == (64, 32), kind
    net, settings, _ = load_model(trained / "run")
    item = np.asarray(Image.open(world / row["rgb"])), np.asarray(Image.open(world / row["depth"]))
    k = np.array([[float(row["fx"]), 0, float(row["cx"])], [0, float(row["fy"]), float(row["cy"])], [0, 0, 1]])
    found = Predictor(net, settings)(*item, k)
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"both/mask/{stem}.png")) > 0, found.mask())
    assert main([*run, *rgb, "--out", str(tmp_path / "rgb")]) == 0
    assert "the RGB head answers" in capsys.readouterr().out
    assert not (tmp_path / "rgb/normals").exists()
    assert main([*run, *depth, "--out", str(tmp_path / "depth")]) == 0
    assert "head of the normals answers" in capsys.readouterr().out
    words = ["--data", f"manifest:{world / 'manifest.csv'}", "--out", str(tmp_path / "all")]
    assert main([*run, *words]) == 0
    assert len(list((tmp_path / "all/mask").glob("*.png"))) == 4


def test_a_picture_of_another_size_is_answered_at_its_own_size(trained):
    net, settings, _ = load_model(trained / "run")
    found = Predictor(net, settings)(
        np.zeros((50, 90, 3), np.uint8), np.full((50, 90), 9.0, np.float32), np.eye(3) * 40
    )
    assert found.probability.shape == (50, 90)
    assert found.normals.shape == (3, 50, 90)


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_an_exported_file_gives_the_same_probabilities_with_the_normals_inside(trained, tmp_path, format):
    words = [
        "export",
        "--run",
        str(trained / "run"),
        "--format",
        format,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main(words) == 0
    net, settings, _ = load_model(trained / "run")
    torch.manual_seed(0)
    rgb, depth = torch.rand(3, 3, 32, 64), 2 + 30 * torch.rand(3, 1, 32, 64)
    depth[:, :, :10], depth[0, :, 20, 5] = 0, float("nan")
    depth[2] = 0  # no depth at all: the RGB head
    k = torch.tensor([[40.0, 0, 31.5], [0, 40, 14], [0, 0, 1]]).expand(3, 3, 3).contiguous()
    with torch.no_grad():
        wanted = Exported(net, settings)(rgb, depth, k)
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(tmp_path / "x/model.onnx"))
        feed = {"rgb": rgb.numpy(), "depth": depth.numpy(), "intrinsics": k.numpy()}
        found = torch.from_numpy(session.run(["probability"], feed)[0])
    else:
        found = torch.export.load(tmp_path / "x/model.pt2").module()(rgb, depth, k)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_inspect_shows_counts_ids_depth_and_camera_and_what_looks_wrong(trained, tmp_path, capsys):
    data = ["--data", f"manifest:{trained / 'world/manifest.csv'}"]
    assert main(["inspect", *data, "--out", str(tmp_path / "i")]) == 0
    out = capsys.readouterr().out
    assert "label ids found" in out
    assert "camera height (m)" in out
    assert "look:" not in out
    assert (tmp_path / "i/figures/overview.png").exists()
    assert main(["inspect", *data, "--reading.depth_unit", "mm", "--out", str(tmp_path / "mm")]) == 0
    assert "look: " in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["int8", "oct16"])
def test_training_takes_normals_that_were_computed_before(tmp_path, encoding):
    words = ["normals", "--data", "roads-flat", *SIZE, "--encoding", encoding, "--out", str(tmp_path / "n"), "--quiet"]
    assert main(words) == 0
    assert main([*TRAIN, "--normal_cache", str(tmp_path / "n"), "--out", str(tmp_path / "run")]) == 0


def test_compare_gives_every_arm_the_same_seeds_and_scenes(tmp_path, capsys):
    words = [
        "compare",
        *TRAIN[1:],
        "--test_reading.size",
        "64,32",
        "--test_reading.scenes",
        "3",
        "--arms",
        "rgb,both,oracle",
    ]
    assert main([*words, "--seeds", "0,1", "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert {arm: len(v["F1"]) for arm, v in summary["arms"].items()} == {"rgb": 2, "both": 2, "oracle": 2}
    assert [c["id"] for c in summary["claims"]] == ["both_over_rgb", "oracle_over_rgb"]


REFUSED = [
    (["train", "--data", "roads-flat", "--target", "roads-flat"], "source and target have to be different"),
    (["train", "--data", "roads-flat", "--method", "ccg-sfa", "--streams", "rgb"], "needs --streams both"),
    (["train", "--data", "roads-flat", "--size", "100,32"], "--size: expected multiples of 32, got 100,32"),
    (["train", "--data", "roads-flat", "--accumulate", "2"], "--accumulate: expected 1"),
    (["train", "--data", "roads-flat", "--rgb_encoder", "timm:resnet5"], "no model of this name"),
    (["train", "--data", "roads-flat", *SIZE, "--normal_cache", "nowhere"], "no folder of `freespace-uda normals`"),
    (["evaluate", "--run", "nowhere", "--data", "roads-real"], "nowhere"),
    (["predict", "--run", "nowhere"], "expected --data, or --rgb and --depth"),
    (["export", "--run", "nowhere", "--format", "kitti"], "--data is for --format kitti"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED)
def test_a_command_that_cannot_work_is_refused_in_one_line_and_leaves_nothing(tmp_path, capsys, words, told):
    base = TRAIN if words[0] == "train" else words[:1]
    assert_user_error(main, [*base, *words[1:], "--out", str(tmp_path / "out")], capsys, told)
    assert not (tmp_path / "out").exists()


def faulty(tmp_path, depth):
    """A manifest of four scenes whose depth is something else."""
    rows = ["rgb,depth,label,depth_unit,fx,fy,cx,cy"]
    for i in range(4):
        Image.fromarray(np.full((32, 64, 3), 90, np.uint8)).save(tmp_path / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", depth.astype(np.float32))
        Image.fromarray((np.arange(32)[:, None] > 20).repeat(64, 1).astype(np.uint8)).save(tmp_path / f"l{i}.png")
        rows.append(f"{i}.png,{i}.npy,l{i}.png,m,40,40,31.5,12")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    return f"manifest:{tmp_path / 'm.csv'}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda z: 1000 * z, "--reading.depth_unit mm"),
        (lambda z: np.where(z > 0, 20 / np.maximum(z, 1e-3), 0), "looks like a disparity"),
        (lambda z: 0 * z, "no pixel has valid depth"),
    ],
)
def test_training_on_depth_of_another_kind_is_refused_before_it_begins(tmp_path, capsys, change, told):
    v = np.arange(32)[:, None] - 12.0
    ground = np.broadcast_to(np.where(v > 0, 1.5 * 40 / np.maximum(v, 1), 0), (32, 64))
    data = faulty(tmp_path, change(ground))
    words = [*TRAIN, "--data", data, "--out", str(tmp_path / "out")]
    assert_user_error(main, words, capsys, told)
    assert not (tmp_path / "out").exists()
