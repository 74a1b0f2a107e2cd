"""Optimizers, averages, mixtures, augmentation: each does what its option says, for images in memory and in files."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pckd import MultiView, Outputs
from pckd.augment import TrainingImages
from pckd.cli import main
from pckd.config import CompareSettings, DataSettings, Mixing, Optimizer, TrainSettings, Views
from pckd.data import load
from pckd.losses import BaselineLoss, PCKDLoss
from pckd.mixing import Mixture, draw_mixture
from pckd.models import build
from pckd.optimizers import make_optimizer, make_schedule, parameter_groups
from pckd.training import _Order, train_student
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tenfold import UserError
from tenfold.images import Split
from tenfold.loading import KeyedLoader


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """The same images in files and in memory."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 24, 24, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{i}.png")
    labels = torch.arange(6) % 3
    files = Split(labels, None, tuple(root / f"{i}.png" for i in range(6)), 24)
    return files, Split(labels, torch.from_numpy(pixels).permute(0, 3, 1, 2), (), 24)


def views_of(split, views, epoch=0):
    """All views of an epoch, as a training makes them."""
    items = TrainingImages(split, views)
    made = MultiView(dataclasses.replace(views, padding=0) if items.resized else views, 3)
    loader = KeyedLoader(items, seed=3, order=lambda generator: [[0, 1, 2], [3, 4, 5]])
    loader.seek(epoch)
    parts = []
    for batch in loader:
        raw = batch[2] if len(batch) > 2 else split.images[batch[0]]
        parts.append(made(raw, batch[0], epoch))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["rot90", "crop", "flip", "none"])
@pytest.mark.parametrize("crop", ["padded", "resized"])
@pytest.mark.parametrize("more", [{}, {"mirror": False}, {"auto_augment": "rand-m5-n1"}], ids=str)
def test_files_and_memory_give_the_same_views(split, kind, crop, more):
    files, memory = split
    views = Views(kind=kind, crop=crop, number=4, padding=2, **more)
    assert torch.equal(views_of(files, views), views_of(memory, views))


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_crops_of_one_image_differ_and_mirroring_can_be_turned_off(split, crop):
    """It was four equal views, and mirrored ones, for images that do not fit into memory."""
    for part in split:
        made = views_of(part, Views(kind="crop", crop=crop, number=4, padding=2)).view(6, 4, 3, 24, 24)
        assert all(not torch.equal(made[:, a], made[:, b]) for a in range(4) for b in range(a))
        straight = Views(kind="rot90", number=1, crop="padded", padding=0, mirror=False)
        assert torch.equal(views_of(part, straight), split[1].images)


def test_large_images_are_cropped_as_for_imagenet_by_default():
    assert Views().resized(224)
    assert not Views().resized(32)
    assert not Views(crop="padded").resized(224)


def test_an_unknown_policy_is_refused_before_training(split):
    with pytest.raises(UserError, match="--views.auto_augment rnd: not a policy of timm"):
        TrainingImages(split[0], Views(auto_augment="rnd"))


def test_weights_that_are_spared_from_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), Optimizer(no_decay=["1d"]))
    assert [len(group["params"]) for group in groups] == [1, 2]
    assert groups[1]["weight_decay"] == 0
    groups = parameter_groups(model.named_parameters(), Optimizer(no_decay=["1.bias"]))
    assert [len(group["params"]) for group in groups] == [2, 1]
    assert isinstance(make_optimizer(model.named_parameters(), Optimizer(name="adamw")), torch.optim.AdamW)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_rate_rises_and_then_takes_its_course(schedule):
    settings = Optimizer(lr=1.0, schedule=schedule, warm_up=3, milestones=[6, 8])
    optimizer = make_optimizer(nn.Linear(2, 2).named_parameters(), settings)
    course = make_schedule(optimizer, settings, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        course.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    late = (
        [1, 1, 0.1, 0.1, 0.01, 0.01] if schedule == "step" else [(1 + np.cos(np.pi * i / 7)) / 2 for i in range(1, 7)]
    )
    assert rates[4:] == pytest.approx(late)


def test_smoothed_labels_are_torchs_and_leave_the_difficulty_alone():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    out = Outputs(logits, torch.randn(5, 2), torch.randn(4, 2))
    plain, smooth = BaselineLoss("ce"), BaselineLoss("ce")
    smooth.label_smoothing = 0.1
    found = smooth(out, None, labels, 1)
    assert torch.equal(found.total, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert torch.equal(found.gamma, plain(out, None, labels, 1).gamma)


def test_mixtures_are_the_sums_that_they_say():
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 2, 1])
    mixture = draw_mixture(3, (8, 8), Mixing(mixup=0.8))
    views = images.view(3, 2, 3, 8, 8)
    for a, b in enumerate(mixture.order.tolist()):
        for v in range(2):
            expected = mixture.share * views[a, v] + (1 - mixture.share) * views[b, v]
            assert torch.allclose(mixture.images(images).view(3, 2, 3, 8, 8)[a, v], expected)
        expected = torch.zeros(3)
        expected[labels[a]] += mixture.share
        expected[labels[b]] += 1 - mixture.share
        assert torch.allclose(mixture.labels(labels, 3)[a], expected)


def test_a_cut_rectangle_counts_as_many_pixels_as_its_label():
    torch.manual_seed(1)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 12).contiguous()
    for _ in range(20):
        mixture = draw_mixture(4, (16, 12), Mixing(cutmix=1.0))
        mixed = mixture.images(images)
        for a, b in enumerate(mixture.order.tolist()):
            own = float((mixed[a] == a).float().mean())
            assert own == pytest.approx(1.0 if a == b else mixture.share, abs=1e-6)
        twice = F.interpolate(images, scale_factor=2)  # a teacher's, of another size
        assert torch.equal(mixture.images(twice), F.interpolate(mixed, scale_factor=2))


def test_terms_that_ask_for_one_class_refuse_soft_labels():
    soft = torch.full((2, 4), 0.25)
    out = Outputs(torch.randn(2, 4), torch.randn(2, 3), torch.randn(4, 3), torch.randn(4))
    for loss, what in ((PCKDLoss(3, 3), "the category contrast"), (BaselineLoss("dkd"), "dkd")):
        with pytest.raises(ValueError, match=f"{what} asks for one class per image"):
            loss(out, out, soft, 1)
    given = {"data": "digits", "student": "a", "teacher": "b", "teacher_weights": "c", "mixing": Mixing(mixup=0.2)}
    with pytest.raises(UserError, match="--mixing makes soft labels, which pckd cannot take"):
        TrainSettings(**given)
    with pytest.raises(UserError, match="which dkd, ckd, pckd cannot take"):
        CompareSettings(**given)
    assert TrainSettings(**given, method="kd").mixing.on


def test_soft_labels_are_the_mean_of_the_hard_ones():
    torch.manual_seed(0)
    out = Outputs(torch.randn(3, 4), torch.randn(3, 2), torch.randn(4, 2))
    a, b = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1])
    mixed = Mixture(torch.arange(3), 0.3, None).labels(a, 4) * 0.3 + 0.7 * F.one_hot(b, 4)
    loss = BaselineLoss("kd")
    parts = [float(loss(out, out, labels, 1).total) for labels in (a, b, mixed)]
    assert parts[2] == pytest.approx(0.3 * parts[0] + 0.7 * parts[1], rel=1e-5)


def test_balanced_batches_take_all_classes_alike():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    order = _Order(labels, 50, balanced=True)
    drawn = labels[torch.tensor([i for batch in order(torch.Generator().manual_seed(0)) for i in batch])]
    assert all(abs(count - 333) < 60 for count in drawn.bincount().tolist())


@pytest.mark.parametrize("images", [64, 65, 71, 79, 5, 4, 3])
def test_batches_of_two_devices_have_one_size_at_each_step(images):
    batches = _Order(torch.zeros(images, dtype=torch.int64), 8, devices=2)(torch.Generator())
    assert len(batches) % 2 == 0
    assert all(len(a) == len(b) > 1 for a, b in zip(batches[::2], batches[1::2], strict=True))
    kept = [i for batch in batches for i in batch]
    assert len(set(kept)) == len(kept) >= images - 3


def settings(**more):
    given = {"data": "digits", "student": "cifar:plain4", "epochs": 2, "batch_size": 16, "device": "cpu"}
    return TrainSettings(**{**given, "views": Views(kind="none"), **more})


def digits(**reading):
    return load("digits", DataSettings(limit=60, **reading))


def test_an_average_of_the_weights_is_tested_and_returned():
    """With decay 1/2 it is the literal recursion over the weights after each step."""
    from pckd import training

    seen = []
    step = training.MovingAverage.on_train_batch_end

    class Spy(training.MovingAverage):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            step(self, trainer, pl_module, *rest)
            seen.append({k: v.clone() for k, v in pl_module.distiller.student.model.state_dict().items()})

    original, training.MovingAverage = training.MovingAverage, Spy
    try:
        done = train_student(digits(), settings(ema=0.5), quiet=True)
    finally:
        training.MovingAverage = original
    for name, value in done.model.state_dict().items():
        mean = seen[0][name].double()
        for state in seen[1:]:
            mean = (mean + state[name]) / 2 if value.is_floating_point() else state[name].double()
        assert torch.allclose(value.double(), mean, atol=1e-5), name


def test_the_classifier_alone_is_trained_in_the_first_epochs():
    torch.manual_seed(0)
    first = train_student(digits(), settings(epochs=1, head_epochs=1), quiet=True).model
    before = build("cifar:plain4", 10)
    torch.manual_seed(0)
    from tenfold.devices import seed_everything

    seed_everything(0)
    before = build("cifar:plain4", 10)
    assert torch.equal(first.features[0].weight, before.features[0].weight)
    assert not torch.equal(first.fc.weight, before.fc.weight)
    assert all(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_other_channels(tmp_path, channels):
    rng = np.random.default_rng(0)
    shape = (40, 12, 12) if channels == 1 else (40, 12, 12, channels)
    np.savez(tmp_path / "a.npz", x=rng.integers(0, 255, shape, dtype=np.uint8), y=np.arange(40) % 2)
    words = [
        "train",
        "--data",
        f"npz:{tmp_path / 'a.npz'}",
        "--student",
        "cifar:plain4",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    words += ["--batch_size", "8", "--quiet", "--reading.channels", str(channels), "--out", str(tmp_path / "run")]
    assert main(words) == 0
    weights = load_file(tmp_path / "run/student.safetensors")
    assert weights["features.0.weight"].shape[1] == channels
    assert len(json.loads((tmp_path / "run/config.json").read_text())["mean"]) == channels
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / "e")]) == 0


def test_images_keep_their_number_in_the_users_file(tmp_path):
    """Through the part that is held out, the limit and the validation images."""
    images = np.arange(60, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)  # each tells its number
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(60) % 3)
    data = load(f"npz:{tmp_path / 'a.npz'}", DataSettings(limit=30, val_fraction=0.2))
    for part in (data.train, data.val, data.test):
        assert [int(part.name(i)) for i in range(len(part))] == part.images[:, 0, 0, 0].tolist()
    words = [
        "train",
        "--data",
        f"npz:{tmp_path / 'a.npz'}",
        "--student",
        "cifar:plain4",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    words += ["--batch_size", "8", "--quiet", "--reading.limit", "30", "--views.kind", "none"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    rows = list(csv.DictReader((tmp_path / "run/previewed.csv").open()))
    assert len(rows) == 30
    assert all(int(row["image"]) % 3 == int(row["label"]) for row in rows)
    assert set(rows[0]) == {"rank", "image", "label", "student", "mean_weight", "mean_difficulty"}


def test_a_batch_of_one_image():
    own = settings(batch_size=1, epochs=1, views=Views(number=2, padding=1))
    assert np.isfinite(train_student(digits(), own, quiet=True).top1)


def test_images_in_memory_are_brought_to_another_size():
    data = digits(size=16)
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert data.train.images.dtype == torch.uint8
    for ours, small in zip(data.train.images[:5], digits().train.images[:5], strict=True):
        pillow = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow).astype(int)).max() <= 1
