"""The commands on tiny data, their files, and what they refuse."""

import json
import shutil

import pytest
import torch
from genview.cli import main

from tenfold import UserError
from tenfold.testing import assert_user_error

TRAIN = ["--backbone", "conv:8", "--size", "16", "--batch_size", "8", "--heads.hidden", "16", "--heads.out", "8"]


def run(*words):
    return main([*map(str, words), "--quiet"])


def works(*words):
    assert run(*words) == 0


@pytest.fixture(scope="module")
def trained(world, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    qd = ["--qd.mode", "static", "--knn_every", "1", "--log_every", "1"]
    works(
        "train",
        "--data",
        f"npz:{data}",
        "--views",
        world / "merged",
        *TRAIN,
        *qd,
        "--method",
        "byol",
        "--epochs",
        2,
        "--out",
        out,
    )
    return out


def test_a_training_writes_its_files(trained):
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "backbone.safetensors",
        "config.json",
        "summary.json",
        "report.html",
    ):
        assert (trained / name).is_file(), name
    header = (trained / "metrics.csv").read_text().splitlines()[0]
    assert {"loss", "quality", "effective share", "knn_top1"} <= set(header.split(","))
    assert json.loads((trained / "summary.json").read_text())["arms"]["byol"]["with a view"] == [24]


@pytest.mark.parametrize("protocol", ["knn", "linear", "linear-sweep", "semi"])
def test_every_protocol_measures_a_backbone(trained, tmp_path, protocol):
    probe = ["--probe.epochs", 2, "--probe.rates", 3, "--probe.share", "0.5"]
    works("evaluate", "--run", trained, "--protocol", protocol, *probe, "--out", tmp_path / "e")
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert all(0 <= value <= 100 for name, value in found["metrics"].items() if "top" in name)
    if protocol == "semi":
        assert len(found["subsets"]["top1 with 50% of the labels"]) == 12


def test_a_resnet_loads_into_torchvision_under_its_names(world, data, tmp_path):
    from torchvision.models import resnet18

    words = [
        "--backbone",
        "timm:resnet18",
        "--size",
        "32",
        "--batch_size",
        "8",
        "--heads.hidden",
        "16",
        "--heads.out",
        "8",
    ]
    works(
        "train",
        "--data",
        f"npz:{data}",
        *words,
        "--method",
        "simclr",
        "--epochs",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "r",
    )
    works("export", "--run", tmp_path / "r", "--names", "torchvision", "--format", "torch", "--out", tmp_path / "x")
    weights = torch.load(tmp_path / "x/backbone.pth", weights_only=True)
    missing = resnet18().load_state_dict(weights, strict=False)
    assert sorted(missing.missing_keys) == ["fc.bias", "fc.weight"]
    assert not missing.unexpected_keys


def test_an_export_of_another_network_is_refused_for_torchvision(trained, tmp_path, capsys):
    words = ["export", "--run", str(trained), "--names", "torchvision", "--out", str(tmp_path / "x")]
    assert_user_error(main, words, capsys, "torchvision has no 8")


def test_arms_are_compared_over_seeds(world, data, tmp_path, capsys):
    words = ["--arms", "plain,views-qd,naive", "--seeds", "0,1", "--epochs", 1, "--probe.epochs", 2, "--probe.rates", 3]
    words += ["--external", f"npz:{data}", "--views", world / "merged", "--qd.mode", "static", "--share", "0.5"]
    works("compare", "--data", f"npz:{data}", *TRAIN, "--method", "simclr", *words, "--out", tmp_path / "c")
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert set(summary["arms"]) == {"plain", "views-qd", "naive"}
    assert all(len(values) == 2 for values in summary["arms"]["naive"].values())


def test_the_worst_pairs_are_dropped_and_the_rest_goes_into_tars(world, generator, tmp_path):
    from genview.data import load, read_manifest

    score = [
        "--quality_encoder",
        f"generator:{generator}",
        "--quality_foreground",
        world / "fg",
        "--drop_worst",
        "0.25",
    ]
    works("merge", "--plan", world / "plan", "--views", world / "views", *score, "--tars", 10, "--out", tmp_path / "m")
    rows = [json.loads(line) for line in (tmp_path / "m/manifest.jsonl").read_text().splitlines()[1:]]
    dropped = [row["q"] for row in rows if row["status"] == "dropped"]
    assert len(dropped) == 6
    assert max(dropped) <= min(row["q"] for row in rows if row["status"] == "ok")
    assert len(read_manifest(tmp_path / "m").files) == 18
    assert len(load(f"webdataset:{tmp_path / 'm'}").train) == 18


def test_a_sheet_is_drawn_with_and_without_views(world, data, tmp_path):
    foreground = ["--foreground", world / "fg", "--encoder"]
    encoder = json.loads((world / "fg/foreground.json").read_text())["spec"]
    works(
        "inspect",
        "--data",
        f"npz:{data}",
        "--views",
        world / "merged",
        *foreground,
        encoder,
        "--out",
        tmp_path / "a",
    )
    works("inspect", "--data", f"npz:{data}", "--rows", 4, "--out", tmp_path / "b")
    assert (tmp_path / "a/figures/sheet.png").stat().st_size > (tmp_path / "b/figures/sheet.png").stat().st_size


def test_a_generator_is_trained_on_the_users_own_pictures(data, tmp_path):
    from genview.generators import UnCLIPGenerator

    steps = [
        "--steps",
        3,
        "--encoder_steps",
        3,
        "--sketch_steps",
        3,
        "--batch_size",
        8,
        "--channels",
        "16",
        "--embedding",
        8,
    ]
    works("train-tiny", "--data", f"npz:{data}", *steps, "--out", tmp_path / "t")
    made = UnCLIPGenerator.from_pretrained(tmp_path / "t/generator", steps=1)
    assert made.generate(torch.randn(1, 8), 0, [1], guidance=1.0).shape == (1, 16, 16, 3)


def test_what_the_authors_code_wrote_is_taken_over(data, tmp_path):
    from genview.data import load
    from PIL import Image

    for name in ("a/x.png", "a/y z.png", "b/x.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "d" / name)
    (tmp_path / "ratios.txt").write_text("/data/a/x.png 0.15\n/data/a/y z.png 0.95\n/data/c/x.png 0.5\n")
    works(
        "convert",
        "--data",
        f"folder:{tmp_path / 'd'}",
        "--ratios",
        tmp_path / "ratios.txt",
        "--out",
        tmp_path / "r",
    )
    assert (tmp_path / "r/levels.csv").read_text() == "image,noise_level\na/x.png,0\na/y z.png,400\n"
    # as pandas joins the two tables: a level of floating point, and nothing where one of them has no row
    (tmp_path / "infos.csv").write_text(
        "image,prompt,guidance_scale,noise_level\n"
        '/data/a/x.png,"a cat, red",8.0,300.0\n/data/b/x.png,a dog,6,\n/data/c/x.png,a fox,4,100.0\n'
    )
    works("convert", "--data", f"folder:{tmp_path / 'd'}", "--table", tmp_path / "infos.csv", "--out", tmp_path / "i")
    shutil.copy(tmp_path / "i/levels.csv", tmp_path / "d/levels.csv")
    asked = load(f"csv:{tmp_path / 'd/levels.csv'}").train
    assert (asked.keys, asked.captions) == (("a/x.png", "b/x.png"), ("a cat, red", "a dog"))
    assert (asked.levels, asked.guidance) == ((300, -1), (8.0, 6.0))
    (tmp_path / "d/levels.csv").write_text("image,noise_level\na/x.png,inf\n")
    with pytest.raises(UserError, match="line 2: noise_level is 'inf', expected a number"):
        load(f"csv:{tmp_path / 'd/levels.csv'}")
    (tmp_path / "tree/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "tree/a/x.jpg")
    works("convert", "--data", f"folder:{tmp_path / 'd'}", "--tree", tmp_path / "tree", "--out", tmp_path / "t")
    from genview.data import read_manifest

    assert list(read_manifest(tmp_path / "t").files) == ["a/x.png"]
    assert load(f"folder:{tmp_path / 'd'}").train.keys[0] == "a/x.png"


def test_broken_pictures_of_a_folder_become_rows_with_an_error(generator, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "d").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i * 60, 0, 0)).save(tmp_path / f"d/{i}.png")
    (tmp_path / "d/bad.png").write_bytes(b"none")
    data = f"folder:{tmp_path / 'd'}"
    policy = ["--policy", "constant", "--levels", 100]
    works("plan", "--data", data, *policy, "--generator", generator, "--out", tmp_path / "p")
    views = ["--plan", tmp_path / "p", "--views", tmp_path / "v"]
    works("generate", *views, "--generator", generator, "--steps", 1, "--out", tmp_path / "l")
    works("status", *views)
    out = capsys.readouterr().out
    assert "3 of 4 views are there (75.0 %), 1 failed; nothing is left" in out
    assert "failed: bad.png" in out
    works("merge", *views, "--out", tmp_path / "m")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "--data", "digits", "--policy", "adaptive"], "--policy adaptive needs --foreground"),
        (["plan", "--data", "digits", "--policy", "constant", "--levels", "1,2"], "--levels: expected one"),
        (
            ["plan", "--data", "digits", "--foreground", "x", "--edges", "0.4,0.2,0.6,0.8"],
            "--edges: expected increasing",
        ),
        (["plan", "--data", "digits", "--policy", "constant", "--levels", "5", "--prompts", "captions"], "captions"),
        (["generate", "--plan", "p", "--views", "v", "--generator", "g", "--shard", "2/2"], "--shard: expected I/N"),
        (["generate", "--plan", "p", "--views", "v", "--generator", "g"], "no such folder"),
        (["merge", "--plan", "p", "--views", "v", "--drop_worst", "0.1"], "--drop_worst needs scores"),
        (["train", "--data", "digits", "--backbone", "conv:9", "--size", "16"], "unknown name"),
        (
            ["train", "--data", "digits", "--backbone", "conv:8", "--qd.mode", "online"],
            "--qd.encoder and --qd.foreground",
        ),
        (["train", "--data", "digits", "--backbone", "conv:8", "--qd.mode", "static"], "needs --views"),
        (["compare", "--data", "digits", "--backbone", "conv:8"], "--views is missing"),
        (["train-tiny", "--data", "digits", "--size", "12"], "--size: expected a multiple of 8"),
        (["fit-foreground", "--data", "digits", "--encoder", "timm:resnet1"], "did you mean"),
        (["fit-foreground", "--data", "digits", "--encoder", "generator:none"], "config.json"),
        (["convert", "--data", "digits"], "one of --ratios, --table and --tree"),
        (["evaluate", "--run", "none"], "no such folder"),
    ],
)
def test_what_can_be_mended_is_told_in_one_line_and_leaves_nothing_behind(
    words, expected, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert_user_error(main, [*words, "--out", "out", "--quiet"], capsys, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "spoil", [lambda whole: whole[: len(whole) // 2], lambda whole: b"\xff\x00" + whole], ids=["cut", "noise"]
)
@pytest.mark.parametrize("kind", ["*.json", "*.safetensors"])
def test_a_damaged_encoder_is_refused_in_one_line(generator, tmp_path, capsys, spoil, kind):
    shutil.copytree(generator, tmp_path / "g")
    for file in (tmp_path / "g").rglob(kind):
        file.write_bytes(spoil(file.read_bytes()))
    words = ["fit-foreground", "--data", "digits", "--encoder", f"generator:{tmp_path / 'g'}", "--quiet"]
    assert_user_error(main, [*words, "--out", str(tmp_path / "out")], capsys, "--encoder")


@pytest.mark.parametrize("arms", ["plain,views", "plain,views-qd"])
def test_views_that_cannot_be_used_are_refused_before_an_arm_trains(data, tmp_path, capsys, arms):
    words = [
        "compare",
        "--data",
        f"npz:{data}",
        "--views",
        str(tmp_path / "none"),
        "--backbone",
        "conv:8",
        "--size",
        "16",
    ]
    words += ["--arms", arms, *(["--qd.mode", "static"] if "qd" in arms else []), "--quiet"]
    assert_user_error(
        main, [*words, "--out", str(tmp_path / "out")], capsys, "expected the folder of a finished `genview merge`"
    )


def test_a_foreground_of_another_encoder_is_refused(world, data, tmp_path, capsys):
    words = ["merge", "--plan", world / "plan", "--views", world / "views", "--quality_encoder", "timm:resnet10t"]
    words += ["--quality_weights", "random", "--quality_foreground", world / "fg", "--out", tmp_path / "m"]
    assert_user_error(main, [*map(str, words), "--quiet"], capsys, "not of timm:resnet10t")


@pytest.mark.parametrize(
    "recipe", ["imagenet-mocov3-r50", "imagenet-mocov3-vit-b", "imagenet-simsiam-r50", "cifar10-simclr"]
)
def test_a_recipe_runs_on_a_tiny_stand_in(recipe, world, data, tmp_path):
    small = [
        "--data",
        f"npz:{data}",
        "--backbone",
        "conv:8",
        "--size",
        16,
        "--batch_size",
        8,
        "--devices",
        1,
        "--strategy",
        "auto",
    ]
    small += [
        "--heads.hidden",
        16,
        "--heads.out",
        8,
        "--heads.predictor_hidden",
        8,
        "--views",
        world / "merged",
    ]
    works("train", "--config", f"recipe:{recipe}", *small, "--qd.mode", "static", "--steps", 2, "--out", tmp_path / "r")


def test_a_view_that_is_gone_or_cut_short_is_not_counted_and_generate_makes_it_again(
    world, generator, tmp_path, capsys
):
    views = tmp_path / "views"
    shutil.copytree(world / "views", views)
    one, other = sorted((views / "images").rglob("*.png"))[:2]
    before = [file.read_bytes() for file in (one, other)]
    one.unlink()
    other.write_bytes(before[1][:40])
    plan = ("--plan", str(world / "plan"), "--views", str(views))
    assert main(["status", *plan]) == 0
    told = capsys.readouterr().out
    assert "22 of 24 views are there" in told
    assert "2 views were written and are gone or cut short" in told
    assert main(["merge", *plan, "--out", str(tmp_path / "merged")]) == 0
    assert "22 ok, 2 missing" in capsys.readouterr().out
    words = ["generate", *plan, "--generator", str(generator), "--steps", "2", "--out", str(tmp_path / "log")]
    assert main([*words, "--quiet"]) == 0
    assert "2 views made" in capsys.readouterr().out
    assert [file.read_bytes() for file in (one, other)] == before
