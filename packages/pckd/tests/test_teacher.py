"""A teacher is what it seems: its classes and their order, its normalization, the size of its images."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch
from pckd.cli import main
from pckd.config import DataSettings, TeacherSettings
from pckd.data import load
from pckd.models import build, card_of
from pckd.teacher import as_teacher, load_teacher
from pckd.training import predict
from pckd.views import normalize
from safetensors.torch import load_file, save_file

from tenfold import UserError
from tenfold.models import IMAGENET

RUN = ["--epochs", "4", "--batch_size", "8", "--device", "cpu", "--quiet", "--views.kind", "none"]
COLORS = {"blue": 2, "green": 1, "red": 0}


def write(path, order, size=8, each=16, shift=0):
    """An npz whose classes differ by color and stand in an order of its own."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(order)), each)
    images = rng.integers(0, 90, (len(labels), size, size, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., COLORS[order[label]]] += 120
    images = np.clip(images.astype(int) + shift, 0, 255).astype(np.uint8)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels, classes=order)
    return f"npz:{path}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    data = write(folder / "a.npz", ["blue", "green", "red"])
    words = ["train", "--data", data, "--student", "cifar:plain8", *RUN]
    assert main([*words, "--out", str(folder / "run")]) == 0
    assert json.loads((folder / "run/config.json").read_text())["top1"] == 100
    return folder / "run"


def test_a_teacher_of_the_same_classes_in_another_order_is_permuted(teacher, tmp_path):
    """It was a student with 0 % and exit code 0."""
    source = write(tmp_path / "b.npz", ["red", "blue", "green"])
    data = load(source)
    found = load_teacher(TeacherSettings(teacher="cifar:plain8", teacher_weights=str(teacher)), data)
    assert found.order.tolist() == [2, 0, 1]
    out = predict(found, data.test)
    assert torch.equal(out.logits.argmax(dim=1), data.test.labels)
    assert torch.allclose(out.feature @ out.weight.T + out.bias, out.logits, atol=1e-4)
    words = ["train", "--data", source, "--student", "cifar:plain4", "--teacher", "cifar:plain8", *RUN]
    words += ["--teacher_weights", str(teacher), "--method", "kd", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["arms"]["kd"]["top1"] == [100]
    rows = list(csv.DictReader((tmp_path / "run/previewed.csv").open()))
    assert {(row["label"], row["teacher"]) for row in rows} == {(name, name) for name in COLORS}


def test_a_file_alone_says_as_much_as_its_folder(teacher):
    assert card_of(str(teacher / "student.safetensors")) == card_of(str(teacher))
    assert card_of(str(teacher))["classes"] == ["blue", "green", "red"]


def test_missing_and_further_classes_are_refused_by_name(teacher, tmp_path):
    COLORS["violet"] = 2
    data = load(write(tmp_path / "c.npz", ["blue", "green", "violet"]))
    del COLORS["violet"]
    settings = TeacherSettings(teacher="cifar:plain8", teacher_weights=str(teacher))
    with pytest.raises(
        UserError, match="other classes than the data's: it does not know violet; the data lack its red"
    ):
        load_teacher(settings, data)


def test_a_teacher_keeps_its_own_normalization_and_size(teacher, tmp_path):
    """Identical weights give identical answers, whatever the data's own statistics are."""
    card = card_of(str(teacher))
    brighter = load(write(tmp_path / "d.npz", ["blue", "green", "red"], shift=40))
    assert brighter.mean != tuple(card["mean"])
    settings = TeacherSettings(teacher="cifar:plain8", teacher_weights=str(teacher))
    found = load_teacher(settings, brighter)
    assert found.statistics == (tuple(card["mean"]), tuple(card["std"]))
    larger = load(write(tmp_path / "e.npz", ["blue", "green", "red"], size=16))
    found = load_teacher(settings, larger)
    assert found.images(larger.test.pixels(torch.arange(2))).shape == (2, 3, 8, 8)


def test_a_file_without_a_card_takes_the_models_configuration_or_the_option(tmp_path):
    data = load("digits", DataSettings(limit=100))
    model = build("timm:resnet10t", 10)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    given = {"teacher": "timm:resnet10t", "teacher_weights": str(tmp_path / "w.safetensors")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_teacher(TeacherSettings(**given), data).statistics == IMAGENET
        own = TeacherSettings(**given, teacher_mean=[0.1, 0.2, 0.3], teacher_std=[0.5, 0.5, 0.5])
        found = load_teacher(own, data)
    pixels = data.test.pixels(torch.arange(3))
    assert torch.equal(found.images(pixels), normalize(pixels, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="--teacher_mean and --teacher_std go together"):
        TeacherSettings(**given, teacher_mean=[0.1, 0.2, 0.3])


def test_a_teacher_no_better_than_chance_is_named():
    torch.manual_seed(0)
    data = load("digits", DataSettings(limit=200))
    with pytest.warns(
        UserWarning, match=r"the teacher \(memory\) has \d+ of 128 training images right, no better than chance"
    ):
        as_teacher(build("cifar:plain4", 10), data)


def test_weights_without_the_classifier_are_no_teacher(tmp_path):
    data = load("digits", DataSettings(limit=100))
    state = {k: v for k, v in build("cifar:plain8", 10).state_dict().items() if not k.startswith("fc.")}
    save_file(state, tmp_path / "body.safetensors")
    with pytest.raises(UserError, match=r"no fc\.weight in the file"):
        load_teacher(TeacherSettings(teacher="cifar:plain8", teacher_weights=str(tmp_path / "body.safetensors")), data)
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="--teacher_weights is missing"):
        TeacherSettings(teacher="timm:resnet10t").check_teacher("kd")


@pytest.mark.parametrize(
    "prefix", ["module.student.", "net.", "backbone.", "model.", "student.model.", "_orig_mod.module."]
)
def test_prefixes_of_other_programs_are_cut(tmp_path, prefix):
    """mdistiller's best and latest, Lightning's modules, torch.compile."""
    state = build("cifar:resnet8", 5).state_dict()
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "latest")
    loaded = build("cifar:resnet8", 5, str(tmp_path / "latest")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_a_cache_knows_the_order_and_the_normalization(teacher, tmp_path, capsys):
    source = write(tmp_path / "b.npz", ["red", "blue", "green"])
    given = ["--teacher", "cifar:plain8", "--teacher_weights", str(teacher)]
    made = [
        "cache",
        "--data",
        source,
        *given,
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--quiet",
        "--views.kind",
        "none",
    ]
    assert main([*made, "--out", str(tmp_path / "cache")]) == 0
    words = ["train", *given, "--student", "cifar:plain4", *RUN, "--method", "kd", "--cache", str(tmp_path / "cache")]
    assert main([*words, "--data", source, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["arms"]["kd"]["top1"] == [100]
    capsys.readouterr()
    changed = ["--teacher_mean", "[0.5,0.5,0.5]", "--teacher_std", "[0.5,0.5,0.5]"]
    assert main([*words, "--data", source, *changed, "--out", str(tmp_path / "other")]) == 2
    assert "the cache was made for something else: teacher" in capsys.readouterr().err
    weights = load_file(tmp_path / "run/student.safetensors")
    assert weights["fc.weight"].shape[0] == 3
