"""The embedded data against what the libraries themselves hold."""

import hashlib
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from sklearn.datasets import load_digits

from tenfold import UserError, datasets

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


def test_the_topics_are_pythons_own_and_carry_their_hash():
    from pydoc_data import topics

    text = datasets.topics()
    assert all(page.strip() in text.text for page in topics.topics.values())
    assert text.sha256 == hashlib.sha256(text.text.encode("utf-8")).hexdigest()
    assert text.sha256[:12] in str(text)
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in str(text)


def test_without_an_extra_the_message_holds_the_command_that_installs_it():
    """In a process of its own, where the libraries cannot be found; that importing loads none of them is seen there, too."""
    program = """
import sys
from tenfold import datasets, figures, readers, report
heavy = {"torch", "sklearn", "matplotlib", "PIL", "jinja2", "scipy"} & set(sys.modules)
assert not heavy, heavy
for name in ("sklearn", "matplotlib", "PIL", "jinja2", "scipy"):
    sys.modules[name] = None
for call in (
    datasets.digits,
    datasets.glyphs,
    lambda: readers.read_image("a.png"),
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
