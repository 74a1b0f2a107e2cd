"""The commands as a person types them, on folders of PNG files, and what they answer to mistakes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from mamba_fscil.cli import main
from mamba_fscil.commands._files import decoded, learner_of
from mamba_fscil.config import DataSettings, EvaluateSettings, TrainSettings
from mamba_fscil.data import load_tests, normalized
from PIL import Image
from safetensors.torch import load_file

from tenfold import UserError
from tenfold.images import read_square
from tenfold.testing import assert_user_error

COLORS = {"blue": (0, 0, 150), "green": (0, 150, 0), "red": (150, 0, 0), "gold": (150, 120, 0), "pink": (150, 60, 120)}
SMALL = ["--backbone", "fscil:conv", "--epochs", "4", "--batch_size", "8", "--device", "cpu", "--quiet"]
SMALL += ["--reading.size", "16", "--projector.states", "3", "--projector.rank", "2", "--capacity", "12"]
SMALL += ["--session.steps", "10", "--session.batch_size", "8", "--base.lr", "0.05", "--workers", "0"]


def paint(folder, name, count, seed=0):
    rng = np.random.default_rng((seed, *map(ord, name)))
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = rng.integers(0, 90, (20, 24, 3)) + np.asarray(COLORS[name])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in ("red", "green", "blue"):
        paint(root / "base" / name, name, 8)
    paint(root / "session-01" / "gold", "gold", 4)
    for name in ("gold", "red", "green", "blue"):
        paint(root / "test" / name, name, 4, seed=1)
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A run and its learner of three base classes."""
    out = tmp_path_factory.mktemp("trained")
    words = [
        "train",
        "--data",
        f"imagefolder:{pictures}",
        *SMALL,
        "--learner",
        str(out / "l"),
        "--out",
        str(out / "run"),
    ]
    assert main(words) == 0
    return out


@pytest.fixture
def learner(trained, tmp_path):
    shutil.copytree(trained / "l", tmp_path / "l")
    return tmp_path / "l"


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def add(learner, images, name, out, *more):
    words = [
        "add-class",
        "--learner",
        str(learner),
        "--images",
        str(images),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--quiet",
    ]
    return [*words, *(["--name", name] if name else []), *more]


def test_train_leaves_what_the_contract_names(trained):
    files = {p.relative_to(trained / "run").as_posix() for p in (trained / "run").rglob("*") if p.is_file()}
    expected = {"config.yaml", "environment.json", "metrics.csv", "checkpoints/last.ckpt", "learner.safetensors"}
    assert (
        expected | {"config.json", "report.html", "summary.json", "figures/sessions.png", "figures/shots.png"} <= files
    )
    assert sorted(snapshot(trained / "l")) == ["base.safetensors", "index.json"]


def test_a_new_users_walk(pictures, learner, tmp_path, capsys):
    """Add two classes from folders, predict, evaluate, look, go back, export to ONNX and get the same answers."""
    assert (
        main(add(learner, pictures / "session-01/gold", "gold", tmp_path / "a", "--data", f"imagefolder:{pictures}"))
        == 0
    )
    out = capsys.readouterr().out
    assert "base classes (%)" in out
    assert "nearest other class" in out
    assert "session-01.safetensors" in out
    assert main(add(learner, paint(tmp_path / "pink", "pink", 5), "pink", tmp_path / "b")) == 0
    assert sorted(snapshot(learner)) == [
        "base.safetensors",
        "index.json",
        "session-01.safetensors",
        "session-02.safetensors",
    ]
    words = ["--learner", str(learner), "--device", "cpu", "--quiet"]
    assert main(["predict", *words, "--images", str(pictures / "test"), "--out", str(tmp_path / "p")]) == 0
    rows = json.loads((tmp_path / "p/predictions.json").read_text())
    assert len(rows) == 16
    assert len(rows[0]["answers"]) == 3
    assert main(["evaluate", *words, "--data", f"imagefolder:{pictures}", "--out", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert found["without test pictures"] == ["pink"]
    assert main(["inspect", "--learner", str(learner)]) == 0
    assert "room for 7" in capsys.readouterr().out
    older = ["--learner", str(learner / "session-01.safetensors"), "--device", "cpu", "--quiet"]
    assert main(["predict", *older, "--images", str(pictures / "test/red/0.png"), "--out", str(tmp_path / "q")]) == 0
    names = {name for row in json.loads((tmp_path / "q/predictions.json").read_text()) for name, _ in row["answers"]}
    assert "pink" not in names
    assert main(["export", "--learner", str(learner), "--format", "onnx", "--out", str(tmp_path / "x"), "--quiet"]) == 0
    card = json.loads((tmp_path / "x/config.json").read_text())
    assert card["classes"] == ["blue", "green", "red", "gold", "pink"]
    own = learner_of(str(learner))
    images = torch.stack(
        [torch.from_numpy(read_square(pictures / f"test/{n}/1.png", 16).copy()) for n in ("red", "gold")]
    )
    images = images.permute(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(tmp_path / "x/classifier.onnx")
    (logits,) = session.run(None, {"images": normalized(images, card["mean"], card["std"]).numpy()})
    expected = own.scale * own.logits(own.maps(images))
    assert np.allclose(logits, expected.numpy(), atol=1e-3)


def test_a_class_that_is_not_known_by_its_own_pictures_is_told(pictures, learner, tmp_path, capsys):
    """After one step the gate is closed; the learner's own number of steps says nothing."""
    words = add(learner, pictures / "session-01/gold", "gold", tmp_path / "a", "--save_as", str(tmp_path / "new"))
    assert main([*words, "--steps", "1"]) == 0
    assert "0 of the 4 pictures that 'gold' was learned from are taken for it: more --steps" in capsys.readouterr().out
    words = add(learner, pictures / "session-01/gold", "gold", tmp_path / "b", "--save_as", str(tmp_path / "longer"))
    assert main([*words, "--steps", "60"]) == 0
    assert "was learned from" not in capsys.readouterr().out


def test_added_classes_are_measured_on_test_folders_that_hold_them_and_else_on_their_own_pictures(
    pictures, learner, tmp_path, capsys
):
    photos, gold = tmp_path / "photos", pictures / "session-01/gold"
    for part in ("base", "test"):
        shutil.copytree(pictures / part, photos / part)
    (photos / "test/gold").rename(photos / "test/newcomer")
    words = ["evaluate", "--learner", str(learner), "--device", "cpu", "--data", f"imagefolder:{photos}"]
    assert main([*words, "--out", str(tmp_path / "e")]) == 2
    assert "unknown class 'newcomer'" in capsys.readouterr().err
    assert main(add(learner, gold, "newcomer", tmp_path / "a")) == 0
    known = learner_of(str(learner), "cpu")
    images, _, _ = decoded(sorted(gold.iterdir()), known.size)
    right = np.mean([name == "newcomer" for name in known.predict(images)])
    assert json.loads((tmp_path / "a/added.json").read_text())["table"][2][2] == f"{100 * right:.1f}"
    assert main([*words, "--out", str(tmp_path / "e")]) == 0
    assert "newcomer" in json.loads((tmp_path / "e/evaluation.json").read_text())["classes"]
    whole = load_tests(f"imagefolder:{photos / 'test'}", reading=DataSettings(size=16), plain=True)
    assert len(whole.test) == sum(1 for _ in (photos / "test").glob("*/*"))  # no fifth held out


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_other_exports_give_the_learners_logits(learner, tmp_path, kind):
    assert main(["export", "--learner", str(learner), "--format", kind, "--out", str(tmp_path / "x"), "--quiet"]) == 0
    if kind == "torch-export":
        own = learner_of(str(learner))
        images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        found = torch.export.load(tmp_path / "x/classifier.pt2").module()(normalized(images, *own.statistics))
        assert torch.allclose(found, own.scale * own.logits(own.maps(images)), atol=1e-4)


def test_save_as_leaves_the_old_learner_and_an_older_file_needs_it(pictures, learner, tmp_path, capsys):
    assert main(add(learner, pictures / "session-01/gold", "gold", tmp_path / "a")) == 0
    before = snapshot(learner)
    pink = paint(tmp_path / "pink", "pink", 5)
    words = add(learner / "base.safetensors", pink, "pink", tmp_path / "b")
    assert_user_error(main, words, capsys, "is an older file of its learner", "--save_as")
    assert main([*words, "--save_as", str(tmp_path / "new")]) == 0
    assert snapshot(learner) == before
    assert learner_of(str(tmp_path / "new")).classes == ["blue", "green", "red", "pink"]
    words = add(learner, pink, "pink", tmp_path / "c", "--save_as", str(tmp_path / "new"))
    assert_user_error(main, words, capsys, "another learner is there already")


def test_mistakes_are_one_line_and_leave_the_learner_as_it_was(pictures, learner, trained, tmp_path, capsys):
    before = snapshot(learner)
    gold = pictures / "session-01/gold"
    (tmp_path / "empty").mkdir()
    bad = shutil.copytree(gold, tmp_path / "bad")
    (bad / "2.png").write_bytes((bad / "2.png").read_bytes()[:60])
    twice = shutil.copytree(gold, tmp_path / "twice")
    shutil.copy(twice / "1.png", twice / "copy.png")
    out = tmp_path / "out"
    cases = [
        (add(learner, gold, "red", out), ["class 'red' is there already"]),
        (add(learner, gold, "Red", out), ["there is 'red' already"]),
        (add(learner, tmp_path / "empty", "x", out), ["no picture in this folder"]),
        (add(learner, tmp_path / "none", "x", out), ["no such folder"]),
        (add(learner, bad, "x", out), ["2.png", "cannot be decoded"]),
        (add(learner, twice, "x", out), ["copy.png is the same picture as", "1.png"]),
        (add(learner, gold, "x", out, "--shots", "5"), ["4 pictures, --shots asks for 5"]),
        (add(learner, gold, None, out), ["--name is missing"]),
        (add(tmp_path / "none", gold, "x", out), ["--learner", "no such file or folder"]),
        (add(gold, gold, "x", out), ["expected the folder of a mamba-fscil.learner"]),
    ]
    for words, parts in cases:
        assert_user_error(main, words, capsys, *parts)
        assert not out.exists()
    assert snapshot(learner) == before
    assert main(add(learner, bad, "x", out, "--skip_bad", "true")) == 0
    assert "left out" in capsys.readouterr().out
    words = [
        "train",
        "--data",
        f"imagefolder:{pictures}",
        *SMALL,
        "--learner",
        str(learner),
        "--out",
        str(tmp_path / "t"),
    ]
    assert_user_error(main, words, capsys, "a learner is there already")
    words = [
        "train",
        "--data",
        f"imagefolder:{pictures}",
        *SMALL,
        "--learner",
        str(tmp_path / "m"),
        "--out",
        str(tmp_path / "t"),
    ]
    assert_user_error(main, [*words, "--capacity", "200"], capsys, "--capacity 200 is more than the width 64")
    assert_user_error(main, [*words, "--backbone", "timm:no_such"], capsys, "timm:no_such")
    assert not (tmp_path / "m").exists()


def test_photographs_as_phones_and_tools_write_them_are_read(learner, tmp_path):
    """Turned by the camera's tag, CMYK, palette, 16 bits, GIF, gray with transparency."""
    folder = tmp_path / "phone"
    folder.mkdir()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.rotate(90).convert("CMYK").save(folder / "cmyk.jpg")
    image.rotate(20).convert("P").save(folder / "palette.png")
    Image.fromarray(rng.integers(0, 65536, (20, 30)).astype(np.uint16)).save(folder / "deep.png")
    image.rotate(40).save(folder / "still.gif")
    image.rotate(60).convert("LA").save(folder / "alpha.png")
    (folder / "._alpha.png").write_bytes(b"of macOS, no picture")
    assert main(add(learner, folder, "phone", tmp_path / "a")) == 0
    assert learner_of(str(learner)).memory.counts[3] == 6


def test_a_class_is_added_from_several_folders_at_once_and_refitted(pictures, learner, tmp_path):
    both = tmp_path / "both"
    paint(both / "gold", "gold", 3)
    paint(both / "pink", "pink", 3)
    assert main(add(learner, both, None, tmp_path / "a")) == 0
    assert learner_of(str(learner)).classes[3:] == ["gold", "pink"]
    assert main(add(learner, paint(tmp_path / "g", "gold", 5, seed=3), "gold", tmp_path / "b", "--update", "true")) == 0
    own = learner_of(str(learner))
    assert own.classes[3:] == ["gold", "pink"]
    assert own.memory.counts[3] == 5


KILLS = """
import json, os, signal, sys
from mamba_fscil import session
from mamba_fscil.cli import main
from mamba_fscil.training.base import BaseSessionModule

def killing(function, at):
    count = 0
    def counted(*given, **named):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)
    return counted

for words, where, at in json.loads(sys.argv[1]):  # one start of Python for all of them
    child = os.fork()
    if child == 0:
        if where == "base":
            BaseSessionModule.training_step = killing(BaseSessionModule.training_step, at)
        else:
            session.learning_rate = killing(session.learning_rate, at)
        main(words)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (where, at, status)
"""


def test_killed_at_any_stage_and_repeated_a_command_gives_the_same_learner(pictures, learner, tmp_path):
    """Training before its first checkpoint, once more after it, once more in a session; adding a class."""
    words = ["train", "--data", f"imagefolder:{pictures}", *SMALL, "--sessions", "true", "--checkpoint_every", "4"]
    whole, often = (
        [*words, "--learner", str(tmp_path / name), "--out", str(tmp_path / f"{name}-run")]
        for name in ("whole", "often")
    )
    assert main(whole) == 0
    one, two = shutil.copytree(learner, tmp_path / "one"), shutil.copytree(learner, tmp_path / "two")
    gold = pictures / "session-01/gold"
    adding = add(one, gold, "gold", tmp_path / "a")
    again = [*often, "--resume"]
    jobs = [[often, "base", 2], [again, "base", 7], [again, "session", 3], [adding, "session", 3]]
    assert subprocess.run([sys.executable, "-c", KILLS, json.dumps(jobs)]).returncode == 0
    assert sorted(snapshot(tmp_path / "often")) == ["base.safetensors", "index.json"]
    assert snapshot(one) == snapshot(learner)
    assert main(again) == 0
    assert snapshot(tmp_path / "often") == snapshot(tmp_path / "whole")
    runs = (tmp_path / f"{name}-run/metrics.csv" for name in ("whole", "often"))
    assert len({path.read_bytes() for path in runs}) == 1
    assert main(adding) == 0
    assert main(add(two, gold, "gold", tmp_path / "b")) == 0
    assert snapshot(one) == snapshot(two)


def test_extracted_maps_train_a_learner_that_takes_maps(pictures, learner, tmp_path, capsys):
    words = ["extract", "--data", f"imagefolder:{pictures}", "--reading.size", "16", "--learner", str(learner)]
    assert main([*words, "--out", str(tmp_path / "m"), "--device", "cpu", "--quiet"]) == 0
    maps = tmp_path / "m/maps.npz"
    words = [
        "train",
        "--data",
        f"npz:{maps}",
        "--protocol.base",
        "3",
        "--protocol.shot",
        "4",
        "--device",
        "cpu",
        "--quiet",
    ]
    words += [
        "--epochs",
        "2",
        "--sessions",
        "true",
        "--session.steps",
        "5",
        "--capacity",
        "6",
        "--projector.states",
        "3",
    ]
    assert main([*words, "--learner", str(tmp_path / "n"), "--out", str(tmp_path / "r")]) == 0
    assert learner_of(str(tmp_path / "n")).classes == ["blue", "green", "red", "gold"]
    with np.load(maps) as file:
        np.savez(tmp_path / "five.npz", maps=file["test_maps"][:5])
    assert main(add(tmp_path / "n", tmp_path / "five.npz", "more", tmp_path / "a")) == 0
    words = add(tmp_path / "n", pictures / "session-01/gold", "x", tmp_path / "b")
    assert_user_error(main, words, capsys, "made from maps")


def test_compare_measures_every_arm(pictures, tmp_path, capsys):
    words = ["compare", "--data", f"imagefolder:{pictures}", *SMALL, "--seeds", "0,1,2"]
    assert main([*words, "--arms", "ncm,mlp,mamba-fscil", "--out", str(tmp_path / "c")]) == 0
    summary = json.loads((tmp_path / "c/summary.json").read_text())
    assert set(summary["arms"]) == {"ncm", "mlp", "mamba-fscil"}
    assert {"base", "novel", "harmonic", "average", "drop", "calibration error"} <= set(summary["arms"]["ncm"])
    assert "cosine" in summary["arms"]["mamba-fscil"]
    assert "harmonic of mamba-fscil - harmonic of ncm" in capsys.readouterr().out
    assert main([*words, "--arms", "ncm,mlp,mamba-fscil", "--out", str(tmp_path / "c"), "--resume"]) == 0


def test_an_option_without_effect_is_refused():
    with pytest.raises(UserError, match="--validate_every: nothing is validated within a base session"):
        TrainSettings(data="digits", learner="x", validate_every=5)
    with pytest.raises(UserError, match="--reading.limit: it limits training images"):
        EvaluateSettings(data="digits", learner="x", reading=DataSettings(limit=3))


def test_two_processes_train_what_one_does(pictures, tmp_path):
    """The base session, started by torchrun on two processes: the same schedule and the same weights, and one learner.

    The backbone rests, since the statistics of batch norm are those of one process. 24 pictures in batches of 10 leave a
    last batch of 4, which is shared out.
    """
    still = [
        "--freeze",
        "true",
        "--base.mixup",
        "0",
        "--base.cutmix",
        "0",
        "--base.mirror",
        "false",
        "--base.padding",
        "0",
    ]
    words = ["train", "--data", f"imagefolder:{pictures}", *SMALL, *still, "--log_every", "1"]
    one, two = ([*words, "--learner", str(tmp_path / f"l{n}"), "--out", str(tmp_path / f"{n}")] for n in (1, 2))
    assert main([*one, "--batch_size", "10"]) == 0
    (tmp_path / "run.py").write_text("import sys\nfrom mamba_fscil.cli import main\nsys.exit(main())\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [str(tmp_path / "run.py"), *two, "--batch_size", "5", "--devices", "2"]
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("learner in") == 1
    rates = [[row.split(",")[-1] for row in (tmp_path / n / "metrics.csv").read_text().split()] for n in "12"]
    assert rates[0] == rates[1]
    ours, theirs = (load_file(tmp_path / n / "base.safetensors") for n in ("l1", "l2"))
    for name, value in ours.items():
        assert torch.allclose(value.double(), theirs[name].double(), atol=1e-5), name
