"""The embedded data against what the libraries themselves hold; the readers against files that are broken on purpose."""

import ast
import hashlib
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image
from sklearn.datasets import load_digits

from tenfold import NonFiniteError, UserError, datasets

FACES = sorted(p for p in Path(get_data_path(), "fonts/ttf").glob("DejaVu*.ttf") if "Display" not in p.name)


@pytest.fixture(scope="module")
def drawn():
    """Every character once in every face, as it is drawn."""
    return datasets.glyphs(64, per_face=1, jitter=0)


def test_digits_are_scikit_learns_and_split_by_class():
    train, test = datasets.digits(seed=3)
    original = load_digits()
    both = np.concatenate([train.images, test.images])
    assert both.shape == (1797, 8, 8)
    assert both.dtype == np.uint8
    rows = sorted(map(bytes, np.round(both * 16.0 / 255).astype(np.uint8)))
    expected = {bytes(i): t for i, t in zip(original.images.astype(np.uint8), original.target, strict=True)}
    assert rows == sorted(expected)
    back = map(bytes, np.round(test.images * 16.0 / 255).astype(np.uint8))
    assert [expected[image] for image in back] == test.labels.tolist()
    np.testing.assert_allclose(np.bincount(test.labels) / np.bincount(original.target), 0.25, atol=0.01)
    again, other = datasets.digits(seed=3)[1], datasets.digits(seed=4)[1]
    np.testing.assert_array_equal(test.images, again.images)
    assert not np.array_equal(test.images, other.images)


def test_glyphs_are_the_letters_and_digits_of_all_twelve_faces(drawn):
    assert len(FACES) == 12
    charmaps = [FT2Font(str(path)).get_charmap() for path in FACES]
    candidates = []
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        letter = c.isalpha() and unicodedata.category(c) in ("Lu", "Ll", "Lo")
        if (letter or c.isdecimal()) and unicodedata.normalize("NFKD", c) == c and all(code in m for m in charmaps):
            candidates.append(c)
    assert len(candidates) == 628
    classes = drawn[0].classes
    assert set(classes) <= set(candidates)
    assert len(classes) == 534
    assert "".join(classes[:62]) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert list(classes) == sorted(classes)
    assert not {"Α", "А", "т"} & set(classes)  # noqa: RUF001
    assert {"Ж", "Ω", "Ա", "ა"} <= set(classes)


def test_no_two_classes_look_the_same_in_any_face(drawn):
    train, test = drawn
    seen = {}
    for part in drawn:
        for image, face, label in zip(part.images, part.faces, part.labels, strict=True):
            assert seen.setdefault((face, image.tobytes()), label) == label
    assert len(seen) == 12 * 534
    assert set(train.faces) | set(test.faces) == set(range(12))
    assert not set(train.faces) & set(test.faces)
    assert [train.face_names[f] for f in sorted(set(test.faces))] == [
        "DejaVuSansMono-Oblique",
        "DejaVuSerif-BoldItalic",
        "DejaVuSerif",
    ]
    border = np.stack([train.images[:, [0, -1]].max((1, 2)), train.images[:, :, [0, -1]].max((1, 2))])
    assert border.max() == 0, "a character is cut off"


def test_a_drawn_glyph_is_the_faces_outline(drawn):
    """matplotlib's own rasteriser draws the same ink as Pillow does."""
    train = drawn[0]
    font = FT2Font(str(FACES[train.face_names.index("DejaVuSans")]))
    font.set_size(40, 72)
    ours, theirs = [], []
    for character in "AgШლ":
        font.set_text(character)
        font.draw_glyphs_to_bitmap()
        theirs.append(float(np.asarray(font.get_image(), float).sum()))
        at = (train.labels == train.classes.index(character)) & (train.faces == train.face_names.index("DejaVuSans"))
        ours.append(float(train.images[at].sum()))
    np.testing.assert_allclose(ours, theirs, rtol=0.06)


def test_a_glyph_depends_on_its_own_key_alone():
    def images(parts):
        found = {}
        for part in parts:
            copies = {}
            for image, face, label in zip(part.images, part.faces, part.labels, strict=True):
                k = copies[face, label] = copies.get((face, label), -1) + 1
                found[part.face_names[face], part.classes[label], k] = image.tobytes()
        return found

    many = images(datasets.glyphs(16, classes=20, per_face=3, noise=5, seed=7))
    few = images(datasets.glyphs(16, classes=5, per_face=2, noise=5, seed=7, held_out=["DejaVuSans"]))
    assert len(few) == 12 * 5 * 2
    assert all(many[key] == image for key, image in few.items())
    assert len(set(many.values())) == len(many)
    other = images(datasets.glyphs(16, classes=5, per_face=2, noise=5, seed=8))
    assert not set(few.values()) & set(other.values())


def test_jitter_moves_a_glyph_within_its_stated_range():
    still = datasets.glyphs(64, classes=10, per_face=1, jitter=0)[0]
    moved = datasets.glyphs(64, classes=10, per_face=20, jitter=1)[0]

    def center_and_mass(images):
        grid = np.arange(64)
        mass = images.sum((1, 2), dtype=float)
        return np.stack([images.sum(axis, dtype=float) @ grid / mass for axis in (1, 2)], 1), mass

    center, mass = center_and_mass(still.images)
    new_center, new_mass = center_and_mass(moved.images)
    shift = new_center.reshape(len(center), 20, 2) - center[:, None]
    assert 4 < np.abs(shift).max() < 0.08 * 64 + 3  # a turn and a zoom about the image's center move the glyph's, too
    assert np.abs(shift.mean(1)).max() < 3
    area = new_mass.reshape(len(mass), 20) / mass[:, None]
    assert 0.85**2 - 0.03 < area.min() < 0.85
    assert 1.2 < area.max() < 1.15**2 + 0.03
    noisy = datasets.glyphs(64, classes=10, per_face=1, jitter=0, noise=10)[0].images.astype(float)
    gray = (still.images > 60) & (still.images < 195)
    assert 9 < (noisy - still.images)[gray].std() < 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": ["DejaVuSerif-Itali"]}, "unknown face 'DejaVuSerif-Itali': did you mean DejaVuSerif-Italic"),
        ({"held_out": []}, "expected 1 to 11 faces, got 0"),
        ({"classes": 535}, "classes must be 1 to 534, got 535"),
        ({"per_face": 0}, "per_face must be 1 to"),
        ({"size": 4}, "size must be 8"),
        ({"jitter": float("nan")}, "jitter must be 0"),
        ({"noise": -1}, "noise must be 0"),
        ({"seed": -1}, "seed must be 0"),
    ],
)
def test_glyphs_refuse_what_they_cannot_draw(options, message):
    with pytest.raises(UserError, match=message):
        datasets.glyphs(**options)


def test_texts_are_pythons_own_and_carry_their_hash():
    from pydoc_data import topics

    text = datasets.topics()
    assert all(page.strip() in text.text for page in topics.topics.values())
    assert text.sha256 == hashlib.sha256(text.text.encode("utf-8")).hexdigest()
    assert text.sha256[:12] in str(text)
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in str(text)

    code = datasets.standard_library_code(["csv", "json.decoder"])
    names = {node.name for node in ast.parse(code.text).body if isinstance(node, ast.ClassDef)}
    assert {"DictReader", "JSONDecoder"} <= names
    assert code.text.startswith(Path(sys.modules["csv"].__file__ if "csv" in sys.modules else "").read_text()[:500])
    assert len(datasets.standard_library_code().text) > 100_000
    for name in ("jsn", "numpy", "../secret", "math"):
        with pytest.raises(UserError, match="no module of one Python file in the standard library"):
            datasets.standard_library_code([name])


def test_unicode_names_are_facts():
    text = datasets.unicode_names(0x0410, 300)
    lines = text.text.splitlines()
    assert len(set(lines)) == 300
    for line in lines:
        code, _, name = line.partition(" -> ")
        assert ord(unicodedata.lookup(name)) == int(code.removeprefix("U+"), 16)
    assert "U+0416 -> CYRILLIC CAPITAL LETTER ZHE" in lines
    assert unicodedata.unidata_version in text.source
    for first, count in ((sys.maxunicode - 5, 1), (0, 0)):
        with pytest.raises(UserError, match="count must be 1 to"):
            datasets.unicode_names(first, count)


def test_parse_source(tmp_path, monkeypatch):
    (tmp_path / "a:b.npz").touch()
    options = {"kinds": ("imagefolder", "npz", "csv"), "embedded": ("digits", "glyphs")}
    assert datasets.parse_source(f"npz:{tmp_path}/a:b.npz", **options) == ("npz", tmp_path / "a:b.npz")
    assert datasets.parse_source("glyphs", **options) == ("glyphs", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.parse_source("imagefolder:~", **options) == ("imagefolder", tmp_path)
    for source, message in {
        "digit": "--data digit: unknown name 'digit': did you mean digits",
        f"imagefoldr:{tmp_path}": "unknown kind 'imagefoldr': did you mean imagefolder",
        "npz:/not/there.npz": "--data npz:/not/there.npz: no such file or folder",
        "npz:": "expected a path: npz:PATH",
        "csv": "expected a path: csv:PATH",
        "digits:x": "'digits' is embedded and takes no path",
        str(tmp_path): "a path needs its kind before it, one of imagefolder:PATH, npz:PATH",
        "": "unknown name '': known: csv, digits, glyphs, imagefolder, npz",
        "npz:" + "x" * 5000: "no such file or folder",
    }.items():
        with pytest.raises(UserError) as caught:
            datasets.parse_source(source, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@given(st.text(max_size=400))
def test_parse_source_refuses_any_other_text_in_one_line(source):
    with pytest.raises(UserError) as caught:
        datasets.parse_source(f"x{source}", kinds=["npz"], embedded=["digits"])
    assert str(caught.value).endswith("(forms: npz:PATH, digits)")


def picture(path, value, mode="RGB", size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_image_folder(tmp_path):
    for name, color in (("zebra/b.png", 1), ("zebra/a.PNG", 2), ("ant/deep/er/c.webp", 3), ("ant/.d.png", 4)):
        picture(tmp_path / name, (color, 0, 0))
    for name in ("zebra/notes.txt", ".cache/x.png", "readme.png", "ant/more.png/not-an-image"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = datasets.image_folder(tmp_path, verify=True)
    assert found.classes == ("ant", "zebra")
    names = [path.relative_to(tmp_path).as_posix() for path in found.paths]
    assert names == ["ant/deep/er/c.webp", "zebra/a.PNG", "zebra/b.png"]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.labels.dtype == np.int64
    image = datasets.read_image(found.paths[1])
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert (image == (2, 0, 0)).all()


def test_image_folder_names_what_is_wrong(tmp_path):
    def message(**options):
        with pytest.raises(UserError) as caught:
            datasets.image_folder(tmp_path / "data", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such folder" in message()
    (tmp_path / "data").mkdir()
    assert "one folder a class, found none" in message()
    picture(tmp_path / "data/a/1.png", 0)
    (tmp_path / "data/b").mkdir()
    assert f"{tmp_path / 'data/b'}: no image in this class" in message()

    whole = picture(tmp_path / "big.jpg", (9, 200, 30), size=(200, 200)).read_bytes()
    (tmp_path / "data/b/cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert datasets.image_folder(tmp_path / "data").classes == ("a", "b")
    assert "cut.jpg: cannot be decoded as an image" in message(verify=True)
    (tmp_path / "data/b/cut.jpg").write_bytes(b"<html>")
    assert "cut.jpg: cannot be decoded as an image" in message(verify=True)
    (tmp_path / "data/b/cut.jpg").unlink()
    Image.fromarray(np.full((3, 3), 40_000, np.uint16)).save(tmp_path / "data/b/deep.png")
    assert "deep.png: expected 8 bits a channel" in message(verify=True)

    link = tmp_path / "data/b/link.png"
    link.symlink_to(picture(tmp_path / "outside.png", 0))
    assert "link.png: leads outside" in message()
    link.unlink()
    link.symlink_to("nowhere.png")
    assert "link.png: a link that leads nowhere" in message()
    link.unlink()
    link.symlink_to(link.name)
    assert "link.png: a link that leads nowhere" in message()


WANTED = {"images": ("uint8", ("N", 4, 4)), "labels": ("int32|int64", ("N",)), "weights": ("float32", ("N", "D"))}


def arrays(**changes):
    good = {"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(3), "weights": np.ones((3, 2), np.float32)}
    return {**good, **changes}


def test_npz_arrays_gives_what_was_saved(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", more=np.zeros(1), **arrays())
    found = datasets.npz_arrays(tmp_path / "a.npz", WANTED)
    assert list(found) == list(WANTED)
    for key, array in arrays().items():
        np.testing.assert_array_equal(found[key], array)
    np.savez(tmp_path / "nan.npz", **arrays(weights=np.full((3, 2), np.nan, np.float32)))
    assert np.isnan(datasets.npz_arrays(tmp_path / "nan.npz", WANTED, finite=False)["weights"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 4, 5), np.uint8)}, "'images' is uint8 (3, 4, 5), expected uint8 (N, 4, 4)"),
        ({"images": np.zeros((3, 4), np.uint8)}, "'images' is uint8 (3, 4), expected uint8 (N, 4, 4)"),
        ({"images": np.zeros((3, 4, 4))}, "'images' is float64 (3, 4, 4), expected uint8"),
        ({"labels": np.arange(3.0)}, "'labels' is float64 (3,), expected int32 or int64 (N)"),
        ({"labels": np.arange(4)}, "'labels' is (4,): N is 4 here, but 3 in 'images'"),
        ({"labels": np.array([{}, {}, {}])}, "not a whole npz file of plain arrays (Object arrays cannot be loaded"),
    ],
)
def test_npz_arrays_names_file_key_found_and_expected(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(UserError) as caught:
        datasets.npz_arrays(tmp_path / "a.npz", WANTED)
    assert str(caught.value).startswith(f"{tmp_path / 'a.npz'}: {message}")


def test_npz_arrays_refuses_broken_files(tmp_path):
    file = tmp_path / "a.npz"

    def message(content=None):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            datasets.npz_arrays(file, WANTED)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in message()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays(images=np.random.default_rng(0).integers(0, 255, (3, 4, 4)).astype(np.uint8)))
    whole = buffer.getvalue()
    for content in (b"", b"PK", b"text", whole[:-30], whole[: len(whole) // 2]):
        assert "not a whole npz file" in message(content)
    damaged = bytearray(whole)
    damaged[60:90] = bytes(30)  # inside the first array's stream
    assert "not a whole npz file" in message(bytes(damaged))
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "not a whole npz file" in message((tmp_path / "array.npy").read_bytes())
    np.savez(file, image=np.zeros(1))
    assert "no array 'images': did you mean image?" in message()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images", b"raw")
        archive.writestr("labels", b"raw")
        archive.writestr("weights", b"raw")
    assert re.search(r"'images' is \|S3 \(\), expected uint8|not a whole npz file of plain arrays", message())
    weights = np.ones((3, 2), np.float32)
    weights[2, 1] = np.inf
    np.savez(file, **arrays(weights=weights))
    with pytest.raises(NonFiniteError, match=r"'weights' holds inf at \(2, 1\)"):
        datasets.npz_arrays(file, WANTED)


def test_image_folders_pairs_train_with_its_test_part(tmp_path):
    for part, names in (("train", "abc"), ("test", "ca")):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name / "0.png")
    train, test = datasets.image_folders(tmp_path)
    assert train.classes == test.classes == ("a", "b", "c")
    assert [(path.parent.name, label) for path, label in zip(test.paths, test.labels, strict=True)] == [
        ("a", 0),
        ("c", 2),
    ]
    alone, none = datasets.image_folders(tmp_path / "train")
    assert none is None
    assert alone.paths == train.paths
    (tmp_path / "test/a").rename(tmp_path / "test/aa")
    with pytest.raises(UserError, match=r"aa: no such class in .*train: did you mean a\?|known: a, b, c"):
        datasets.image_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "held")
    with pytest.raises(UserError, match="neither val nor test"):
        datasets.image_folders(tmp_path)


def labeled(**changes):
    rng = np.random.default_rng(0)
    good = {
        "train_images": rng.integers(0, 256, (5, 4, 6, 3)).astype(np.uint8),
        "train_labels": np.array([0, 1, 2, 1, 0], np.uint8),
        "test_images": rng.integers(0, 256, (2, 4, 6, 3)).astype(np.uint8),
        "test_labels": np.array([2, 0]),
    }
    return {**good, **changes}


def test_npz_images_knows_three_layouts(tmp_path):
    arrays = labeled()
    first, second, third = (tmp_path / name for name in ("a.npz", "b.npz", "c.npz"))
    np.savez(first, classes=np.array(["x", "y", "z", "unused"]), **arrays)
    np.savez_compressed(second, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays.values(), strict=True)))
    np.savez(third, x=arrays["train_images"][..., 0], y=arrays["train_labels"].astype(np.int32))
    for path, names in ((first, ("x", "y", "z", "unused")), (second, ("0", "1", "2"))):
        train, test = datasets.npz_images(path)
        assert train.classes == test.classes == names
        np.testing.assert_array_equal(train.images, arrays["train_images"])
        np.testing.assert_array_equal(test.images, arrays["test_images"])
        assert train.labels.tolist() == [0, 1, 2, 1, 0]
        assert train.labels.dtype == test.labels.dtype == np.int64
    gray, none = datasets.npz_images(third)
    assert none is None
    np.testing.assert_array_equal(gray.images, arrays["train_images"][..., 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": np.array([3, -1])}, "'test_labels' holds -1, expected 0 to 3"),
        ({"classes": np.array(["x", "y"])}, "'train_labels' holds 2, expected 0 to 1"),
        ({"classes": np.array(["x", None])}, "'classes' is object, expected names"),
        ({"test_images": np.zeros((2, 5, 6, 3), np.uint8)}, "'test_images' is (2, 5, 6, 3): H is 5 here, but 4 in"),
        ({"train_images": np.zeros((5, 4, 6, 3))}, "'train_images' is float64 (5, 4, 6, 3), expected uint8"),
        ({"train_labels": np.zeros(4, int)}, "'train_labels' is (4,): N0 is 4 here, but 5 in 'train_images'"),
    ],
)
def test_npz_images_names_what_is_wrong(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **labeled(**changes))
    with pytest.raises(UserError) as caught:
        datasets.npz_images(tmp_path / "a.npz")
    assert message in str(caught.value)
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_npz_images_refuses_broken_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    for name in ("a.npz", "none.npz"):
        with pytest.raises(UserError, match="not a whole npz file|no such file"):
            datasets.npz_images(tmp_path / name)
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="no array 'train_images'"):
        datasets.npz_images(tmp_path / "a.npz")


class _Python2(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, which the published CIFAR files come from."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin-1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def write_cifar(folder, python2=True, **changes):
    """CIFAR-100's three files with four classes; returns what they hold."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    images = {name: rng.integers(0, 256, (n, 3072)).astype(np.uint8) for name, n in (("train", 12), ("test", 5))}
    labels = {name: rng.integers(0, 4, len(rows)).tolist() for name, rows in images.items()}
    files = {name: {"data": images[name], "fine_labels": labels[name], "filenames": ["a.png"]} for name in images}
    files["meta"] = {"fine_label_names": ["apple", "bee", "cup", "dog"]}
    files["train"] |= changes
    for name, content in files.items():
        with (folder / name).open("wb") as file:
            (_Python2 if python2 else pickle.Pickler)(file, protocol=2).dump(content)
    return images, labels


@pytest.mark.parametrize("python2", [True, False])
@pytest.mark.filterwarnings("error")
def test_cifar_gives_the_images_of_its_files(tmp_path, python2):
    images, labels = write_cifar(tmp_path / "cifar-100-python", python2)
    for root in (tmp_path, tmp_path / "cifar-100-python"):
        for part, name in zip(datasets.cifar(root), ("train", "test"), strict=True):
            assert part.classes == ("apple", "bee", "cup", "dog")
            assert part.labels.tolist() == labels[name]
            assert part.images.shape == (len(labels[name]), 32, 32, 3)
            for row, image in zip(images[name], part.images, strict=True):  # three planes, each by rows
                assert all(image[7, 9, color] == row[1024 * color + 32 * 7 + 9] for color in range(3))


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": _Evil()}, "it asks for posix.mkdir"),
        ({"more": np.array([None])}, "it holds an array of 'O8'"),
        ({"data": np.zeros((12, 3071), np.uint8)}, "expected 'data' as uint8 (N, 3072)"),
        ({"fine_labels": [0] * 11}, "expected a whole number for each of the 12 images as 'fine_labels'"),
        ({"fine_labels": [[0]] * 12}, "expected a whole number for each of the 12 images as 'fine_labels'"),
        ({"fine_labels": [0] * 11 + [4]}, "'fine_labels' holds 4, there are 4 classes"),
    ],
)
def test_cifar_runs_nothing_of_a_file_and_says_what_is_wrong(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "c", python2=False, **changes)
    with pytest.raises(UserError) as caught:
        datasets.cifar(tmp_path / "c")
    assert message in str(caught.value)
    assert str(tmp_path / "c/train") in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_cifar_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="found neither"):
        datasets.cifar(tmp_path)
    write_cifar(tmp_path)
    whole = (tmp_path / "test").read_bytes()
    for content in (b"", b"text", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "test").write_bytes(content)
        with pytest.raises(UserError, match="test: not a file of CIFAR for Python"):
            datasets.cifar(tmp_path)
    (tmp_path / "test").unlink()
    with pytest.raises(UserError, match="test: no such file"):
        datasets.cifar(tmp_path)
    write_cifar(tmp_path / "cifar-100-python")
    with pytest.raises(UserError, match="give the folder of one"):
        datasets.cifar(tmp_path)


def test_without_an_extra_the_message_holds_the_command_that_installs_it():
    """In a process of its own, where the libraries cannot be found; that importing loads none of them is seen there, too."""
    program = """
import sys
from tenfold import datasets, figures, report
heavy = {"torch", "sklearn", "matplotlib", "PIL", "jinja2", "scipy"} & set(sys.modules)
assert not heavy, heavy
for name in ("sklearn", "matplotlib", "PIL", "jinja2", "scipy"):
    sys.modules[name] = None
for call in (
    datasets.digits,
    datasets.glyphs,
    lambda: datasets.read_image("a.png"),
    lambda: figures.line_chart("a.png", []),
    lambda: figures.arm_chart("a.png", {}, xlabel=""),
    lambda: figures.image_grid("a.png", [[]]),
    lambda: report.write_report(".", "title"),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = [("sklearn", "demo"), ("matplotlib", "demo"), ("PIL", "demo"), ("matplotlib", "demo"), ("scipy", "demo")]
    expected += [("matplotlib", "demo"), ("jinja2", "report")]
    lines = [f'{module} is not installed; pip install "tenfold[{extra}]"' for module, extra in expected]
    assert done.stdout.splitlines() == lines
