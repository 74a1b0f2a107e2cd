"""Data that is there without a download; NumPy arrays, no torch.

Real: handwritten digits (scikit-learn), Python's documentation (``pydoc_data``). Rendered: glyphs of many alphabets, drawn
from the twelve DejaVu faces that matplotlib ships.
"""

import dataclasses
import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import UserError, did_you_mean, needs
from tenfold.readers import Images


@dataclasses.dataclass(frozen=True)
class Glyphs(Images):
    """Images of characters, with the typeface that each was drawn in.

    Attributes:
        faces: (N,) int64, index into ``face_names``.
        face_names: all twelve, in the train and in the test part alike.
    """

    faces: NDArray[np.int64]
    face_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """Text with its origin; ``sha256`` is recorded because the text changes with Python's version."""

    text: str
    source: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 bytes."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.source}, Python {sys.version_info.major}.{sys.version_info.minor}, sha256 {self.sha256[:12]}"


def digits(seed: int = 0, test_share: float = 0.25) -> tuple[Images, Images]:
    """The 1797 real handwritten digits (8 x 8) that scikit-learn ships, as (train, test).

    Their 17 levels 0..16 are scaled to 0..255, so ``np.round(images * 16 / 255)`` gives the original ones back.

    Args:
        seed: of the split, which keeps the share of each class; images stay in scikit-learn's order within a part.
        test_share: share of the test images, in (0, 1).
    """
    needs("sklearn", "demo")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    indices = train_test_split(np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=labels)
    source = "real: handwritten digits (shipped by scikit-learn)"
    train, test = (Images(images[i], labels[i], tuple("0123456789"), source) for i in map(np.sort, indices))
    return train, test


@cache
def _faces() -> dict[str, Path]:
    """The twelve DejaVu faces of text that matplotlib ships (the two for display hold few letters), by name."""
    needs("matplotlib", "demo")
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {path.stem: path for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.stem}


@lru_cache(maxsize=2)
def _renderings(characters: tuple[str, ...], size: int) -> NDArray[np.uint8]:
    """Every character in every face, (F, C, size, size): centered by its advance, on one baseline, as large as all fit."""
    from PIL import Image, ImageDraw, ImageFont

    images = np.zeros((len(_faces()), len(characters), size, size), np.uint8)
    for row, path in zip(images, _faces().values(), strict=True):
        font = ImageFont.truetype(str(path), round(size * 0.62), layout_engine=ImageFont.Layout.BASIC)
        for image, character in zip(row, characters, strict=True):
            canvas = Image.new("L", (size, size))
            ImageDraw.Draw(canvas).text((size / 2, size * 0.72), character, fill=255, font=font, anchor="ms")
            image[:] = np.asarray(canvas)
    images.flags.writeable = False
    return images


@cache
def glyph_characters() -> tuple[str, ...]:
    """The characters of ``glyphs``, by code point: letters and digits of all twelve faces that look different.

    Candidates are letters and decimal digits (categories Lu, Ll, Lo, Nd) without a Unicode decomposition (so no accented
    ones) that lie in all twelve faces: 628. One is dropped when, drawn 64 pixels high, it equals in every pixel a kept
    one of lower code point in at least one face, since nobody could tell the two apart there: Latin A stays, Greek Alpha
    and Cyrillic A go, and so does Cyrillic te, an m in italic serifs. 534 stay (545 differ in DejaVuSans alone).
    """
    from matplotlib.ft2font import FT2Font

    common = set.intersection(*(set(FT2Font(str(path)).get_charmap()) for path in _faces().values()))
    candidates = tuple(
        character
        for character in map(chr, sorted(common))
        if unicodedata.category(character) in {"Lu", "Ll", "Lo", "Nd"} and not unicodedata.decomposition(character)
    )
    kept: list[str] = []
    seen: set[tuple[int, bytes]] = set()
    for character, images in zip(candidates, _renderings(candidates, 64).swapaxes(0, 1), strict=True):
        looks = {(face, image.tobytes()) for face, image in enumerate(images)}
        if not looks & seen:
            kept.append(character)
            seen |= looks
    return tuple(kept)


def glyphs(
    size: int = 32,
    *,
    classes: int | None = None,
    held_out: Sequence[str] = ("DejaVuSerif", "DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic"),
    per_face: int = 4,
    jitter: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
) -> tuple[Glyphs, Glyphs]:
    """Letters and digits of many alphabets in twelve faces, as (train, test) with whole faces held out for testing.

    An image depends on (size, jitter, noise, seed), its face, its character and the number of its copy, and on nothing
    else: not on the order of drawing, nor on how many classes, faces or copies there are.

    Args:
        size: height and width in pixels.
        classes: the first so many of ``glyph_characters()``; 62 gives 0-9, A-Z, a-z. Default: all.
        held_out: faces that are drawn for the test images only; the default holds out one of each family's styles.
        per_face: copies of a character in a face.
        jitter: 1 turns each copy by up to 12 degrees, scales it by 0.85 to 1.15 and moves it by up to 8 % of the size
            along each axis, all uniform; other values widen or narrow these ranges, 0 draws every copy as it is.
        noise: standard deviation of normal noise, in levels of 0..255, clipped.
        seed: of jitter and noise.

    Raises:
        UserError: an unknown face, or a number out of its range.
    """
    names, characters = tuple(_faces()), glyph_characters()
    for name in held_out:
        if name not in names:
            raise UserError(f"held_out: unknown face '{name}': {did_you_mean(name, names)}")
    if not 0 < len(set(held_out)) < len(names):
        raise UserError(f"held_out: expected 1 to {len(names) - 1} faces, got {len(set(held_out))}")
    count = len(characters) if classes is None else classes
    limits: dict[str, tuple[float, float, float]] = {"classes": (count, 1, len(characters)), "size": (size, 8, 512)}
    limits |= {"per_face": (per_face, 1, 9999), "jitter": (jitter, 0, 3), "noise": (noise, 0, 255)}
    for option, (number, low, high) in {**limits, "seed": (seed, 0, 2**63)}.items():
        if not low <= number <= high:
            raise UserError(f"{option} must be {low} to {high}, got {number}")
    drawn = _renderings(characters, size)
    source = "rendered: letters and digits in the DejaVu faces that matplotlib ships"
    parts = []
    for testing in (False, True):
        faces = [f for f, name in enumerate(names) if (name in held_out) == testing]
        keys = [(f, c, k) for f in faces for c in range(count) for k in range(per_face)]
        images = np.empty((len(keys), size, size), np.uint8)
        for image, (f, c, k) in zip(images, keys, strict=True):
            rng = np.random.default_rng((seed, f, ord(characters[c]), k))
            image[:] = _jittered(drawn[f, c], rng, jitter, noise)
        face, label, _ = np.asarray(keys, np.int64).T
        parts.append(Glyphs(images, label.copy(), characters[:count], source, face.copy(), names))
    return parts[0], parts[1]


def _jittered(image: NDArray[np.uint8], rng: np.random.Generator, jitter: float, noise: float) -> NDArray[np.uint8]:
    from PIL import Image

    size = len(image)
    angle, zoom, *shift = rng.uniform(-1, 1, 4) * jitter
    angle, scale, move = np.deg2rad(12 * angle), 1 + 0.15 * zoom, 0.08 * size * np.asarray(shift)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    offset = size / 2 - turn @ (size / 2 + move)  # output pixel -> input pixel, about the center
    coefficients = (turn[0, 0], turn[0, 1], offset[0], turn[1, 0], turn[1, 1], offset[1])
    moved = np.asarray(
        Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    )
    if noise:
        moved = np.clip(np.round(moved + rng.normal(0, noise, moved.shape)), 0, 255).astype(np.uint8)
    return moved


def topics() -> Text:
    """Python's documentation of its own language, as ``help()`` shows it: running English text with code, real."""
    from pydoc_data.topics import topics as pages

    text = "\n\n".join(pages[name].strip() for name in sorted(pages))
    return Text(text, "pydoc_data.topics (Python's documentation, shipped with Python)")
