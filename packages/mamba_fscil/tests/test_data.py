"""Readers and protocols: what they take, what they refuse, and every recipe on a stand-in of its data's layout."""

import json
import shutil

import numpy as np
import pytest
import torch
from mamba_fscil.cli import main
from mamba_fscil.config import DataSettings, ProtocolConfig
from mamba_fscil.data import load, match_classes, same_name
from mamba_fscil.training.learner import IncrementalLearner
from PIL import Image

from tenfold import UserError
from tenfold.errors import NonFiniteError
from tenfold.testing import write_cifar

TEN = ProtocolConfig(base=6, way=2, shot=2, sessions=2)


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (18, 20, 3)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("cub") / "CUB_200_2011"
    images, labels, split = [], [], []
    for k in range(10):
        for i in range(5):
            number = len(images) + 1
            name = f"{k + 1:03d}.Bird_{k}/bird_{k}_{i}.jpg"
            picture(root / "images" / name, number)
            images.append(f"{number} {name}")
            labels.append(f"{number} {k + 1}")
            split.append(f"{number} {int(i < 3)}")
    for name, lines in (("images", images), ("image_class_labels", labels), ("train_test_split", split)):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    root = tmp_path_factory.mktemp("mini")
    rows = {"train": ["filename,label"], "test": ["filename,label"]}
    for k in range(10):
        for i in range(5):
            name = f"n{k:04d}{i:04d}.jpg"
            picture(root / "images" / name, 50 * k + i)
            rows["train" if i < 3 else "test"].append(f"{name},n{k:04d}")
    (root / "split").mkdir()
    for name, lines in rows.items():
        (root / "split" / f"{name}.csv").write_text("\n".join(lines))
    return root


def check(data):
    assert data.base_classes == 6
    assert len(data.classes) == 10
    assert set(data.base.labels.tolist()) == set(range(6))
    for number, part in enumerate(data.shots):
        assert sorted(part.labels.tolist()) == sorted([6 + 2 * number, 7 + 2 * number] * 2)
    assert data.test_until(1).labels.max() == 7
    assert data.seen(2) == 10


def test_layouts_of_the_field_are_read_in_the_protocols_order_of_classes(cub, mini):
    for kind, path in (("cub200", cub.parent), ("cub200", cub), ("miniimagenet", mini)):
        check(load(f"{kind}:{path}", TEN, DataSettings(size=16)))
    assert load(f"cub200:{cub}", TEN, DataSettings(size=16)).classes[0] == "001.Bird_0"
    assert load(f"miniimagenet:{mini}", TEN, DataSettings(size=16)).classes[9] == "n0009"


def test_embedded_data_come_in_sessions_whose_pictures_depend_on_the_seed_alone():
    data = load("digits", seed=3)
    assert (data.base_classes, [len(part) for part in data.shots]) == (6, [10, 10])
    again, other = load("digits", seed=3), load("digits", seed=4)
    assert torch.equal(data.shots[0].split.images, again.shots[0].split.images)
    assert not torch.equal(data.shots[0].split.images, other.shots[0].split.images)


def test_images_of_arrays_are_brought_to_another_size_and_maps_are_not(tmp_path):
    data = load("digits", reading=DataSettings(size=12))
    small = load("digits").base.split.images
    assert (data.size, data.base.split.images.shape[1:]) == (12, (3, 12, 12))
    means = [x.float().mean(dim=(1, 2, 3)) for x in (small, data.base.split.images)]
    assert torch.allclose(means[0], means[1], atol=3)
    np.savez(tmp_path / "m.npz", train_maps=np.ones((20, 4, 2, 2), np.float32), train_labels=np.arange(20) % 4)
    with pytest.raises(UserError, match="--reading.size 12: .* are maps"):
        load(f"npz:{tmp_path / 'm.npz'}", ProtocolConfig(base=2, way=1, shot=3), DataSettings(size=12))


def test_lists_of_few_shot_pictures_are_read_by_row_or_by_file_name(cub, tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    lines = [f"CUB_200_2011/images/{k + 1:03d}.Bird_{k}/bird_{k}_2.jpg" for k in (6, 7)]
    (folder / "session_2.txt").write_bytes("\r\n".join(lines).encode() + b"\r\n\r\n")
    protocol = ProtocolConfig(base=6, way=2, sessions=1, index_list=str(folder))
    found = load(f"cub200:{cub}", protocol, DataSettings(size=16))
    assert [p.name for p in found.shots[0].split.paths] == ["bird_6_2.jpg", "bird_7_2.jpg"]
    (folder / "session_2.txt").write_text(lines[0].replace("_6", "_0").replace("007", "001"))
    with pytest.raises(UserError, match="session 1 names a picture of 001.Bird_0"):
        load(f"cub200:{cub}", protocol, DataSettings(size=16))
    (folder / "session_2.txt").write_text("\nnone.jpg")
    with pytest.raises(UserError, match=r"line 2: expected a picture of the training part, found 'none.jpg'"):
        load(f"cub200:{cub}", protocol, DataSettings(size=16))
    with pytest.raises(UserError, match=r"no/session_2.txt"):
        load("digits", ProtocolConfig(index_list=str(folder / "no")))


def test_maps_that_were_extracted_elsewhere_are_read_and_nan_is_refused_by_row(tmp_path):
    maps = np.random.default_rng(0).normal(size=(20, 4, 2, 2)).astype(np.float32)
    labels = np.arange(20) % 4
    np.savez(tmp_path / "m.npz", train_maps=maps, train_labels=labels, test_maps=maps[:8], test_labels=labels[:8])
    data = load(f"npz:{tmp_path / 'm.npz'}", ProtocolConfig(base=2, way=1, shot=3))
    assert (data.size, len(data.shots), data.base.maps.shape) == (0, 2, (10, 4, 2, 2))
    maps[7, 0, 0, 0] = np.nan
    np.savez(tmp_path / "m.npz", train_maps=maps, train_labels=labels)
    with pytest.raises(NonFiniteError, match="'train_maps': row 7 holds NaN"):
        load(f"npz:{tmp_path / 'm.npz'}")
    (tmp_path / "m.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:900])
    with pytest.raises(UserError, match="not a whole npz file"):
        load(f"npz:{tmp_path / 'm.npz'}")


def folders(root, base=("a", "b"), later=(("c",),), test=("c", "a", "b")):
    for part, names in (("base", base), *((f"session-{i:02d}", n) for i, n in enumerate(later, 1)), ("test", test)):
        for name in names:
            for i in range(3):
                picture(root / part / name / f"{i}.png", hash((part, name, i)) % 1000)
    return f"imagefolder:{root}"


def test_folders_of_sessions_are_read_with_test_classes_in_any_order_and_some_missing(tmp_path):
    data = load(folders(tmp_path / "x", test=("c", "a")), reading=DataSettings(size=16))
    assert data.classes == ("a", "b", "c")
    assert sorted(set(data.test.labels.tolist())) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": ("Cat", "a", "b"), "later": (("cat",),)}, "unknown class 'Cat': did you mean cat?"),
        ({"later": (("a",),), "test": ("a",)}, "there in an earlier session"),
        ({"test": ()}, "expected test/CLASS beside base/"),
    ],
)
def test_folders_that_contradict_themselves_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load(folders(tmp_path / "x", **change), reading=DataSettings(size=16))


def test_a_plain_folder_of_classes_is_a_base_session_without_further_ones(tmp_path):
    for name in ("a", "b"):
        for i in range(5):
            picture(tmp_path / "p" / name / f"{i}.png", i)
    data = load(f"imagefolder:{tmp_path / 'p'}", reading=DataSettings(size=16))
    assert (data.base_classes, data.shots, len(data.base), len(data.test)) == (2, (), 8, 2)


def test_protocols_that_the_data_cannot_fill_are_refused_with_the_numbers(tmp_path):
    with pytest.raises(UserError, match="has 10 classes; --protocol.base 6 and 3 sessions of 2 need 12"):
        load("digits", ProtocolConfig(sessions=3))
    with pytest.raises(UserError, match="training pictures, --protocol.shot asks for 900"):
        load("digits", ProtocolConfig(shot=900))


def test_names_are_the_same_but_for_case_spaces_and_hyphens_and_single_letters_keep_their_case():
    assert same_name("Snow leopard", ["lynx", "snow_leopard"]) == "snow_leopard"
    assert same_name("e", ["E"]) is None
    assert match_classes(["b", "a"], ["a", "b"], "x").tolist() == [1, 0]


OVERRIDES = ["--backbone", "fscil:conv", "--projector.width", "16", "--projector.states", "2", "--projector.rank", "2"]
OVERRIDES += ["--epochs", "1", "--batch_size", "8", "--capacity", "12", "--protocol.base", "6", "--protocol.way", "2"]
OVERRIDES += ["--protocol.shot", "2", "--protocol.sessions", "2", "--session.steps", "3", "--session.more_steps", "0"]
OVERRIDES += ["--session.batch_size", "8", "--workers", "0", "--device", "cpu", "--quiet"]


@pytest.mark.parametrize("parity", ["", "-parity"])
@pytest.mark.parametrize("name", ["cifar100", "miniimagenet", "cub200"])
def test_every_recipe_runs_end_to_end_on_a_stand_in_of_its_layout(name, parity, cub, mini, tmp_path, monkeypatch):
    where = {"miniimagenet": mini, "cub200": cub, "cifar100": tmp_path / "cifar"}[name]
    words = ["train", "--config", f"recipe:{name}{parity}", "--data", f"{name}:{where}", *OVERRIDES]
    if name == "cifar100":
        write_cifar(where, monkeypatch, classes=100, each=2)
        words += ["--protocol.base", "95", "--protocol.way", "2", "--protocol.shot", "2", "--capacity", "100"]
        words += ["--projector.width", "104", "--batch_size", "64"]
    else:
        words += ["--reading.size", "16"]
    assert main([*words, "--learner", str(tmp_path / "l"), "--out", str(tmp_path / "r")]) == 0
    learner = IncrementalLearner.load(tmp_path / "l")
    assert learner.sessions == 2
    assert learner.session.norm == ("fro_over_numel" if parity else "rms")
    assert json.loads((tmp_path / "r/summary.json").read_text())["arms"]["mamba-fscil"]["average"]


def test_a_pretrained_vision_transformer_by_file_with_the_nearest_mean_is_a_recipe(tmp_path):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    source = folders(tmp_path / "x")
    words = [
        "train",
        "--config",
        "recipe:vit-ncm",
        "--data",
        source,
        "--backbone",
        "timm:test_vit",
        "--reading.size",
        "160",
    ]
    words += ["--backbone_weights", str(tmp_path / "vit.safetensors"), "--device", "cpu", "--quiet"]
    assert main([*words, "--learner", str(tmp_path / "l"), "--out", str(tmp_path / "r")]) == 0
    learner = IncrementalLearner.load(tmp_path / "l")
    assert (learner.method, learner.classes) == ("ncm", ["a", "b", "c"])
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    own = model.eval().forward_features((images / 255 - 0.5) / 0.5)[:, 1:].mean(dim=1)
    assert torch.allclose(learner.maps(images).mean(dim=(2, 3)), own, atol=1e-4)


def test_pictures_of_another_release_of_cub_are_missed_by_name_and_any_line_end_is_read(cub, tmp_path):
    root = tmp_path / "CUB_200_2011"
    shutil.copytree(cub, root)
    for name in ("images", "image_class_labels", "train_test_split"):
        (root / f"{name}.txt").write_bytes((root / f"{name}.txt").read_bytes().replace(b"\n", b"\r\n"))
    check(load(f"cub200:{root}", TEN, DataSettings(size=16)))
    (root / "images/003.Bird_2/bird_2_1.jpg").unlink()
    with pytest.raises(UserError, match=r"bird_2_1.jpg: no such file"):
        load(f"cub200:{root}", TEN, DataSettings(size=16))


def test_an_empty_class_folder_is_refused_by_name_and_shifts_no_label(tmp_path):
    source = folders(tmp_path / "x")
    (tmp_path / "x/test/aa").mkdir()
    with pytest.raises(UserError, match=r"aa: no picture in this class"):
        load(source, reading=DataSettings(size=16))
