"""Data that is there without a download, and readers of the folders that people have; NumPy arrays, no torch.

Real: handwritten digits (scikit-learn), Python's documentation (``pydoc_data``), the standard library's source, names of
Unicode characters. Rendered: glyphs of many alphabets, drawn from the twelve DejaVu faces that matplotlib ships.
"""

import dataclasses
import hashlib
import importlib.util
import sys
import sysconfig
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import MissingExtraError, UserError, did_you_mean

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: (N, H, W) uint8, 0 is black.
        labels: (N,) int64.
        classes: name of each label.
        source: where they come from, and whether they are real or rendered.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str


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


def _needs(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{module} is not installed; pip install 'tenfold[{extra}]'")


def digits(seed: int = 0, test_share: float = 0.25) -> tuple[Images, Images]:
    """The 1797 real handwritten digits (8 x 8, 16 levels scaled to 0..255) of scikit-learn, as (train, test).

    Args:
        seed: of the split, which keeps the share of each class.
        test_share: share of the test images.
    """
    _needs("sklearn", "demo")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    indices = train_test_split(np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=labels)
    source = "real: handwritten digits (shipped by scikit-learn)"
    train, test = (Images(images[i], labels[i], tuple("0123456789"), source) for i in map(np.sort, indices))
    return train, test


def _faces() -> dict[str, Path]:
    """The DejaVu faces that matplotlib ships and that hold letters, by name."""
    _needs("matplotlib", "demo")
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return {path.stem: path for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.stem}


@cache
def _renderings(size: int) -> tuple[tuple[str, ...], tuple[str, ...], NDArray[np.uint8]]:
    """Faces, characters, and images (faces, characters, size, size) of letters and digits that all faces hold.

    Of characters whose renderings are equal in every face (Latin A, Greek Alpha and Cyrillic A), the first by code point
    stays.
    """
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    faces = _faces()
    maps = [set(FT2Font(str(path)).get_charmap()) for path in faces.values()]
    common = sorted(set.intersection(*maps))
    characters = [chr(c) for c in common if unicodedata.category(chr(c)) in {"Lu", "Ll", "Lt", "Lm", "Lo", "Nd"}]
    images = np.zeros((len(faces), len(characters), size, size), np.uint8)
    for row, path in zip(images, faces.values(), strict=True):
        font = ImageFont.truetype(str(path), round(size * 0.62), layout_engine=ImageFont.Layout.BASIC)
        for image, character in zip(row, characters, strict=True):
            canvas = Image.new("L", (size, size))
            ImageDraw.Draw(canvas).text((size / 2, size * 0.72), character, fill=255, font=font, anchor="ms")
            image[:] = np.asarray(canvas)
    kept: dict[bytes, int] = {}
    for index in range(len(characters)):
        kept.setdefault(images[:, index].tobytes(), index)
    keep = sorted(kept.values())
    return tuple(faces), tuple(characters[i] for i in keep), images[:, keep]


def glyphs(
    size: int = 32,
    *,
    classes: int | None = None,
    held_out: Sequence[str] = ("DejaVuSerif", "DejaVuSansMono-Oblique", "DejaVuSerif-BoldItalic"),
    per_face: int = 4,
    seed: int = 0,
) -> tuple[Images, Images]:
    """Letters and digits of many alphabets in twelve faces, as (train, test) with whole faces held out for testing.

    Args:
        size: height and width in pixels.
        classes: the first so many characters by code point; default all that look different.
        held_out: faces that are drawn for the test images only.
        per_face: jittered copies of a character in a face: rotated by up to 12 degrees, scaled by 0.85 to 1.15, moved by
            up to 8 % of the size. Copy k of character c in face f depends on (seed, f, c, k) only.
        seed: of the jitter.

    Raises:
        UserError: an unknown face.
    """
    faces, characters, images = _renderings(size)
    for name in held_out:
        if name not in faces:
            raise UserError(f"unknown face '{name}': {did_you_mean(name, faces)}")
    count = len(characters) if classes is None else classes
    if not 1 <= count <= len(characters):
        raise UserError(f"classes must be 1 to {len(characters)}, got {classes}")
    parts: dict[bool, list[NDArray[np.uint8]]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    for f, face in enumerate(faces):
        for c in range(count):
            for k in range(per_face):
                parts[face in held_out].append(_jittered(images[f, c], np.random.default_rng((seed, f, c, k))))
                labels[face in held_out].append(c)
    source = "rendered: letters and digits in the DejaVu faces that matplotlib ships"
    train, test = (
        Images(np.stack(parts[part]), np.asarray(labels[part], np.int64), characters[:count], source)
        for part in (False, True)
    )
    return train, test


def _jittered(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    from PIL import Image

    size = len(image)
    angle, scale = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(0.85, 1.15)
    shift = rng.uniform(-0.08, 0.08, 2) * size
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    center = np.array([size / 2, size / 2])
    offset = center - turn @ (center + shift)
    coefficients = (turn[0, 0], turn[0, 1], offset[0], turn[1, 0], turn[1, 1], offset[1])
    moved = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def topics() -> Text:
    """Python's documentation of its own language, as ``help()`` shows it: running English text with code, real."""
    from pydoc_data.topics import topics as pages

    text = "\n\n".join(pages[name].strip() for name in sorted(pages))
    return Text(text, "pydoc_data.topics (Python's documentation, shipped with Python)")


def standard_library_code(
    modules: Sequence[str] = ("argparse", "ast", "csv", "datetime", "inspect", "tarfile"),
) -> Text:
    """Source code of modules of the standard library, real."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in modules:
        path = folder / f"{name.replace('.', '/')}.py"
        if not path.exists():
            raise UserError(f"no module {name} with one source file in the standard library")
        texts.append(path.read_text(encoding="utf-8"))
    return Text("\n\n".join(texts), f"source of the standard library ({', '.join(modules)}; shipped with Python)")


def unicode_names(first: int = 0x0370, count: int = 256) -> Text:
    """Facts, one a line, real: ``U+0416 -> CYRILLIC CAPITAL LETTER ZHE``.

    Args:
        first: code point to begin at (0x0370: Greek, then Cyrillic).
        count: number of assigned characters.
    """
    named = ((code, unicodedata.name(chr(code), None)) for code in range(first, sys.maxunicode + 1))
    lines: list[str] = []
    for code, name in named:
        if name:
            lines.append(f"U+{code:04X} -> {name}")
        if len(lines) == count:
            break
    return Text("\n".join(lines), f"unicodedata {unicodedata.unidata_version} (shipped with Python)")


def parse_source(source: str, *, kinds: Sequence[str], embedded: Sequence[str]) -> tuple[str, Path | None]:
    """Split a ``--data`` value: ``("npz", Path("a.npz"))`` for ``npz:a.npz``, ``("digits", None)`` for ``digits``.

    Args:
        source: what the user gave.
        kinds: known kinds with a path.
        embedded: known names without one.

    Raises:
        UserError: an unknown kind or name, with the nearest known ones, or a path that is not there.
    """
    kind, colon, path = source.partition(":")
    if not colon:
        if source in embedded:
            return source, None
        hint = (
            f"{did_you_mean(source, embedded)} A file is {kinds[0]}:PATH" if kinds else did_you_mean(source, embedded)
        )
        raise UserError(f"--data {source}: unknown name: {hint}")
    if kind not in kinds:
        raise UserError(f"--data {source}: unknown kind '{kind}': {did_you_mean(kind, kinds)}")
    if not Path(path).exists():
        raise UserError(f"--data {source}: no such file or folder")
    return kind, Path(path)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """One folder a class: sorted class names, paths and labels of all images."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]


def image_folder(root: str | Path, *, verify: bool = False) -> ImageFolder:
    """Read the layout ``root/class/name.png``.

    Args:
        root: the folder.
        verify: decode every image, so that a broken one is found now and not in hour three.

    Raises:
        UserError: no class folder, a class without images, an image that links outside of the root, or (``verify``) one
            that cannot be decoded; the message names it.
    """
    root = Path(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise UserError(f"{root}: expected one folder a class, found none")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UserError(f"{folder}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    for path in paths:
        if not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: leads outside of {root}")
        if verify:
            _decode(path)
    return ImageFolder(tuple(folder.name for folder in folders), tuple(paths), np.asarray(labels, np.int64))


def _decode(path: Path) -> None:
    _needs("PIL", "demo")
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be decoded as an image ({error})") from error


def npz_arrays(path: str | Path, expected: Mapping[str, tuple[str, tuple[int | None, ...]]]) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file, checked; nothing is unpickled.

    Args:
        path: the file.
        expected: key -> (dtype, shape), None for a free dimension: ``{"images": ("uint8", (None, 32, 32, 3))}``.

    Raises:
        UserError: no such file, not an npz, a missing key, another dtype or shape; the message names file and key.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in expected if key not in file.files]
            if missing:
                raise UserError(f"{path}: no array '{missing[0]}': {did_you_mean(missing[0], file.files)}")
            arrays = {key: file[key] for key in expected}
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a whole npz file of plain arrays ({error})") from error
    for key, (dtype, shape) in expected.items():
        array = arrays[key]
        fits = len(array.shape) == len(shape) and all(
            a == b for a, b in zip(array.shape, shape, strict=True) if b is not None
        )
        if array.dtype != np.dtype(dtype) or not fits:
            wanted = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
            raise UserError(f"{path}: '{key}' is {array.dtype} {array.shape}, expected {dtype} {wanted}")
    return arrays
