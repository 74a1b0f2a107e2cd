"""The readers against files that people have, and against files that are broken on purpose."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tenfold import NonFiniteError, UserError, readers
from tenfold.reading import Reading
from tenfold.testing import write_cifar


def test_parse_source(tmp_path, monkeypatch):
    (tmp_path / "a:b.npz").touch()
    options = {"kinds": ("imagefolder", "npz", "csv"), "embedded": ("digits", "glyphs")}
    assert readers.parse_source(f"npz:{tmp_path}/a:b.npz", **options) == ("npz", tmp_path / "a:b.npz")
    assert readers.parse_source("glyphs", **options) == ("glyphs", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert readers.parse_source("imagefolder:~", **options) == ("imagefolder", tmp_path)
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
            readers.parse_source(source, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@given(st.text(max_size=400))
def test_parse_source_refuses_any_other_text_in_one_line(source):
    with pytest.raises(UserError) as caught:
        readers.parse_source(f"x{source}", kinds=["npz"], embedded=["digits"])
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
    found = readers.image_folder(tmp_path, Reading(verify=True))
    assert found.classes == ("ant", "zebra")
    names = [path.relative_to(tmp_path).as_posix() for path in found.paths]
    assert names == ["ant/deep/er/c.webp", "zebra/a.PNG", "zebra/b.png"]
    assert found.labels.tolist() == [0, 1, 1]
    assert found.labels.dtype == np.int64
    assert found.skipped == ()
    image = readers.read_image(found.paths[1])
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert (image == (2, 0, 0)).all()


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_image_folder_names_what_is_wrong(tmp_path):
    def message():
        return refusal(readers.image_folder, tmp_path / "data")

    assert "no such folder" in message()
    (tmp_path / "data").mkdir()
    assert "one folder per class, found none" in message()
    picture(tmp_path / "data/a/1.png", 0)
    (tmp_path / "data/b").mkdir()
    assert f"{tmp_path / 'data/b'}: no picture in this class" in message()
    os.mkfifo(tmp_path / "data/b/pipe.png")
    assert "pipe.png: not a file" in message()
    (tmp_path / "data/b/pipe.png").unlink()
    link = tmp_path / "data/b/link.png"
    link.symlink_to("nowhere.png")
    assert "link.png: a link that leads nowhere" in message()


def test_all_broken_pictures_are_listed_at_once_or_left_out_and_counted(tmp_path):
    whole = picture(tmp_path / "big.jpg", (9, 200, 30), size=(200, 200)).read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], b"<html>", b"", whole[:100])):
        picture(tmp_path / f"data/a/{number}.png", 0)
        (tmp_path / f"data/a/broken{number}.jpg").write_bytes(content)
    picture(tmp_path / "data/b/0.png", 0)
    assert len(readers.image_folder(tmp_path / "data").paths) == 9
    message = refusal(readers.image_folder, tmp_path / "data", Reading(verify=True))
    assert message.startswith("4 of 9 pictures are broken, --reading.skip_bad true leaves them out: ")
    assert all(f"broken{number}.jpg: cannot be decoded as an image" in message for number in range(3))
    assert message.endswith("; and 1 more")
    found = readers.image_folder(tmp_path / "data", Reading(skip_bad=True))
    assert [path.name for path in found.paths] == ["0.png", "1.png", "2.png", "3.png", "0.png"]
    assert found.labels.tolist() == [0, 0, 0, 0, 1]
    assert [path.name for path in found.skipped] == [f"broken{number}.jpg" for number in range(4)]
    (tmp_path / "data/b/0.png").write_bytes(b"")
    assert "b: all pictures of this class are broken" in refusal(
        readers.image_folder, tmp_path / "data", Reading(skip_bad=True)
    )


def test_links_out_of_the_root_are_followed_only_where_allowed(tmp_path):
    picture(tmp_path / "outside/1.png", 1)
    picture(tmp_path / "data/a/0.png", 0)
    root = tmp_path / "data"

    def message():
        found = refusal(readers.image_folder, root)
        assert "leads outside of" in found
        assert "--reading.follow_links true follows it" in found
        return found

    links = (root / "a/link.png", "outside/1.png"), (root / "a/deep", "outside"), (root / "b", "outside")
    for link, target in links:
        link.symlink_to(tmp_path / target)
        assert f"{link}: a link" in message()
        link.unlink()
    for link, target in links:
        link.symlink_to(tmp_path / target)
    (root / "a/circle").symlink_to(root / "a")
    found = readers.image_folder(root, Reading(follow_links=True))
    names = [path.relative_to(root).as_posix() for path in found.paths]
    assert names == ["a/0.png", "a/deep/1.png", "a/link.png", "b/1.png"]


def test_links_within_the_root_are_followed(tmp_path):
    picture(tmp_path / "data/a/0.png", 0)
    (tmp_path / "data/b").mkdir()
    (tmp_path / "data/b/same.png").symlink_to("../a/0.png")
    (tmp_path / "data/b/deep").symlink_to("../a")
    (tmp_path / "link").symlink_to("data")
    for root in (tmp_path / "data", tmp_path / "link"):
        assert [path.name for path in readers.image_folder(root).paths] == ["0.png", "0.png", "same.png"]


WANTED = {"images": ("uint8", ("N", 4, 4)), "labels": ("int32|int64", ("N",)), "weights": ("float32", ("N", "D"))}


def arrays(**changes):
    good = {"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(3), "weights": np.ones((3, 2), np.float32)}
    return {**good, **changes}


def test_npz_arrays_gives_what_was_saved(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", more=np.zeros(1), **arrays())
    found = readers.npz_arrays(tmp_path / "a.npz", WANTED)
    assert list(found) == list(WANTED)
    for key, array in arrays().items():
        np.testing.assert_array_equal(found[key], array)
    np.savez(tmp_path / "nan.npz", **arrays(weights=np.full((3, 2), np.nan, np.float32)))
    assert np.isnan(readers.npz_arrays(tmp_path / "nan.npz", WANTED, finite=False)["weights"]).all()


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
        readers.npz_arrays(tmp_path / "a.npz", WANTED)
    assert str(caught.value).startswith(f"{tmp_path / 'a.npz'}: {message}")


def test_npz_arrays_refuses_broken_files(tmp_path):
    file = tmp_path / "a.npz"

    def message(content=None):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            readers.npz_arrays(file, WANTED)
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
        readers.npz_arrays(file, WANTED)


def parts(root, train, test, classes="abc", held="ca"):
    for part, names in ((train, classes), (test, held)):
        for name in names:
            picture(root / part / name / "0.png", 0)


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["val", "VALID", "Validation", "test"])
def test_image_folders_pairs_train_with_its_test_part(tmp_path, train, test):
    parts(tmp_path, train, test)
    first, second = readers.image_folders(tmp_path)
    assert first.classes == second.classes == ("a", "b", "c")
    assert [(path.parent.name, label) for path, label in zip(second.paths, second.labels, strict=True)] == [
        ("a", 0),
        ("c", 2),
    ]
    assert all(path.is_relative_to(tmp_path / test) for path in second.paths)
    alone, none = readers.image_folders(tmp_path / train)
    assert none is None
    assert alone.paths == first.paths


def test_image_folders_names_what_is_missing(tmp_path):
    parts(tmp_path, "train", "test")
    (tmp_path / "test/a").rename(tmp_path / "test/aa")
    with pytest.raises(UserError, match=r"aa: no such class in .*train: did you mean a\?|known: a, b, c"):
        readers.image_folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "held")
    with pytest.raises(UserError, match="has train, but none of val, valid, validation, test beside it"):
        readers.image_folders(tmp_path)
    parts(tmp_path, "Train", "val")
    with pytest.raises(UserError, match="has Train and train: expected one of them"):
        readers.image_folders(tmp_path)


def test_parts_are_never_taken_for_classes(tmp_path):
    parts(tmp_path / "a", "val", "Test")
    assert "a has val, but no train beside it" in refusal(readers.image_folders, tmp_path / "a")
    parts(tmp_path / "b", "train", "val")
    assert "found only parts of a data set: train, val" in refusal(readers.image_folder, tmp_path / "b")
    picture(tmp_path / "c/train/0.png", 0)
    picture(tmp_path / "c/test/0.png", 0)
    assert "found only parts of a data set: test, train" in refusal(readers.image_folders, tmp_path / "c")


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    for name in ("bus", "train", "test"):
        picture(tmp_path / name / "0.png", 0)
    found, none = readers.image_folders(tmp_path)
    assert (found.classes, none) == (("bus", "test", "train"), None)


def test_the_validation_part_comes_before_the_test_part(tmp_path):
    parts(tmp_path, "train", "test")
    parts(tmp_path, "train", "val")
    assert readers.image_folders(tmp_path)[1].paths[0].is_relative_to(tmp_path / "val")


CORNERS = np.zeros((8, 12, 3), np.uint8)
CORNERS[:4, :6], CORNERS[:4, 6:], CORNERS[4:, :6] = (200, 16, 16), (16, 200, 16), (16, 16, 200)
"""Red, green / blue, black."""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_photographs_are_upright_by_the_cameras_tag(tmp_path, suffix, tag):
    """The file holds the scene turned as EXIF says for the tag; orientations of the standard written out by hand."""
    stored = {
        1: CORNERS,
        2: CORNERS[:, ::-1],
        3: CORNERS[::-1, ::-1],
        4: CORNERS[::-1],
        5: CORNERS.transpose(1, 0, 2),
        6: CORNERS.transpose(1, 0, 2)[::-1],
        7: CORNERS.transpose(1, 0, 2)[::-1, ::-1],
        8: CORNERS.transpose(1, 0, 2)[:, ::-1],
    }[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    lossless = (
        {"lossless": True} if suffix == ".webp" else {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    )
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a{suffix}", exif=exif, **lossless)
    found = readers.read_image(tmp_path / f"a{suffix}")
    assert found.shape == CORNERS.shape
    assert np.abs(found.astype(int) - CORNERS).mean() < 8


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".webp", ".pnm"])
def test_every_kind_of_file_is_read_as_colors(tmp_path, suffix):
    gray = suffix == ".pgm"
    image = Image.fromarray(CORNERS).convert("L" if gray else "RGB")
    image.save(tmp_path / f"a{suffix}")
    found = readers.read_image(tmp_path / f"a{suffix}")
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert found.shape == CORNERS.shape
    assert np.abs(found - expected).mean() < (25 if suffix in {".jpg", ".webp"} else 0.5)
    assert suffix in readers.IMAGE_SUFFIXES


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (readers.read_image(tmp_path / "a.gif") == (255, 0, 0)).all()


def test_of_sixteen_bits_the_upper_eight_are_read(tmp_path):
    values = np.array([[0, 255, 256], [40_000, 65_279, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + values.astype(">u2").tobytes())
    for name in ("a.png", "a.tif", "a.pgm"):
        found = readers.read_image(tmp_path / name)
        assert found.dtype == np.uint8
        assert (found == (values >> 8)[..., None]).all(), name
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "deep.tif")
    Image.fromarray(np.zeros((2, 2), np.int32)).save(tmp_path / "whole.tif")
    for name in ("deep.tif", "whole.tif"):
        with pytest.raises(UserError, match=f"{name}: expected 8 or 16 bits per channel, found an image of mode [FI]"):
            readers.read_image(tmp_path / name)


def test_transparent_parts_lie_on_white(tmp_path):
    color = np.zeros((1, 3, 4), np.uint8)
    color[0, :, :3], color[0, :, 3] = (0, 0, 100), (255, 51, 0)
    Image.fromarray(color).save(tmp_path / "rgba.png")
    assert readers.read_image(tmp_path / "rgba.png").tolist() == [[[0, 0, 100], [204, 204, 224], [255, 255, 255]]]
    Image.fromarray(color[..., 2:]).save(tmp_path / "gray.png")
    assert readers.read_image(tmp_path / "gray.png").tolist() == [[[100] * 3, [224] * 3, [255] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "opaque.png")
    assert readers.read_image(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert readers.read_image(tmp_path / "opaque.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_the_colors_of_print_are_read(tmp_path):
    for suffix, options in ((".jpg", {"quality": 100, "subsampling": 0}), (".tif", {})):
        Image.fromarray(CORNERS).convert("CMYK").save(tmp_path / f"a{suffix}", **options)
        found = readers.read_image(tmp_path / f"a{suffix}").astype(int)
        assert np.abs(found - CORNERS).mean() < 8, suffix


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".jpg", ".ppm", ".png", ".tif", ".webp"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_decoded_or_refused_in_one_line(tmp_path_factory, suffix, data):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    kind = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    Image.fromarray(CORNERS).save(
        buffer, kind, **({"exif": exif} if suffix in {".jpg", ".png", ".tif", ".webp"} else {})
    )
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(bytes(content))
    message = f"{path}: "
    try:
        assert readers.read_image(path).ndim == 3
    except UserError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


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
        train, test = readers.npz_images(path)
        assert train.classes == test.classes == names
        np.testing.assert_array_equal(train.images, arrays["train_images"])
        np.testing.assert_array_equal(test.images, arrays["test_images"])
        assert train.labels.tolist() == [0, 1, 2, 1, 0]
        assert train.labels.dtype == test.labels.dtype == np.int64
    gray, none = readers.npz_images(third)
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
        readers.npz_images(tmp_path / "a.npz")
    assert message in str(caught.value)
    assert str(tmp_path / "a.npz") in str(caught.value)


def test_npz_images_refuses_broken_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    for name in ("a.npz", "none.npz"):
        with pytest.raises(UserError, match="not a whole npz file|no such file"):
            readers.npz_images(tmp_path / name)
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="no array 'train_images'"):
        readers.npz_images(tmp_path / "a.npz")


@pytest.mark.parametrize(("kind", "classes"), [("CIFAR-10", 10), ("CIFAR-100", 100)])
@pytest.mark.filterwarnings("error")
def test_cifar_gives_the_images_of_its_files(tmp_path, monkeypatch, kind, classes):
    folder = tmp_path / ("cifar-10-batches-py" if kind == "CIFAR-10" else "cifar-100-python")
    written = write_cifar(folder, monkeypatch, kind=kind, classes=classes, each=1)
    files = readers.CIFAR_FILES[kind]
    for root in (tmp_path, folder):
        for part, names in zip(readers.cifar(root), (files.train, [files.test]), strict=True):
            rows = np.concatenate([written[name][0] for name in names])
            assert part.classes == tuple(f"class {index}" for index in range(classes))
            assert part.labels.tolist() == [label for name in names for label in written[name][1]]
            assert part.images.shape == (len(rows), 32, 32, 3)
            for row, image in zip(rows, part.images, strict=True):  # three planes, each by rows
                assert all(image[7, 9, color] == row[1024 * color + 32 * 7 + 9] for color in range(3))


def test_checksums_of_cifar_are_those_that_torchvision_verifies():
    cifar = pytest.importorskip("torchvision.datasets.cifar", reason="torchvision knows the published checksums")
    for kind in (cifar.CIFAR10, cifar.CIFAR100):
        for name, checksum in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
            assert readers.CIFAR_MD5[name] == checksum


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_no_other_file_than_the_published_one_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "c", monkeypatch)
    for content in (pickle.dumps({"data": Evil()}), b"", (tmp_path / "c/train").read_bytes()[:-1]):
        (tmp_path / "c/train").write_bytes(content)
        message = refusal(readers.cifar, tmp_path / "c")
        assert message.startswith(f"{tmp_path / 'c/train'} is not the published file of CIFAR")
        assert "npz:FILE" in message
    assert not (tmp_path / "unpickled").exists()


def test_cifar_names_what_is_missing(tmp_path, monkeypatch):
    assert "found neither" in refusal(readers.cifar, tmp_path)
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / "test").unlink()
    assert "test: no such file" in refusal(readers.cifar, tmp_path)
    write_cifar(tmp_path / "cifar-100-python", monkeypatch)
    assert "give the folder of one" in refusal(readers.cifar, tmp_path)
