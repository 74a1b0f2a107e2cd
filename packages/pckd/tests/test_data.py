"""Readers: layouts as people have them, and one line for what is wrong with them."""

import numpy as np
import pytest
import torch
from pckd.config import DataSettings
from pckd.data import DataError, load
from PIL import Image

from tenfold import UserError
from tenfold.images import Indexed, read_random_crop
from tenfold.testing import write_cifar


def folder(root, classes, images=4, side=20, seed=0):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(rng.integers(0, 256, (side, side + 6, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


def test_image_folders(tmp_path):
    folder(tmp_path / "a/train", ["cat", "dog"])
    folder(tmp_path / "a/val", ["cat", "dog"], 2)
    data = load(f"imagefolder:{tmp_path / 'a'}", DataSettings(size=16))
    assert (len(data.train), len(data.test), data.classes, data.size) == (8, 4, ("cat", "dog"), 16)
    assert data.train.images.shape == (8, 3, 16, 16)
    assert data.train.name(0).endswith("0.png")
    folder(tmp_path / "b", ["cat", "dog"], 10)
    flat = load(f"imagefolder:{tmp_path / 'b'}", DataSettings(size=16))
    assert (len(flat.train), len(flat.test)) == (16, 4)
    assert not set(flat.train.paths) & set(flat.test.paths)
    held = load(f"imagefolder:{tmp_path / 'b'}", DataSettings(size=16, val_fraction=0.25))
    assert (len(held.train), len(held.val), len(held.test)) == (12, 4, 4)
    assert len(load(f"imagefolder:{tmp_path / 'b'}", DataSettings(size=16, limit=6)).train) == 6


def test_images_that_do_not_stay_in_memory_are_decoded_to_the_same(tmp_path):
    folder(tmp_path, ["cat", "dog"], 5)
    kept = load(f"imagefolder:{tmp_path}", DataSettings(size=16))
    streamed = load(f"imagefolder:{tmp_path}", DataSettings(size=16, resident_gb=0))
    assert streamed.train.images is None
    index = torch.tensor([3, 0])
    assert torch.equal(streamed.train.pixels(index), kept.train.pixels(index))
    crops = Indexed(streamed.train, read_random_crop)
    torch.manual_seed(0)
    first = crops[0]
    assert first[2].shape == (3, 16, 16)
    assert first[2].dtype == torch.uint8
    assert not torch.equal(crops[0][2], first[2])


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), (np.arange(20) % 4).astype(np.uint8)
    np.savez(
        tmp_path / "four.npz", train_images=images, train_labels=labels, test_images=images[:8], test_labels=labels[:8]
    )
    data = load(f"npz:{tmp_path / 'four.npz'}")
    assert (len(data.train), len(data.test), data.classes) == (20, 8, ("0", "1", "2", "3"))
    assert torch.equal(data.train.images[3], torch.from_numpy(images[3]).permute(2, 0, 1))
    assert data.mean == pytest.approx((images / 255).mean(axis=(0, 1, 2)), abs=1e-4)
    names = np.asarray(["w", "x", "y", "z"])
    np.savez(tmp_path / "xy.npz", x=images[..., 0], y=labels.astype(np.int64), classes=names)
    gray = load(f"npz:{tmp_path / 'xy.npz'}")
    assert (len(gray.train), len(gray.test), gray.classes) == (16, 4, ("w", "x", "y", "z"))
    assert gray.train.images.shape[1] == 3
    np.savez(tmp_path / "bad.npz", x=images, y=labels[:5])
    with pytest.raises(UserError, match=r"'y' is \(5,\): N0 is 5 here, but 20 in 'x'"):
        load(f"npz:{tmp_path / 'bad.npz'}")
    np.savez(tmp_path / "few.npz", x=images, y=labels, classes=names[:2])
    with pytest.raises(UserError, match="'y' holds 3, expected 0 to 1"):
        load(f"npz:{tmp_path / 'few.npz'}")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="text.npz"):
        load(f"npz:{tmp_path / 'text.npz'}")


def test_tiny_imagenet(tmp_path):
    for wnid in ("n01", "n02"):
        folder(tmp_path / "train" / wnid, ["images"], 3, 12)
    (tmp_path / "val/images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (12, 12), (i, i, i)).save(tmp_path / f"val/images/val_{i}.JPEG")
    listing = tmp_path / "val/val_annotations.txt"
    listing.write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    data = load(f"tinyimagenet:{tmp_path}", DataSettings(size=12))
    assert (len(data.train), data.test.labels.tolist(), data.classes) == (6, [1, 0], ("n01", "n02"))
    listing.write_text("val_0.JPEG\tn02\t0\n../../secret.JPEG\tn01\t0\n")
    with pytest.raises(DataError, match="line 2"):
        load(f"tinyimagenet:{tmp_path}", DataSettings(size=12))


def test_cifar_folders(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-100-python", monkeypatch, kind="CIFAR-100", classes=100, each=1)
    data = load(f"cifar100:{tmp_path}")
    assert (len(data.train), len(data.test), len(data.classes)) == (100, 100, 100)
    assert data.mean == (0.5071, 0.4866, 0.4409)
    with pytest.raises(DataError, match="not CIFAR-10"):
        load(f"cifar10:{tmp_path}")


def test_embedded():
    data = load("digits")
    assert data.train.images.shape[1:] == (3, 8, 8)
    assert "real" in data.source


def test_bad_folders(tmp_path):
    """An empty folder, classes that differ, an unknown kind."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="one folder per class"):
        load(f"imagefolder:{tmp_path / 'empty'}")
    folder(tmp_path / "a/train", ["cat", "dog"], 1)
    with pytest.raises(UserError, match="none of val, valid, validation, test"):
        load(f"imagefolder:{tmp_path / 'a'}")
    folder(tmp_path / "a/test", ["bird", "cat"], 1)
    with pytest.raises(UserError, match="bird: no such class in"):
        load(f"imagefolder:{tmp_path / 'a'}")
    (tmp_path / "b/cat").mkdir(parents=True)
    (tmp_path / "b/cat/x.png").write_bytes(b"no picture")
    folder(tmp_path / "b", ["dog"], 3)
    with pytest.raises(UserError, match=r"x\.png: cannot be decoded"):
        load(f"imagefolder:{tmp_path / 'b'}")
    with pytest.raises(UserError, match="did you mean imagefolder"):
        load(f"imagefolders:{tmp_path}")
    folder(tmp_path / "c", ["cat", "dog"], 3)
    with pytest.raises(DataError, match="channels 4 is for npz"):
        load(f"imagefolder:{tmp_path / 'c'}", DataSettings(channels=4))
