"""Data that is there without a download, and readers of the files that people have; NumPy arrays, no torch.

Real: handwritten digits (scikit-learn), Python's documentation (``pydoc_data``), the standard library's source, names of
Unicode characters. Rendered: glyphs of many alphabets, drawn from the twelve DejaVu faces that matplotlib ships.
"""

import dataclasses
import hashlib
import importlib.util
import os
import pickle
import sys
import sysconfig
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenfold.errors import MissingExtraError, NonFiniteError, UserError, did_you_mean

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        images: (N, H, W) uint8, 0 is black; in color (N, H, W, 3), RGB.
        labels: (N,) int64.
        classes: name of each label.
        source: where they come from, and whether they are real or rendered.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    source: str


@dataclasses.dataclass(frozen=True)
class Glyphs(Images):
    """Images of characters, which know the typeface that they were drawn in.

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


def needs(module: str, extra: str) -> None:
    """Say in one line which extra brings a missing module."""
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f'{module} is not installed; pip install "tenfold[{extra}]"')


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


def standard_library_code(
    modules: Sequence[str] = ("argparse", "ast", "csv", "datetime", "inspect", "tarfile"),
) -> Text:
    """Source code of modules of the standard library, joined by blank lines in the order given; real.

    Raises:
        UserError: a name that is not a module of the standard library with one Python file of its own.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for name in modules:
        path = folder / f"{name.replace('.', '/')}.py"
        if name.partition(".")[0] not in sys.stdlib_module_names or not path.is_file():
            near = did_you_mean(name, sys.stdlib_module_names)
            raise UserError(f"'{name}' is no module of one Python file in the standard library: {near}")
        texts.append(path.read_text(encoding="utf-8"))
    return Text("\n\n".join(texts), f"source of the standard library ({', '.join(modules)}; shipped with Python)")


def unicode_names(first: int = 0x0370, count: int = 256) -> Text:
    """Facts, one a line, real: ``U+0416 -> CYRILLIC CAPITAL LETTER ZHE``.

    Args:
        first: code point to begin at (0x0370: Greek, then Cyrillic).
        count: number of characters; code points without a name are passed over.

    Raises:
        UserError: fewer than ``count`` names from there on.
    """
    lines: list[str] = []
    for code in range(first, sys.maxunicode + 1):
        if len(lines) == count:
            break
        if name := unicodedata.name(chr(code), None):
            lines.append(f"U+{code:04X} -> {name}")
    if len(lines) != count or count < 1:
        raise UserError(f"count must be 1 to the {len(lines)} names from U+{first:04X} on, got {count}")
    return Text("\n".join(lines), f"unicodedata {unicodedata.unidata_version} (shipped with Python)")


def parse_source(source: str, *, kinds: Sequence[str], embedded: Sequence[str] = ()) -> tuple[str, Path | None]:
    """Split a ``--data`` value: ``("npz", Path("a.npz"))`` for ``npz:a.npz``, ``("digits", None)`` for ``digits``.

    Args:
        source: what the user gave.
        kinds: known kinds with a path.
        embedded: known names without one.

    Raises:
        UserError: an unknown kind or name, with the nearest known ones, or a path that is not there.
    """
    kind, colon, name = source.partition(":")
    if source in embedded:
        return source, None
    if kind in kinds and name:
        path = Path(name).expanduser()
        if not os.path.exists(path):  # False, too, for a name that no file can have
            raise UserError(f"--data {source}: no such file or folder: {path}")
        return kind, path
    if kind in kinds:
        raise UserError(f"--data {source}: expected a path: {kind}:PATH")
    if kind in embedded:
        raise UserError(f"--data {source}: '{kind}' is embedded and takes no path: --data {kind}")
    forms = ", ".join([*(f"{kind}:PATH" for kind in kinds), *embedded])
    if not colon and os.path.exists(source):
        raise UserError(f"--data {source}: a path needs its kind before it, one of {forms}")
    near = did_you_mean(kind, [*kinds, *embedded])
    raise UserError(f"--data {source}: unknown {'kind' if colon else 'name'} '{kind}': {near} (forms: {forms})")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """One folder a class: sorted class names, sorted paths (N), and labels (N,) int64 that index the names."""

    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]


def image_folder(root: str | Path, *, verify: bool = False) -> ImageFolder:
    """Read the layout ``root/class/name.png``, at any depth below the class; names that begin with a dot are skipped.

    Args:
        root: the folder.
        verify: decode every image, so that a broken one is found now and not in hour three.

    Raises:
        UserError: no such folder, no class folder, a class without images, a link that leads nowhere or outside of the
            root, or (``verify``) an image that cannot be decoded; the message names it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{root}: expected one folder a class, found none")
    inside = root.resolve()
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and not path.is_dir()
        )
        if not found:
            raise UserError(f"{folder}: no image in this class ({', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: a link that leads nowhere")
        if not path.resolve().is_relative_to(inside):
            raise UserError(f"{path}: leads outside of {root}")
        if verify:
            read_image(path)
    return ImageFolder(tuple(folder.name for folder in folders), tuple(paths), np.asarray(labels, np.int64))


def image_folders(root: str | Path, *, verify: bool = False) -> tuple[ImageFolder, ImageFolder | None]:
    """Read ``root/train/class/name.png`` with ``root/val`` or ``root/test`` beside it, or ``root/class/name.png`` alone.

    Returns:
        The part to train on and the part to test on, whose labels index the same class names; None where there is none.

    Raises:
        UserError: as for ``image_folder``; ``train`` without a test part; a class of the test part that is not in ``train``.
    """
    root = Path(root)
    if not (root / "train").is_dir():
        return image_folder(root, verify=verify), None
    held = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if held is None:
        raise UserError(f"{root} has train, but neither val nor test beside it")
    train, test = image_folder(root / "train", verify=verify), image_folder(held, verify=verify)
    number = {name: label for label, name in enumerate(train.classes)}
    for name in test.classes:
        if name not in number:
            raise UserError(f"{held / name}: no such class in {root / 'train'}: {did_you_mean(name, number)}")
    labels = np.asarray([number[name] for name in test.classes], np.int64)[test.labels]
    return train, ImageFolder(train.classes, test.paths, labels)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Decode one image file as (H, W, 3) uint8 RGB, as it is stored (a camera's orientation tag is not applied).

    Raises:
        UserError: unreadable, truncated, too large to be meant, or of more than 8 bits a channel; names the file.
    """
    needs("PIL", "demo")
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path}: expected 8 bits a channel, found an image of mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be decoded as an image ({' '.join(str(error).split())})") from error


Shape = tuple[int | str, ...]
"""Of an array: a number fixes a dimension; a letter leaves it open, and the same letter means the same number."""


def npz_arrays(
    path: str | Path, expected: Mapping[str, tuple[str, Shape]], *, finite: bool = True
) -> dict[str, NDArray[Any]]:
    """Arrays of an ``.npz`` file, checked; nothing is unpickled.

    ``npz_arrays(path, {"images": ("uint8", ("N", 32, 32, 3)), "labels": ("int32|int64", ("N",))})`` also makes sure that
    there are as many labels as images.

    Args:
        path: the file.
        expected: key -> (dtype, or several joined by ``|``; shape). Other keys of the file are not read.
        finite: refuse NaN and infinity.

    Raises:
        UserError: no such file, not an npz, a missing key, another dtype or shape; the message names file and key.
        NonFiniteError: NaN or infinity.
    """
    path = Path(path)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        if not zipfile.is_zipfile(path):  # np.load reads other formats, too
            raise UserError(f"{path}: {'not a whole npz file' if path.exists() else 'no such file'}")
        with np.load(path, allow_pickle=False) as file:
            for key in expected:
                if key not in file.files:
                    raise UserError(f"{path}: no array '{key}': {did_you_mean(key, file.files)}")
                arrays[key] = np.asarray(file[key])
    except UserError:
        raise
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        # TypeError: NumPy 2.3 on a member of the archive that is no array
        raise UserError(f"{path}: not a whole npz file of plain arrays ({' '.join(str(error).split())})") from error
    sizes: dict[str, tuple[int, str]] = {}
    for key, (dtypes, shape) in expected.items():
        array = arrays[key]
        fits = array.ndim == len(shape) and array.dtype in [np.dtype(dtype) for dtype in dtypes.split("|")]
        if not fits or any(isinstance(want, int) and want != n for n, want in zip(array.shape, shape, strict=True)):
            wanted = f"{dtypes.replace('|', ' or ')} ({', '.join(map(str, shape))})"
            raise UserError(f"{path}: '{key}' is {array.dtype} {array.shape}, expected {wanted}")
        for n, letter in zip(array.shape, shape, strict=True):
            if isinstance(letter, str) and sizes.setdefault(letter, (n, key))[0] != n:
                before, first = sizes[letter]
                raise UserError(f"{path}: '{key}' is {array.shape}: {letter} is {n} here, but {before} in '{first}'")
        if finite and array.dtype.kind in "fc" and not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise NonFiniteError(f"{path}: '{key}' holds {array[where]} at {where}")
    return arrays


_PARTS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("x", "y"),
)


def npz_images(path: str | Path) -> tuple[Images, Images | None]:
    """Images with labels out of an ``.npz`` file, as (train, test).

    Arrays are ``train_images, train_labels, test_images, test_labels``, or ``x_train, y_train, x_test, y_test``, or ``x, y``
    alone (test is then None): images (N, H, W) or (N, H, W, 3) uint8, labels whole numbers from 0. ``classes``, where it is
    there, names them.

    Raises:
        UserError: no such file, not an npz, another form, images of two sizes, a label that is negative or has no name.
    """
    path = Path(path)
    forms = _npz_forms(path)
    keys = next((keys for keys in _PARTS if keys[0] in forms), _PARTS[0])
    expected: dict[str, tuple[str, Shape]] = {}
    for number, key in enumerate(keys):
        rows = f"N{number // 2}"
        color: Shape = (3,) if key in forms and len(forms[key][0]) == 4 else ()
        expected[key] = ("uint8|int16|int32|int64", (rows,)) if number % 2 else ("uint8", (rows, "H", "W", *color))
    found = npz_arrays(path, expected)
    labels = {key: found[key].astype(np.int64) for key in keys[1::2]}
    top = max(int(part.max(initial=-1)) for part in labels.values())
    names = tuple(str(label) for label in range(top + 1))
    if "classes" in forms:
        dtype = forms["classes"][1]
        if dtype.kind != "U":
            raise UserError(f"{path}: 'classes' is {dtype}, expected names")
        names = tuple(map(str, npz_arrays(path, {"classes": (dtype.str, ("C",))})["classes"]))
    for key, part in labels.items():
        if len(part) and not 0 <= part.min() <= part.max() < len(names):
            wrong = int(part.min() if part.min() < 0 else part.max())
            raise UserError(f"{path}: '{key}' holds {wrong}, expected 0 to {len(names) - 1}")
    source = f"the user's: {path.name}"
    parts = [Images(found[i], labels[j], names, source) for i, j in zip(keys[::2], keys[1::2], strict=True)]
    return parts[0], parts[1] if len(parts) > 1 else None


def _npz_forms(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of the arrays, by their headers; empty for a file that cannot be read, as ``npz_arrays`` then says."""
    forms = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    old = np.lib.format.read_magic(file) == (1, 0)
                    read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = read(file)
                    forms[member.removesuffix(".npy")] = shape, dtype
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}
    return forms


_CIFAR = {
    # files of the train part, file of the test part, file of the names, key of the labels, key of the names
    "CIFAR-10": (tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta", "labels", "label_names"),
    "CIFAR-100": (("train",), "test", "meta", "fine_labels", "fine_label_names"),
}


def cifar(root: str | Path) -> tuple[Images, Images]:
    """CIFAR-10 or CIFAR-100 as published for Python, as (train, test); images (N, 32, 32, 3).

    Its files are pickles. They are read by an unpickler that knows lists, dicts, strings, numbers and NumPy arrays of
    integers, and refuses to look up anything else, so nothing in a file is ever run.

    Args:
        root: the unpacked folder (``cifar-10-batches-py``, ``cifar-100-python``) or the one above it.

    Raises:
        UserError: no such folder, a file that is missing, broken, or holds something else; the message names it.
    """
    root = Path(root)
    folders = [root, root / "cifar-10-batches-py", root / "cifar-100-python"]
    found = [(folder, kind) for folder in folders for kind, files in _CIFAR.items() if (folder / files[2]).is_file()]
    if not found:
        raise UserError(f"{root}: expected the files of CIFAR-10 or CIFAR-100 (batches.meta or meta), found neither")
    if len(found) > 1:
        raise UserError(f"{root} holds {' and '.join(kind for _, kind in found)}: give the folder of one")
    folder, kind = found[0]
    train, test, meta, label_key, name_key = _CIFAR[kind]
    names = _cifar_file(folder / meta).get(name_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / meta}: expected a list of names as '{name_key}'")

    def part(files: Sequence[str]) -> Images:
        images, labels = zip(*(_cifar_images(folder / file, label_key, len(names)) for file in files), strict=True)
        source = f"real: {kind}, from files of the user"
        return Images(np.concatenate(images), np.concatenate(labels), tuple(names), source)

    return part(train), part([test])


def _cifar_images(path: Path, label_key: str, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = _cifar_file(path)
    rows, labels = content.get("data"), content.get(label_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
        raise UserError(f"{path}: expected 'data' as uint8 (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(isinstance(label, int) for label in labels):
        raise UserError(f"{path}: expected a whole number for each of the {len(rows)} images as '{label_key}'")
    if unknown := [label for label in labels if not 0 <= label < classes]:
        raise UserError(f"{path}: '{label_key}' holds {unknown[0]}, there are {classes} classes")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), np.asarray(labels, np.int64)


def _cifar_file(path: Path) -> dict[str, Any]:
    """The dict that a file of CIFAR holds, with keys and names as text."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin-1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: not a file of CIFAR for Python ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dict, found {type(content).__name__}")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Plain Python values and arrays of integers; every other name in the file is refused, so nothing of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name == "ndarray":
            return np.ndarray
        if module == "numpy" and name == "dtype":
            return _integer_dtype
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return _latin_bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _empty_array(kind: type, shape: tuple[int, ...], dtype: object) -> NDArray[np.uint8]:
    """What NumPy pickles an array as: an empty one first, whose state follows."""
    return np.empty(0, np.uint8)


def _integer_dtype(code: str, *old: object) -> np.dtype[Any]:
    """A type of integers, without the flags (align, copy) that NumPy deprecates."""
    if code.lstrip("<>|=") not in {"u1", "i1", "i4", "i8"}:
        raise pickle.UnpicklingError(f"it holds an array of '{code}'")
    return np.dtype(code)


def _latin_bytes(text: str, encoding: str) -> bytes:
    return text.encode("latin-1")
